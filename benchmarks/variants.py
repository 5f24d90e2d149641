"""The models that are compared, built and stepped in one place for speed and memory alike."""

import platform
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import memdense

# per architecture: growth rate, blocks, first channels; torchvision has no densenet264 of its own
ARCHS = {
    "densenet121": (32, (6, 12, 24, 16), 64),
    "densenet169": (32, (6, 12, 32, 32), 64),
    "densenet201": (32, (6, 12, 48, 32), 64),
    "densenet264": (32, (6, 12, 64, 48), 64),
    "bc100-12": (12, (16, 16, 16), 24),
}
SMALL_INPUTS = {"bc100-12"}


def torchvision_model(arch: str, **kwargs: object) -> nn.Module:
    model = torchvision.models.DenseNet(*ARCHS[arch], **kwargs)
    if arch in SMALL_INPUTS:
        # torchvision has no stem for small images: a 3x3 convolution and nothing else
        del model.features.norm0, model.features.relu0, model.features.pool0
        model.features.conv0 = nn.Conv2d(3, ARCHS[arch][2], 3, padding=1, bias=False)
    return model


def memdense_model(arch: str, **kwargs: object) -> nn.Module:
    return memdense.DenseNet(*ARCHS[arch], small_inputs=arch in SMALL_INPUTS, **kwargs)


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


# the first is what every other is measured against
VARIANTS: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": torchvision_model,
    "torchvision, channels last": lambda arch: channels_last(torchvision_model(arch)),
    "torchvision, memory_efficient": lambda arch: torchvision_model(arch, memory_efficient=True),
    "memdense": memdense_model,
    "memdense without extension": memdense_model,
    "memdense, recompute_stem=False": lambda arch: memdense_model(arch, recompute_stem=False),
    "memdense, keep_bottlenecks=True": lambda arch: memdense_model(arch, keep_bottlenecks=True),
}


def build(arch: str, device: torch.device) -> dict[str, nn.Module]:
    """Every variant with the same weights, in training mode."""
    models = {name: make(arch).to(device) for name, make in VARIANTS.items()}
    weights = next(iter(models.values())).state_dict()
    for model in models.values():
        model.load_state_dict(weights)
    return models


def images(name: str, batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, 3, size, size, device=device)
    if "channels last" in name:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.randint(0, 1000, (batch,), device=device)


def step(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Forward and backward, gradients added to those that are there."""
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    return loss


def backend(name: str) -> AbstractContextManager[None]:
    """What a variant runs on: whatever memdense chooses, or PyTorch's operations."""
    return memdense.use_backend("reference") if "without extension" in name else nullcontext()


def check_same_loss(models: dict[str, nn.Module], size: int, device: torch.device) -> None:
    """All variants compute one thing; refuse to time them otherwise."""
    torch.manual_seed(0)
    x, target = images("", 2, size, device)
    losses = [step(model, x, target).item() for model in models.values()]
    if max(losses) - min(losses) > 1e-4 * abs(losses[0]):
        raise AssertionError(f"the variants disagree: {dict(zip(models, losses, strict=True))}")


def describe(device: torch.device) -> dict[str, str | int]:
    """Where a figure comes from."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "memdense": memdense.__version__,
        "commit": commit,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
