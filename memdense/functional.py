"""Fused operations of a DenseNet on their own: with autograd, on whatever backend runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops, plain
from .backends import backend_for, chosen, unless_chosen
from .buffers import FeatureBuffer, Geometry, GradientBuffer, Reader, accumulator, reader
from .convolution import dilated_conv3x3
from .direct import autocast, transformed
from .engine import as_rows
from .spec import Norm, NormSpec

__all__ = ["bn_relu_conv1x1", "dilated_conv3x3"]


def bn_relu_conv1x1(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.conv2d(F.relu(F.batch_norm(input, ..., training, momentum, eps)), conv_weight)``, reading
    ``input`` once for its statistics and once for the product; the normalised tensor is never
    stored. Differentiable, twice too.

    Args:
        input: (N, C, H, W), float32, float16, bfloat16 or float64. It alone is kept for backward.
        running_mean, running_var: (C,), read in evaluation and moved in training; both may be None
            in training.
        weight, bias: the norm's, (C,), or None.
        conv_weight: (B, C, 1, 1), of input's dtype (or cast, under autocast, as ``F.conv2d`` does).

    Returns:
        (N, B, H, W), channels last.

    Raises:
        ValueError: shapes or dtypes that do not fit together, no running statistics in evaluation,
            or one value per channel in training.
    """
    running = running_mean, running_var
    return norm_relu_conv1x1(
        input, *running, None, weight, bias, conv_weight, training, momentum, eps
    )


def norm_relu_conv1x1(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    count: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """:func:`bn_relu_conv1x1` that moves ``count``, num_batches_tracked, too; a momentum of None
    averages over it.
    """
    input, conv_weight = autocast(input, conv_weight)
    _check(input, running_mean, running_var, weight, bias, conv_weight, training, eps)
    if training and running_mean is not None and momentum is None and count is None:
        raise ValueError("bn_relu_conv1x1: expected a momentum, got None")
    if momentum is not None and momentum < 0:
        raise ValueError(f"bn_relu_conv1x1: expected a momentum of at least 0, got {momentum}")
    if transformed():
        if training and count is not None:
            count.add_(1)
            momentum = 1.0 / float(count) if momentum is None else momentum
        return _parts(
            input, running_mean, running_var, weight, bias, conv_weight, training, momentum, eps
        )
    mean, var = (None, None) if training else (running_mean, running_var)
    out, statistics = torch.ops.memdense.bn_relu_conv1x1_alone(
        input, mean, var, weight, bias, conv_weight, eps
    )
    if training and running_mean is not None:
        with torch.no_grad():
            ops.move_running_statistics(
                [running_mean], [running_var], [] if count is None else [count],
                statistics, [0], [-1.0 if momentum is None else float(momentum)],
                input.shape[0] * input.shape[2] * input.shape[3],
            )  # fmt: skip
    return out


def _parts(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv: Tensor,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """PyTorch's own operations; a momentum of None moves nothing."""
    z = F.batch_norm(x, mean, var, weight, bias, training, momentum or 0.0, eps)
    return F.conv2d(F.relu(z), conv)


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv: Tensor,
    training: bool,
    eps: float,
) -> None:
    def expect(right: bool, what: str, found: object) -> None:
        if not right:
            raise ValueError(f"bn_relu_conv1x1: expected {what}, got {found}")

    expect(x.dim() == 4, "input of shape (N, C, H, W)", tuple(x.shape))
    expect(x.is_floating_point() and x.numel() > 0, "a floating-point input that is not empty",
           f"{x.dtype} of shape {tuple(x.shape)}")  # fmt: skip
    channels = x.shape[1]
    expect(
        conv.dim() == 4 and conv.shape[1:] == (channels, 1, 1),
        f"conv_weight of shape (B, {channels}, 1, 1)", tuple(conv.shape),
    )  # fmt: skip
    expect(conv.shape[0] > 0, "a conv_weight that is not empty", tuple(conv.shape))
    expect(conv.dtype == x.dtype, f"conv_weight of input's dtype {x.dtype}", conv.dtype)
    expect(conv.device == x.device, f"conv_weight on {x.device}", conv.device)
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight,
               "bias": bias}  # fmt: skip
    for name, vector in vectors.items():
        if vector is not None:
            expect(vector.shape == (channels,), f"{name} of shape ({channels},)",
                   tuple(vector.shape))  # fmt: skip
            expect(vector.device == x.device, f"{name} on {x.device}", vector.device)
    expect((running_mean is None) == (running_var is None),
           "both of running_mean and running_var, or neither", "one")  # fmt: skip
    expect(training or running_mean is not None, "running statistics in evaluation", None)
    expect(eps >= 0, "an eps of at least 0", eps)
    if training and x.numel() == channels:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
        )


