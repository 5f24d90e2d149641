"""Training step, or inference, side by side: time, interleaved, and memory, in a pass of its own.

python benchmarks/step.py --arch densenet121 --batch 4 --size 224 --json step.json --plot step.png
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from variants import ARCHS, backend, build, check_same_loss, describe, images, step

from memdense import memory


def measure(
    arch: str, batch: int, size: int, rounds: int, device: torch.device, inference: bool
) -> list[dict]:
    models = build(arch, device)
    check_same_loss(models, size, device)
    inputs = {name: images(name, batch, size, device) for name in models}

    def forward(name: str) -> Tensor:
        with torch.no_grad():
            return models[name](inputs[name][0])

    if inference:
        for model in models.values():
            model.eval()

    def timed(name: str) -> float:
        start = time.perf_counter()
        with backend(name):
            if inference:
                forward(name)
            else:
                step(models[name], *inputs[name])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for name in models:
        timed(name)
    times: dict[str, list[float]] = {name: [] for name in models}
    # every round takes each variant once: what slows the machine slows all of them
    for _ in tqdm(range(rounds), desc="rounds", disable=not sys.stderr.isatty()):
        for name, found in times.items():
            found.append(timed(name))
    first = next(iter(models))
    rows = []
    for name, model in models.items():
        seconds = statistics.median(times[name])
        with backend(name):
            if inference:
                taken = memory.peak_memory(forward, name, device=device)
                kept = taken.retained
            else:
                taken = memory.training_step_memory(model, *inputs[name])
                kept = taken.live
        ratios = [a / b for a, b in zip(times[name], times[first], strict=True)]
        rows.append(
            {
                "model": name,
                "seconds": seconds,
                "time ratio": statistics.median(ratios),
                "all seconds": times[name],
                "peak bytes per image": taken.peak / batch,
                "kept bytes per image": kept / batch,
            }
        )
    return rows


def table(rows: list[dict], title: str) -> Table:
    out = Table(title=title)
    out.add_column("model")
    for heading in ("s / step", "time", "peak MB / image", "kept MB / image", "memory"):
        out.add_column(heading, justify="right")
    for row in rows:
        out.add_row(
            row["model"],
            f"{row['seconds']:.2f}",
            f"{row['time ratio']:.2f}x",
            f"{row['peak bytes per image'] / 1e6:.1f}",
            f"{row['kept bytes per image'] / 1e6:.1f}",
            f"1/{rows[0]['peak bytes per image'] / row['peak bytes per image']:.1f}",
        )
    return out


def plot(rows: list[dict], title: str, path: Path) -> None:
    """Time against peak memory: down and to the left is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), dpi=150)
    for row in rows:
        if "recompute_stem" in row["model"]:
            continue  # too near to memdense to be told apart
        ours = row["model"].startswith("memdense")
        x, y = row["peak bytes per image"] / 1e6, row["time ratio"]
        axes.scatter(x, y, s=90, color="#0072B2" if ours else "#999999", zorder=3)
        left = x > 100
        axes.annotate(
            row["model"],
            (x, y),
            xytext=(-9 if left else 9, -3),
            ha="right" if left else "left",
            textcoords="offset points",
            color="#0072B2" if ours else "#444444",
        )
    axes.set_xlim(0, max(r["peak bytes per image"] for r in rows) / 1e6 * 1.08)
    axes.set_ylim(0, max(r["time ratio"] for r in rows) * 1.2)
    axes.set_xlabel("peak memory of a training step, MB per image")
    axes.set_ylabel("time, torchvision = 1")
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHS, default="densenet121")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each model")
    parser.add_argument("--inference", action="store_true", help="eval and no_grad, no backward")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a picture here")
    args = parser.parse_args()

    device = torch.device(args.device)
    about = describe(device)
    rows = measure(args.arch, args.batch, args.size, args.rounds, device, args.inference)
    what = "inference" if args.inference else "training step"
    title = f"{args.arch} {what}, {args.size} x {args.size}, float32, batch {args.batch}"
    place = ", ".join(f"{k} {v}" for k, v in about.items())
    Console(width=110).print(table(rows, title), place)
    if args.json:
        args.json.write_text(json.dumps({"title": title, **about, "rows": rows}, indent=1) + "\n")
    if args.plot:
        where = f"{about['device']}, {about['threads']} threads, torch {about['torch']}"
        plot(rows, f"{title}\n{where}", args.plot)


if __name__ == "__main__":
    main()
