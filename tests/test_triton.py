"""The Triton kernels without a product against the reference, in the interpreter or on a GPU."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from exactness import into_of, reader_of
from inputs import Inputs, assert_errs_no_more, poisoned
from torch import Tensor

pytest.importorskip("triton")

from memdense.backends import Reference
from memdense.backends.triton import Triton, launch, pools, reduce, running, statistics, tiles
from memdense.backends.triton.cast import _table, cast
from memdense.backends.triton.launch import INTERPRETED, recorded
from memdense.buffers import Geometry, NormGradient, Reader, Share, Sums

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.gpu
    if torch.cuda.is_available()
    else pytest.mark.skipif(not INTERPRETED, reason="neither a GPU nor the interpreter"),
]
# (N, H, W) or (N, D, H, W), C, B; small: the interpreter runs a program a channel to merge. More
# than one tile of rows, of columns, of lines; odd sizes
SHAPES = [
    ((1, 1, 1), 1, 1),
    ((2, 1, 3), 3, 7),
    ((3, 7, 5), 12, 8),
    ((2, 6, 8), 20, 7),
    ((2, 14, 15), 7, 12),
    ((1, 11, 14), 96, 16),
    ((2, 3, 5, 4), 12, 7),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def padded(values: Tensor) -> Tensor:
    """The same matrix as a prefix of one whose rows are longer, as X's and G's are on a GPU."""
    m, c = values.shape
    buffer = torch.full((m, -(-c // 16) * 16 + 16), torch.nan, dtype=values.dtype)
    buffer[:, :c] = values
    return buffer[:, :c]


@pytest.fixture(autouse=True)
def double():
    """Random inputs are drawn in float64, on the device."""
    torch.set_default_dtype(torch.float64)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield
    torch.set_default_dtype(torch.float32)


def vectors(c: int) -> Reader:
    return reader_of(*(torch.randn(c).float() for _ in range(3)), torch.rand(c).float() + 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errs_no_more_than_the_reference(shape, dtype):
    # several draws where channels are few: a handful of errors says little
    draws = [Inputs(*shape, dtype) for _ in range(6 if shape[1] < 16 else 1)]
    # slices with a G of 16 bits, prefixes with one of 32
    wide = shape[1] % 2 == 0

    def run(*arguments, **options) -> dict[str, torch.Tensor]:
        results = [inputs.run(*arguments, convolutions=False, **options) for inputs in draws]
        return {name: torch.cat([r[name] for r in results], -1) for name in results[0]}

    exact = run(Reference(), torch.float64)
    reference = run(Reference(), dtype, wide=wide)
    found = run(Triton(), dtype, padded if wide else poisoned, wide=wide)
    if len(shape[0]) == 4 and dtype == torch.bfloat16:
        # maxima of planes are compared as they are stored, and tie, as PyTorch's do
        exact = {name: value for name, value in exact.items() if "maxpool" not in name}
    assert_errs_no_more(found, reference, exact)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("wrap", [padded, poisoned])
def test_every_kind_of_gradient_buffer(wrap, wide):
    inputs = Inputs((2, 5, 6), 12, 8, torch.bfloat16)
    exact = inputs.run(Reference(), torch.float64, convolutions=False)
    reference = inputs.run(Reference(), torch.bfloat16, convolutions=False, wide=wide)
    found = inputs.run(Triton(), torch.bfloat16, wrap, convolutions=False, wide=wide)
    assert_errs_no_more(found, reference, exact)


def test_repeats_bit_for_bit():
    inputs = Inputs((2, 6, 5), 20, 8, torch.float16)
    first, second = (inputs.run(Triton(), torch.float16, convolutions=False) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_what_stands_beside_a_gradient_stays():
    """G's padding, whatever those of x and of the gradient that comes in hold; a weight's is 0."""
    c, read, t = 12, vectors(12), Triton()
    x, d, dz = (padded(torch.randn(64, n).half()) for n in (c, c, 16))
    (weight,) = cast([torch.randn(16, c).float()], torch.float16)
    for run in (
        lambda into: t.bn_relu_backward(d, x, read, True, into),
        lambda into: t.bn_relu_conv1x1_backward(dz, None, None, weight, x, read, into, True),
    ):
        g = padded(torch.randn(64, c).half())
        g._base[:, c:] = 5
        run(into_of(g))
        assert (g._base[:, c:] == 5).all()


def test_nan_goes_where_the_reference_sends_it():
    inputs = Inputs((2, 6, 7), 20, 17, torch.float32)
    inputs.x[5, 3] = inputs.x[40, 19] = torch.nan
    inputs.x[50, 0] = torch.inf
    inputs.g[8, 8] = inputs.pooled[3, 4] = inputs.dx[9, 9] = torch.nan
    found = inputs.run(Triton(), torch.float32, convolutions=False)
    for name, value in inputs.run(Reference(), torch.float32, convolutions=False).items():
        same = value.isfinite() == found[name].isfinite()
        assert same.all(), name


def test_first_maximum_and_last_nan_win_the_maxpool():
    x = torch.randint(-1, 3, (2 * 7 * 9, 3)).float()  # many equal, many below 0
    x[torch.rand(x.shape) > 0.9] = torch.nan
    read = reader_of(*(torch.ones(3).float() for _ in range(4)))
    found = Triton().bn_relu_maxpool(x, read, Geometry(2, 7, 9))
    expected = Reference().bn_relu_maxpool(x, read, Geometry(2, 7, 9))
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0].nan_to_num(-1), expected[0].nan_to_num(-1))


@pytest.mark.parametrize("size", [(2, 21, 10), (1, 6, 5), (1, 18, 1), (1, 3, 140)], ids=str)
def test_maxpool_walks_down_several_lines(size, monkeypatch):
    """As a program does where there are many; also where a line has more windows than it takes."""
    monkeypatch.setattr(pools, "BUSY", 0)
    for plans in (pools._strips, pools._maxpool_plan, pools._maxpool_gradient_plan):
        monkeypatch.setattr(pools, plans.__name__, plans.__wrapped__)
    geometry, c = Geometry(*size), 3
    x, read = torch.randn(geometry.rows, c).float(), vectors(c)
    with recorded() as launches:
        out, winner = Triton().bn_relu_maxpool(x, read, geometry)
        dout = torch.randn(out.shape).float()
        sums = Triton().bn_relu_maxpool_sums(dout, winner, x, read, geometry)
        dx, behind = torch.empty_like(x), NormGradient(read, sums, geometry.rows)
        Triton().bn_relu_maxpool_backward(dout, winner, x, behind, geometry, dx)
    stem = pools.maxpool, pools.maxpool_gradient
    walks = [launch.plan.constants[2] for launch in launches if launch.plan.kernel in stem]
    assert walks == 3 * [pools.WALK_LINES]
    expected, places = Reference().bn_relu_maxpool(x, read, geometry)
    torch.testing.assert_close(out, expected)
    assert torch.equal(winner, places)
    both = Reference().bn_relu_maxpool_sums(dout, winner, x, read, geometry)
    torch.testing.assert_close(sums, both, rtol=1e-5, atol=1e-5)
    expected = torch.empty_like(x)
    Reference().bn_relu_maxpool_backward(dout, winner, x, behind, geometry, expected)
    torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (3, 5, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packs_images_of_any_strides(dtype, shape):
    n, c, h, w = shape
    wide = torch.randn(n + 1, c + 2, 2 * h, w + 3).to(dtype)
    sources = {
        "contiguous": wide[:n, :c, :h, :w].contiguous(),
        "channels last": wide[:n, :c, :h, :w].contiguous(memory_format=torch.channels_last),
        "slice": wide[1:, 1 : c + 1, ::2, 2 : w + 2],
        "channels first of all": wide[:n, :c, :h, :w].transpose(0, 1).contiguous().transpose(0, 1),
        "turned": wide[:n, :c, :w, :h].transpose(2, 3),
        "one image for all": wide[:1, :c, :h, :w].expand(n, -1, -1, -1),
        "one pixel for all": wide[:n, :c, :1, :1].expand(-1, -1, h, w),
    }
    for name, x in sources.items():
        assert x.shape == (n, c, h, w)
        out = poisoned(torch.full((n * h * w, c), torch.nan, dtype=dtype))
        moments = poisoned(torch.full((2, c), torch.nan, dtype=torch.float32))
        with recorded() as launches:
            Triton().pack(x, out, Geometry(n, h, w), moments)
        assert len(launches) == 2
        rows = x.permute(0, 2, 3, 1).reshape(-1, c)
        assert torch.equal(out, rows), name
        around = out._base.clone()
        around[1:-1, 5:-6] = torch.nan
        assert around.isnan().all(), name
        var, mean = torch.var_mean(rows.double(), 0, correction=0)
        expected = torch.stack((mean, var)).float()
        torch.testing.assert_close(moments, expected, rtol=1e-6, atol=1e-7)


def test_mean_of_many_channels():
    """More than a program has."""
    x, read, geometry = torch.randn(6, 150).float(), vectors(150), Geometry(2, 1, 3)
    found, expected = (b.bn_relu_mean(x, read, geometry) for b in (Triton(), Reference()))
    torch.testing.assert_close(found, expected)


def test_merges_more_tiles_than_are_read_at_once():
    n, read = 1100, vectors(2)
    partial = torch.rand(2, 2, n).float()
    moments = torch.empty(2, 2, dtype=torch.float32)
    reduce.merge(partial, moments, 4 * n - 1, 4)
    count = torch.full((n,), 4.0)
    count[-1] = 3
    mean, m2 = partial.double()
    total = (mean * count).sum(1) / count.sum()
    var = (m2.sum(1) + (count * (mean - total[:, None]) ** 2).sum(1)) / count.sum()
    torch.testing.assert_close(moments, torch.stack((total, var)).float())
    sums, _ = reduce.merge_sums(partial, read, None)
    torch.testing.assert_close(torch.stack(tuple(sums)), partial.double().sum(-1).float())


@pytest.mark.parametrize("rows", [1, 17000, 40000, 10**6])
def test_every_walker_has_rows(rows):
    walk = tiles.walk(rows, 64)
    assert (walk.walkers - 1) * walk.share < rows <= walk.walkers * walk.share


@pytest.mark.parametrize("walkers", [None, 1])
def test_statistics_far_from_zero(walkers, monkeypatch):
    """mean/std of 1e3: E[x^2] - E[x]^2 would keep no digit. By one program for all rows, too."""
    if walkers:
        monkeypatch.setattr(tiles, "WALKERS", walkers)
        monkeypatch.setattr(statistics, "_plan", statistics._plan.__wrapped__)
    x = (1000 + torch.randn(700, 3)).float()
    moments = torch.empty(2, 3, dtype=torch.float32)
    Triton().statistics(x, moments)
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    torch.testing.assert_close(moments.double(), torch.stack((mean, var)), rtol=1e-5, atol=0)


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")
def test_reads_nothing_behind_its_memory():
    """tests/guarded.py, where that ends the process."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", Path(__file__).with_name("guarded.py")],
        env=os.environ | {"PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---- running statistics


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moves_running_statistics_in_one_launch(dtype, counted):
    """Every momentum, more channels than a program takes at a time, columns anywhere in a table."""
    sizes, starts = [7, 1, 1030, 16], [3, 0, 20, 4]
    momenta = [0.1, -1.0, 0.7, 0.1] if counted else [0.1, 0.0, 1.0, 0.1]
    rows, table = 10, torch.full((2, 1060), torch.nan).float()
    for size, start in zip(sizes, starts, strict=True):
        table[:, start : start + size] = torch.rand(2, size).float()

    def buffers():
        generator = torch.Generator(table.device).manual_seed(1)
        draw = [torch.rand(2, n, generator=generator, device=table.device) for n in sizes]
        counts = [torch.tensor(i * 3) for i in range(4)] if counted else []
        return [d[0].to(dtype) for d in draw], [d[1].to(dtype) for d in draw], counts

    means, variances, counts = buffers()
    with recorded() as launches:
        Triton().update_running(means, variances, counts, table, starts, momenta, rows)
    assert len(launches) == 1
    exact = buffers()
    for i, (size, start) in enumerate(zip(sizes, starts, strict=True)):
        m = momenta[i] if momenta[i] >= 0 else 1 / (i * 3 + 1)
        batch = table[:, start : start + size].double()
        for found, old, new in (
            (means[i], exact[0][i], batch[0]),
            (variances[i], exact[1][i], batch[1] * rows / (rows - 1)),
        ):
            wanted = (1 - m) * old.double() + m * new
            # to the nearest; of a tenth of a unit's multiples many are ties, which float64's last
            # bit decides, and 16-bit values are rounded to float32 first
            about = torch.finfo(dtype)
            unit = torch.ldexp(torch.full_like(wanted, about.eps), torch.frexp(wanted)[1] - 1)
            unit = unit.clamp(min=about.eps * about.smallest_normal)
            error = (found.double() - wanted).abs()
            assert (error <= 0.5 * (1 + 2**-12) * unit).all(), (i, size)
        assert not counted or counts[i] == i * 3 + 1


def test_autograd_hears_of_counts_only():
    """As of a BatchNorm: its plain form may have saved mean and var, which it reads in evaluation
    only.
    """
    mean, var, count = torch.rand(3).float(), torch.rand(3).float(), torch.tensor(0)
    arguments = [mean], [var], [count], torch.rand(2, 3).float(), [0], [0.1], 5
    with recorded() as launches:
        Triton().update_running(*arguments)
    assert len(launches) == 1 and [t._version for t in (mean, var, count)] == [0, 0, 1]
    with torch.inference_mode():
        Triton().update_running([mean.clone()], *arguments[1:])


def test_running_statistics_elsewhere():
    """Counts that stayed on the CPU, and one count for two norms, are PyTorch's business."""
    a, b, table = torch.rand(2, 3).float(), torch.rand(2, 3).float(), torch.rand(2, 6).float()
    counts = [torch.tensor(0), torch.tensor(0)]
    cases = {
        "here": (True, [*a], [*b], counts),
        "a count on meta": (False, [*a], [*b], [counts[0], counts[1].to("meta")]),
        "a mean on meta": (False, [a[0], a[1].to("meta")], [*b], counts),
        "one count for two": (False, [*a], [*b], [counts[0]] * 2),
        "32-bit counts": (False, [*a], [*b], [counts[0], counts[1].int()]),
        "two dtypes": (False, [*a], [b[0], b[1].half()], counts),
        "every other value": (False, [*a], [b[0], torch.ones(6).float()[::2]], counts),
        "float64": (False, [*a.double()], [*b.double()], counts),
    }
    for name, (taken, *buffers) in cases.items():
        assert running.update(*buffers, table, [0, 3], [0.1, 0.1], 5) == taken, name
    for other in (table.double(), table.t().contiguous().t()):
        assert not running.update([*a], [*b], counts, other, [0, 3], [0.1, 0.1], 5)
    # in the memory of the first ones, which were taken
    again = [a[0], a[1].as_strided((3,), (0,))]
    assert not running.update(again, [*b], counts, table, [0, 3], [0.1, 0.1], 5)
    assert counts == [1, 1]


def test_running_statistics_that_go_to_the_reference():
    """float64, and one norm that a stage runs twice."""
    for dtype, twice in ((torch.float64, False), (torch.float32, True)):
        found = []
        for backend in (Triton(), Reference()):
            mean, var, count = torch.zeros(3).to(dtype), torch.ones(3).to(dtype), torch.tensor(0)
            table = torch.arange(12.0).view(2, 6).to(dtype)
            each = 1 + twice
            with recorded() as launches:
                backend.update_running(
                    [mean] * each, [var] * each, [count] * each, table, [0, 3][:each],
                    [0.5] * each, 5,
                )  # fmt: skip
            assert not launches
            found.append((mean, var, count))
        assert all(map(torch.equal, *found)) and found[0][2] == 1 + twice
        mean = torch.zeros(3).to(dtype)
        for start in (0, 3)[:each]:
            mean = 0.5 * mean + 0.5 * table[0, start : start + 3]
        assert torch.equal(found[0][0], mean)


# ---- weights


def weights_of_a_stage() -> list[Tensor]:
    return [
        torch.randn(5, 12).float(),
        torch.randn(7, 5, 3, 3).float(),
        torch.randn(16, 32).float(),
        torch.randn(4, 5, 3, 3).float().contiguous(memory_format=torch.channels_last),
        torch.randn(9, 20).half()[::2, 3:10],
        torch.randn(70, 91).bfloat16(),
        torch.randn(2, 3, 1, 5).half(),
    ]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casts_weights_in_one_launch(dtype, turned):
    weights = weights_of_a_stage()
    with recorded() as launches:
        found = cast(weights, dtype, turned)
    assert len(launches) == 1
    for w, mine in zip(weights, found, strict=True):
        assert torch.equal(mine, w.to(dtype)) and mine.dtype == dtype
        if w.dtype == dtype and w.dim() == 4:
            assert mine is w
        elif w.dim() == 4:
            # k innermost or C
            inner = mine.permute(1, 2, 3, 0) if turned else mine.permute(0, 2, 3, 1)
            assert inner.is_contiguous()
        else:
            assert mine.stride() == (-(-w.shape[1] // 16) * 16, 1)
            rows = mine.as_strided((len(mine), mine.stride(0)), mine.stride())
            assert (rows[:, w.shape[1] :] == 0).all()
        assert mine is w or not mine.storage_offset() % 16
    with recorded() as launches:
        again = cast([found[1], found[2]], dtype, turned)
    assert not launches and again[0] is found[1] and again[1] is found[2]


def test_cast_follows_weights():
    """Values come from where the weights are now: after an update in place, and in new memory."""
    weights = weights_of_a_stage()[:2]
    built = _table.cache_info().misses
    for _ in range(3):
        weights[0].add_(1)
        found = Triton().cast(weights, torch.float16)
        assert torch.equal(found[0], weights[0].half())
    assert _table.cache_info().misses == built + 1
    weights[0] = weights[0] + 1
    assert torch.equal(Triton().cast(weights, torch.float16)[0], weights[0].half())
    # the same memory, seen differently
    weights[1] = weights[1].as_strided((5, 7, 3, 3), (9, 45, 1, 3))
    assert torch.equal(Triton().cast(weights, torch.float16)[1], weights[1].half())


def test_tables_outlive_what_reads_them(monkeypatch):
    """Caches may drop them: the allocator is told of streams that read, and graphs keep them."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(launch, "_captured", {})
    table = mock.Mock(is_cuda=True, device="cuda:1")
    for capturing, kept in ((False, []), (True, [table])):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        launch.keep_while_read(table)
        table.record_stream.assert_called_once_with("stream of cuda:1")
        assert list(launch._captured.values()) == kept


def test_tables_are_kept_by_who_reads_them(monkeypatch):
    """New ones, and those that a cache had."""
    kept, weights = [], weights_of_a_stage()
    for module in (launch, running):
        monkeypatch.setattr(module, "keep_while_read", kept.append)
    buffers = [torch.rand(3).float()], [torch.rand(3).float()], [torch.tensor(0)]
    for count in (1, 2):
        cast(weights, torch.float16)
        assert len(kept) == 2 * count - 1
        assert running.update(*buffers, torch.rand(2, 3).float(), [0], [0.1], 5)
        assert len(kept) == 2 * count
    assert kept[0] is kept[2] and kept[1] is kept[3]


def test_tables_are_made_apart(monkeypatch):
    """What a thread allocates while torch.compile warms a CUDA graph up, it takes for the graph's;
    caches keep tables for longer.
    """
    makers, tensor = [], torch.tensor

    def make(*args, **kwargs):
        makers.append(threading.get_ident())
        return tensor(*args, **kwargs)

    weights, counts = weights_of_a_stage(), [torch.tensor(0)]
    _table.cache_clear()
    running._table.cache_clear()
    monkeypatch.setattr(torch, "tensor", make)
    cast(weights, torch.float16)
    running.update(
        [torch.rand(3).float()], [torch.rand(3).float()], counts, torch.rand(2, 3).float(), [0],
        [0.1], 5,
    )  # fmt: skip
    assert len(makers) == 2 and threading.get_ident() not in makers


# ---- launches


def test_launches():
    m, c, geometry, t = 60, 16, Geometry(2, 5, 6), Triton()
    x, read, g = torch.randn(m, c).half(), vectors(c), torch.randn(m, c).half()
    weight, small = torch.randn(8, c).half(), torch.randn(12, 8).half()
    moments = torch.empty(2, c, dtype=torch.float32)
    share, keep = Share(moments, moments[0], m), (torch.rand(m, c) > 0.5, 2.0)
    images, per_image = geometry.images(x), torch.randn(2, c).half()
    pooled = torch.randn(18, c).half()
    winner = torch.zeros(18, c, dtype=torch.uint8)
    behind = NormGradient(read, Sums(moments[0], moments[1]), m)
    pool_back = t.bn_relu_pool_conv1x1_backward
    wanted = {
        "statistics": (lambda: t.statistics(x, moments), 2),
        "pack": (lambda: t.pack(images, x, geometry, moments), 2),
        "pack alone": (lambda: t.pack(images, x, geometry, None), 1),
        "settle": (lambda: t.settle(g, x, share, keep), 1),
        "norm": (lambda: t.bn_relu(x, read, True), 1),
        "norm back": (lambda: t.bn_relu_backward(g, x, read, True, into_of(g)), 2),
        "mean": (lambda: t.bn_relu_mean(x, read, geometry), 1),
        "mean back": (
            lambda: t.bn_relu_mean_backward(per_image, x, read, geometry, into_of(g)), 2
        ),
        "pool conv": (lambda: t.bn_relu_pool_conv1x1(x, read, weight, geometry), 1),
        "pool conv back": (
            lambda: pool_back(small, weight, x, read, geometry, into_of(g), True), 3
        ),
        "maxpool": (lambda: t.bn_relu_maxpool(x, read, geometry), 1),
        "maxpool back": (
            lambda: t.bn_relu_maxpool_backward(pooled, winner, x, behind, geometry, x), 1
        ),
        "maxpool sums": (lambda: t.bn_relu_maxpool_sums(pooled, winner, x, read, geometry), 2),
    }  # fmt: skip
    for name, (run, count) in wanted.items():
        with recorded(dry=True) as launches:
            run()
        assert len(launches) == count, name
        with recorded(dry=True) as again:
            run()
        # a replay finds its plans
        assert all(a.plan is b.plan for a, b in zip(launches, again, strict=True)), name


def test_what_the_kernels_do_not_take_goes_to_the_reference():
    inputs = Inputs((1, 3, 4), 4, 8)
    with recorded() as launches:
        found = inputs.run(Triton(), torch.float64)
    assert not launches
    for name, value in inputs.run(Reference(), torch.float64).items():
        assert torch.equal(found[name], value), name
