"""An existing model's DenseNet starts to run efficiently: same modules, same parameters, same
names.
"""

import copy
import io
import sys
import warnings
from collections import OrderedDict
from typing import TypeVar

import torch
from torch import Tensor, nn

from .backends import MemdenseWarning
from .features import Features, RunsAlone, Switches, read_alone
from .modules import OWN_TYPES
from .stage import Step, apart, is_block
from .structure import CONVOLUTIONS, HOOKS, article, axes_of, class_of

Model = TypeVar("Model", bound=nn.Module)
TOLERANCE = 1e-9
ONE_BY_ONE = "code that calls its children one by one gets efficient dense blocks only"


def convert(
    model: Model,
    *,
    check: bool = True,
    verbose: bool = True,
    keep_bottlenecks: bool | None = None,
    recompute_stem: bool | None = None,
    double_backward: bool | None = None,
) -> Model:
    """Let every DenseNet inside ``model`` run efficiently, in place.

    A DenseNet is recognised by its structure: an ``nn.Sequential`` that holds dense blocks, as
    those of torchvision, timm, MONAI (2-D and 3-D), torchxrayvision and gpleiss do, at any depth
    and any number of times. It becomes a :class:`memdense.Features` and stays the same object with
    the same children: parameters, ``state_dict`` keys, hooks and references to it remain as they
    were. What looks different is left alone, or runs as plain modules block by block; a report on
    stderr, and :func:`memdense.explain` at any time, say why.

    Where a forward calls a stack's children one by one, and in modules of another kind, it is the
    dense blocks alone that run efficiently.

    Args:
        model: any module. Wrappers (``DataParallel``, ``torch.compile``, ...) are looked into.
        check: compare outputs, running statistics, gradients and the attributes that modules set
            of both forms on a small random float64 copy before converting, since a class may
            compute something else than its children suggest. Leaves the model, its gradients and
            all random states untouched.
        verbose: print the report. Without it, a warning tells if nothing at all was converted.
        keep_bottlenecks, recompute_stem, double_backward: as in :class:`memdense.DenseNet`; None
            leaves what runs on memdense already as it is. They are attributes of each
            ``Features``, and may be changed there later.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: for a scripted or traced model, or no module at all.
        ValueError: if no module inside holds dense blocks.
    """
    title = f"memdense.convert({type(model).__name__})"  # the class of a bare stack changes
    check = check and torch._C._len_torch_dispatch_stack() == 0  # a mode's tensors cannot be copied
    switches = dict(
        keep_bottlenecks=keep_bottlenecks,
        recompute_stem=recompute_stem,
        double_backward=double_backward,
    )
    given = {name: bool(value) for name, value in switches.items() if value is not None}
    converted = "converted" if check else "converted, unchecked"
    report: list[str] = []
    said: set[str] = set()
    done = False
    stacks = find_stacks(model)
    for name, stack in stacks:
        if isinstance(stack, Features):
            off = "" if stack.efficient else ", switched off: set its attribute efficient to True"
            said_now = "".join(f", {switch}={value}" for switch, value in given.items())
            report.append(f"{name}: runs on memdense already{said_now}{off}")
            for switch, value in given.items():
                setattr(stack, switch, value)
            if new := _runnable_types(stack) - stack._switches.types:
                classes = ", ".join(sorted(cls.__name__ for cls in new))
                if why := check and _difference(stack):
                    report.append(f"{name}: {classes} left alone: {why}")
                else:
                    report.append(f"{name}: {classes} {converted}, with the stack's switches")
                    stack._switches.types |= new
            stack.let_blocks_run_alone()  # new ones among them
            report += _plain_parts(stack)
            done = True
            continue
        pieces = {name: stack}
        if reason := own_forward(stack):
            report.append(f"{name}: {reason}: only dense blocks can be efficient")
            pieces = {f"{name}.{child}": alone for child, alone in _blocks_apart(stack).items()}
        for piece, part in pieces.items():
            if part is not stack and (owner := _owner(part[0], stacks)):
                report.append(f"{piece}: runs on memdense already, with {owner}")
                done = True
                continue
            if why := refusal(part) or (check and _difference(part)):
                report.append(f"{piece}: left alone: {why}")
                continue
            before = vars(getattr(part[0], "_switches", None) or Switches())
            become_features(part, **{name: before[name] for name in switches} | given)
            part._switches.said = said
            done = True
            report.append(
                f"{piece}: {converted}"
                + (f"; {ONE_BY_ONE}" if part is stack and not is_block(model) else "")
            )
            report += _plain_parts(part)
    if verbose:
        lines = "\n".join(f"  {line}" for line in report)
        print(f"{title}:\n{lines}", file=sys.stderr)
    elif not done:
        warnings.warn(
            f"memdense converted nothing: {'; '.join(report)}", MemdenseWarning, stacklevel=2
        )
    return model


