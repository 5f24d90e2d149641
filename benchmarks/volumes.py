"""A training step of MONAI's DenseNet121 on volumes, plain and converted, side by side.

python benchmarks/volumes.py --batch 2 --size 64
"""

import argparse
import copy
import shlex
import statistics
import sys
from functools import partial

import torch
from measure import Clock, Refused, default_device, describe, interleaved, with_ratios
from monai.networks.nets import DenseNet121
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import memdense
from memdense.memory import training_step_memory


def networks() -> dict[str, nn.Module]:
    """By what they are called; all with the same weights."""
    torch.manual_seed(0)
    plain = DenseNet121(spatial_dims=3, in_channels=1, out_channels=2)
    found = {"MONAI": plain, "MONAI, channels last": copy.deepcopy(plain)}
    found["MONAI, channels last"].to(memory_format=torch.channels_last_3d)
    for switches in ({}, {"recompute_stem": False}, {"keep_bottlenecks": True}):
        name = ", ".join(["memdense", *(f"{k}={v}" for k, v in switches.items())])
        found[name] = memdense.convert(copy.deepcopy(plain), verbose=False, **switches)
    return found


def step(model: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, dtype, enabled=dtype.itemsize == 2):
        loss = F.cross_entropy(model(x), target)
    loss.backward()
    return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=64, help="voxels of a volume's side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each network")
    parser.add_argument("--device", type=torch.device, default=default_device())
    args = parser.parse_args()

    dtype, console = getattr(torch, args.dtype), Console(width=110)
    x = torch.randn(args.batch, 1, *[args.size] * 3, device=args.device)
    target = torch.arange(args.batch, device=args.device) % 2
    images = {name: x for name in networks()}
    images["MONAI, channels last"] = x.contiguous(memory_format=torch.channels_last_3d)
    models = {name: model.to(args.device) for name, model in networks().items()}
    runs = {name: partial(step, m, images[name], target, dtype) for name, m in models.items()}
    first: list[float] = []

    def check(name: str, loss: Tensor) -> str:
        first.append(loss.item())
        off = abs(first[-1] - first[0]) / abs(first[0])
        return (
            "" if off <= (0.05 if dtype.itemsize == 2 else 1e-4) else f"the loss is {off:.1e} off"
        )

    with console.status("timing"):
        found = interleaved(runs, check, Clock(args.device), 0.0, (args.rounds, args.rounds))
    table = Table(title=f"DenseNet121, {args.batch} volumes of {args.size}³, {args.dtype}")
    for column in ("", "time", "a step", "peak / volume", "kept / volume", "memory"):
        table.add_column(column, justify="right" if column else "left")
    base = None
    for name, record in with_ratios(found).items():
        if isinstance(record, Refused):
            table.add_row(name, record.reason)
            continue
        with torch.autocast(args.device.type, dtype, enabled=dtype.itemsize == 2):
            taken = training_step_memory(models[name], images[name], target)
        base = base or taken.peak
        table.add_row(
            name,
            f"{record['ratio']:.2f}×",
            f"{1e3 * statistics.median(record['times']):.0f} ms",
            *(f"{size / args.batch / 1e6:.1f} MB" for size in (taken.peak, taken.live)),
            f"1/{base / taken.peak:.1f}",
        )
    console.print(table)
    place = {
        **describe(args.device),
        "command": "python benchmarks/volumes.py " + shlex.join(sys.argv[1:]),
    }
    console.print(", ".join(f"{key} {value}" for key, value in place.items()))


if __name__ == "__main__":
    main()
