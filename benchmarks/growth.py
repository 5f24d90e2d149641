"""How memory and time grow with depth, batch and resolution: what is measured, and its curves."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from variants import ARCHS, Arch, Setting, bc, memdense_model

GROWN = ("torchvision", "torchvision, memory_efficient", "memdense")
BUDGETS = (16, 24, 80, 139)  # GiB
# layers of DenseNet-BC with growth rate 12: three blocks of (layers - 4) / 6
DEPTHS = (40, 64, 100, 160, 262)


class Fit(NamedTuple):
    """y = slope * x + intercept, and the share of y's variance it explains."""

    slope: float
    intercept: float
    r2: float


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> Fit:
    """Least squares.

    Raises:
        ValueError: fewer than two different x.
    """
    if len(set(xs)) < 2 or len(xs) != len(ys):
        raise ValueError(f"a line needs two points at least, got x = {list(xs)}, y = {list(ys)}")
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    xx = sum((x - x_mean) ** 2 for x in xs)
    xy = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    slope = xy / xx
    intercept = y_mean - slope * x_mean
    yy = sum((y - y_mean) ** 2 for y in ys)
    rest = sum((y - slope * x - intercept) ** 2 for x, y in zip(xs, ys, strict=True))
    return Fit(slope, intercept, 1 - rest / yy if yy else 1.0)


def fit_power(xs: Sequence[float], ys: Sequence[float]) -> Fit:
    """log y = exponent * log x + c: a line through the logarithms; its slope is the exponent."""
    return fit_line([math.log(x) for x in xs], [math.log(y) for y in ys])


def largest_batch(line: Fit, image: float, fixed: float, budget: float) -> int:
    """The most images with ``fixed`` + line(batch) + ``image`` * batch bytes within ``budget``.

    Args:
        line: peak bytes of a step against its batch.
        image: bytes of one input image, which lies there before the step.
        fixed: bytes that do not depend on the batch: parameters, gradients, momentum.
    """
    return max(0, math.floor((budget - fixed - line.intercept) / (line.slope + image)))


class Point(NamedTuple):
    axis: str
    value: int
    setting: Setting


def points(device: torch.device, dtype: torch.dtype, quick: bool = False) -> list[Point]:
    """Every network, batch and resolution that is measured."""
    cuda = device.type == "cuda"
    found = []

    def add(axis: str, value: int, arch: Arch, name: str, batch: int, size: int) -> None:
        found.append(Point(axis, value, Setting(arch, name, batch, size, dtype, device)))

    for depth in DEPTHS[:2] if quick else DEPTHS:
        batch = 2 if quick else 128 if cuda else 4
        add("depth", depth, bc(depth), f"bc{depth}-12", batch, 32)
    name, side = "densenet121", 64 if quick else 224
    # large enough for the peak to lie in the first block: in smaller ones it lies where a last
    # block's parameter gradients are, and a line through those would promise too much
    for batch in (16, 32, 64, 128) if cuda and not quick else (4, 6, 8):
        add("batch", batch, ARCHS[name], name, batch, side)
    for batch in (32, 48, 64) if cuda and not quick else ():
        add("batch", batch, ARCHS["densenet264"], "densenet264", batch, side)
    for size in (64, 96) if quick else (128, 224, 320, 448) if cuda else (64, 128, 192, 256, 320):
        add("resolution", size, ARCHS[name], name, 16 if cuda else 1, size)
    return found


def fixed_bytes(arch: Arch) -> int:
    """Parameters, their gradients and momentum in float32, and the norms' buffers."""
    with torch.device("meta"):
        model = memdense_model(arch)
    parameters = sum(p.numel() for p in model.parameters())
    return 3 * 4 * parameters + sum(b.numel() * b.element_size() for b in model.buffers())
