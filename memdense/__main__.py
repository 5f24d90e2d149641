"""``python -m memdense``: plan a training step's memory, or tune kernels for a device."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from .backends import triton_reason
from .plan import OPTIMIZERS, Plan, build, plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m memdense")
    commands = parser.add_subparsers(title="commands", metavar="command")
    planner = commands.add_parser(
        "plan",
        help="predict a training step's peak memory and the largest batch that fits",
        description="Predict the peak memory of a training step for each setting, the largest "
        "batch that fits a budget and, from one device's figures, many devices.",
    )
    _add_options(planner)
    planner.set_defaults(run=_run_plan, prog=planner.prog)
    tuner = commands.add_parser(
        "tune",
        help="time the Triton kernels' configurations on this GPU and remember the fastest",
        description="Time every configuration of the bottleneck's Triton kernels on this GPU and "
        "keep the fastest in a file that later runs read (MEMDENSE_TUNING says where). A minute "
        "or two; without it good defaults run.",
    )
    tuner.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32 (default: bf16)")
    tuner.set_defaults(run=_run_tune, prog=tuner.prog)
    args = vars(parser.parse_args(arguments))
    if not args:
        parser.print_help()
        return 0
    run, prog = args.pop("run"), args.pop("prog")
    try:
        run(args)
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _run_plan(args: dict[str, Any]) -> None:
    plain = args.pop("plain")
    _show(_plan(args), plain)


def _run_tune(args: dict[str, Any]) -> None:
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if args["dtype"] not in dtypes:
        raise ValueError(f"expected a dtype among {', '.join(dtypes)}, got {args['dtype']!r}")
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA device to tune for")
    if reason := triton_reason(torch.device("cuda", torch.cuda.current_device())):
        raise ValueError(f"there is nothing to tune: {reason}")
    from .backends.triton import tune

    tune.run(dtypes[args["dtype"]])


def _add_options(parser: argparse.ArgumentParser) -> None:
    network = parser.add_argument_group("network (options replace what --arch says)")
    network.add_argument("--arch", help="densenet121 to densenet264, bc100-12, l40-12 …")
    network.add_argument("--growth-rate", type=int)
    network.add_argument("--block-config", type=_numbers, help="layers of each block: 6,12,24,16")
    network.add_argument("--num-init-features", type=int)
    network.add_argument("--bn-size", type=_or_none, help="a number, or none for no bottlenecks")
    network.add_argument("--compression", type=float)
    network.add_argument("--drop-rate", type=float)
    network.add_argument("--num-classes", type=int)
    network.add_argument("--in-channels", type=int)
    network.add_argument("--output-stride", type=int)
    network.add_argument("--small-inputs", action="store_true", default=None)

    step = parser.add_argument_group("training step")
    step.add_argument("--image", type=_size, help="side of the images, or HEIGHTxWIDTH")
    step.add_argument("--batch", type=int, default=32, help="images a step (default: 32)")
    step.add_argument("--dtype", default="fp32", help="fp32; bf16 or fp16: autocast")
    step.add_argument("--optimizer", choices=OPTIMIZERS, default="none")
    step.add_argument("--budget", help="memory of a device: 24GiB, 24GB or bytes")
    step.add_argument("--reserve", default=0, help="part of the budget to leave alone: 1GiB")
    step.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    step.add_argument("--backend", choices=("triton", "native", "reference"))

    many = parser.add_argument_group("many devices, with DistributedDataParallel")
    many.add_argument("--devices", type=_numbers, default=(), help="how many: 1,2,4,8")
    many.add_argument("--images-per-second", type=float, help="of one device, measured")
    many.add_argument("--bandwidth", help="from a device to the next: 300GB/s or 400Gbit/s")
    many.add_argument("--no-overlap", dest="overlap", action="store_false")
    many.add_argument("--backward-share", type=float, default=2 / 3, help="of a step's time")
    many.add_argument("--bucket-cap-mb", type=float, default=25)
    many.add_argument("--gradient-as-bucket-view", action="store_true")

    parser.add_argument("--plain", action="store_true", help="plain text even where rich is there")


_NETWORK = (
    "growth_rate",
    "block_config",
    "num_init_features",
    "bn_size",
    "compression",
    "drop_rate",
    "num_classes",
    "in_channels",
    "output_stride",
    "small_inputs",
)


def _plan(given: dict[str, Any]) -> Plan:
    network = {name: given.pop(name) for name in _NETWORK}
    network = {name: value for name, value in network.items() if value is not None}
    arch = given.pop("arch")
    if network.get("bn_size") == "none":
        network["bn_size"] = None
    if arch is None and "block_config" not in network:
        raise ValueError("say which network: --arch densenet121, or --block-config and the like")
    return plan(build(arch, **network) if network else arch, **given)


def _show(found: Plan, plain: bool) -> None:
    if not plain and sys.stdout.isatty():
        try:
            from rich import print as rich_print
        except ImportError:
            pass
        else:
            rich_print(found)
            return
    print(found)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(_number, text.split(",")))


def _number(text: str) -> int:
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def _or_none(text: str) -> int | str:
    return text if text == "none" else _number(text)


def _size(text: str) -> int | tuple[int, int]:
    height, cross, width = text.lower().partition("x")
    return (_number(height), _number(width)) if cross else _number(height)


if __name__ == "__main__":
    sys.exit(main())
