"""The kernels side by side: what the suite measures, and alone on the command line.

    python benchmarks/kernels.py --every --only conv3x3 --threads 2 --json kernels.json

Without --every, two blocks of DenseNet-121 at dilation 1. On a machine that others use, medians
tell little: --shared takes the least CPU time of one thread.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from measure import (
    Ceilings,
    Clock,
    Refused,
    ceilings,
    default_device,
    describe,
    interleaved,
    with_ratios,
)
from primitives import (
    CONVOLUTIONS,
    LAYOUTS,
    Case,
    Draw,
    Fused,
    backends,
    cases,
    convolution,
    convolution_cost,
    cost,
    in_double,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

from memdense.backends import Reference

DILATIONS = (1, 2, 4)
# relative norm of an error against float64
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.005}
TF32_LIMIT = 2e-3  # PyTorch's convolutions use it on CUDA unless told otherwise

Records = dict[str, dict[str, Any] | Refused]


def disagreement(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: torch.dtype) -> str:
    """What is wrong with a kernel's outputs, where it works in ``dtype``; empty where each is near
    enough. NaN is not.
    """
    tf32 = dtype == torch.float32 and found[0].device.type == "cuda"
    limit = TF32_LIMIT if tf32 else LIMITS[dtype]
    for i, (value, reference) in enumerate(zip(found, exact, strict=True)):
        error = ((value.double() - reference).norm() / reference.norm()).item()
        if not error <= limit:
            return f"output {i}: relative error {error:.1e}, allowed {limit:.0e}"
    return ""


def measure_case(
    case: Case, dtype: torch.dtype, device: torch.device, clock: Clock, seconds: float
) -> Records:
    """A primitive on each backend and in PyTorch's separate operations, with its counted cost."""

    def arguments() -> dict[str, Any]:
        return case.arguments(Draw(device, dtype))

    given = arguments()
    counted = cost(case.primitive, given, getattr(Reference(), case.primitive)(**given))
    doubles = {name: in_double(value) for name, value in arguments().items()}
    twin = Fused(case, Reference(), doubles)
    exact = twin.outputs(twin.run())
    del given, twin

    variants = {
        f"PyTorch, {name}": case.separate(arguments(), layout) for name, layout in LAYOUTS.items()
    }
    ours = {
        f"memdense, {name}": Fused(case, backend, arguments())
        for name, backend in backends(device).items()
    }
    variants |= {name: primitive.run for name, primitive in ours.items()}

    def check(name: str, found: Any) -> str:
        outputs = ours[name].outputs(found) if name in ours else found
        return disagreement(outputs, exact, dtype)

    with torch.no_grad():
        times = interleaved(variants, check, clock, seconds)
    return with_ratios(times, **counted._asdict())


def measure_convolution(
    shape: tuple[int, int, int, int],
    dilation: int,
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
    seconds: float,
) -> Records:
    """The convolution on its own, forward and backward."""
    n, c, k, side = shape
    draw = Draw(device, dtype)
    x, weight = draw.tensor(n, c, side, side), draw.tensor(k, c, 3, 3)
    dy = draw.tensor(n, k, side, side)
    exact = next(iter(convolution(x.double(), weight.double(), dy.double(), dilation).values()))()
    variants = convolution(x, weight, dy, dilation)

    def check(_: str, found: tuple[Tensor, ...]) -> str:
        return disagreement(found, exact, dtype)

    times = interleaved(variants, check, clock, seconds)
    return with_ratios(times, **convolution_cost(x, weight, dy)._asdict())


def convolutions(device: torch.device, quick: bool = False) -> list[tuple[int, int, int, int]]:
    """Images, channels in and out, side of the square images."""
    if quick:
        return [(1, 16, 8, 9)]
    more = 16 if device.type == "cuda" else 1
    return [(more * n, c, k, side) for n, c, k, side in CONVOLUTIONS]


def row(label: str, records: Records, ceiling: Ceilings, least: bool) -> list[str]:
    typical = min if least else statistics.median
    ms, share = {}, ""
    for name, record in records.items():
        if isinstance(record, Refused):
            ms[name] = record.reason
            continue
        seconds = typical(record["times"])
        ms[name] = f"{1e3 * seconds:.2f}"
        if name.startswith("memdense") and not share:
            share = f"{ceiling.floor(record['bytes'], record['flop']) / seconds:.0%}"
    theirs, ours = ([float(v) for n, v in ms.items() if n.startswith(who) and v[0].isdigit()]
                    for who in ("PyTorch", "memdense"))  # fmt: skip
    gain = f"{min(theirs) / ours[0]:.2f}" if theirs and ours else ""
    return [label, "  ".join(f"{n.split(', ', 1)[-1]} {v}" for n, v in ms.items()), gain, share]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, help="default: 4, on a GPU 64")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"))
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--every", action="store_true", help="every block, dilation and BC-100-12")
    parser.add_argument("--only", default="", help="primitives or shapes that contain this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    parser.add_argument("--shared", action="store_true", help="least CPU time of one thread")
    parser.add_argument("--warm", action="store_true", help="leave the caches as the last run did")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cuda = args.device.type == "cuda"
    torch.set_num_threads(1 if args.shared else args.threads)
    torch.backends.cudnn.benchmark = True  # as in the suite
    dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    clock = Clock(args.device, cold=not args.warm, shared=args.shared)
    ceiling = ceilings(args.device, dtype)
    about = describe(args.device)

    table = Table(title=f"{dtype}, {'least' if args.shared else 'median'} times")
    for heading in ("kernel", "ms", "PyTorch / ours", "share of floor"):
        table.add_column(heading)
    rows = []

    def add(label: str, records: Records) -> None:
        table.add_row(*row(label, records, ceiling, args.shared))
        plain = {n: r.reason if isinstance(r, Refused) else r for n, r in records.items()}
        rows.append({"kernel": label, "variants": plain})
        if args.json:  # each time: what comes next may fail, or take too long
            args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")

    common = dtype, args.device, clock, args.seconds
    for case in cases(args.batch or (64 if cuda else 4), args.every):
        label = f"{case.primitive}: {case.shape}"
        if args.only in label:
            add(label, measure_case(case, *common))
    for shape in convolutions(args.device):
        for d in DILATIONS:
            label = f"dilated_conv3x3: {shape[0]} x {shape[3]}x{shape[3]}, {shape[1]} -> {shape[2]}"
            label += f", dilation {d}"
            if args.only in label:
                add(label, measure_convolution(shape, d, *common))
    Console(width=160).print(table, ", ".join(f"{k} {v}" for k, v in about.items()))
    Console().print(
        f"copy {ceiling.bandwidth / 1e9:.1f} GB/s, product {ceiling.arithmetic / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
