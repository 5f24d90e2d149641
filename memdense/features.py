"""A stack of DenseNet features that runs stage by stage where its modules allow it, and blocks that
run so where they are called alone.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, wraps
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from .backends import warn_plain
from .buffers import CHANNELS_LAST
from .convolution import layout_of
from .direct import foreign, transformed, written_down
from .modules import OWN_TYPES
from .stage import (
    Readings,
    Step,
    apart,
    fits,
    is_block,
    obstacle_now,
    read_once,
    rectified_mean,
    run_modules,
    run_stage,
    run_stem,
    steps_of,
)
from .structure import (
    CONVOLUTIONS,
    StageModules,
    StemModules,
    Unsupported,
    article,
    check,
    check_global_hooks,
    class_of,
    global_hooks,
    read_stage,
    read_stem,
    read_tail,
)

_ALL = "the whole model"


@dataclass(eq=False)
class Switches:
    """What a stack, its slices and its blocks share.

    Attributes:
        efficient, keep_bottlenecks, recompute_stem, double_backward: see
            :class:`memdense.DenseNet`.
        types: classes of blocks, layers and transitions that compute what they look like.
        said: reasons that a warning has given.
        readings: what was read of modules. A table of the process's would keep a model alive that
            its parameters' hooks refer to.
    """

    efficient: bool = True
    keep_bottlenecks: bool = False
    recompute_stem: bool = True
    double_backward: bool = False
    types: frozenset[type] = OWN_TYPES
    said: set[str] = field(default_factory=set)
    readings: Readings = field(default_factory=WeakKeyDictionary)

    def obstacle(self, x: Any) -> str:
        """Why all runs as plain modules with this input; empty where it need not."""
        return self._asked_for(x) or _surprise(x)

    def run_efficiently(self, what: str, x: Any) -> bool:
        """Whether there is no obstacle; a surprising one is told of."""
        if self._asked_for(x):
            return False
        if reason := _surprise(x):
            warn_plain(what, reason, self.said)
        return not reason

    def _asked_for(self, x: Any) -> str:
        """Obstacles that nobody needs to be told of."""
        if not self.efficient:
            return "efficient is False"
        if written_down():
            return "tracing or exporting, to where these operations are not"
        # modules say best what is wrong with an input, and do with an empty one what they do
        if not isinstance(x, Tensor):
            written = isinstance(x, torch.fx.Proxy)
            return "" if written else f"it is {article(type(x).__name__)}"
        if x.is_nested:
            return "a nested tensor"
        if x.dim() not in CHANNELS_LAST or not x.is_floating_point() or not x.numel():
            return f"{x.dtype} of shape {tuple(x.shape)}"
        if x.layout != torch.strided:
            return f"a tensor of layout {x.layout}"
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and x.is_inference():
            return "an inference tensor, which cannot be saved for backward"
        return ""

    def __getstate__(self) -> dict[str, Any]:
        """A copy has not warned yet, and reads for itself."""
        return {k: v for k, v in vars(self).items() if k not in ("said", "readings")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @property
    def keeps(self) -> bool:
        """Whether bottlenecks are kept now."""
        return self.keep_bottlenecks and torch.is_grad_enabled()


def _surprise(x: Tensor) -> str:
    """Why modules must run that the user would not expect to."""
    if transformed():
        return "torch.func's transforms and forward-mode AD need operations of their own"
    if not isinstance(x, Tensor):
        return "torch.fx writes down PyTorch's own operations"
    if foreign(x):
        return f"{article(type(x).__name__)} carries out operations itself"
    return global_hooks() or ""


def _format_of(given: Iterable[Tensor | None], dim: int) -> torch.memory_format:
    """Of what a module makes of images and weights: channels last where one of them is."""
    formats = [layout_of(t) for t in given if t is not None]
    return CHANNELS_LAST[dim] if CHANNELS_LAST[dim] in formats else torch.contiguous_format


def _laid(x: Any, layout: torch.memory_format) -> Any:
    """Images in a memory format; what a module made of them otherwise as it is."""
    if not isinstance(x, Tensor) or x.dim() not in CHANNELS_LAST:
        return x
    suits = layout in (torch.contiguous_format, CHANNELS_LAST[x.dim()])
    return x.contiguous(memory_format=layout) if suits else x


def _switch(name: str) -> property:
    def get(self: "Features") -> bool:
        return getattr(self._switches, name)

    def change(self: "Features", value: bool) -> None:
        setattr(self._switches, name, bool(value))

    return property(get, change)


class Features(nn.Sequential):
    """The feature stack of a DenseNet, from the first convolution to the last norm.

    A ``Sequential`` in every respect; with ``efficient`` its blocks share one buffer each and their
    norms, activations and bottlenecks are recomputed in backward. What cannot run so runs as plain
    modules, with one warning that says why. The switches are attributes and may be changed at any
    time; slices share them.

    Args:
        *args: as for ``Sequential``.
        efficient, keep_bottlenecks, recompute_stem, double_backward: see
            :class:`memdense.DenseNet`.
    """

    efficient = _switch("efficient")
    keep_bottlenecks = _switch("keep_bottlenecks")
    recompute_stem = _switch("recompute_stem")
    double_backward = _switch("double_backward")

    def __init__(
        self,
        *args: Any,
        efficient: bool = True,
        keep_bottlenecks: bool = False,
        recompute_stem: bool = True,
        double_backward: bool = False,
    ) -> None:
        super().__init__(*args)
        self._switches = Switches(
            bool(efficient), bool(keep_bottlenecks), bool(recompute_stem), bool(double_backward)
        )

    def __getitem__(self, index: int | slice) -> nn.Module:
        """As a ``Sequential``'s; a slice shares the switches and what was said."""
        found = super().__getitem__(index)
        if isinstance(index, slice):
            found._switches = self._switches
        return found

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) to the last norm's output, (N, C, H', W'), or volumes to volumes, in the
        memory format that the modules would give it.
        """
        x = input
        if not self._switches.run_efficiently(_ALL, x):
            return super().forward(x)
        steps = self.steps("norm")
        out, features, layout = self._run(x, steps)
        if layout is not None:
            out = _laid(out, layout)
        # behind an Identity in place of the last norm models rectify what a block keeps
        kept = out is features and steps[-1].kind == "module"
        return out.clone() if kept else out

    def pooled(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W), or volumes, to the mean of the rectified last norm over each: (N, C)."""
        if self._switches.run_efficiently(_ALL, x):
            steps = self.steps("pool")
            if steps and steps[-1].tail == "pool":
                return self._run(x, steps)[0]
        return rectified_mean(self(x))

    def block_outputs(self, x: Tensor) -> list[Tensor]:
        """(N, C_in, H, W), or volumes, to the output of each dense block, from which the later ones
        are computed (to autograd too). Where the block ran efficiently it is channels last, the
        block's buffer, unless hooks on it were to see it.
        """
        steps = [part for step in self.steps(None) for part in apart(step)]
        outputs: list[Tensor] = []
        if self._switches.run_efficiently(_ALL, x):
            self._run(x, steps, outputs)
            return outputs
        for step in steps:
            for name in step.names:
                x = self._modules[name](x)
            if step.kind == "stage":
                outputs.append(x)
        return outputs

    def steps(self, last_tail: str | None) -> list[Step]:
        """How the children run together. ``last_tail``: what becomes of a final norm ("norm",
        "pool" or nothing).
        """
        return list(steps_of(self._modules, last_tail, self._switches.types))

    def _layout(self, x: Tensor) -> torch.memory_format:
        """Of the modules' activations: a convolution's output is channels last if its images or
        its weight are.
        """
        weights = self._weights_outside()
        given = [x, next(weights, None)]
        if given[1] is not None and len(given[1]) == 1:
            ahead = next(c for c in self.children() if _convolves(c))
            if not is_block(ahead):
                # PyTorch takes its output, of one channel, for contiguous: the next weight decides
                given = [next(weights, None)]
        return _format_of(given, x.dim())

    def _layout_behind(self, x: Any, layout: torch.memory_format) -> torch.memory_format:
        """Of what follows modules that made ``x``, some of which choose a memory format."""
        if not isinstance(x, Tensor) or x.dim() not in CHANNELS_LAST:
            return layout
        return _format_of([x, next(self._weights_outside(), None)], x.dim())

    def _weights_outside(self) -> Iterator[Tensor | None]:
        """Of convolutions outside dense blocks."""
        # not by their name: a parametrization would compute them once more
        return (
            module._parameters.get("weight")
            for child in self.children()
            if not is_block(child)
            for module in child.modules()
            if isinstance(module, CONVOLUTIONS) and not isinstance(module, LazyModuleMixin)
        )

    def _run(
        self, x: Tensor, steps: Iterable[Step], outputs: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, torch.memory_format | None]:
        """The last step's output, what the last dense block gave (each one's goes to ``outputs``),
        and the memory format that modules would have given the former; None where modules made it.
        """
        features, layout, ours = None, self._layout(x), False
        for step in steps:
            for part, found, reason in self.parts(step):
                modules = [self._modules[name] for name in part.names]
                if part.kind == "stage":
                    features = None  # the block before: its memory is free, if nobody else wants it
                if not isinstance(x, Tensor):
                    found = None  # as a pool's indices beside its output: modules say what is wrong
                if found is not None:
                    reason = obstacle_now(x, found)
                if reason:
                    warn_plain(" and ".join(part.names), reason, self._switches.said)
                    found = None
                if part.kind == "stem":
                    made = found and run_stem(x, found, self.recompute_stem)
                    ours = made is not None
                    if ours:
                        x = made
                    else:
                        for module in modules:
                            x = module(x)
                elif found is not None and fits(x, found):
                    x, made = run_stage(x, found, self.double_backward, layout)
                    ours = True
                else:
                    # modules see, and draw dropout in, the layout that modules ahead would give it
                    x, made = run_modules(_laid(x, layout) if ours else x, modules, part)
                    ours = False
                if not ours:
                    layout = self._layout_behind(x, layout)
                if part.kind == "stage":
                    features = made
                    if outputs is not None:
                        outputs.append(made)
                del made  # which the next part need not keep
        return x, features, layout if ours else None

    def parts(self, step: Step) -> list[tuple[Step, StageModules | StemModules | None, str]]:
        """A step as it runs now, with what was read of it, or why it runs as modules. A block and
        its tail come apart where one of them cannot run efficiently.
        """
        if step.kind == "module":
            return [(step, None, "")]
        try:
            return [(step, self.read(step), "")]
        except Unsupported as reason:
            why = reason.args[0]
        if step.kind != "stage":
            return [(step, None, why)]
        if step.tail:
            block, tail = (self.parts(part)[0] for part in apart(step))
            if block[1] and tail[1]:  # each could, but they do not fit together
                tail = tail[0], None, why
            return [block, tail]
        itself = isinstance(self._modules[step.names[0]], RunsAlone)  # its forward decides again
        return [(step, None, "" if itself else why)]

    def read(self, step: Step) -> StageModules | StemModules:
        """The modules of a step, as operations take them. Raises ``Unsupported`` where they must
        run as modules.
        """
        switches, names, modules = self._switches, step.names, self._modules

        def read() -> StageModules | StemModules:
            if step.kind == "stem":
                return read_stem({name: modules[name] for name in names})
            if step.kind == "tail":
                return read_tail(modules[names[0]], names[0], step.tail, switches.types)
            tail = names[1] if step.tail else ""
            return read_stage(
                modules[names[0]], names[0], modules.get(tail), tail, step.tail or "",
                switches.types, switches.keeps,
            )  # fmt: skip

        key = step, switches.types, switches.keeps
        own = [modules[name] for name in names]
        return read_once(switches.readings, own[0], key, own, read)

    def let_blocks_run_alone(self) -> None:
        """From now on the dense blocks run efficiently where they are called by themselves, too:
        their classes change, the objects do not.
        """
        for name, block in self._modules.items():
            if class_of(block) in self._switches.types and is_block(block):
                block.__class__ = running_alone(type(block))
                block._switches, block._name = self._switches, name


