"""Times every candidate of the bottleneck's kernels on the device at hand; see :mod:`.tuning`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import triton

from ...buffers import Into, NormGradient, Reader, Sums
from . import conv1x1
from .tiles import hopper, multiprocessors, precision
from .tuning import Config, bucket, device_name, forced, save

# M, C, B: the blocks of an ImageNet network at batches 16, 64 and 256, and those of narrower and
# wider ones
SIZES = [
    (batch * side * side, c, 128)
    for batch in (16, 64, 256)
    for side, channels in ((56, (64, 128, 256)), (28, (128, 256, 512)), (14, (256, 512, 1024)),
                           (7, (512, 1024)))
    for c in channels
] + [(64 * 32 * 32, 128, 48), (256 * 14 * 14, 512, 192)]  # fmt: skip


class Problem(NamedTuple):
    """One kernel at one size."""

    kernel: str
    entry: str
    candidates: tuple[Config, ...]
    run: Callable[[], object]


def problems(
    dtype: torch.dtype,
    sizes: Iterable[tuple[int, int, int]],
    device: torch.device,
    least: int = 2,
) -> Iterator[Problem]:
    """The bottleneck's kernels on random values; those with fewer candidates are left out."""
    precise = precision(dtype)

    def reader(channels: int) -> Reader:
        return Reader(*torch.rand(4, channels, device=device), 1e-5, True)

    for m, c, b in sizes:
        if not conv1x1.takes(dtype, b):
            continue
        x, g = (torch.randn(m, c, device=device).to(dtype) for _ in range(2))
        dz, y = (torch.randn(m, b, device=device).to(dtype) for _ in range(2))
        weight, read = torch.randn(b, c, device=device).to(dtype), reader(c)
        moments = torch.empty(2, b, device=device)
        behind = NormGradient(reader(b), Sums(*torch.rand(2, b, device=device)), m)
        into = Into(g, torch.zeros(2, c, device=device), True)

        def forward(x=x, read=read, weight=weight, moments=moments) -> object:
            return conv1x1.forward(x, read, weight, moments)

        def backward(dz=dz, y=y, behind=behind, weight=weight, x=x, read=read, into=into) -> object:
            return conv1x1.backward(dz, y, behind, weight, x, read, into, True)

        on_hopper, processors = hopper(device), multiprocessors(device)
        configs = conv1x1.forward_configs(dtype, precise, m, b, on_hopper, processors)
        walks = conv1x1.gradient_configs(dtype, precise, b, on_hopper, conv1x1.roomy(m, dtype))
        kernels = ("forward_1x1", configs, forward), ("gradients_1x1", walks, backward)
        for kernel, candidates, run in kernels:
            if len(candidates) >= least:
                yield Problem(kernel, bucket(kernel, dtype, m, c, b), candidates, run)


def fastest(
    problem: Problem, milliseconds: Callable[[Callable[[], object]], float] | None = None
) -> tuple[Config, dict[Config, float]]:
    """A problem's winner, and the median milliseconds of each candidate."""
    timer = milliseconds or (lambda run: triton.testing.do_bench(run, return_mode="median"))
    times = {}
    for config in problem.candidates:
        with forced(problem.kernel, config):
            times[config] = timer(problem.run)
    return min(times, key=times.__getitem__), times


def run(dtype: torch.dtype) -> None:
    """Tune for the current CUDA device, telling how it goes, and keep the winners."""
    device = torch.device("cuda")
    found = {}
    print(device_name())
    for problem in problems(dtype, SIZES, device):
        winner, times = fastest(problem)
        found[problem.entry] = winner
        first = times[problem.candidates[0]]
        print(f"{problem.entry}: {tuple(winner)}, {first / times[winner]:.2f} times the default")
    print(f"kept in {save(found)}")
