"""Reading a dense block out of modules: whose they are does not matter, only that nothing unusual
hangs on them.

Hooks, modes and modules change between calls: what was read counts only while a :class:`Snapshot`
holds.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from . import joint
from .direct import autocast_dtype
from .spec import Layer, Norm, NormSpec, Stage, Tail, TailSpec, flatten, per_axis, reads_of, spec_of

HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
NORMS = nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
CONVOLUTIONS = nn.Conv2d, nn.Conv3d
MAX_POOLS = nn.MaxPool2d, nn.MaxPool3d
POOLS = *MAX_POOLS, nn.AvgPool2d, nn.AvgPool3d
_DROPOUTS = nn.Dropout, nn.Dropout2d, nn.Dropout3d
_OF_VOLUMES = nn.Conv3d, nn.BatchNorm3d
_LAYER = "norm1", "relu1", "conv1", "norm2", "relu2", "conv2", "dropout"
_TRANSITION = "norm", "relu", "conv", "pool"


class Unsupported(Exception):
    """Why a module cannot run efficiently, in a sentence that names it."""


class Running(NamedTuple):
    """The buffers that a training step of a BatchNorm moves."""

    mean: Tensor
    var: Tensor
    count: Tensor
    momentum: float | None


class Moving(NamedTuple):
    """The buffers that a training step of several BatchNorms moves."""

    means: list[Tensor]
    variances: list[Tensor]
    counts: list[Tensor]
    momenta: list[float]  # below 0 for momentum=None
    which: list[int]  # of the norms


class NormModule(NamedTuple):
    """A BatchNorm as found; ``running`` is None where a step moves nothing, ``group`` the processes
    that it synchronises with.
    """

    module: nn.Module
    norm: Norm
    running: Running | None
    group: str = ""


# methods that some replace for all modules, as guided backpropagation does ReLU's
_KINDS = *CONVOLUTIONS, *POOLS, *_DROPOUTS, nn.ReLU, nn.Sequential
_METHODS = [
    (cls, name, getattr(cls, name))
    for cls in (*NORMS, *_KINDS)
    for name in ("forward", "_conv_forward")
    if hasattr(cls, name)
]


def global_hooks() -> str | None:
    """What was changed for every module of the process, if anything."""
    for name, kind in HOOKS.items():
        if getattr(_module, "_global" + name, None):
            return f"a global {kind} is registered"
    if torch.compiler.is_compiling():  # which took the methods that there are
        return None
    for cls, name, method in _METHODS:
        if getattr(cls, name) is not method:
            return f"{cls.__name__}.{name} was replaced"
    return None


def check_global_hooks() -> None:
    """Raise :class:`Unsupported` where there are any."""
    if hooks := global_hooks():
        raise Unsupported(hooks)


def check(
    module: nn.Module, name: str, types: Iterable[type], expected: str, hooks: bool = False
) -> None:
    """Raise :class:`Unsupported` unless ``module`` is exactly of one of ``types`` and does nothing
    beside; ``hooks`` may be there if they run anyway.
    """
    if class_of(module) not in types:
        raise Unsupported(f"{name} is {article(type(module).__name__)}, not {expected}")
    own = module.__dict__
    if not hooks and any(map(own.get, HOOKS)):
        kinds = [kind for attribute, kind in HOOKS.items() if own.get(attribute)]
        raise Unsupported(f"{name} carries a {kinds[0]}")
    if torch.compiler.is_compiling():  # Dynamo of torch 2.11 cannot walk through it
        replaced = [n for n in ("forward", "_conv_forward") if n in own]
    else:
        replaced = [n for n in _attributes(module) if _computes(type(module), n)]
    if replaced:
        raise Unsupported(f"the {replaced[0]} of {name} was replaced on the instance")


def _computes(cls: type[nn.Module], name: str) -> bool:
    """Whether it names a method that a forward may call: its own, or one that all modules have not,
    as they have ``train``, which is replaced to freeze norms.
    """
    if name in ("forward", "_call_impl"):
        return True
    return callable(getattr(cls, name, None)) and not hasattr(nn.Module, name)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that ``module``'s computes like: another where it says so of itself."""
    return type(module).__dict__.get("computes_like", type(module))


