"""The dilated 3x3 convolution as a PyTorch operation: on the extension, or else by F.conv2d."""

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import (
    make_channels_last_strides_for,
    make_contiguous_strides_for,
    suggest_memory_format,
)
from torch.nn import functional as F

from . import _extension
from .direct import autocast, batched, learns, transformed, watched, written_down
from .spec import output_length, pair

_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    # in 16 bits cuDNN's deterministic ones were 1.4 to 3.4 times as fast as ours on an H200
    "cuda": (torch.float32,),
}

_OVERRIDEABLE = torch.ops.aten.convolution_overrideable.default


def _multiplies_on_amx() -> bool:
    """Whether oneDNN may: PyTorch's convolutions in bfloat16 are about as fast as ours then, and
    faster where channels are many or few.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False  # elsewhere not even the question is safe: emulated ARM dies of it
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    return torch.cpu._is_amx_tile_supported() and ("AMX" in most or most == "DEFAULT")


_AMX = _multiplies_on_amx()


def _native(x: Tensor) -> bool:
    """Whether the extension's kernels take these images."""
    if x.is_cpu:
        theirs = _AMX and x.dtype == torch.bfloat16 and torch._C._get_mkldnn_enabled()
        return x.dtype in _DTYPES["cpu"] and not theirs and _extension.available()
    return x.is_cuda and x.dtype in _DTYPES["cuda"] and _extension.cuda_runs_on(x.device)


def _overrides(x: Tensor) -> bool:
    """Whether ours stands behind ``aten::convolution_overrideable``, which PyTorch differentiates
    in C++, twice too (csrc/cpu/convolution.cpp).
    """
    return x.is_cpu and _native(x)


def _tf32(x: Tensor) -> bool:
    return x.is_cuda and _extension.tf32()


_flag = RLock()  # the process has one for all threads


def _repeats(x: Tensor) -> bool:
    """Whether PyTorch's convolution gives the same bits every time without our asking."""
    if not x.is_cuda or torch.are_deterministic_algorithms_enabled():
        return True
    with _flag:  # another thread may have asked just now
        return torch._C._get_cudnn_deterministic()


@contextmanager
def _repeatable(x: Tensor) -> Iterator[None]:
    """Where cuDNN convolves, only by algorithms that give the same bits every time."""
    if _repeats(x):
        yield
        return
    with _flag:
        torch._C._set_cudnn_deterministic(True)
        try:
            yield
        finally:
            torch._C._set_cudnn_deterministic(False)


def dilated_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """``F.conv2d`` with a 3x3 kernel and one group; differentiable, twice too.

    On the extension's kernels where they are the faster ones, or else on PyTorch's, cuDNN held to
    its deterministic ones: the same bits every time.

    Args:
        x: (N, C, H, W) or (C, H, W), contiguous or channels last; the output has the same memory
            format.
        weight, bias: (k, C, 3, 3) and (k,), in x's dtype (cast under autocast, as F.conv2d does).
        stride, padding, dilation: one number, or one per axis; padding may be "same" or "valid".

    Raises:
        TypeError: images that are no tensor, or a geometry that is no integers.
        RuntimeError: shapes, dtypes or devices that do not fit together, a stride, padding or
            dilation that is none, or an image smaller than the dilated kernel.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"dilated_conv3x3: expected images as a Tensor, got {type(x).__name__}")
    x, weight, bias = autocast(x, weight, bias)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if isinstance(padding, str):
        padding = _padding(padding, stride, dilation)
    geometry = stride, _pair("padding", padding, 0), dilation
    if bias is not None:
        bias = bias.contiguous()  # as it may be where a model's weights come in a stack
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.device, t.dtype) != (x.device, x.dtype):
            raise RuntimeError(
                f"dilated_conv3x3: expected {name} in the images' {x.dtype} on {x.device}, got "
                f"{t.dtype} on {t.device}"
            )
    if x.is_complex() or x.layout is not torch.strided or transformed():
        return F.conv2d(x, weight, bias, *geometry)
    if x.dim() == 3:
        return dilated_conv3x3(x.unsqueeze(0), weight, bias, *geometry).squeeze(0)
    if watched(x, weight, bias):
        if written_down():
            return F.conv2d(x, weight, bias, *geometry)
        return torch.ops.memdense.dilated_conv3x3(x, weight, bias, *geometry)
    if _overrides(x):
        return _OVERRIDEABLE(x, weight, bias, *geometry, False, (0, 0), 1)
    if not _native(x) and _repeats(x):
        return _plain(x, weight, bias, *geometry)
    run = _Convolution.apply if learns(x, weight, bias) else _convolve
    return run(x, weight, bias, *geometry)


LIMIT = 1 << 31  # sums of a few products of such numbers fit into 64 bits


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    numbers = pair(value)
    if len(numbers) != 2 or min(numbers) < least or max(numbers) >= LIMIT:
        raise RuntimeError(
            f"dilated_conv3x3: expected {name} of one or two numbers, at least {least} and below "
            f"2^31, got {value}"
        )
    return numbers


def _padding(name: str, stride: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    if name not in ("same", "valid") or (name == "same" and stride != (1, 1)):
        raise RuntimeError(
            "dilated_conv3x3: expected padding 'valid', or 'same' with stride 1, got "
            f"{name!r} with stride {stride}"
        )
    return dilation if name == "same" else (0, 0)


def _shape(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """The output's; RuntimeError where there is none."""
    images, kernels = x.shape, weight.shape
    if len(images) != 4 or kernels[2:] != (3, 3):
        raise RuntimeError(
            "dilated_conv3x3: expected images (N, C, H, W) and weight (k, C, 3, 3), "
            f"got {tuple(images)} and {tuple(kernels)}"
        )
    if images[1] != kernels[1]:
        raise RuntimeError(
            f"dilated_conv3x3: expected images with {kernels[1]} channels, got {images[1]}"
        )
    h = _length(images[2], stride[0], padding[0], dilation[0])
    w = _length(images[3], stride[1], padding[1], dilation[1])
    return images[0], kernels[0], h, w


