"""How everything here is timed: checked first, side by side, against what the machine can do."""

import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision

import memdense
from memdense import _extension

Run = Callable[[], Any]
HEAD_START = 2_000_000  # cycles of a GPU, about a millisecond


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock:
    """Seconds of device time: CUDA events there, the host's clock elsewhere.

    Args:
        cold: empty the caches before each run, so that inputs come from memory. On CUDA the device
            then rests for a millisecond, in which launches get ahead: small kernels do not wait
            for Python.
        shared: count the CPU time of this thread only, for a machine that others use.
    """

    def __init__(self, device: torch.device, cold: bool = False, shared: bool = False) -> None:
        self.cuda = device.type == "cuda"
        # as after any training step: until a large tensor was freed, glibc returns memory at once
        torch.empty(30 << 20, dtype=torch.uint8)
        self.now = time.thread_time if shared else time.perf_counter
        self.fill = torch.empty(256 << 20, dtype=torch.uint8, device=device) if cold else None

    def mark(self) -> Any:
        if not self.cuda:
            return self.now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def time(self, run: Run) -> float:
        if self.fill is not None:
            self.fill.zero_()
            if self.cuda:
                torch.cuda._sleep(HEAD_START)
        start = self.mark()
        run()
        return self.between(start, self.mark())


@dataclass(frozen=True)
class Refused:
    """Why a variant has no times."""

    reason: str


def refused(error: Exception) -> Refused:
    """What a variant that raised has in place of times: the error's first line."""
    return Refused(": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]]))


def interleaved(
    variants: Mapping[str, Run],
    check: Callable[[str, Any], str],
    clock: Clock,
    seconds: float,
    rounds: tuple[int, int] = (3, 50),
) -> dict[str, list[float] | Refused]:
    """Times of each variant, in rounds that take each once, in an order of the round's own: what
    slows the machine slows all, and none always follows the same other one.

    First each runs once, and ``check(name, result)`` says what is wrong with its result, nothing
    if it is right. What is wrong, or raises an error (Triton's are no RuntimeErrors), is refused. A
    second, untimed round warms up and tells how many rounds fit into ``seconds``, at least and at
    most ``rounds`` of them; runs that are longer than that need no second one.
    """
    found: dict[str, list[float] | Refused] = {}
    first = 0.0
    for name, run in variants.items():
        start = time.perf_counter()
        try:
            result = run()
            # of one variant alone: others may compile in here
            first = first or time.perf_counter() - start
            reason = check(name, result)
            found[name] = Refused(reason) if reason else []
        except Exception as error:
            found[name] = refused(error)
    ready = [name for name, times in found.items() if not isinstance(times, Refused)]
    least, most = rounds
    count = least
    if first * len(ready) < max(seconds, 1.0):
        start = time.perf_counter()
        for name in ready:
            clock.time(variants[name])
        count = int(seconds / max(time.perf_counter() - start, 1e-9))
    order = random.Random(0)
    for _ in range(max(least, min(count, most))):
        for name in order.sample(ready, len(ready)):
            found[name].append(clock.time(variants[name]))
    return found


def with_ratios(
    found: Mapping[str, list[float] | Refused], **extra: Any
) -> dict[str, dict[str, Any] | Refused]:
    """Times with their ratio to the first variant's, the median of the ratios within each round."""
    base = next(iter(found.values()))
    records: dict[str, dict[str, Any] | Refused] = {}
    for name, times in found.items():
        if isinstance(times, Refused):
            records[name] = times
            continue
        records[name] = {"times": times, **extra}
        if not isinstance(base, Refused):
            ratios = [a / b for a, b in zip(times, base, strict=True)]
            records[name]["ratio"] = statistics.median(ratios)
    return records


class Ceilings(NamedTuple):
    """What a device can do at most: bytes/s of a copy (read and written), FLOP/s of a product."""

    bandwidth: float
    arithmetic: float

    def floor(self, size: float, flop: float) -> float:
        """Seconds that moving ``size`` bytes and computing ``flop`` take at the very least."""
        return max(size / self.bandwidth, flop / self.arithmetic)


@cache
def ceilings(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Ceilings:
    """Both, measured here and now on random data: the best of several runs."""
    cuda = device.type == "cuda"
    clock = Clock(device)
    repeat = 3 if quick else 10
    source = torch.randn((256 if cuda else 64) << (14 if quick else 20), device=device)
    target = torch.empty_like(source)
    side = 8192 if cuda else 2048
    a, b = (torch.randn(side >> quick, side >> quick, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    copies, products = [], []
    for _ in range(repeat):
        copies.append(clock.time(lambda: target.copy_(source)))
        products.append(clock.time(lambda: torch.mm(a, b, out=out)))
    return Ceilings(
        2 * source.numel() * source.element_size() / min(copies), 2 * len(a) ** 3 / min(products)
    )


def describe(device: torch.device) -> dict[str, str | int]:
    """Where a figure comes from."""
    root = Path(__file__).resolve().parent.parent
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        where = {"device": name, "driver": driver}
    else:
        instructions = _extension.instructions() or torch.backends.cpu.get_cpu_capability()
        where = {"device": _cpu_name(), "instructions": instructions}
    return where | {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "memdense": memdense.__version__,
        "commit": _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"),
        "python": platform.python_version(),
    }


def _output(*command: str) -> str:
    """The first line a command prints; nothing where there is no such command."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ""
    return found.strip().split("\n")[0]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
