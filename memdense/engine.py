"""A stage's forward and backward: a dense block and its tail, in primitives.

docs/how-it-works.md is this in mathematics. Notation: M pixels, X (M, C_max) the features, G
(M, C_max) their gradient, layer l reads the prefix X[:, :C_l] and writes the k channels behind it;
s, t, p, q, a, b, c are vectors.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import make_channels_last_strides_for

from . import joint
from .buffers import (
    CHANNELS_LAST,
    FeatureBuffer,
    Geometry,
    GradientBuffer,
    Reader,
    StatisticsTable,
    Sums,
    accumulator,
    behind,
    needs_statistics,
    new_matrix,
    reader,
)
from .spec import (
    Layer,
    Norm,
    Stage,
    StemSpec,
    Tail,
    convolution_arguments,
    flatten,
    parameter_names,
    reads_of,
)

# one primitive per method; backends/reference.py is their specification
Backend = Any


class Forward(NamedTuple):
    out: Tensor  # the tail's output; empty without tail
    features: Tensor  # X as images (N, C_max, H, W) or volumes, channels last; empty without layers
    statistics: Tensor  # (2, columns): see StatisticsTable
    bottlenecks: list[Tensor]  # Y (M, B) of each layer that has one, where they are kept


def forward(x: Tensor, stage: Stage, mask: Tensor | None, backend: Backend) -> Forward:
    """Run a stage on x, images (N, C_0, H, W) or volumes (N, C_0, D, H, W); ``mask`` is dropout's,
    (M, L*k), True for what is kept.

    Without layers X is x, read where it lies.
    """
    n, channels, *size = x.shape
    geometry = Geometry(n, *size)
    stage = _in_dtype(stage, x.dtype, backend, backward=False)
    last = channels + sum(layer.growth for layer in stage.layers)
    table = StatisticsTable(stage, channels, like=x)
    table.keep_running(stage)
    shared = needs_statistics(stage)
    entering = slice(0, channels)
    kept = []

    def moments(columns: slice, wanted: bool) -> Tensor | None:
        return table.of(columns) if wanted else None

    own = moments(entering, shared)
    if not stage.layers:
        X = FeatureBuffer(as_rows(x), geometry)
        if own is not None:
            backend.statistics(X.matrix, own)
            table.gather(own, geometry.rows)
        return Forward(
            _tail_forward(X, stage, table, backend), x.new_empty((0,)), table.table, kept
        )
    X = FeatureBuffer(new_matrix(x, geometry.rows, last), geometry)
    backend.pack(x, X.slice(entering), geometry, own)
    table.gather(own, geometry.rows)

    c = channels
    for i, layer in enumerate(stage.layers):
        new = slice(c, c + layer.growth)
        keep = _dropped(stage, mask, c - channels, layer.growth)
        read1 = table.reader(layer.norm1, (i, 1))
        if layer.norm2 is None:
            y, read, conv = X.prefix(c), read1, layer.conv1
        else:
            own = moments(table.columns[i, 2], layer.norm2.spec.batch)
            y = backend.bn_relu_conv1x1(X.prefix(c), read1, layer.conv1, own)
            table.gather(own, geometry.rows)
            read, conv = table.reader(layer.norm2, (i, 2)), layer.conv2
            if stage.keep_bottlenecks:
                kept.append(y)
        # a channel's statistics are computed once, where it is produced
        own = moments(new, shared)
        backend.bn_relu_conv3x3(y, read, conv, layer.dilation, geometry, X.slice(new), keep, own)
        table.gather(own, geometry.rows)
        del y
        c = new.stop

    out = _tail_forward(X, stage, table, backend)
    return Forward(out, geometry.images(X.matrix), table.table, kept)


def _in_dtype(stage: Stage, dtype: torch.dtype, backend: Backend, backward: bool) -> Stage:
    """A stage with its convolutions' weights in ``dtype``, those of 1x1 as (B, C) matrices."""
    tail = stage.tail
    weights = [conv for *_, conv in reads_of(stage) if conv is not None]
    matrices = [w.flatten(1) if w.shape[2:].numel() == 1 else w for w in weights]
    cast = iter(backend.cast(matrices, dtype, backward))

    def layer(s: Layer) -> Layer:
        return s._replace(conv1=next(cast), conv2=None if s.conv2 is None else next(cast))

    layers = [layer(s) for s in stage.layers]
    return stage._replace(layers=layers, tail=tail and tail._replace(conv=next(cast, None)))


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
        return x.new_empty((0,))
    read = table.reader(tail.norm, (len(stage.layers), 1))
    if tail.spec.kind == "pool":
        return backend.bn_relu_mean(x, read, geometry)
    if tail.spec.kind == "norm":
        return geometry.images(backend.bn_relu(x, read, tail.spec.relu))
    if tail.spec.pool == 2:
        out = backend.bn_relu_pool_conv1x1(x, read, tail.conv, geometry)
        return geometry.halves.images(out)
    return geometry.images(backend.bn_relu_conv1x1(x, read, tail.conv, None))


