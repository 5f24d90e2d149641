"""What the suite's options ask for, with defaults that fit the machine."""

from dataclasses import dataclass

import pytest
import torch
from variants import ARCHS, Setting


@dataclass(frozen=True)
class Options:
    device: torch.device
    dtype: torch.dtype
    quick: bool
    compiled: tuple[str, ...]
    archs: tuple[str, ...]
    batch: int | None
    size: int | None
    seconds: float

    def setting(self, name: str, inference: bool) -> Setting:
        """What is run of a network; batch and size as fit the machine unless they were given."""
        arch = ARCHS[name]
        size = arch.size
        if self.quick and not arch.small_inputs:
            size = 64
        if self.size is not None and not arch.small_inputs:
            size = self.size
        batch = self.batch or self._batch(name, size)
        return Setting(arch, name, batch, size, self.dtype, self.device, inference)

    def _batch(self, name: str, size: int) -> int:
        if self.quick:
            return 2
        if self.device.type == "cpu":
            return 32 if ARCHS[name].small_inputs else 4 if name == "densenet121" else 2
        # the plain modules' float32 step in a third of the memory; a power of two
        memory = torch.cuda.get_device_properties(self.device).total_memory / 3
        image = 1e6 * ARCHS[name].megabytes_per_image * (size / ARCHS[name].size) ** 2
        return 1 << min(8, max(0, int(memory / image).bit_length() - 1))


QUICK_ARCHS = "densenet121", "bc100-12"


def options_of(config: pytest.Config) -> Options:
    get = config.getoption
    quick, device = get("--quick"), get("--device")
    dtype = get("--dtype") or ("bfloat16" if device.type == "cuda" else "float32")
    compiled = get("--compile")
    if compiled is None:
        compiled = ["densenet121"] if device.type == "cuda" and not quick else []
    return Options(
        device, getattr(torch, dtype), quick, tuple(compiled),
        tuple(get("--arch") or (QUICK_ARCHS if quick else ARCHS)), get("--batch"), get("--size"),
        0.5 if quick else get("--seconds"),
    )  # fmt: skip
