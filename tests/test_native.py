"""The C++ primitives against the reference's, and the choice between the two."""

import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from exactness import assert_same_step, into_of, randomise, reader_of, twins
from inputs import AMX, OLDER, SHAPES, Inputs, assert_errs_no_more, poisoned, rms

import memdense
from memdense import _extension
from memdense.backends import Native, Reference, backend_for
from memdense.buffers import Geometry
from memdense.memory import peak_memory

tv = pytest.importorskip("torchvision")
built = pytest.mark.skipif(not _extension.available(), reason=_extension.reason())
CPU = torch.device("cpu")


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
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["float32", "bfloat16", "bfloat16, G in float32"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errs_no_more_than_the_reference(shape, wide, dtype):
    # several draws where channels are few: a handful of errors says little
    draws = [Inputs(*shape, dtype) for _ in range(40 if shape[1] < 16 else 1)]

    def run(*arguments):
        results = [inputs.run(*arguments, wide=wide) for inputs in draws]
        return {name: torch.cat([r[name] for r in results], -1) for name in results[0]}

    exact = run(Reference(), torch.float64)
    reference = run(Reference(), dtype)
    if len(shape[0]) == 4 and dtype == torch.bfloat16:
        # maxima of planes are compared as they are stored, and tie, as PyTorch's do
        exact = {name: value for name, value in exact.items() if "maxpool" not in name}
    assert_errs_no_more(run(Native(), dtype, poisoned), reference, exact)


BANDS = [
    # (N, H, W) by 4 channels, the bytes of a band, a unit of lines, images and lines it then holds
    ((3, 7, 5), torch.float32, 1, 1, 1, 1),
    ((3, 7, 5), torch.float32, 159, 1, 1, 1),
    ((3, 7, 5), torch.bfloat16, 160, 1, 1, 2),
    ((3, 7, 5), torch.float64, 320, 1, 1, 2),
    ((3, 7, 5), torch.float32, 80, 2, 1, 2),
    ((3, 7, 5), torch.float32, 479, 2, 1, 4),
    ((3, 7, 5), torch.float32, 560, 2, 1, 7),
    ((3, 7, 5), torch.float32, 1119, 1, 1, 7),
    ((3, 7, 5), torch.float32, 1120, 1, 2, 7),
    # not three and one, six and one, six and two
    ((4, 7, 5), torch.float32, 1680, 1, 2, 7),
    ((3, 7, 5), torch.float32, 480, 1, 1, 4),
    ((3, 8, 5), torch.float32, 480, 2, 1, 4),
    ((2, 3, 7, 5), torch.float32, 1679, 1, 1, 2),
]


@pytest.mark.parametrize(("device", "limit"), [("cpu", "CPU_BAND_BYTES"), ("meta", "BAND_BYTES")])
@pytest.mark.parametrize(("size", "dtype", "most", "unit", "images", "lines"), BANDS, ids=str)
def test_bands_are_as_few_as_fit(
    size, dtype, most, unit, images, lines, device, limit, monkeypatch
):
    """In the accumulator's dtype, and equally long; a line, or a unit of them, at least."""
    monkeypatch.setattr(Reference, "CPU_BAND_BYTES", 3)
    monkeypatch.setattr(Reference, limit, most)
    geometry = Geometry(*size)
    x = torch.empty(geometry.rows, 4, dtype=dtype, device=device)
    assert list(Reference().image_bands(x, geometry, unit)) == [
        (slice(n, min(n + images, geometry.n)), slice(h, min(h + lines, geometry.lines)))
        for n in range(0, geometry.n, images)
        for h in range(0, geometry.lines, lines)
    ]
    rows = max(1, most // (4 * (8 if dtype == torch.float64 else 4)))
    rows = math.ceil(len(x) / math.ceil(len(x) / rows))
    assert list(Reference().row_bands(x)) == [
        slice(m, min(m + rows, len(x))) for m in range(0, len(x), rows)
    ]
    # a band of x beside one of twice as many columns, or of fewer
    assert list(Reference().row_bands(x[:, :2], 4)) == list(Reference().row_bands(x))
    assert list(Reference().row_bands(x, 2)) == list(Reference().row_bands(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
# beside an odd number of bfloat16 values oneDNN, on AMX, reads one more, and multiplies it by 0
@pytest.mark.parametrize("shape", [((2, 11, 5), 12, 8), ((3, 9, 4, 5), 12, 8)], ids=str)
def test_bands_change_no_value(shape, dtype, monkeypatch):
    """Of some lines, where the last band of an image has fewer, and of several images."""
    inputs = Inputs(*shape, dtype)
    size, channels, _ = shape
    line = math.prod(size[2:]) * channels * (8 if dtype == torch.float64 else 4)
    exact = inputs.run(Reference(), torch.float64)
    whole = inputs.run(Reference(), dtype)
    for lines in (1, 4, 2 * size[1]):
        monkeypatch.setattr(Reference, "CPU_BAND_BYTES", lines * line)
        found = inputs.run(Reference(), dtype, poisoned)
        if dtype != torch.float64:
            assert_errs_no_more(found, whole, exact)
            continue
        for name, value in exact.items():
            off = (found[name].double() - value.double()).abs().max()
            assert off <= 1e-12 * max(rms(value), 1), (lines, name)


def test_moments_of_bands_are_merged_in_float64(monkeypatch):
    """Of a row each, whose mean is the row and whose variance is 0."""
    x, moments = (1000 + torch.randn(500, 12)).float(), torch.empty(2, 12).float()
    monkeypatch.setattr(Reference, "CPU_BAND_BYTES", 1)
    Reference().statistics(x, moments)
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    assert torch.equal(moments, torch.stack((mean, var)).float())


def test_sums_have_memory_of_their_own():
    """A norm's gradients are kept, and written to, apart from each other."""
    x, read = torch.randn(6, 5), reader_of(*torch.rand(4, 5) + 1)
    for sums in Reference().bn_relu_backward(x, x, read, True, into_of(torch.zeros(6, 5))):
        assert sums.untyped_storage().nbytes() == 5 * 8


@built
@pytest.mark.parametrize("mean", [0, 10, 1000])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_statistics_of_packed_images(layout, mean):
    """No less exact than PyTorch's of the same images, whatever their memory format."""
    exact = mean + torch.randn(8, 16, 24, 20)
    x = exact.float().contiguous(memory_format=layout)
    out, moments = torch.empty(8 * 24 * 20, 16, dtype=torch.float32), torch.full((2, 16), torch.nan)
    moments = moments.float()
    Native().pack(x, out, Geometry(8, 24, 20), moments)
    assert torch.equal(out, x.permute(0, 2, 3, 1).reshape(-1, 16))
    expected = torch.var_mean(x.double(), (0, 2, 3), correction=0)[::-1]
    plain = torch.batch_norm_update_stats(x.contiguous(), None, None, 0.0)
    for found, theirs, value in zip(moments, plain, expected, strict=True):
        floor = 2**-24 * rms(value)  # of the result's own rounding
        assert rms(found - value) <= 1.5 * rms(theirs - value) + floor


@built
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_repeats_bit_for_bit(count, dtype):
    inputs = Inputs((3, 12, 13), 77, 48)
    with threads(count):
        first, *others = (inputs.run(Native(), dtype) for _ in range(3))
    for other in others:
        for name, value in first.items():
            assert torch.equal(other[name], value), name


@built
@pytest.mark.parametrize("capability", [*OLDER, *["avx512"] * AMX])
def test_other_instruction_sets(capability):
    """The same tests with the code for older processors, where this one has newer."""
    wanted = "test_float64_matches_the_reference or test_errs_no_more"
    if capability == "avx512":  # what bfloat16 is left with
        wanted = "bfloat16 and (test_errs_no_more or scratch)"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", wanted, __file__],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@built
@pytest.mark.parametrize("dtype", Native.dtypes, ids=str)
def test_nan_goes_where_the_reference_sends_it(dtype):
    inputs = Inputs((2, 6, 7), 20, 17, dtype)
    inputs.x[5, 3] = inputs.x[40, 19] = torch.nan
    inputs.x[50, 0] = torch.inf
    inputs.dz[7, 2] = inputs.g[8, 8] = inputs.pooled[3, 4] = torch.nan
    found = inputs.run(Native(), dtype)
    for name, value in inputs.run(Reference(), dtype).items():
        same = value.isfinite() == found[name].isfinite()
        assert same.all(), name


@built
def test_last_nan_wins_the_maxpool():
    x = torch.zeros(9, 1)
    x[[1, 5]] = torch.nan
    read = reader_of(*(torch.ones(1) for _ in range(4)))
    out, winner = Native().bn_relu_maxpool(x, read, Geometry(1, 3, 3))
    expected = Reference().bn_relu_maxpool(x, read, Geometry(1, 3, 3))
    assert torch.equal(out.isnan(), expected[0].isnan()) and torch.equal(winner, expected[1])


@built
def test_moments_in_bfloat16_are_of_what_is_stored():
    """Of few rows, whose roundings do not cancel."""
    geometry = Geometry(1, 2, 3)
    x, read = torch.randn(6, 20).bfloat16(), reader_of(*(torch.randn(20).float() for _ in range(4)))
    y, moments = torch.empty(6, 48).bfloat16(), torch.empty(2, 48).float()

    def of_what_is_stored(y):
        mean = y.double().mean(0)
        return torch.stack((mean, (y.double() - mean).square().mean(0))).float()

    stored = Native().bn_relu_conv1x1(x, read, torch.randn(48, 20).bfloat16(), moments)
    torch.testing.assert_close(moments, of_what_is_stored(stored))
    weight = torch.randn(48, 20, 3, 3).bfloat16()
    Native().bn_relu_conv3x3(x, read, weight, (1, 1), geometry, y, None, moments)
    torch.testing.assert_close(moments, of_what_is_stored(y))


@built
def test_every_nan_stays_one_in_bfloat16():
    """Rounded like a number, one with all bits set would become 0."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32)
    ones = torch.ones(33).float()
    read = reader_of(ones, bits.repeat(11).view(torch.float32), ones, ones)
    x = torch.ones(40, 33).bfloat16()
    assert Native().bn_relu(x, read, True).isnan().all()
    assert Native().bn_relu_mean(x, read, Geometry(2, 4, 5)).isnan().all()


@built
def test_float16_takes_the_reference():
    x, weight = torch.randn(30, 8).half(), torch.randn(5, 8).half()
    read = reader_of(*(torch.randn(8).float() for _ in range(4)))
    results = []
    for backend in (Native(), Reference()):
        moments = torch.empty(2, 5, dtype=torch.float32)
        results.append((backend.bn_relu_conv1x1(x, read, weight, moments), moments))
    (found, mine), (expected, theirs) = results
    assert torch.equal(found, expected) and torch.equal(mine, theirs)


@built
@pytest.mark.parametrize(
    "size", [(2, -2, -4), (0, 4, 4), (3, 4, 2), (1 << 32, 1 << 32, 16)], ids=str
)
def test_rows_that_are_no_images_are_refused(size):
    vectors = *(torch.ones(3) for _ in range(4)), 1e-5
    x, weight = torch.zeros(16, 3), torch.zeros(5, 3)
    with pytest.raises(RuntimeError, match=r"a matrix x of .* got 16 rows"):
        torch.ops.memdense.bn_relu_maxpool(x, *vectors, *size)
    with pytest.raises(RuntimeError, match=r"a matrix x of .* got 16 rows"):
        torch.ops.memdense.bn_relu_pool_conv1x1(x, *vectors, weight, *size)


REFUSED = {
    "sums in float32": "expected sums in Double, got Float",
    "expanded sums": "expected sums not to be expanded",
    "expanded g": r"expected g not to be expanded, got .* \(0, 1\)",
    "g of three axes": r"expected g of shape \(15, 3\), got \(3, 5, 3\)",
}


def norm_of_ones() -> tuple:
    return *(torch.ones(3) for _ in range(4)), 1e-5


@built
@pytest.mark.parametrize("wrong", REFUSED)
@pytest.mark.parametrize("name", ["conv1x1", "pool_conv1x1", "relu", "mean"])
def test_a_backward_that_refuses_writes_nothing(name, wrong):
    op, norm, x = torch.ops.memdense, norm_of_ones(), torch.ones(15, 3)
    weight, g, sums = torch.ones(5, 3), torch.ones(15, 3), torch.ones(2, 3)
    if wrong == "sums in float32":
        sums = sums.float()
    elif wrong == "expanded sums":
        sums = torch.ones(1, 3).expand(2, 3)
    elif wrong == "expanded g":
        g = torch.ones(1, 3).expand(15, 3)
    else:
        g = torch.ones(3, 5, 3)
    written = g, False, sums
    with pytest.raises(RuntimeError, match=REFUSED[wrong]):
        if name == "conv1x1":
            behind = *[None] * 4, 0, None, None
            op.bn_relu_conv1x1_backward(
                torch.ones(15, 5), *behind, weight, x, *norm, *written, True
            )
        elif name == "pool_conv1x1":
            images = 1, 5, 3
            dout = torch.ones(2, 5)
            op.bn_relu_pool_conv1x1_backward(dout, weight, x, *norm, *written, *images, True)
        elif name == "relu":
            op.bn_relu_backward(torch.ones(15, 3), x, *norm, True, *written)
        else:
            op.bn_relu_mean_backward(torch.ones(1, 3), x, *norm, *written)
    assert (g == 1).all() and (sums == 1).all()


@built
def test_without_an_output_all_is_looked_at():
    """An image of one line has no windows of two."""
    op, x = torch.ops.memdense, torch.ones(4, 3)
    norm = norm_of_ones()
    forward = (x, *norm, torch.ones(5, 3), 1, 1, 4)
    assert op.bn_relu_pool_conv1x1(*forward).shape == (0, 5)
    with pytest.raises(RuntimeError, match="expected mean to be a contiguous vector of 3"):
        op.bn_relu_pool_conv1x1(x, torch.ones(1), *forward[2:])
    with pytest.raises(RuntimeError, match=r"expected weight of shape \(5, 3\), got \(5, 4\)"):
        op.bn_relu_pool_conv1x1(*forward[:6], torch.ones(5, 4), 1, 1, 4)
    g = torch.full((4, 3), torch.nan)
    backward = op.bn_relu_pool_conv1x1_backward
    dbeta, dgamma, dweight = backward(
        torch.ones(0, 5), torch.ones(5, 3), x, *norm, g, False, None, 1, 1, 4, True
    )
    for found in (g, dbeta, dgamma, dweight):
        assert torch.equal(found, torch.zeros_like(found))


@built
def test_half_a_norm_behind_is_refused():
    ones = torch.ones(5)
    for behind in ((torch.ones(16, 5), None, ones, None), (None, None, None, ones)):
        y, mean, var, dbeta = behind
        with pytest.raises(RuntimeError, match="all of the norm behind, or none"):
            torch.ops.memdense.bn_relu_conv1x1_backward(
                torch.ones(16, 5), y, mean, var, None, 0, dbeta, dbeta, torch.ones(5, 3),
                torch.ones(16, 3), *norm_of_ones(), torch.ones(16, 3), False, None, True,
            )  # fmt: skip


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"expected a matrix x with at least one row .* got \(\)"),
        ({"weight": torch.zeros(())}, "expected weight in Double"),
        ({"x": torch.zeros(6, 0)}, r"at least one row and column, got \(6, 0\)"),
        ({"x": torch.zeros(6, 3).half()}, "expected x in Float, Double or BFloat16, got Half"),
        ({"mean": torch.zeros(3)}, "expected mean in Double, got Float"),
        (
            {"mean": torch.zeros(4).double()},
            r"mean to be a contiguous vector of 3, got Double \(4\)",
        ),
        ({"beta": torch.zeros(3)}, "expected beta in Double, got Float"),
        ({"x": torch.zeros(3, 6).double().t()}, r"column stride, got Double \(6, 3\) .* \(1, 6\)"),
        ({"moments": torch.zeros(2, 4)}, "expected moments in Double, got Float"),
        ({"moments": torch.zeros(3, 2).double()}, r"moments of shape \(2, 4\), got \(3, 2\)"),
    ],
)
def test_refuses(change, message):
    vectors = {"mean": torch.zeros(3), "var": torch.ones(3), "gamma": None, "beta": None}
    rest = {"eps": 1e-5, "weight": torch.zeros(4, 3), "moments": None}
    arguments = {"x": torch.zeros(6, 3)} | vectors | rest | change  # in Double: see `double`
    with pytest.raises(RuntimeError, match=message):
        torch.ops.memdense.bn_relu_conv1x1(*arguments.values())


@built
def test_a_mask_in_columns_takes_the_reference():
    g, x, keep = torch.randn(12, 4), torch.randn(12, 4), ((torch.rand(4, 12) < 0.5).t(), 2.0)
    found, expected = (backend.settle(g, x, None, keep) for backend in (Native(), Reference()))
    assert torch.equal(found, expected)


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


def test_backward_runs_where_forward_was_chosen_to(monkeypatch):
    """In another thread too, as autograd's own are for a GPU: stem, stages and the function."""

    def wrong(*_, **__):
        raise AssertionError("backward ran on another backend")

    for name in (
        "bn_relu_conv1x1_backward",
        "bn_relu_conv3x3_backward",
        "bn_relu_maxpool_sums",
        "bn_relu_maxpool_backward",
    ):
        monkeypatch.setattr(Native, name, wrong)
    model = memdense.DenseNet(4, (2, 2), 8, 2, 0, 3)
    x, conv = torch.randn(2, 3, 32, 32, requires_grad=True), torch.randn(5, 3, 1, 1)
    with memdense.use_backend("reference"):
        alone = memdense.functional.bn_relu_conv1x1(x, None, None, None, None, conv, training=True)
        outs = [model(x), alone]
    for out in outs:
        errors = []

        def run(out=out, errors=errors) -> None:
            try:
                out.sum().backward()
            except AssertionError as error:
                errors.append(error)

        other = threading.Thread(target=run)
        other.start()
        other.join()
        assert not errors


@built
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "dilation"),
    [
        ((4, 28, 28, 128, 32), (1, 1)),
        ((4, 28, 28, 128, 32), (4, 4)),  # with halves of tiles
        ((1, 14, 15, 256, 256), (1, 2)),  # sums that tasks share by channels
        ((1, 5, 40, 20, 12), (3, 1)),
        ((2, 1, 1, 8, 8), (1, 1)),
        ((3, 70, 66, 48, 12), (1, 1)),  # sums taken in groups
    ],
    ids=str,
)
def test_scratch_is_what_is_allocated(shape, dilation, dtype, count):
    n, h, w, c, k = shape
    op = torch.ops.memdense
    norm = torch.rand(4, c).float() + 0.5
    y, dz, dy, out = (torch.rand(n * h * w, columns).to(dtype) for columns in (c, c, k, k))
    weight, sums = torch.rand(k, c, 3, 3).to(dtype), norm[:2].clone()
    dweight = torch.empty(weight.shape, dtype=torch.float32)
    forward = y, *norm, 1e-5, weight, dilation, n, h, w, None, 1.0, out, None
    backward = dy, weight, dilation, y, *norm, 1e-5, n, h, w, dz, *sums, dweight
    narrow = dtype == torch.bfloat16
    with threads(count):
        for call, arguments, back in (
            (op.bn_relu_conv3x3, forward, False),
            (op.bn_relu_conv3x3_backward, backward, True),
        ):
            found = peak_memory(call, *arguments, device=CPU).peak
            assert found == op.conv3x3_scratch(n, h, w, c, k, dilation, count, narrow, back) > 0


@built
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("pooled", "size", "channels", "outputs"),
    [(False, (2, 14, 14), 96, 128), (False, (1, 1, 5), 600, 12), (True, (3, 9, 8), 33, 17)],
)
def test_scratch_of_a_1x1_is_what_is_allocated(pooled, size, channels, outputs, dtype, count):
    op = torch.ops.memdense
    rows = math.prod(size)
    products = Geometry(*size).halves.rows if pooled else rows
    norm = *(torch.rand(4, channels).float() + 0.5).unbind(), 1e-5
    x, dz = torch.rand(rows, channels).to(dtype), torch.rand(products, outputs).to(dtype)
    weight, g = torch.rand(outputs, channels).to(dtype), torch.rand(rows, channels).float()
    if pooled:
        forward = op.bn_relu_pool_conv1x1, x, *norm, weight, *size
        backward = (
            op.bn_relu_pool_conv1x1_backward, dz, weight, x, *norm, g, True, None, *size, True,
        )  # fmt: skip
    else:
        nothing = None, None, None, None, 0.0, None, None
        forward = op.bn_relu_conv1x1, x, *norm, weight, None
        backward = (
            op.bn_relu_conv1x1_backward, dz, *nothing, weight, x, *norm, g, True, None, True,
        )  # fmt: skip
    narrow = dtype == torch.bfloat16
    with threads(count):
        for call, back in ((forward, False), (backward, True)):
            results = call[0](*call[1:])
            made = results if back else [results]
            beside = sum(t.numel() * t.element_size() for t in made)
            found = peak_memory(*call, device=CPU).peak
            expected = op.conv1x1_scratch(products, channels, outputs, count, narrow, back)
            assert found == beside + expected


@built
def test_weight_of_another_dtype_is_refused():
    norm = *(torch.rand(4, 6).float() + 0.5).unbind(), 1e-5
    x, weight = torch.rand(9, 6).bfloat16(), torch.rand(5, 6).float()
    with pytest.raises(RuntimeError, match="expected weight in BFloat16, got Float"):
        torch.ops.memdense.bn_relu_conv1x1(x, *norm, weight, None)


@built
def test_scratch_of_what_is_no_layer():
    for wrong, message in (
        ((0, 1, 1, 1, 1, (1, 1), 1), "expected sizes and threads of at least 1"),
        ((1, 1, 1, 1, 1, (1, 0), 1), "expected dilation >= 1, got 1 and 0"),
        ((1, 1, 1, 1, 1, (1, 1), 0), "expected sizes and threads of at least 1"),
        ((2**40, 2**30, 8, 8, 8, (1, 1), 1), r"expected sizes and threads below 2\^31"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.memdense.conv3x3_scratch(*wrong, False, False)
    for wrong in ((0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)):
        with pytest.raises(RuntimeError, match="expected sizes and threads of at least 1"):
            torch.ops.memdense.conv1x1_scratch(*wrong, False, False)
    for wrong in ((2**48, 1, 1, 1), (1, 2**20, 1, 1), (1, 1, 2**20, 1), (1, 1, 1, 2**16)):
        with pytest.raises(
            RuntimeError, match=r"rows below 2\^48, channels below 2\^20 and threads"
        ):
            torch.ops.memdense.conv1x1_scratch(*wrong, False, False)
