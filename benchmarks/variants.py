"""The networks that are compared, and the one function that checks, times and weighs them."""

import gc
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torchvision
from measure import Clock, Refused, interleaved, refused, with_ratios
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memdense
from memdense import _extension, memory
from memdense.backends import backend_for
from memdense.densenet import CONFIGURATIONS


@dataclass(frozen=True)
class Arch:
    growth_rate: int
    blocks: tuple[int, ...]
    first: int
    size: int = 224
    # torchvision's plain training step, float32: what default batches on a GPU are chosen by
    megabytes_per_image: float = 0.0

    @property
    def small_inputs(self) -> bool:
        return self.size <= 64


def bc(depth: int) -> Arch:
    """DenseNet-BC with growth rate 12 for 32x32 images."""
    return Arch(12, ((depth - 4) // 6,) * 3, 24, 32)


ARCHS = {
    "densenet121": Arch(*CONFIGURATIONS["densenet121"], 224, 131),
    "densenet169": Arch(*CONFIGURATIONS["densenet169"], 224, 164),
    "densenet201": Arch(*CONFIGURATIONS["densenet201"], 224, 205),
    "densenet264": Arch(*CONFIGURATIONS["densenet264"], 224, 280),
    "bc100-12": Arch(12, (16, 16, 16), 24, 32, 35),
}


@dataclass(frozen=True)
class Setting:
    """What is run: everything but who runs it."""

    arch: Arch
    name: str
    batch: int
    size: int
    dtype: torch.dtype
    device: torch.device
    inference: bool = False

    def __str__(self) -> str:
        what = "inference" if self.inference else "training step"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name} {what}, {self.size} x {self.size}, {dtype}, batch {self.batch}"

    def autocast(self) -> AbstractContextManager[None]:
        """16-bit training is autocast, as users do it."""
        if self.dtype.itemsize != 2:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def torchvision_model(arch: Arch, **kwargs: object) -> nn.Module:
    model = torchvision.models.DenseNet(arch.growth_rate, arch.blocks, arch.first, **kwargs)
    if arch.small_inputs:
        # torchvision has no stem for small images: a 3x3 convolution and nothing else
        del model.features.norm0, model.features.relu0, model.features.pool0
        model.features.conv0 = nn.Conv2d(3, arch.first, 3, padding=1, bias=False)
    return model


def memdense_model(arch: Arch, **kwargs: object) -> nn.Module:
    args = arch.growth_rate, arch.blocks, arch.first
    return memdense.DenseNet(*args, small_inputs=arch.small_inputs, **kwargs)


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def checkpointed(model: nn.Module) -> nn.Module:
    """Keep each layer's bottleneck and recompute the concatenation, norm and ReLU before it."""

    def bottleneck(layer: nn.Module, *features: Tensor) -> Tensor:
        return layer.conv1(F.relu(layer.norm1(torch.cat(features, 1)), inplace=True))

    def forward(layer: nn.Module, features: list[Tensor]) -> Tensor:
        y = checkpoint(
            bottleneck, layer, *features, use_reentrant=False, preserve_rng_state=False,
            determinism_check="none",
        )  # fmt: skip
        return layer.conv2(F.relu(layer.norm2(y), inplace=True))

    for module in model.modules():
        if isinstance(module, torchvision.models.densenet._DenseLayer):
            module.forward = partial(forward, module)
    return model


@dataclass(frozen=True)
class Variant:
    make: Callable[[Arch], nn.Module]
    finish: Callable[[nn.Module], nn.Module] = lambda model: model
    channels_last: bool = False


# the first is what every other is measured against
VARIANTS = {
    "torchvision": Variant(torchvision_model),
    "torchvision, channels last": Variant(torchvision_model, channels_last, True),
    "torchvision, torch.compile": Variant(
        torchvision_model, lambda model: torch.compile(channels_last(model)), True
    ),
    "torchvision, memory_efficient": Variant(partial(torchvision_model, memory_efficient=True)),
    "checkpointed layers": Variant(torchvision_model, checkpointed),
    "memdense": Variant(memdense_model),
    "memdense without extension": Variant(memdense_model),
    "memdense, 3x3 in Triton": Variant(memdense_model),
    "memdense, recompute_stem=False": Variant(partial(memdense_model, recompute_stem=False)),
    "memdense, keep_bottlenecks=True": Variant(partial(memdense_model, keep_bottlenecks=True)),
}
BASE = next(iter(VARIANTS))


def names(setting: Setting) -> list[str]:
    """The variants that differ in what they do here."""
    found = list(VARIANTS)
    chosen = backend_for(setting.device).name
    if chosen != "native":
        found.remove("memdense without extension")
    if chosen != "triton and CUDA 3x3":
        found.remove("memdense, 3x3 in Triton")
    if setting.name != "densenet121":  # the stem is the same in all, and small inputs have none
        found.remove("memdense, recompute_stem=False")
    if setting.inference:  # nothing is kept, so there is nothing to recompute
        switches = "memory_efficient", "checkpointed", "recompute", "keep"
        found = [name for name in found if not any(switch in name for switch in switches)]
    return found


def left_out(name: str, setting: Setting, compiled: Sequence[str]) -> str:
    """Why a variant is not measured; empty where it is. ``compiled``: networks torch.compile is
    measured on.
    """
    if "torch.compile" not in name:
        return ""
    if setting.name not in compiled:
        return f"compiles for minutes; --compile {setting.name} asks for it"
    if setting.device.type == "cpu" and not shutil.which("c++"):
        return "needs a C++ compiler"
    return ""


def backend(name: str) -> AbstractContextManager[None]:
    """What a variant runs on: whatever memdense chooses, or less."""
    if "without extension" in name:
        return memdense.use_backend("reference")
    if "in Triton" in name:
        return mock.patch.object(_extension, "cuda_runs_on", lambda device: False)
    return nullcontext()


def forward(model: nn.Module, x: Tensor, target: Tensor, setting: Setting) -> Tensor:
    """The loss, or in inference the logits."""
    with setting.autocast():
        if setting.inference:
            with torch.no_grad():
                return model(x)
        return F.cross_entropy(model(x), target)


def step(model: nn.Module, x: Tensor, target: Tensor, setting: Setting) -> Tensor:
    """Forward and, in training, backward; gradients are added to those that are there."""
    loss = forward(model, x, target, setting)
    if not setting.inference:
        loss.backward()
    return loss


def inputs(setting: Setting, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(setting.batch, 3, setting.size, setting.size, generator=generator)
    target = torch.randint(0, 1000, (setting.batch,), generator=generator)
    return x.to(setting.device), target.to(setting.device)


def results(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """What is compared: the loss or logits, and the gradients of each parameter and each kind."""
    found = {"output": out.detach().double().flatten()}
    kinds = defaultdict(list)
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if p.grad is not None:
                gradient = p.grad.double().flatten()
                found[f"gradient of {path}.{name}"] = gradient
                kinds[f"all {type(module).__name__}.{name} gradients"].append(gradient)
    return found | {kind: torch.cat(gradients) for kind, gradients in kinds.items()}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over norm, by name."""
    return {k: ((found[k] - v).norm() / v.norm()).item() for k, v in exact.items()}


# relative norm of an error; a ReLU's mask flips on rounding, and between layouts of the plain
# modules the gradients of a kind already differ by 0.01, of one parameter by 0.2
LIMITS = {"output": 1e-4, "all": 0.1, "gradient": 0.45}


@contextmanager
def float32_as_such() -> Iterator[None]:
    """Not in TF32: cuDNN, allowed it, may do without, and then others would look wrong."""
    convolution = torch.backends.cudnn.conv
    before = convolution.fp32_precision
    convolution.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolution.fp32_precision = before


def complaint(found: dict[str, float], plain: dict[str, float]) -> str:
    """What is wrong with float32 results whose errors are ``found``, beside the plain modules'.
    NaN is wrong.
    """
    for name, error in found.items():
        limit = max(4 * plain[name], LIMITS[name.split()[0]])
        if not error <= limit:
            return f"{name}: relative error {error:.1e}, plain modules {plain[name]:.1e}"
    return ""


def measure(
    setting: Setting,
    variants: Sequence[str],
    seconds: float,
    least: int = 3,
    tell: Callable[[str], None] = lambda what: None,
) -> dict[str, dict[str, Any] | Refused]:
    """By variant: its times, its ratio to the first and its memory; or why it was refused.

    All have the same weights and see the same images. First a small float32 step of each, outputs
    and gradients, is compared with the plain modules' in float64 (of a compiled one, which would
    compile once more, only the output of what is timed). Memory is a pass of its own. ``tell``
    hears what is under way.
    """
    tell("plain modules in float64")
    torch.manual_seed(0)
    plain = VARIANTS[BASE].make(setting.arch)
    weights = {key: value.clone() for key, value in plain.state_dict().items()}
    plain = plain.to(setting.device).train(not setting.inference)
    small = replace(setting, dtype=torch.float32, batch=2, size=min(setting.size, 64))

    def outcome(model: nn.Module, setting: Setting) -> dict[str, Tensor]:
        x, target = inputs(setting)
        dtype = next(model.parameters()).dtype
        with float32_as_such():
            return results(model, step(model, x.to(dtype), target, setting))

    tolerated = outcome(plain, small)
    plain.load_state_dict(weights)
    plain.zero_grad()
    exact = outcome(plain.double(), small)
    tolerated = errors(tolerated, exact)
    del plain

    x, target = inputs(setting)
    models, images, found = {}, {}, {}

    def prepare(name: str) -> str:
        """What is wrong with a variant; its model and images are kept if nothing is."""
        variant = VARIANTS[name]
        with torch.device("meta"):  # initialising millions of weights takes longer than a step
            model = variant.make(setting.arch)
        model.to_empty(device=setting.device).load_state_dict(weights)
        model = variant.finish(model.train(not setting.inference))
        if not hasattr(model, "_orig_mod"):
            with backend(name):
                reason = complaint(errors(outcome(model, small), exact), tolerated)
            if reason:
                return reason
            model.load_state_dict(weights)
        models[name] = model
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        images[name] = x.contiguous(memory_format=layout)
        return ""

    for name in variants:
        tell(f"checking {name}")
        try:
            if reason := prepare(name):
                found[name] = Refused(reason)
        except Exception as error:  # the others' times are worth having
            found[name] = refused(error)

    def run(name: str) -> Tensor:
        with backend(name):
            return step(models[name], images[name], target, setting).detach()

    outputs: dict[str, Tensor] = {}

    def check(name: str, out: Tensor) -> str:
        outputs[name] = out.double()
        first = next(iter(outputs.values()))
        error = ((outputs[name] - first).norm() / first.norm()).item()
        limit = 0.05 if setting.dtype.itemsize == 2 else 1e-3
        return "" if error <= limit else f"output: differs by {error:.1e} from the first"

    tell("timing")
    runs = {name: partial(run, name) for name in models}
    found |= interleaved(runs, check, Clock(setting.device), seconds, (least, 50))
    records = with_ratios({name: found[name] for name in variants})
    for name, record in records.items():
        if not isinstance(record, Refused):
            tell(f"weighing {name}")
            part = partial(forward, models[name], images[name], target, setting)
            try:
                peak, kept = weigh(runs[name], part, backend(name), setting)
                record |= {"peak bytes": peak, "kept bytes": kept}
            except Exception as error:
                records[name] = refused(error)
    models.clear()
    free()
    return records


def weigh(
    run: Callable[[], Tensor],
    only_forward: Callable[[], Tensor],
    context: AbstractContextManager[None],
    setting: Setting,
) -> tuple[int, int]:
    """Peak bytes of a step above model, images and ``.grad``; bytes alive after its forward."""
    with context:
        peak = memory.peak_memory(run, device=setting.device).peak
        if setting.inference:
            return peak, 0
        return peak, memory.peak_memory(only_forward, device=setting.device).retained


def free() -> None:
    """Give back what the last networks held, compiled code too."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
