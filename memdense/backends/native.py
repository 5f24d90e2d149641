"""The primitives in C++ (csrc/cpu), float32, float64 and bfloat16 on the CPU; the rest is the
reference's. bfloat16 is how values are stored, and multiplied where the CPU has AMX; sums are taken
in float32.
"""

import torch
from torch import Tensor

from .. import _extension  # noqa: F401  (loads the operations)
from ..buffers import (
    Geometry,
    Into,
    NormGradient,
    Reader,
    Share,
    Sums,
    accumulator,
    mask_in_rows,
)
from . import volumes
from .reference import Reference

_ops = torch.ops.memdense

# below C*k of this, vectors are mostly padding and PyTorch's operations are as fast
MIN_PRODUCTS = 64


class Native(Reference):
    """Each method has its twin's contract; what its kernel does not take goes to the twin."""

    name = "native"
    dtypes = torch.float32, torch.float64, torch.bfloat16

    # ---- producing channels

    def pack(self, x: Tensor, out: Tensor, geometry: Geometry, moments: Tensor | None) -> None:
        rows = _rows(x)
        if moments is None or not _fits(out):
            super().pack(x, out, geometry, moments)
        elif rows is None or not _fits(rows, out):
            super().pack(x, out, geometry, None)
            self.statistics(out, moments)
        else:
            moments[0], moments[1] = _ops.pack(rows, out)

    def statistics(self, x: Tensor, moments: Tensor) -> None:
        if not _fits(x):
            return super().statistics(x, moments)
        moments[0], moments[1] = _ops.channel_statistics(x)

    def bn_relu_conv1x1(
        self, x: Tensor, read: Reader, weight: Tensor, moments: Tensor | None
    ) -> Tensor:
        if not _reads(x, read, weight):
            return super().bn_relu_conv1x1(x, read, weight, moments)
        return _ops.bn_relu_conv1x1(x, *read.tensors, weight, moments)

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
        if not mask_in_rows(keep) or not _convolves(x, read, weight, out):
            return super().bn_relu_conv3x3(x, read, weight, dilation, geometry, out, keep, moments)
        if not geometry.of_images:
            return volumes.bn_relu_conv3x3(
                self, x, read, weight, dilation, geometry, out, keep, moments
            )
        _ops.bn_relu_conv3x3(
            x, read.mean, read.var, read.weight, read.bias, read.eps, weight, dilation, *geometry,
            *(keep or (None, 1.0)), out, moments,
        )  # fmt: skip

    # ---- answering

    def settle(
        self,
        g: Tensor,
        x: Tensor,
        share: Share | None,
        keep: tuple[Tensor, float] | None,
    ) -> Tensor:
        if not (_fits(x) and _beside(x, g) and mask_in_rows(keep)):
            return super().settle(g, x, share, keep)
        sums, mean = (None, None) if share is None else (share.sums, share.mean)
        return _ops.settle(g, x, sums, mean, *(keep or (None, 1.0)))

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
        wide = into.g, behind and behind.read.weight
        if not (_reads(x, read, dz, y, weight) and _beside(x, *wide)):
            return super().bn_relu_conv1x1_backward(
                dz, y, behind, weight, x, read, into, need_weight
            )
        norm = (None, None, None, None, 0.0, None, None)
        if behind is not None:
            of = behind.read
            norm = (y if of.batch else None, of.mean, of.var, of.weight, of.eps, *behind.sums)
        dbeta, dgamma, dweight = _ops.bn_relu_conv1x1_backward(
            dz, *norm, weight, x, *read.tensors, into.g, into.seeded, into.sums, need_weight
        )
        return Sums(dbeta, dgamma), dweight if need_weight else None

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
        # a G that rounds wants sums of what it took in, which the kernel does not take
        if not _convolves(x, read, weight, dy, into and into.g) or (into and into.rounds):
            return super().bn_relu_conv3x3_backward(
                dy, weight, dilation, x, read, geometry, into, need_weight
            )
        if not geometry.of_images:
            return volumes.bn_relu_conv3x3_backward(
                self, dy, weight, dilation, x, read, geometry, into, need_weight
            )
        dz = None if into else torch.empty_like(x, memory_format=torch.contiguous_format)
        target = into.start() if into else dz
        sums = Sums(torch.empty_like(read.mean), torch.empty_like(read.mean))
        dweight = read.mean.new_empty(weight.shape) if need_weight else None
        _ops.bn_relu_conv3x3_backward(
            dy, weight, dilation, x, read.mean, read.var, read.weight, read.bias, read.eps,
            *geometry, target, *sums, dweight, into is not None,
        )  # fmt: skip
        if into is not None:
            into.credit(read, sums)
        return dz, sums, dweight

    # ---- tails

    def bn_relu_pool_conv1x1(
        self, x: Tensor, read: Reader, weight: Tensor, geometry: Geometry
    ) -> Tensor:
        if not _reads(x, read, weight):
            return super().bn_relu_pool_conv1x1(x, read, weight, geometry)
        if not geometry.of_images:
            return volumes.bn_relu_pool_conv1x1(self, x, read, weight, geometry)
        return _ops.bn_relu_pool_conv1x1(x, *read.tensors, weight, *geometry)

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
        if not (_reads(x, read, dout, weight) and _beside(x, into.g)):
            return super().bn_relu_pool_conv1x1_backward(
                dout, weight, x, read, geometry, into, need_weight
            )
        if not geometry.of_images:
            return volumes.bn_relu_pool_conv1x1_backward(
                self, dout, weight, x, read, geometry, into, need_weight
            )
        dbeta, dgamma, dweight = _ops.bn_relu_pool_conv1x1_backward(
            dout, weight, x, *read.tensors, into.g, into.seeded, into.sums, *geometry, need_weight
        )
        return Sums(dbeta, dgamma), dweight if need_weight else None

    def bn_relu(self, x: Tensor, read: Reader, relu: bool) -> Tensor:
        if not _reads(x, read):
            return super().bn_relu(x, read, relu)
        return _ops.bn_relu(x, *read.tensors, relu)

    def bn_relu_backward(
        self, dout: Tensor, x: Tensor, read: Reader, relu: bool, into: Into
    ) -> Sums:
        if not (_reads(x, read, dout) and _beside(x, into.g)):
            return super().bn_relu_backward(dout, x, read, relu, into)
        return Sums(
            *_ops.bn_relu_backward(dout, x, *read.tensors, relu, into.g, into.seeded, into.sums)
        )

    def bn_relu_mean(self, x: Tensor, read: Reader, geometry: Geometry) -> Tensor:
        if not _reads(x, read):
            return super().bn_relu_mean(x, read, geometry)
        return _ops.bn_relu_mean(x, *read.tensors, geometry.n)

    def bn_relu_mean_backward(
        self, dout: Tensor, x: Tensor, read: Reader, geometry: Geometry, into: Into
    ) -> Sums:
        if not (_reads(x, read, dout) and _beside(x, into.g)):
            return super().bn_relu_mean_backward(dout, x, read, geometry, into)
        return Sums(
            *_ops.bn_relu_mean_backward(dout, x, *read.tensors, into.g, into.seeded, into.sums)
        )

    # ---- the stem

    def bn_relu_maxpool(self, x: Tensor, read: Reader, geometry: Geometry) -> tuple[Tensor, Tensor]:
        if not _reads(x, read):
            return super().bn_relu_maxpool(x, read, geometry)
        if not geometry.of_images:
            return volumes.bn_relu_maxpool(self, x, read, geometry)
        return _ops.bn_relu_maxpool(x, *read.tensors, *geometry)

    def bn_relu_maxpool_sums(
        self, dout: Tensor, winner: Tensor, x: Tensor, read: Reader, geometry: Geometry
    ) -> Sums:
        if not _reads(x, read, dout):
            return super().bn_relu_maxpool_sums(dout, winner, x, read, geometry)
        if not geometry.of_images:
            return volumes.bn_relu_maxpool_sums(self, dout, winner, x, read, geometry)
        return Sums(*_ops.bn_relu_maxpool_sums(dout, winner, x, *read.tensors, *geometry))

    def bn_relu_maxpool_backward(
        self,
        dout: Tensor,
        winner: Tensor,
        x: Tensor,
        behind: NormGradient,
        geometry: Geometry,
        out: Tensor,
    ) -> None:
        read = behind.read
        if not _reads(x, read, dout, out):
            super().bn_relu_maxpool_backward(dout, winner, x, behind, geometry, out)
        elif not geometry.of_images:
            volumes.bn_relu_maxpool_backward(self, dout, winner, x, behind, geometry, out)
        else:
            _ops.bn_relu_maxpool_backward(
                dout, winner, x, *read.tensors, *behind.sums, read.batch, *geometry, out
            )


