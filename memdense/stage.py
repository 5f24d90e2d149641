"""From modules to operations: how a stack's children run together, and running them."""

from collections.abc import Callable, Container, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import joint, ops
from .buffers import CHANNELS_LAST, reader_columns
from .convolution import layout_of
from .direct import autocast, autocast_dtype, digits_lost, foreign
from .spec import Stage, StemSpec, output_length, reads_of
from .structure import (
    CONVOLUTIONS,
    MAX_POOLS,
    NORMS,
    Moving,
    Snapshot,
    StageModules,
    StemModules,
    article,
    convolution_dtype_fits,
    global_hooks,
    misfit,
    stands_beside,
)


class Step(NamedTuple):
    """Children of a feature stack that run together: a "stem", a "stage" (block and tail), a "tail"
    of its own or a single "module".
    """

    kind: str
    names: tuple[str, ...]
    tail: str | None = None


def is_block(module: nn.Module | None) -> bool:
    """Whether all children of ``module`` are built like dense layers."""
    return bool(_children(module)) and all(map(_is_layer, module._modules.values()))


def _is_layer(module: nn.Module | None) -> bool:
    children = _children(module)
    inner = module._modules["layers"] if "layers" in children else None
    return {"norm1", "conv1"} <= (children if inner is None else _children(inner))


def is_transition(module: nn.Module | None) -> bool:
    return {"norm", "conv"} <= _children(module)


def _children(module: nn.Module | None) -> set[str]:
    """Their names; a scripted module's are none of ours."""
    none = module is None or isinstance(module, torch.jit.ScriptModule)
    return set() if none else set(module._modules)


def steps_of(
    children: dict[str, nn.Module], last_tail: str | None, types: Container[type]
) -> Iterator[Step]:
    """How a stack's children run together. ``last_tail``: what becomes of a final norm ("norm",
    "pool" or nothing). ``types``: classes that compute what they look like.
    """
    names = list(children)
    i = _stem_length(list(children.values()))
    if i:
        yield Step("stem", tuple(names[:i]))
    while i < len(names):
        here, following = names[i], names[i + 1] if i + 1 < len(names) else None
        i += 1
        if not is_block(children[here]):
            alone = is_transition(children[here]) and type(children[here]) in types
            yield Step("tail", (here,), "transition") if alone else Step("module", (here,))
        elif following and is_transition(children[following]):
            yield Step("stage", (here, following), "transition")
            i += 1
        elif following and isinstance(children[following], NORMS) and i + 1 == len(names):
            # without a last tail the norm's output is nobody's
            yield Step("stage", (here, following) if last_tail else (here,), last_tail)
            i += 1
        else:
            yield Step("stage", (here,))


def _stem_length(modules: list[nn.Module]) -> int:
    """How many of a stack's modules are its stem, or what stands in its place."""
    blocks = [i for i, module in enumerate(modules) if is_block(module)]
    before = modules[: blocks[0]] if blocks else modules
    if len(before) < 3 or not isinstance(before[0], CONVOLUTIONS):
        return 0
    size = 4 if isinstance(before[2], nn.ReLU) else 3
    if (
        isinstance(before[1], NORMS)
        and len(before) >= size
        and isinstance(before[size - 1], MAX_POOLS)
    ):
        return size
    return len(before) if len(before) <= 4 and len(before) < len(modules) else 0


def apart(step: Step) -> list[Step]:
    """A block and its tail as steps of their own."""
    if step.kind != "stage" or step.tail is None:
        return [step]
    block, tail = step.names
    return [Step("stage", (block,)), Step("tail", (tail,), step.tail)]


# what was read of a module and those behind it, while it lives
Readings = WeakKeyDictionary[nn.Module, dict[tuple, tuple[Snapshot, Any]]]


def read_once(
    readings: Readings,
    owner: nn.Module,
    key: tuple,
    modules: Sequence[nn.Module],
    read: Callable[[], Any],
) -> Any:
    """What ``read()`` finds in ``modules``, or found last if nothing changed since, which
    ``readings`` keep with their ``owner``. ``key`` says what else it depends on.
    """
    if torch.compiler.is_compiling():
        return read()  # guards look for changes
    known = readings.setdefault(owner, {})
    snapshot, found = known.get(key, (None, None))
    if snapshot is None or global_hooks() or not snapshot.holds(modules):
        found = read()
        for other, (old, _) in list(known.items()):  # other threads read, too
            if not old.current():
                known.pop(other, None)  # it would hold what was replaced
        if snapshot := Snapshot.of(modules):
            known[key] = snapshot, found
    return found


def obstacle_now(x: Tensor, found: StageModules | StemModules) -> str:
    """Why modules must run that could do without: a parameter or an x that carries out operations
    itself; a norm that does not stand beside what autocast convolves; an x of which modules would
    keep more digits than it leaves a convolution.
    """
    stem = isinstance(found, StemModules)
    if foreign(x):  # made of such a parameter, ahead of here
        return f"what comes in is {article(type(x).__name__)}, which carries out operations itself"
    for t in (found.weight, *found.norm[1:]) if stem else found.tensors:
        if foreign(t):
            return (
                f"a parameter is {article(type(t).__name__)}, which carries out operations itself"
            )
    dtype = autocast_dtype(x.device)
    if dtype is None or x.dtype == torch.float64:
        return ""
    for other in found.narrow - {dtype}:
        return f"autocast convolves in {dtype}, but a parameter is {other}"
    return widened(x.device, found) or ("" if stem else digits_lost(x))