@torch.library.custom_op("memdense::bn_relu_conv1x1_alone", mutates_args=())
def _forward(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(out, statistics (2, C)); by the batch's statistics where mean and var are None."""
    n, channels, h, w = x.shape
    with ops.quiet(x):
        backend, rows = backend_for(x.device), as_rows(x)
        statistics = x.new_empty((2, channels), dtype=accumulator(x.dtype))
        if mean is None:
            backend.statistics(rows, statistics)
        else:
            statistics[0], statistics[1] = mean, var
        read = _reader(statistics, weight, bias, eps, mean is None)
        (matrix,) = backend.cast([conv.flatten(1)], x.dtype)
        out = backend.bn_relu_conv1x1(rows, read, matrix, None)
    return Geometry(n, h, w).images(out).data, statistics


def _reader(
    statistics: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, batch: bool
) -> Reader:
    return reader(Norm(NormSpec(eps, batch, True), weight, bias, None, None), *statistics)


@_forward.register_fake
def _(x, mean, var, weight, bias, conv, eps):
    n, channels, h, w = x.shape
    out = x.new_empty((n, h, w, conv.shape[0])).permute(0, 3, 1, 2)
    return out, x.new_empty((2, channels), dtype=accumulator(x.dtype))


@torch.library.custom_op("memdense::bn_relu_conv1x1_alone_backward", mutates_args=())
def _gradients(
    dout: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv: Tensor,
    eps: float,
    batch: bool,
    need_conv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and conv (empty unless ``need_conv``)."""
    n, channels, h, w = x.shape
    with ops.quiet(x):
        backend, geometry, rows = backend_for(x.device), Geometry(n, h, w), as_rows(x)
        read = _reader(statistics, weight, bias, eps, batch)
        G = GradientBuffer(FeatureBuffer(rows, geometry), None, wide=False)
        (matrix,) = backend.cast([conv.flatten(1)], x.dtype)
        sums, dconv = backend.bn_relu_conv1x1_backward(
            as_rows(dout.to(x.dtype)), None, None, matrix, rows, read, G.into(channels, read),
            need_conv,
        )  # fmt: skip
        everything = slice(0, channels)
        dx = backend.settle(G.matrix, rows, G.share(everything, statistics[0]), None)
    dconv = x.new_empty((0,)) if dconv is None else dconv.to(conv.dtype).view(conv.shape)
    return geometry.images(dx).data, sums.dgamma, sums.dbeta, dconv


@_gradients.register_fake
def _(dout, x, statistics, weight, bias, conv, eps, batch, need_conv):
    n, channels, h, w = x.shape
    vectors = (statistics.new_empty((channels,)) for _ in range(2))
    dconv = conv.new_empty(conv.shape) if need_conv else x.new_empty((0,))
    return x.new_empty((n, h, w, channels)).permute(0, 3, 1, 2), *vectors, dconv


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, mean, _, weight, bias, conv, ctx.eps = inputs
    ctx.batch, ctx.backend = mean is None, chosen()
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight, bias, conv)


def _backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple:
    if dout is None:
        return (None,) * 7
    x, statistics, weight, bias, conv = ctx.saved_tensors
    needed = ctx.needs_input_grad
    need = [needed[0], needed[3], needed[4], needed[5]]
    inputs = [x, weight, bias, conv]
    if torch.is_grad_enabled():
        running = (None, None) if ctx.batch else statistics.unbind()
        with ops.quiet(x):
            out = _parts(x, *running, weight, bias, conv, ctx.batch, 0.0, ctx.eps)
            found = plain.gradients([out], [dout], inputs, need)
    else:
        with unless_chosen(ctx.backend):
            found = torch.ops.memdense.bn_relu_conv1x1_alone_backward(
                dout, x, statistics, weight, bias, conv, ctx.eps, ctx.batch, need[3]
            )
        found = [g.to(t.dtype) if n else None for g, t, n in zip(found, inputs, need, strict=True)]
    return found[0], None, None, *found[1:], None


_forward.register_autograd(_backward, setup_context=_setup)