class RunsAlone:
    """Mixed into a dense block's class: its forward runs efficiently where it may. So it does where
    a model's own forward calls the block, and hooks on it do not stand in the way.
    """

    computes_like: type[nn.Module]  # the class it is mixed into
    takes: str  # the name of its forward's first argument
    _switches: Switches | None = None  # of a block that was made of this class: plain modules
    _name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values()) if kwargs.keys() <= {self.takes} else ()
        features = _features_of(self, given[0]) if len(given) == 1 else None
        return super().forward(*args, **kwargs) if features is None else features

    def __reduce_ex__(self, protocol: int) -> tuple:
        """A class made here cannot be found by its name: copies and pickles make it again."""
        make, (cls, *args), *rest = super().__reduce_ex__(max(protocol, 2))
        if plain := cls.__dict__.get("computes_like"):
            return _bare, (plain, *args), *rest
        return make, (cls, *args), *rest


@cache
def running_alone(plain: type[nn.Module]) -> type[nn.Module]:
    """A dense block's class with :class:`RunsAlone`."""
    if issubclass(plain, RunsAlone):
        return plain

    _, takes, *_ = signature(plain.forward).parameters

    @wraps(plain.forward)  # for its signature
    def forward(self: RunsAlone, *args: Any, **kwargs: Any) -> Any:
        return RunsAlone.forward(self, *args, **kwargs)

    own = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    own |= {"computes_like": plain, "takes": takes, "forward": forward}
    return type(plain.__name__, (RunsAlone, plain), own)


