"""The operations as PyTorch sees them: schemas, fake kernels and autograd registration."""

import copy
from unittest import mock

import pytest
import torch
from exactness import Calls
from torch import Tensor, nn
from torch.library import opcheck

import memdense
from memdense import ops
from memdense.buffers import accumulator
from memdense.direct import watched
from memdense.modules import OWN_TYPES
from memdense.spec import flatten, spec_of
from memdense.structure import read_stage, read_tail


def stage_arguments(kind: str, frozen: bool, bn_size: int | None) -> tuple:
    block = memdense.DenseBlock(2, 5, bn_size, 3, drop_rate=0.5)
    tail = memdense.Transition(11, 4) if kind == "transition" else nn.BatchNorm2d(11)
    if frozen:
        block.denselayer2.eval()
        block.denselayer2.training = True
        tail.eval()
    has_tail = kind != "none"
    found = read_stage(block, "block", tail if has_tail else None, "tail", kind, OWN_TYPES, True)
    tensors, running = flatten(found.stage)
    x = torch.randn(2, 5, 6, 7, requires_grad=True)
    mask = torch.rand(2 * 6 * 7, 6) < 0.5
    return x, tensors, running, mask, spec_of(found.stage).encode(), False


@pytest.mark.parametrize("kind", ["transition", "norm", "pool", "none"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bn_size", [None, 2])
def test_stage(kind: str, frozen: bool, bn_size: int | None) -> None:
    opcheck(ops.stage, stage_arguments(kind, frozen, bn_size))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("pool", [False, True])
def test_tail_alone(frozen: bool, pool: bool) -> None:
    """A stage without layers reads x where it lies, and does not give it back."""
    tail = memdense.Transition(5, 4, pool).train(not frozen)
    found = read_tail(tail, "tail", "transition", OWN_TYPES)
    x = torch.randn(2, 5, 6, 7, requires_grad=True)
    arguments = x, found.tensors, found.running, None, found.spec, False
    opcheck(ops.stage, arguments)
    out, features, statistics, _ = ops.stage(*arguments)
    assert not features.numel()
    tensors = [t.detach() for t in found.tensors]
    answers = torch.randn_like(out), None, x.detach(), statistics, [], tensors, None, found.spec
    opcheck(ops.stage_backward, (*answers, True, [True] * len(tensors)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stage_backward(dtype: torch.dtype) -> None:
    x, tensors, running, mask, spec, _ = stage_arguments("transition", True, 2)
    x, tensors, running = (
        x.to(dtype),
        [t.to(dtype) for t in tensors],
        [r.to(dtype) for r in running],
    )
    out, features, statistics, bottlenecks = ops.stage(x, tensors, running, mask, spec, False)
    tensors = [t.detach() for t in tensors]
    need = [i % 2 == 0 for i in range(len(tensors))]
    opcheck(
        ops.stage_backward,
        (
            torch.randn_like(out),
            torch.randn_like(features),
            features.detach(),
            statistics,
            bottlenecks,
            tensors,
            mask,
            spec,
            True,
            need,
        ),
    )


def test_a_tail_nobody_used() -> None:
    """Its parameters get no gradient, not zeros; the others those of a block alone."""
    x, tensors, running, mask, spec, _ = stage_arguments("transition", False, 2)
    alone = stage_arguments("none", False, 2)[4]
    found, expected = (
        torch.autograd.grad(
            ops.run_stage(x, given, running, mask, what, False, None)[1].sin().sum(),
            [x, *given],
            allow_unused=True,
        )
        for given, what in ((tensors, spec), (tensors[:-3], alone))
    )
    assert found[-3:] == (None,) * 3
    assert all(map(torch.equal, found[:-3], expected))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_stem(recompute: bool, training: bool) -> None:
    conv = nn.Conv2d(3, 6, 7, stride=2, padding=3, bias=False)
    norm = nn.BatchNorm2d(6).train(training)
    spec = memdense.spec.StemSpec(
        memdense.spec.NormSpec(norm.eps, training, True), (2, 2), (3, 3), (1, 1), recompute
    ).encode()
    running: list[Tensor | None] = [None, None]
    if not training:
        running = [norm.running_mean, norm.running_var]
    x = torch.randn(2, 3, 21, 18, requires_grad=True)
    arguments = (x, conv.weight, norm.weight, norm.bias, *running, spec)
    opcheck(ops.stem, arguments)
    out, convolved, winner, statistics = ops.stem(*arguments)
    leaves = [t.detach() for t in (x, conv.weight, norm.weight, norm.bias)]
    opcheck(
        ops.stem_backward,
        (torch.randn_like(out), *leaves, convolved, winner, statistics, spec, [True] * 4),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_running_statistics(dtype: torch.dtype) -> None:
    """Against F.batch_norm, for momenta of every kind; bf16 buffers round once."""
    momenta = [0.1, -1.0, 0.1, 0.7]
    means = [torch.randn(4).to(dtype) for _ in momenta]
    variances = [torch.rand(4).to(dtype) + 0.5 for _ in momenta]
    counts = [torch.tensor(i + 2) for i in range(4)]
    batch = [torch.randn(10, 4) for _ in momenta]
    table = torch.zeros(2, 20)
    starts = [0, 12, 4, 16]
    for start, b in zip(starts, batch, strict=True):
        table[1, start : start + 4], table[0, start : start + 4] = torch.var_mean(
            b, 0, correction=0
        )
    arguments = means, variances, counts, table, starts, momenta, 10
    expected = []
    for mean, var, count, b, m in zip(means, variances, counts, batch, momenta, strict=True):
        mean, var = mean.float(), var.float()
        m = 1 / (count.item() + 1) if m < 0 else m
        nn.functional.batch_norm(b, mean, var, training=True, momentum=m)
        expected.append((mean.to(dtype), var.to(dtype), count + 1))
    opcheck(ops.update_running_statistics, arguments)
    ops.update_running_statistics(*arguments)
    for i, (mean, var, count) in enumerate(expected):
        torch.testing.assert_close(means[i], mean)
        torch.testing.assert_close(variances[i], var)
        assert counts[i] == count


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_running_statistics_round_once_a_step(dtype: torch.dtype, counted: bool) -> None:
    """By numbers that float32 computes exactly; the last norm runs twice in a step."""
    n, rows, momenta = 40, 5, [0.375, -1.0 if counted else 0.625, 0.375, 0.375]
    table = torch.arange(1, 8 * n + 1).view(2, 4 * n).to(accumulator(dtype)) / 16
    starts = [0, 3 * n, n, 2 * n]
    for norms in ([0, 1], [0, 1, 2, 2]):
        means = [(1 + torch.arange(n) / 128).to(dtype) for _ in range(3)]
        variances = [(1.5 + torch.arange(n) / 128).to(dtype) for _ in range(3)]
        counts = [torch.tensor(3) for _ in range(3)]
        wanted = [(mean.clone(), var.clone()) for mean, var in zip(means, variances, strict=True)]
        for i, start, momentum in zip(norms, starts, momenta, strict=False):
            m = 0.25 if momentum < 0 else momentum
            batch = table[:, start : start + n].double() * torch.tensor([[1], [rows / (rows - 1)]])
            wanted[i] = tuple(
                ((1 - m) * old.double() + m * new).to(dtype)
                for old, new in zip(wanted[i], batch, strict=True)
            )
        ops.move_running_statistics(
            [means[i] for i in norms], [variances[i] for i in norms],
            [counts[i] for i in norms] if counted else [],
            table, starts[: len(norms)], momenta[: len(norms)], rows,
        )  # fmt: skip
        for mean, var, both in zip(means, variances, wanted, strict=True):
            assert torch.equal(mean, both[0]) and torch.equal(var, both[1])
        assert counts == [3 + norms.count(i) * counted for i in range(3)]


def test_averages_keep_the_digits_of_float64() -> None:
    (mean, var), count = torch.zeros(2, 3).double(), torch.tensor(2)
    table = torch.rand(2, 3).double()
    ops.move_running_statistics([mean], [var], [count], table, [0], [-1.0], 5)
    torch.testing.assert_close(mean, table[0] / 3, rtol=1e-15, atol=0)
    torch.testing.assert_close(var, table[1] * 1.25 / 3, rtol=1e-15, atol=0)


def test_compiling_warns_of_nothing_and_breaks_no_graph() -> None:
    import warnings

    model = memdense.DenseNet(4, (2, 2), 6, 2, 0, 3)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(2, 3, 32, 32))
    out.sum().backward()
    assert model.features.conv0.weight.grad.isfinite().all()
    assert model.features.norm5.num_batches_tracked == 1


def test_compiling_for_sizes_that_change() -> None:
    """With every number symbolic, eps too: it is read again where it changed."""
    model = memdense.DenseNet(4, (2, 2), 6, 2, 0, 3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, size, eps in ((2, 32, 1e-5), (3, 40, 1e-5), (3, 40, 0.5)):
        model.features.norm0.eps = model.features.denseblock2.denselayer1.norm2.eps = eps
        x = torch.randn(n, 3, size, size)
        torch.testing.assert_close(compiled(x), model(x))


def run_network(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of a training step and of an evaluation."""
    model.train()
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    found = [out.detach(), x.grad, *(p.grad for p in model.parameters())]
    with torch.no_grad():
        found.append(model.eval()(x))
    return found + [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("frozen", [False, True])
def test_watched_or_not(frozen: bool) -> None:
    """Where a mode watches, it sees each stage as one operation; where none does, the same bits."""
    torch.manual_seed(0)
    model = memdense.DenseNet(6, (2, 3), 8, num_classes=5, drop_rate=0.3)
    if frozen:
        model.features.denseblock1.requires_grad_(False)
        model.features.norm0.eval()
        model.features.norm0.train = lambda mode=True: None
    x = torch.randn(2, 3, 64, 48)
    twin = copy.deepcopy(model)
    refuse = mock.Mock(side_effect=AssertionError("the operation was called"))
    names = "stage", "stage_backward", "stem", "stem_backward", "update_running_statistics"
    with mock.patch.multiple(ops, **dict.fromkeys(names, refuse)):
        direct = run_network(model, x)
    with Calls() as calls:
        watched = run_network(twin, x)
    for a, b in zip(direct, watched, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    stages = 2
    expected = {"stage": 2 * stages, "stage_backward": stages, "stem": 2, "stem_backward": 1}
    for name, count in expected.items():
        assert calls.names.count(f"memdense::{name}") == count
    assert calls.names.count("memdense::update_running_statistics") == stages + (not frozen)


def test_a_tensor_that_its_memory_does_not_show() -> None:
    """A view with the sign turned round: the dispatcher knows, a kernel does not."""
    x = torch.view_as_complex(torch.randn(2, 2)).conj().imag
    assert x.is_neg() and watched(x) and not watched(x.resolve_neg())


def test_a_mode_in_backward_alone() -> None:
    model = memdense.DenseNet(6, (2, 3), 8, num_classes=5)
    loss = model(torch.randn(2, 3, 64, 64)).sum()
    with Calls() as calls:
        loss.backward()
    assert calls.names.count("memdense::stage_backward") == 2
    assert calls.names.count("memdense::stem_backward") == 1