class Backward(NamedTuple):
    """Gradients: of x, and of each tensor in the order of :func:`memdense.spec.flatten`."""

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
    """Walk a stage backwards, from the last layer to the first.

    ``dout`` answers its tail's output, ``dfeatures`` its features; either may be None. Gradients
    come where ``need_x`` and ``need`` ask for them. Without layers ``features`` is x.
    """
    n, last, *size = features.shape
    geometry = Geometry(n, *size)
    parameters, _ = flatten(stage)
    names = parameter_names(stage)
    needed = dict(zip(names, need, strict=True))
    found: dict[tuple[int, str], Tensor | None] = {}
    stage = _in_dtype(stage, features.dtype, backend, backward=True)

    X = FeatureBuffer(as_rows(features), geometry)
    channels = last - sum(layer.growth for layer in stage.layers)
    table = StatisticsTable(stage, channels, table=statistics)
    wide = stage.tail is None or stage.tail.spec.kind != "transition"
    G = GradientBuffer(X, dfeatures, wide)

    def settle(part: slice, keep: tuple[Tensor, float] | None) -> Tensor:
        """dy = G + p*x + q of a slice whose readers have all answered."""
        return backend.settle(G.slice(part), X.slice(part), G.share(part, table), keep)

    def answered(i: int, number: int, sums: Sums) -> None:
        """A norm's parameter gradients are the two sums its backward leaves."""
        found[i, f"gamma{number}"], found[i, f"beta{number}"] = sums.dgamma, sums.dbeta

    if dout is not None:
        i = len(stage.layers)
        read = table.reader(stage.tail.norm, (i, 1))
        need_conv = needed.get((i, "conv1"), False)
        sums, found[i, "conv1"] = _tail_backward(dout, X, G, stage.tail, read, need_conv, backend)
        answered(i, 1, sums)

    c, kept = last, list(bottlenecks)
    for i in reversed(range(len(stage.layers))):
        layer = stage.layers[i]
        new, c = slice(c - layer.growth, c), c - layer.growth
        keep = _dropped(stage, mask, c - channels, layer.growth)
        x, read1 = X.prefix(c), table.reader(layer.norm1, (i, 1))
        dy = settle(new, keep)
        # norm1's share waits in S1 and S2 until the layers that produced its channels settle
        into = G.into(c, read1)
        if layer.norm2 is None:
            _, sums1, found[i, "conv1"] = backend.bn_relu_conv3x3_backward(
                dy, layer.conv1, layer.dilation, x, read1, geometry, into, needed[i, "conv1"]
            )
        else:
            read2 = table.reader(layer.norm2, (i, 2))
            if stage.keep_bottlenecks:
                y = kept.pop()
            else:
                y = backend.bn_relu_conv1x1(x, read1, layer.conv1, None)
            dz, sums2, found[i, "conv2"] = backend.bn_relu_conv3x3_backward(
                dy, layer.conv2, layer.dilation, y, read2, geometry, None, needed[i, "conv2"]
            )
            del dy
            answered(i, 2, sums2)
            # norm2 has one reader, so its share is known at once: dY = a*dz + b*y + c
            gradient = behind(read2, sums2, geometry.rows, statistics, stage.group)
            sums1, found[i, "conv1"] = backend.bn_relu_conv1x1_backward(
                dz, y, gradient, layer.conv1, x, read1, into, needed[i, "conv1"]
            )
            del y, dz
        answered(i, 1, sums1)

    dx = geometry.images(settle(slice(0, channels), None)) if need_x else None
    gradients = [
        _like(found[name], parameter) if needed[name] else None
        for name, parameter in zip(names, parameters, strict=True)
    ]
    return Backward(dx, gradients)


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient in its parameter's dtype and shape."""
    if gradient.dtype != parameter.dtype:
        gradient = gradient.to(parameter.dtype)
    return gradient if gradient.shape == parameter.shape else gradient.reshape(parameter.shape)


