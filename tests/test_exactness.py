"""Against torchvision in float64: random networks, modes, freezing and uses."""

import copy
import random
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from exactness import BACKENDS, assert_same_step, randomise, twins
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import DenseNet as Torchvision

import memdense


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with memdense.use_backend(request.param):
        yield request.param


@dataclass(frozen=True)
class Case:
    growth_rate: int
    blocks: tuple[int, ...]
    init: int
    bn_size: int
    drop_rate: float
    batch: int
    height: int
    width: int
    mode: str
    uses: str
    backend: str
    keep_bottlenecks: bool
    recompute_stem: bool
    input_gradient: bool
    channels_last: bool
    seed: int = field(repr=True)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    blocks = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    # the last block sees at least 2 x 2 pixels, so that every norm has four values or more
    least = 4 * 2 ** len(blocks)
    return Case(
        growth_rate=draw(st.sampled_from([1, 3, 4, 7, 12])),
        blocks=blocks,
        init=draw(st.sampled_from([2, 5, 8])),
        bn_size=draw(st.sampled_from([1, 2, 4])),
        drop_rate=draw(st.sampled_from([0, 0, 0, 0.3])),
        batch=draw(st.integers(1, 3)),
        height=draw(st.integers(least, least + 9)),
        width=draw(st.integers(least, least + 9)),
        mode=draw(st.sampled_from(["train", "eval", "mixed", "mixed", "unusual"])),
        uses=draw(st.sampled_from(["once", "once", "twice before backward", "backward twice"])),
        backend=draw(st.sampled_from(BACKENDS)),
        keep_bottlenecks=draw(st.booleans()),
        recompute_stem=draw(st.booleans()),
        input_gradient=draw(st.booleans()),
        channels_last=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def set_modes(model: nn.Module, case: Case) -> None:
    """train, eval; "mixed": random norms and parameters frozen; "unusual": norms of every other
    kind too.
    """
    choose = random.Random(case.seed)
    model.train(case.mode != "eval")
    if case.mode not in ("mixed", "unusual"):
        return
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.train(choose.random() < 0.6)
            if case.mode == "unusual":
                m.eps = choose.choice([1e-5, 1e-3, 0.1])
                m.momentum = choose.choice([0.1, 0.01, None])
                kind = choose.random()
                if kind < 0.2:
                    m.track_running_stats, m.running_mean, m.running_var = False, None, None
                    m.num_batches_tracked = None
                elif kind < 0.4:
                    m.affine, m.weight, m.bias = False, None, None
    for p in model.parameters():
        p.requires_grad_(choose.random() < 0.7)


def use(case: Case, model: nn.Module, x: Tensor) -> Tensor:
    outputs = [model(x)]
    if case.uses == "twice before backward":
        outputs.append(model(x.flip(0) * 0.5 + 0.1))
    weights = torch.linspace(-1, 2, outputs[0].numel(), dtype=x.dtype).view_as(outputs[0])
    loss = sum((o * weights).sum() for o in outputs)
    if loss.requires_grad:
        if case.uses == "backward twice":
            loss.backward(retain_graph=True)
        loss.backward()
    return torch.cat(outputs)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_any_network_in_any_mode_agrees_with_torchvision(case: Case) -> None:
    args = (case.growth_rate, case.blocks, case.init, case.bn_size, case.drop_rate, 3)
    torch.manual_seed(case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    expected = Torchvision(*args).double()
    randomise(expected, generator)
    found = memdense.DenseNet(
        *args, keep_bottlenecks=case.keep_bottlenecks, recompute_stem=case.recompute_stem
    ).double()
    twins(expected, found)
    for model in (found, expected):
        set_modes(model, case)
    x = torch.randn(
        case.batch, 3, case.height, case.width, generator=generator, dtype=torch.float64
    )
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with memdense.use_backend(case.backend):
        assert_same_step(found, expected, x, lambda m, x: use(case, m, x), case.input_gradient)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bn_size", [None, 4])
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(small_inputs=True, compression=1.0, in_channels=1),
        dict(output_stride=16),
        dict(output_stride=8),
        dict(block_config=(2,), num_init_features=3, growth_rate=5),
    ],
    ids=str,
)
def test_variants_agree_with_their_plain_modules(
    kwargs: dict, bn_size: int | None, training: bool, backend: str
) -> None:
    kwargs = dict(growth_rate=7, block_config=(2, 1, 2, 2), num_classes=3, bn_size=bn_size) | kwargs
    expected = memdense.DenseNet(**kwargs, efficient=False).double().train(training)
    randomise(expected, torch.Generator().manual_seed(1))
    found = memdense.DenseNet(**kwargs).double().train(training)
    twins(expected, found)
    x = torch.randn(2, kwargs.get("in_channels", 3), 64, 41, dtype=torch.float64)
    assert_same_step(found, expected, x)


def test_densenet121_agrees_with_torchvision(backend: str) -> None:
    from torchvision.models import densenet121

    expected = densenet121(num_classes=5).double()
    randomise(expected, torch.Generator().manual_seed(1))
    found, expected = twins(expected, memdense.densenet121(num_classes=5).double())
    assert_same_step(found, expected, torch.randn(2, 3, 96, 64, dtype=torch.float64))


def test_same_seed_makes_the_same_model() -> None:
    torch.manual_seed(3)
    expected = Torchvision(8, (2, 2), 6, 2, 0, 4).state_dict()
    torch.manual_seed(3)
    found = memdense.DenseNet(8, (2, 2), 6, 2, 0, 4).state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_bands_of_lines_and_of_images_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest bands split single images, with halos; the largest hold the whole batch."""
    from memdense.backends import Reference

    expected = Torchvision(4, (2, 2), 6, 2, 0, 3).double()
    randomise(expected, torch.Generator().manual_seed(1))
    found, expected = twins(expected, memdense.DenseNet(4, (2, 2), 6, 2, 0, 3).double())
    plain = memdense.DenseNet(4, (2, 2), 6, bn_size=None, num_classes=3, efficient=False).double()
    without = memdense.DenseNet(4, (2, 2), 6, bn_size=None, num_classes=3).double()
    twins(plain, without)
    x = torch.randn(3, 3, 37, 45, dtype=torch.float64)
    for band in (1, 2_000, 20_000, 1 << 30):
        monkeypatch.setattr(Reference, "CPU_BAND_BYTES", band)
        with memdense.use_backend("reference"):
            assert_same_step(found, expected, x)
            assert_same_step(without, plain, x)


def test_large_means_keep_their_digits(backend: str) -> None:
    """|mean| / sigma up to 1e3 stays within the bound."""
    block = memdense.DenseBlock(3, 6, 2, 4).double()
    tail = memdense.Transition(18, 9).double()
    found = memdense.Features(OrderedDict(denseblock1=block, transition1=tail)).double()
    randomise(found, torch.Generator().manual_seed(1))
    expected = copy.deepcopy(found)
    expected.efficient = False
    x = torch.randn(4, 6, 12, 12, dtype=torch.float64)
    assert_same_step(found, expected, x + 1000 * torch.randn(6, 1, 1, dtype=torch.float64).sign())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype: torch.dtype, backend: str) -> None:
    model = memdense.DenseNet(8, (2, 2), 6, 2, 0, 3).to(dtype)
    x = torch.randn(2, 3, 40, 48, dtype=dtype)
    runs = []
    for _ in range(2):
        model.zero_grad()
        mine = x.clone().requires_grad_()
        out = model(mine)
        out.float().square().sum().backward()
        runs.append([out, mine.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
