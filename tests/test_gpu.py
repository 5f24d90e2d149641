"""What only a CUDA device can show: whole networks on the Triton backend, streams, graphs, memory.

The primitives' own tests (test_triton*.py, test_cuda*.py) run on the device too where there is one.
"""

import copy
from collections.abc import Callable
from statistics import median

import pytest
import torch
from exactness import assert_same_step, randomise, twins
from torch import Tensor, nn
from torchvision.models import DenseNet as Torchvision

import memdense
from memdense import _extension, memory
from memdense.backends import backend_for
from memdense.backends.triton import cuda, replay

pytestmark = pytest.mark.gpu
ARGS = (8, (3, 4, 2), 12, 4, 0, 5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_agrees_with_torchvision(training: bool, layout: torch.memory_format) -> None:
    expected = Torchvision(*ARGS).double()
    randomise(expected, torch.Generator().manual_seed(1))
    found, expected = twins(expected, memdense.DenseNet(*ARGS).double())
    x = torch.randn(3, 3, 64, 72, dtype=torch.float64, device="cuda")

    def step(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x.contiguous(memory_format=layout))
        (out * torch.linspace(-1, 2, out.numel(), device="cuda").view_as(out)).sum().backward()
        return out

    assert_same_step(found.cuda().train(training), expected.cuda().train(training), x, step)


def test_autocast_is_as_near_float64_as_torchvision() -> None:
    theirs = Torchvision(*ARGS).cuda()
    ours = memdense.DenseNet(*ARGS).cuda()
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(ours).double()
    x = torch.randn(8, 3, 64, 64, device="cuda")
    exact(x.double()).square().sum().backward()
    errors = []
    for model in (ours, theirs):
        with torch.autocast("cuda", torch.bfloat16):
            out = model(x)
        out.float().square().sum().backward()
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        errors.append(sum((p.grad - q.grad).square().sum().item() for p, q in pairs) ** 0.5)
    assert errors[0] <= 1.5 * errors[1]


def test_peak_of_densenet121() -> None:
    """bf16 autocast, 224, against torchvision in the same dtype."""
    x = torch.randn(16, 3, 224, 224, device="cuda")
    peaks = []
    for model in (memdense.densenet121().cuda(), Torchvision().cuda()):

        def forward(x: Tensor, model: nn.Module = model) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return model(x)

        def step(forward=forward) -> None:
            forward(x).float().sum().backward()

        step()
        peaks.append(memory.peak_memory(step, device=torch.device("cuda")).peak)
    assert peaks[0] <= peaks[1] / 4


def test_a_side_stream_is_respected() -> None:
    model = memdense.DenseNet(*ARGS).double().cuda()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64, device="cuda")
    expected = copy.deepcopy(model)(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = model(x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_triton_runs_by_default() -> None:
    assert backend_for(torch.device("cuda")).name.startswith("triton")
    model = memdense.DenseNet(*ARGS).cuda()
    found = memdense.explain(model)
    parts = [row for row in found.rows if row.efficient]
    assert parts and all(row.backend.startswith("triton") for row in parts)
    assert f"3x3 in CUDA C++: {_extension.cuda_reason() or 'available'}" in found.notes


@pytest.mark.parametrize("args", [ARGS, (12, (3, 3), 24, 4, 0.2, 5), (7, (2, 2), 10, None, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_is_as_near_float64_as_the_reference(
    args: tuple, dtype: torch.dtype, float32_precision: Callable[[str], None]
) -> None:
    """Gradients of whole networks over several draws: 1.5 times the reference backend's error, in
    the median. A value within a rounding of the ReLU's kink, one or two in a few networks of
    float32, moves their gradients by many orders of magnitude more than all other roundings.
    """
    float32_precision("ieee")
    errors: dict[str, list[float]] = {"triton": [], "reference": []}
    for seed in range(6):
        plain = memdense.DenseNet(*args)
        randomise(plain, torch.Generator().manual_seed(seed))
        exact, model = copy.deepcopy(plain).double().cuda(), plain.cuda()
        x = torch.randn(6, 3, 64, 72, generator=torch.Generator().manual_seed(seed)).cuda()
        answer = torch.linspace(-1, 2, 6 * args[5], device="cuda").view(6, -1)

        def step(model: nn.Module, x: Tensor, answer=answer, seed=seed) -> None:
            torch.manual_seed(seed)  # dropout's mask
            model.zero_grad()
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                out = model(x)
            (out.double() * answer).sum().backward()

        # the masks of dropout are drawn alike only in one dtype: leave it out of the comparison
        for network in (exact, model):
            for module in network.modules():
                if hasattr(module, "drop_rate"):
                    module.drop_rate = 0.0
        step(exact, x.double())
        for name, found in errors.items():
            with memdense.use_backend(name):
                step(model, x)
            for p, q in zip(model.parameters(), exact.parameters(), strict=True):
                size = q.grad.square().mean()
                found.append(((p.grad - q.grad).square().mean() / size).sqrt().item())
    assert median(errors["triton"]) <= 1.5 * median(errors["reference"]), errors


def test_repeats_bit_for_bit() -> None:
    model = memdense.DenseNet(*ARGS).cuda()
    x = torch.randn(5, 3, 96, 64, device="cuda")
    results = []
    for _ in range(3):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            model(x).float().square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_replays_are_the_same_bits_in_the_same_memory() -> None:
    """Of a stage's launches, from the third step on; against launching one by one."""
    device = torch.device("cuda")
    model = memdense.DenseNet(*ARGS[:4], 0.2, 5).cuda()
    twin = copy.deepcopy(model)
    peaks: dict[bool, list[int]] = {True: [], False: []}
    for seed in range(4):
        x = torch.randn(6, 3, 96, 80, device=device)
        for wanted, net in ((True, model), (False, twin)):

            def step(net: nn.Module = net, x: Tensor = x) -> None:
                net.zero_grad()
                with torch.autocast("cuda", torch.bfloat16):
                    net(x).float().square().sum().backward()

            torch.manual_seed(seed)
            with replay.replaying(wanted):
                peaks[wanted].append(memory.peak_memory(step, device=device).peak)
        for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), (seed, name)
        for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(a, b), (seed, name)
    functions = [run for tape in replay._tapes.values() if tape for run, _ in tape.steps]
    assert any(isinstance(run, cuda.Launches) for run in functions) == bool(cuda.libraries)
    # a replay allocates all gradients of a stage before its first launch
    assert peaks[True][-1] <= 1.15 * peaks[False][-1]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_training_step_is_captured(momentum: float | None) -> None:
    """torch.cuda.make_graphed_callables, and a whole step with its optimiser, against eager."""
    models = [memdense.DenseNet(*ARGS).cuda() for _ in range(2)]
    for module in models[0].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    models[1] = copy.deepcopy(models[0])
    batches = [torch.randn(4, 3, 64, 64, device="cuda") for _ in range(3)]
    static = batches[0].clone()
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for m in models]

    def step(i: int, x: Tensor) -> None:
        optimizers[i].zero_grad(set_to_none=False)
        models[i](x).square().mean().backward()
        optimizers[i].step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(0, static)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        step(1, batches[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(0, static)
    for x in batches:
        static.copy_(x)
        graph.replay()
        step(1, x)
    for (name, a), b in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_compiled_into_graphs() -> None:
    """mode="reduce-overhead": warmed up, captured and replayed, against eager. What is compiled
    around the stages may round otherwise.
    """
    model = memdense.DenseNet(*ARGS).cuda()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, mode="reduce-overhead")
    for seed in range(5):
        x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).cuda()
        torch.compiler.cudagraph_mark_step_begin()
        for net, run in ((model, compiled), (twin, twin)):
            net.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                run(x).float().square().sum().backward()
        for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (a.grad - b.grad).norm() <= 0.05 * b.grad.norm() + 1e-3, (seed, name)
