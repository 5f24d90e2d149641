"""The 3x3 convolution in Triton, in its interpreter, against the reference."""

from __future__ import annotations

import copy

import pytest
import torch
from exactness import into_of
from test_conv3x3 import Layer, rms_error
from torch import Tensor

from memdense.backends import Reference
from memdense.backends.triton import Triton, conv3x3
from memdense.backends.triton.launch import INTERPRETED, recorded
from memdense.buffers import Geometry, Into, Reader

pytestmark = [
    pytest.mark.usefixtures("quick_interpreter"),
    pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter"),
]

# images, lines, columns, channels, outputs, dilation
SHAPES = [
    (3, 7, 7, 48, 12, (1, 1)),
    (1, 10, 13, 128, 32, (1, 1)),
    (1, 9, 12, 16, 24, (2, 2)),
    (2, 6, 5, 3, 1, (4, 4)),
    (1, 5, 19, 20, 48, (3, 8)),
    (5, 1, 1, 20, 7, (1, 1)),
    (1, 3, 2, 33, 65, (4, 4)),
    (1, 2, 70, 1, 7, (1, 2)),
    (3, 3, 5, 70, 12, (1, 2)),
]
NAMES = (
    "out", "mean", "var", "dz", "dbeta", "dgamma", "dweight", "g", "dbeta into g", "dgamma into g",
    "S1", "S2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_splits(monkeypatch):
    """Several programs share the rows of a weight gradient, few as they are."""
    monkeypatch.setattr(conv3x3, "SPLIT_ROWS", 40)


def layer_of(shape: tuple, dtype: torch.dtype) -> tuple[Layer, tuple[int, int]]:
    """Values of ``dtype``, away from the kink of the relu, with vectors in float32."""
    *sizes, channels, growth, dilation = shape
    layer = Layer(Geometry(*sizes), channels, growth, torch.float32)
    near = (layer.x * layer.read.scale + layer.read.shift).abs() < 4e-3
    layer.x[near] += 0.03 / layer.read.scale.expand_as(layer.x)[near]
    read = layer.read
    layer = layer.to(dtype)
    layer.read = read
    layer.weight = layer.weight / 8
    return layer, dilation


def run(
    backend: Reference,
    layer: Layer,
    dilation: tuple[int, int],
    keep: tuple[Tensor, float] | None = None,
    seeded: bool = True,
    wide: bool = False,
) -> dict[str, Tensor]:
    """All that the two primitives produce, with G and without; ``wide``: with G in float32."""
    x, read = layer.x, layer.read
    out = Layer.matrix(torch.full((len(x), layer.growth), torch.nan, dtype=x.dtype))
    moments = torch.full((2, layer.growth), torch.nan, dtype=read.mean.dtype)
    backend.bn_relu_conv3x3(x, read, layer.weight, dilation, layer.geometry, out, keep, moments)
    arguments = layer.dy, layer.weight, dilation, x, read, layer.geometry
    dz, sums, dweight = backend.bn_relu_conv3x3_backward(*arguments, None, True)
    dtype = torch.promote_types(x.dtype, torch.float32) if wide else x.dtype
    g = Layer.matrix(layer.g.to(dtype) if seeded else torch.full_like(layer.g, torch.nan).to(dtype))
    into = into_of(g, seeded)
    into.sums.fill_(1)
    none, sums2, no_dweight = backend.bn_relu_conv3x3_backward(*arguments, into, False)
    assert none is None and no_dweight is None
    for matrix in (out, g):
        beside = matrix._base.isnan().sum() - matrix.isnan().sum()
        assert beside == matrix._base.numel() - matrix.numel(), "wrote beside"
    into.sums.sub_(1)
    values = (out, *moments, dz, *sums, dweight, g, *sums2, *into.sums)
    return dict(zip(NAMES, values, strict=True))


def assert_no_worse(layer: Layer, dilation: tuple[int, int], **options) -> None:
    """Each result at most 1.5 times as far from float64 as the reference's own."""
    exact = run(Reference(), layer.to(torch.float64), dilation, **options)
    theirs = run(Reference(), layer, dilation, **options)
    ours = run(Triton(), layer, dilation, **options)
    dz, read = exact["dz"], layer.read
    scale, shares = read.scale.double(), read.scale.double() * read.rstd.double()
    x_hat = (layer.x.double() - read.mean.double()) * read.rstd.double()
    g, g_unit = exact["g"], torch.finfo(ours["g"].dtype).eps
    floors = {
        "dbeta": running_error(dz),
        "dgamma": running_error(dz * x_hat),
        "S1": running_error(dz * scale) + rounding_error(g, g_unit),
        "S2": running_error(dz * x_hat * shares) + rounding_error(g * x_hat * read.rstd, g_unit),
    }
    for name, c in exact.items():
        a, b = ours[name], theirs[name]
        assert a.shape == b.shape and a.dtype == b.dtype, name
        unit = torch.finfo(layer.x.dtype if name in ("out", "dz", "g") else torch.float32).eps
        floor = max(unit * c.square().mean().sqrt().item(), floors.get(name.split()[0], 0.0))
        allowed = 1.5 * max(rms_error(b, c), floor)
        assert rms_error(a, c) <= allowed, (name, rms_error(a, c), allowed)


def running_error(terms: Tensor) -> float:
    """Of a float32 sum over rows, one after the other as the interpreter adds: half a unit of each
    intermediate sum.
    """
    unit = torch.finfo(torch.float32).eps / 2
    return unit * terms.cumsum(0).square().sum(0).mean().sqrt().item()


def rounding_error(terms: Tensor, unit: float) -> float:
    """Of a sum over rows whose terms were stored: a quarter of a unit each, which is their RMS."""
    return unit / 4 * terms.square().sum(0).mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error(shape, dtype):
    layer, dilation = layer_of(shape, dtype)
    assert_no_worse(layer, dilation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dropout_into_an_unseeded_gradient(dtype):
    layer, dilation = layer_of((2, 5, 6, 20, 12, (1, 2)), dtype)
    layer.weight = layer.weight.contiguous(memory_format=torch.channels_last)
    assert_no_worse(layer, dilation, keep=layer.keep, seeded=False)


def test_wide_gradient_of_16_bit_features():
    layer, dilation = layer_of((2, 5, 6, 20, 12, (2, 1)), torch.float16)
    assert_no_worse(layer, dilation, wide=True)


@pytest.mark.parametrize("gradient", ["random", "constant"])
def test_sums_are_of_what_is_stored(gradient):
    """Whoever reads dz subtracts its mean; where dz is nearly constant, it rounds one way."""
    layer, dilation = layer_of((2, 9, 11, 20, 12, (1, 1)), torch.float16)
    if gradient == "constant":
        layer.dy.fill_(1)
    found, read = run(Triton(), layer, dilation), layer.read
    dz = found["dz"].double()
    x_hat = (layer.x.double() - read.mean.double()) * read.rstd.double()
    for name, terms in (("dbeta", dz), ("dgamma", dz * x_hat)):
        assert rms_error(found[name], terms.sum(0)) <= 1.5 * running_error(terms), name


@pytest.mark.parametrize("shape", [(2, 5, 7, 48, 12, (1, 1)), (1, 4, 9, 20, 32, (2, 1))], ids=str)
def test_layouts_give_the_same_bits(shape):
    """Of the weight, and of dY: packed, or with rows that reach to the next multiple of 16, over
    NaN; and a second run.
    """
    layer, dilation = layer_of(shape, torch.float16)
    expected = run(Triton(), layer, dilation)
    other = copy.copy(layer)
    other.weight = layer.weight.contiguous(memory_format=torch.channels_last)
    rows = torch.full((len(layer.dy), layer.growth + 16), torch.nan, dtype=torch.float16)
    other.dy = rows[:, : layer.growth].copy_(layer.dy)
    wide = torch.full((len(layer.x), layer.x.shape[1] + 15), torch.nan, dtype=torch.float16)
    other.x = wide[:, : layer.x.shape[1]].copy_(layer.x)
    for found in (run(Triton(), layer, dilation), run(Triton(), other, dilation)):
        for name in NAMES:
            assert torch.equal(found[name], expected[name]), name


def test_nan_passes_like_relu():
    layer, dilation = layer_of((1, 6, 6, 20, 16, (1, 1)), torch.float32)
    layer.x[14, 3] = torch.nan
    found, expected = (run(b, layer, dilation) for b in (Triton(), Reference()))
    for name in ("out", "dz", "dweight", "dbeta", "dgamma"):
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name
    assert 0 < found["out"].isnan().sum() < found["out"].numel()


def test_no_affine_and_no_batch_statistics():
    layer, dilation = layer_of((1, 4, 5, 17, 9, (1, 1)), torch.float32)
    read = layer.read
    layer.read = Reader(read.mean, read.var, None, None, read.eps, False)
    x, w, geometry = layer.x, layer.weight, layer.geometry
    results = []
    for backend in (Triton(), Reference()):
        out = torch.empty_like(layer.dy)
        backend.bn_relu_conv3x3(x, layer.read, w, dilation, geometry, out, None, None)
        into = Into(layer.g.clone(), None, True)
        _, sums, none = backend.bn_relu_conv3x3_backward(
            layer.dy, w, dilation, x, layer.read, geometry, into, False
        )
        assert none is None
        results.append((out, into.g, *sums))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_launches():
    layer, dilation = layer_of((1, 3, 4, 20, 7, (1, 1)), torch.float32)
    x, read, w, geometry = layer.x, layer.read, layer.weight, layer.geometry
    out = torch.empty_like(layer.dy)
    for moments, names in (
        (torch.empty(2, 7), ["forward_3x3", "merge_moments"]),
        (None, ["forward_3x3"]),
    ):
        with recorded() as launches:
            Triton().bn_relu_conv3x3(x, read, w, dilation, geometry, out, None, moments)
        assert [launch.plan.name for launch in launches] == names
    for need, names in (
        (True, ["input_gradient_3x3", "weight_gradient_3x3", "merge_gradients"]),
        (False, ["input_gradient_3x3", "merge_gradients"]),
    ):
        with recorded() as launches:
            Triton().bn_relu_conv3x3_backward(layer.dy, w, dilation, x, read, geometry, None, need)
        assert [launch.plan.name for launch in launches] == names


def test_what_no_kernel_takes_goes_to_the_reference():
    """Other types, and taps further away than 32-bit offsets reach."""
    layer, _ = layer_of((1, 3, 4, 5, 7, (1, 1)), torch.float32)
    for other, dilation in ((layer.to(torch.float64), (1, 1)), (layer, (2**29, 1))):
        with recorded() as launches:
            found = run(Triton(), other, dilation)
        assert not launches
        for name, expected in run(Reference(), other, dilation).items():
            assert torch.equal(found[name], expected), name
    # rows that lie far apart
    assert conv3x3.reachable(Geometry(1, 3, 4), (1, 1), 2**27)
    assert not conv3x3.reachable(Geometry(1, 3, 4), (1, 1), 2**28)
