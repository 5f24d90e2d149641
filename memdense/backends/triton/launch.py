"""Launching Triton kernels from plans: all that a launch needs but its tensors is decided once.

A primitive asks a cached function for the plan of its shapes and dtypes and calls it with tensors.
The first call on a device compiles through Triton's JIT; later ones hand the compiled kernel its
pointers, a few microseconds each, after a look at their alignment, which the code depends on. What
a whole stage launches is replayed by :mod:`.replay`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor

ALIGNMENT = 16  # bytes that Triton's widest loads want

INTERPRETED = triton.knobs.runtime.interpret

# How many rows, lines, tiles and programs there are. That such a number is 1 or a multiple of 16
# makes no code better (pack_rows has its own way to know): not to be told leaves less to compile,
# for the last batch of an epoch above all.
COUNTS = (
    "M", "P", "H", "W", "H2", "W2", "n1", "n2", "rows", "lines", "columns", "channels", "count",
    "tiles", "plane", "across", "share", "walkers", "segments", "splits", "stride",
)  # fmt: skip
kernel = triton.jit(do_not_specialize=COUNTS)


class Launch(NamedTuple):
    """A launch as :func:`recorded` saw it."""

    plan: Plan
    tensors: tuple[Tensor | None, ...]


class Compiled(NamedTuple):
    """What Triton's launcher needs of a compiled kernel."""

    run: Callable[..., None]
    function: int
    metadata: Any
    kernel: Any = None  # which unloads its code when nobody holds it


class Recorder(Protocol):
    """Who makes a thread's launches while a stage is recorded."""

    def launch(self, plan: Plan, tensors: tuple[Tensor | None, ...]) -> None: ...

    def constant(self, make: Callable[[], Tensor]) -> Tensor: ...


class _Thread(threading.local):
    recorder: Recorder | None = None


thread = _Thread()
# while one thread loads a kernel Triton shows it to others unfinished
_compiling = threading.Lock()
_record: list[Launch] | None = None
_dry = False


def observed() -> bool:
    """Whether :func:`recorded` wants to see every launch."""
    return _record is not None


def current_stream(device: int) -> int:
    return torch._C._cuda_getCurrentRawStream(device)


@contextmanager
def recorded(dry: bool = False) -> Iterator[list[Launch]]:
    """Every launch made inside, in order; ``dry``: without running them, on any tensors."""
    global _record, _dry
    before = _record, _dry
    _record, _dry = [], dry
    try:
        yield _record
    finally:
        _record, _dry = before


class Plan:
    """A kernel with its grid, sizes and constants; calling it launches it on tensors.

    Args:
        kernel: a :data:`kernel`, which takes tensors (or None), then ``sizes``, then
            ``constants``.
        grid: how many programs, per axis.
        sizes: numbers known at run time.
        constants: the values of the kernel's ``tl.constexpr`` arguments, in order.
        warps, stages, registers: Triton's ``num_warps``, ``num_stages`` and ``maxnreg``.
    """

    __slots__ = ("arguments", "compiled", "constants", "grid", "kernel", "options")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        sizes: tuple[int | float, ...],
        constants: tuple[Any, ...] = (),
        warps: int = 4,
        stages: int = 2,
        registers: int | None = None,
    ) -> None:
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.constants = constants
        self.arguments = (*sizes, *constants)
        self.options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
        self.compiled: dict[tuple, Compiled] = {}

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def __call__(self, *tensors: Tensor | None) -> None:
        if _record is not None:
            _record.append(Launch(self, tensors))
            if _dry:
                return
        if thread.recorder is not None:
            thread.recorder.launch(self, tensors)
        else:
            self.launch(tensors)

    def launch(self, tensors: tuple[Tensor | None, ...]) -> Compiled | None:
        """Launch it; returns what was launched, None in the interpreter."""
        if INTERPRETED:
            self.kernel[self.grid](*tensors, *self.arguments)
            return None
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        dtypes = [None if t is None else t.dtype for t in tensors]
        bits = 0
        for pointer in pointers:
            bits |= pointer or 0
        aligned = not bits % ALIGNMENT or tuple([not (p or 0) % ALIGNMENT for p in pointers])
        key = tensors[0].get_device(), aligned, *dtypes
        found = self.compiled.get(key)
        if found is None:
            found = self.compiled[key] = self.compile_and_launch(tensors)
            return found
        run, function, metadata, _ = found
        stream = current_stream(key[0])
        run(*self.grid, stream, function, metadata, None, None, None, *pointers, *self.arguments)
        return found

    def compile_and_launch(self, tensors: tuple[Tensor | None, ...]) -> Compiled:
        with _compiling:
            compiled = self.kernel[self.grid](*tensors, *self.arguments, **self.options)
        return Compiled(compiled.run, compiled.function, compiled.packed_metadata, compiled)


def table_of(lines: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Lines of int64, for a cache. A thread of its own makes it: what this one allocates may belong
    to a CUDA graph, which torch.compile's "reduce-overhead" warms up and captures thread by thread.
    """
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(lambda: torch.tensor(lines, dtype=torch.int64).to(device)).result()


def constant(make: Callable[[], Tensor]) -> Tensor:
    """``make()``: a table that depends on no values, only on where a stage's parameters are."""

    def kept() -> Tensor:
        table = make()
        keep_while_read(table)
        return table

    return kept() if thread.recorder is None else thread.recorder.constant(kept)


_captured: dict[int, Tensor] = {}


def keep_while_read(table: Tensor) -> None:
    """What caches may drop, until what is about to read it on the current stream has done so."""
    if not table.is_cuda:
        return
    if torch.cuda.is_current_stream_capturing():
        _captured[id(table)] = table  # a graph reads it whenever it runs
    else:
        table.record_stream(torch.cuda.current_stream(table.device))
