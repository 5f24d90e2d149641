"""Whole networks on the Triton backend, in the interpreter: numbers, and how much is launched."""

from __future__ import annotations

import copy

import peers
import pytest
import torch
from aot import norm
from exactness import answered, randomise, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import DenseNet as Torchvision

import memdense
from memdense import engine, spec
from memdense.backends.triton import Triton, launch

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.skipif(not launch.INTERPRETED, reason="runs in Triton's interpreter"),
]


def gradient_errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Mean over tensors of the squared error relative to the tensor's own mean square."""
    ratios = [
        (found[name] - value).square().mean() / value.square().mean().clamp_min(1e-30)
        for name, value in exact.items()
        if value.is_floating_point()
    ]
    return torch.stack(ratios).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_agrees_with_torchvision(training: bool) -> None:
    """Outputs, statistics and every gradient in float32: at most 1.5 times torchvision's error."""
    args = 7, (2, 2), 12, 4, 0, 5
    totals = dict.fromkeys(("ours", "nchw", "last"), 0.0)
    for seed in range(3):
        theirs = Torchvision(*args).train(training)
        randomise(theirs, torch.Generator().manual_seed(seed))
        ours = memdense.DenseNet(*args).train(training)
        ours.load_state_dict(theirs.state_dict())
        last, wide = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
        x = torch.randn(2, 3, 40, 33, generator=torch.Generator().manual_seed(seed))

        exact = run(wide, x.double(), answered)
        with memdense.use_backend("triton"), launch.recorded() as log:
            totals["ours"] += gradient_errors(run(ours, x, answered), exact)
        assert len(log) > 30
        totals["nchw"] += gradient_errors(run(theirs, x, answered), exact)
        x = x.contiguous(memory_format=torch.channels_last)
        last.to(memory_format=torch.channels_last)
        totals["last"] += gradient_errors(run(last, x, answered), exact)
    assert totals["ours"] <= 1.5**2 * max(totals["nchw"], totals["last"]), totals


def block_outputs(model: torch.nn.Module, x: Tensor) -> Tensor:
    """A step on the output of each block, and what autograd sees at the first."""
    for _ in range(3):  # recorded, then replayed
        model.zero_grad()
        outputs = model.extract_features(x)
        outputs[0].retain_grad()
        sum((o.sin() * o).sum() for o in outputs).backward()
    return torch.cat([t.flatten() for t in (*outputs, outputs[0].grad)])


@pytest.mark.slow
def test_other_networks_agree_with_the_reference() -> None:
    """Without bottlenecks, dilated, with dropout, a wide one, and blocks apart from their tails: in
    float32, within rounding.
    """
    for config, options, step in (
        ((2, 1), {"bn_size": None, "drop_rate": 0.3}, answered),
        ((1, 1, 1, 1), {"output_stride": 8, "compression": 1.0}, answered),
        ((1, 2), {"small_inputs": True, "keep_bottlenecks": True}, answered),
        ((1, 2), {"small_inputs": True}, block_outputs),
    ):
        torch.manual_seed(0)
        model = memdense.DenseNet(5, config, 8, num_classes=3, **options)
        size = (12, 10) if "small_inputs" in options else (36, 32)
        x, results = torch.randn(2, 3, *size), []
        for name in ("triton", "reference"):
            torch.manual_seed(1)
            with memdense.use_backend(name):
                results.append(run(copy.deepcopy(model), x, step))
        assert any(name.endswith("conv1.weight.grad") for name in results[0])
        for name, value in results[1].items():
            size = value.float().square().mean().sqrt().item()
            error = (results[0][name] - value).float().square().mean().sqrt().item()
            assert error <= 1e-4 * max(size, 1e-2), (options, name)


@pytest.mark.slow
def test_volumes_agree_with_the_reference() -> None:
    """In float32, within rounding."""
    torch.manual_seed(0)
    net = memdense.convert(peers.monai(3), verbose=False)
    x = torch.randn(2, 3, 17, 19, 22, generator=torch.Generator().manual_seed(0))
    with memdense.use_backend("reference"):
        expected = run(copy.deepcopy(net), x, answered)
    with memdense.use_backend("triton"), launch.recorded() as log:
        found = run(net, x, answered)
    assert len(log) > 30
    for name, value in expected.items():
        size = value.float().square().mean().sqrt().item()
        error = (found[name] - value).float().square().mean().sqrt().item()
        assert error <= 1e-4 * max(size, 1e-2), name


# what PyTorch's operations do without a kernel
FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "expand", "new_empty", "permute",
    "select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
    "_unsafe_view", "empty_strided", "new_empty_strided", "_reshape_alias",
}  # fmt: skip


class _Kernels(TorchDispatchMode):
    """Counts PyTorch's operations that would launch something on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def stage_of(layers: int, dtype: torch.dtype) -> spec.Stage:
    def vectors(channels: int) -> spec.Norm:
        return norm(channels)._replace(weight=torch.rand(channels), bias=torch.rand(channels))

    def layer(c: int) -> spec.Layer:
        convolutions = torch.randn(64, c, 1, 1), torch.randn(16, 64, 3, 3)
        return spec.Layer(vectors(c), convolutions[0], vectors(64), convolutions[1], (1, 1))

    last = 32 + 16 * layers
    tail = spec.TailSpec("transition", norm(last).spec, pool=2)
    return spec.Stage(
        [layer(32 + 16 * i) for i in range(layers)],
        spec.Tail(tail, vectors(last), torch.randn(16, last, 1, 1)),
        0.0,
        False,
    )


def launches(layers: int, dtype: torch.dtype) -> tuple[list[str], list[str]]:
    """What a stage's forward and backward launch: Triton's kernels and PyTorch's."""
    stage = stage_of(layers, dtype)
    x = torch.randn(2, 8, 8, 32).to(dtype).permute(0, 3, 1, 2)
    names = []
    with torch.no_grad(), launch.recorded(dry=True) as log:
        with _Kernels() as others:
            kept = engine.forward(x, stage, None, Triton())
        names.append([entry.plan.name for entry in log] + others.names)
        log.clear()
        need = [True] * len(spec.flatten(stage)[0])
        with _Kernels() as others:
            engine.backward(
                kept.out, None, kept.features, kept.statistics, [], stage, None, True, need,
                Triton(),
            )  # fmt: skip
        names.append([entry.plan.name for entry in log] + others.names)
    return names[0], names[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_of_a_layer(dtype: torch.dtype) -> None:
    """4 forward and 8 backward, whatever PyTorch does between them included."""
    few, many = launches(2, dtype), launches(7, dtype)
    assert len(many[0]) - len(few[0]) == 5 * 4, many[0]
    assert len(many[1]) - len(few[1]) == 5 * 8, many[1]
    casts = 1 if dtype == torch.bfloat16 else 0
    for names in many:
        assert names.count("cast_weights") == casts


def test_launches_of_a_block() -> None:
    """Beside its layers': casts, the table's and the sums' zeros, packing, the tail, settling."""
    forward, backward = launches(1, torch.bfloat16)
    assert len(forward) - 4 <= 8, forward
    assert len(backward) - 8 <= 10, backward
