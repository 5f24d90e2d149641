"""The C++ primitives against the reference's, and the choice between the two."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from exactness import assert_same_step, into_of, randomise, reader_of, twins
from torch import Tensor

import memdense
from memdense import _extension
from memdense.backends import Native, Reference, backend_for
from memdense.buffers import Geometry, NormGradient, Reader, Share, Sums
from memdense.memory import peak_memory

tv = pytest.importorskip("torchvision")
built = pytest.mark.skipif(not _extension.available(), reason=_extension.reason())
CPU = torch.device("cpu")

# (N, H, W), C, B: no multiples of a vector, of a tile, of a panel; and such
SHAPES = [
    ((1, 1, 1), 1, 1),
    ((1, 1, 1), 7, 12),
    ((2, 1, 3), 3, 7),
    ((3, 7, 5), 12, 48),
    ((2, 14, 15), 64, 128),
    ((3, 9, 11), 96, 192),
    ((1, 21, 20), 256, 128),
    ((2, 6, 8), 1000, 7),
    ((2, 10, 10), 200, 300),
]


def poisoned(values: Tensor) -> Tensor:
    """The same matrix as a slice of a wider one that is NaN all around."""
    m, c = values.shape
    buffer = torch.full((m + 2, c + 11), torch.nan, dtype=values.dtype)
    buffer[1:-1, 5 : 5 + c] = values
    return buffer[1:-1, 5 : 5 + c]


class Inputs:
    """What the primitives take, in float64, away from the ReLU's kink: |z| > 1e-3."""

    def __init__(self, size: tuple[int, int, int], c: int, b: int) -> None:
        self.geometry = Geometry(*size)
        m = self.geometry.rows
        small = Geometry(size[0], size[1] // 2, size[2] // 2).rows
        pooled = Geometry(size[0], (size[1] + 1) // 2, (size[2] + 1) // 2).rows
        scale, shift = torch.randn(c), 0.3 * torch.randn(c)
        scale[torch.randn(c) > 1.5] = 0
        shift[scale == 0] = 0.5
        x = 2 * torch.randn(m, c) + 1
        x = torch.where((scale * x + shift).abs() < 0.01, x + 0.3, x)
        x = torch.where((scale * x + shift).abs() < 0.01, x + 0.3 / scale, x)
        self.vectors = [scale, shift, torch.randn(c), torch.rand(c) + 0.5]
        # of the norm behind the 1x1, and what its backward left
        self.behind = [torch.randn(b), torch.rand(b) + 0.5, torch.randn(b), torch.randn(b)]
        self.sums = [m * torch.randn(b), m * torch.randn(b)]
        self.credited = m * torch.randn(2, c)
        self.weight, self.x, self.g = torch.randn(b, c), x, torch.randn(m, c)
        self.dz, self.y, self.dx = torch.randn(m, b), torch.randn(m, b), torch.randn(m, c)
        self.small, self.pooled = torch.randn(small, b), torch.randn(pooled, c)
        self.per_image = torch.randn(size[0], c)
        self.keep = torch.rand(m, c) > 0.4

    def run(self, backend: Reference, dtype: torch.dtype, wrap=lambda t: t) -> dict[str, Tensor]:
        """All that all primitives return or write, by name."""
        geometry, found = self.geometry, {}
        g_before = self.g.to(dtype)

        def reads(vectors: list[Tensor], batch: bool = True) -> Reader:
            read = reader_of(*vectors)
            tensors = (t.to(dtype) for t in (read.mean, read.var, read.weight, read.bias))
            return Reader(*tensors, read.eps, batch)

        def behind(read: Reader, *sums: Tensor) -> NormGradient:
            return NormGradient(read, Sums(*(t.to(dtype) for t in sums)), geometry.rows)

        read, weight = reads(self.vectors), self.weight.to(dtype)
        share = Share(self.credited.to(dtype), read.mean, geometry.rows)
        x, dz, y, dx = (wrap(t.to(dtype)) for t in (self.x, self.dz, self.y, self.dx))
        small, pooled, per_image = (t.to(dtype) for t in (self.small, self.pooled, self.per_image))

        def into_g(name: str, method: str, *args: object, seeded: bool = True) -> None:
            g = wrap(g_before.clone() if seeded else torch.full_like(g_before, torch.nan))
            into = into_of(g, seeded)
            give(name, getattr(backend, method)(*(into if a is Ellipsis else a for a in args)))
            found[name + " G"], found[name + " S"] = g, into.sums
            if g._base is not None:
                around = g._base.clone()
                around[1:-1, 5:-6] = torch.nan
                assert around.isnan().all(), f"{name} wrote beside its slice of G"

        def give(name: str, value: object) -> None:
            if isinstance(value, Tensor):
                found[name] = value
            elif value is not None:
                for i, v in enumerate(value):
                    give(f"{name} {i}", v)

        def moments(name: str, columns: int) -> Tensor:
            found[name] = torch.full((2, columns), torch.nan, dtype=read.mean.dtype)
            return found[name]

        b = len(weight)
        give("conv", backend.bn_relu_conv1x1(x, read, weight, moments("conv moments", b)))
        give("conv alone", backend.bn_relu_conv1x1(x, read, weight, None))
        back = "bn_relu_conv1x1_backward"
        for name, batch in (("conv back", True), ("conv back frozen", False)):
            dy = behind(reads(self.behind, batch), *self.sums)
            into_g(name, back, dz.clone(), y, dy, weight, x, read, ..., True)
        into_g("conv back plain", back, dz, None, None, weight, x, read, ..., False)
        into_g("conv back first", back, dz, None, None, weight, x, read, ..., True, seeded=False)
        give("pool conv", backend.bn_relu_pool_conv1x1(x, read, weight, geometry))
        back = "bn_relu_pool_conv1x1_backward"
        for name, seeded in (("pool conv back", True), ("pool conv back first", False)):
            into_g(name, back, small, weight, x, read, geometry, ..., True, seeded=seeded)
        give("settle", backend.settle(wrap(g_before), x, share, None))
        give("settle unread", backend.settle(wrap(g_before), x, None, None))
        give("settle dropped", backend.settle(wrap(g_before), x, share, (self.keep, 1.25)))
        for relu in (True, False):
            give(f"norm {relu}", backend.bn_relu(x, read, relu))
            back = "bn_relu_backward"
            into_g(f"norm back {relu}", back, dx, x, read, relu, ..., seeded=relu)
        give("mean", backend.bn_relu_mean(x, read, geometry))
        back = "bn_relu_mean_backward"
        for name, seeded in (("mean back", True), ("mean back first", False)):
            into_g(name, back, per_image, x, read, geometry, ..., seeded=seeded)
        backend.statistics(x, moments("statistics", x.shape[1]))
        for layout in (torch.contiguous_format, torch.channels_last):
            images = geometry.images(x).contiguous(memory_format=layout)
            out = wrap(torch.zeros_like(g_before))
            backend.pack(images, out, geometry, moments(f"pack {layout}", x.shape[1]))
            give(f"packed {layout}", out)
        give("maxpool", backend.bn_relu_maxpool(x, read, geometry))
        winner = found["maxpool 1"]
        give("maxpool back", backend.bn_relu_maxpool_backward(pooled, winner, x, read, geometry))
        give("normalised", backend.normalised_(dx.clone(), x, behind(read, *self.credited)))
        return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def double():
    """Random inputs are drawn in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


@built
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_matches_the_reference(shape, count):
    inputs = Inputs(*shape)
    with threads(count):
        found = inputs.run(Native(), torch.float64, poisoned)
    expected = inputs.run(Reference(), torch.float64)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        torch.testing.assert_close(
            found[name],
            value,
            rtol=1e-12,
            atol=1e-12 * max(rms(value), 1),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@built
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_errs_no_more_than_the_reference(shape):
    inputs = Inputs(*shape)
    for name, value in vars(inputs).items():  # the same numbers in both precisions
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(inputs, name, value.float().double())
    for name in ("vectors", "behind", "sums"):
        setattr(inputs, name, [v.float().double() for v in getattr(inputs, name)])
    exact = inputs.run(Reference(), torch.float64)
    reference = inputs.run(Reference(), torch.float32)
    native = inputs.run(Native(), torch.float32, poisoned)
    for name, value in exact.items():
        if not value.is_floating_point():
            assert torch.equal(native[name], value), name
            continue
        # of a few numbers the reference's may happen to be exact
        luck = torch.finfo(torch.float32).eps * (0.25 + 4 / max(value.numel(), 1))
        allowed = 1.5 * rms(reference[name] - value) + luck * rms(value)
        error = rms(native[name] - value)
        assert error <= allowed, f"{name}: {error:.2e}, where {allowed:.2e} is allowed"


@built
@pytest.mark.parametrize("count", [1, 2, 3])
def test_repeats_bit_for_bit(count):
    inputs = Inputs((3, 12, 13), 77, 48)
    with threads(count):
        first, *others = (inputs.run(Native(), torch.float64) for _ in range(3))
    for other in others:
        for name, value in first.items():
            assert torch.equal(other[name], value), name


@built
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    """The same tests with the code for older processors, where this one has newer."""
    wanted = "test_float64_matches_the_reference or test_float32_errs"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", wanted, __file__],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@built
def test_nan_goes_where_the_reference_sends_it():
    inputs = Inputs((2, 6, 7), 20, 17)
    inputs.x[5, 3] = inputs.x[40, 19] = torch.nan
    inputs.x[50, 0] = torch.inf
    inputs.dz[7, 2] = inputs.g[8, 8] = inputs.pooled[3, 4] = torch.nan
    found = inputs.run(Native(), torch.float64)
    for name, value in inputs.run(Reference(), torch.float64).items():
        same = value.isfinite() == found[name].isfinite()
        # the reference's maxpool backward makes 0 * NaN of what is not a winner's
        assert same.all() or name.startswith("maxpool back"), name


@built
def test_last_nan_wins_the_maxpool():
    x = torch.zeros(9, 1)
    x[[1, 5]] = torch.nan
    read = reader_of(*(torch.ones(1) for _ in range(4)))
    out, winner = Native().bn_relu_maxpool(x, read, Geometry(1, 3, 3))
    expected = Reference().bn_relu_maxpool(x, read, Geometry(1, 3, 3))
    assert torch.equal(out.isnan(), expected[0].isnan()) and torch.equal(winner, expected[1])


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_take_the_reference(dtype):
    x, weight = torch.randn(30, 8).to(dtype), torch.randn(5, 8).to(dtype)
    read = reader_of(*(torch.randn(8).float() for _ in range(4)))
    results = []
    for backend in (Native(), Reference()):
        moments = torch.empty(2, 5, dtype=torch.float32)
        results.append((backend.bn_relu_conv1x1(x, read, weight, moments), moments))
    (found, mine), (expected, theirs) = results
    assert torch.equal(found, expected) and torch.equal(mine, theirs)


@built
def test_scratch_does_not_grow_with_rows():
    c, b = 64, 48
    vectors, weight = [torch.randn(c) for _ in range(4)], torch.randn(b, c)
    peaks = []
    for m in (2000, 16000):
        x, g, dz = torch.randn(m, c), torch.zeros(m, c), torch.randn(m, b)
        args = dz, None, None, weight, x, reader_of(*vectors), into_of(g), True
        peaks.append(peak_memory(lambda a=args: Native().bn_relu_conv1x1_backward(*a)).peak)
    assert peaks[0] == peaks[1]


@built
@pytest.mark.parametrize("count", [1, 2])
def test_small_networks_match_torchvision(count):
    for growth, config, initial, side, n in ((12, (2, 3), 10, 37, 3), (7, (1, 2, 2), 12, 64, 2)):
        expected = tv.models.DenseNet(growth, config, initial, num_classes=5)
        randomise(expected, torch.Generator().manual_seed(1))
        found = memdense.DenseNet(growth, config, initial, num_classes=5)
        x = torch.randn(n, 3, side, side)
        with threads(count), memdense.use_backend("native"):
            assert_same_step(*twins(expected, found), x)
            found.eval(), expected.eval()
            assert_same_step(found, expected, x)


# ---- the choice


@built
def test_native_is_the_default_where_it_is_built(monkeypatch):
    monkeypatch.delenv("MEMDENSE_BACKEND", raising=False)
    assert backend_for(CPU).name == "native"
    assert backend_for(torch.device("meta")).name == "reference"
    monkeypatch.setenv("MEMDENSE_BACKEND", "reference")
    assert backend_for(CPU).name == "reference"
    with memdense.use_backend("native"):
        assert backend_for(CPU).name == "native"
        with memdense.use_backend("reference"):
            assert backend_for(CPU).name == "reference"
        assert backend_for(CPU).name == "native"


def test_without_extension_the_reference_runs(monkeypatch):
    monkeypatch.delenv("MEMDENSE_BACKEND", raising=False)
    monkeypatch.setattr(_extension, "available", lambda: False)
    monkeypatch.setattr(_extension, "reason", lambda: "no compiler")
    assert backend_for(CPU).name == "reference"
    with (
        pytest.raises(RuntimeError, match="not available: no compiler"),
        memdense.use_backend("native"),
    ):
        pass


def test_unknown_backend(monkeypatch):
    with (
        pytest.raises(ValueError, match="reference, native, triton, got 'fast'"),
        memdense.use_backend("fast"),
    ):
        pass
    monkeypatch.setenv("MEMDENSE_BACKEND", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        backend_for(CPU)


def test_choice_is_the_thread_s_own():
    names = []
    with memdense.use_backend("reference"):
        other = threading.Thread(target=lambda: names.append(backend_for(CPU).name))
        other.start()
        other.join()
    assert names == ["native" if _extension.available() else "reference"]


@built
def test_choice_holds_in_backward(monkeypatch):
    calls = []
    original = Native.bn_relu_conv1x1_backward
    monkeypatch.setattr(
        Native, "bn_relu_conv1x1_backward", lambda *a: calls.append(1) or original(*a)
    )
    model = memdense.DenseNet(4, (2,), 6, num_classes=3)
    for name, expected in (("reference", 0), ("native", 2)):
        calls.clear()
        with memdense.use_backend(name):
            model(torch.randn(2, 3, 32, 32)).sum().backward()
        assert len(calls) == expected