def _all(dtypes: tuple[torch.dtype, ...], *tensors: Tensor | None) -> bool:
    """Whether those that are there have one of the dtypes, are on the CPU and have unit column
    stride.
    """
    for t in tensors:
        if t is not None and not (
            t.dtype in dtypes and t.is_cpu and (t.stride(-1) == 1 or t.shape[-1] == 1)
        ):
            return False
    return True


def _fits(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take these, of one dtype. Vectors that are made of statistics they always
    do.
    """
    return x.dtype in Native.dtypes and x.numel() > 0 and _all((x.dtype,), x, *others)


def _beside(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take these, which may also be in what they compute x in: G, and a norm's
    parameters.
    """
    return _all((x.dtype, accumulator(x.dtype)), *others)


def _reads(x: Tensor, read: Reader, *others: Tensor | None) -> bool:
    """Whether the kernels take x through this norm, and what has its dtype."""
    return _fits(x, *others) and _beside(x, read.weight, read.bias)


def _convolves(x: Tensor, read: Reader, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether the 3x3's kernels take these: its weight may have any strides."""
    enough = weight.dtype == x.dtype and weight.numel() // 9 >= MIN_PRODUCTS
    return enough and _reads(x, read, *others)


def _rows(images: Tensor) -> Tensor | None:
    """Images (N, C, H, W), or volumes, as a matrix (M, C) on the same memory; None if it is
    none.
    """
    try:
        return images.movedim(1, -1).view(-1, images.shape[1])
    except RuntimeError:
        return None
