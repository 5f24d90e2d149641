"""Compile recorded Triton launches for a GPU that is not there, and read what came out.

Not under TRITON_INTERPRET: functions decorated there cannot be compiled. As a script, "aot.py NET
DTYPE ARCH...": every kernel of a training step, as lines of JSON. DTYPE "ieee" is float32 where
PyTorch forbids TF32. "aot.py BATCH BATCH": :func:`new_codes`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memdense import buffers, engine, spec
from memdense.backends.triton import Triton, conv1x1, conv3x3, running, statistics, tune, tuning
from memdense.backends.triton.launch import ALIGNMENT, Launch, recorded
from memdense.backends.triton.tiles import cdiv

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
    product: bool  # of matrices
    chained: bool  # products that begin with the sum so far
    ptx: str

    @property
    def tensor_cores(self) -> str:
        """The matrix instruction it uses: "wgmma", "mma" or none."""
        if "wgmma.mma_async" in self.ptx:
            return "wgmma"
        return "mma" if "mma.sync" in self.ptx else ""

    @property
    def wide(self) -> bool:
        """Whether it reads 16 bytes at a time."""
        return "ld.global.v4.b32" in self.ptx or "cp.async.cg" in self.ptx

    @property
    def barriers(self) -> int:
        return self.ptx.count("bar.sync")


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
        elif isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
            constants[i,] = 1
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = not value % ALIGNMENT and not parameter.do_not_specialize
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
        "tt.dot" in kernel.asm["ttir"],
        bool(re.search(r"tt\.dot %\S+, %\S+, %(?!cst)", kernel.asm["ttgir"])),
        kernel.asm["ptx"],
    )


# ---- a step's launches, recorded on tensors without memory


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm(channels: int) -> spec.Norm:
    known = spec.NormSpec(1e-5, True, True)
    return spec.Norm(known, empty(channels), empty(channels), None, None)


def stage_step(
    n: int, side: int, channels: int, layers: int, growth: int, kind: str, dtype: torch.dtype
) -> None:
    """Forward and backward of a block with bottlenecks and its tail, ``kind`` "pool" or
    "transition".
    """
    last = channels + layers * growth
    b = 4 * growth

    def layer(c: int) -> spec.Layer:
        return spec.Layer(norm(c), empty(b, c, 1, 1), norm(b), empty(growth, b, 3, 3), (1, 1))

    tail_spec = spec.TailSpec(kind, norm(last).spec, pool=2 if kind == "transition" else 1)
    conv = empty(last // 2, last, 1, 1) if kind == "transition" else None
    stage = spec.Stage(
        [layer(channels + i * growth) for i in range(layers)],
        spec.Tail(tail_spec, norm(last), conv),
        0.0,
        False,
    )
    x = empty(n, side, side, channels, dtype=dtype).permute(0, 3, 1, 2)
    kept = engine.forward(x, stage, None, Triton())
    need = [True] * len(spec.flatten(stage)[0])
    engine.backward(
        kept.out, None, kept.features, kept.statistics, [], stage, None, True, need, Triton()
    )


def stem_step(n: int, side: int, channels: int, dtype: torch.dtype) -> None:
    known = spec.StemSpec(norm(channels).spec, (2, 2), (3, 3), (1, 1), True)
    x, weight = empty(n, 3, side, side, dtype=dtype), empty(channels, 3, 7, 7)
    # on meta all buffers begin at 0, which it would take for one
    running._plan(1, channels, n * side**2)(empty(1, 7, dtype=torch.int64), empty(2, channels))
    kept = engine.stem_forward(x, weight, norm(channels), known, Triton())
    engine.stem_backward(
        kept.out, x, weight, norm(channels), kept.convolved, kept.winner, kept.statistics, known,
        [True] * 4, Triton(),
    )  # fmt: skip


def densenet121(dtype: torch.dtype, batch: int = 256) -> None:
    """At 224 x 224."""
    stem_step(batch, 224, 64, dtype)
    for side, channels, layers in ((56, 64, 6), (28, 128, 12), (14, 256, 24)):
        stage_step(batch, side, channels, layers, 32, "transition", dtype)
    stage_step(batch, 7, 512, 16, 32, "pool", dtype)
    # a block alone takes contiguous images too
    geometry = buffers.Geometry(batch, 56, 56)
    out = empty(geometry.rows, 64, dtype=dtype)
    statistics.pack(empty(batch, 64, 56, 56, dtype=dtype), out, geometry, empty(2, 64))


def stem(dtype: torch.dtype) -> None:
    """Of maps with even and with odd sides."""
    for side, channels in ((224, 64), (226, 96)):
        stem_step(64, side, channels, dtype)


def bc100_12(dtype: torch.dtype) -> None:
    """Batch 64 at 32 x 32: channels that are no multiples of 16."""
    for side, channels in ((32, 24), (16, 108)):
        stage_step(64, side, channels, 16, 12, "transition", dtype)
    stage_step(64, 8, 150, 16, 12, "pool", dtype)


def candidates(dtype: torch.dtype) -> None:
    """Every configuration of the 1x1 and 3x3 kernels that a device may choose, narrow and wide."""
    sizes = [(m, 256, b) for m in (1 << 20, 30008, 1000) for b in (48, 128, 192, 256, 384)]
    for problem in tune.problems(dtype, sizes, torch.device("meta"), least=1):
        for config in problem.candidates:
            with tuning.forced(problem.kernel, config):
                problem.run()
    if dtype.itemsize == 2:  # the last block's G is float32
        for m, c, b in sizes:
            vectors = buffers.Reader(*empty(4, b), 1e-5, True)
            behind = buffers.NormGradient(vectors, buffers.Sums(*empty(2, b)), m)
            read = buffers.Reader(*empty(4, c), 1e-5, True)
            into = buffers.Into(empty(m, c), empty(2, c), True)
            dz, y, weight, x = (
                empty(*shape, dtype=dtype) for shape in ((m, b), (m, b), (b, c), (m, c))
            )
            conv1x1.backward(dz, y, behind, weight, x, read, into, True)
    geometry = buffers.Geometry(64, 28, 28)
    for c, k in ((64, 8), (128, 16), (96, 24), (128, 32), (256, 64)):
        x, dy = empty(geometry.rows, c, dtype=dtype), empty(geometry.rows, k, dtype=dtype)
        weight, read = empty(k, c, 3, 3, dtype=dtype), buffers.Reader(*empty(4, c), 1e-5, True)
        layer = (2, 2), geometry
        conv3x3.forward(x, read, weight, *layer, dy, None, empty(2, k))
        for into in (None, buffers.Into(x, empty(2, c), True)):
            conv3x3.backward(dy, weight, layer[0], x, read, layer[1], into, True)


NETS = {"densenet121": densenet121, "stem": stem, "bc100_12": bc100_12, "candidates": candidates}


def step_launches(
    net: Callable[[torch.dtype], None], dtype: torch.dtype, arch: int = 90
) -> list[Launch]:
    """What a training step launches on an sm_``arch``, each machine code once."""
    conv1x1.hopper = tune.hopper = lambda device: 90 <= arch < 120
    # rows as they are on a GPU
    buffers.row_stride = lambda channels, device: cdiv(channels, 16) * 16
    with recorded(dry=True) as launches, torch.no_grad():
        net(dtype)
    return list({key(launch): launch for launch in launches}.values())


def new_codes(first: int, second: int) -> list[str]:
    """The kernels that a batch of another size compiles again, of DenseNet-121 in bfloat16."""
    codes = []
    for batch in (first, second):
        launches = step_launches(partial(densenet121, batch=batch), torch.bfloat16)
        codes.append({key(launch): launch.plan.name for launch in launches})
    return sorted(codes[1][found] for found in codes[1].keys() - codes[0].keys())


def main(net: str, dtype: str, archs: Sequence[str]) -> None:
    if dtype == "ieee":
        torch.backends.cudnn.conv.fp32_precision = dtype
        dtype = "float32"
    for arch in map(int, archs):
        for launch in step_launches(NETS[net], getattr(torch, dtype), arch):
            found = compile_launch(launch, arch)
            row = {name: getattr(found, name) for name in ("name", "arch", "registers", "stack")}
            seen = "shared", "tensor_cores", "wide", "barriers", "product", "chained"
            print(json.dumps(row | {name: getattr(found, name) for name in seen}), flush=True)


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        print(*new_codes(int(sys.argv[1]), int(sys.argv[2])), sep="\n")
    else:
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
