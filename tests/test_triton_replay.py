"""A stage that is replayed: the bits of one that runs, in memory of its own, and only where what
was recorded holds.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import random
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any
from unittest import mock

import peers
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import memdense
from memdense import ops
from memdense.backends import triton
from memdense.backends.triton import Triton, cuda, launch, replay, tuning

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.skipif(not launch.INTERPRETED, reason="runs in Triton's interpreter"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No tapes of other tests."""
    with (
        mock.patch.object(replay, "_tapes", type(replay._tapes)()),
        mock.patch.object(replay, "_seen", set()),
        memdense.use_backend("triton"),
    ):
        yield


@pytest.fixture
def replays() -> Iterator[list[replay.Tape]]:
    """The tapes that are replayed, one after another."""
    done = []
    run = replay.Tape.__call__

    def call(tape: replay.Tape, *args: Any) -> list[Tensor | None]:
        done.append(tape)
        return run(tape, *args)

    with mock.patch.object(replay.Tape, "__call__", call):
        yield done


def network(**options: Any) -> memdense.DenseNet:
    torch.manual_seed(0)
    model = memdense.DenseNet(
        3, (1, 2), 5, num_classes=4, small_inputs=True, **{"bn_size": 2} | options
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.3, 0.5)
    return model


def images(seed: int) -> Tensor:
    return torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(seed))


