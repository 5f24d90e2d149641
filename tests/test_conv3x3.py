"""The dilated 3x3 convolution: as an operation, as a module, and under the engine."""

from __future__ import annotations

import itertools
import os
import platform
import random
import subprocess
import sys
from contextlib import contextmanager
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from exactness import Calls, into_of, reader_of
from inputs import AMX, BACKWARD_REFUSALS, OLDER, PLAIN_REFUSALS, REFUSALS, plain, second_half
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.nn import functional as F

import memdense
from memdense import DilatedConv2d, _extension, convolution, ops
from memdense.backends import Native, Reference
from memdense.buffers import Geometry, Reader
from memdense.convolution import dilated_conv3x3
from memdense.direct import _autocasts, autocast_dtype, watched
from memdense.memory import peak_memory

built = pytest.mark.skipif(not _extension.available(), reason=_extension.reason())


# ---- a sampled grid: each value of each axis comes up, in many combinations

CHANNELS = (1, 3, 16, 48, 128, 192, 256)
OUTPUTS = (1, 7, 12, 24, 32, 48)
SIZES = (1, 2, 5, 7, 14, 16, 23, 31)


def sample(seed: int) -> dict:
    """Shapes of one convolution that has an output."""
    r = random.Random(seed)
    while True:
        c, k = CHANNELS[seed % len(CHANNELS)], OUTPUTS[seed % len(OUTPUTS)]
        dilation = r.choice([(1, 1), (2, 2), (4, 4), (r.randint(1, 8), r.randint(1, 8))])
        padding = r.choice([dilation, (0, 0), (r.randint(0, 9), r.randint(0, 9))])
        case = {
            "x": (r.choice([1, 1, 2, 3]), c, r.choice(SIZES), r.choice(SIZES)),
            "weight": (k, c, 3, 3),
            "stride": r.choice([(1, 1), (2, 2), (1, 2), (3, 1)]),
            "padding": padding,
            "dilation": dilation,
        }
        ends = zip(case["x"][2:], padding, dilation, strict=True)
        if all(size + 2 * p > 2 * d for size, p, d in ends):
            return case


def sample_large(seed: int) -> dict:
    """One of those that are large enough for the Winograd kernels."""
    r = random.Random(seed)
    for _ in range(1000):
        c, k = (16, 33, 48, 100, 128, 192)[seed % 6], (8, 12, 24, 32, 49)[seed % 5]
        dilation = r.choice([(1, 1), (2, 2), (4, 4), (r.randint(1, 8), r.randint(1, 8))])
        padding = r.choice([dilation, dilation, (0, 0), (r.randint(0, 20), r.randint(0, 20))])
        case = {
            "x": (r.choice([1, 2, 3]), c, r.randint(8, 60), r.randint(8, 60)),
            "weight": (k, c, 3, 3),
            "stride": (1, 1),
            "padding": padding,
            "dilation": dilation,
        }
        steps = zip(case["x"][2:], padding, dilation, strict=True)
        h, w = (size + 2 * p - 2 * d for size, p, d in steps)
        products = case["x"][0] * c * k * h * w
        if (
            h > dilation[0]
            and w > dilation[1]
            and 1.3e6 < products < 6e6
            and kernels(case, torch.float64) == "winograd"
        ):
            return case
    raise RuntimeError("no convolution is taken by the Winograd kernels")


