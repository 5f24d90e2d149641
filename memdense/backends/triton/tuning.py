"""Which configuration a kernel runs in: the one measured fastest on this device, else the first.

Nothing is measured while a model runs. ``python -m memdense tune`` times every candidate of the 1x1
kernels at a few sizes and leaves the winners in a file, read once per process. Sizes are bucketed
by powers of two, so that a network's layers share a handful of entries.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

REGISTERS = 1 << 16  # of a multiprocessor


class Config(NamedTuple):
    """A tile's rows and columns, the columns of the product's inner dimension, and how it runs:
    ``resident`` programs share a multiprocessor and its registers.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    resident: int = 1

    @property
    def registers(self) -> int:
        """Triton's ``maxnreg``; where none is named the compiler may spill to need fewer."""
        return min(255, REGISTERS // (32 * self.warps * self.resident) // 8 * 8)


def path() -> Path:
    """$MEMDENSE_TUNING, or tuning.json in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MEMDENSE_TUNING") or Path(cache) / "memdense" / "tuning.json")


def device_name() -> str:
    """What winners are kept under: timings hold for one device and one compiler."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"{name}, triton {triton.__version__}"


def bucket(kernel: str, dtype: torch.dtype, *sizes: int) -> str:
    """The entry that sizes fall into."""
    powers = (str(1 << max(0, size - 1).bit_length()) for size in sizes)
    return " ".join((kernel, str(dtype).removeprefix("torch."), *powers))


@lru_cache(maxsize=1)
def winners() -> dict[str, list[int]]:
    """The entries of the file for the device that is current at the first call; none where there is
    no readable file.
    """
    try:
        found = json.loads(path().read_text()).get(device_name(), {})
        return {entry: list(map(int, config)) for entry, config in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        warnings.warn(f"memdense ignores {path()}: {error}", stacklevel=2)
        return {}


_forced: tuple[str, Config] | None = None


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Run ``kernel`` in ``config`` inside."""
    global _forced
    before, _forced = _forced, (kernel, config)
    try:
        yield
    finally:
        _forced = before


def is_forced() -> bool:
    """Whether :func:`forced` decides."""
    return _forced is not None


def choose(
    kernel: str, dtype: torch.dtype, sizes: tuple[int, ...], candidates: Sequence[Config]
) -> Config:
    """The candidate for these sizes. One that a file names but the kernel no longer has is not
    taken.
    """
    if _forced is not None and _forced[0] == kernel:
        return _forced[1]
    found = winners()
    if found:
        config = found.get(bucket(kernel, dtype, *sizes))
        if config is not None and tuple(config) in candidates:
            return Config(*config)
    return candidates[0]


def save(found: dict[str, Config]) -> Path:
    """Add this device's winners to the file."""
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    winners.cache_clear()
    mine = winners() | {entry: list(config) for entry, config in found.items()}
    try:
        everything = dict(json.loads(target.read_text()))
    except (OSError, ValueError, TypeError):
        everything = {}
    everything[device_name()] = mine
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    partial.write_text(json.dumps(everything, indent=1, sort_keys=True))
    partial.replace(target)
    winners.cache_clear()
    return target
