"""The dense layer's 3x3 convolution, forward and backward, on the extension's CPU kernels."""

import torch
from torch import Tensor

from .. import _extension
from ..buffers import Geometry, Into, Reader, Sums

# Below C*k of this, vectors are mostly padding and PyTorch's operations are as fast.
MIN_PRODUCTS = 64


def fits(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take these: one dtype, on the CPU, unit column stride. Vectors that are
    made of statistics always do.
    """
    dtype = x.dtype
    if dtype not in (torch.float32, torch.float64) or not x.numel():
        return False
    for t in (x, *others):
        if t is not None and not (
            t.dtype == dtype and t.is_cpu and (t.stride(-1) == 1 or t.shape[-1] == 1)
        ):
            return False
    return True


class NativeConv3x3:
    """Two primitives of :class:`memdense.backends.Reference`, to stand before it among the bases.

    float32 and float64 on the CPU, with the extension built; everything else falls through.
    """

    @staticmethod
    def _native3x3(x: Tensor, weight: Tensor, read: Reader, *others: Tensor | None) -> bool:
        return (
            _extension.available()
            and weight.dtype == x.dtype
            and weight.shape[0] * weight.shape[1] >= MIN_PRODUCTS
            and fits(x, read.weight, read.bias, *others)
        )

    def bn_relu_conv3x3(
        self,
        x: Tensor,
        read: Reader,
        weight: Tensor,
        dilation: tuple[int, int],
        geometry: Geometry,
        out: Tensor,
        keep: tuple[Tensor, float] | None,
        moments: Tensor | None,
    ) -> None:
        mask = keep is None or keep[0].stride(1) == 1
        if not mask or not self._native3x3(x, weight, read, out):
            return super().bn_relu_conv3x3(x, read, weight, dilation, geometry, out, keep, moments)
        torch.ops.memdense.bn_relu_conv3x3(
            x, read.mean, read.var, read.weight, read.bias, read.eps, weight, dilation, *geometry,
            *(keep or (None, 1.0)), out, moments,
        )  # fmt: skip

    def bn_relu_conv3x3_backward(
        self,
        dy: Tensor,
        weight: Tensor,
        dilation: tuple[int, int],
        x: Tensor,
        read: Reader,
        geometry: Geometry,
        into: Into | None,
        need_weight: bool,
    ) -> tuple[Tensor | None, Sums, Tensor | None]:
        if not self._native3x3(x, weight, read, dy, into and into.g):
            return super().bn_relu_conv3x3_backward(
                dy, weight, dilation, x, read, geometry, into, need_weight
            )
        dz = None if into else torch.empty_like(x, memory_format=torch.contiguous_format)
        target = into.start() if into else dz
        sums = Sums(torch.empty_like(read.mean), torch.empty_like(read.mean))
        dweight = weight.new_empty(weight.shape) if need_weight else None
        torch.ops.memdense.bn_relu_conv3x3_backward(
            dy, weight, dilation, x, read.mean, read.var, read.weight, read.bias, read.eps,
            *geometry, target, *sums, dweight, into is not None,
        )  # fmt: skip
        if into is not None:
            into.credit(read, sums)
        return dz, sums, dweight