def loss(out: Tensor) -> Tensor:
    return (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum()


def step(model: nn.Module, seed: int, wanted: bool) -> dict[str, Tensor]:
    """Output, gradients and buffers of a training step."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = images(seed).to(next(model.parameters()).dtype).requires_grad_()
    with replay.replaying(wanted):
        out = model(x)
        loss(out).backward()
    found = {"out": out.detach(), "x": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.isfinite().all() and torch.equal(found[name], value), name


def tapes() -> list[replay.Tape]:
    return [tape for tape in replay._tapes.values() if tape is not None]


def test_volumes_replay(replays: list[replay.Tape]) -> None:
    """The planes' kernels among PyTorch's operations, with the bits of those that run."""
    model = memdense.convert(peers.monai(3), verbose=False)
    twin = copy.deepcopy(model)
    for seed in range(3):
        found = []
        for net, wanted in ((model, True), (twin, False)):
            net.zero_grad()
            x = torch.randn(2, 3, 9, 12, 10, generator=torch.Generator().manual_seed(seed))
            with replay.replaying(wanted):
                out = net(x)
                loss(out).backward()
            found.append([out.detach(), *(p.grad for p in net.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(replays) == len(set(map(id, replays))) == 4  # two stages, two passes


@pytest.mark.parametrize(
    "options",
    [{}, {"drop_rate": 0.4}, {"keep_bottlenecks": True}, {"bn_size": None}],
    ids=["plain", "dropout", "kept", "basic"],
)
def test_same_bits(options: dict[str, Any], replays: list[replay.Tape]) -> None:
    """Run, recorded, replayed and replayed again, each on images of its own."""
    model = network(**options)
    twin = copy.deepcopy(model)
    for seed in range(4):
        assert_same(step(model, seed, True), step(twin, seed, False))
    # two stages, two passes, two steps
    assert len(replays) == 8 and len(set(map(id, replays))) == 4


def test_frozen_and_evaluating(replays: list[replay.Tape]) -> None:
    """What needs no gradient, and norms that read by running statistics."""
    model = network()
    model.features.denseblock1.requires_grad_(False)
    model.features.denseblock2.denselayer1.norm1.eval()
    model.features.norm5.eval()
    twin = copy.deepcopy(model)
    for seed in range(3):
        assert_same(step(model, seed, True), step(twin, seed, False))
    assert len(replays) == 4


def test_vectors_of_any_stride(replays: list[replay.Tape]) -> None:
    """Kernels read packed ones."""
    model = network()
    twin = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for name, p in list(m.named_parameters()):
                wide = torch.stack((p.detach(), torch.full_like(p, torch.nan)), 1)
                setattr(m, name, nn.Parameter(wide[:, 0]))
    for seed in range(3):
        assert_same(step(model, seed, True), step(twin, seed, False))
    assert len(replays) == 4


def test_tail_without_parameters(replays: list[replay.Tape]) -> None:
    """A last norm that has none, alone behind a block that a hook turns to plain modules."""
    model = network()
    model.features.norm5 = nn.BatchNorm2d(model.features.norm5.num_features, affine=False)
    model.features.denseblock2.denselayer1.register_forward_hook(lambda *_: None)
    twin = copy.deepcopy(model)
    for seed in range(3):
        with pytest.warns(memdense.MemdenseWarning) if not seed else nullcontext():
            assert_same(step(model, seed, True), step(twin, seed, False))
    assert len(replays) == 4


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["norm1.weight", "conv1.weight", "norm2.bias"])
def test_below_autograd(name: str, replays: list[replay.Tape]) -> None:
    """Where a mode watches, operations like ``to`` come undivided: copies that look like views, in
    memory that was another's. Few gradients and bfloat16 parameters make such copies.
    """
    model = network().bfloat16().requires_grad_(False)
    layer = model.features.denseblock2.denselayer1
    layer.get_parameter(name).requires_grad_(True)
    found = []
    for wanted, net in ((True, model), (False, copy.deepcopy(model))):
        with replay.replaying(wanted), Watch():
            for seed in range(3):
                net.zero_grad()
                loss(net(images(seed)[:, :, :2, :2].bfloat16())).backward()
            grad = net.features.denseblock2.denselayer1.get_parameter(name).grad
            assert grad.isfinite().all() and grad.any()
            found.append(grad)
    assert torch.equal(*found) and len(replays) >= 3


def test_inference_mode(replays: list[replay.Tape]) -> None:
    model = network().eval()
    with torch.inference_mode():
        for seed in range(3):
            with replay.replaying(True):
                found = model(images(seed))
            assert torch.equal(found, model(images(seed)))
    assert len(replays) == 2


def test_results_outlive_the_next_replay(replays: list[replay.Tape]) -> None:
    """Two forwards before their backwards, and one of these twice."""

    def run(model: nn.Module, wanted: bool) -> list[Tensor]:
        found = []
        with replay.replaying(wanted):
            for _ in range(3):
                outs = [model(images(seed)) for seed in (1, 2)]
                for out in (outs[0], *outs[::-1]):
                    model.zero_grad()
                    loss(out).backward(retain_graph=True)
                    found += [p.grad for p in model.parameters()]
                found += [out.detach() for out in outs]
        return found

    model = network()
    twin = copy.deepcopy(model)
    for a, b in zip(run(model, True), run(twin, False), strict=True):
        assert torch.equal(a, b)
    assert len(replays) > 20


def run_at(grid: tuple[int, ...], plan: launch.Plan, dtypes: Any, pointers: Any, rest: Any) -> None:
    """A launch from bare addresses, in the interpreter."""
    buffers = [None if p is None else (ctypes.c_char * 8).from_address(p) for p in pointers]
    tensors = [
        None if b is None else torch.frombuffer(b, dtype=torch.uint8)[: d.itemsize].view(d)
        for b, d in zip(buffers, dtypes, strict=True)
    ]
    plan.kernel[grid](*tensors, *rest)


def test_launches_from_addresses(replays: list[replay.Tape]) -> None:
    """As on a GPU, where a replay hands compiled kernels nothing but numbers: it keeps their code,
    though plans may be gone.
    """
    count, plans = 0, set()

    class Kernel:
        """Code that is unloaded with it."""

    def compile_and_launch(plan: launch.Plan, tensors: tuple[Tensor | None, ...]) -> Any:
        dtypes = [None if t is None else t.dtype for t in tensors]
        launched, kernel = len(tensors), Kernel()
        loaded = weakref.ref(kernel)
        plans.add(plan)

        def run(*arguments: Any) -> None:
            nonlocal count
            count += 1
            assert loaded()
            x, y, z, stream, function, metadata, *hooks = arguments[:9]
            assert (stream, function, metadata, hooks) == (17, "cubin", "meta", [None] * 3)
            rest = arguments[9:]
            run_at((x, y, z), plan, dtypes, rest[:launched], rest[launched:])

        plan.kernel[plan.grid](*tensors, *plan.arguments)
        return launch.Compiled(run, "cubin", "meta", kernel)

    model = network(drop_rate=0.4)
    twin = copy.deepcopy(model)
    expected = [step(twin, seed, False) for seed in range(3)]
    with (
        mock.patch.object(launch, "INTERPRETED", False),
        mock.patch.object(ops, "backend_for", lambda _: Triton()),
        mock.patch.object(launch, "current_stream", lambda _: 17),
        mock.patch.object(launch.Plan, "compile_and_launch", compile_and_launch),
    ):
        for seed in range(3):
            if seed == 2:
                for plan in plans:
                    plan.compiled.clear()
            assert_same(step(model, seed, True), expected[seed])
    assert len(replays) == 4
    launches = sum(get is not None for tape in replays for _, get in tape.steps)
    # some of the first step's too, where shapes repeat
    assert count >= 2 * launches > 60


@pytest.fixture
def emulated(emulation: Any) -> Iterator[Any]:
    """The 3x3 in CUDA C++, emulated, in place of Triton's."""
    with (
        mock.patch.object(triton, "_cuda", lambda x: emulation.op),
        mock.patch.object(launch, "current_stream", lambda _: 17),
        mock.patch.dict(cuda.libraries),
    ):
        cuda.add(emulation.op, emulation.library)
        yield emulation


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"drop_rate": 0.4}, torch.bfloat16),
        ({"keep_bottlenecks": True}, torch.float16),
        ({"bn_size": None}, torch.float32),
    ],
    ids=["plain", "dropout", "kept", "basic"],
)
def test_cuda_launches_from_addresses(
    options: dict[str, Any], dtype: torch.dtype, replays: list[replay.Tape], emulated: Any
) -> None:
    model = network(**options).to(dtype)
    twin = copy.deepcopy(model)
    for seed in range(4):
        assert_same(step(model, seed, True), step(twin, seed, False))
    assert len(replays) == 8
    # three layers forward and backward; where the interpreter is, nothing else goes by addresses
    launched = [function for tape in replays for function, get in tape.steps if get is not None]
    count = 3 if options.get("bn_size", 2) is None else 6
    assert len(launched) == 2 * count
    assert all(isinstance(function, cuda.Launches) for function in launched)