def _plain_parts(features: Features) -> list[str]:
    return [
        f"  {' and '.join(part.names)} as plain modules for now: {why}"
        for part, why in parts(features)
        if why
    ]


def find_stacks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules inside ``model`` that hold dense blocks, by name ("the model" for itself).

    Raises:
        TypeError, ValueError: see :func:`convert`.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a scripted or traced model has no modules to read: convert it before that")
    if isinstance(model, torch.fx.GraphModule):
        raise TypeError("what torch.fx wrote down calls no dense blocks, but what was in them")
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, but got {type(model).__name__}")
    found = [
        (name or "the model", module)
        for name, module in model.named_modules()
        # MONAI's layers look like blocks: what holds them is a block, not a stack
        if not is_block(module) and any(is_block(child) for child in module.children())
    ]
    if not found and is_block(model):
        return [("the model", nn.Sequential(OrderedDict(block=model)))]
    if not found:
        raise ValueError(f"found no DenseNet feature stack in {type(model).__name__}")
    return found


def own_forward(stack: nn.Module) -> str:
    """Why a stack cannot be known to call its children in their order; empty if it does."""
    if type(stack) is not nn.Sequential:
        return f"it is {article(type(stack).__name__)}, not an nn.Sequential"
    return "its forward was replaced on the instance" if "forward" in stack.__dict__ else ""


def _blocks_apart(stack: nn.Module) -> dict[str, nn.Sequential]:
    """Each dense block of a stack as a stack of its own."""
    children = stack.named_children()
    return {name: nn.Sequential(OrderedDict([(name, m)])) for name, m in children if is_block(m)}


def _owner(block: nn.Module, stacks: list[tuple[str, nn.Module]]) -> str:
    """The name of the stack whose switches a block follows; empty if there is none."""
    owners = (
        name
        for name, stack in stacks
        if isinstance(stack, Features) and stack._switches is getattr(block, "_switches", None)
    )
    return next(owners, "")


def refusal(stack: nn.Sequential) -> str:
    """Why a stack cannot be converted, by its looks; empty if it can."""
    blocks = [
        (part, reason) for part, reason in parts(as_features(stack), True) if part.kind == "stage"
    ]
    return "" if not all(reason for _, reason in blocks) else blocks[0][1]


def as_features(stack: nn.Module) -> Features:
    """``stack``'s children in a new ``Features`` that trusts the classes of all its blocks, layers
    and transitions.
    """
    children = ((name, child) for name, child in stack._modules.items() if child is not None)
    features = Features(OrderedDict(children))
    found = features.steps("norm")
    trusted = (_classes(features, part) for step in found for part in apart(step))
    features._switches.types = OWN_TYPES.union(*trusted)
    return features


