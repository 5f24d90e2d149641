"""From modules to operations: a stack of DenseNet features that runs stage by stage where its
modules allow it.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin

from . import ops
from .backends import warn_plain
from .buffers import reader_columns
from .convolution import layout_of
from .direct import autocast, autocast_dtype, transformed
from .spec import Stage, StemSpec
from .structure import (
    OWN_TYPES,
    Moving,
    Snapshot,
    StageModules,
    StemModules,
    Unsupported,
    article,
    check,
    check_global_hooks,
    convolution_dtype_fits,
    global_hooks,
    misfit,
    read_stage,
    read_stem,
    read_tail,
)

_TRANSFORMED = "torch.func's transforms and forward-mode AD need operations of their own"


class Step(NamedTuple):
    """Children of a feature stack that run together: a "stem", a "stage" (block and tail), a "tail"
    of its own or a single "module".
    """

    kind: str
    names: tuple[str, ...]
    tail: str | None = None


# what was read of each one's steps, while it lives: a module itself may be copied and saved
_readings: WeakKeyDictionary[nn.Module, dict[tuple, tuple[Snapshot, Any]]] = WeakKeyDictionary()


class Features(nn.Sequential):
    """The feature stack of a DenseNet, from the first convolution to the last norm.

    A ``Sequential`` in every respect; with ``efficient`` its blocks share one buffer each and their
    norms, activations and bottlenecks are recomputed in backward. What cannot run so runs as plain
    modules, with one warning that says why. The switches are attributes and may be changed at any
    time.

    Args:
        *args: as for ``Sequential``.
        efficient, keep_bottlenecks, recompute_stem, double_backward: see
            :class:`memdense.DenseNet`.
    """

    def __init__(
        self,
        *args: Any,
        efficient: bool = True,
        keep_bottlenecks: bool = False,
        recompute_stem: bool = True,
        double_backward: bool = False,
    ) -> None:
        super().__init__(*args)
        self._switches(efficient, keep_bottlenecks, recompute_stem, double_backward)

    def _switches(
        self, efficient: bool, keep_bottlenecks: bool, recompute_stem: bool, double_backward: bool
    ) -> None:
        self.efficient = bool(efficient)
        self.keep_bottlenecks = bool(keep_bottlenecks)
        self.recompute_stem = bool(recompute_stem)
        self.double_backward = bool(double_backward)
        self._types = OWN_TYPES
        self._warned: set[str] = set()

    def __getitem__(self, index: int | slice) -> nn.Module:
        """As a ``Sequential``'s; a slice keeps the switches and shares what was read and said."""
        found = super().__getitem__(index)
        if isinstance(index, slice):
            found._switches(
                self.efficient, self.keep_bottlenecks, self.recompute_stem, self.double_backward
            )
            found._types, found._warned = self._types, self._warned
            # a slice may be made at every call
            _readings[found] = _readings.setdefault(self, {})
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to the last norm's output, (N, C, H', W'), in the memory format that the
        modules would give it.
        """
        if not self._runs_efficiently(x):
            return super().forward(x)
        layout = self._layout(x)
        out = self._run(x, self._steps("norm"), layout)[0]
        return out.contiguous(memory_format=layout)

    def pooled(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to the mean over each image of the rectified last norm: (N, C)."""
        if self._runs_efficiently(x):
            steps = self._steps("pool")
            if steps[-1].tail == "pool":
                return self._run(x, steps, self._layout(x))[0]
        return _mean(F.relu(self(x), inplace=True))

    def block_outputs(self, x: Tensor) -> list[Tensor]:
        """(N, C_in, H, W) to the output of each dense block, from which the later ones are computed
        (to autograd too). Where the block ran efficiently it is channels last: the block's buffer.
        """
        if self._runs_efficiently(x):
            return self._run(x, _apart(self._steps(None)), self._layout(x))[1]
        outputs = []
        for step in self._steps(None):
            for name in step.names:
                x = self._modules[name](x)
                if step.kind == "stage" and name == step.names[0]:
                    outputs.append(x)
        return outputs

    def _runs_efficiently(self, x: Tensor) -> bool:
        reason = self._obstacle(x)
        if reason == _TRANSFORMED:
            warn_plain("the whole model", reason, self._warned)
        return not reason

    def _obstacle(self, x: Any) -> str:
        """Why all runs as plain modules with this input; empty where it need not."""
        if not self.efficient:
            return "efficient is False"
        if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
            return "tracing"
        if transformed():
            return _TRANSFORMED
        # modules say best what is wrong with an input, and do with an empty one what they do
        if not isinstance(x, Tensor):
            return f"it is {article(type(x).__name__)}"
        if x.dim() != 4 or not x.is_floating_point() or not x.numel():
            return f"{x.dtype} of shape {tuple(x.shape)}"
        return ""

    def _steps(self, last_tail: str | None) -> list[Step]:
        """How the children run together. ``last_tail``: what becomes of a final norm ("norm",
        "pool" or nothing).
        """
        return list(_steps(self._modules, last_tail))

    def _layout(self, x: Tensor) -> torch.memory_format:
        """Of the modules' activations: a convolution's output is channels last if its images or
        its weight are.
        """
        first = next(iter(self._modules.values()), None)
        known = isinstance(first, nn.Conv2d) and not isinstance(first, LazyModuleMixin)
        # not by its name: a parametrization would compute it once more
        weight = first._parameters.get("weight") if known else None
        formats = [layout_of(t) for t in (x, weight) if t is not None]
        return torch.channels_last if torch.channels_last in formats else torch.contiguous_format

    def _run(
        self, x: Tensor, steps: Iterable[Step], layout: torch.memory_format
    ) -> tuple[Tensor, list[Tensor]]:
        outputs = []
        for step in steps:
            modules = {name: self._modules[name] for name in step.names}
            if step.kind == "module":
                x = modules[step.names[0]](x)
                continue
            try:
                found = self.read(step)
                if step.kind != "stem":
                    _check_autocast(x)
            except Unsupported as reason:
                warn_plain(" and ".join(step.names), str(reason), self._warned)
                found = None
            if step.kind == "stem":
                x = _stem_or_modules(x, found, modules, self.recompute_stem)
                continue
            if found is None or not _fits(x, found):
                # modules see, and draw dropout in, the layout the caller's images have
                x, features = _run_modules(x.contiguous(memory_format=layout), modules, step.tail)
            else:
                x, features = run_stage(x, found, self.double_backward, layout)
            if step.kind == "stage":
                outputs.append(features)
        return x, outputs

    def read(self, step: Step) -> StageModules | StemModules:
        """The modules of a step, as operations take them. Raises ``Unsupported`` where they must
        run as modules.
        """
        keep = self.keep_bottlenecks and torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            return self._read(step, keep)  # guards look for changes
        modules = [self._modules[name] for name in step.names]
        known, key = _readings.setdefault(self, {}), (step, self._types, keep)
        snapshot, found = known.get(key, (None, None))
        if snapshot is not None and (global_hooks() or not snapshot.holds(modules)):
            known.clear()  # what was replaced is held by nobody
            snapshot = None
        if snapshot is None:
            found = self._read(step, keep)
            if snapshot := Snapshot.of(modules):
                known[key] = snapshot, found
        return found

    def _read(self, step: Step, keep_bottlenecks: bool) -> StageModules | StemModules:
        if step.kind == "stem":
            return read_stem({name: self._modules[name] for name in step.names})
        if step.kind == "tail":
            (name,) = step.names
            return read_tail(self._modules[name], name, step.tail or "", self._types)
        name, *tail = step.names
        tail_name = tail[0] if tail else ""
        return read_stage(
            self._modules[name],
            name,
            self._modules.get(tail_name),
            tail_name,
            step.tail or "",
            self._types,
            keep_bottlenecks,
        )


