"""Every primitive in PyTorch operations: the specification of the others, and the path that runs
anywhere.

Matrices are (M, C) with unit column stride and any row stride; vectors are (C,) in the
accumulator's dtype. Work goes in bands that fit a fixed scratch, so that nothing but results grows
with the batch or the resolution.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..buffers import Geometry, Into, NormGradient, Reader, Share, Sums, accumulator
from ..spec import convolution_arguments

aten = torch.ops.aten


class Scratch:
    """Memory that the bands of one call share."""

    def __init__(self) -> None:
        self.blocks: dict[str, Tensor] = {}

    def take(
        self,
        name: str,
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        size = prod(shape) * dtype.itemsize
        block = self.blocks.get(name)
        if block is None or block.numel() < size:
            block = self.blocks[name] = torch.empty(size, dtype=torch.uint8, device=device)
        return block[:size].view(dtype).view(shape)


class MomentSums:
    """Mean and biased variance of rows that come in bands, merged in order in float64 (Chan et al.,
    1979).
    """

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch
        self.counts: list[int] = []
        self.parts: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Take in values (..., C)."""
        acc = accumulator(values.dtype)
        rows, channels = values.shape[:-1].numel(), values.shape[-1]
        if values.dtype != acc or not values.is_contiguous():
            values = self.scratch.take("moments", values.shape, acc, values.device).copy_(values)
        if values.device.type == "cpu":
            # the kernel of F.batch_norm: two passes, vectorised over channels
            images = values.view(1, rows, 1, channels).permute(0, 3, 1, 2)
            mean, var = torch.batch_norm_update_stats(images, None, None, 0.0)
        else:
            var, mean = torch.var_mean(values.view(rows, channels), 0, correction=0)
        self.counts.append(rows)
        self.parts.append(torch.stack((mean, var)))

    def merge(self, out: Tensor) -> None:
        """Mean and variance into out (2, C)."""
        if len(self.parts) == 1:
            out.copy_(self.parts[0])
            return
        parts = torch.stack(self.parts, 1)  # (2, bands, C), which ``share`` takes to float64
        share = torch.tensor(self.counts, dtype=torch.float64, device=parts.device)[:, None] / sum(
            self.counts
        )
        mean = (share * parts[0]).sum(0)
        out[0] = mean
        out[1] = (share * (parts[1] + (parts[0] - mean).square_())).sum(0)


class GradientSums:
    """The running sums of a reader's backward, in float64 across bands."""

    def __init__(self, read: Reader, into: Into | None) -> None:
        self.read = read
        self.into = into
        self.rounds = into is not None and into.rounds
        rows = 4 if self.rounds else 2
        self.sums = read.mean.new_zeros((rows, len(read.mean)), dtype=torch.float64)

    def add(self, row: int, gradient: Tensor, x_hat: Tensor) -> None:
        """Take in sum(gradient) and sum(gradient * x_hat) over all but the last axis; x_hat is
        overwritten.
        """
        axes = tuple(range(gradient.dim() - 1))
        self.sums[row] += gradient.sum(axes)
        self.sums[row + 1] += x_hat.mul_(gradient).sum(axes)

    def credited(self) -> Sums:
        """The sums, of which S1 and S2 now have the reader's share."""
        parts = [row.to(self.read.mean.dtype, copy=True) for row in self.sums]
        sums = Sums(*parts[:2])
        if self.into is not None:
            self.into.credit(self.read, sums, (parts[2], parts[3]) if self.rounds else None)
        return sums