def parts(features: Features, alone: bool = False) -> list[tuple[Step, str]]:
    """What runs together now, with why it runs as plain modules where it does; ``alone``: as if all
    blocks could run alone.
    """
    result = []
    for step in features.steps("norm"):
        for part, found, reason in features.parts(step):
            name = part.names[0]
            block = features._modules[name]
            if part.kind == "stage" and not found and (alone or isinstance(block, RunsAlone)):
                own = None if alone else getattr(block, "_switches", None)
                reason = read_alone(block, name, own or features._switches)[1]
            result.append((part, reason))
    return result


def become_features(
    stack: nn.Sequential,
    keep_bottlenecks: bool = False,
    recompute_stem: bool = True,
    double_backward: bool = False,
) -> None:
    """Turn ``stack`` into a ``Features``: its class changes and its blocks', the objects do not.
    Classes of which no instance could run now, and be checked, stay untrusted.
    """
    types = _runnable_types(stack)
    stack.__class__ = Features
    stack._switches = Switches(True, keep_bottlenecks, recompute_stem, double_backward, types)
    stack.let_blocks_run_alone()


def _runnable_types(stack: nn.Module) -> frozenset[type]:
    """The classes in ``stack`` that could run now."""
    features = as_features(stack)
    runnable = [
        part for found, reason in parts(features, True) if not reason for part in apart(found)
    ]
    return OWN_TYPES.union(*(_classes(features, part) for part in runnable))


def _classes(features: Features, part: Step) -> set[type]:
    """Those that a block or a transition needs trusted."""
    if part.kind not in ("stage", "tail") or part.tail in ("norm", "pool"):
        return set()
    module = features._modules[part.names[0]]
    layers = module.children() if part.kind == "stage" else ()
    return {class_of(m) for m in (module, *layers)}


# ---- the check


