"""Compile recorded Triton launches for a GPU that is not there, and read what came out.

Not under TRITON_INTERPRET: functions decorated there cannot be compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memdense.backends.triton.launch import ALIGNMENT, Launch

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int64: "i64",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """What a kernel's machine code needs and uses."""

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    ptx: str

    @property
    def tensor_cores(self) -> str:
        """The matrix instruction it uses: "wgmma", "mma" or none."""
        if "wgmma.mma_async" in self.ptx:
            return "wgmma"
        return "mma" if "mma.sync" in self.ptx else ""


def source(launch: Launch) -> ASTSource:
    """What the JIT would compile for this launch."""
    plan, kernel = launch.plan, launch.plan.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list] = {}
    values = (*launch.tensors, *plan.arguments)
    for i, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
        kind, divisible = "constexpr", False
        if parameter.is_constexpr or value is None:
            constants[i,] = value
        elif isinstance(value, Tensor):
            kind = "*" + TYPES[value.dtype]
            # offsets count from an allocation, which is aligned
            divisible = not value.storage_offset() * value.element_size() % ALIGNMENT
        elif isinstance(value, int) and value == 1:
            constants[i,] = 1
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = not value % ALIGNMENT
        else:
            kind = "fp32"
        signature[parameter.name] = kind
        if divisible:
            attributes[i,] = [["tt.divisibility", ALIGNMENT]]
    return ASTSource(kernel, signature, constants, attributes)


def key(launch: Launch) -> str:
    """Launches with one key have one machine code."""
    s = source(launch)
    return repr((launch.plan.name, s.signature, s.constants, s.attrs, launch.plan.options))


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Through ptxas, for sm_``arch``."""
    target = GPUTarget("cuda", arch, 32)
    kernel = triton.compile(source(launch), target=target, options=launch.plan.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [os.fspath(CUOBJDUMP), "--dump-resource-usage", cubin],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        launch.plan.name,
        arch,
        found["REG"],
        found["STACK"] + found["LOCAL"],
        kernel.metadata.shared,
        kernel.asm["ptx"],
    )
