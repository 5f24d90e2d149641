"""The CUDA kernels' operations against float64, wherever they run: on a device or emulated.

Errors are those of the same computation with each operand rounded as it is stored, times 1.5; in
float32, where the order of summation decides, those of PyTorch's own operations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from test_conv3x3 import layout, rms_error
from torch import Tensor
from torch.nn import functional as F


class Kind(NamedTuple):
    """How values are stored and multiplied."""

    dtype: torch.dtype
    tf32: bool = False

    def __str__(self) -> str:
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    def operand(self, x: Tensor) -> Tensor:
        """x (float64) as the multiplication reads it."""
        x = x.to(self.dtype)
        if self.tf32:
            x = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        return x.double()


KINDS = (
    Kind(torch.float16),
    Kind(torch.bfloat16),
    Kind(torch.float32, tf32=True),
    Kind(torch.float32),
)


def assert_near(name: str, found: Tensor, exact: Tensor, theirs: Tensor, stored: bool) -> None:
    """Error against float64 at most 1.5 times theirs, or a few roundings' of the values.

    Args:
        stored: whether the result is rounded to the dtype of ``found``.
    """
    assert found.shape == exact.shape, name
    found, exact, theirs = found.cpu(), exact.cpu(), theirs.cpu()
    floor = exact.square().mean().sqrt().item()
    floor *= torch.finfo(found.dtype if stored else torch.float32).eps
    allowed = 1.5 * max(floor, rms_error(theirs, exact))
    assert rms_error(found, exact) <= allowed, (name, rms_error(found, exact), allowed)


def convolution(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, geometry) -> list[Tensor]:
    """Output, gradients of x and weight, by PyTorch."""
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, [len(weight)], *geometry, False, (0, 0), 1, (True, True, False)
    )
    return [F.conv2d(x, weight, bias, *geometry), dx, dweight]


def check_plain(op, device: str, case: dict, kind: Kind, how: str) -> list[Tensor]:
    """conv3x3 and both gradients, with tensors laid out as ``layout`` says; returns the results."""
    geometry = case["stride"], case["padding"], case["dilation"]
    x, weight = (torch.randn(case[name]).to(kind.dtype) for name in ("x", "weight"))
    bias = torch.randn(len(weight)).to(kind.dtype)
    dy = torch.randn_like(F.conv2d(x.float(), weight.float(), None, *geometry)).to(kind.dtype)
    exact = convolution(*(t.double() for t in (x, weight, bias, dy)), geometry)
    if kind == Kind(torch.float32):
        theirs = convolution(x, weight, bias, dy, geometry)
    else:
        x_, weight_, dy_ = (kind.operand(t) for t in (x, weight, dy))
        theirs = [t.to(kind.dtype) for t in convolution(x_, weight_, bias.double(), dy_, geometry)]

    if how != "contiguous":
        weight = weight.contiguous(memory_format=torch.channels_last)
    out, dx = (layout(torch.full_like(t, torch.nan), how).to(device) for t in (dy, x))
    x, dy, weight, bias = (t.to(device) for t in (layout(x, how), layout(dy, how), weight, bias))
    op.conv3x3(x, weight, bias, *geometry, out, kind.tf32)
    op.conv3x3_input_gradient(dy, weight, *geometry, dx, kind.tf32)
    dweight = op.conv3x3_weight_gradient(dy, x, *geometry, kind.tf32)
    found = [out, dx, dweight]
    for i, name in enumerate(("out", "dx", "dweight")):
        assert_near(name, found[i], exact[i], theirs[i], stored=i < 2)
    return found


class Layer:
    """Inputs of a dense layer's second half, away from the ReLU's kink, where rounding decides.

    Matrices are slices of wider ones that are NaN around, with rows aligned to 16 bytes or not.
    Shifts are positive, so that relu(shift) in the padding would show; gammas may be negative or 0.
    """

    def __init__(self, shape: tuple, kind: Kind, device: str, aligned: bool):
        self.n, self.h, self.w, channels, growth, self.dilation = shape
        self.kind, self.device, self.aligned = kind, device, aligned
        rows = self.n * self.h * self.w
        y = (torch.randn(rows, channels) + 0.3).to(kind.dtype)
        self.mean, self.var = torch.randn(channels) * 0.3, torch.rand(channels) + 0.5
        self.gamma, self.beta = torch.randn(channels), 0.5 + torch.rand(channels)
        self.gamma[0] = 0
        self.gamma[1:].copysign_(torch.tensor([-1.0, 1.0]).repeat(channels)[: channels - 1])
        self.eps = 1e-3
        near = (self.read(y.double()) - 0).abs() < 2e-2
        y[near] = 0
        near &= self.read(y.double()).abs() < 2e-2
        y[near] = 3
        self.y = self.matrix(y)
        self.weight = torch.randn(growth, channels, 3, 3).to(kind.dtype)
        self.dy = self.matrix(torch.randn(rows, growth).to(kind.dtype))
        self.keep, self.factor = self.matrix(torch.rand(rows, growth) < 0.7), 1 / 0.7

    def matrix(self, values: Tensor) -> Tensor:
        left, right = (16, 16) if self.aligned else (3, 6)
        columns = values.shape[1]
        if self.aligned:
            right += -columns % 16
        wide = torch.full((len(values), left + columns + right), torch.nan).to(values.dtype)
        wide[:, left : left + columns] = values
        return wide.to(self.device)[:, left : left + columns]

    def empty(self, columns: int) -> Tensor:
        return self.matrix(torch.full((len(self.y), columns), torch.nan).to(self.kind.dtype))

    def read(self, y: Tensor) -> Tensor:
        """s*y + t in y's dtype (float64)."""
        rstd = (self.var.double() + self.eps).rsqrt()
        scale = self.gamma.double() * rstd
        return y * scale + (self.beta.double() - self.mean.double() * scale)

    def images(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(0, (self.n, self.h, self.w)).permute(0, 3, 1, 2)

    def run(self, op, dropout: bool, weight_format: torch.memory_format) -> list[Tensor]:
        """Everything that the two operations write."""
        forward, backward, results = self.arguments(dropout, weight_format)
        op.bn_relu_conv3x3(*forward)
        op.bn_relu_conv3x3_backward(*backward)
        return results

    def arguments(
        self, dropout: bool, weight_format: torch.memory_format
    ) -> tuple[tuple, tuple, list[Tensor]]:
        """What the two operations are given, and everything that they write. Channels last, the
        backward pass gets its weight with k innermost, as the engine casts it.
        """
        channels, growth = self.y.shape[1], self.weight.shape[0]
        weight = self.weight.to(self.device).contiguous(memory_format=weight_format)
        turned = weight
        if weight_format == torch.channels_last:
            turned = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        vectors = [v.to(self.device) for v in (self.mean, self.var, self.gamma, self.beta)]
        size = self.n, self.h, self.w
        out, dz = self.empty(growth), self.empty(channels)
        nan = torch.tensor(torch.nan, device=self.device)
        moments, dbeta, dgamma = (nan.repeat(*c) for c in ((2, growth), (channels,), (channels,)))
        dweight = nan.repeat(growth, channels, 3, 3)
        keep, factor = (self.keep, self.factor) if dropout else (None, 1.0)
        forward = (
            self.y, *vectors, self.eps, weight, self.dilation, *size, keep, factor, out, moments,
            self.kind.tf32,
        )  # fmt: skip
        backward = (
            self.dy, turned, self.dilation, self.y, *vectors, self.eps, *size, dz, dbeta, dgamma,
            dweight, False, self.kind.tf32,
        )  # fmt: skip
        return forward, backward, [out, *moments, dz, dbeta, dgamma, dweight]

    def reference(
        self, dropout: bool, operand=lambda t: t, dtype=torch.float64, stored=lambda t: t
    ) -> list[Tensor]:
        """out, dz, its sums and dweight in ``dtype``, with operands of convolutions as ``operand``
        makes them, and out and dz as ``stored`` does."""
        y, dy = self.y.cpu(), self.dy.cpu()
        before = self.read(y.double())
        z, weight = operand(before.relu()).to(dtype), operand(self.weight.double()).to(dtype)
        geometry = (1, 1), self.dilation, self.dilation
        zero = torch.zeros(len(weight), dtype=dtype)
        gradient = operand(dy.double()).to(dtype)
        out, dx, dweight = convolution(
            self.images(z), weight, zero, self.images(gradient), geometry
        )
        out, dx = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (out, dx))
        if dropout:
            out = out * self.keep.cpu() * self.factor
        dz = stored(dx * (before > 0))
        x_hat = (y.double() - self.mean.double()) * (self.var.double() + self.eps).rsqrt()
        x_hat = x_hat.to(dtype)
        return [stored(out), dz, dz.sum(0), (dz * x_hat).sum(0), dweight]

    def check(self, found: list[Tensor], dropout: bool) -> None:
        exact = self.reference(dropout)
        if self.kind == Kind(torch.float32):
            theirs = self.reference(dropout, lambda t: t.float(), torch.float32)
        else:
            theirs = self.reference(
                dropout, self.kind.operand, stored=lambda t: t.to(self.kind.dtype).double()
            )
        out, mean, var, *rest = found
        names = ("out", "dz", "dbeta", "dgamma", "dweight")
        for i, result in enumerate([out, *rest]):
            assert_near(names[i], result, exact[i], theirs[i], stored=i < 2)
        # of what was stored, to a few roundings
        stored = out.cpu().double()
        spread = stored.var(0, correction=0)
        eps = 4 * torch.finfo(torch.float32).eps
        error = (mean.cpu().double() - stored.mean(0)).abs()
        assert (error <= eps * (stored.mean(0).abs() + spread.sqrt())).all()
        assert ((var.cpu().double() - spread).abs() <= 4 * eps * spread).all()
        dz = found[3].cpu().double()
        rstd = (self.var.double() + self.eps).rsqrt()
        x_hat = (self.y.cpu().double() - self.mean.double()) * rstd
        for name, result, terms in (("dbeta", found[4], dz), ("dgamma", found[5], dz * x_hat)):
            error = (result.cpu().double() - terms.sum(0)).abs()
            assert (error <= eps * terms.abs().sum(0)).all(), name
        # nothing beside the slices
        for view in (out, found[3]):
            assert view._base.isnan().sum() == view._base.numel() - view.numel()


