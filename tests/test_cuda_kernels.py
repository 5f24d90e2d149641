"""The CUDA kernels without a GPU: run as plain C++ on an emulation, and read as compiled code.

tests/emulation says what the emulation catches. It shows that the kernels compute what they should,
not that a GPU runs them, and nothing about time.
"""

from __future__ import annotations

import os
import re
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
from cuda_conv3x3 import KINDS, LAYERS, Kind, Layer, check_plain, convolution
from emulated import FORWARD, GRADIENT, PLAIN, SHARED
from inputs import BACKWARD_REFUSALS, PLAIN_REFUSALS, REFUSALS, plain, second_half
from test_conv3x3 import CASES
from torch.library import opcheck

from memdense import _extension


def assert_same_bits(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_layer(emulation, shape, kind):
    """Values, and the same bits whichever thread comes first between two barriers."""
    number = LAYERS.index(shape) + KINDS.index(kind)
    dropout, aligned = number % 3 == 0, number % 2 == 0
    memory_format = (torch.contiguous_format, torch.channels_last)[number // 2 % 2]
    layer = Layer(shape, kind, "cpu", aligned)
    emulation.counters()
    found = layer.run(emulation.op, dropout, memory_format)
    assert emulation.counters()[0] == 5  # two forward, three backward
    layer.check(found, dropout)
    emulation.configure(order=1 + number)
    assert_same_bits(found, layer.run(emulation.op, dropout, memory_format))


@pytest.mark.parametrize("number", range(0, len(CASES), 2))
def test_plain(emulation, number):
    case = CASES[number].values[0]
    kind = KINDS[number // 2 % len(KINDS)]
    how = ("contiguous", "channels last", "slice")[number // 2 % 3]
    emulation.counters()
    check_plain(emulation.op, "cpu", case, kind, how)
    assert emulation.counters()[0] == 4  # one, one, and two for the weight


def test_strides_longer_than_the_kernel(emulation):
    """No line that a tile reads is another image's, or left out."""
    case = {"stride": (4, 5), "padding": (1, 1), "dilation": (1, 1)}
    for images in (1, 3):
        case |= {"x": (images, 16, 19, 23), "weight": (8, 16, 3, 3)}
        check_plain(emulation.op, "cpu", case, KINDS[0], "channels last")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("multiprocessors", "shared"),
    [(1, SHARED), (200, 227 * 1024), (2, 64 * 1024)],
    ids=["large tiles", "small tiles", "a weight that does not stay"],
)
def test_other_devices(emulation, kind, multiprocessors, shared):
    """What the number of multiprocessors and their memory decide: tiles, splits, weights."""
    emulation.configure(multiprocessors, shared)
    for shape in ((2, 14, 14, 128, 40, (1, 1)), (1, 9, 12, 72, 16, (2, 1))):
        layer = Layer(shape, kind, "cpu", True)
        layer.check(layer.run(emulation.op, False, torch.contiguous_format), False)


@pytest.mark.parametrize("kind", [Kind(torch.float32), Kind(torch.float32, True)], ids=str)
def test_long_sums_in_float32(emulation, kind):
    """25 000 pixels on one multiprocessor round no more than few do."""
    emulation.configure(1)
    layer = Layer((8, 56, 56, 48, 12, (2, 2)), kind, "cpu", True)
    layer.check(layer.run(emulation.op, False, torch.channels_last), False)


def test_many_partial_results(emulation):
    """More of a column than a warp has lanes, and of the weight's gradient than are in flight."""
    emulation.configure(132, 227 * 1024)
    for channels, growth, mode in ((16, 8, FORWARD), (8, 16, GRADIENT)):
        blocks, teams, *_ = emulation.planned(4, 32, 1, channels, growth, 2, mode)
        assert blocks * teams > 32
    splits, *_ = emulation.planned(4, 32, 1, 16, 8, 2)
    assert splits > 16
    layer = Layer((4, 32, 32, 16, 8, (1, 1)), KINDS[1], "cpu", True)
    layer.check(layer.run(emulation.op, False, torch.channels_last), False)


@pytest.mark.parametrize("size", [2, 4])
def test_long_sums_take_no_more_scratch(emulation, size):
    """Each split of them is a whole dW, of 9 MB here."""
    emulation.configure(132, 227 * 1024)
    splits, *_ = emulation.planned(256, 28, 1, 512, 512, size)
    assert splits <= 4


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 5])
def test_two_teams(emulation, kind, multiprocessors):
    """Blocks whose warps walk over tiles as two teams, the same bits whichever is ahead. Of 5
    multiprocessors' last shape there are 7 tiles for 8 teams.
    """
    emulation.configure(multiprocessors, 227 * 1024)
    shapes = (3, 14, 14, 64, 32, (1, 1)), (4, 17, 9, 40, 12, (1, 2)), (5, 9, 9, 40, 12, (1, 1))
    for shape in shapes:
        layer = Layer(shape, kind, "cpu", True)
        emulation.counters()
        found = layer.run(emulation.op, False, torch.channels_last)
        assert emulation.counters()[3] > 0, shape
        layer.check(found, False)
        for order in (1, 2, 3):
            emulation.configure(multiprocessors, 227 * 1024, order)
            assert_same_bits(found, layer.run(emulation.op, False, torch.channels_last))


def watched(raced, kind: Kind, without: int = -2) -> tuple[int, int, str]:
    """Accesses and races of layers in two teams and in one, with a weight that stays in shared
    memory and one that does not.
    """
    raced.watch_races(without)
    for number, (shape, multiprocessors, shared) in enumerate(
        [
            ((3, 14, 14, 64, 32, (1, 1)), 1, 227),
            ((5, 9, 9, 40, 12, (1, 1)), 5, 227),
            ((1, 9, 12, 72, 16, (2, 1)), 2, 64),
            ((1, 14, 14, 128, 40, (1, 1)), 2, 64),
        ]
    ):
        raced.configure(multiprocessors, shared * 1024, order=number)
        layer = Layer(shape, kind, "cpu", number % 2 == 0)
        layer.run(raced.op, number > 1, torch.channels_last)
    return raced.races()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_races(raced, kind):
    """Something orders any two threads that touch the same shared memory, if one of them writes."""
    accesses, races, first = watched(raced, kind)
    assert accesses > 1e6 and not races, first


@pytest.mark.parametrize("number", [-1, 0, 1, 2])
def test_races_without_a_barrier(raced, number):
    """A warp's, the block's, each team's: none is for nothing. That of their turns orders work."""
    _, races, first = watched(raced, KINDS[1], without=number)
    assert races and "by thread" in first


@pytest.mark.parametrize(("multiprocessors", "shared"), [(132, 227), (108, 163), (82, 99)])
def test_plans(emulation, multiprocessors, shared):
    """No more shared memory than there is, a tile for each block, and both numbers of teams."""
    emulation.configure(multiprocessors, shared * 1024)
    teams = set()
    for mode, size, growth in product((FORWARD, GRADIENT), (2, 4), (12, 16, 32, 48, 64)):
        forward = mode == FORWARD
        channels, columns = (4 * growth, growth) if forward else (growth, 4 * growth)
        for side, dilation, n in product(
            (7, 8, 14, 24, 28, 40, 56), (1, 2, 4), (1, 8, 32, 96, 256)
        ):
            shape = n, side, dilation, channels, columns, size, mode
            blocks, found, tiles, used = emulation.planned(*shape)
            assert 0 < blocks <= tiles and 0 < used <= shared * 1024, shape
            teams.add(found)
            if forward:
                splits, found, tiles, used = emulation.planned(*shape[:-1])
                assert 0 < splits <= tiles and 0 < used <= shared * 1024, shape
                assert found == (2 if channels * size > 64 else 1), shape
    assert teams == {1, 2}
    # of so many channels the weight's bytes exceed 32 bits
    *_, used = emulation.planned(1, 8, 1, 7_500_000, 16, 2, PLAIN)
    assert 0 < used <= shared * 1024


def test_without_what_is_optional(emulation):
    """No gamma, beta, statistics and dweight; gamma and beta in the values' dtype."""
    kind = Kind(torch.bfloat16)
    layer = Layer((2, 5, 6, 24, 12, (1, 1)), kind, "cpu", True)
    size = 2, 5, 6
    out, dz, dbeta, dgamma = layer.empty(12), layer.empty(24), torch.zeros(24), torch.zeros(24)
    layer.gamma, layer.beta = torch.ones(24), torch.zeros(24)
    expected = layer.run(emulation.op, False, torch.contiguous_format)
    for gamma, beta in ((None, None), (layer.gamma.bfloat16(), layer.beta.bfloat16())):
        emulation.counters()
        emulation.op.bn_relu_conv3x3(
            layer.y, layer.mean, layer.var, gamma, beta, layer.eps, layer.weight, (1, 1), *size,
            None, 1.0, out, None,
        )  # fmt: skip
        assert emulation.counters()[0] == 1
        emulation.op.bn_relu_conv3x3_backward(
            layer.dy, layer.weight, (1, 1), layer.y, layer.mean, layer.var, gamma, beta, layer.eps,
            *size, dz, dbeta, dgamma, None,
        )  # fmt: skip
        assert emulation.counters()[0] == 2
        assert_same_bits([out, dz, dbeta, dgamma], [expected[0], *expected[3:6]])


def test_vectors_inside_others(emulation):
    """Moments in rows of any stride, sums with something behind."""
    layer = Layer((2, 5, 6, 22, 12, (1, 1)), Kind(torch.bfloat16), "cpu", True)
    forward, backward, expected = layer.arguments(False, torch.contiguous_format)
    emulation.op.bn_relu_conv3x3(*forward)
    emulation.op.bn_relu_conv3x3_backward(*backward)
    _, mean, var, _, dbeta, dgamma, _ = expected
    moments, *sums = (torch.full(size, 7.0) for size in ((2, 20), (32,), (32,)))
    emulation.op.bn_relu_conv3x3(*forward[:-2], moments[:, 3:15], forward[-1])
    inner = [t[:22] for t in sums]
    emulation.op.bn_relu_conv3x3_backward(*backward[:-5], *inner, *backward[-3:])
    assert_same_bits([*moments[:, 3:15], *inner], [mean, var, dbeta, dgamma])
    assert (moments == 7).sum() == 16 and all((t[22:] == 7).all() for t in sums)


def spread(t: torch.Tensor, channel: int, *gaps: int) -> torch.Tensor:
    """The same values, channels last: each this far from the next, and so many of NaN before all
    and behind each pixel, line and image.
    """
    n, c, h, w = t.shape
    before, pixel, line, image = gaps
    column = c * channel + pixel
    row = w * column + line
    whole = h * row + image
    memory = t.new_full((before + n * whole,), torch.nan)
    return memory.as_strided(t.shape, (whole, channel, row, column), before).copy_(t)


@pytest.mark.parametrize(
    ("channels", "layout"),
    [
        (16, (1, 4, 0, 0, 0)),
        (16, (1, 0, 4, 4, 0)),
        (16, (1, 0, 0, 4, 4)),
        (16, (1, 0, 0, 0, 4)),
        (16, (2, 0, 0, 0, 0)),
        (12, (1, 0, 4, 0, 0)),
    ],
    ids=["begins", "pixels", "lines", "images", "every second channel", "half a piece"],
)
def test_any_strides(emulation, channels, layout):
    """Each tensor by itself where 16-byte accesses would be unaligned or touch what is beside."""
    geometry = (1, 1), (1, 1), (1, 1)
    dtype, packed = torch.float16, (1, 0, 0, 0, 0)
    x, dy, weight = (
        torch.randint(-2, 3, (n, channels, *size)).to(dtype)
        for n, size in ((2, (3, 7)), (2, (3, 7)), (channels, (3, 3)))
    )
    zero = torch.zeros(channels, dtype=torch.float64)
    exact = convolution(*(t.double() for t in (x, weight)), zero, dy.double(), geometry)
    tensors = {"x": x, "weight": weight, "dy": dy}
    tensors |= {"out": torch.full_like(dy, torch.nan), "dx": torch.full_like(x, torch.nan)}
    for odd in tensors:
        given = {k: spread(t, *(layout if k == odd else packed)) for k, t in tensors.items()}
        x, weight, dy, out, dx = given.values()
        emulation.op.conv3x3(x, weight, None, *geometry, out)
        emulation.op.conv3x3_input_gradient(dy, weight, *geometry, dx)
        found = out, dx, emulation.op.conv3x3_weight_gradient(dy, x, *geometry)
        for a, b in zip(found, exact, strict=True):
            assert torch.equal(a.double(), b), odd
        for view in (out, dx):
            assert view._base.isnan().sum() == view._base.numel() - view.numel(), odd


@pytest.mark.parametrize("dropout", [False, True])
def test_nan_passes_like_relu(emulation, dropout):
    """Dropout multiplies."""
    layer = Layer((1, 6, 6, 24, 16, (1, 1)), Kind(torch.float32), "cpu", True)
    layer.y[14, 3] = torch.nan
    found = layer.run(emulation.op, dropout, torch.contiguous_format)
    expected = layer.reference(dropout)
    assert torch.equal(found[0].isnan(), expected[0].isnan())
    assert 0 < found[0].isnan().sum() < found[0].numel()
    assert torch.equal(found[5].isnan(), expected[3].isnan())
    assert found[5].isnan().nonzero().tolist() == [[3]]


def test_large_mean_does_not_cancel(emulation):
    """Statistics of outputs that are far from 0: out = 1000 + a little."""
    layer = Layer((2, 16, 16, 16, 8, (1, 1)), Kind(torch.float32), "cpu", True)
    layer.weight.zero_()
    layer.weight[:, 0, 1, 1] = 1
    layer.beta.fill_(1000)
    layer.gamma.fill_(0.1)
    out, mean, var, *_ = layer.run(emulation.op, False, torch.contiguous_format)
    exact = out.double()
    assert ((mean - exact.mean(0)).abs() <= 1e-6 * exact.mean(0)).all()
    assert ((var / exact.var(0, correction=0) - 1).abs() <= 1e-3).all()


def test_empty_batch(emulation):
    op, geometry = emulation.op, ((1, 1), (1, 1), (1, 1))
    x, dy, weight = torch.randn(0, 3, 8, 8), torch.randn(0, 4, 8, 8), torch.randn(4, 3, 3, 3)
    op.conv3x3(x, weight, None, *geometry, dy)
    op.conv3x3_input_gradient(dy, weight, *geometry, x)
    dweight = op.conv3x3_weight_gradient(dy, x, *geometry)
    assert torch.equal(dweight, torch.zeros(4, 3, 3, 3))


def test_banks_of_shared_memory(emulation):
    """Eight rows of a matrix lie in different banks, also where a tile's lines end among them."""
    for size in (7, 14, 28, 56):
        case = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
        case |= {"x": (98 // size, 32, size, size), "weight": (32, 32, 3, 3)}
        emulation.counters()
        check_plain(emulation.op, "cpu", case, Kind(torch.float16), "channels last")
        _, reads, cycles, _ = emulation.counters()
        assert reads <= cycles <= 1.1 * reads, size


def test_registration(emulation):
    """Schemas say what is written, and tracing works."""
    layer = Layer((1, 5, 4, 8, 6, (1, 1)), Kind(torch.float32), "cpu", True)
    vectors = layer.mean, layer.var, layer.gamma, layer.beta, layer.eps
    out, dz = torch.zeros(20, 6), torch.zeros(20, 8)
    opcheck(
        emulation.op.bn_relu_conv3x3.default,
        (layer.y, *vectors, layer.weight, (1, 1), 1, 5, 4, layer.keep, 2.0, out,
         torch.zeros(2, 6)),
    )  # fmt: skip
    opcheck(
        emulation.op.bn_relu_conv3x3_backward.default,
        (layer.dy, layer.weight, (1, 1), layer.y, *vectors, 1, 5, 4, dz, torch.zeros(8),
         torch.zeros(8), torch.zeros(6, 8, 3, 3)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *REFUSALS,
        ({"y": torch.zeros(20, 5).double()}, "expected float16, bfloat16 or float32 images"),
        ({"var": torch.zeros(5).half()}, "expected var in Float, got Half"),
        ({"gamma": torch.zeros(5).half()}, "expected gamma in Float, got Half"),
        ({"weight": torch.zeros(6, 5, 3, 3).half()}, "expected weight in Float, got Half"),
        ({"out": torch.zeros(20, 6).half()}, "expected out in Float, got Half"),
        ({"dilation": (1, 1 + 2**27)}, "its padding or its dilation is too large"),
    ],
)
def test_refuses(emulation, change, message):
    forward, _ = second_half()
    with pytest.raises(RuntimeError, match=message):
        emulation.op.bn_relu_conv3x3(*(forward | change).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *BACKWARD_REFUSALS,
        ({"accumulate": True}, "dz is written, not accumulated"),
        ({"dz": torch.zeros(20, 5).half()}, "expected dz in Float, got Half"),
    ],
)
def test_backward_refuses(emulation, change, message):
    _, backward = second_half()
    with pytest.raises(RuntimeError, match=message):
        emulation.op.bn_relu_conv3x3_backward(*(backward | change).values())


@pytest.mark.parametrize(("change", "message"), PLAIN_REFUSALS)
def test_plain_refuses(emulation, change, message):
    with pytest.raises(RuntimeError, match=message):
        emulation.op.conv3x3(*(plain() | change).values())


def test_gradients_refuse(emulation):
    """What ``conv3x3`` and a layer's backward do not check for them."""
    images, geometry = torch.zeros(1, 8, 5, 5), ((1, 1), (1, 1), (1, 1))
    narrow, weight = images.half(), torch.zeros(8, 8, 3, 3)
    for change, message in (
        ((narrow, images), "expected dx in Half, got Float"),
        ((images, images[:, :1].expand(1, 8, 5, 5)), "not to be expanded"),
    ):
        dy, dx = change
        with pytest.raises(RuntimeError, match=message):
            emulation.op.conv3x3_input_gradient(dy, weight.to(dy.dtype), *geometry, dx)
    with pytest.raises(RuntimeError, match="expected dy in Float, got Half"):
        emulation.op.conv3x3_weight_gradient(narrow, images, *geometry)


def test_refuses_a_line_whose_positions_are_not_counted_in_32_bits(emulation):
    x, out = torch.ones(1).expand(1, 1, 3, 1 << 34), torch.zeros(1, 1, 3, 9)
    geometry = (1, (1 << 31) - 1), (1, 1), (1, 1)
    with pytest.raises(RuntimeError, match="its padding or its dilation is too large"):
        emulation.op.conv3x3(x, torch.ones(1, 1, 3, 3), None, *geometry, out)


def test_refuses_more_columns_than_a_grid_has_rows(emulation):
    columns = 64 * 65536
    weight, out = torch.ones(1).expand(columns, 1, 3, 3), torch.zeros(1, columns, 1, 1)
    geometry = (1, 1), (1, 1), (1, 1)
    with pytest.raises(RuntimeError, match="do not fit into the device's grids"):
        emulation.op.conv3x3(
            torch.ones(1, 1, 1, 1).half(), weight.half(), None, *geometry, out.half()
        )


def test_refuses_more_lines_than_are_counted_in_32_bits(emulation):
    x = torch.ones(1).half().expand(1 << 31, 1, 1, 1)
    with pytest.raises(RuntimeError, match="do not fit into the device's grids"):
        emulation.op.conv3x3_weight_gradient(x, x, (1, 1), (1, 1), (1, 1))


# ---- the compiled code


@pytest.fixture(scope="module")
def binary() -> tuple[Path, Path]:
    """The library of CUDA kernels, and the directory of tools that read it."""
    library = Path(_extension.__file__).with_name("_CUDA.abi3.so")
    if not library.exists():
        pytest.skip(f"{library.name} was not built")
    nvidia = pytest.importorskip("triton.backends.nvidia")
    tools = Path(nvidia.__path__[0]) / "bin"
    if not (tools / "cuobjdump").exists():
        pytest.skip("no cuobjdump beside triton")
    return library, tools


def usage(library: Path, tools: Path) -> str:
    """What each kernel takes of a multiprocessor."""
    command = [tools / "cuobjdump", "--dump-resource-usage", library]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_registers_and_spills(binary):
    """Nothing spills, and as many blocks fit by registers as the planner counts on."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)"
    kernels = [use for use in re.findall(pattern, usage(*binary)) if "conv3x3" in use[0]]
    assert len(kernels) % 47 == 0 and kernels  # 33 + 12 + 2 for each architecture
    for name, registers, stack, local in kernels:
        assert (stack, local) == ("0", "0"), name
        if "weight_gradient" in name or ("convolve" in name and "9FloatKind" not in name):
            few = "convolve" in name and "ELi64E" not in name
            assert int(registers) <= (128 if few else 168), name


COPY = "LDGSTS.E.BYPASS.128"
INSTRUCTIONS = {
    "HalfKind": ("HMMA.16816.F32 ", "LDSM.16.M", COPY),
    "BFloat16Kind": ("HMMA.16816.F32.BF16", "LDSM.16.M", COPY),
    "Tf32Kind": ("HMMA.1688.F32.TF32", COPY),
    "FloatKind": ("FFMA", COPY),
}


def test_instructions(binary):
    """Tensor cores multiply, copies are asynchronous, nothing is added atomically."""
    library, tools = binary
    pattern = r"Function (\S*KindELi32E(?:LNS0_4ModeE1E|EEv)\S*):"
    names = re.findall(pattern, usage(library, tools))
    listing = subprocess.run(
        [tools / "cuobjdump", "-sass", "-arch", "sm_90", "-fun", ",".join(set(names)), library],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"},
        check=True,
    ).stdout
    functions = listing.split("Function : ")[1:]
    assert len(functions) == 8  # the forward convolution and the weight's gradient, of each kind
    for text in functions:
        name = text.split(maxsplit=1)[0]
        kind = next(kind for kind in INSTRUCTIONS if re.search(rf"\d{kind}", name))
        assert [i for i in INSTRUCTIONS[kind] if i not in text] == [], name
        assert ("HMMA" in text) == (kind != "FloatKind"), name
        assert "ATOM" not in text and "RED." not in text, name