def axes_of(module: nn.Module) -> int:
    """Of the images that a convolution or a norm takes: 2, 3 for volumes, 0 where it takes both."""
    if type(module) is nn.SyncBatchNorm:
        return 0
    return 3 if isinstance(module, _OF_VOLUMES) else 2


def article(word: str) -> str:
    return f"{'an' if word[0] in 'AEIOaeio' else 'a'} {word}"


def has_fused_relu(module: nn.Module) -> bool:
    """Whether ``module`` is a BatchNorm2d with its ReLU inside, as timm builds them."""
    if type(module).__name__ != "BatchNormAct2d" or not isinstance(module, nn.BatchNorm2d):
        return False
    return (
        type(getattr(module, "act", None)) is nn.ReLU
        and type(getattr(module, "drop", None)) is nn.Identity
    )


def check_children(
    module: nn.Module, name: str, needed: set[str], known: Sequence[str], what: str
) -> dict[str, nn.Module]:
    """The children of ``module``; raises :class:`Unsupported` unless they are known ones, in a
    Sequential in the order that is known.
    """
    children = module._modules
    for child, found in children.items():
        if found is None:  # which some forwards skip, and a Sequential calls
            raise Unsupported(f"{name}.{child} is None")
    ordered = [child for child in known if child in children]
    fits = needed <= set(children) and len(ordered) == len(children)
    if not fits or (isinstance(module, nn.Sequential) and ordered != list(children)):
        raise Unsupported(f"{name} has the children {', '.join(children)}, not those of {what}")
    return children


def read_norm(module: nn.Module, name: str) -> NormModule:
    fused = has_fused_relu(module)
    check(module, name, (type(module),) if fused else NORMS, "a BatchNorm2d or BatchNorm3d")
    if fused:
        check(module.act, f"{name}.act", (nn.ReLU,), "a ReLU")
        check(module.drop, f"{name}.drop", (nn.Identity,), "an Identity")
    # a module's own attribute access takes longer than all else here; DataParallel's replicas have
    # plain attributes
    found, buffers = module._parameters or module.__dict__, module._buffers
    try:
        weight, bias = found["weight"], found["bias"]
        mean, var = buffers["running_mean"], buffers["running_var"]
    except KeyError as missing:
        raise Unsupported(f"{name} has no {missing} among its parameters or buffers") from None
    if (mean is None) != (var is None):
        raise Unsupported(f"{name} has only one of running_mean and running_var")
    training, running, count = module.training, None, buffers.get("num_batches_tracked")
    batch = training or mean is None
    if training and module.track_running_stats and not (mean is None and count is None):
        if mean is None or count is None:
            raise Unsupported(f"{name} has only one of running statistics and num_batches_tracked")
        running = Running(mean, var, count, module.momentum)
        if module.momentum is not None and not module.momentum >= 0:
            raise Unsupported(f"{name} has a momentum that is not 0 or more, {module.momentum}")
    if (weight is None) != (bias is None):
        raise Unsupported(f"{name} has only one of weight and bias")
    if not 0 < module.eps < math.inf:
        raise Unsupported(f"{name} has an eps that is not positive and finite, {module.eps}")
    spec = NormSpec(float(module.eps), batch, weight is not None)
    norm = Norm(spec, weight, bias, None if batch else mean, None if batch else var)
    return NormModule(module, norm, running, _group(module, name) if training else "")


def _group(module: nn.Module, name: str) -> str:
    """The processes that a norm synchronises with in training."""
    if type(module) is not nn.SyncBatchNorm or not joint.several():
        return ""
    if torch.compiler.is_compiling():
        raise Unsupported(f"{name} is a SyncBatchNorm, whose processes torch.compile does not see")
    return joint.name_of(module.process_group)


