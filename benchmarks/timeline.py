"""A training step on a GPU, kernel by kernel: what the profiler saw, and the dense layers' kernels
against their floors.

    python benchmarks/timeline.py --batch 256 --json timeline.json

A floor is the larger of two times: bytes that must pass (each operand once) over the bandwidth of a
copy, measured here, and FLOP over 600 TFLOP/s, of the 3x3 over 400 (its halo is read from shared
memory nine times).
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from measure import ceilings, describe
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from variants import ARCHS, VARIANTS, Setting, backend, inputs, names, step

PRODUCTS, WINDOWS = 600e12, 400e12  # FLOP/s
STEPS = 3  # profiled; the last one counts
SHOWN = 25  # kernels in a table


class Kernel(NamedTuple):
    """One launch, or a copy."""

    name: str
    start: float  # microseconds
    duration: float
    grid: list[int] | None


class Layer(NamedTuple):
    """A dense layer: rows, channels read, of the bottleneck and new, bytes of a value of G."""

    block: int
    m: int
    c: int
    b: int
    k: int
    wide: int


def layers(setting: Setting) -> list[Layer]:
    """In the order of the forward pass."""
    arch, found = setting.arch, []
    side, channels = setting.size // (1 if arch.small_inputs else 4), arch.first
    for i, count in enumerate(arch.blocks):
        m, k = setting.batch * side * side, arch.growth_rate
        wide = 4 if i + 1 == len(arch.blocks) else 2  # a last block's G is float32
        found += [Layer(i + 1, m, channels + j * k, 4 * k, k, wide) for j in range(count)]
        channels = (channels + count * k) // 2
        side //= 2
    return found


class Family(NamedTuple):
    """A dense layer's kernels of one kind: which of a step's they are, whether layers come in
    reverse, the bytes and FLOP of a layer's.
    """

    what: str
    pattern: str
    part: slice
    backwards: bool
    cost: Callable[[Layer], tuple[float, float]]
    rate: float = PRODUCTS  # FLOP/s


def families(count: int) -> list[Family]:
    """Of a network with ``count`` dense layers."""

    def read(y: Layer) -> tuple[float, float]:
        return 2 * y.m * (y.c + y.b), 2 * y.m * y.b * y.c

    def walk(y: Layer) -> tuple[float, float]:
        return 2 * y.m * (y.b + y.c + y.wide * y.c), 4 * y.m * y.b * y.c

    def window(y: Layer, wide: int) -> tuple[float, float]:
        return 2 * y.m * (wide * y.b + y.k), 18 * y.m * y.b * y.k

    whole = slice(None)
    return [
        # a step's first ones are the forward pass, the others recompute in backward
        Family("1x1 forward", "^forward_1x1$", slice(count), False, read),
        Family("1x1 recompute", "^forward_1x1$", slice(count, None), True, read),
        Family("norm behind it", "^normalise_rows$", whole, True, lambda y: (6 * y.m * y.b, 0)),
        Family("1x1 gradients", "^gradients_1x1$", whole, True, walk),
        Family("3x3 forward", r"^forward_3x3$|convolve.*Mode\)1", whole, False,
               lambda y: window(y, 1), WINDOWS),
        Family("3x3 input gradient", r"^input_gradient_3x3$|convolve.*Mode\)2", whole, True,
               lambda y: window(y, 2), WINDOWS),
        Family("3x3 weight gradient", "^weight_gradient_3x3$|conv3x3::weight_gradient", whole, True,
               lambda y: window(y, 1), WINDOWS),
    ]  # fmt: skip


def trace(run: Callable[[], None]) -> list[Kernel]:
    """The kernels of one step in their order."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = "kernel", "gpu_memcpy", "gpu_memset"
    found = sorted((e for e in events if e.get("cat") in kinds), key=lambda e: e["ts"])
    if len(found) < STEPS:
        sys.exit("the profiler saw no kernels: does CUPTI work here, and may this user profile?")
    return [
        Kernel(e["name"], e["ts"], e["dur"], e["args"].get("grid"))
        for e in found[-(len(found) // STEPS) :]
    ]


def as_rows(kernels: list[Kernel]) -> dict[str, list]:
    """Names, and each launch as its name's number, start, duration and grid."""
    names = sorted({kernel.name for kernel in kernels})
    start = kernels[0].start
    return {
        "names": names,
        "kernels": [
            [names.index(k.name), round(k.start - start, 1), round(k.duration, 2), k.grid]
            for k in kernels
        ],
    }


def by_name(kernels: list[Kernel]) -> Table:
    busy = sum(kernel.duration for kernel in kernels)
    span = kernels[-1].start + kernels[-1].duration - kernels[0].start
    title = f"{len(kernels)} kernels, {busy / 1e3:.1f} ms busy in {span / 1e3:.1f} ms"
    table = Table(Column("kernel", no_wrap=True), "launches", "ms", "share", title=title)
    sums: dict[str, list[float]] = {}
    for kernel in kernels:
        sums.setdefault(kernel.name, []).append(kernel.duration)
    for name, times in sorted(sums.items(), key=lambda item: -sum(item[1]))[:SHOWN]:
        ms = sum(times) / 1e3
        table.add_row(name[:76], str(len(times)), f"{ms:.2f}", f"{1e3 * ms / busy:.1%}")
    return table


def shares(kernels: list[Kernel], setting: Setting, bandwidth: float) -> Iterator[list[str]]:
    """Of a family and block: milliseconds, the floor's, and the share."""
    of = layers(setting)
    for what, pattern, part, backwards, cost, rate in families(len(of)):
        times = [k.duration for k in kernels if re.search(pattern, k.name)][part]
        if len(times) != len(of):
            continue
        rows: dict[int, list[float]] = {}
        for layer, time in zip(reversed(of) if backwards else of, times, strict=True):
            size, flop = cost(layer)
            row = rows.setdefault(layer.block, [0.0, 0.0])
            row[0] += time / 1e3
            row[1] += 1e3 * max(size / bandwidth, flop / rate)
        for block, (ms, floor) in sorted(rows.items()):
            yield [what, str(block), f"{ms:.2f}", f"{floor:.2f}", f"{floor / ms:.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHS, default="densenet121")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, help="pixels of an image's side; default: 224, or 32")
    parser.add_argument("--variant", action="append", choices=VARIANTS,
                        help="default: memdense, and with the 3x3 in Triton")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the kernels here")
    args = parser.parse_args()
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True  # as in the suite
    arch = ARCHS[args.arch]
    size = args.size or arch.size
    setting = Setting(arch, args.arch, args.batch, size, torch.bfloat16, device)
    chosen = args.variant or [
        name for name in ("memdense", "memdense, 3x3 in Triton") if name in names(setting)
    ]
    bandwidth = ceilings(device, setting.dtype).bandwidth
    about = describe(device) | {"copy": f"{bandwidth / 1e9:.0f} GB/s"}
    console, found = Console(width=130), {}
    x, target = inputs(setting)
    for name in chosen:
        variant = VARIANTS[name]
        torch.manual_seed(0)
        model = variant.finish(variant.make(arch).to(device))
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        images = x.contiguous(memory_format=layout)

        def run(model: nn.Module = model, images: Tensor = images) -> None:
            step(model, images, target, setting)

        with backend(name):
            for _ in range(3):
                run()
            found[name] = trace(run)
        console.print(f"\n[bold]{name}[/]: {setting}")
        console.print(by_name(found[name]))
        if name.startswith("memdense"):
            table = Table("dense layers", "block", "ms", "floor, ms", "share of floor")
            for row in shares(found[name], setting, bandwidth):
                table.add_row(*row)
            console.print(table)
        if args.json:  # each time: the next variant may fail
            rows = {name: as_rows(kernels) for name, kernels in found.items()}
            data = {"about": about, "setting": str(setting), **rows}
            args.json.write_text(json.dumps(data) + "\n")
        del model, run
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))


if __name__ == "__main__":
    main()