class Reference:
    """The primitives, on any device PyTorch runs on. One instance serves one call: its scratch is
    not shared.
    """

    name = "reference"
    dtypes: tuple[torch.dtype, ...] | None = None  # that its own kernels take; None: any
    # a band's activations stay in caches on a CPU, and are worth an operation's cost; a GPU wants
    # launches worth theirs
    CPU_BAND_BYTES = 2 << 20
    BAND_BYTES = 256 << 20

    def __init__(self) -> None:
        self.scratch = Scratch()

    def call(
        self,
        function: Callable[..., list[Tensor | None]],
        moving: Sequence[Tensor | None],
        fixed: Sequence[Tensor],
        *rest: Any,
    ) -> list[Tensor | None]:
        """``function(self, moving, fixed, *rest)``: a pass through a stage, of inputs that are new
        at every call and of its parameters.
        """
        return function(self, moving, fixed, *rest)

    def update_running(
        self,
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        counts: Sequence[Tensor],
        statistics: Tensor,
        starts: Sequence[int],
        momenta: Sequence[float],
        rows: int,
    ) -> None:
        """One training step of BatchNorm's buffers; see
        :func:`memdense.ops.update_running_statistics`.
        """
        if len({m.data_ptr() for m in means}) < len(means):
            # a norm that runs twice moves twice, one after the other
            steps = [[c] for c in counts] or [[]] * len(means)
            for mean, var, step, start, momentum in zip(
                means, variances, steps, starts, momenta, strict=True
            ):
                Reference.update_running(
                    self, [mean], [var], step, statistics, [start], [momentum], rows
                )
            return
        # as F.batch_norm does it: autograd does not hear of it
        means, variances = [m.data for m in means], [v.data for v in variances]
        mean, var = statistics.unbind()
        parts = [slice(s, s + len(m)) for s, m in zip(starts, means, strict=True)]
        unbiased = torch._foreach_mul([var[part] for part in parts], rows / (rows - 1))
        batch_means = [mean[part] for part in parts]
        if counts:
            torch._foreach_add_(list(counts), 1)
        for momentum in sorted(set(momenta)):
            mine = [i for i, m in enumerate(momenta) if m == momentum]
            for running, batch in ((means, batch_means), (variances, unbiased)):
                old, new = [running[i] for i in mine], [batch[i] for i in mine]
                if momentum < 0:
                    for r, b, i in zip(old, new, mine, strict=True):
                        r.copy_(torch.lerp(r.to(b.dtype), b, counts[i].to(b.dtype).reciprocal()))
                elif all(r.dtype == b.dtype for r, b in zip(old, new, strict=True)):
                    torch._foreach_mul_(old, 1 - momentum)
                    torch._foreach_add_(old, new, alpha=momentum)
                else:
                    for r, b in zip(old, new, strict=True):
                        r.copy_(torch.lerp(r.to(b.dtype), b, momentum))

    # ---- bands

    def _band_values(self, x: Tensor) -> int:
        limit = self.CPU_BAND_BYTES if x.device.type == "cpu" else self.BAND_BYTES
        return limit // accumulator(x.dtype).itemsize

    def row_bands(self, x: Tensor, columns: int = 0) -> Iterator[slice]:
        """Slices of the rows of x (M, C), beside which another matrix may have more ``columns``."""
        most = self._band_values(x) // max(x.shape[1], columns)
        yield from equal_parts(len(x), max(1, most))

    def image_bands(
        self, x: Tensor, geometry: Geometry, unit: int = 1
    ) -> Iterator[tuple[slice, slice]]:
        """(images, lines) that cover them all; several images with all their lines, or one with a
        multiple of unit. Of a volume they are planes.
        """
        lines = self._band_values(x) // (x.shape[-1] * geometry.line)
        for images in equal_parts(geometry.n, max(1, lines // geometry.lines)):
            for part in equal_parts(geometry.lines, max(unit, lines), unit):
                yield images, part

    # ---- reading and answering, the two halves that every primitive shares

    def _read(self, x: Tensor, read: Reader, relu: bool = True) -> Tensor:
        """z = relu(s*x + t), as x's dtype stores it, in scratch."""
        z = self.scratch.take("z", x.shape, read.scale.dtype, x.device)
        torch.addcmul(read.shift, x, read.scale, out=z)
        if relu:
            z.relu_()
        if z.dtype == x.dtype:
            return z
        return self.scratch.take("z rounded", x.shape, x.dtype, x.device).copy_(z)

    def _answer(
        self, da: Tensor, z: Tensor | None, x: Tensor, read: Reader, sums: GradientSums
    ) -> Tensor:
        """dz = da * [z > 0], in da's place; its two sums go to ``sums``. z None: no relu. z's
        memory is reused.
        """
        if z is not None:
            aten.threshold_backward.grad_input(da, z, 0, grad_input=da)
        x_hat = self._x_hat(x, read)
        sums.add(0, da.to(x_hat.dtype), x_hat)
        return da

    def _x_hat(self, x: Tensor, read: Reader) -> Tensor:
        x_hat = self.scratch.take("z", x.shape, read.mean.dtype, x.device)
        return torch.sub(x, read.mean, out=x_hat).mul_(read.rstd)

    def _add_into(self, g: Tensor, dz: Tensor, x: Tensor, read: Reader, sums: GradientSums) -> None:
        """G += s*dz, and where G rounds, the sums of what it took in."""
        if g.dtype == read.scale.dtype:
            g.addcmul_(dz, read.scale)
            return
        before = self.scratch.take("g", g.shape, read.scale.dtype, g.device).copy_(g)
        g.copy_(torch.addcmul(before, dz, read.scale))
        taken = torch.sub(g, before, out=before)
        sums.add(2, taken, self._x_hat(x, read))

    @staticmethod
    def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a @ b without rounding the product to a 16-bit dtype."""
        if a.dtype == total.dtype:
            total.addmm_(a, b)
        elif a.device.type == "cuda":
            total += torch.mm(a, b, out_dtype=total.dtype)
        else:
            total.addmm_(a.to(total.dtype), b.to(total.dtype))

    # ---- producing channels; ``moments``, where given, is a (2, channels) that takes the mean and
    # biased variance of each, of the values as stored

    def cast(
        self, weights: list[Tensor], dtype: torch.dtype, backward: bool = False
    ) -> list[Tensor]:
        """Convolutions' weights in ``dtype``, for a forward or a backward pass."""
        return [w.to(dtype) for w in weights]

    def pack(self, x: Tensor, out: Tensor, geometry: Geometry, moments: Tensor | None) -> None:
        """Copy images x (N, C, H, W), or volumes, into out (M, C)."""
        source, target = x.movedim(1, -1), geometry.pixels(out)
        sums = MomentSums(self.scratch)
        for n, h in self.image_bands(out, geometry):
            target[n, h].copy_(source[n, h])
            if moments is not None:
                sums.add(target[n, h])
        if moments is not None:
            sums.merge(moments)

    def statistics(self, x: Tensor, moments: Tensor) -> None:
        """Mean and biased variance of the columns of x (M, C)."""
        sums = MomentSums(self.scratch)
        for rows in self.row_bands(x):
            sums.add(x[rows])
        sums.merge(moments)

    def bn_relu_conv1x1(
        self, x: Tensor, read: Reader, weight: Tensor, moments: Tensor | None
    ) -> Tensor:
        """y = relu(s*x + t) @ W^T for x (M, C) and W (B, C): y (M, B)."""
        y = x.new_empty((len(x), weight.shape[0]))
        sums = MomentSums(self.scratch)
        for rows in self.row_bands(x, len(weight)):
            torch.mm(self._read(x[rows], read), weight.t(), out=y[rows])
            if moments is not None:
                sums.add(y[rows])
        if moments is not None:
            sums.merge(moments)
        return y

    def bn_relu_conv3x3(
        self,
        x: Tensor,
        read: Reader,
        weight: Tensor,
        dilation: tuple[int, ...],
        geometry: Geometry,
        out: Tensor,
        keep: tuple[Tensor, float] | None,
        moments: Tensor | None,
    ) -> None:
        """out = conv3x3(relu(s*x + t), W) for x (M, C), W (k, C, 3, 3), out (M, k), zero-padded
        after the relu. In volumes W is (k, C, 3, 3, 3).

        ``keep`` is dropout's (mask (M, k), factor): out *= mask * factor.
        """
        source, target = geometry.pixels(x), geometry.pixels(out)
        sums = MomentSums(self.scratch)
        for n, h, halo, inner in self._halo_bands(x, geometry, dilation):
            z = self._read(source[n, halo], read).movedim(-1, 1)
            new = aten.convolution(z, weight, None, *conv3x3_arguments(dilation))
            new = new.movedim(1, -1)[:, inner]
            if keep is not None:
                new = new * geometry.pixels(keep[0])[n, h] * keep[1]
            target[n, h].copy_(new)
            if moments is not None:
                sums.add(new)
        if moments is not None:
            sums.merge(moments)

    def _halo_bands(
        self, x: Tensor, geometry: Geometry, dilation: tuple[int, ...]
    ) -> Iterator[tuple[slice, slice, slice, slice]]:
        """(images, lines, lines with the halo a 3x3 needs, where the former lie in the latter)."""
        reach = dilation[0]
        for n, h in self.image_bands(x, geometry):
            halo = slice(max(0, h.start - reach), h.stop + reach)
            yield n, h, halo, slice(h.start - halo.start, h.stop - halo.start)

    # ---- answering

    def settle(
        self,
        g: Tensor,
        x: Tensor,
        share: Share | None,
        keep: tuple[Tensor, float] | None,
    ) -> Tensor:
        """dy = G + p*x + q for slices g and x (M, k), through dropout's mask where there is one.
        Packed.
        """
        p, q = (None, None) if share is None else share.vectors
        dy = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rows in self.row_bands(x):
            d = g[rows] if p is None else torch.addcmul(q, x[rows], p).add_(g[rows])
            dy[rows] = d if keep is None else d * keep[0][rows] * keep[1]
        return dy

    def bn_relu_conv1x1_backward(
        self,
        dz: Tensor,
        y: Tensor | None,
        behind: NormGradient | None,
        weight: Tensor,
        x: Tensor,
        read: Reader,
        into: Into,
        need_weight: bool,
    ) -> tuple[Sums, Tensor | None]:
        """With dy = a*dz + b*y + c (behind None: dy = dz), da = dy @ W and z = relu(s*x + t)
        recomputed: G += s*da*[z > 0]; returns that reader's sums and dW = dy^T @ z. With ``behind``
        a backend may leave dy in dz's place.
        """
        dweight = torch.zeros_like(weight, dtype=read.scale.dtype) if need_weight else None
        g, sums = into.start(), GradientSums(read, into)
        for rows in self.row_bands(x, len(weight)):
            dy = dz[rows] if behind is None else self._normalised(dz[rows], y[rows], behind)
            z = self._read(x[rows], read)
            if need_weight:
                self._add_product(dweight, dy.t(), z)
            da = self.scratch.take("da", z.shape, z.dtype, z.device)
            torch.mm(dy, weight, out=da)
            self._answer(da, z, x[rows], read, sums)
            self._add_into(g[rows], da, x[rows], read, sums)
        return sums.credited(), dweight

    def _normalised(self, dz: Tensor, y: Tensor, behind: NormGradient) -> Tensor:
        """dy = a*dz + b*y + c, as y's dtype stores it."""
        a, b, c = behind.vectors
        dy = self.scratch.take("dy", dz.shape, a.dtype, dz.device)
        if b is None:
            torch.mul(dz, a, out=dy)
        else:
            torch.addcmul(c, y, b, out=dy).addcmul_(dz, a)
        return dy.to(y.dtype)

    def bn_relu_conv3x3_backward(
        self,
        dy: Tensor,
        weight: Tensor,
        dilation: tuple[int, ...],
        x: Tensor,
        read: Reader,
        geometry: Geometry,
        into: Into | None,
        need_weight: bool,
    ) -> tuple[Tensor | None, Sums, Tensor | None]:
        """With da = conv3x3's input gradient of dy (M, k) and z = relu(s*x + t) recomputed: dz =
        da*[z > 0].

        Into G, where given (G += s*dz); else returned, (M, C) packed. Returns (dz, its sums, dW).
        """
        dweight = torch.zeros_like(weight, dtype=read.scale.dtype) if need_weight else None
        dz = None if into else torch.empty_like(x, memory_format=torch.contiguous_format)
        g = into.start() if into else None
        sums = GradientSums(read, into)
        source, gradient = geometry.pixels(x), geometry.pixels(dy)
        for n, h, halo, inner in self._halo_bands(x, geometry, dilation):
            z = self._read(source[n, halo], read)
            d = gradient[n, halo]
            if need_weight:
                self._add_conv3x3_weight(dweight, d, z, inner, dilation)
            da = _conv3x3_backward(d, z, weight, dilation, (True, False, False))[0]
            da = da.movedim(1, -1)[:, inner]
            lines = source[n, h]
            da = self._answer(da, z[:, inner], lines, read, sums)
            if g is None:
                geometry.pixels(dz)[n, h] = da
            else:
                self._add_into(geometry.pixels(g)[n, h], da, lines, read, sums)
            del da  # before the next one is made
        return dz, sums.credited(), dweight

    @staticmethod
    def _add_conv3x3_weight(
        total: Tensor, d: Tensor, z: Tensor, inner: slice, dilation: tuple[int, ...]
    ) -> None:
        """total += the weight gradient of the lines ``inner`` of d, for d and z (n, h, w, C), in
        total's dtype.
        """
        if inner.stop - inner.start != d.shape[1]:
            # the halo's lines answer in their own bands
            only = torch.zeros_like(d, memory_format=torch.contiguous_format)
            only[:, inner] = d[:, inner]
            d = only
        d, z = d.to(total.dtype), z.to(total.dtype)
        total += _conv3x3_backward(d, z, total, dilation, (False, True, False))[1]

    # ---- tails

    def bn_relu_pool_conv1x1(
        self, x: Tensor, read: Reader, weight: Tensor, geometry: Geometry
    ) -> Tensor:
        """avg_pool2x2(relu(s*x + t)) @ W^T for x (M, C), W (B, C): (N * H//2 * W//2, B). Pooled
        first: a quarter of the arithmetic (an eighth in volumes), and the same numbers, since the
        two commute.
        """
        small = geometry.halves
        out = x.new_empty((small.rows, weight.shape[0]))
        source, target = geometry.pixels(x), small.pixels(out)
        for n, h in self.image_bands(x, geometry, unit=2):
            pooled = self._pool(self._read(source[n, h], read))
            if pooled.numel():
                lines = target[n, h.start // 2 : h.stop // 2].view(len(pooled), -1)
                torch.mm(pooled, weight.t(), out=lines)
        return out

    @staticmethod
    def _pool(z: Tensor) -> Tensor:
        """2x2 means of z (n, h, w, C), or 2x2x2, as rows; a last odd line or column is left out."""
        if z.shape[1] < 2:
            return z.new_empty((0, z.shape[-1]))
        if z.dim() == 4:
            means = aten.avg_pool2d(z.movedim(-1, 1), 2, 2).movedim(1, -1)
        else:
            means = _octets(z).mean((2, 4, 6))
        return means.reshape(-1, z.shape[-1])

    def bn_relu_pool_conv1x1_backward(
        self,
        dout: Tensor,
        weight: Tensor,
        x: Tensor,
        read: Reader,
        geometry: Geometry,
        into: Into,
        need_weight: bool,
    ) -> tuple[Sums, Tensor | None]:
        """Of :meth:`bn_relu_pool_conv1x1`, into G; returns the reader's sums and dW."""
        small = geometry.halves
        dweight = torch.zeros_like(weight, dtype=read.scale.dtype) if need_weight else None
        g, sums = into.start(), GradientSums(read, into)
        source, gradient, target = geometry.pixels(x), small.pixels(dout), geometry.pixels(g)
        for n, h in self.image_bands(x, geometry, unit=2):
            z = self._read(source[n, h], read)
            d = gradient[n, h.start // 2 : h.stop // 2]
            if not d.numel():
                continue
            rows = d.reshape(-1, d.shape[-1])
            if need_weight:
                self._add_product(dweight, rows.t(), self._pool(z))
            dpooled = torch.mm(rows, weight).view(*d.shape[:-1], -1)
            if z.dim() == 4:
                da = aten.avg_pool2d_backward(
                    dpooled.movedim(-1, 1), z.movedim(-1, 1), 2, 2, 0, False, True, None
                ).movedim(1, -1)
            else:
                da = torch.zeros_like(z)
                _octets(da).copy_((dpooled / 8)[:, :, None, :, None, :, None])
            self._answer(da, z, source[n, h], read, sums)
            self._add_into(target[n, h], da, source[n, h], read, sums)
        return sums.credited(), dweight

    def bn_relu(self, x: Tensor, read: Reader, relu: bool) -> Tensor:
        """s*x + t, relu or not: (M, C), packed."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rows in self.row_bands(x):
            out[rows] = self._read(x[rows], read, relu)
        return out

    def bn_relu_backward(
        self, dout: Tensor, x: Tensor, read: Reader, relu: bool, into: Into
    ) -> Sums:
        """Of :meth:`bn_relu`, into G."""
        g, sums = into.start(), GradientSums(read, into)
        for rows in self.row_bands(x):
            z = self._read(x[rows], read) if relu else None
            da = self.scratch.take("da", x[rows].shape, x.dtype, x.device).copy_(dout[rows])
            self._answer(da, z, x[rows], read, sums)
            self._add_into(g[rows], da, x[rows], read, sums)
        return sums.credited()

    def bn_relu_mean(self, x: Tensor, read: Reader, geometry: Geometry) -> Tensor:
        """The mean of relu(s*x + t) over each image: (N, C)."""
        source = geometry.pixels(x)
        total = x.new_zeros((geometry.n, x.shape[1]), dtype=read.scale.dtype)
        for n, h in self.image_bands(x, geometry):
            z = self._read(source[n, h], read)
            total[n] += z.flatten(1, -2).sum(1, dtype=total.dtype)
        return (total / geometry.each).to(x.dtype)

    def bn_relu_mean_backward(
        self, dout: Tensor, x: Tensor, read: Reader, geometry: Geometry, into: Into
    ) -> Sums:
        """Of :meth:`bn_relu_mean`, into G."""
        g, sums = into.start(), GradientSums(read, into)
        source, target = geometry.pixels(x), geometry.pixels(g)
        share = (dout / geometry.each).view(geometry.n, *[1] * geometry.axes, -1)
        for n, h in self.image_bands(x, geometry):
            lines = source[n, h]
            da = self.scratch.take("da", lines.shape, x.dtype, x.device).copy_(share[n])
            self._answer(da, self._read(lines, read), lines, read, sums)
            self._add_into(target[n, h], da, lines, read, sums)
        return sums.credited()

    # ---- the stem

    def bn_relu_maxpool(self, x: Tensor, read: Reader, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """max_pool3x3(relu(s*x + t)), stride 2, padding 1, for x (M, C): values (M', C) and uint8
        indices (M', C) of the winner in its window, 0 to 8 (26 in volumes) in reading order.
        """
        small = geometry.windows
        out = x.new_empty((small.rows, x.shape[1]))
        winner = x.new_empty((small.rows, x.shape[1]), dtype=torch.uint8)
        source, values, winners = geometry.pixels(x), small.pixels(out), small.pixels(winner)
        axes = geometry.axes
        pool = aten.max_pool2d_with_indices if axes == 2 else aten.max_pool3d_with_indices
        for n, h in self.image_bands(x, geometry, unit=2):
            # two lines more above, so that the band's own padding touches only the output line we
            # drop
            above = min(2, h.start)
            z = self._read(source[n, h.start - above : h.stop], read).movedim(-1, 1)
            top, index = pool(z, 3, 2, 1)
            top, index = (t.movedim(1, -1)[:, above // 2 :] for t in (top, index))
            lines = slice(h.start // 2, h.start // 2 + top.shape[1])
            values[n, lines] = top
            place = torch.zeros_like(index)
            for axis in range(1, axes + 1):
                corner = 2 * torch.arange(top.shape[axis], device=x.device) - 1
                if axis == 1:
                    corner += above
                at = index // prod(geometry[axis + 1 :])
                place.mul_(3).add_(at.remainder_(geometry[axis]))
                place -= corner.view(-1, *[1] * (axes + 1 - axis))
            winners[n, lines] = place
        return out, winner

    def bn_relu_maxpool_sums(
        self, dout: Tensor, winner: Tensor, x: Tensor, read: Reader, geometry: Geometry
    ) -> Sums:
        """Of :meth:`bn_relu_maxpool`'s dz (M, C): dout (M', C) where a pixel won, and z > 0."""
        small, sums = geometry.windows, GradientSums(read, None)
        source = geometry.pixels(x).flatten(1, -2)
        gradient, winners = small.pixels(dout), small.pixels(winner)
        for n, h in self.image_bands(dout, small):
            d = gradient[n, h].flatten(1, -2)
            won = source[n].gather(1, self._places(winners[n, h], h.start, geometry))
            self._answer(d.clone(), self._read(won, read), won, read, sums)
        return sums.credited()

    @staticmethod
    def _places(winners: Tensor, first: int, geometry: Geometry) -> Tensor:
        """Pixels of an image, (n, pixels, C), that won windows (n, h, w, C), whose first line is
        ``first``.
        """
        # a window's middle, and what is around it
        middle = torch.zeros((), dtype=torch.long, device=winners.device)
        around = torch.zeros(1, dtype=torch.long, device=winners.device)
        for axis in range(1, geometry.axes + 1):
            lines = torch.arange(winners.shape[axis], device=winners.device)
            if axis == 1:
                lines += first
            middle = middle[..., None] * geometry[axis] + 2 * lines
            shifts = torch.arange(-1, 2, device=winners.device)
            around = (around[:, None] * geometry[axis] + shifts).flatten()
        return (around[winners.int()] + middle[..., None]).flatten(1, -2)

    def bn_relu_maxpool_backward(
        self,
        dout: Tensor,
        winner: Tensor,
        x: Tensor,
        behind: NormGradient,
        geometry: Geometry,
        out: Tensor,
    ) -> None:
        """out = a*dz + b*x + c (M, C), with the same dz; out may be x."""
        source, target = geometry.pixels(x), geometry.pixels(out)
        for n, h, da in self._unpooled(dout, winner, x, geometry):
            lines = source[n, h]
            z = self._read(lines, behind.read)
            dz = aten.threshold_backward.grad_input(da, z, 0, grad_input=da)
            target[n, h] = self._normalised(dz, lines, behind)

    def _unpooled(
        self, dout: Tensor, winner: Tensor, x: Tensor, geometry: Geometry
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """(images, lines, each pixel's sum of dout over the windows that it won), in scratch."""
        small = geometry.windows
        gradient, winners = small.pixels(dout), small.pixels(winner)
        for n, h in self.image_bands(x, geometry, unit=2):
            windows = slice(h.start // 2, h.stop // 2 + 1)
            d, w = gradient[n, windows], winners[n, windows]
            # they reach a line further above and below
            reached = 2 * d.shape[1] + 1
            shape = len(d), reached, *geometry[2:], x.shape[1]
            da = self.scratch.take("da", shape, x.dtype, x.device).zero_()
            for offset, (up, *shifts) in enumerate(product((-1, 0, 1), repeat=geometry.axes)):
                spans = (
                    strided(d.shape[1], up + 1, reached),
                    *map(strided, small[2:], shifts, geometry[2:]),
                )
                from_, to = ((slice(None), *part) for part in zip(*spans, strict=True))
                da[to] += torch.where(w[from_] == offset, d[from_], 0)
            yield n, h, da[:, 1 : 1 + h.stop - h.start]


def equal_parts(size: int, most: int, unit: int = 1) -> Iterator[slice]:
    """0..size in as few slices as hold ``most`` each, which are as long as each other but for the
    last; several of them hold multiples of ``unit``.
    """
    step = max(1, size)
    if most < size:
        count = -(-size // (most // unit * unit))
        step = -(-size // (count * unit)) * unit
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def strided(windows: int, shift: int, size: int) -> tuple[slice, slice]:
    """Which of so many windows i reach line 2*i + shift within 0..size, and those lines."""
    first = 0 if shift >= 0 else 1
    last = min(windows, (size - 1 - shift) // 2 + 1)
    return slice(first, last), slice(2 * first + shift, 2 * (last - 1) + shift + 1, 2)


def _octets(z: Tensor) -> Tensor:
    """(n, d, h, w, C) seen as (n, d // 2, 2, h // 2, 2, w // 2, 2, C): aten.avg_pool3d takes no 16
    bits on a CPU.
    """
    for axis in (3, 2, 1):
        half = z.shape[axis] // 2
        z = z.narrow(axis, 0, 2 * half).unflatten(axis, (half, 2))
    return z


def conv3x3_arguments(dilation: tuple[int, ...]) -> tuple:
    """Of stride 1, and the size is kept."""
    return convolution_arguments((1,) * len(dilation), dilation, dilation)


def _conv3x3_backward(
    d: Tensor, z: Tensor, weight: Tensor, dilation: tuple[int, ...], which: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(input, weight, bias) gradients of a 3x3 convolution of z (n, h, w, C) that d answers."""
    d, z = d.movedim(-1, 1), z.movedim(-1, 1)
    return aten.convolution_backward(d, z, weight, None, *conv3x3_arguments(dilation), which)