def _common_group(norms: Iterable[NormModule]) -> str:
    """Of those that read by the batch's statistics."""
    groups = {norm.group for norm in norms if norm.norm.spec.batch}
    if len(groups) > 1:
        raise Unsupported("its norms do not all synchronise with the same processes")
    return groups.pop() if groups else ""


def moving(norms: Sequence[NormModule]) -> Moving:
    found = [(i, norm.running) for i, norm in enumerate(norms) if norm.running is not None]
    return Moving(
        [r.mean for _, r in found],
        [r.var for _, r in found],
        [r.count for _, r in found],
        [-1.0 if r.momentum is None else float(r.momentum) for _, r in found],
        [i for i, _ in found],
    )


def read_relu(parent: nn.Module, relu: str, norm: nn.Module, name: str) -> None:
    module = parent._modules.get(relu)
    if (module is None) != has_fused_relu(norm):
        raise Unsupported(f"{name} has {'no' if module is None else 'one more'} ReLU behind a norm")
    if module is not None:
        check(module, f"{name}.{relu}", (nn.ReLU,), "a ReLU")


def read_conv(module: nn.Module, name: str, size: int) -> nn.Conv2d | nn.Conv3d:
    check(module, name, CONVOLUTIONS, "a Conv2d or Conv3d")
    axes = axes_of(module)
    same = tuple(d * (size // 2) for d in per_axis(module.dilation, axes))
    padding = module.padding
    if isinstance(padding, str):
        padding = same if padding == "same" else 0
    keeps = per_axis(padding, axes) == same
    plain = module.groups == 1 and module.bias is None
    # of the weight, as F.conv2d has it, which need not be the module's kernel_size
    kernel = (size,) * axes
    steps = per_axis(module.stride, axes) == (1,) * axes
    if not (plain and keeps and steps) or module.weight.shape[2:] != kernel:
        raise Unsupported(
            f"{name} is not a {'x'.join(str(size) * axes)} convolution of stride 1, biasless, "
            "size-keeping"
        )
    if module.padding_mode != "zeros":
        raise Unsupported(f"{name} has the padding_mode {module.padding_mode}")
    return module


def check_fits(norm: NormModule, name: str, channels: int, values: Tensor) -> None:
    """Raise :class:`Unsupported` unless a norm has so many channels, in a dtype that may stand
    beside ``values``. Running modules tell better what is wrong.
    """
    module = norm.module
    for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
        if tensor is None:
            continue
        if tensor.shape != (channels,):
            raise Unsupported(f"{name} is not for the {channels} channels beside it")
        if not stands_beside(tensor, values):
            raise Unsupported(f"{name} is {tensor.dtype}, convolutions beside it {values.dtype}")


def stands_beside(tensor: Tensor, values: Tensor) -> bool:
    """Whether a norm's tensor has a dtype that suits these values."""
    narrow = values.element_size() == 2 and tensor.dtype == torch.float32
    return tensor.dtype == values.dtype or narrow


class Dropout(NamedTuple):
    """Of a layer's new values: each by itself, or a channel of an image as a whole."""

    rate: float
    channels: bool


def _read_dropout(layer: nn.Module, module: nn.Module | None, name: str) -> Dropout:
    """A layer's own, and that of its last child."""
    rate = float(getattr(layer, "drop_rate", 0.0)) if layer.training else 0.0
    if not 0 <= rate <= 1:
        raise Unsupported(f"{name} has a drop_rate that is no probability, {rate}")
    if module is None:
        return Dropout(rate, False)
    check(module, f"{name}.dropout", _DROPOUTS, "a Dropout, Dropout2d or Dropout3d")
    if not module.training or module.p == 0:
        return Dropout(rate, False)
    if not 0 <= module.p <= 1:
        raise Unsupported(f"{name}.dropout has a p that is no probability, {module.p}")
    if rate:
        raise Unsupported(f"{name} has dropout twice")
    return Dropout(float(module.p), type(module) is not nn.Dropout)


def _dilation(conv: nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    return per_axis(conv.dilation, axes_of(conv))


class LayerModules(NamedTuple):
    layer: Layer
    norms: list[NormModule]
    dropout: Dropout


def read_layer(module: nn.Module | None, name: str, types: frozenset[type]) -> LayerModules:
    """One dense layer: torchvision's, timm's, gpleiss's or memdense's children, or MONAI's
    ``layers`` with them.
    """
    if module is None:
        raise Unsupported(f"{name} is None")
    parts, own_name = module, name
    if set(module._modules) == {"layers"}:
        parts, name = module.layers, f"{name}.layers"
        check(parts, name, (nn.Sequential,), "a Sequential")
    children = check_children(parts, name, {"norm1", "conv1"}, _LAYER, "a dense layer")
    norm1 = read_norm(children["norm1"], f"{name}.norm1")
    read_relu(parts, "relu1", norm1.module, name)
    dropout = _read_dropout(module, children.get("dropout"), name)
    check(module, own_name, types, "a dense layer of a class that memdense.convert has checked")
    if "conv2" not in children:
        conv1 = read_conv(children["conv1"], f"{name}.conv1", 3)
        check_fits(norm1, f"{name}.norm1", conv1.weight.shape[1], conv1.weight)
        return LayerModules(
            Layer(norm1.norm, conv1.weight, None, None, _dilation(conv1)), [norm1], dropout
        )
    conv1 = read_conv(children["conv1"], f"{name}.conv1", 1)
    norm2 = read_norm(children["norm2"], f"{name}.norm2")
    read_relu(parts, "relu2", norm2.module, name)
    conv2 = read_conv(children["conv2"], f"{name}.conv2", 3)
    check_fits(norm1, f"{name}.norm1", conv1.weight.shape[1], conv1.weight)
    check_fits(norm2, f"{name}.norm2", conv2.weight.shape[1], conv2.weight)
    if conv1.weight.shape[0] != conv2.weight.shape[1]:
        raise Unsupported(
            f"{name}.conv2 is for {conv2.weight.shape[1]} channels, conv1 makes "
            f"{conv1.weight.shape[0]}"
        )
    layer = Layer(norm1.norm, conv1.weight, norm2.norm, conv2.weight, _dilation(conv2))
    return LayerModules(layer, [norm1, norm2], dropout)


class StageModules(NamedTuple):
    """A stage, and what running it takes: its :func:`flatten`ed tensors, its encoded spec, and the
    buffers it moves, whose norms are numbered in the order of its readers. ``axes``: of its images,
    3 for volumes, 0 for both. ``drop_channels``: dropout is of whole channels. ``narrow``: the
    dtypes of parameters of 16 bits.
    """

    stage: Stage
    tensors: list[Tensor]
    running: list[Tensor]
    spec: str
    moving: Moving
    axes: int
    drop_channels: bool
    narrow: set[torch.dtype]


def _stage_modules(
    stage: Stage, norms: Sequence[NormModule], name: str, drop_channels: bool = False
) -> StageModules:
    spec = spec_of(stage).encode()
    axes = {conv.dim() - 2 for *_, conv in reads_of(stage) if conv is not None}
    axes |= {axes_of(norm.module) for norm in norms}
    axes -= {0}
    if len(axes) > 1:
        raise Unsupported(f"{name} has modules of images and of volumes")
    (tensors, running), moves = flatten(stage), moving(norms)
    # a stage moves all at its end: who reads what another has moved would find it as it was
    means, counts = (set(map(id, buffers)) for buffers in (moves.means, moves.counts))
    moved = means | set(map(id, moves.variances))
    if any(id(t) in moved for t in running):
        raise Unsupported(f"a norm of {name} reads running statistics that another one moves")
    if len(counts) < len(means) and min(moves.momenta) < 0:
        raise Unsupported(f"norms of {name} that average share num_batches_tracked")
    narrow = _narrow(tensors)
    return StageModules(stage, tensors, running, spec, moves, sum(axes), drop_channels, narrow)


def _narrow(tensors: Iterable[Tensor | None]) -> set[torch.dtype]:
    return {t.dtype for t in tensors if t is not None and t.element_size() == 2}


def read_stage(
    block: nn.Module,
    name: str,
    tail: nn.Module | None,
    tail_name: str,
    tail_kind: str,
    types: frozenset[type],
    keep_bottlenecks: bool,
    alone: bool = False,
) -> StageModules:
    """A dense block and what follows it; ``alone``: the block was called, and so its hooks.

    Raises:
        Unsupported: where running these modules one by one would do anything else.
    """
    check_global_hooks()
    what = "a dense block of a class that memdense.convert has checked"
    check(block, name, types, what, hooks=alone)
    layers, norms, dropouts = [], [], set()
    for child, module in block._modules.items():
        found = read_layer(module, f"{name}.{child}", types)
        layers.append(found.layer)
        norms += found.norms
        dropouts.add(found.dropout)
    if not layers:
        raise Unsupported(f"{name} has no layers")
    if len(dropouts) != 1:
        raise Unsupported(f"{name} has layers of different dropout")
    dropout = dropouts.pop()
    end = None
    if tail is not None:
        end, norm = _read_tail(tail, tail_name, tail_kind, types)
        norms.append(norm)
        first = layers[0].conv1
        check_fits(norm, tail_name, first.shape[1] + sum(x.growth for x in layers), first)
    stage = Stage(layers, end, dropout.rate, keep_bottlenecks, _common_group(norms))
    return _stage_modules(stage, norms, name, dropout.channels)


def _read_tail(
    module: nn.Module, name: str, kind: str, types: frozenset[type]
) -> tuple[Tail, NormModule]:
    if kind != "transition":
        norm = read_norm(module, name)
        # a final norm's ReLU stands in the model's forward, unless it is fused
        relu = kind == "pool" or has_fused_relu(module)
        return Tail(TailSpec(kind, norm.norm.spec, relu), norm.norm, None), norm
    children = check_children(module, name, {"norm", "conv"}, _TRANSITION, "a transition")
    norm = read_norm(children["norm"], f"{name}.norm")
    read_relu(module, "relu", norm.module, name)
    conv = read_conv(children["conv"], f"{name}.conv", 1)
    check_fits(norm, f"{name}.norm", conv.weight.shape[1], conv.weight)
    pool = children.get("pool")
    if type(pool) is nn.Identity:
        check(pool, f"{name}.pool", (nn.Identity,), "an Identity")
        pool = None
    if pool is not None:
        axes = axes_of(conv)
        kind = nn.AvgPool3d if axes == 3 else nn.AvgPool2d
        check(pool, f"{name}.pool", (kind,), f"an {kind.__name__}")
        if not _pools(pool, axes, size=2, padding=0):
            raise Unsupported(f"{name}.pool is not a {'x'.join('2' * axes)} average of stride 2")
        if pool.ceil_mode or pool.divisor_override:
            raise Unsupported(f"{name}.pool has ceil_mode or divisor_override")
    check(module, name, types, "a transition of a class that memdense.convert has checked")
    spec = TailSpec("transition", norm.norm.spec, True, 1 if pool is None else 2)
    return Tail(spec, norm.norm, conv.weight), norm


def _pools(pool: nn.Module, axes: int, size: int, padding: int) -> bool:
    """Whether its windows are of this size, two apart along each axis."""
    stride = pool.kernel_size if pool.stride is None else pool.stride  # as functions take None
    shape = pool.kernel_size, stride, pool.padding
    return [per_axis(n, axes) for n in shape] == [(n,) * axes for n in (size, 2, padding)]


def read_tail(module: nn.Module, name: str, kind: str, types: frozenset[type]) -> StageModules:
    """What follows a dense block, alone: a stage without layers. Raises as :func:`read_stage`."""
    check_global_hooks()
    tail, norm = _read_tail(module, name, kind, types)
    return _stage_modules(Stage([], tail, 0.0, False, norm.group), [norm], name)


class StemModules(NamedTuple):
    weight: Tensor
    geometry: tuple[tuple[int, ...], ...]  # stride, padding and dilation
    norm: Norm
    moving: Moving
    group: str
    narrow: set[torch.dtype]  # of parameters


def read_stem(modules: dict[str, nn.Module]) -> StemModules:
    """conv0, norm0, relu0 and pool0 out of ``modules``, named children in their order.

    Raises:
        Unsupported: where they are anything else.
    """
    check_global_hooks()
    names = list(modules)
    conv, norm = modules[names[0]], read_norm(modules[names[1]], names[1])
    check(conv, names[0], CONVOLUTIONS, "a Conv2d or Conv3d")
    axes = axes_of(conv)
    if conv.groups != 1 or conv.bias is not None or isinstance(conv.padding, str):
        raise Unsupported(f"{names[0]} has groups, a bias or padding by name")
    if conv.padding_mode != "zeros":
        raise Unsupported(f"{names[0]} has the padding_mode {conv.padding_mode}")
    pool = modules[names[-1]]
    kind = nn.MaxPool3d if axes == 3 else nn.MaxPool2d
    check(pool, names[-1], (kind,), f"a {kind.__name__}")
    between = names[2:-1]
    if len(between) != (0 if has_fused_relu(norm.module) else 1):
        raise Unsupported(f"{names[1]} has {'one more' if between else 'no'} ReLU behind it")
    for name in between:
        check(modules[name], name, (nn.ReLU,), "a ReLU")
    fits = _pools(pool, axes, size=3, padding=1) and per_axis(pool.dilation, axes) == (1,) * axes
    if not fits or pool.ceil_mode or pool.return_indices:
        raise Unsupported(
            f"{names[-1]} is not a {'x'.join('3' * axes)} maximum of stride 2 and padding 1"
        )
    check_fits(norm, names[1], len(conv.weight), conv.weight)
    if axes_of(norm.module) not in (0, axes):
        raise Unsupported(f"{names[1]} is {article(type(norm.module).__name__)}, {names[0]} is not")
    geometry = tuple(per_axis(n, axes) for n in (conv.stride, conv.padding, conv.dilation))
    narrow = _narrow((conv.weight, *norm.norm[1:]))
    return StemModules(conv.weight, geometry, norm.norm, moving([norm]), norm.group, narrow)


# what every module has in its __dict__
_CONTAINERS = itemgetter("_modules", "_parameters", "_buffers", *HOOKS)
_OWN = (frozenset(vars(nn.Module())) - {"training"}) | {"_switches", "_name"}
_PLAIN = (bool, int, float, str, type(None))


def _is_plain(value: Any) -> bool:
    """Whether it cannot change while it is the same."""
    return type(value) in _PLAIN or (type(value) is tuple and all(map(_is_plain, value)))


def _attributes(module: nn.Module) -> list[str]:
    """Names of what a module's kind keeps in its __dict__."""
    return [name for name in module.__dict__ if name not in _OWN]


def _tells_changes(module: nn.Module) -> bool:
    """Whether comparing attributes shows whether they changed."""
    d = module.__dict__
    # what functional_call makes a parameter of is not to be held, with all that it was made of
    if not all(p is None or isinstance(p, nn.Parameter) for p in d["_parameters"].values()):
        return False
    if type(module) is nn.SyncBatchNorm and module.training:  # by the processes that there are
        return False
    if "drop_rate" not in d and hasattr(type(module), "drop_rate"):
        return False
    return all(_is_plain(d[name]) for name in _attributes(module))


class Snapshot:
    """All that reading some modules depends on, as it is now: their types, hooks, attributes,
    children and tensors, the last two by identity, tensors' shapes and dtypes too, which may change
    behind their ``data``. Comparing takes less than half of reading's time. It does not keep the
    modules alive, but what is inside them.
    """

    @classmethod
    def of(cls, roots: Sequence[nn.Module]) -> "Snapshot | None":
        """None where something could change unseen."""
        inner = [m for root in roots for m in root.modules() if m is not root]
        return cls(roots, inner) if all(map(_tells_changes, (*roots, *inner))) else None

    def __init__(self, roots: Sequence[nn.Module], inner: list[nn.Module]) -> None:
        self._roots, self._inner = [ref(root) for root in roots], inner
        modules = [*roots, *inner]
        self._getters = [itemgetter(*_attributes(m)) for m in modules]
        containers = chain.from_iterable(_CONTAINERS(m.__dict__) for m in modules)
        self._filled = [i for i, container in enumerate(containers) if container]
        self._state, self._objects = self._look(roots)
        self._tensors = [i for i, x in enumerate(self._objects) if isinstance(x, Tensor)]
        self._forms = self._look_behind(self._objects)

    def _look(self, roots: Sequence[nn.Module]) -> tuple[tuple, list[Any]]:
        modules = [*roots, *self._inner]
        dicts = [m.__dict__ for m in modules]
        containers = list(chain.from_iterable(map(_CONTAINERS, dicts)))
        filled = [containers[i] for i in self._filled]
        state = (
            list(map(type, modules)),
            list(map(len, dicts)),
            list(map(len, containers)),
            list(chain.from_iterable(filled)),
            [get(d) for get, d in zip(self._getters, dicts, strict=True)],
        )
        return state, list(chain.from_iterable(map(dict.values, filled)))

    def _look_behind(self, objects: list[Any]) -> list[Any]:
        tensors = [objects[i] for i in self._tensors]
        return [t.shape for t in tensors] + [t.dtype for t in tensors]

    def current(self) -> bool:
        """Whether its modules are there, and as they were."""
        roots = [known() for known in self._roots]
        return all(root is not None for root in roots) and self.holds(roots)

    def holds(self, roots: Sequence[nn.Module]) -> bool:
        """Whether reading these modules would find what it found."""
        pairs = zip(roots, self._roots, strict=True)
        if not all(root is not None and root is known() for root, known in pairs):
            return False
        try:
            state, objects = self._look(roots)
        except KeyError:  # an attribute was deleted
            return False
        return (
            state == self._state
            and all(map(is_, objects, self._objects))
            and self._look_behind(objects) == self._forms
        )


def misfit(x: Tensor, found: StageModules) -> bool:
    """Whether x is not what the modules would take: they say best what is wrong with it."""
    if not x.numel() or found.axes not in (0, x.dim() - 2):
        return True
    stage, channels = found.stage, x.shape[1]
    for layer in stage.layers:
        if layer.conv1.shape[1] != channels or layer.conv1.device != x.device:
            return True
        channels += layer.growth
    if not stage.layers:
        conv = stage.tail.conv
        if conv is not None and (conv.shape[1] != channels or conv.device != x.device):
            return True
    tail = stage.tail
    if tail is not None and tail.spec.pool == 2 and min(x.shape[2:]) < 2:
        return True
    if x.numel() > x.shape[1] or stage.group:
        return False
    return any(norm.spec.batch for _, _, norm, _ in reads_of(stage))


def convolution_dtype_fits(x: Tensor, weights: Iterable[Tensor]) -> bool:
    """Whether x may be convolved with ``weights`` as they are, or autocast, which leaves float64
    alone, makes it so.
    """
    if autocast_dtype(x.device) is None or x.dtype == torch.float64:
        return all(w.dtype == x.dtype for w in weights)
    return all(w.dtype != torch.float64 for w in weights)
