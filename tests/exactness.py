"""The rules of exactness, as assertions: which difference between two models is rounding."""

import copy
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memdense import _extension
from memdense.buffers import Into, Reader

BACKENDS = ["reference", "native"] if _extension.available() else ["reference"]
BOUND = 1e-10
FLOOR = 1e-3


@contextmanager
def no_warnings(category: type[Warning] = Warning) -> Iterator[None]:
    """Any warning of the category is an error inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", category)
        yield


def reader_of(scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor) -> Reader:
    """The BatchNorm that has these vectors."""
    eps = 1e-5
    return Reader(mean, rstd**-2 - eps, scale / rstd, shift + mean * scale, eps, True)


def into_of(g: Tensor, seeded: bool = True) -> Into:
    """G with fresh S1 and S2 beside it."""
    acc = torch.promote_types(g.dtype, torch.float32)
    return Into(g, torch.zeros((2, g.shape[1]), dtype=acc, device=g.device), seeded)


def kind(name: str) -> str:
    """What a tensor is, wherever it stands: "conv.weight", "norm.bias"."""
    return re.sub(r"\d+\.", ".", ".".join(name.removesuffix(".grad").split(".")[-2:]))


def assert_close(name: str, found: Tensor, expected: Tensor, floor: float = 0.0) -> None:
    """found is expected within 1e-10 * max(|expected|, floor)."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, name
    assert torch.isfinite(expected).all(), f"{name}: the reference is not finite"
    if expected.numel():
        allowed = BOUND * max(expected.abs().max().item(), floor)
        worst = (found - expected).abs().max().item()
        assert worst <= allowed, f"{name}: off by {worst:.2e}, where {allowed:.2e} is allowed"


def assert_same_tensors(
    found: dict[str, Tensor], expected: dict[str, Tensor], shaken: Sequence[dict[str, Tensor]] = ()
) -> None:
    """Each tensor within 1e-10 of itself or of a thousandth of the RMS of its kind.

    ``shaken``, where given, are the reference's tensors after its input moved by one unit in the
    last place: what that moves by is allowed eight times over.
    """
    assert found.keys() == expected.keys()
    squares: dict[str, list[float]] = defaultdict(list)
    for name, tensor in expected.items():
        squares[kind(name)].append(tensor.double().square().mean().item())
    for name, tensor in expected.items():
        floor = FLOOR * (sum(squares[kind(name)]) / len(squares[kind(name)])) ** 0.5
        for other in shaken:
            floor = max(floor, 8 * (other[name] - tensor).abs().max().item() / BOUND)
        assert_close(name, found[name], tensor, floor)


Step = Callable[[nn.Module, Tensor], Tensor]


def answered(model: nn.Module, x: Tensor) -> Tensor:
    """One forward, answered by random numbers."""
    out = model(x)
    weights = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    (out * weights.to(out)).sum().backward()
    return out


def run(model: nn.Module, x: Tensor, step: Step, input_gradient: bool = True) -> dict[str, Tensor]:
    """All a step leaves: output, input gradient, parameters' gradients and buffers, by name."""
    model.zero_grad()
    x = x.clone().requires_grad_(input_gradient)
    state = torch.get_rng_state()
    left = {"output": step(model, x).detach()}
    torch.set_rng_state(state)
    if x.grad is not None:
        left["input gradient"] = x.grad
    left |= {n + ".grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return left | {n: b.clone() for n, b in model.named_buffers()}


def assert_same_step(
    found: nn.Module,
    expected: nn.Module,
    x: Tensor,
    step: Step = answered,
    input_gradient: bool = True,
) -> None:
    """One step of both models: outputs, input gradient, every parameter's gradient and every buffer
    agree.
    """
    before = copy.deepcopy(expected.state_dict())
    mine, theirs = (run(m, x, step, input_gradient) for m in (found, expected))
    try:
        assert_same_tensors(mine, theirs)
    except AssertionError:
        # a gradient that cancels is rounding in the reference too: see how much
        after = copy.deepcopy(expected.state_dict())
        runs = []
        for _ in range(5):
            expected.load_state_dict(before)
            with torch.no_grad():
                for p in expected.parameters():
                    p.copy_(shake(p))
            runs.append(run(expected, shake(x), step, input_gradient))
        expected.load_state_dict(after)
        assert_same_tensors(mine, theirs, runs)


def shake(t: Tensor) -> Tensor:
    """t with each value moved by one unit in the last place, up or down."""
    return t * (1 + torch.finfo(t.dtype).eps * torch.randn(t.shape).sign().to(t))


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Norms as training leaves them, and harder: some weights zero or negative, biases of both
    signs.
    """

    def draw(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)

    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d):
                if m.affine:
                    m.weight.copy_(1 + 0.7 * draw(m.weight))
                    m.weight[draw(m.weight) > 1.5] = 0
                    m.bias.copy_(0.7 * draw(m.bias))
                if m.track_running_stats:
                    m.running_mean.copy_(0.3 * draw(m.running_mean))
                    m.running_var.copy_((0.3 * draw(m.running_var)).exp())


def twins(expected: nn.Module, found: nn.Module) -> tuple[nn.Module, nn.Module]:
    """``found`` with the weights of ``expected``; returns both, ``found`` first."""
    found.load_state_dict(copy.deepcopy(expected.state_dict()))
    return found, expected


class Calls(TorchDispatchMode):
    """The names of the operations that pass, as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))