def is_block(module: nn.Module) -> bool:
    """Whether all children of ``module`` are built like dense layers."""
    return len(module._modules) > 0 and all(map(_is_layer, module._modules.values()))


def _is_layer(module: nn.Module | None) -> bool:
    if module is None or isinstance(module, torch.jit.ScriptModule):
        return False
    inner = module._modules.get("layers")
    return {"norm1", "conv1"} <= set((module if inner is None else inner)._modules)


def is_transition(module: nn.Module) -> bool:
    return {"norm", "conv"} <= set(module._modules)


def _steps(children: dict[str, nn.Module], last_tail: str | None) -> Iterator[Step]:
    names = list(children)
    i = 0
    if len(names) > 3 and isinstance(children[names[1]], nn.BatchNorm2d):
        size = 4 if isinstance(children[names[2]], nn.ReLU) else 3
        if isinstance(children[names[0]], nn.Conv2d) and isinstance(
            children[names[size - 1]], nn.MaxPool2d
        ):
            yield Step("stem", tuple(names[:size]))
            i = size
    while i < len(names):
        here, following = names[i], names[i + 1] if i + 1 < len(names) else None
        i += 1
        if not is_block(children[here]):
            yield Step("module", (here,))
        elif following and is_transition(children[following]):
            yield Step("stage", (here, following), "transition")
            i += 1
        elif following and isinstance(children[following], nn.BatchNorm2d) and i + 1 == len(names):
            # without a last tail the norm's output is nobody's
            yield (
                Step("stage", (here, following), last_tail) if last_tail else Step("stage", (here,))
            )
            i += 1
        else:
            yield Step("stage", (here,))


def _apart(steps: list[Step]) -> Iterator[Step]:
    """Blocks and their tails as steps of their own."""
    for step in steps:
        if step.kind != "stage" or step.tail is None:
            yield step
        else:
            block, tail = step.names
            yield Step("stage", (block,))
            yield Step("tail", (tail,), step.tail)


def pools_unseen(features: nn.Module) -> bool:
    """Whether a model may call ``features.pooled`` in place of the module: it runs efficiently and
    nothing hangs on the call.
    """
    try:
        check_global_hooks()
        check(features, "features", (Features,), "a Features")
    except Unsupported:
        return False
    return features.efficient and features.__dict__.get("_compiled_call_impl") is None


