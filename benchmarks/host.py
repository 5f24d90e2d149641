"""The host's part of a training step on the Triton backend: what Python, autograd and launching
take, whatever the GPU does meanwhile.

    python benchmarks/host.py --arch densenet121

On a CUDA device kernels are launched and nobody waits for them; without one, launches are replaced
by a function that does nothing, and the few operations of PyTorch's own run on the CPU. Images are
small, so that neither the GPU nor those operations count.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from statistics import median
from typing import Any
from unittest import mock

import torch
from measure import Clock, default_device, describe, interleaved
from rich.console import Console
from rich.table import Table
from variants import ARCHS, Setting, inputs, memdense_model, step

from memdense import ops
from memdense.backends.triton import Triton, launch, replay


@contextmanager
def without_gpu() -> Iterator[None]:
    """Launches that do nothing."""

    def nothing(*_: Any) -> None:
        pass

    def compiled(*_: Any) -> launch.Compiled:
        return launch.Compiled(nothing, 0, ())

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch, "INTERPRETED", False))
        stack.enter_context(mock.patch.object(launch, "current_stream", lambda _: 0))
        stack.enter_context(mock.patch.object(launch.Plan, "compile_and_launch", compiled))
        stack.enter_context(mock.patch.object(ops, "backend_for", lambda _: Triton()))
        # memory that no kernel wrote may hold numbers that a CPU is slow with
        torch.set_flush_denormal(True)
        yield


class HostClock(Clock):
    """The host's clock, from when the device has nothing to do; where there is no device, that of
    this thread alone.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device("cpu"), shared=device.type != "cuda")
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def time(self, run: Callable[[], Any]) -> float:
        self.wait()
        return super().time(run)


def launches_of(run: Callable[[], Any]) -> int:
    """How many Triton kernels a step launches."""
    with launch.recorded() as log:
        run()
    return len(log)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHS, default="densenet121")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=32, help="pixels of an image's side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()

    device = default_device()
    torch.set_num_threads(1)
    arch, dtype = ARCHS[args.arch], getattr(torch, args.dtype)
    setting = Setting(arch, args.arch, args.batch, args.size, dtype, device)
    model = memdense_model(arch).to(device)
    x, target = inputs(setting)

    def training_step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        return step(model, x, target, setting)

    def variant(wanted: bool) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with replay.replaying(wanted):
                return training_step()

        return run

    variants = {"replayed": variant(True), "launch by launch": variant(False)}
    with nullcontext() if device.type == "cuda" else without_gpu():
        for _ in range(3):
            variants["replayed"]()
        count = launches_of(training_step)
        rounds = args.rounds, args.rounds
        times = interleaved(variants, lambda *_: "", HostClock(device), 1e9, rounds)

    table = Table(title=f"{args.arch}, {args.batch} images of {args.size}x{args.size}")
    for column in ("launches", "of a step", "host's time, ms"):
        table.add_column(column)
    for name, found in times.items():
        table.add_row(name, str(count), f"{median(found) * 1e3:.1f}")
    console = Console(width=110)
    console.print(table)
    if device.type != "cuda":
        console.print("No GPU: launches are replaced by a function that does nothing.")
    console.print(", ".join(f"{key} {value}" for key, value in describe(device).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
