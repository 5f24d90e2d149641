"""A stage's forward and backward: a dense block and its tail, in primitives.

Beside each step stands the observation of the design it uses. Notation: M pixels, X (M, C_max) the
features, G (M, C_max) their gradient, layer l reads the prefix X[:, :C_l] and writes the k channels
behind it; s, t, p, q, a, b, c are vectors.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .buffers import (
    FeatureBuffer,
    Geometry,
    GradientBuffer,
    Reader,
    StatisticsTable,
    Sums,
    needs_statistics,
    norm_backward,
    reader,
)
from .spec import Norm, Stage, StemSpec

# one primitive per method; backends/reference.py is their specification
Backend = Any


class Forward(NamedTuple):
    out: Tensor  # the tail's output; empty without tail
    features: Tensor  # X as images (N, C_max, H, W), channels last
    statistics: Tensor  # (2, columns): see StatisticsTable
    bottlenecks: list[Tensor]  # each layer's Y (M, B), where they are kept


def forward(x: Tensor, stage: Stage, mask: Tensor | None, backend: Backend) -> Forward:
    """Run a stage on x (N, C_0, H, W); ``mask`` is dropout's, (M, L*k), True for what is kept."""
    n, channels, h, w = x.shape
    geometry = Geometry(n, h, w)
    table = StatisticsTable(stage, channels, like=x)
    last = channels + sum(layer.growth for layer in stage.layers)
    matrix = x.new_empty(geometry.rows, last)
    X = FeatureBuffer(matrix, geometry)
    shared = needs_statistics(stage)
    kept = []

    moments = backend.pack(x, X.slice(0, channels), geometry, shared)
    if shared:
        table.store(slice(0, channels), *moments)

    c = channels
    for i, layer in enumerate(stage.layers):
        read1 = _reader(table, layer.norm1, (i, 1))
        keep = _dropped(stage, mask, c - channels, layer.growth)
        new = X.slice(c, c + layer.growth)
        if layer.norm2 is None:
            y, read, weight = X.prefix(c), read1, layer.conv1
        else:
            weight1 = layer.conv1.flatten(1).to(x.dtype)
            y, moments = backend.bn_relu_conv1x1(
                X.prefix(c), read1, weight1, layer.norm2.spec.batch
            )
            if layer.norm2.spec.batch:
                table.store(table.columns[i, 2], *moments)
            read, weight = _reader(table, layer.norm2, (i, 2)), layer.conv2
            if stage.keep_bottlenecks:
                kept.append(y)
        moments = backend.bn_relu_conv3x3(
            y, read, weight.to(x.dtype), layer.dilation, geometry, new, keep, shared
        )
        del y
        # a channel's statistics are computed once, where it is produced
        if shared:
            table.store(slice(c, c + layer.growth), *moments)
        c += layer.growth

    out = _tail_forward(X, stage, table, backend)
    return Forward(out, geometry.images(matrix), table.table, kept)


def _reader(table: StatisticsTable, norm: Norm, position: tuple[int, int]) -> Reader:
    """A norm's vectors; running statistics are copied: the module's may move before backward."""
    if not norm.spec.batch:
        table.store(table.columns[position], norm.mean, norm.var)
    return table.reader(norm, position)


def _dropped(
    stage: Stage, mask: Tensor | None, start: int, growth: int
) -> tuple[Tensor, float] | None:
    """Dropout's (mask, factor) for the k channels that begin ``start`` behind the block's input."""
    if mask is None:
        return None
    # all dropped: 0 * factor must not be 0 * inf
    factor = 1 / (1 - stage.drop_rate) if stage.drop_rate < 1 else 0.0
    return mask[:, start : start + growth], factor


