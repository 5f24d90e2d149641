"""The Triton bottleneck against the reference, in the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import pytest
import torch
from torch import Tensor

from memdense.backends import Reference
from memdense.backends.triton import Triton, conv1x1, launch, tuning
from memdense.buffers import Into, NormGradient, Reader, Sums

pytestmark = (
    pytest.mark.gpu
    if torch.cuda.is_available()
    else pytest.mark.skipif(not launch.INTERPRETED, reason="neither a GPU nor the interpreter")
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter's tl.dot is wrong in bfloat16
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


@pytest.fixture(autouse=True, params=["tf32", "ieee"] if torch.cuda.is_available() else [None])
def float32_products(request) -> Iterator[None]:
    """On a device, products of float32 in both of PyTorch's ways, the reference's too."""
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = request.param or setting.fp32_precision
    yield
    for setting, precision in zip(settings, before, strict=True):
        setting.fp32_precision = precision


def poisoned(values: Tensor, unit: int) -> Tensor:
    """The same matrix as a prefix of rows of NaN, whose length is a multiple of ``unit``."""
    m, c = values.shape
    wide = values.new_full((m + 1, (c + unit) // unit * unit), torch.nan)
    wide[:-1, :c] = values
    return wide[:-1, :c]


@dataclass(frozen=True)
class Case:
    """Inputs of the primitives in float64, away from the ReLU's kink."""

    x: Tensor  # (M, C)
    read: Reader
    weight: Tensor  # (B, C)
    dz: Tensor  # (M, B)
    y: Tensor
    behind: Reader
    sums: Sums
    g: Tensor  # (M, C)
    credit: Tensor  # (2, C)

    @staticmethod
    def draw(m: int, c: int, b: int, affine: bool = True) -> Case:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).half().double()

        def reader(channels: int) -> Reader:
            weight = normal(channels)
            weight[torch.randn(channels) > 1.5] = 0
            mean, var = normal(channels), torch.rand(channels).half().double() + 0.5
            vectors = (weight, normal(channels)) if affine else (None, None)
            return Reader(mean, var, *vectors, 1e-5, True)

        read, x = reader(c), 2 * normal(m, c)
        for _ in range(3):
            x = torch.where((read.scale * x + read.shift).abs() < 0.02, x + 0.25, x)
        return Case(
            x, read, normal(b, c), normal(m, b), normal(m, b), reader(b),
            Sums(m**0.5 * normal(b), m**0.5 * normal(b)), normal(m, c), normal(2, c),
        )  # fmt: skip

    def run(
        self,
        backend: Reference,
        dtype: torch.dtype,
        batch: bool = True,
        seeded: bool = True,
        wide: bool = False,
        unit: int = 1,
    ) -> dict[str, Tensor]:
        """All that forward and backward return or write. ``wide``: G in float32; ``unit``: that the
        row strides are multiples of.
        """
        acc = torch.promote_types(dtype, torch.float32)

        def reader(r: Reader, batch: bool) -> Reader:
            tensors = (
                None if t is None else t.to(DEVICE, acc) for t in (r.mean, r.var, r.weight, r.bias)
            )
            return Reader(*tensors, r.eps, batch)

        def matrix(t: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return poisoned(t.to(DEVICE, dtype), unit)

        m, b = self.dz.shape
        x, weight, read = matrix(self.x), self.weight.to(DEVICE, dtype), reader(self.read, batch)
        moments = torch.full((2, b), torch.nan, dtype=acc, device=DEVICE)
        found = {"moments": moments, "y": backend.bn_relu_conv1x1(x, read, weight, moments)}
        behind = NormGradient(
            reader(self.behind, batch), Sums(*(s.to(DEVICE, acc) for s in self.sums)), m
        )
        for name, after in (("", behind), (" plain", None)):
            start = self.g if seeded else torch.full_like(self.g, torch.nan)
            g = matrix(start, acc if wide else dtype)
            credit = self.credit.to(DEVICE, acc)
            into = Into(g, credit if batch else None, seeded)
            sums, dweight = backend.bn_relu_conv1x1_backward(
                matrix(self.dz), matrix(self.y), after, weight, x, read, into, True
            )
            found |= {"g" + name: g, "dbeta" + name: sums.dbeta, "dgamma" + name: sums.dgamma}
            found |= {"dweight" + name: dweight, "credit" + name: credit}
            around = g._base.clone()
            around[:-1, : g.shape[1]] = torch.nan
            assert around.isnan().all(), "wrote beside its columns of G"
        return {name: t.cpu() for name, t in found.items()}


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item()


def assert_as_exact(
    found: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """Each error at most 1.5 times the reference's in the same dtype; of few values the
    reference's may happen to be nothing.
    """
    for name, value in exact.items():
        assert found[name].shape == value.shape and found[name].dtype == theirs[name].dtype, name
        luck = torch.finfo(theirs[name].dtype).eps * (0.25 + 4 / value.numel()) * rms(value)
        allowed = 1.5 * rms(theirs[name] - value) + luck
        error = rms(found[name] - value)
        assert error <= allowed, f"{name}: {error:.2e}, where {allowed:.2e} is allowed"


# M, C, B
CASES = [
    (1, 1, 1), (70, 20, 12), (33, 36, 48), (300, 96, 128), (65, 40, 192), (17, 7, 28),
    (40, 64, 256),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_matches_the_reference(shape, dtype):
    # several draws of small cases: a handful of errors says little
    cases = [Case.draw(*shape) for _ in range(4 if shape[0] * shape[1] < 2000 else 1)]

    def run(backend: Reference, dtype: torch.dtype) -> dict[str, Tensor]:
        results = [case.run(backend, dtype) for case in cases]
        return {name: torch.cat([r[name].flatten() for r in results]) for name in results[0]}

    exact = run(Reference(), torch.float64)
    assert_as_exact(run(Triton(), dtype), run(Reference(), dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"batch": False}, {"seeded": False}, {"wide": True}, {"unit": 16}, {"unit": 16, "wide": True}],
    ids=str,
)
def test_matches_the_reference_in_every_mode(options, dtype):
    case = Case.draw(70, 36, 48)
    exact = case.run(Reference(), torch.float64, **options)
    found, theirs = (case.run(b, dtype, **options) for b in (Triton(), Reference()))
    assert_as_exact(found, theirs, exact)


def test_norms_without_parameters():
    case = Case.draw(40, 20, 12, affine=False)
    exact, theirs = (case.run(Reference(), t) for t in (torch.float64, torch.float32))
    assert_as_exact(case.run(Triton(), torch.float32), theirs, exact)


def test_nan_passes_the_relu():
    case = Case.draw(40, 20, 12)
    case.x[17, 3] = torch.nan
    found, exact = (case.run(b, torch.float32) for b in (Triton(), Reference()))
    for name in ("y", "dweight", "g"):
        assert torch.equal(found[name].isnan(), exact[name].isnan()), name
    assert 0 < found["y"].isnan().sum() < found["y"].numel()


def test_repeats_bit_for_bit():
    case = Case.draw(150, 40, 24)
    first, second = (case.run(Triton(), torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_splits_of_the_gradients_add_up(monkeypatch):
    monkeypatch.setattr(conv1x1, "SPLIT_ROWS", 32)
    case = Case.draw(300, 20, 12)
    with launch.recorded() as log:
        found = case.run(Triton(), torch.float32)
    grids = {entry.plan.grid for entry in log if entry.plan.name == "gradients_1x1"}
    assert len(grids) == 1 and grids.pop()[0] > 3
    exact, theirs = (case.run(Reference(), t) for t in (torch.float64, torch.float32))
    assert_as_exact(found, theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_configuration_gives_the_same_numbers(dtype):
    case = Case.draw(40, 40, 48)
    exact, theirs = (case.run(Reference(), t) for t in (torch.float64, dtype))
    sizes, precise = (1, 1 << 15, 1 << 20), launch.precision(dtype)
    kernels = {
        "forward_1x1": [
            conv1x1.forward_configs(dtype, precise, m, 48, new)
            for m in sizes
            for new in (True, False)
        ],
        "gradients_1x1": [
            conv1x1.gradient_configs(dtype, precise, 48, new) for new in (True, False)
        ],
    }
    for kernel, configs in kernels.items():
        for config in set(chain.from_iterable(configs)):
            with tuning.forced(kernel, config):
                assert_as_exact(case.run(Triton(), dtype), theirs, exact)


def test_a_bottleneck_too_wide_takes_the_reference():
    case = Case.draw(5, 8, 400)
    with launch.recorded() as log:
        found = case.run(Triton(), torch.float32)
    assert not log
    expected = case.run(Reference(), torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_not_wanted_is_not_launched():
    """Forward is 2 launches with statistics and 1 without; backward 2, one more behind a norm. A
    weight's gradient changes nothing else.
    """
    case = Case.draw(40, 20, 12)
    x, dz, g = (t.to(DEVICE, torch.float32) for t in (case.x, case.dz, case.g))
    weight = case.weight.to(x)
    vectors = (t.to(x) for t in (case.read.mean, case.read.var, case.read.weight, case.read.bias))
    read = Reader(*vectors, 1e-5, True)
    results = []
    with launch.recorded() as log:
        for wanted in (True, False):
            moments = torch.empty(2, 12, device=DEVICE) if wanted else None
            into = Into(g.clone(), torch.zeros(2, 20, device=DEVICE), True)
            y = Triton().bn_relu_conv1x1(x, read, weight, moments)
            sums, dweight = Triton().bn_relu_conv1x1_backward(
                dz, None, None, weight, x, read, into, wanted
            )
            assert (dweight is not None) == wanted
            results.append([y, into.g, into.sums, *sums])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert [entry.plan.name for entry in log] == [
        "forward_1x1", "merge_moments", "gradients_1x1", "merge_gradients",
        "forward_1x1", "gradients_1x1", "merge_gradients",
    ]  # fmt: skip
