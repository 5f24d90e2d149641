"""Fused operations of a DenseNet on their own: with autograd, on whatever backend runs."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops
from .convolution import dilated_conv3x3
from .direct import autocast, digits_lost, transformed, written_down
from .spec import NormSpec, StageSpec, TailSpec
from .structure import stands_beside

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
    stored. Differentiable, twice too. An input that is not channels last is copied first, in
    backward again. Under autocast a float32 input takes PyTorch's operations, whose norm keeps its
    digits.

    Args:
        input: (N, C, H, W), float32, float16, bfloat16 or float64. Nothing else of its size is kept
            for backward.
        running_mean, running_var: (C,), read in evaluation and moved in training; both may be None
            in training.
        weight, bias: the norm's, (C,), or None.
        conv_weight: (B, C, 1, 1), of input's dtype (or cast, under autocast, as ``F.conv2d`` does).

    Returns:
        (N, B, H, W), channels last; as ``F.conv2d`` has it under torch.func's transforms, in a
        trace and in an export.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or devices that do not fit together, an empty input, no running
            statistics in evaluation, one value per channel in training, a negative eps or momentum,
            or no momentum where running statistics move.
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
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight,
               "bias": bias}  # fmt: skip
    present = {name: vector for name, vector in vectors.items() if vector is not None}
    for name, value in {"input": input, "conv_weight": conv_weight, **present}.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"bn_relu_conv1x1: expected {name} as a Tensor, got {kind}")
    given, lost = (input, conv_weight), digits_lost(input)
    input, conv_weight = autocast(*given)
    written = written_down()
    if not written:  # where sizes are numbers
        _check(input, present, conv_weight, training, eps)
    if training and running_mean is not None and momentum is None and count is None:
        raise ValueError("bn_relu_conv1x1: expected a momentum, got None")
    if momentum is not None and not momentum >= 0:
        raise ValueError(f"bn_relu_conv1x1: expected a momentum of at least 0, got {momentum}")
    if written or lost or transformed():
        input, conv_weight = given
        if training and count is not None:
            count.add_(1)
            momentum = 1.0 / float(count) if momentum is None else momentum
        return _parts(
            input, running_mean, running_var, weight, bias, conv_weight, training, momentum, eps
        )
    # a stage without layers, whose X is the input
    norm = NormSpec(float(eps), training, weight is not None or bias is not None)
    spec = StageSpec((), TailSpec("transition", norm))
    tensors = [conv_weight]
    if norm.affine:
        weight = torch.ones_like(bias) if weight is None else weight
        tensors = [weight, torch.zeros_like(weight) if bias is None else bias, conv_weight]

    def update(statistics: Tensor) -> None:
        with torch.no_grad():
            ops.move_running_statistics(
                [running_mean], [running_var], [] if count is None else [count],
                statistics, [0], [-1.0 if momentum is None else float(momentum)],
                input.shape[0] * input.shape[2] * input.shape[3],
            )  # fmt: skip

    running = [] if training else [running_mean, running_var]
    moves = training and running_mean is not None
    return ops.run_stage(
        input, tensors, running, None, spec.encode(), True, update if moves else None
    )[0]


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


def _check(x: Tensor, vectors: dict[str, Tensor], conv: Tensor, training: bool, eps: float) -> None:
    def expect(right: bool, what: str, found: object) -> None:
        if not right:
            raise ValueError(f"bn_relu_conv1x1: expected {what}, got {found}")

    expect(x.dim() == 4, "input of shape (N, C, H, W)", tuple(x.shape))
    expect(x.is_floating_point() and x.numel() > 0, "a floating-point input that is not empty",
           f"{x.dtype} of shape {tuple(x.shape)}")  # fmt: skip
    channels = x.shape[1]
    expect(
        conv.shape[1:] == (channels, 1, 1),
        f"conv_weight of shape (B, {channels}, 1, 1)", tuple(conv.shape),
    )  # fmt: skip
    expect(conv.shape[0] > 0, "a conv_weight that is not empty", tuple(conv.shape))
    expect(conv.dtype == x.dtype, f"conv_weight of input's dtype {x.dtype}", conv.dtype)
    expect(conv.device == x.device, f"conv_weight on {x.device}", conv.device)
    for name, vector in vectors.items():
        expect(vector.shape == (channels,), f"{name} of shape ({channels},)", tuple(vector.shape))
        expect(vector.device == x.device, f"{name} on {x.device}", vector.device)
        expect(stands_beside(vector, x),
               f"{name} of input's dtype {x.dtype} (float32 too, if that has 16 bits)",
               vector.dtype)  # fmt: skip
    tracks = "running_mean" in vectors
    expect(tracks == ("running_var" in vectors),
           "both of running_mean and running_var, or neither", "one")  # fmt: skip
    expect(training or tracks, "running statistics in evaluation", None)
    expect(0 <= eps < math.inf, "a finite eps of at least 0", eps)
    if training and x.numel() == channels:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
        )