def second_half(backend: Triton, moving: Any, fixed: Any, op: Any) -> list[Tensor | None]:
    """A layer's, in a function of its own."""
    out = moving[0].new_empty(30, 4)
    op.bn_relu_conv3x3(
        *moving, *fixed[:4], 1e-3, fixed[4], (1, 1), 1, 5, 6, None, 1.0, out, None, False
    )
    return [out]


def test_addresses_of_two_pieces(replays: list[replay.Tape], emulated: Any) -> None:
    """Where tensors of one buffer overlap an operation is called, as it is without its library."""
    many = torch.rand(20) + 0.5
    apart = [many[i : i + 5] for i in range(0, 20, 5)]
    overlapping = [*apart[:3], many[11:16]]
    weight = torch.randn(4, 5, 3, 3)
    for parameters, known, by_address in (
        (apart, cuda.libraries, 1),
        (overlapping, cuda.libraries, 0),
        ([t.clone() for t in apart], {}, 0),
    ):
        fixed = [*parameters, weight]
        with replay.replaying(True), mock.patch.object(cuda, "libraries", known):
            for _ in range(4):
                y = [torch.randn(30, 5)]
                [found] = replay.call(Triton(), second_half, y, fixed, emulated.op)
                assert torch.equal(found, second_half(Triton(), y, fixed, emulated.op)[0])
        assert len(replays) == 2
        assert sum(get is not None for _, get in replays[0].steps) == by_address
        replays.clear()


def of_a_result(backend: Triton, moving: Any, fixed: Any, op: Any) -> list[Tensor | None]:
    """A layer's, of what lies behind the beginning of an operation's result."""
    y = torch.cat([moving[0].neg(), moving[0]])[30:]
    return second_half(backend, [y], fixed, op)