def elsewhere(values: tuple) -> tuple:
    """Arguments whose tensors are copies, in memory that looks alike."""

    def copy(t: Tensor) -> Tensor:
        storage = t.untyped_storage().clone()
        return t.new_empty(0).set_(storage, t.storage_offset(), t.size(), t.stride())

    return tuple(copy(v) if isinstance(v, Tensor) else v for v in values)


def replay(launches, stream: int, recorded: tuple, others: tuple) -> None:
    """What was launched on the tensors ``recorded``, on ``others``, with scratch that is NaN."""
    pairs = [(a, b) for a, b in zip(recorded, others, strict=True) if isinstance(a, Tensor)]
    device = pairs[0][0].device
    scratch = [torch.full((size // 4,), torch.nan, device=device) for _, size in launches.scratch]
    begins = {a.data_ptr(): b.data_ptr() for a, b in pairs}
    for (begin, _), new in zip(launches.scratch, scratch, strict=True):
        begins[begin] = new.data_ptr()

    def moved(address: int) -> int:
        begin = max(b for b in begins if b <= address)
        return begins[begin] + address - begin

    launches(stream, *map(moved, launches.addresses))


LAYERS = [
    (1, 8, 8, 16, 16, (1, 1)),
    (3, 7, 7, 128, 32, (1, 1)),
    (1, 14, 11, 48, 12, (2, 2)),
    (3, 1, 1, 20, 7, (1, 1)),
    (1, 5, 9, 3, 1, (4, 4)),
    (1, 12, 10, 16, 24, (3, 1)),
    (3, 6, 17, 1, 48, (1, 2)),
    (1, 9, 13, 40, 70, (8, 8)),
    (1, 2, 37, 33, 65, (1, 1)),
    (1, 28, 28, 48, 12, (1, 1)),
]
