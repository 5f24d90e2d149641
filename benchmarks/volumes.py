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
from variants import complaint, errors, float32_as_such, results

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


def check(models: dict[str, nn.Module]) -> dict[str, str]:
    """What is wrong with each one's output and gradients in float32, beside the first's in float64;
    empty where nothing is.
    """

    def outcome(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        model = copy.deepcopy(model).to(dtype)
        generator = torch.Generator().manual_seed(0)
        # in smaller ones the last block's norms have few values, and say nothing
        x = torch.randn(2, 1, 64, 64, 64, generator=generator).to(next(model.parameters()))
        with float32_as_such():
            return results(model, step(model, x, torch.tensor([0, 1], device=x.device), dtype))

    plain = next(iter(models.values()))
    exact = outcome(plain, torch.float64)
    tolerated = errors(outcome(plain, torch.float32), exact)
    return {
        name: complaint(errors(outcome(model, torch.float32), exact), tolerated)
        for name, model in models.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=64, help="voxels of a volume's side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each network")
    parser.add_argument("--device", type=torch.device, default=default_device())
    args = parser.parse_args()

    dtype, console = getattr(torch, args.dtype), Console(width=110)
    models = {name: model.to(args.device) for name, model in networks().items()}
    refused = check(models)
    x = torch.randn(args.batch, 1, *[args.size] * 3, device=args.device)
    target = torch.arange(args.batch, device=args.device) % 2
    inputs = {name: x for name in models}
    inputs["MONAI, channels last"] = x.contiguous(memory_format=torch.channels_last_3d)
    runs = {name: partial(step, m, inputs[name], target, dtype) for name, m in models.items()}
    with console.status("timing"):
        found = interleaved(
            runs, lambda name, _: refused[name], Clock(args.device), 0.0, (args.rounds, args.rounds)
        )
    table = Table(title=f"DenseNet121, batch {args.batch}, {args.size}³, {args.dtype}")
    for column in ("", "time", "a step", "peak / volume", "kept / volume", "memory"):
        table.add_column(column, justify="right" if column else "left")
    base = None
    for name, record in with_ratios(found).items():
        if isinstance(record, Refused):
            table.add_row(name, record.reason)
            continue
        with torch.autocast(args.device.type, dtype, enabled=dtype.itemsize == 2):
            taken = training_step_memory(models[name], inputs[name], target)
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
