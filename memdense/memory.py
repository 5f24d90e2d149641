"""Measure, to the byte, the memory that a callable takes on the CPU or on a CUDA device.

    >>> peak_memory(torch.zeros, 1000)
    PeakMemory(peak=4.0 kB, retained=4.0 kB)
    >>> training_step_memory(torchvision.models.densenet121(), images, labels)
    StepMemory(peak=523.5 MB, live=519.4 MB, saved=519.4 MB, after=0 B, batch=4)

Figures are integers, in bytes; printed ones use decimal units (1 MB = 1,000,000 bytes).
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.nn import functional as F

__all__ = [
    "PeakMemory",
    "StepMemory",
    "format_bytes",
    "live_bytes",
    "peak_memory",
    "saved_bytes",
    "training_step_memory",
]


def format_bytes(count: float) -> str:
    """``count`` bytes in decimal units: ``"17 B"``, ``"4.0 kB"``, ``"12.9 MB"``, ``"1.4 GB"``."""
    if abs(count) < 999.5:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if abs(count) < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


@dataclass(frozen=True)
class PeakMemory:
    """What one call took, in bytes."""

    peak: int
    """The most that was allocated at any moment, above what was allocated on entry."""
    retained: int
    """What was still allocated when the call had returned and its result was alive."""
    result: Any = field(default=None, compare=False)
    """What the call returned. Drop it to free what it keeps alive."""

    def __repr__(self) -> str:
        peak, retained = format_bytes(self.peak), format_bytes(self.retained)
        return f"PeakMemory(peak={peak}, retained={retained})"


@dataclass(frozen=True)
class StepMemory:
    """What one training step took, in bytes above what was allocated before it.

    Parameters, buffers, input, target and (after a first step) parameter gradients and optimiser
    state exist before the step, so that none of them counts.
    """

    peak: int
    """The most that was allocated at any moment of the step."""
    live: int
    """What was allocated between forward and backward, the loss included."""
    saved: int
    """The part of ``live`` that saved-tensor hooks see: see :func:`saved_bytes`."""
    after: int
    """What the step left behind: 0 unless something keeps memory from one step to the next."""
    batch: int
    """How many images the step took."""

    @property
    def per_image(self) -> StepMemory:
        """The same figures divided by the batch, rounded to whole bytes."""
        shares = (round(n / self.batch) for n in (self.peak, self.live, self.saved, self.after))
        return StepMemory(*shares, batch=1)

    def __repr__(self) -> str:
        names = ("peak", "live", "saved", "after")
        figures = ", ".join(f"{name}={format_bytes(getattr(self, name))}" for name in names)
        return f"StepMemory({figures}, batch={self.batch})"


def peak_memory(
    fn: Callable[..., Any],
    *args: Any,
    device: torch.device | str | int | None = None,
    **kwargs: Any,
) -> PeakMemory:
    """Call ``fn(*args, **kwargs)`` once and measure the memory that it takes on one device.

    Call ``fn`` once beforehand if it sets something up on its first call. ``args`` stay alive
    during the call, so ``fn`` cannot free them. Times measured in here mean nothing.

    On the CPU this counts, to the byte, what PyTorch's CPU allocator hands out to the calling
    thread and to the threads on which autograd works for it. It sees neither memory that
    libraries such as oneDNN or MKL take from the system themselves, nor other threads that ``fn``
    starts. Freeing a block that existed on entry does not lower the figures.

    On CUDA this counts blocks of the caching allocator, which are multiples of 512 bytes, of all
    threads and streams; freeing a block that existed on entry lowers the figures. The device's
    peak statistics are reset.

    Args:
        device: the CPU or a CUDA device. By default that of the tensors and modules among ``fn``
            and its arguments (the first that is not on the CPU), else PyTorch's default device.
            Pass it where ``fn`` finds its CUDA tensors in a closure or a container.

    Raises:
        ValueError: the device is neither the CPU nor a CUDA device.
        RuntimeError: a profiler is already running (CPU): the two cannot be nested.
    """
    device = _find_device(fn, args, kwargs) if device is None else torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"memory is measured on cpu and cuda devices, not on {device.type!r}")
    if device.type == "cuda":
        return _measure_cuda(lambda: fn(*args, **kwargs), device)
    return _measure_cpu(lambda: fn(*args, **kwargs))


def live_bytes(
    fn: Callable[..., Any],
    *args: Any,
    device: torch.device | str | int | None = None,
    **kwargs: Any,
) -> int:
    """Bytes allocated by ``fn(*args, **kwargs)`` that are still allocated when it has returned.

    For a forward pass that returns its loss these are the bytes alive between forward and
    backward. Unlike :func:`saved_bytes` it also sees what a custom function keeps outside
    ``save_for_backward``. Arguments and errors are those of :func:`peak_memory`.
    """
    return peak_memory(fn, *args, device=device, **kwargs).retained


def saved_bytes(
    fn: Callable[..., Any],
    *args: Any,
    exclude: nn.Module | Tensor | Iterable[nn.Module | Tensor] = (),
    **kwargs: Any,
) -> int:
    """Bytes of the tensors that autograd keeps for the backward of ``fn(*args, **kwargs)``.

    Counts what passes through saved-tensor hooks and is still kept when ``fn`` has returned: each
    storage once and whole, also where only a view of it was saved. Storages on all devices
    count. Hooks see neither tensors that a custom function keeps outside ``save_for_backward``
    nor what other hooks inside ``fn`` keep instead: :func:`live_bytes` counts both.

    Args:
        exclude: tensors, and modules for their parameters and buffers, whose storages do not
            count: a model and its input, say. Views of them do not count either.
    """
    _, count = _call_and_count_saved(lambda: fn(*args, **kwargs), exclude)
    return count


def training_step_memory(
    model: nn.Module,
    x: Tensor,
    target: Any = None,
    loss: Callable[..., Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> StepMemory:
    """Measure a training step of ``model``: forward, backward and, if given, optimiser step.

    A first step that is not measured allocates ``.grad`` and the optimiser's state. Gradients are
    then zeroed in place, not freed, so that they belong to the baseline.

    The model runs three times in the mode that it is in: running statistics move, gradients end
    up zero and, with an optimiser, parameters change. Give a copy where that matters.

    Args:
        x: the input, (N, ...), on the device to measure.
        target: given to ``loss`` as its second argument unless it is None.
        loss: ``loss(output, target)`` or ``loss(output)``, a scalar tensor. By default cross
            entropy with a target, and the mean square of the output without.

    Raises:
        ValueError: ``x`` holds no image, or is neither on the CPU nor on a CUDA device.
        RuntimeError: a profiler is already running (CPU), or nothing requires gradients.
    """
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"expected a batch of at least one image, got shape {tuple(x.shape)}")

    def forward() -> Tensor:
        output = model(x)
        if loss is None:
            return output.square().mean() if target is None else F.cross_entropy(output, target)
        return loss(output) if target is None else loss(output, target)

    def backward(value: Tensor) -> None:
        value.backward()
        if optimizer is not None:
            optimizer.step()

    def zero_gradients() -> None:
        for tensor in (x, *model.parameters()):
            if tensor.grad is not None:
                tensor.grad.zero_()

    inputs = (tensor for tensor in (x, target) if isinstance(tensor, Tensor))
    value, saved = _call_and_count_saved(forward, (model, *inputs))
    backward(value)
    zero_gradients()

    between = peak_memory(forward, device=x.device)
    backward(between.result)
    zero_gradients()
    live = between.retained
    del value, between

    step = peak_memory(lambda: backward(forward()), device=x.device)
    zero_gradients()
    return StepMemory(step.peak, live, saved, step.retained, batch=len(x))


def _measure_cuda(call: Callable[[], Any], device: torch.device) -> PeakMemory:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    gc.collect()
    return PeakMemory(peak - before, torch.cuda.memory_allocated(device) - before, result)


def _measure_cpu(call: Callable[[], Any]) -> PeakMemory:
    if torch.autograd._profiler_enabled():
        raise RuntimeError("CPU memory is measured with PyTorch's profiler: one is running already")
    _warm_up_profiler()
    with profile(use_kineto=True, profile_memory=True) as profiler:
        result = call()
        gc.collect()
    peak, retained = _follow(_allocation_events(profiler))
    return PeakMemory(peak, retained, result)


def _follow(events: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Peak and final sum of the blocks that ``events``, (address, ±bytes) each, allocate."""
    live: dict[int, int] = {}
    total = peak = 0
    for address, size in events:
        # A free of an address that is not live belongs to a block from before, and its size may
        # be an earlier tenant's. An address handed out while live was freed out of sight.
        total -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            total += size
            peak = max(peak, total)
    return peak, total