def _tail_forward(
    X: FeatureBuffer, stage: Stage, table: StatisticsTable, backend: Backend
) -> Tensor:
    tail, x, geometry = stage.tail, X.matrix, X.geometry
    if tail is None:
        return x.new_empty(0)
    read = _reader(table, tail.norm, (len(stage.layers), 1))
    if tail.spec.kind == "pool":
        return backend.bn_relu_mean(x, read, geometry)
    if tail.spec.kind == "norm":
        return geometry.images(backend.bn_relu(x, read, tail.spec.relu))
    weight = tail.conv.flatten(1).to(x.dtype)
    if tail.spec.pool == 2:
        small = Geometry(geometry.n, geometry.h // 2, geometry.w // 2)
        return small.images(backend.bn_relu_pool_conv1x1(x, read, weight, geometry))
    return geometry.images(backend.bn_relu_conv1x1(x, read, weight, False)[0])


class Backward(NamedTuple):
    """Gradients, each in the order of :func:`memdense.spec.flatten`; None where nobody asked."""

    x: Tensor | None
    tensors: list[Tensor | None]


def backward(
    dout: Tensor | None,
    dfeatures: Tensor | None,
    features: Tensor,
    statistics: Tensor,
    bottlenecks: Sequence[Tensor],
    stage: Stage,
    mask: Tensor | None,
    need_x: bool,
    need: Sequence[bool],
    backend: Backend,
) -> Backward:
    """Walk a stage backwards. ``dout`` answers its tail's output, ``dfeatures`` its features;
    either may be None.
    """
    n, last, h, w = features.shape
    geometry = Geometry(n, h, w)
    rows = geometry.rows
    X = FeatureBuffer(features.permute(0, 2, 3, 1).reshape(rows, last), geometry)
    channels = last - sum(layer.growth for layer in stage.layers)
    table = StatisticsTable(stage, channels, table=statistics)
    wanted = _Wanted(stage, need)

    wide = stage.tail is None or stage.tail.spec.kind != "transition"
    G = GradientBuffer(X, dfeatures, wide)
    if dout is not None:
        _tail_backward(dout, X, G, stage, table, wanted, backend)

    c = last
    for i in reversed(range(len(stage.layers))):
        layer = stage.layers[i]
        new = slice(c - layer.growth, c)
        c = new.start
        keep = _dropped(stage, mask, c - channels, layer.growth)
        read1 = table.reader(layer.norm1, (i, 1))

        # every reader of this slice has answered: dy = G + p*x + q
        p, q = G.vectors(new.start, new.stop, table.table[0, new])
        dy = backend.settle(G.slice(new.start, new.stop), X.slice(new.start, new.stop), p, q, keep)

        if layer.norm2 is None:
            conv = layer.conv1.to(features.dtype)
            _, sums1, dconv1 = backend.bn_relu_conv3x3_backward(
                dy,
                conv,
                layer.dilation,
                X.prefix(c),
                read1,
                geometry,
                G.prefix(c),
                wanted.of(i, "conv1"),
            )
        else:
            conv1, conv2 = (
                weight.to(features.dtype) for weight in (layer.conv1.flatten(1), layer.conv2)
            )
            read2 = table.reader(layer.norm2, (i, 2))
            y = (
                bottlenecks[i]
                if stage.keep_bottlenecks
                else backend.bn_relu_conv1x1(X.prefix(c), read1, conv1, False)[0]
            )
            dz, sums2, dconv2 = backend.bn_relu_conv3x3_backward(
                dy, conv2, layer.dilation, y, read2, geometry, None, wanted.of(i, "conv2")
            )
            del dy
            # norm2 has one reader, so its share is known at once: dY = a*dz + b*y + c
            abc = norm_backward(read2, sums2, rows)
            sums1, dconv1 = backend.bn_relu_conv1x1_backward(
                dz, y, abc, conv1, X.prefix(c), read1, G.prefix(c), wanted.of(i, "conv1")
            )
            del y, dz
            wanted.give(i, "norm2", sums2)
            wanted.give(i, "conv2", dconv2)
        # norm1's share waits in S1 and S2 until the layer that produced each channel settles it
        G.credit(read1, sums1)
        wanted.give(i, "norm1", sums1)
        wanted.give(i, "conv1", dconv1)

    dx = None
    if need_x:
        p, q = G.vectors(0, channels, table.table[0, :channels])
        dx = geometry.images(backend.settle(G.slice(0, channels), X.slice(0, channels), p, q, None))
    return Backward(dx, wanted.gradients())


def _tail_backward(
    dout: Tensor,
    X: FeatureBuffer,
    G: GradientBuffer,
    stage: Stage,
    table: StatisticsTable,
    wanted: "_Wanted",
    backend: Backend,
) -> None:
    tail, x, geometry, position = stage.tail, X.matrix, X.geometry, len(stage.layers)
    read = table.reader(tail.norm, (position, 1))
    dout = dout.to(x.dtype)
    if tail.spec.kind == "pool":
        sums = backend.bn_relu_mean_backward(dout, x, read, geometry, G.matrix)
    elif tail.spec.kind == "norm":
        sums = backend.bn_relu_backward(_as_rows(dout), x, read, tail.spec.relu, G.matrix)
    else:
        weight, need = tail.conv.flatten(1).to(x.dtype), wanted.of(position, "conv1")
        if tail.spec.pool == 2:
            sums, dweight = backend.bn_relu_pool_conv1x1_backward(
                _as_rows(dout), weight, x, read, geometry, G.matrix, need
            )
        else:
            sums, dweight = backend.bn_relu_conv1x1_backward(
                _as_rows(dout), None, None, weight, x, read, G.matrix, need
            )
        wanted.give(position, "conv1", dweight)
    G.credit(read, sums)
    wanted.give(position, "norm1", sums)


def _as_rows(images: Tensor) -> Tensor:
    """(N, C, H, W) as a packed (M, C)."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _parameters(norm: Norm) -> Sequence[Tensor]:
    return (norm.weight, norm.bias) if norm.spec.affine else ()


class _Wanted:
    """Which of a stage's tensors want a gradient, and the gradients so far. The tail counts as a
    last layer.
    """

    def __init__(self, stage: Stage, need: Sequence[bool]) -> None:
        self.need = need
        self.found: list[Tensor | None] = [None] * len(need)
        self.tensors: list[Tensor] = []
        self.places: dict[tuple[int, str], slice] = {}
        for i, layer in enumerate(stage.layers):
            self._place(i, "norm1", _parameters(layer.norm1))
            self._place(i, "conv1", (layer.conv1,))
            if layer.norm2 is not None:
                self._place(i, "norm2", _parameters(layer.norm2))
                self._place(i, "conv2", (layer.conv2,))
        if stage.tail is not None:
            self._place(len(stage.layers), "norm1", _parameters(stage.tail.norm))
            if stage.tail.conv is not None:
                self._place(len(stage.layers), "conv1", (stage.tail.conv,))

    def _place(self, layer: int, name: str, tensors: Sequence[Tensor]) -> None:
        start = len(self.tensors)
        self.tensors += tensors
        self.places[layer, name] = slice(start, len(self.tensors))

    def of(self, layer: int, name: str) -> bool:
        return any(self.need[self.places[layer, name]])

    def give(self, layer: int, name: str, gradient: Tensor | Sums | None) -> None:
        """A convolution's weight gradient, or the two sums that are a norm's."""
        place = self.places[layer, name]
        if isinstance(gradient, Sums):
            # copies: the two sums lie in one tensor, and no two gradients may
            values = (gradient.dgamma.clone(), gradient.dbeta.clone())
        else:
            values = (gradient,)
        for i, value in zip(range(place.start, place.stop), values, strict=False):
            if self.need[i]:
                self.found[i] = value.to(self.tensors[i].dtype).reshape(self.tensors[i].shape)

    def gradients(self) -> list[Tensor | None]:
        return self.found


class StemForward(NamedTuple):
    out: Tensor  # (N, C, H', W'), channels last
    convolved: Tensor  # conv0's output; empty where it is recomputed
    winner: Tensor  # (M', C) uint8: the max-pool's winner in its window
    statistics: Tensor  # (2, C)


def _convolve(x: Tensor, weight: Tensor, spec: StemSpec) -> Tensor:
    out = torch.ops.aten.convolution(
        _channels_last(x),
        weight.to(x.dtype),
        None,
        spec.stride,
        spec.padding,
        spec.dilation,
        False,
        (0, 0),
        1,
    )
    return _channels_last(out)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def stem_forward(
    x: Tensor, weight: Tensor, norm: Norm, spec: StemSpec, backend: Backend
) -> StemForward:
    """conv0, norm0, relu0 and pool0 on images x (N, C_in, H, W)."""
    convolved = _convolve(x, weight, spec)
    n, _, h, w = convolved.shape
    rows = _as_rows(convolved)
    mean, var = backend.statistics(rows) if norm.spec.batch else (norm.mean, norm.var)
    statistics = torch.stack((mean, var)).to(torch.promote_types(mean.dtype, torch.float32))
    out, winner = backend.bn_relu_maxpool(rows, reader(norm, *statistics), Geometry(n, h, w))
    images = Geometry(n, (h + 1) // 2, (w + 1) // 2).images(out)
    return StemForward(images, x.new_empty(0) if spec.recompute else convolved, winner, statistics)


def stem_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    norm: Norm,
    convolved: Tensor,
    winner: Tensor,
    statistics: Tensor,
    spec: StemSpec,
    need: Sequence[bool],
    backend: Backend,
) -> list[Tensor | None]:
    """Gradients of x, weight, gamma and beta, in this order; None where ``need`` says so."""
    if spec.recompute:
        convolved = _convolve(x, weight, spec)
    n, _, h, w = convolved.shape
    rows = _as_rows(convolved)
    read = reader(norm, *statistics)
    dz, sums = backend.bn_relu_maxpool_backward(
        _as_rows(dout.to(rows.dtype)), winner, rows, read, Geometry(n, h, w)
    )
    dx = dweight = None
    if need[0] or need[1]:
        dconvolved = backend.normalised_(dz, rows, norm_backward(read, sums, len(rows)))
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            Geometry(n, h, w).images(dconvolved), _channels_last(x), weight.to(x.dtype), None,
            spec.stride, spec.padding, spec.dilation, False, (0, 0), 1, (need[0], need[1], False),
        )  # fmt: skip
        dx = _channels_last(dx) if need[0] else None
        dweight = dweight.contiguous() if need[1] else None
    gradients = (dx, dweight, sums.dgamma.clone(), sums.dbeta.clone())
    return [g if wanted else None for g, wanted in zip(gradients, need, strict=True)]