def widened(device: torch.device, found: StageModules | StemModules) -> str:
    """That autocast would have a pool give float32, which it does on a CPU; empty if not."""
    stem = isinstance(found, StemModules)
    if device.type != "cpu" or (found.weight.dim() - 2 if stem else found.axes) != 3:
        return ""
    if stem:
        return "autocast on a CPU takes maxima of volumes in float32"
    tail = found.stage.tail
    averages = tail is not None and tail.spec.pool == 2
    return "autocast on a CPU averages volumes in float32" if averages else ""


def fits(x: Tensor, found: StageModules) -> bool:
    """Whether the stage can take x; where it cannot, the modules say why."""
    stage = found.stage
    if not stage.layers and stage.tail.conv is None:
        # a final norm alone: no convolution was there to compare it with
        own = *found.tensors, *found.running, *found.moving.means, *found.moving.variances
        if not all(
            len(t) == x.shape[1] and t.device == x.device and stands_beside(t, x) for t in own
        ):
            return False
    weights = [conv for *_, conv in reads_of(stage) if conv is not None]
    return not misfit(x, found) and convolution_dtype_fits(x, weights)


def rectified_mean(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, C), x rectified in place, as torchvision does it: who watches the norm
    sees the same.
    """
    volumes = isinstance(x, Tensor) and x.dim() == 5  # not what torch.fx writes down
    pool = F.adaptive_avg_pool3d if volumes else F.adaptive_avg_pool2d
    return torch.flatten(pool(F.relu(x, inplace=True), 1), 1)


def run_modules(x: Tensor, modules: Sequence[nn.Module], step: Step) -> tuple[Tensor, Tensor]:
    """(output, block's features) of a stage or tail as modules."""
    first, *rest = modules
    out = features = first(x)
    for module in rest:
        out = module(features)
    return (rectified_mean(out) if step.tail == "pool" else out), features


def run_stage(
    x: Tensor, found: StageModules, double_backward: bool, layout: torch.memory_format
) -> tuple[Tensor, Tensor]:
    """Run a stage's operation and move its running statistics once: (output, block's features).

    ``layout`` is that of what modules would convolve, by which dropout is drawn.
    """
    stage = found.stage
    mask = _draw_mask(x, stage, found.drop_channels, layout)

    def update(statistics: Tensor) -> None:
        columns = list(reader_columns(stage, x.shape[1])[0].values())
        starts = [columns[i].start for i in found.moving.which]
        rows = x.shape[0] * prod(x.shape[2:])
        _update(found.moving, statistics, starts, rows, stage.group)

    out, features = ops.run_stage(
        x, found.tensors, found.running, mask, found.spec, double_backward,
        update if found.moving.which else None,
    )  # fmt: skip
    return (features if stage.tail is None else out), features


def _draw_mask(
    x: Tensor, stage: Stage, channels: bool, layout: torch.memory_format
) -> Tensor | None:
    """Dropout's mask, (M, L*k) bool, drawn layer by layer as ``F.dropout`` would draw it, or
    ``F.dropout2d`` (``3d``) for whole ``channels``.
    """
    if stage.drop_rate == 0:
        return None
    n, _, *size = x.shape
    format_last = CHANNELS_LAST[x.dim()]
    masks = []
    for layer in stage.layers:
        weight = layer.conv1 if layer.conv2 is None else layer.conv2
        last = format_last in (layout, layout_of(weight))  # of whole channels either is the same
        new = torch.empty(
            (n, layer.growth, *([1] * len(size) if channels else size)),
            dtype=x.dtype, device=x.device,
            memory_format=format_last if last else torch.contiguous_format,
        )  # fmt: skip
        if stage.drop_rate >= 1:  # nothing is drawn
            kept = torch.zeros_like(new, dtype=torch.bool)
        elif channels or x.device.type == "cpu":
            kept = new.bernoulli_(1 - stage.drop_rate).bool()
        else:
            kept = torch.native_dropout(new, stage.drop_rate, True)[1]
        kept = kept.expand(n, layer.growth, *size)
        masks.append(kept.movedim(1, -1).reshape(n * prod(size), layer.growth))
    return torch.cat(masks, 1)


def _update(moving: Moving, statistics: Tensor, starts: list[int], rows: int, group: str) -> None:
    """Move the running statistics of norms whose batch statistics begin at columns ``starts``."""
    means, variances, counts, momenta, _ = moving
    with torch.no_grad():
        if group:
            statistics, rows = joint.as_of_two(statistics), 2
        ops.move_running_statistics(means, variances, counts, statistics, starts, momenta, rows)


def run_stem(x: Tensor, found: StemModules, recompute: bool) -> Tensor | None:
    """The stem's output; None where the modules must run, which say why."""
    weight = found.weight
    size = list(map(output_length, x.shape[2:], weight.shape[2:], *found.geometry))
    rows = x.shape[0] * prod(size)
    if (
        x.dim() != weight.dim()
        or x.shape[1] != weight.shape[1]
        or x.device != weight.device
        or not convolution_dtype_fits(x, [weight])
        or min(size) <= 0
        or (rows == 1 and found.norm.spec.batch and not found.group)
    ):
        return None
    (x,) = autocast(x)
    return _run_stem(x, found, recompute, rows)


def _run_stem(x: Tensor, found: StemModules, recompute: bool, rows: int) -> Tensor:
    """Run the stem's operation and move its running statistics once."""
    norm = found.norm
    spec = StemSpec(norm.spec, *found.geometry, recompute, found.group)

    def update(statistics: Tensor) -> None:
        _update(found.moving, statistics, [0], rows, found.group)

    return ops.run_stem(
        x, found.weight, *norm[1:], spec=spec.encode(),
        update=update if found.moving.which else None,
    )  # fmt: skip
