"""The primitives in C++ (csrc/cpu), float32 and float64 on the CPU; the rest is the reference's."""

import torch
from torch import Tensor

from .. import _extension  # noqa: F401  (loads the operations)
from ..buffers import Geometry, Reader, Sums
from .native3x3 import NativeConv3x3
from .reference import Moments, Reference

_ops = torch.ops.memdense

Vectors = tuple[Tensor, Tensor | None, Tensor | None]


def _fits(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take these: one dtype, one device, unit column stride."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or not x.numel():
        return False
    tensors = [x, *(t for t in others if t is not None)]
    return all(t.dtype == x.dtype and t.device == x.device for t in tensors) and all(
        t.stride(-1) == 1 or t.shape[-1] == 1 for t in tensors
    )


class Native(NativeConv3x3, Reference):
    """Each method has its twin's contract; what its kernel does not take goes to the twin."""

    name = "native"

    # ---- producing channels

    def pack(self, x: Tensor, out: Tensor, geometry: Geometry, statistics: bool) -> Moments | None:
        rows = _rows(x)
        if not statistics or rows is None or not _fits(rows, out):
            return super().pack(x, out, geometry, statistics)
        return _ops.pack(rows, out)

    def statistics(self, x: Tensor) -> Moments:
        return _ops.channel_statistics(x) if _fits(x) else super().statistics(x)

    def bn_relu_conv1x1(
        self, x: Tensor, read: Reader, weight: Tensor, statistics: bool
    ) -> tuple[Tensor, Moments | None]:
        if not _fits(x, read.scale, weight):
            return super().bn_relu_conv1x1(x, read, weight, statistics)
        y, *moments = _ops.bn_relu_conv1x1(x, read.scale, read.shift, weight, statistics)
        return y, tuple(moments) if statistics else None

    # ---- answering

    def settle(
        self,
        g: Tensor,
        x: Tensor,
        p: Tensor | None,
        q: Tensor | None,
        keep: tuple[Tensor, float] | None,
    ) -> Tensor:
        if not _fits(x, g, p, q):
            return super().settle(g, x, p, q, keep)
        dy = torch.empty_like(x, memory_format=torch.contiguous_format)
        _ops.combine(g, None, x, p, q, *(keep or (None, 1.0)), dy)
        return dy

    def bn_relu_conv1x1_backward(
        self,
        dz: Tensor,
        y: Tensor | None,
        abc: Vectors | None,
        weight: Tensor,
        x: Tensor,
        read: Reader,
        g: Tensor,
        need_weight: bool,
    ) -> tuple[Sums, Tensor | None]:
        a, b, c = abc or (None, None, None)
        if not _fits(x, dz, y, a, b, c, weight, *read[:4], g):
            return super().bn_relu_conv1x1_backward(dz, y, abc, weight, x, read, g, need_weight)
        *sums, dweight = _ops.bn_relu_conv1x1_backward(
            dz, y, a, b, c, weight, x, *read[:4], g, need_weight
        )
        return Sums(*sums), dweight if need_weight else None

    # ---- tails

    def bn_relu_pool_conv1x1(
        self, x: Tensor, read: Reader, weight: Tensor, geometry: Geometry
    ) -> Tensor:
        if not _fits(x, read.scale, weight):
            return super().bn_relu_pool_conv1x1(x, read, weight, geometry)
        return _ops.bn_relu_pool_conv1x1(x, read.scale, read.shift, weight, *geometry)

    def bn_relu_pool_conv1x1_backward(
        self,
        dout: Tensor,
        weight: Tensor,
        x: Tensor,
        read: Reader,
        geometry: Geometry,
        g: Tensor,
        need_weight: bool,
    ) -> tuple[Sums, Tensor | None]:
        if not _fits(x, dout, weight, *read[:4], g):
            return super().bn_relu_pool_conv1x1_backward(
                dout, weight, x, read, geometry, g, need_weight
            )
        *sums, dweight = _ops.bn_relu_pool_conv1x1_backward(
            dout, weight, x, *read[:4], g, *geometry, need_weight
        )
        return Sums(*sums), dweight if need_weight else None

    def bn_relu(self, x: Tensor, read: Reader, relu: bool) -> Tensor:
        return (
            _ops.bn_relu(x, *read[:2], relu)
            if _fits(x, read.scale)
            else super().bn_relu(x, read, relu)
        )

    def bn_relu_backward(
        self, dout: Tensor, x: Tensor, read: Reader, relu: bool, g: Tensor
    ) -> Sums:
        if not _fits(x, dout, *read[:4], g):
            return super().bn_relu_backward(dout, x, read, relu, g)
        return Sums(*_ops.bn_relu_backward(dout, x, *read[:4], relu, g))

    def bn_relu_mean(self, x: Tensor, read: Reader, geometry: Geometry) -> Tensor:
        if not _fits(x, read.scale):
            return super().bn_relu_mean(x, read, geometry)
        return _ops.bn_relu_mean(x, *read[:2], geometry.n)

    def bn_relu_mean_backward(
        self, dout: Tensor, x: Tensor, read: Reader, geometry: Geometry, g: Tensor
    ) -> Sums:
        if not _fits(x, dout, *read[:4], g):
            return super().bn_relu_mean_backward(dout, x, read, geometry, g)
        return Sums(*_ops.bn_relu_mean_backward(dout, x, *read[:4], g))

    # ---- the stem

    def bn_relu_maxpool(self, x: Tensor, read: Reader, geometry: Geometry) -> tuple[Tensor, Tensor]:
        if not _fits(x, read.scale):
            return super().bn_relu_maxpool(x, read, geometry)
        return _ops.bn_relu_maxpool(x, *read[:2], *geometry)

    def bn_relu_maxpool_backward(
        self, dout: Tensor, winner: Tensor, x: Tensor, read: Reader, geometry: Geometry
    ) -> tuple[Tensor, Sums]:
        if not _fits(x, dout, *read[:4]):
            return super().bn_relu_maxpool_backward(dout, winner, x, read, geometry)
        dz, *sums = _ops.bn_relu_maxpool_backward(dout, winner, x, *read[:4], *geometry)
        return dz, Sums(*sums)

    def normalised_(self, dz: Tensor, x: Tensor, abc: Vectors) -> Tensor:
        a, b, c = abc
        if not _fits(x, dz, a, b, c):
            return super().normalised_(dz, x, abc)
        _ops.combine(dz, a, x, b, c, None, 1.0, dz)
        return dz


def _rows(images: Tensor) -> Tensor | None:
    """Images (N, C, H, W) as a matrix (N*H*W, C) on the same memory; None if it is none."""
    try:
        return images.permute(0, 2, 3, 1).view(-1, images.shape[1])
    except RuntimeError:
        return None
