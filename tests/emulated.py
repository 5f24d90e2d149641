"""The CUDA kernels on the CPU: csrc/cuda, built with tests/emulation. conftest.py hands it out."""

from __future__ import annotations

import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

from memdense import _extension

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX", "c++")
PLAIN, FORWARD, GRADIENT = range(3)  # modes of a convolution
SHARED = 100 * 1024  # bytes a block may have
LANGUAGE = ("-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000")  # setup.py's
FLAGS = [
    *(*LANGUAGE, "-O1", "-fPIC", "-fvisibility=hidden", "-w"),
    *("-I", str(ROOT / "tests" / "emulation"), "-I", str(ROOT / "csrc" / "cuda")),
]
# what the kernels in each library are compiled with: "raced" is told of their accesses
KERNELS = {"emulated": (), "raced": ("-fsanitize=thread", "-fno-threadsafe-statics")}


def build(directory: Path, name: str) -> Path:
    """The operations of csrc/cuda, of another name and on the CPU, with the emulation inside."""
    library = directory / f"{name}.so"
    if library.exists():
        return library
    sources = [
        ROOT / "csrc" / "ops.cpp",
        *(ROOT / "tests" / "emulation").glob("*.cpp"),
        *(ROOT / "csrc" / "cuda").glob("*.cu"),
    ]
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]

    def run(*command: object) -> None:
        done = subprocess.run([COMPILER, *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def compiled(source: Path) -> Path:
        target = directory / f"{name}.{source.name}.o"
        more = KERNELS[name] if source.name.startswith("conv3x3_") else ()
        flags = *FLAGS, f"-Dmemdense=memdense_{name}", *more, *includes
        run(*flags, "-x", "c++", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    part = library.with_suffix(".part")
    run("-shared", *objects, *libraries, "-ltorch", "-ltorch_cpu", "-lc10", "-o", part)
    part.rename(library)
    return library


class Emulation:
    """The operations that a library of :func:`build` has, and the machine they run on."""

    def __init__(self, library: Path):
        self.library = library
        torch.ops.load_library(str(library))
        self.machine = ctypes.CDLL(str(library))
        self.machine.races.restype = ctypes.c_char_p
        self.op = getattr(torch.ops, f"memdense_{library.stem}")
        for name in ("bn_relu_conv3x3", "bn_relu_conv3x3_backward"):
            torch.library.register_fake(f"{self.op.name}::{name}", _extension._written_fake)
        self.configure()

    def configure(self, multiprocessors: int = 3, shared: int = SHARED, order: int = 0) -> None:
        """``order`` of a block's threads: 0 ascending, 1 descending, others a shuffle."""
        self.machine.configure(multiprocessors, shared, order)

    def planned(self, *arguments: int) -> tuple[int, int, int, int]:
        """Blocks, teams, tiles and bytes of shared memory of a convolution: images, their side,
        dilation, channels, columns, bytes of a value, PLAIN, FORWARD or GRADIENT. Without the
        latter, of the weight's gradient: splits, a block's chunks of channels, tiles and bytes.
        """
        found = (ctypes.c_int64 * 4)()
        plan = self.machine.planned if len(arguments) == 7 else self.machine.planned_weight
        plan(*arguments, found)
        return tuple(found)

    def counters(self) -> tuple[int, int, int, int]:
        """Launches, 8x8 matrices read from shared memory, the cycles that takes and threads that
        came to a barrier of a part of their block, till here.
        """
        counts = (ctypes.c_int64 * 4)()
        self.machine.counters(counts)
        return tuple(counts)

    def watch_races(self, without: int = -2) -> None:
        """In "raced", from here on; as if barrier ``without`` were not there, or -1 a warp's."""
        self.machine.watch_races(without)

    def races(self) -> tuple[int, int, str]:
        """Accesses to shared memory that were watched, races among them, and one of these."""
        counts = (ctypes.c_int64 * 2)()
        first = self.machine.races(counts)
        return *counts, first.decode()