def _check_autocast(x: Tensor) -> None:
    """Raise ``Unsupported`` where modules would keep more of x's digits than autocast leaves a
    convolution.
    """
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.dtype not in (dtype, torch.float64):
        raise Unsupported(f"autocast convolves in {dtype}, but what comes in is {x.dtype}")


def _mean(features: Tensor) -> Tensor:
    return torch.flatten(F.adaptive_avg_pool2d(features, (1, 1)), 1)


def _fits(x: Tensor, found: StageModules) -> bool:
    """Whether the stage can take x; where it cannot, the modules say why."""
    layers, tail = found.stage.layers, found.stage.tail
    weights = [w for layer in layers for w in (layer.conv1, layer.conv2) if w is not None]
    if not layers and tail.conv is not None:
        weights.append(tail.conv)
    return not misfit(x, found.stage) and convolution_dtype_fits(x, weights)


def _run_modules(
    x: Tensor, modules: dict[str, nn.Module], tail: str | None
) -> tuple[Tensor, Tensor]:
    """(output, block's features) of a block and its tail, or of one of them, as modules."""
    block, *rest = modules.values()
    features = block(x)
    if not rest:
        return features, features
    out = rest[0](features)
    # in place, as torchvision does it: who watches the norm sees the same
    return (_mean(F.relu(out, inplace=True)) if tail == "pool" else out), features


def run_stage(
    x: Tensor, found: StageModules, double_backward: bool, layout: torch.memory_format
) -> tuple[Tensor, Tensor]:
    """Run a stage's operation and move its running statistics once: (output, block's features).

    ``layout`` is that of the modules' activations, in which dropout is drawn.
    """
    stage = found.stage
    mask = _draw_mask(x, stage, layout)

    def update(statistics: Tensor) -> None:
        columns = list(reader_columns(stage, x.shape[1])[0].values())
        starts = [columns[i].start for i in found.moving.which]
        _update(found.moving, statistics, starts, x.shape[0] * x.shape[2] * x.shape[3])

    out, features = ops.run_stage(
        x, found.tensors, found.running, mask, found.spec, double_backward,
        update if found.moving.which else None,
    )  # fmt: skip
    return (features if stage.tail is None else out), features


def _draw_mask(x: Tensor, stage: Stage, layout: torch.memory_format) -> Tensor | None:
    """Dropout's mask, (M, L*k) bool, drawn as ``F.dropout`` would draw it layer by layer."""
    if stage.drop_rate == 0:
        return None
    n, _, h, w = x.shape
    masks = []
    for layer in stage.layers:
        new = torch.empty(
            (n, layer.growth, h, w), dtype=x.dtype, device=x.device, memory_format=layout
        )
        if stage.drop_rate >= 1:  # nothing is drawn
            kept = torch.zeros_like(new, dtype=torch.bool)
        elif x.device.type == "cpu":
            kept = new.bernoulli_(1 - stage.drop_rate).bool()
        else:
            kept = torch.native_dropout(new, stage.drop_rate, True)[1]
        masks.append(kept.permute(0, 2, 3, 1).reshape(n * h * w, layer.growth))
    return torch.cat(masks, 1)


def _update(moving: Moving, statistics: Tensor, starts: list[int], rows: int) -> None:
    """Move the running statistics of norms whose batch statistics begin at columns ``starts``."""
    means, variances, counts, momenta, _ = moving
    with torch.no_grad():
        ops.move_running_statistics(means, variances, counts, statistics, starts, momenta, rows)


def _stem_or_modules(
    x: Tensor, found: StemModules | None, modules: dict[str, nn.Module], recompute: bool
) -> Tensor:
    if found is not None:
        weight = found.conv.weight
        fits = (
            x.shape[1] == weight.shape[1]
            and x.device == weight.device
            and convolution_dtype_fits(x, [weight])
        )
        size = [_convolved(x, found, i) for i in (0, 1)]
        one_value = x.shape[0] * size[0] * size[1] == 1 and found.norm.spec.batch
        if fits and min(size) > 0 and not one_value:
            (x,) = autocast(x)
            return run_stem(x, found, recompute, x.shape[0] * size[0] * size[1])
    for module in modules.values():
        x = module(x)
    return x


def _convolved(x: Tensor, found: StemModules, axis: int) -> int:
    stride, padding, dilation = (numbers[axis] for numbers in found.geometry)
    reach = dilation * (found.conv.weight.shape[2 + axis] - 1)
    return (x.shape[2 + axis] + 2 * padding - reach - 1) // stride + 1


def run_stem(x: Tensor, found: StemModules, recompute: bool, rows: int) -> Tensor:
    """Run the stem's operation and move its running statistics once."""
    conv, norm = found.conv, found.norm
    spec = StemSpec(norm.spec, *found.geometry, recompute)

    def update(statistics: Tensor) -> None:
        _update(found.moving, statistics, [0], rows)

    return ops.run_stem(
        x, conv.weight, *norm[1:], spec=spec.encode(),
        update=update if found.moving.which else None,
    )  # fmt: skip
