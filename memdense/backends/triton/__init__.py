"""The primitives in Triton (float32, float16, bfloat16 on CUDA); the rest is the reference's.

Specification: :class:`memdense.backends.reference.Reference`, method by method.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...buffers import Geometry, Into, NormGradient, Reader, Sums
from ..reference import Reference
from . import conv1x1, conv3x3

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _fits(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take these: values, in one dtype of theirs, with unit column stride."""
    if x.dtype not in DTYPES or not x.numel():
        return False
    return all(t is None or (t.dtype == x.dtype and t.stride(-1) == 1) for t in (x, *others))


class Triton(Reference):
    """Each method has its twin's contract; what its kernel does not take goes to the twin."""

    name = "triton"

    # ---- producing channels

    def bn_relu_conv1x1(
        self, x: Tensor, read: Reader, weight: Tensor, moments: Tensor | None
    ) -> Tensor:
        if not _fits(x, weight) or not conv1x1.takes(x.dtype, len(weight)):
            return super().bn_relu_conv1x1(x, read, weight, moments)
        return conv1x1.forward(x, read, weight, moments)

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
        fits = _fits(x, out) and weight.dtype == x.dtype
        fits = fits and (keep is None or keep[0].stride(-1) == 1)
        if not fits or not conv3x3.reachable(geometry, dilation, x.stride(0)):
            return super().bn_relu_conv3x3(x, read, weight, dilation, geometry, out, keep, moments)
        conv3x3.forward(x, read, weight, dilation, geometry, out, keep, moments)

    # ---- answering

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
        fits = _fits(x, dz, y, weight) and into.g.stride(-1) == 1
        if not fits or not conv1x1.takes(x.dtype, len(weight)):
            return super().bn_relu_conv1x1_backward(
                dz, y, behind, weight, x, read, into, need_weight
            )
        return conv1x1.backward(dz, y, behind, weight, x, read, into, need_weight)

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
        fits = _fits(x, dy) and weight.dtype == x.dtype
        fits = fits and (into is None or into.g.stride(-1) == 1)
        if not fits or not conv3x3.reachable(geometry, dilation, dy.stride(0)):
            return super().bn_relu_conv3x3_backward(
                dy, weight, dilation, x, read, geometry, into, need_weight
            )
        return conv3x3.backward(dy, weight, dilation, x, read, geometry, into, need_weight)