def kernels(case: dict, dtype: torch.dtype) -> str | None:
    """Which run. AMX takes a number below the smallest normal one for 0. The Winograd kernels are
    seen from the rounding of their transformed weights: those below a center of 1 are too large to
    be averaged with it. None where no pixel tells.
    """
    size = case["x"][2:]
    pixel = []
    for length, p, d in zip(size, case["padding"], case["dilation"], strict=True):
        y = max(0, p - d)  # an output whose center is inside, and in a whole pair
        out = length + 2 * p - 2 * d
        if y >= out or y - p + d >= length or (y // d % 2 == 0 and y + d >= out):
            return None
        pixel.append((y, y - p + d))
    (y, row), (x, column) = pixel
    image, weight = torch.zeros(case["x"], dtype=dtype), torch.zeros(case["weight"], dtype=dtype)
    steps = case["stride"], case["padding"], case["dilation"]
    out = F.conv2d(image, weight, None, *steps)

    def outputs(value: float) -> torch.Tensor:
        image[:, 0, row, column] = value
        torch.ops.memdense.conv3x3(image, weight, None, *steps, out)
        return out[:, :, y, x]

    weight[:, :, 1, 1] = 1
    if (outputs(torch.finfo(dtype).tiny / 4) == 0).all():
        return "amx"
    # bfloat16 is transformed in float32
    weight[:, :, 0, 1] = 2 / torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return "winograd" if (outputs(1) != 1).all() else "direct"


CASES = [pytest.param(sample(seed), id=str(seed)) for seed in range(84)]
if _extension.available():
    CASES += [pytest.param(sample_large(seed), id=f"large {seed}") for seed in range(30)]


def layout(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values: contiguous, channels last, or a slice of a wider buffer of NaN."""
    if kind == "contiguous":
        return x.contiguous()
    if kind == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    wide = x.new_full((n, h, w, c + 11), torch.nan)
    wide[..., 5 : 5 + c] = x.permute(0, 2, 3, 1)
    return wide[..., 5 : 5 + c].permute(0, 3, 1, 2)


def everything(convolve, x, weight, bias, dy) -> list[torch.Tensor]:
    """Output and gradients of x, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    out = convolve(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dy)]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    difference = (found.double() - exact.double()).abs()
    return (difference.max() / exact.double().abs().max().clamp_min(1e-30)).item()


def rms_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return (found.double() - exact.double()).square().mean().sqrt().item()


@pytest.fixture(autouse=True)
def ours_in_bfloat16(monkeypatch):
    """Also where PyTorch's are faster."""
    monkeypatch.setattr(convolution, "_AMX", False)


@pytest.mark.parametrize("case", CASES)
def test_float64(case):
    torch.manual_seed(0)
    x, weight = (torch.randn(case[name], dtype=torch.float64) for name in ("x", "weight"))
    bias = torch.randn(len(weight), dtype=torch.float64)
    geometry = case["stride"], case["padding"], case["dilation"]
    dy = torch.randn_like(F.conv2d(x, weight, bias, *geometry))
    expected = everything(lambda *a: F.conv2d(*a, *geometry), x, weight, bias, dy)
    for kind in ("contiguous", "channels last", "slice"):
        found = everything(
            lambda *a: dilated_conv3x3(*a, *geometry),
            layout(x, kind),
            weight,
            bias,
            layout(dy, kind),
        )
        for name, a, b in zip(("out", "dx", "dweight", "dbias"), found, expected, strict=True):
            assert a.shape == b.shape
            assert error(a, b) <= 1e-12, (kind, name)


@built
@pytest.mark.parametrize("case", ["AMX", "AMX, oneDNN switched off", "no AMX"])
def test_bfloat16_where_pytorch_has_amx(case, monkeypatch):
    """PyTorch's own convolution, and ours in float32."""
    monkeypatch.setattr(convolution, "_AMX", case != "no AMX")
    with torch.backends.mkldnn.flags(enabled=case != "AMX, oneDNN switched off"):
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = torch.randn(2, 8, 6, 6).to(dtype), torch.randn(8, 8, 3, 3).to(dtype)
            out = dilated_conv3x3(x.requires_grad_(), weight, None, 1, 2, 2)
            theirs = out.grad_fn.name() == "ConvolutionBackward0"
            assert theirs == (case == "AMX" and dtype == torch.bfloat16)
            if theirs:
                assert torch.equal(out, F.conv2d(x, weight, None, 1, 2, 2))


def test_autocast_of_a_device_that_pytorch_counts_apart():
    """Asked whether it is on for any device, PyTorch leaves a Mac's out."""
    before = torch.is_autocast_enabled("mps")
    torch.set_autocast_enabled("mps", True)
    try:
        assert autocast_dtype(torch.device("mps")) == torch.get_autocast_dtype("mps")
        assert _autocasts(torch.empty(1, device="meta"))  # as for any tensor that is elsewhere
    finally:
        torch.set_autocast_enabled("mps", before)


@pytest.mark.parametrize("most", [None, "default", "AVX512_CORE_AMX", "AVX512_CORE_BF16"])
def test_amx_may_be_kept_from_onednn(most, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if most:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    there = torch.backends.mkldnn.is_available()
    assert convolution._multiplies_on_amx() == (there and most != "AVX512_CORE_BF16")
    for lacking in ((torch.cpu, "_is_amx_tile_supported"), (torch.backends.mkldnn, "is_available")):
        with monkeypatch.context() as machine:
            machine.setattr(*lacking, lambda: False)
            assert not convolution._multiplies_on_amx()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", None)  # not even asked
    assert not convolution._multiplies_on_amx()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES[::3])
def test_error_of_narrow_types(case, dtype):
    """At most 1.5 times the error of PyTorch's own convolution, in the worse of its layouts."""
    torch.manual_seed(0)
    x, weight = (torch.randn(case[name]).to(dtype) for name in ("x", "weight"))
    bias = torch.randn(len(weight)).to(dtype)
    geometry = case["stride"], case["padding"], case["dilation"]
    dy = torch.randn_like(F.conv2d(x, weight, bias, *geometry))
    exact = everything(
        lambda *a: F.conv2d(*a, *geometry), *(t.double() for t in (x, weight, bias, dy))
    )
    theirs = [
        everything(
            lambda *a: F.conv2d(*a, *geometry), layout(x, kind), weight, bias, layout(dy, kind)
        )
        for kind in ("contiguous", "channels last")
    ]
    for kind in ("contiguous", "channels last", "slice"):
        images = layout(x, kind), weight, bias, layout(dy, kind)
        ours = everything(lambda *a: dilated_conv3x3(*a, *geometry), *images)
        for i, name in enumerate(("out", "dx", "dweight", "dbias")):
            # PyTorch may be lucky where sums are few and short: one rounding of the values
            floor = torch.finfo(dtype).eps * exact[i].square().mean().sqrt().item()
            allowed = 1.5 * max(floor, *(rms_error(t[i], exact[i]) for t in theirs))
            assert rms_error(ours[i], exact[i]) <= allowed, (kind, name)


@built
@pytest.mark.parametrize(
    ("case", "vectors", "tiles"),
    [
        # little work
        (((1, 16, 31, 33), (24, 16, 3, 3), 1, 1, 1), "direct", "direct"),
        (((4, 128, 2, 60), (32, 128, 3, 3), 1, 1, 1), "winograd", "amx"),
        (((4, 128, 7, 7), (64, 128, 3, 3), 1, 1, 1), "winograd", "amx"),
        # few taps inside
        (((4, 128, 7, 7), (64, 128, 3, 3), 1, 3, 3), "direct", "amx"),
        (((4, 128, 7, 7), (64, 128, 3, 3), 1, 4, 4), "direct", "direct"),
        (((4, 128, 28, 28), (32, 128, 3, 3), 1, 4, 4), "winograd", "amx"),
        (((4, 128, 28, 28), (32, 128, 3, 3), 2, 1, 1), "direct", "direct"),
        # few channels
        (((4, 15, 60, 60), (32, 15, 3, 3), 1, 1, 1), "direct", "direct"),
        (((9, 128, 40, 40), (7, 128, 3, 3), 1, 1, 1), "direct", "direct"),
    ],
)
def test_which_kernels_run(case, vectors, tiles):
    sizes = {"x": case[0], "weight": case[1]}
    steps = {
        name: (v, v) for name, v in zip(("stride", "padding", "dilation"), case[2:], strict=True)
    }
    for dtype in (torch.float32, torch.float64):
        assert kernels(sizes | steps, dtype) == vectors
    assert kernels(sizes | steps, torch.bfloat16) == (tiles if AMX else vectors)


@built
@pytest.mark.parametrize("size", [(9, 11), (35, 41)], ids=["small", "large"])
@pytest.mark.parametrize("kind", ["contiguous", "channels last", "slice"])
def test_writes_everything_and_nothing_else(kind, size):
    """Poisoned outputs: each value is written, none beside the slice."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 45, *size), torch.randn(38, 45, 3, 3)
    geometry = (1, 1), (2, 2), (2, 2)
    case = {"x": x.shape, "weight": weight.shape, "stride": (1, 1)}
    steps = {"padding": (2, 2), "dilation": (2, 2)}
    assert kernels(case | steps, torch.float32) == ("winograd" if size == (35, 41) else "direct")
    expected = F.conv2d(x, weight, None, *geometry)
    out = layout(torch.full_like(expected, torch.nan), kind)
    torch.ops.memdense.conv3x3(x, weight, None, *geometry, out)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    dx = layout(torch.full_like(x, torch.nan), kind)
    torch.ops.memdense.conv3x3_input_gradient(expected, weight, *geometry, dx)
    assert dx.isfinite().all()
    if kind == "slice":
        for view in (out, dx):
            assert view._base.isnan().sum() == view._base.numel() - view.numel()


@built
@pytest.mark.parametrize("growth", [12, 32])
@pytest.mark.parametrize("size", [8, 29], ids=["small", "large"])
def test_bitwise_repeatable(size, growth):
    torch.manual_seed(0)
    layer = random_layer(4, size, size, 48, growth, torch.float32)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs = [run_layer(Native(), layer, (2, 2), None) for _ in range(3)]
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_registration(memory_format):
    """Schema, shapes and strides for tracing, autograd, once under each need."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64).to(memory_format=memory_format)
    weight, bias = torch.randn(4, 5, 3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    geometry = (1, 2), (1, 0), (2, 1)
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        tensors = [
            t.clone().requires_grad_(need) for t, need in zip((x, weight, bias), needs, strict=True)
        ]
        opcheck(torch.ops.memdense.dilated_conv3x3.default, (*tensors, *geometry))
    out = dilated_conv3x3(x, weight, bias, *geometry)
    assert out.is_contiguous(memory_format=memory_format)
    backward = torch.ops.memdense.dilated_conv3x3_backward.default
    dy = torch.randn_like(out)
    opcheck(backward, (dy, x, weight, *geometry, [True, True, True]))
    for dtype in (torch.float64, torch.bfloat16):
        tensors = [t.to(dtype) for t in (dy, x, weight)]
        for needs in itertools.product((False, True), repeat=3):
            opcheck(backward, (*tensors, *geometry, list(needs)), test_utils="test_faketensor")


@built
def test_registration_of_the_kernels():
    x, weight = torch.randn(1, 5, 7, 6), torch.randn(4, 5, 3, 3)
    geometry = (1, 1), (1, 1), (1, 1)
    x, dy, out = (layout(t, "slice") for t in (x, torch.randn(1, 4, 7, 6), torch.zeros(1, 4, 7, 6)))
    op = torch.ops.memdense
    opcheck(op.conv3x3.default, (x, weight, None, *geometry, out))
    opcheck(op.conv3x3_input_gradient.default, (dy, weight, *geometry, torch.zeros_like(x)))
    opcheck(op.conv3x3_weight_gradient.default, (dy, x, *geometry))

    y, dy, out = torch.randn(42, 9)[:, 2:7], torch.randn(42, 4), torch.zeros(42, 8)[:, 4:]
    mean, var, gamma, beta = torch.rand(4, 5)
    keep, moments = torch.rand(42, 4) < 0.5, torch.zeros(2, 4)
    norm, size = (mean, var, gamma, beta, 1e-5), (1, 7, 6)
    opcheck(
        op.bn_relu_conv3x3.default,
        (y, *norm, weight, (1, 1), *size, keep, 2.0, out, moments),
    )
    for accumulate in (False, True):
        opcheck(
            op.bn_relu_conv3x3_backward.default,
            (dy, weight, (1, 1), y, *norm, *size, torch.zeros(42, 5), torch.zeros(5),
             torch.zeros(5), torch.zeros(4, 5, 3, 3), accumulate),
        )  # fmt: skip


@built
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("size", [9, 40], ids=["small", "large"])
def test_bfloat16_backward(size, accumulate):
    torch.manual_seed(0)
    n, c, k, d = 2, 48, 16, (2, 1)
    rows = n * size * size
    case = {"x": (n, c, size, size), "weight": (k, c, 3, 3), "stride": (1, 1)}
    found = kernels(case | {"padding": d, "dilation": d}, torch.float32)
    assert found == ("winograd" if size == 40 else "direct")
    y, dy = torch.randn(rows, c).bfloat16(), torch.randn(rows, k).bfloat16()
    weight = torch.randn(k, c, 3, 3).bfloat16()
    # of few bits, so that z is exact in float32
    mean, gamma, beta = (torch.randint(4, 12, (3, c)) / 8).unbind()
    var = torch.ones(c)
    read = Reader(mean.double(), var.double(), gamma.double(), beta.double(), 0.0, True)
    z = y.double() * read.scale + read.shift
    y[z.abs() < 0.02] = 3  # away from the kink
    z = (y.double() * read.scale + read.shift).relu()
    # AMX multiplies what is rounded, as PyTorch does
    multiplied = z.bfloat16().double() if AMX else z
    images = Geometry(n, size, size).images
    da, exact_weight, _ = torch.ops.aten.convolution_backward(
        images(dy.double()), images(multiplied), weight.double(), None, (1, 1), d, d, False, (0, 0),
        1, (True, True, False),
    )  # fmt: skip
    dz_exact = da.permute(0, 2, 3, 1).flatten(0, 2) * (z > 0)
    before = torch.randn(rows, c).bfloat16() if accumulate else torch.full((rows, c), torch.nan)
    dz = before.bfloat16().clone()
    dbeta, dgamma, dweight = torch.zeros(c), torch.zeros(c), torch.full((k, c, 3, 3), torch.nan)
    torch.ops.memdense.bn_relu_conv3x3_backward(
        dy, weight, d, y, mean, var, gamma, beta, 0.0, n, size, size, dz, dbeta, dgamma, dweight,
        accumulate,
    )  # fmt: skip
    wanted = before.double() + read.scale * dz_exact if accumulate else dz_exact
    assert error(dz, wanted) <= 4e-3
    # of what is stored, which is read beside them
    summed = dz_exact if accumulate else dz.double()
    assert error(dbeta, summed.sum(0)) <= 1e-5
    assert error(dgamma, (summed * (y.double() - read.mean) * read.rstd).sum(0)) <= 1e-5
    assert error(dweight, exact_weight) <= 1e-5


@built
def test_bfloat16_beside_float32_parameters():
    """y in bfloat16 with gamma and beta in float32, as autocast leaves them, or in bfloat16."""
    torch.manual_seed(0)
    y, weight = torch.randn(42, 16).bfloat16(), torch.randn(8, 16, 3, 3).bfloat16()
    mean, var, gamma, beta = torch.rand(4, 16) + 0.5
    gamma, beta = gamma.bfloat16().float(), beta.bfloat16().float()
    results = []
    for cast in (torch.float32, torch.bfloat16):
        out, moments = torch.full((42, 8), torch.nan).bfloat16(), torch.full((2, 8), torch.nan)
        torch.ops.memdense.bn_relu_conv3x3(
            y, mean, var, gamma.to(cast), beta.to(cast), 1e-5, weight, (2, 1), 1, 7, 6, None, 1.0,
            out, moments,
        )  # fmt: skip
        results.append((out, moments))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    rstd = (var.double() + 1e-5).rsqrt()
    z = ((y.double() - mean) * rstd * gamma + beta).relu()
    images = z.unflatten(0, (1, 7, 6)).permute(0, 3, 1, 2)
    exact = F.conv2d(images, weight.double(), None, 1, (2, 1), (2, 1)).permute(0, 2, 3, 1)
    out, moments = results[0]
    assert error(out, exact.flatten(0, 2)) <= 4e-3
    assert error(moments[0], out.double().mean(0)) <= 1e-5
    assert error(moments[1], out.double().var(0, correction=0)) <= 1e-5


# ---- the operation where nothing watches it, and where something does


def results_of(convolve, bias: bool = True) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(4, dtype=torch.float64, requires_grad=True) if bias else None
    leaves = [x, weight, *([shift] if bias else [])]
    out = convolve(x, weight, shift, (1, 2), (1, 0), (2, 1))
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    out = convolve(x, weight, shift, (1, 2), (1, 0), (2, 1))
    return [out.detach(), *(g.detach() for g in first), *second, *torch.autograd.grad(
        out.square().sum(), leaves
    )]  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
def test_both_ways_agree(bias):
    """The function called directly and the operation: the same bits, first and second gradients."""
    direct = results_of(dilated_conv3x3, bias)
    for a, b in zip(direct, results_of(torch.ops.memdense.dilated_conv3x3, bias), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(direct, results_of(F.conv2d, bias), strict=True):
        assert error(a, b) <= 1e-12


def test_an_operation_that_is_not_ours_is_differentiated_twice():
    """By PyTorch's, to the same bits."""
    tensors = [torch.randn(s).half() for s in ((2, 3, 6, 5), (4, 3, 3, 3), (4,))]
    found = []
    for convolve in (torch.ops.memdense.dilated_conv3x3, F.conv2d):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = convolve(*leaves, (1, 2), (1, 0), (2, 1))
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in first), leaves)
        found.append([out, *first, *second])
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_a_mode_sees_one_operation():
    x, weight = torch.randn(1, 8, 9, 9, requires_grad=True), torch.randn(8, 8, 3, 3)
    with Calls() as calls:
        out = dilated_conv3x3(x, weight, None, 1, 2, 2)
        out.sum().backward()
    assert calls.names.count("memdense::dilated_conv3x3") == 1
    assert calls.names.count("memdense::dilated_conv3x3_backward") == 1
    assert "memdense::conv3x3" not in calls.names


def test_tracing_and_transforms():
    """Fake tensors, make_fx, jit.trace and vmap find what eager finds."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 7, 6), torch.randn(3, 4, 3, 3)

    def convolve(x, weight):
        return dilated_conv3x3(x, weight, None, 1, 2, 2)

    expected = convolve(x, weight)
    with FakeTensorMode() as fake:
        found = convolve(fake.from_tensor(x), fake.from_tensor(weight))
    assert found.shape == expected.shape and found.stride() == expected.stride()
    graph = make_fx(convolve)(x, weight)
    assert "dilated_conv3x3" in graph.code and torch.equal(graph(x, weight), expected)
    traced = torch.jit.trace(convolve, (x, weight))  # PyTorch's operation, to be read anywhere
    assert not any("memdense" in node.kind() for node in traced.inlined_graph.nodes())
    torch.testing.assert_close(traced(x, weight), expected)
    each = torch.func.vmap(lambda image: convolve(image[None], weight)[0])(x)
    torch.testing.assert_close(each, expected)


def test_transforms_differentiate():
    """torch.func's gradients, Jacobians and directional derivatives are F.conv2d's."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3)
    found, expected = (
        (
            torch.func.grad(lambda w, c=c: c(x, w, None, 1, 2, 2).square().sum())(weight),
            torch.func.jacrev(lambda t, c=c: c(t, weight, None, 1, 2, 2).sum((2, 3)))(x),
            torch.func.jvp(lambda t, c=c: c(t, weight, None, 2, 1, 1), (x,), (x.cos(),))[1],
            torch.func.vmap(torch.func.grad(lambda w, t, c=c: c(t[None], w).sum()), (None, 0))(
                weight, x
            ),
        )
        for c in (dilated_conv3x3, F.conv2d)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("batched", [False, True], ids=["vmap", "is_grads_batched"])
@pytest.mark.parametrize(
    "convolve",
    [dilated_conv3x3, torch.ops.memdense.dilated_conv3x3, convolution._Convolution.apply],
    ids=["called", "operation", "function"],
)
def test_many_gradients_at_once(convolve, batched):
    torch.manual_seed(0)
    shapes = (2, 3, 6, 5), (4, 3, 3, 3), (4,)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def rows(convolve):
        out = convolve(*leaves, (1, 2), (2, 1), (2, 1)).flatten()
        eye = torch.eye(len(out), dtype=out.dtype)
        if batched:
            return torch.autograd.grad(out, leaves, eye, is_grads_batched=True)
        return torch.func.vmap(lambda g: torch.autograd.grad(out, leaves, g))(eye)

    for a, b in zip(rows(convolve), rows(F.conv2d), strict=True):
        assert error(a, b) <= 1e-12


@pytest.mark.parametrize("shape", [(2, 1, 5, 4), (2, 3, 1, 1), (1, 4, 5, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_layout_of_ambiguous_images(shape, layout, turned):
    """Where one layout may pass for the other, the output has the one that F.conv2d's has."""
    x = torch.empty(shape).to(memory_format=layout).normal_()
    x = x.transpose(2, 3) if turned else x
    weight = torch.randn(6, shape[1], 3, 3)
    found = dilated_conv3x3(x, weight, None, 1, 2, 1)
    assert (
        found.stride()
        == torch.ops.memdense.dilated_conv3x3(x, weight, None, (1, 1), (2, 2), (1, 1)).stride()
    )
    suggested = torch._prims_common.suggest_memory_format(x)
    assert found.is_contiguous(memory_format=suggested)


def test_layouts_are_those_that_pytorch_suggests():
    """Of images with any strides, which those of an axis of length 1 may be."""
    memory = torch.empty(200)
    for shape in itertools.product((1, 2, 3), repeat=4):
        for strides in itertools.product((1, 2, 3, 6, 18), repeat=4):
            x = memory.as_strided(shape, strides)
            suggested = torch._prims_common.suggest_memory_format(x)
            assert convolution.layout_of(x) is suggested, (shape, strides)


def test_nothing_watches():
    """The function runs without the operation; and with it where a mode is there."""
    x, weight = torch.randn(1, 8, 9, 7), torch.randn(8, 8, 3, 3, requires_grad=True)
    assert "Convolution" in dilated_conv3x3(x, weight).grad_fn.name()
    with torch.device("cpu"):  # a mode of functions
        assert "dilated_conv3x3" in dilated_conv3x3(x, weight).grad_fn.name()
    bias = torch.zeros(8).as_subclass(type("Mine", (torch.Tensor,), {}))
    assert watched(x, weight, bias) and not watched(x, weight, nn.Parameter(torch.zeros(8)), None)


@built
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_pytorch_differentiates(memory_format, dtype):
    """On the CPU a direct call is PyTorch's convolution of a backend that brings its own: what
    needs a gradient gets it, as the operation makes it.
    """
    torch.manual_seed(0)
    shapes, geometry = ((2, 5, 7, 6), (4, 5, 3, 3), (4,)), ((1, 2), (1, 0), (2, 1))
    for needs in itertools.product((True, False), repeat=3):
        leaves = [torch.randn(shape).to(dtype) for shape in shapes]
        leaves[0] = leaves[0].to(memory_format=memory_format)
        wanted = [t.requires_grad_() for t, need in zip(leaves, needs, strict=True) if need]
        out = dilated_conv3x3(*leaves, *geometry)
        expected = torch.ops.memdense.dilated_conv3x3(*leaves, *geometry)
        assert torch.equal(out, expected) and out.stride() == expected.stride()
        if not wanted:
            assert out.grad_fn is None
            continue
        assert out.grad_fn.name() == "ConvolutionOverrideableBackward0"
        dy = torch.randn(out.shape).to(dtype)
        gradients = (torch.autograd.grad(y, wanted, dy) for y in (out, expected))
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()


@built
@pytest.mark.parametrize(
    ("channels", "kernel", "transposed", "groups", "message"),
    [
        (4, 3, True, 1, "expected a convolution of one group, not transposed"),
        (2, 3, False, 2, "expected a convolution of one group, not transposed"),
        (4, 5, False, 1, r"weight \(k, C, 3, 3\), got \(1, 4, 9, 9\) and \(4, 4, 5, 5\)"),
    ],
)
def test_what_stands_behind_pytorchs_name(channels, kernel, transposed, groups, message):
    """It is ours alone, and refuses what ours does not do."""
    x, weight = torch.randn(1, 4, 9, 9), torch.randn(4, channels, kernel, kernel)
    steps = (1, 1), (1, 1), (1, 1), transposed, (0, 0), groups
    with pytest.raises(RuntimeError, match=message):
        torch.ops.aten.convolution_overrideable(x, weight, None, *steps)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.aten.convolution_backward_overrideable(x, x, weight, *steps, (True, True, False))


@built
@pytest.mark.parametrize("shape", [(1, 5, 9, 9), (4, 9, 9)], ids=str)
def test_gradients_have_the_weights_channels(shape):
    x, weight = torch.randn(1, 3, 9, 9), torch.randn(4, 3, 3, 3)
    steps = (1, 1), (1, 1), (1, 1), False, (0, 0), 1
    backward = torch.ops.aten.convolution_backward_overrideable
    for need in ((True, True, True), (False, True, False), (False, False, True)):
        with pytest.raises(RuntimeError, match="expected gradients with 4 channels, got"):
            backward(torch.randn(shape), x, weight, *steps, need)


def test_geometry_as_one_number():
    x, weight = torch.randn(1, 8, 9, 7), torch.randn(8, 8, 3, 3)
    expected = dilated_conv3x3(x, weight, None, (2, 2), (1, 1), (1, 1))
    assert torch.equal(dilated_conv3x3(x, weight, None, 2, 1, 1), expected)


@pytest.mark.parametrize("geometry", [((1, 1), (1, 1), (1, 1)), ((2, 1), (0, 3), (1, 2))], ids=str)
def test_gradcheck(geometry):
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 5, 4), (2, 3, 3, 3), (2,))
    )
    assert torch.autograd.gradcheck(lambda *a: dilated_conv3x3(*a, *geometry), (x, weight, bias))
    assert torch.autograd.gradgradcheck(
        lambda *a: dilated_conv3x3(*a, *geometry), (x, weight, bias)
    )


@built
def test_gradcheck_of_large_images():
    """Along random directions, on a case that the Winograd kernels take."""
    torch.manual_seed(0)
    case = sample_large(1)
    x, weight = (torch.randn(case[name], dtype=torch.float64) for name in ("x", "weight"))
    bias = torch.randn(len(weight), dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    geometry = case["stride"], case["padding"], case["dilation"]
    assert torch.autograd.gradcheck(
        lambda *a: dilated_conv3x3(*a, *geometry), leaves, fast_mode=True
    )


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(_extension, "available", lambda: False)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4, 6, 6), torch.randn(3, 4, 3, 3), torch.randn(3)
    geometry = (1, 1), (2, 2), (2, 2)
    dy = torch.randn(2, 3, 6, 6)
    expected = everything(lambda *a: F.conv2d(*a, *geometry), x, weight, bias, dy)
    for kind in ("contiguous", "channels last"):
        found = everything(
            lambda *a: dilated_conv3x3(*a, *geometry), layout(x, kind), weight, bias, dy
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("x", "weight", "geometry", "message"),
    [
        ((2, 3, 8, 8), (4, 5, 3, 3), (1, 1, 1), "expected images with 5 channels, got 3"),
        ((2, 3, 8, 8), (4, 3, 5, 5), (1, 1, 1), r"expected images \(N, C, H, W\) and weight"),
        ((8, 8), (4, 3, 3, 3), (1, 1, 1), r"expected images \(N, C, H, W\) and weight"),
        (
            (2, 3, 8, 8),
            (4, 3, 3, 3),
            (0, 1, 1),
            "stride of one or two numbers, at least 1",
        ),
        ((2, 3, 8, 8), (4, 3, 3, 3), ((1, 0), 1, 1), "expected stride .* got"),
        ((2, 3, 8, 8), (4, 3, 3, 3), (1, -1, 1), "expected padding .* at least 0 and below"),
        ((2, 3, 8, 8), (4, 3, 3, 3), (1, 1, (1, 1, 1)), "expected dilation of one or two numbers"),
        ((2, 3, 8, 8), (4, 3, 3, 3), (1, 2**57, 2**57), "expected dilation .* below"),
        ((2, 3, 8, 8), (4, 3, 3, 3), (2, "same", 1), "'same' with stride 1, got 'same'"),
        ((2, 3, 8, 4), (4, 3, 3, 3), (1, 0, 2), "an image 4 long with padding 0 is smaller"),
    ],
)
def test_bad_input(x, weight, geometry, message, ours, monkeypatch):
    if not ours:
        monkeypatch.setattr(convolution, "_native", lambda x: False)
    with pytest.raises(RuntimeError, match=message):
        dilated_conv3x3(torch.randn(x), torch.randn(weight), None, *geometry)


def test_other_devices_are_refused():
    with pytest.raises(RuntimeError, match=r"float32 on cpu, got .* on meta"):
        dilated_conv3x3(torch.randn(1, 2, 5, 5), torch.randn(1, 2, 3, 3, device="meta"))


@built
@pytest.mark.parametrize("geometry", [((0, 0), (1, 1), (1, 1)), ((1,), (1,), (1,))], ids=str)
def test_the_operation_refuses_too(geometry):
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(1, 2, 3, 3)
    with pytest.raises(RuntimeError, match=r"conv3x3: expected stride"):
        torch.ops.aten.convolution_overrideable(x, weight, None, *geometry, False, (0, 0), 1)


@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((2, 4, 8, 8), ((2,), [1], 1)),
        ((4, 9, 8), (1, "same", (2, 3))),
        ((2, 4, 9, 8), (2, "valid", 1)),
        ((2, 4, 8, 7), (1, 10**5, 10**5)),  # the middle tap alone lies inside
        ((1, 16, 32, 32), (1, (31, 40), (31, 40))),
        ((2, 4, 8, 8), (100, 1, 1)),
        ((2, 4, 3, 9), ((5, 2), (0, 12), (1, 6))),
    ],
    ids=str,
)
def test_takes_what_conv2d_takes(shape, geometry):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).double(), torch.randn(3, shape[-3], 3, 3).double()
    results = []
    for function in (dilated_conv3x3, F.conv2d):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        out = function(*leaves, None, *geometry)
        dy = torch.linspace(-1, 2, out.numel()).double().view(out.shape)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dy)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("repeats", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_on_pytorchs_own_kernels(layout, repeats, monkeypatch):
    """As without the extension: PyTorch's numbers and strides, but for an output's in the images'
    memory format. Where PyTorch has to be asked for the same bits every time, it is asked twice.
    """
    x = torch.randn(2, 6, 9, 10).contiguous(memory_format=layout).requires_grad_()
    leaves = x, torch.randn(4, 6, 3, 3).requires_grad_(), torch.randn(4).requires_grad_()

    def step(convolve):
        out = convolve(*leaves, 1, 2, 2)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    asked = []

    @contextmanager
    def asking(x):
        asked.append(x)
        yield

    expected = step(F.conv2d)
    peaks = [peak_memory(step, F.conv2d).peak]
    monkeypatch.setattr(convolution, "_native", lambda x: False)
    monkeypatch.setattr(convolution, "_repeats", lambda x: repeats)
    monkeypatch.setattr(convolution, "_repeatable", asking)
    found = step(dilated_conv3x3)
    assert len(asked) == (0 if repeats else 2)
    peaks.append(peak_memory(step, dilated_conv3x3).peak)
    assert peaks[0] == peaks[1]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    assert found[0].is_contiguous(memory_format=layout)
    assert found[1].is_contiguous(memory_format=layout)
    asked.clear()
    with torch.no_grad():
        dilated_conv3x3(*leaves)
    assert len(asked) == (0 if repeats else 1)
    of_channels_last = leaves[1].detach().contiguous(memory_format=torch.channels_last)
    assert dilated_conv3x3(x.detach(), of_channels_last).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("before", [False, True])
def test_cudnn_is_held_to_its_deterministic_algorithms(before, monkeypatch):
    """And where the user holds it, it stays so."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    x = SimpleNamespace(is_cuda=True)
    with torch.backends.cudnn.flags(deterministic=before):
        with pytest.raises(ZeroDivisionError), convolution._repeatable(x):
            assert torch.backends.cudnn.deterministic
            raise ZeroDivisionError
        assert torch.backends.cudnn.deterministic == before


def test_another_thread_does_not_take_ours_for_the_users(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    x, found = SimpleNamespace(is_cuda=True), []
    other = Thread(target=lambda: found.append(convolution._repeats(x)))
    with torch.backends.cudnn.flags(deterministic=False):
        with convolution._repeatable(x):
            other.start()
            other.join(0.2)  # without a lock it would be done
        other.join()
    assert found == [False]


def test_a_bias_out_of_a_stack():
    x, weight, biases = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3), torch.randn(3, 4)
    found = dilated_conv3x3(x, weight, biases[:, 1])
    torch.testing.assert_close(found, F.conv2d(x, weight, biases[:, 1]))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without MKLDNN")
def test_images_in_a_layout_of_mkldnns():
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    found = dilated_conv3x3(x.to_mkldnn(), weight.to_mkldnn()).to_dense()
    torch.testing.assert_close(found, F.conv2d(x, weight))


def test_memory_does_not_grow_with_dilation():
    x, weight = torch.randn(1, 16, 32, 32), torch.randn(16, 16, 3, 3)
    peaks = [peak_memory(dilated_conv3x3, x, weight, None, 1, d, d).peak for d in (40, 10**6)]
    assert peaks[0] == peaks[1]


def test_autocast_casts_what_convolutions_are_cast_of():
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.complex64, torch.int64, torch.float64, torch.float32):
            tensors = x.to(dtype), weight.to(dtype)
            found, expected = dilated_conv3x3(*tensors), F.conv2d(*tensors)
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)


def test_forward_mode():
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    tangents = []
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        for function in (dilated_conv3x3, F.conv2d):
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            tangents.append(torch.autograd.forward_ad.unpack_dual(function(dual, weight)).tangent)
    assert torch.equal(*tangents) and tangents[0].any()


def test_symbolic_trace():
    module = nn.Sequential(DilatedConv2d(2, 3, padding=1))
    traced = torch.fx.symbolic_trace(module)
    x = torch.randn(1, 2, 5, 5)
    assert "dilated_conv3x3" in [node.name for node in traced.graph.nodes]
    assert torch.equal(traced(x), module(x))


def test_meta():
    out = DilatedConv2d(2, 3, padding=1, device="meta")(torch.empty(4, 2, 5, 6, device="meta"))
    assert out.shape == (4, 3, 5, 6) and out.is_meta


def test_mixed_types_are_refused():
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(1, 2, 3, 3)
    message = "^dilated_conv3x3: expected {} in the images' torch.float32 on cpu, got torch.float64"
    with pytest.raises(RuntimeError, match=message.format("weight")):
        dilated_conv3x3(x, weight.double())
    with pytest.raises(RuntimeError, match=message.format("bias")):
        dilated_conv3x3(x, weight, torch.zeros(1).double())
    with pytest.raises(TypeError, match="expected images as a Tensor, got ndarray"):
        dilated_conv3x3(x.numpy(), weight)


def test_empty_batch():
    x = torch.randn(0, 3, 8, 8, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    out = dilated_conv3x3(x, weight, None, (1, 1), (1, 1), (1, 1))
    assert out.shape == (0, 4, 8, 8)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert (weight.grad == 0).all()


@built
@pytest.mark.parametrize("capability", [*OLDER, *["avx512"] * AMX])
def test_other_instruction_sets(capability):
    """A few cases by what older machines run; the variable is read once, so in a process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    wanted = "layer_in_float64 or repeatable"
    if capability == "avx512":  # what bfloat16 is left with
        wanted = "bfloat16 or narrow or which_kernels"
    done = subprocess.run(
        [*command, "-k", wanted],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


# ---- the module


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"padding": 2, "dilation": 2},
        {"padding": "same", "dilation": (3, 1), "bias": False},
        {"padding": "valid"},
        {"stride": 2, "padding": (1, 4), "dilation": (1, 4)},
    ],
    ids=str,
)
def test_module_is_conv2d(arguments):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 5, kernel_size=3, **arguments)
    ours = DilatedConv2d(6, 5, **arguments)
    ours.load_state_dict(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    for x in (torch.randn(2, 6, 9, 10), torch.randn(6, 9, 10)):
        torch.testing.assert_close(ours(x), plain(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(torch.randn(1, 6, 9, 10)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 5}, "expected kernel_size 3, got 5"),
        ({"kernel_size": (3, 1)}, r"expected kernel_size 3, got \(3, 1\)"),
        ({"groups": 2}, "expected groups 1, got 2"),
        ({"dilation": 0}, "expected dilation >= 1, got 0"),
        ({"dilation": (1, 0)}, r"expected dilation >= 1, got \(1, 0\)"),
        ({"stride": 0}, "expected stride >= 1, got 0"),
        ({"stride": (1, 2, 3)}, r"expected stride >= 1, got \(1, 2, 3\)"),
        ({"padding": -1}, "expected padding >= 0, got -1"),
        ({"padding_mode": "reflect"}, "expected padding_mode 'zeros', got 'reflect'"),
        ({"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
    ],
)
def test_module_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        DilatedConv2d(4, 4, **arguments)


@pytest.mark.parametrize("attribute", [{"padding_mode": "circular"}, {"groups": 2}], ids=str)
def test_module_refuses_what_was_set_since(attribute):
    """As for seamless images, on every convolution of a model."""
    module = DilatedConv2d(4, 4, padding=1)
    module(torch.randn(1, 4, 5, 5))
    vars(module).update(attribute)
    with pytest.raises(ValueError, match="|".join(attribute)):
        module(torch.randn(1, 4, 5, 5))


# ---- the fused form


class Layer:
    """Inputs of a dense layer's second half: matrices that are slices of wider, poisoned ones."""

    def __init__(self, geometry: Geometry, channels: int, growth: int, dtype: torch.dtype):
        self.geometry, self.growth, rows = geometry, growth, geometry.rows
        self.x = self.matrix(torch.randn(rows, channels, dtype=dtype))
        mean, rstd = self.x.mean(0), (self.x.var(0, correction=0) + 0.1).rsqrt()
        scale = rstd * torch.randn(channels, dtype=dtype)
        # positive shifts: what is padded is 0, not relu(shift)
        self.read = reader_of(scale, 1 + torch.rand(channels, dtype=dtype), mean, rstd)
        self.weight = torch.randn(growth, channels, 3, 3, dtype=dtype)
        self.dy = torch.randn(rows, growth, dtype=dtype)
        self.g = torch.randn(rows, channels, dtype=dtype)
        self.keep = self.matrix(torch.rand(rows, growth) < 0.7), 1 / 0.7

    @staticmethod
    def matrix(values: torch.Tensor) -> torch.Tensor:
        wide = torch.full((len(values), values.shape[1] + 9), torch.nan).to(values.dtype)
        wide[:, 4:-5] = values
        return wide[:, 4:-5]

    def to(self, dtype: torch.dtype) -> Layer:
        copy = object.__new__(Layer)
        copy.geometry, copy.growth, copy.keep = self.geometry, self.growth, self.keep
        for name in ("weight", "dy", "g"):
            setattr(copy, name, getattr(self, name).to(dtype))
        copy.x = self.matrix(self.x.to(dtype))
        read = self.read
        tensors = (v.to(dtype) for v in (read.mean, read.var, read.weight, read.bias))
        copy.read = Reader(*tensors, read.eps, read.batch)
        return copy


def random_layer(n: int, h: int, w: int, channels: int, growth: int, dtype: torch.dtype) -> Layer:
    return Layer(Geometry(n, h, w), channels, growth, dtype)


def run_layer(backend, layer: Layer, dilation, keep) -> list[torch.Tensor]:
    """All that the two primitives produce, with G and without."""
    out = Layer.matrix(torch.full((layer.geometry.rows, layer.growth), torch.nan).to(layer.x.dtype))
    moments = torch.empty(2, layer.growth, dtype=layer.read.mean.dtype)
    backend.bn_relu_conv3x3(
        layer.x, layer.read, layer.weight, dilation, layer.geometry, out, keep, moments
    )
    arguments = layer.dy, layer.weight, dilation, layer.x, layer.read, layer.geometry
    dz, sums, dweight = backend.bn_relu_conv3x3_backward(*arguments, None, True)
    g = Layer.matrix(layer.g)
    into = into_of(g)
    none, sums2, _ = backend.bn_relu_conv3x3_backward(*arguments, into, False)
    assert none is None
    # each of two roundings: S1 = s*dbeta and S2 = s*r*dgamma
    scale, rstd = layer.read.scale, layer.read.rstd
    credited = torch.stack((scale * sums2.dbeta, scale * rstd * sums2.dgamma))
    assert torch.allclose(
        into.sums, credited, rtol=4 * torch.finfo(credited.dtype).eps, atol=0, equal_nan=True
    )
    return [out, *moments, dz, *sums, dweight, g, *sums2]


@built
@pytest.mark.parametrize("what", ["float32 beside float64", "every second", "mask in columns"])
def test_what_the_kernels_do_not_take(what):
    """Parameters of another dtype (float64 images under autocast) or stride, a mask that lies in
    columns: the reference's results.
    """
    torch.manual_seed(0)
    layer = random_layer(2, 9, 8, 16, 12, torch.float64)
    read, keep = layer.read, None
    if what == "float32 beside float64":
        gamma, beta = read.weight.float(), read.bias.float()
    elif what == "every second":
        gamma, beta = (v.repeat_interleave(2)[::2] for v in (read.weight, read.bias))
    else:
        gamma, beta = read.weight, read.bias
        keep = (torch.rand(12, layer.geometry.rows) < 0.7).t(), 2.0
    layer.read = Reader(read.mean, read.var, gamma, beta, read.eps, read.batch)
    found, expected = (run_layer(b(), layer, (2, 2), keep) for b in (Native, Reference))
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= 1e-12


@pytest.mark.parametrize("dilation", [(1, 1), (3, 2)], ids=str)
def test_bands_with_halos(dilation, monkeypatch):
    """Of as many lines as an image is wide, too."""
    torch.manual_seed(0)
    layer = random_layer(3, 11, 5, 16, 12, torch.float64)
    expected = run_layer(Reference(), layer, dilation, layer.keep)
    for lines in (1, 4, 5, 9, 22):
        monkeypatch.setattr(Reference, "CPU_BAND_BYTES", lines * 5 * 16 * 8)
        for a, b in zip(run_layer(Reference(), layer, dilation, layer.keep), expected, strict=True):
            assert error(a, b) <= 1e-12, lines


LAYERS = [
    (2, 14, 14, 48, 12, (1, 1)),
    (3, 7, 7, 128, 32, (1, 1)),
    (1, 28, 19, 16, 24, (2, 2)),
    (1, 56, 56, 16, 8, (4, 4)),
    (2, 5, 33, 192, 48, (3, 8)),
    (5, 1, 1, 20, 7, (1, 1)),
    (1, 3, 2, 33, 65, (4, 4)),
    (2, 9, 70, 100, 12, (1, 2)),
    # by the Winograd kernels
    (2, 14, 14, 128, 32, (1, 1)),
    (5, 7, 7, 128, 32, (1, 1)),
    (2, 28, 27, 64, 24, (4, 4)),
    (2, 2, 75, 192, 48, (1, 2)),
    (1, 37, 70, 100, 12, (1, 5)),
    (3, 30, 35, 17, 33, (2, 3)),
    # and so many channels that threads share them
    (2, 13, 15, 200, 50, (1, 1)),
    (1, 21, 26, 136, 72, (2, 3)),
]


@built
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_layer_in_float64(shape, dropout):
    torch.manual_seed(0)
    *sizes, dilation = shape
    layer = random_layer(*sizes, torch.float64)
    keep = layer.keep if dropout else None
    found = run_layer(Native(), layer, dilation, keep)
    expected = run_layer(Reference(), layer, dilation, keep)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        # one value a channel: its variance is 0, and so are its x_hat
        assert error(a, b) <= 1e-12 or (a - b).abs().max() <= 1e-12, i


@built
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_layer_in_float32(shape):
    torch.manual_seed(0)
    *sizes, dilation = shape
    layer = random_layer(*sizes, torch.float32)
    # away from the kink of the relu, where rounding decides
    near = (layer.x * layer.read.scale + layer.read.shift).abs() < 1e-3
    layer.x[near] += 0.01 / layer.read.scale.expand_as(layer.x)[near]
    exact = run_layer(Reference(), layer.to(torch.float64), dilation, layer.keep)
    theirs = run_layer(Reference(), layer, dilation, layer.keep)
    ours = run_layer(Native(), layer, dilation, layer.keep)
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        floor = torch.finfo(torch.float32).eps * c.square().mean().sqrt().item()
        assert rms_error(a, c) <= 1.5 * max(rms_error(b, c), floor), i


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [6, 41], ids=["small", "large"])
def test_nan_passes_like_relu(size, dtype):
    torch.manual_seed(0)
    layer = random_layer(1, size, size, 40, 16, dtype)
    for pixel in (0, 14, size * size - 1):
        layer.x[pixel, 3] = torch.nan
    found, expected = (run_layer(b, layer, (1, 1), None) for b in (Native(), Reference()))
    for i in (0, 3):
        assert torch.equal(found[i].isnan(), expected[i].isnan())
    assert 0 < found[0].isnan().sum() < found[0].numel()


@built
@pytest.mark.parametrize("bn_size", [4, None])
def test_network(bn_size, monkeypatch):
    """The engine on these primitives gives the plain modules' numbers, gradients included."""
    torch.manual_seed(0)
    model = memdense.DenseNet(
        12, (3, 2), 24, bn_size=bn_size, drop_rate=0.2, num_classes=5, small_inputs=True
    ).double()
    x = torch.randn(3, 3, 13, 11, dtype=torch.float64)

    def run(backend) -> list[torch.Tensor]:
        monkeypatch.setattr(ops, "backend_for", lambda device: backend())
        torch.manual_seed(1)
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    for a, b in zip(run(Native), run(Reference), strict=True):
        assert error(a, b) <= 1e-10


@built
@pytest.mark.parametrize(("change", "message"), PLAIN_REFUSALS)
def test_kernels_refuse(change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.memdense.conv3x3(*(plain() | change).values())


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        *REFUSALS,
        ({"y": torch.zeros(20, 5).half()}, "expected weight in Half, got Float"),
        ({"var": torch.zeros(5).double()}, "expected var in Float, got Double"),
        ({"gamma": torch.zeros(5).double()}, "expected gamma in Float, got Double"),
        ({"out": torch.zeros(20, 6).double()}, "expected out in Float, got Double"),
    ],
)
def test_a_layers_kernels_refuse(change, message):
    forward, _ = second_half()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.memdense.bn_relu_conv3x3(*(forward | change).values())


@built
@pytest.mark.parametrize(("change", "message"), BACKWARD_REFUSALS)
def test_a_layers_backward_refuses(change, message):
    _, backward = second_half()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.memdense.bn_relu_conv3x3_backward(*(backward | change).values())
