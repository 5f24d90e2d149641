"""The Triton bottleneck against the reference, in the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memdense import _extension
from memdense.backends import Reference
from memdense.backends.triton import Triton, conv1x1, launch, tiles, tuning
from memdense.buffers import Into, NormGradient, Reader, Sums

pytestmark = [
    pytest.mark.usefixtures("quick_interpreter"),
    pytest.mark.gpu
    if torch.cuda.is_available()
    else pytest.mark.skipif(not launch.INTERPRETED, reason="neither a GPU nor the interpreter"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter's tl.dot is wrong in bfloat16
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


@pytest.fixture(autouse=True, params=["tf32", "ieee"] if torch.cuda.is_available() else [None])
def float32_products(request, float32_precision) -> None:
    """On a device, products of float32 in both of PyTorch's ways."""
    if request.param:
        float32_precision(request.param)


class TensorCores(TorchDispatchMode):
    """PyTorch's products of float32 as tensor cores make them in TF32: of operands whose last 13
    bits are not read, adding eight products at a time to a sum of 24 bits, cut off. cuBLAS, asked
    for TF32, may still take another path where sizes are small.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten, kwargs = torch.ops.aten, kwargs or {}
        products = aten.mm.default, aten.mm.out, aten.addmm_.default
        if function not in products or args[-1].dtype != torch.float32:
            return function(*args, **kwargs)
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(t.dtype).double() for t in args[-2:])
        total = a.new_zeros(len(a), b.shape[1])
        for k in range(0, len(b), 8):
            total += a[:, k : k + 8] @ b[k : k + 8]
            near = total.float()
            beyond = near.abs().double() > total.abs()
            total = torch.where(beyond, near.nextafter(torch.zeros_like(near)), near).double()
        if function is aten.mm.default:
            return total.float()
        if function is aten.mm.out:
            return kwargs["out"].copy_(total)
        return args[0].mul_(kwargs.get("beta", 1)).add_(total, alpha=kwargs.get("alpha", 1))


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
        device: str = DEVICE,
    ) -> dict[str, Tensor]:
        """All that forward and backward return or write. ``wide``: G in float32; ``unit``: that the
        row strides are multiples of.
        """
        with TensorCores() if DEVICE == "cuda" and _extension.tf32() else nullcontext():
            return self._run(backend, dtype, batch, seeded, wide, unit, device)

    def _run(
        self,
        backend: Reference,
        dtype: torch.dtype,
        batch: bool,
        seeded: bool,
        wide: bool,
        unit: int,
        device: str,
    ) -> dict[str, Tensor]:
        acc = torch.promote_types(dtype, torch.float32)

        def reader(r: Reader, batch: bool) -> Reader:
            tensors = (
                None if t is None else t.to(device, acc) for t in (r.mean, r.var, r.weight, r.bias)
            )
            return Reader(*tensors, r.eps, batch)

        def matrix(t: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return poisoned(t.to(device, dtype), unit)

        m, b = self.dz.shape
        x, weight, read = matrix(self.x), self.weight.to(device, dtype), reader(self.read, batch)
        moments = torch.full((2, b), torch.nan, dtype=acc, device=device)
        found = {"moments": moments, "y": backend.bn_relu_conv1x1(x, read, weight, moments)}
        behind = NormGradient(
            reader(self.behind, batch), Sums(*(s.to(device, acc) for s in self.sums)), m
        )
        for name, after in (("", behind), (" plain", None)):
            start = self.g if seeded else torch.full_like(self.g, torch.nan)
            g = matrix(start, acc if wide else dtype)
            credit = self.credit.to(device, acc, copy=True)
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


Results = dict[str, Tensor]


def references(run: Callable[..., Results], dtype: torch.dtype) -> list[Results]:
    """``run(Reference(), dtype, device=...)`` on the device and, for float32, on the CPU, whose
    products round after every term as the kernels' do. cuBLAS cuts a small product's sums into
    parts as it sees fit, and has then fewer roundings in a row: half the error for 300 terms.
    """
    devices = [DEVICE, "cpu"] if dtype == torch.float32 and DEVICE == "cuda" else [DEVICE]
    return [run(Reference(), dtype, device=device) for device in devices]


def assert_as_exact(found: Results, theirs: list[Results], exact: Results) -> None:
    """Each error at most 1.5 times the references' largest in the same dtype; of few values theirs
    may happen to be nothing.
    """
    for name, value in exact.items():
        dtype = theirs[0][name].dtype
        assert found[name].shape == value.shape and found[name].dtype == dtype, name
        luck = torch.finfo(dtype).eps * (0.25 + 4 / value.numel()) * rms(value)
        allowed = 1.5 * max(rms(t[name] - value) for t in theirs) + luck
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
    values = shape[0] * shape[1]
    draws = 1 if values >= 2000 else 4 if values > 16 else 64
    cases = [Case.draw(*shape) for _ in range(draws)]

    def run(backend: Reference, dtype: torch.dtype, device: str = DEVICE) -> Results:
        results = [case.run(backend, dtype, device=device) for case in cases]
        return {name: torch.cat([r[name].flatten() for r in results]) for name in results[0]}

    exact = run(Reference(), torch.float64)
    assert_as_exact(run(Triton(), dtype), references(run, dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"batch": False}, {"seeded": False}, {"wide": True}, {"unit": 16}, {"unit": 16, "wide": True}],
    ids=str,
)
def test_matches_the_reference_in_every_mode(options, dtype):
    case = Case.draw(70, 36, 48)
    exact = case.run(Reference(), torch.float64, **options)
    theirs = references(partial(case.run, **options), dtype)
    assert_as_exact(case.run(Triton(), dtype, **options), theirs, exact)


def test_norms_without_parameters():
    case = Case.draw(40, 20, 12, affine=False)
    exact = case.run(Reference(), torch.float64)
    theirs = references(case.run, torch.float32)
    assert_as_exact(case.run(Triton(), torch.float32), theirs, exact)


def test_an_eps_of_0_makes_no_nan_of_what_is_not_there():
    case = Case.draw(40, 20, 12)
    case = replace(case, read=replace(case.read, eps=0.0))
    exact = case.run(Reference(), torch.float64)
    theirs = references(case.run, torch.float32)
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
    exact = case.run(Reference(), torch.float64)
    theirs = references(case.run, torch.float32)
    assert_as_exact(found, theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_configuration_gives_the_same_numbers(dtype):
    case = Case.draw(40, 40, 48)
    exact, theirs = case.run(Reference(), torch.float64), references(case.run, dtype)
    sizes, precise = (1, 1 << 15, 1 << 20), tiles.precision(dtype)
    kernels = {
        "forward_1x1": [
            conv1x1.forward_configs(dtype, precise, m, 48, new, 132)
            for m in sizes
            for new in (True, False)
        ],
        "gradients_1x1": [
            conv1x1.gradient_configs(dtype, precise, 48, new, roomy)
            for new in (True, False)
            for roomy in (True, False)
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