def _tail_backward(
    dout: Tensor,
    X: FeatureBuffer,
    G: GradientBuffer,
    tail: Tail,
    read: Reader,
    need_conv: bool,
    backend: Backend,
) -> tuple[Sums, Tensor | None]:
    """Into G; returns the sums of the tail's norm and its convolution's weight gradient."""
    x, geometry = X.matrix, X.geometry
    into = G.into(x.shape[1], read)
    if tail.spec.kind == "pool":
        return backend.bn_relu_mean_backward(dout, x, read, geometry, into), None
    rows = as_rows(dout)
    if tail.spec.kind == "norm":
        return backend.bn_relu_backward(rows, x, read, tail.spec.relu, into), None
    if tail.spec.pool == 2:
        return backend.bn_relu_pool_conv1x1_backward(
            rows, tail.conv, x, read, geometry, into, need_conv
        )
    return backend.bn_relu_conv1x1_backward(rows, None, None, tail.conv, x, read, into, need_conv)


def as_rows(images: Tensor) -> Tensor:
    """(N, C, H, W), or volumes, as (M, C), each row's values side by side."""
    rows = images.movedim(1, -1).reshape(-1, images.shape[1])
    # of one image it may be a view whose columns are
    return rows if rows.stride(1) == 1 else rows.contiguous()


class StemForward(NamedTuple):
    out: Tensor  # (N, C, H', W'), channels last
    convolved: Tensor  # conv0's output; empty where it is recomputed
    winner: Tensor  # (M', C) uint8: the max-pool's winner in its window
    statistics: Tensor  # (2, C), and a column as StatisticsTable has it


def _convolve(x: Tensor, weight: Tensor, spec: StemSpec) -> Tensor:
    out = torch.ops.aten.convolution(_channels_last(x), weight.to(x.dtype), None, *_arguments(spec))
    return _channels_last(out)


def _channels_last(images: Tensor) -> Tensor:
    last = images.contiguous(memory_format=CHANNELS_LAST[images.dim()])
    # of one channel PyTorch takes them for contiguous, and so it would the convolution's output
    if last.shape[1] > 1:
        return last
    return last.as_strided(last.shape, make_channels_last_strides_for(last.shape))


def _arguments(spec: StemSpec) -> tuple:
    return convolution_arguments(spec.stride, spec.padding, spec.dilation)


def stem_forward(
    x: Tensor, weight: Tensor, norm: Norm, spec: StemSpec, backend: Backend
) -> StemForward:
    """conv0, norm0, relu0 and pool0 on images x (N, C_in, H, W)."""
    convolved = _convolve(x, weight, spec)
    n, c, *size = convolved.shape
    rows = as_rows(convolved)
    statistics = x.new_empty((2, c + (1 if spec.group else 0)), dtype=accumulator(x.dtype))
    own = statistics[:, :c]
    if norm.spec.batch:
        backend.statistics(rows, own)
        if spec.group:
            statistics[:, c] = joint.gather(own, len(rows), spec.group)
    else:
        own[0], own[1] = norm.mean, norm.var
    geometry = Geometry(n, *size)
    out, winner = backend.bn_relu_maxpool(rows, reader(norm, *own), geometry)
    images = geometry.windows.images(out)
    return StemForward(
        images, x.new_empty((0,)) if spec.recompute else convolved, winner, statistics
    )


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
    n, _, *size = convolved.shape
    geometry, rows = Geometry(n, *size), as_rows(convolved)
    read = reader(norm, *statistics[:, : rows.shape[1]])
    dout = as_rows(dout)
    sums = backend.bn_relu_maxpool_sums(dout, winner, rows, read, geometry)
    dx = dweight = None
    if need[0] or need[1]:
        gradient = behind(read, sums, len(rows), statistics, spec.group)
        # what was recomputed is read for the last time
        dconvolved = rows if spec.recompute else torch.empty_like(rows)
        backend.bn_relu_maxpool_backward(dout, winner, rows, gradient, geometry, dconvolved)
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            geometry.images(dconvolved), _channels_last(x), weight.to(x.dtype), None,
            *_arguments(spec), (need[0], need[1], False),
        )  # fmt: skip
        dx = _channels_last(dx) if need[0] else None
        dweight = dweight.contiguous() if need[1] else None
    gradients = (dx, dweight, sums.dgamma, sums.dbeta)
    return [g if wanted else None for g, wanted in zip(gradients, need, strict=True)]