def test_addresses_in_results(replays: list[replay.Tape], emulated: Any) -> None:
    fixed = [*(torch.rand(4, 5) + 0.5).unbind(), torch.randn(4, 5, 3, 3)]
    with replay.replaying(True):
        for _ in range(4):
            y = [torch.randn(30, 5)]
            [found] = replay.call(Triton(), of_a_result, y, fixed, emulated.op)
            assert torch.equal(found, second_half(Triton(), y, fixed, emulated.op)[0])
    assert len(replays) == 2 and any(get is not None for _, get in replays[0].steps)


ELSEWHERE = torch.ones(4)


def product(backend: Triton, moving: Any, fixed: Any, *rest: Any) -> list[Tensor | None]:
    """[(x + ...) @ w, None, sum of it]: with scratch, a result of PyTorch's and places within."""
    x, *others = moving
    wide = x.new_empty(x.shape[0], 2 * x.shape[1])
    wide[:, : x.shape[1]].copy_(x)
    for other in others:
        wide[:, : x.shape[1]].add_(other)
    wide[:, x.shape[1] :].zero_()
    out = torch.mm(wide[:, : x.shape[1]], fixed[0])
    for more in fixed[1:]:
        out.add_(more)
    if "value" in rest:
        out.mul_(out.sum().item())
    if "elsewhere" in rest:
        out.add_(ELSEWHERE)
    return [out.t(), None, x.new_zeros(4).add_(out.sum(0)), x.new_empty(0)]


def ask(moving: list[Tensor], fixed: list[Tensor], *rest: Any) -> None:
    """A call, whose result is right."""
    with replay.replaying(True):
        found = replay.call(Triton(), product, moving, fixed, *rest)
    expected = product(Triton(), moving, fixed, *rest)
    assert found[1] is None and found[3].shape == (0,)
    for a, b in ((found[0], expected[0]), (found[2], expected[2])):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_other_looks_are_other_tapes(replays: list[replay.Tape]) -> None:
    """Of an input that moves: shape, stride, dtype, alignment, what may be read behind it; of a
    fixed one where it is, too.
    """
    w = torch.randn(3, 4)
    there = torch.randn(20)
    base = torch.randn(64)
    looks = {
        "as it is": ([torch.randn(5, 3)], [w]),
        "shape": ([torch.randn(6, 3)], [w]),
        "stride": ([torch.randn(3, 5).t()], [w]),
        "memory behind it": ([base[4:19].view(5, 3)], [w]),
        "less of it": ([torch.randn(20)[:15].view(5, 3)], [w]),
        "alignment": ([base[1:16].view(5, 3)], [w]),
        "dtype": ([torch.randn(5, 3).double()], [w.double()]),
        "memory": ([torch.randn(5, 3)], [there[:12].view(3, 4)]),
        "fixed stride": ([torch.randn(5, 3)], [there[:12].view(4, 3).t()]),
        "one more": ([torch.randn(5, 3)], [w, there.view(5, 4)]),
        "fixed shape": ([torch.randn(5, 3)], [w, there.view(5, 4)[:1]]),
        "fixed dtype": ([torch.randn(5, 3)], [w, there.view(5, 4).view(torch.int32)]),
        "rest": ([torch.randn(5, 3)], [w], 1),
        "twice": ([torch.randn(5, 3)], [w, w[:1], w[:1]]),
    }
    for count, case in enumerate(looks.values(), 1):
        for _ in range(2):
            ask(*case)
        assert not replays and len(tapes()) == count
    for count, case in enumerate(looks.values(), 1):
        for t in case[0]:
            t.copy_(torch.randn(t.shape))
        ask(*case)
        assert len(replays) == count and len(tapes()) == len(looks)
    ask([base[32:47].view(5, 3)], [w])
    assert replays[-1] is replays[3] and len(tapes()) == len(looks)
    # what moves may overlap: each is where it is
    x = torch.randn(6, 3)
    for _ in range(3):
        ask([x[1:], x[:-1]], [w])
    assert len(replays) == len(looks) + 2