def _bare(plain: type[nn.Module], *args: Any) -> nn.Module:
    cls = running_alone(plain)
    return cls.__new__(cls, *args)


def _convolves(child: nn.Module) -> bool:
    return any(isinstance(module, CONVOLUTIONS) for module in child.modules())


def read_alone(block: nn.Module, name: str, switches: Switches) -> tuple[StageModules | None, str]:
    """What is read of a block that was called, and so its hooks; or why it runs as modules."""
    types = switches.types | {type(block)}  # a subclass calls what is read here
    own = () if torch.compiler.is_compiling() else (*block._modules, *block.__dict__)
    try:
        found = read_once(
            switches.readings,
            block,
            (types, switches.keeps, own),
            list(block._modules.values()),  # a reading that held the block would keep it alive
            lambda: read_stage(block, name, None, "", "", types, switches.keeps, alone=True),
        )
    except Unsupported as reason:
        return None, reason.args[0]
    return found, ""


def _features_of(block: RunsAlone, x: Tensor) -> Tensor | None:
    """What a block makes of x, in the modules' memory format; None where they must run."""
    switches = block._switches
    if switches is None or not switches.run_efficiently(block._name, x):
        return None
    found, reason = read_alone(block, block._name, switches)
    if reason := reason or obstacle_now(x, found):
        warn_plain(block._name, reason, switches.said)
        return None
    if not fits(x, found):
        return None
    layout = layout_of(x)
    features = run_stage(x, found, switches.double_backward, layout)[1]
    return features.contiguous(memory_format=layout)


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
