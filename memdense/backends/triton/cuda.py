"""Operations in CUDA C++ by address: the extension records what one launches, and launches it again
on other memory (csrc/cuda/launches.h).

What an operation decided by sizes, strides and by which addresses are multiples of 16 bytes stays
decided: a replay's memory must look like the recorded one's.
"""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch._ops import OpOverload

from ... import _extension

# which do nothing but launch, on memory that they are given or that is only theirs
OPERATIONS = ("bn_relu_conv3x3", "bn_relu_conv3x3_backward")

libraries: dict[OpOverload, ctypes.CDLL] = {}  # whose operation it is


def add(namespace: Any, path: Path) -> None:
    """Record a namespace's operations, which the library at ``path`` registered."""
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "memdense_launch"):
        return  # built from older sources: these are called
    library.memdense_recorded.restype = ctypes.c_void_p
    library.memdense_launch.restype = ctypes.c_char_p
    libraries.update({getattr(namespace, name).default: library for name in OPERATIONS})


class Launches:
    """What an operation launched.

    Attributes:
        addresses: all that it launched on, each once.
        scratch: address and bytes of each piece that it allocated for itself.
    """

    def __init__(self, library: ctypes.CDLL, recording: int) -> None:
        self._recording = ctypes.c_void_p(recording)
        self._launch = library.memdense_launch
        weakref.finalize(self, library.memdense_forget, self._recording).atexit = False
        self.addresses = self._read(library.memdense_addresses, 1)
        numbers = self._read(library.memdense_scratch, 2)
        self.scratch = list(zip(numbers[::2], numbers[1::2], strict=True))
        self._pack = Struct(f"={1 + len(self.addresses)}Q").pack

    def _read(self, function: Any, width: int) -> list[int]:
        count = function(self._recording, None)
        to = (ctypes.c_uint64 * (width * count))()
        function(self._recording, to)
        return list(to)

    def __call__(self, stream: int, *addresses: int) -> None:
        """Launch it on the current device, with these in place of :attr:`addresses`."""
        error = self._launch(self._recording, self._pack(stream, *addresses))
        if error is not None:
            raise RuntimeError(error.decode())


def call(function: OpOverload, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Launches | None]:
    """What an operation returns, and its launches; None where there may be more to it."""
    library = libraries.get(function)
    if library is None:
        return function(*args, **kwargs), None
    library.memdense_record()
    try:
        out = function(*args, **kwargs)
    finally:
        recording = library.memdense_recorded()
        launches = Launches(library, recording) if recording else None
    return out, launches


if _extension.cuda_available():
    add(torch.ops.memdense, _extension.cuda_library())