def test_what_cannot_be_replayed(replays: list[replay.Tape]) -> None:
    """Values that decide, memory from elsewhere, inputs that overlap: run every time."""
    w, x = torch.randn(3, 4), torch.randn(6, 3)
    both = torch.randn(18)
    for case in (
        ([x], [w], "value"),
        ([x], [w], "elsewhere"),
        ([x, x], [w]),
        ([both.view(6, 3)], [both[:12].view(3, 4)]),
    ):
        for _ in range(4):
            ask(*case)
    assert not replays and not tapes() and len(replay._tapes) == 4
    with replay.replaying(True), launch.recorded():
        assert not replay.enabled()


def test_devices(replays: list[replay.Tape]) -> None:
    """Inputs of several are refused, also where all else is as a tape knows it."""
    x, w = torch.randn(5, 3), torch.randn(3, 4)
    for _ in range(3):
        ask([x], [w])
    assert len(replays) == 1
    for wanted in (True, False):
        with replay.replaying(wanted), pytest.raises(RuntimeError, match="same device cpu, but"):
            replay.call(Triton(), product, [torch.empty_like(x, device="meta")], [w])


def test_one_thread_compiles_at_a_time() -> None:
    inside = 0

    class Kernel:
        run = function = packed_metadata = None

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return self.launch

        def launch(self, *args: Any, **options: Any) -> Kernel:
            nonlocal inside
            inside += 1
            time.sleep(0.05)
            assert inside == 1
            inside -= 1
            return self

    plan = launch.Plan(Kernel(), (1,), ())
    with ThreadPoolExecutor(3) as pool:
        assert len({found.run for found in pool.map(plan.compile_and_launch, [()] * 3)}) == 1


