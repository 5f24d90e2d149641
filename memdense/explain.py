"""Which path each part of a model takes, and why not the fast one where not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from math import prod

import torch
from torch import Tensor, nn

from . import _extension, ops
from .backends import Reference, triton_reason
from .convert import ONE_BY_ONE, as_features, find_stacks, own_forward, parts, refusal
from .direct import autocast_dtype, foreign
from .features import Features, RunsAlone, Switches, read_alone
from .modules import OWN_TYPES
from .spec import output_length, per_axis
from .stage import Step, apart, obstacle_now, widened
from .structure import CONVOLUTIONS, NORMS, POOLS, article, class_of


@dataclass(frozen=True)
class Row:
    """A part of a feature stack: its stem, a dense block with its tail, or modules between them.

    Attributes:
        stack: the stack's name in the model.
        modules: names of the stack's children that run together.
        layers: dense layers among them.
        efficient: whether they run as one operation, or else as plain modules.
        backend: what runs the operation; empty for plain modules.
        switches: the switches that are on and matter here.
        why: why they run as plain modules; empty where efficient.
    """

    stack: str
    modules: tuple[str, ...]
    layers: int
    efficient: bool
    backend: str
    switches: tuple[str, ...]
    why: str

    @property
    def path(self) -> str:
        return "efficient" if self.efficient else "plain modules"


@dataclass(frozen=True, repr=False)
class Explanation:
    """What :func:`explain` found; prints as a table.

    Attributes:
        rows: the parts, in the order in which they run.
        notes: sentences on the machine and, where one was given, on the input.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        several = len({row.stack for row in self.rows}) > 1
        lines = [("part", "layers", "path", "backend", "switches", "why not efficient")]
        for row in self.rows:
            names = row.modules
            part = " + ".join(names) if len(names) <= 2 else f"{names[0]} .. {names[-1]}"
            lines.append(
                (
                    f"{row.stack}: {part}" if several else part,
                    str(row.layers or "-"),
                    row.path,
                    row.backend or "-",
                    ", ".join(row.switches) or "-",
                    row.why or "-",
                )
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = (
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        return "\n".join([*table, "", *self.notes])

    __repr__ = __str__


def explain(model: nn.Module, input: Tensor | None = None) -> Explanation:
    """How ``model`` would run now: part by part, on what, and why not efficiently where not.

    Decided as at run time, from the modules as they are, without running or changing them.

    Args:
        model: any module that contains a DenseNet, converted or not.
        input: images (N, C, H, W), or volumes, as the feature stacks get them. With them the notes
            on a stack that runs as a whole tell what only an input decides: autocast, tracing, an
            empty batch, a block left with one value per channel.

    Raises:
        TypeError: for a scripted or traced model, no module at all, or an input that is no tensor.
        ValueError: if no module inside holds dense blocks.
    """
    if input is not None and not isinstance(input, Tensor):
        raise TypeError(f"expected input to be a Tensor, but got {type(input).__name__}")
    rows: list[Row] = []
    notes: list[str] = []
    for name, stack in find_stacks(model):
        found = list(_rows(name, stack))
        rows += found
        notes += [f"{name}: {note}" for note in _stack_notes(stack)]
        efficient = isinstance(stack, Features) and any(row.efficient for row in found)
        if input is not None and efficient:
            notes += [f"{name}: {note}" for note in _input_notes(stack, input)]
    instructions = _extension.instructions()
    extension = f"available, {instructions}" if instructions else _extension.reason()
    notes += [f"compiled extension: {extension}", f"Triton: {_triton(model)}"]
    if cuda := next((p.device for p in model.parameters() if p.is_cuda), None):
        notes.append(f"3x3 in CUDA C++: {_extension.cuda_unfit(cuda) or 'available'}")
    return Explanation(tuple(rows), tuple(notes))


def _rows(name: str, stack: nn.Module) -> Iterator[Row]:
    if isinstance(stack, Features):
        features, found = stack, parts(stack)
    else:
        features = as_features(stack)
        found = parts(features, alone=True)
        if any(isinstance(child, RunsAlone) for child in stack.children()):
            found = [(piece, reason) for part, reason in found for piece in apart(part)]
    first = next(stack.parameters())
    backend = _backend(first.device, first.dtype)
    for between, group in groupby(found, lambda found: found[0].kind == "module"):
        if between:
            names = tuple(part.names[0] for part, _ in group)
            yield Row(
                name, names, 0, False, "", (), "neither a dense block nor a stem of one convolution"
            )
            continue
        for part, reason in group:
            first = features._modules[part.names[0]]
            layers = len(first._modules) if part.kind == "stage" else 0
            switches = _switches_of(stack, first)
            if switches and features is not stack:  # a block trusts what it was converted with
                reason = read_alone(first, part.names[0], switches)[1]
            if why := reason or _off(stack, switches):
                yield Row(name, part.names, layers, False, "", (), why)
            else:
                yield Row(name, part.names, layers, True, backend, _on(switches, part), "")


def _backend(device: torch.device, dtype: torch.dtype) -> str:
    """The name of what runs values of ``dtype``."""
    backend = ops.backend_for(device)
    own = backend.dtypes is None or dtype in backend.dtypes
    return backend.name if own else Reference.name


def _switches_of(stack: nn.Module, first: nn.Module) -> Switches | None:
    """That decide how a part runs, whose first module is given; None if it was not converted."""
    own = first._switches if isinstance(first, RunsAlone) else None
    if isinstance(stack, Features) and (own is None or class_of(first) in stack._switches.types):
        return stack._switches
    return own


def _off(stack: nn.Module, switches: Switches | None) -> str:
    """Why nothing runs efficiently there."""
    if switches is None:
        return "not converted"
    if isinstance(stack, Features) and "forward" in stack.__dict__:
        return "the stack's forward was replaced on the instance"
    return "" if switches.efficient else "switched off: efficient is False"


def _on(switches: Switches, step: Step) -> tuple[str, ...]:
    relevant = (
        ("recompute_stem",) if step.kind == "stem" else ("keep_bottlenecks", "double_backward")
    )
    return tuple(name for name in relevant if getattr(switches, name))


def _stack_notes(stack: nn.Module) -> Iterator[str]:
    parameters = {(str(p.device), str(p.dtype).removeprefix("torch.")) for p in stack.parameters()}
    mode = "training" if stack.training else "evaluation"
    yield f"{mode} mode, {' and '.join(' '.join(p) for p in sorted(parameters))}"
    for kind in sorted({type(p).__name__ for p in stack.parameters() if foreign(p)}):
        yield f"a parameter is {article(kind)}: plain modules, unless FSDP gathers it for forward"
    if isinstance(stack, Features):
        first = next(stack.parameters())
        own = _backend(first.device, first.dtype) != Reference.name
        if own and any(isinstance(module, nn.Conv3d) for module in stack.modules()):
            yield "of volumes: kernels take their planes; in 16 bits PyTorch convolves them forward"
        if stack._switches.types != OWN_TYPES:  # another model's, whose forward may do anything
            yield ONE_BY_ONE
    elif len(stack._modules) == 1 and isinstance(next(stack.children()), RunsAlone):
        return
    elif reason := own_forward(stack):
        yield f"{reason}: memdense.convert changes only its dense blocks"
    else:
        reason = refusal(stack)
        verdict = f"leaves it alone: {reason}" if reason else "converts it, if its check passes"
        yield f"memdense.convert {verdict}"


def _input_notes(features: Features, x: Tensor) -> Iterator[str]:
    if reason := features._switches.obstacle(x):
        yield f"with this input all run as plain modules: {reason}"
        return
    if dtype := autocast_dtype(x.device):
        yield f"under autocast, in {dtype}, by the {_backend(x.device, dtype)} backend"
    for names, reason in _obstacles(features, x):
        verb = "runs" if len(names) == 1 else "run"
        yield f"{' and '.join(names)} {verb} as plain modules: {reason}"
    for name, size in _block_sizes(features, x):
        norms = (m for m in features._modules[name].modules() if isinstance(m, NORMS))
        if x.shape[0] * prod(size) == 1 and any(norm.training for norm in norms):
            yield f"{name} gets one value per channel, which BatchNorm refuses in training"


def _obstacles(features: Features, x: Tensor) -> Iterator[tuple[Sequence[str], str]]:
    """Parts that run as plain modules for what comes in, and why, as far as that is known."""
    dtype, came = autocast_dtype(x.device), x.new_empty(0)
    for step in features.steps("norm"):
        for part, found, _ in features.parts(step):
            module, reason = features._modules[part.names[0]], ""
            if found is not None:
                if reason := obstacle_now(came, found):
                    yield part.names, reason
            elif not isinstance(module, (nn.Identity, *CONVOLUTIONS)):
                return
            if dtype is None or x.dtype == torch.float64:
                continue
            # as a block of plain modules hands on what came in, among its features
            keeps = isinstance(module, nn.Identity) or (reason and part.tail is None)
            if reason and widened(x.device, found):
                came = came.float()
            elif not keeps:
                came = came.to(dtype)


def _block_sizes(features: Features, x: Tensor) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name of each dense block with the size of what it gets, as far as they are known."""
    size: tuple[int, ...] | None = tuple(x.shape[2:])
    for step in features.steps("norm"):
        for name in step.names:
            if step.kind == "stage" and name == step.names[0]:
                yield name, size
            else:
                size = size_after(features._modules[name], size)
            if size is None:
                return


def size_after(module: nn.Module, size: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if size is None or isinstance(module, (*NORMS, nn.ReLU, nn.Identity)):
        return size
    if isinstance(module, nn.Sequential):
        for child in module:
            size = size_after(child, size)
        return size
    known = isinstance(module, (*CONVOLUTIONS, *POOLS))
    if not known or isinstance(module.padding, str) or getattr(module, "ceil_mode", False):
        return None
    dilation = getattr(module, "dilation", 1)
    numbers = module.kernel_size, module.stride, module.padding, dilation
    geometry = (per_axis(n, len(size)) for n in numbers)
    return tuple(map(output_length, size, *geometry))


def _triton(model: nn.Module) -> str:
    """Whether Triton's kernels run where the model is, or why not."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    if not devices:
        return "available, for CUDA devices" if find_spec("triton") else "not installed"
    reasons = {reason for device in devices if (reason := triton_reason(device))}
    if reasons:
        return f"not used: {' and '.join(sorted(reasons))}"
    if any(p.dtype == torch.float64 for p in model.parameters()):
        return "available; what is float64 runs as PyTorch operations"
    return "available"
