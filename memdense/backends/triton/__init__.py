"""The primitives in Triton (float32, float16, bfloat16 on CUDA), the dense layers' 3x3 in CUDA C++
where the extension has it; the rest is the reference's.

Specification: :class:`memdense.backends.reference.Reference`, method by method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _extension
from ...buffers import Geometry, Into, NormGradient, Reader, Share, Sums, mask_in_rows
from .. import volumes
from ..reference import Reference
from . import cast, conv1x1, conv3x3, pools, replay, running, settle, statistics

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _fits(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take these: values, in one dtype of theirs, with unit column stride."""
    if x.dtype not in DTYPES or not x.numel():
        return False
    return all(t is None or (t.dtype == x.dtype and t.stride(-1) == 1) for t in (x, *others))


def _answers(g: Tensor) -> bool:
    """Whether the kernels take a gradient, in a dtype of its own."""
    return g.dtype in DTYPES and g.stride(1) == 1


def _cuda(x: Tensor) -> Any:
    """The operations in CUDA C++, or None where they do not run."""
    return torch.ops.memdense if x.is_cuda and _extension.cuda_runs_on(x.device) else None


class Triton(Reference):
    """Each method has its twin's contract; what its kernel does not take goes to the twin."""

    dtypes = DTYPES

    @property
    def name(self) -> str:
        return "triton and CUDA 3x3" if _extension.cuda_available() else "triton"

    def call(
        self,
        function: Callable[..., list[Tensor | None]],
        moving: Sequence[Tensor | None],
        fixed: Sequence[Tensor],
        *rest: Any,
    ) -> list[Tensor | None]:
        return replay.call(self, function, moving, fixed, *rest)

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
        arguments = means, variances, counts, statistics, starts, momenta, rows
        if not running.update(*arguments):
            super().update_running(*arguments)

    # ---- producing channels

    def cast(
        self, weights: list[Tensor], dtype: torch.dtype, backward: bool = False
    ) -> list[Tensor]:
        if dtype not in DTYPES or not all(w.dtype in DTYPES and w.numel() for w in weights):
            return super().cast(weights, dtype, backward)
        # where C++ reads them, k innermost is what it can copy in pieces of 16 bytes
        turned = backward and any(w.dim() == 4 and _cuda(w) is not None for w in weights)
        flat = [w for w in weights if w.dim() < 5]
        found = cast.cast(flat, dtype, turned) if flat else []
        if len(flat) == len(weights):
            return found
        rest = iter(found)  # a 3x3x3 is rearranged anyway
        return [next(rest) if w.dim() < 5 else w.to(dtype) for w in weights]

    def pack(self, x: Tensor, out: Tensor, geometry: Geometry, moments: Tensor | None) -> None:
        if not _fits(out) or x.dtype != out.dtype:
            return super().pack(x, out, geometry, moments)
        return statistics.pack(x.flatten(2, -2), out, geometry, moments)

    def statistics(self, x: Tensor, moments: Tensor) -> None:
        if not _fits(x):
            return super().statistics(x, moments)
        return statistics.statistics(x, moments)

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
        dilation: tuple[int, ...],
        geometry: Geometry,
        out: Tensor,
        keep: tuple[Tensor, float] | None,
        moments: Tensor | None,
    ) -> None:
        fits = _fits(x, out) and weight.dtype == x.dtype and mask_in_rows(keep)
        if fits and not geometry.of_images:
            return volumes.bn_relu_conv3x3(
                self, x, read, weight, dilation, geometry, out, keep, moments
            )
        if fits and (cuda := _cuda(x)):
            return cuda.bn_relu_conv3x3(
                x, read.mean, read.var, read.weight, read.bias, read.eps, weight, dilation,
                *geometry, *(keep or (None, 1.0)), out, moments, _extension.tf32(),
            )  # fmt: skip
        if not fits or not conv3x3.reachable(geometry, dilation, x.stride(0)):
            return super().bn_relu_conv3x3(x, read, weight, dilation, geometry, out, keep, moments)
        conv3x3.forward(x, read, weight, dilation, geometry, out, keep, moments)

    # ---- answering

    def settle(
        self,
        g: Tensor,
        x: Tensor,
        share: Share | None,
        keep: tuple[Tensor, float] | None,
    ) -> Tensor:
        if not (_fits(x) and _answers(g) and mask_in_rows(keep)):
            return super().settle(g, x, share, keep)
        return settle.settle(g, x, share, keep)

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
        fits = _fits(x, dz, y, weight) and _answers(into.g)
        if not fits or not conv1x1.takes(x.dtype, len(weight)):
            return super().bn_relu_conv1x1_backward(
                dz, y, behind, weight, x, read, into, need_weight
            )
        return conv1x1.backward(dz, y, behind, weight, x, read, into, need_weight)

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
        fits = _fits(x, dy) and weight.dtype == x.dtype
        fits = fits and (into is None or _answers(into.g))
        if fits and not geometry.of_images:
            return volumes.bn_relu_conv3x3_backward(
                self, dy, weight, dilation, x, read, geometry, into, need_weight
            )
        if fits and into is None and (cuda := _cuda(x)):
            dz = x.new_empty(x.shape)
            sums = Sums(torch.empty_like(read.mean), torch.empty_like(read.mean))
            dweight = weight.new_empty(weight.shape, dtype=torch.float32) if need_weight else None
            cuda.bn_relu_conv3x3_backward(
                dy, weight, dilation, x, read.mean, read.var, read.weight, read.bias, read.eps,
                *geometry, dz, *sums, dweight, False, _extension.tf32(),
            )  # fmt: skip
            return dz, sums, dweight
        if not fits or not conv3x3.reachable(geometry, dilation, dy.stride(0)):
            return super().bn_relu_conv3x3_backward(
                dy, weight, dilation, x, read, geometry, into, need_weight
            )
        return conv3x3.backward(dy, weight, dilation, x, read, geometry, into, need_weight)

    # ---- tails

    def bn_relu_pool_conv1x1(
        self, x: Tensor, read: Reader, weight: Tensor, geometry: Geometry
    ) -> Tensor:
        if not _fits(x, weight) or min(geometry.h, geometry.w) < 2:
            return super().bn_relu_pool_conv1x1(x, read, weight, geometry)
        if not geometry.of_images:
            return volumes.bn_relu_pool_conv1x1(self, x, read, weight, geometry)
        return pools.bn_relu_pool_conv1x1(x, read, weight, geometry)

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
        fits = _fits(x, dout, weight) and _answers(into.g)
        if not fits or min(geometry.h, geometry.w) < 2:
            return super().bn_relu_pool_conv1x1_backward(
                dout, weight, x, read, geometry, into, need_weight
            )
        if not geometry.of_images:
            return volumes.bn_relu_pool_conv1x1_backward(
                self, dout, weight, x, read, geometry, into, need_weight
            )
        return pools.bn_relu_pool_conv1x1_backward(
            dout, weight, x, read, geometry, into, need_weight
        )

    def bn_relu(self, x: Tensor, read: Reader, relu: bool) -> Tensor:
        if not _fits(x):
            return super().bn_relu(x, read, relu)
        return pools.bn_relu(x, read, relu)

    def bn_relu_backward(
        self, dout: Tensor, x: Tensor, read: Reader, relu: bool, into: Into
    ) -> Sums:
        if not (_fits(x, dout) and _answers(into.g)):
            return super().bn_relu_backward(dout, x, read, relu, into)
        return pools.bn_relu_backward(dout, x, read, relu, into)

    def bn_relu_mean(self, x: Tensor, read: Reader, geometry: Geometry) -> Tensor:
        if not _fits(x):
            return super().bn_relu_mean(x, read, geometry)
        return pools.bn_relu_mean(x, read, geometry)

    def bn_relu_mean_backward(
        self, dout: Tensor, x: Tensor, read: Reader, geometry: Geometry, into: Into
    ) -> Sums:
        if not (_fits(x, dout) and _answers(into.g)):
            return super().bn_relu_mean_backward(dout, x, read, geometry, into)
        return pools.bn_relu_mean_backward(dout, x, read, geometry, into)

    # ---- the stem

    def bn_relu_maxpool(self, x: Tensor, read: Reader, geometry: Geometry) -> tuple[Tensor, Tensor]:
        if not _fits(x):
            return super().bn_relu_maxpool(x, read, geometry)
        if not geometry.of_images:
            return volumes.bn_relu_maxpool(self, x, read, geometry)
        return pools.bn_relu_maxpool(x, read, geometry)

    def bn_relu_maxpool_sums(
        self, dout: Tensor, winner: Tensor, x: Tensor, read: Reader, geometry: Geometry
    ) -> Sums:
        if not (_fits(x) and _answers(dout) and dout.is_contiguous()):
            return super().bn_relu_maxpool_sums(dout, winner, x, read, geometry)
        if not geometry.of_images:
            return volumes.bn_relu_maxpool_sums(self, dout, winner, x, read, geometry)
        return pools.bn_relu_maxpool_sums(dout, winner, x, read, geometry)

    def bn_relu_maxpool_backward(
        self,
        dout: Tensor,
        winner: Tensor,
        x: Tensor,
        behind: NormGradient,
        geometry: Geometry,
        out: Tensor,
    ) -> None:
        if not (_fits(x, out) and _answers(dout) and dout.is_contiguous()):
            super().bn_relu_maxpool_backward(dout, winner, x, behind, geometry, out)
        elif not geometry.of_images:
            volumes.bn_relu_maxpool_backward(self, dout, winner, x, behind, geometry, out)
        else:
            pools.bn_relu_maxpool_backward(dout, winner, x, behind, geometry, out)