def test_compiled_kernels_are_for_what_they_were_compiled_for() -> None:
    """Alignment, dtypes and devices."""
    made = []

    class Kernel:
        function = packed_metadata = None

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return self.launch

        def launch(self, *args: Any, **options: Any) -> Kernel:
            made.append(args)
            return self

        def run(self, *args: Any) -> None:
            pass

    plan = launch.Plan(Kernel(), (1,), ())
    base = torch.zeros(64)
    base = base[-base.data_ptr() % 16 // 4 :]
    other = mock.Mock(wraps=base, dtype=base.dtype)
    other.get_device.return_value = 1
    with (
        mock.patch.object(launch, "INTERPRETED", False),
        mock.patch.object(launch, "current_stream", lambda device: 0),
    ):
        for t, count in (
            (base, 1), (base[4:], 1), (base[1:], 2), (base.view(torch.int32), 3), (other, 4),
            (base[2:], 4),
        ):  # fmt: skip
            plan(t)
            assert len(made) == count


def test_when_it_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while another configuration is tried, or a stage is recorded."""
    with replay.replaying(True):
        assert replay.enabled()
        with tuning.forced("kernel", tuning.Config(1, 1, 1, 1, 1)):
            assert not replay.enabled()
        with mock.patch.object(launch.thread, "recorder", object()):
            assert not replay.enabled()
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert replay.enabled()
    monkeypatch.setenv("MEMDENSE_REPLAY", "0")
    assert not replay.enabled()


def test_other_convolutions_are_other_tapes(replays: list[replay.Tape]) -> None:
    """PyTorch's without cuDNN may give other strides."""
    x, w = torch.randn(5, 3), torch.randn(3, 4)
    for count, enabled in enumerate((True, False), 1):
        with torch.backends.cudnn.flags(enabled=enabled):
            for _ in range(2):
                ask([x], [w])
        assert len(tapes()) == count and not replays


def test_precision_is_another_tape(replays: list[replay.Tape]) -> None:
    x, w = torch.randn(5, 3), torch.randn(3, 4)
    for count, precise in enumerate((True, False), 1):
        with mock.patch.object(replay._extension, "tf32", lambda p=precise: p):
            for _ in range(2):
                ask([x], [w])
        assert len(tapes()) == count and not replays


def seen_otherwise(backend: Triton, moving: list[Tensor], fixed: list[Tensor]) -> list[Tensor]:
    return [moving[0].view(torch.int32).add(1)]


def elsewhere(backend: Triton, moving: list[Tensor], fixed: list[Tensor]) -> list[Tensor]:
    return [torch.empty(3, device="meta")]


@pytest.mark.parametrize("function", [seen_otherwise, elsewhere])
def test_memory_that_a_tape_does_not_follow(function: Any, replays: list[replay.Tape]) -> None:
    """Of another dtype than it was made for, of another device."""
    for seed in range(3):
        x = images(seed)
        with replay.replaying(True):
            (found,) = replay.call(Triton(), function, [x], [torch.ones(2)])
        assert found.is_meta or torch.equal(found, x.view(torch.int32) + 1)
    assert not replays and not tapes()


def some_are_empty(backend: Triton, moving: list[Tensor], fixed: list[Tensor]) -> list[Tensor]:
    """Of an operation's three results one has values."""
    norm = *fixed, *fixed, False, 0.1, 1e-5
    return [torch.native_batch_norm(moving[0], *norm)[0]]


def parts(backend: Triton, moving: list[Tensor], fixed: list[Tensor]) -> list[Tensor]:
    """Of an input that lies within its memory, and of what is made here."""
    wide = moving[0].new_empty(9, 3)
    torch.add(moving[0][1:, 1:], 1, out=wide[2:6, 1:])
    wide[:, 0].fill_(2)
    return [moving[0][2:].neg(), wide[2:6]]


@pytest.mark.parametrize(("function", "count"), [(some_are_empty, 0), (parts, 2)])
def test_parts(function: Any, count: int, replays: list[replay.Tape]) -> None:
    fixed = [torch.rand(3) + 0.5, torch.rand(3) + 0.5]
    for _ in range(4):
        x = [torch.randn(64)[7:22].view(5, 3)]
        with replay.replaying(True):
            found = replay.call(Triton(), function, x, fixed)
        for a, b in zip(found, function(Triton(), x, fixed), strict=True):
            assert torch.equal(a, b)
    assert len(replays) == count


def test_tapes_keep_their_tables(replays: list[replay.Tape]) -> None:
    """While they are replayed, too."""
    model, kept = network(), []
    with (
        replay.replaying(True),
        mock.patch.object(replay, "keep_while_read", kept.append),
        torch.no_grad(),
    ):
        for seed in range(3):
            assert not kept and not replays
            model(images(seed))
    assert kept and replays


def test_as_many_tapes_as_fit(replays: list[replay.Tape]) -> None:
    """Those that were asked for last."""
    w = torch.randn(3, 4)
    with mock.patch.object(replay, "TAPES", 2):
        for rows in (5, 6, 7):
            for _ in range(2):
                ask([torch.randn(rows, 3)], [w])
        assert len(tapes()) == 2 and not replays
        ask([torch.randn(7, 3)], [w])
        ask([torch.randn(5, 3)], [w])
        assert len(replays) == 1
        ask([torch.randn(5, 3)], [w])  # once more, so that it is recorded
        ask([torch.randn(7, 3)], [w])
        for _ in range(2):
            ask([torch.randn(8, 3)], [w])
        before = len(replays)
        ask([torch.randn(7, 3)], [w])
        assert len(replays) == before + 1
    with mock.patch.object(replay, "TAPES", 1):
        for rows in range(20):
            ask([torch.randn(9 + rows, 3)], [w])
        assert len(replay._seen) <= 17


def test_packing() -> None:
    """Pieces in use at one step never overlap; with the largest first, little is wasted."""
    draw = random.Random(0)
    for _ in range(200):
        pieces = []
        for _ in range(draw.randrange(1, 40)):
            piece = replay.Piece("scratch", torch.empty(draw.choice([1, 7, 128, 1000, 5000])))
            piece.first = draw.randrange(30)
            piece.last = piece.first + draw.randrange(6)
            pieces.append(piece)
        total = replay.pack(pieces)
        live = 0
        for now in range(40):
            used = sorted((p for p in pieces if p.first <= now <= p.last), key=lambda p: p.offset)
            assert all(p.offset % replay.BLOCK == 0 for p in used)
            assert all(a.offset + a.bytes <= b.offset for a, b in itertools.pairwise(used))
            assert not used or used[-1].offset + used[-1].bytes <= total
            live = max(live, sum(-(-p.bytes // replay.BLOCK) * replay.BLOCK for p in used))
        assert live <= total <= 1.5 * live
