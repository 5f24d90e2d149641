"""A training step, or inference, of every variant side by side, with a size and batch of your own.

    python benchmarks/step.py --arch densenet121 --batch 8 --size 224 --json step.json

It measures as the suite does; report.py and compare.py read what it writes.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import report
import torch
from measure import Refused, default_device, describe
from rich.console import Console
from variants import ARCHS, VARIANTS, Setting, left_out, measure, names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHS, default="densenet121")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, help="pixels of an image's side; default: 224, or 32")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each model")
    parser.add_argument("--inference", action="store_true", help="eval and no_grad, no backward")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="default: all of them")
    parser.add_argument("--compile", action="store_true", help="torch.compile too: takes minutes")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a picture here")
    args = parser.parse_args()

    torch.backends.cudnn.benchmark = True  # as in the suite
    arch, dtype = ARCHS[args.arch], getattr(torch, args.dtype)
    size = args.size or arch.size
    setting = Setting(arch, args.arch, args.batch, size, dtype, args.device, args.inference)
    compiled = [args.arch] if args.compile else []
    wanted = [name for name in names(setting) if name in (args.variant or VARIANTS)]
    reasons = {name: left_out(name, setting, compiled) for name in wanted}
    chosen = [name for name, why in reasons.items() if not why]
    progress = Console(stderr=True)
    with progress.status(str(setting)) as status:
        tell = status.update if progress.is_terminal else progress.log
        records = measure(setting, chosen, 0.0, args.rounds, tell)

    kind = "inference" if args.inference else "training"
    about = {"kind": kind, "arch": args.arch, "batch": args.batch, "size": size}
    benchmarks, refused = [], {}
    for name, record in records.items():
        if isinstance(record, Refused):
            refused[name] = record.reason
            continue
        facts = {key: value for key, value in record.items() if key != "times"}
        benchmarks.append(
            {
                "group": str(setting),
                "name": f"{setting}: {name}",
                "stats": {"data": record["times"]},
                "extra_info": {"variant": name, **about, **facts},
            }
        )
    data = {
        "machine_info": describe(args.device),
        "benchmarks": benchmarks,
        "memdense": {
            "left out": {str(setting): {name: why for name, why in reasons.items() if why}},
            "command": "python benchmarks/step.py " + shlex.join(sys.argv[1:]),
        },
    }
    results = report.parse(data)
    console = Console(width=130)
    for table in report.steps(results, kind):
        console.print(report.as_rich(table))
    console.print(results.place)
    for name, reason in refused.items():
        console.print(f"{name} is not timed. {reason}", style="red")
    if args.json:
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    if args.plot:
        report.plot_step(results, args.plot)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