def _output(x: Tensor, weight: Tensor, *geometry: Sequence[int]) -> Tensor:
    """The output, uninitialised."""
    shape = _shape(x, weight, *geometry)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def _length(length: int, stride: int, padding: int, dilation: int) -> int:
    """Of the output along one axis."""
    out = output_length(length, 3, stride, padding, dilation)
    if out < 1:
        raise RuntimeError(
            f"dilated_conv3x3: an image {length} long with padding {padding} is smaller than "
            f"the kernel with dilation {dilation}, which is {2 * dilation + 1} long"
        )
    return out


def layout_of(x: Tensor) -> torch.memory_format:
    """``suggest_memory_format``; what is plainly one or the other first, since that takes longer
    than a small convolution.
    """
    c, step = x.shape[1], x.stride(1)
    if c > 1 and step > 1 and x.is_contiguous():
        return torch.contiguous_format
    if c > 1 and step == 1 and x.dim() == 4:
        # not by is_contiguous(), which does not look at the stride of an axis of length 1
        image, _, row, pixel = x.stride()
        if pixel == c and row >= x.shape[3] * pixel and image >= x.shape[2] * row:
            return torch.channels_last
    return suggest_memory_format(x)


def _as_promised(t: Tensor, layout: torch.memory_format) -> Tensor:
    """PyTorch's result with the strides that tracing was told."""
    last = layout is torch.channels_last
    strides = (make_channels_last_strides_for if last else make_contiguous_strides_for)(t.shape)
    return t if t.stride() == strides else t.new_empty_strided(t.shape, strides).copy_(t)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Sequence[int]) -> Tensor:
    """By PyTorch's own operation, which it differentiates itself."""
    _shape(x, weight, *geometry)
    with torch._C._DisableAutocast():
        out = F.conv2d(x, weight, bias, *geometry)
    return out.contiguous(memory_format=layout_of(x))


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    if not _native(x):
        with _repeatable(x):
            return _plain(x, weight, bias, stride, padding, dilation)
    out = _output(x, weight, stride, padding, dilation)
    torch.ops.memdense.conv3x3(x, weight, bias, stride, padding, dilation, out, _tf32(x))
    return out


def _traced(x: Tensor, *arguments: Any) -> Tensor:
    return _as_promised(_convolve(x, *arguments), layout_of(x))


_forward = torch.library.custom_op(
    "memdense::dilated_conv3x3",
    _traced,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation)"
    " -> Tensor",
)


@_forward.register_fake
def _(x, weight, bias, stride, padding, dilation):
    return _output(x, weight, stride, padding, dilation)


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias; None for what ``need`` does not ask for."""
    if not _native(x):
        with torch._C._DisableAutocast():
            return _plain_gradients(dy, x, weight, (stride, padding, dilation), need)
    dx = dweight = None
    if need[0]:
        dx = torch.empty_like(x, memory_format=layout_of(x))
        torch.ops.memdense.conv3x3_input_gradient(
            dy, weight, stride, padding, dilation, dx, _tf32(x)
        )
    if need[1]:
        dweight = torch.ops.memdense.conv3x3_weight_gradient(
            dy, x, stride, padding, dilation, _tf32(x)
        )
        if dweight.dtype != weight.dtype:
            dweight = dweight.to(weight.dtype)
    return dx, dweight, dy.sum((0, 2, 3)) if need[2] else None


def _needed_gradients(dy: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    layouts = layout_of(x), torch.contiguous_format, torch.contiguous_format
    found = zip(_gradients(dy, x, *arguments), layouts, strict=True)
    return [_as_promised(g, layout) for g, layout in found if g is not None]


_backward_operation = torch.library.custom_op(
    "memdense::dilated_conv3x3_backward",
    _needed_gradients,
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, "
    "bool[3] need) -> Tensor[]",
)


@_backward_operation.register_fake
def _(dy, x, weight, stride, padding, dilation, need):
    empty = []
    if need[0]:
        empty.append(torch.empty_like(x, memory_format=layout_of(x)))
    if need[1]:
        empty.append(weight.new_empty(weight.shape))
    if need[2]:
        empty.append(dy.new_empty((dy.shape[1],)))
    return empty


def _plain_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int]],
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """By PyTorch's own operation, which can be differentiated again."""
    with _repeatable(x):
        return torch.ops.aten.convolution_backward.default(
            dy, x, weight, [weight.shape[0]], *geometry, False, (0, 0), 1, need
        )


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled() or batched(dy):
        if _overrides(x) and not watched(dy, x, weight):
            found = torch.ops.aten.convolution_backward_overrideable(
                dy, x, weight, *ctx.geometry, False, (0, 0), 1, need
            )
        else:
            found = _plain_gradients(dy, x, weight, ctx.geometry, need)
    elif watched(dy, x, weight):
        needed = torch.ops.memdense.dilated_conv3x3_backward(dy, x, weight, *ctx.geometry, need)
        needed = iter(needed)
        found = (next(needed) if n else None for n in need)
    else:
        found = _gradients(dy, x, weight, *ctx.geometry, need)
    return *found, None, None, None


_forward.register_autograd(_backward, setup_context=_setup)


class _Convolution(torch.autograd.Function):
    """memdense::dilated_conv3x3 without its way through the dispatcher, which takes longer than the
    kernels of a small image; for images that nothing overrides.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry) -> Tensor:
        ctx.geometry = geometry
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias, *geometry)

    backward = staticmethod(_backward)