def _difference(stack: nn.Sequential) -> str:
    """What ``stack`` and its converted form compute differently, in a sentence."""
    with (
        torch.random.fork_rng(devices=[]),  # all happens on the CPU
        torch.device("cpu"),
        torch.inference_mode(False),  # turns gradients on, too
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        try:
            original = _copy(stack)
            converted = _copied(original, {})
            become_features(converted)
            before = _attributes(original), _attributes(converted)
            x = _probe(original)
            expected, found = _results(original, x), _results(converted, x)
            what = _first_difference(found, expected) or _first_unset(
                _changed(converted, before[1]), _changed(original, before[0])
            )
        except Exception as error:  # other people's code may raise anything
            name = type(error).__name__
            # TorchScript's come with a traceback
            said = str(error).strip().split("\n")[-1].removeprefix(f"{name}: ")
            return f"checking it raised {name}: {said} (check=False skips that)"
    names = sorted(cls.__name__ for cls in converted._switches.types - OWN_TYPES)
    return what and f"{', '.join(names)} compute something else than they look like: {what}"


def _first_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    expected = {name: tensor for name, tensor in expected.items() if tensor.numel()}
    largest = max(t.abs().max() for name, t in expected.items() if "gradient" in name)
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            return f"{name} has another shape"
        # a gradient that cancels to nothing is rounding: measure it by the others
        floor = 1e-3 * largest if "gradient" in name else 0.0
        error, scale = (found[name] - tensor).abs().max(), max(tensor.abs().max(), floor)
        if not error <= TOLERANCE * scale:
            return f"{name} differs by {error / scale:.0e} of its size"
    return ""


Attributes = dict[tuple[str, str], tuple[object, int]]


def _attributes(stack: nn.Module) -> Attributes:
    """Of each module, by its name and theirs, with how much a collection holds."""
    return {
        (name, key): (value, len(value) if isinstance(value, (list, dict, set)) else 0)
        for name, module in stack.named_modules()
        for key, value in vars(module).items()
    }


def _changed(stack: nn.Module, before: Attributes) -> set[tuple[str, str]]:
    return {
        at
        for at, (value, size) in _attributes(stack).items()
        if at not in before or value is not before[at][0] or size != before[at][1]
    }


def _first_unset(found: set[tuple[str, str]], expected: set[tuple[str, str]]) -> str:
    missing = sorted(expected - found)
    return "{} changes its attribute {}".format(*missing[0]) if missing else ""


def _copy(stack: nn.Sequential) -> nn.Sequential:
    """``stack`` up to its last block's tail, in float64 on the CPU, without hooks and with weights
    of its own: those of a fresh or pruned model may hide a difference.
    """
    last = [s for s in as_features(stack).steps("norm") if s.kind == "stage"][-1].names[-1]
    names = list(stack._modules)
    names = names[: names.index(last) + 1]
    part = nn.Sequential(OrderedDict((name, stack._modules[name]) for name in names))
    memo: dict[int, object] = {}
    for module in part.modules():
        memo.update((id(getattr(module, hooks)), OrderedDict()) for hooks in HOOKS)
        if group := getattr(module, "process_group", None):
            memo[id(group)] = None  # cannot be copied
        # pruning and weight_norm leave what they compute among the attributes
        for name, tensor in (
            *module._parameters.items(),
            *module._buffers.items(),
            *vars(module).items(),
        ):
            if isinstance(tensor, Tensor):
                memo[id(tensor)] = _substitute(name, tensor)
    part = _copied(part, memo)
    norm = nn.BatchNorm3d if axes_of(_first_convolution(part)) == 3 else nn.BatchNorm2d
    for module in part.modules():
        if isinstance(module, RunsAlone):
            module._switches = None
        if type(module) is nn.SyncBatchNorm:  # other processes do not take part
            module.__class__ = norm
    return part


def _copied(stack: nn.Sequential, memo: dict[int, object]) -> nn.Sequential:
    """``copy.deepcopy``, which would leave scripted modules their parameters: these are C++'s."""
    for parent in stack.modules():
        for child in parent.children():
            if isinstance(child, torch.jit.ScriptModule):
                file = io.BytesIO()
                torch.jit.save(child, file)
                file.seek(0)
                memo[id(child)] = torch.jit.load(file, map_location="cpu").double()
    return copy.deepcopy(stack, memo)


def _first_convolution(stack: nn.Sequential) -> nn.Module:
    return next(m for m in stack.modules() if isinstance(m, CONVOLUTIONS))


def _substitute(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.cpu().clone()
    values = torch.randn(tensor.shape, dtype=torch.float64)
    if name == "running_var":
        values = values.square() + 0.5
    elif tensor.dim() > 1:
        values /= tensor[0].numel() ** 0.5
    return nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values


def _probe(stack: nn.Sequential) -> Tensor:
    """The smallest images that pass through ``stack``, and four of them: enough for a BatchNorm."""
    first = _first_convolution(stack)
    channels = first.weight.shape[1] * first.groups  # whatever its attribute says
    stack.eval()
    axes, sizes = axes_of(first), (8, 16, 32, 64, 128)
    for size in sizes if axes == 2 else sizes[:-1]:  # volumes of 128 take minutes
        sides = (size + 3 * axis for axis in range(axes))
        x = torch.randn(4, channels, *sides, dtype=torch.float64)
        try:
            with torch.no_grad():
                stack(x[:1].clone())
            break
        except (RuntimeError, ValueError):
            pass  # the last one's error comes again where x is used
    return x


def _results(stack: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    """What ``stack`` computes from ``x`` in both modes, by name. Dropout is active: both forms draw
    alike.
    """
    torch.default_generator.manual_seed(0)
    results = {"the output in evaluation mode": stack.eval()(x.clone()).detach()}
    x = x.clone().requires_grad_()
    out = stack.train()(x.clone())
    results["the output in training mode"] = out.detach().clone()
    for name, buffer in stack.named_buffers():
        results[f"the buffer {name}"] = buffer.detach().clone().double()
    (out * torch.randn_like(out)).sum().backward()
    for name, tensor in (("the input", x), *stack.named_parameters()):
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        results[f"the gradient of {name}"] = gradient
    return results