def _allocation_events(profiler: profile) -> list[tuple[int, int]]:
    """(address, bytes) of each CPU allocation and, with negative bytes, free, in order of time."""
    timed = []
    nodes = list(profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children)
        if node.name == "[memory]" and node.extra_fields.device.type == "cpu":
            fields = node.extra_fields
            timed.append((node.start_time_ns, fields.ptr, fields.alloc_size))
    timed.sort(key=lambda event: event[0])
    return [(address, size) for _, address, size in timed]


@cache
def _warm_up_profiler() -> None:
    """Pay the profiler's start-up, about a second, once and outside measurements."""
    # Kineto writes to stderr at each start and stop unless told otherwise before its first start.
    level = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        with profile(use_kineto=True, profile_memory=True):
            torch.empty(1)
    finally:
        if level is None:
            del os.environ["KINETO_LOG_LEVEL"]


class _Kept:
    """What autograd holds instead of a saved tensor; it dies with the graph."""

    def __init__(self, tensor: Tensor) -> None:
        # A node that saves its own output would keep itself alive through that output's grad_fn.
        self.tensor = tensor.detach()


def _call_and_count_saved(
    call: Callable[[], Any], exclude: nn.Module | Tensor | Iterable[nn.Module | Tensor]
) -> tuple[Any, int]:
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        handle = _Kept(tensor)
        kept.add(handle)
        return handle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor):
        result = call()
    gc.collect()
    storages = dict(_storage(handle.tensor) for handle in kept)
    excluded = {_storage(tensor)[0] for tensor in _tensors(exclude)}
    return result, sum(size for key, size in storages.items() if key not in excluded)


def _storage(tensor: Tensor) -> tuple[tuple[torch.device, int], int]:
    """A key that tensors share exactly if they share a storage, and the storage's bytes."""
    storage = tensor.untyped_storage()
    return (storage.device, storage.data_ptr()), storage.nbytes()


def _tensors(items: nn.Module | Tensor | Iterable[nn.Module | Tensor]) -> Iterator[Tensor]:
    if isinstance(items, Tensor):
        yield items
    elif isinstance(items, nn.Module):
        yield from items.parameters()
        yield from items.buffers()
    else:
        for item in items:
            yield from _tensors(item)


def _find_device(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    known = (Tensor, nn.Module)
    given = [item for item in (fn, *args, *kwargs.values()) if isinstance(item, known)]
    devices = [tensor.device for tensor in _tensors(given)]
    for device in devices:
        if device.type != "cpu":
            return device
    return devices[0] if devices else torch.get_default_device()
