"""Where a training step of DenseNet-121 goes on the native CPU backend, primitive by primitive.

    python benchmarks/profile_step.py [--batch 4] [--size 224] [--markdown FILE]

The floor is a step's arithmetic at the rate of a large float32 matrix product in the same run.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from variants import describe, images, memdense_model, step

from memdense import ops
from memdense.backends import Native

# where a primitive that multiplies takes x and the weight, and its products per row and weight
PRODUCTS = {
    "bn_relu_conv1x1": (0, 2, 1.0),
    "bn_relu_conv1x1_backward": (4, 3, 2.0),
    "bn_relu_conv3x3": (0, 2, 1.0),
    "bn_relu_conv3x3_backward": (3, 1, 2.0),
    "bn_relu_pool_conv1x1": (0, 2, 0.25),
    "bn_relu_pool_conv1x1_backward": (2, 1, 0.5),
}
OTHERS = (
    *("pack", "settle", "statistics", "bn_relu_mean", "bn_relu_mean_backward"),
    *("bn_relu_maxpool", "bn_relu_maxpool_backward", "normalised_"),
)


class Timed(Native):
    """The native backend with a clock in front of each primitive."""

    seconds: dict[str, float] = defaultdict(float)  # noqa: RUF012
    flops: dict[str, float] = defaultdict(float)  # noqa: RUF012


def _timed(name: str):
    inner = getattr(Native, name)

    def call(self: Timed, *args: object):
        start = time.perf_counter()
        result = inner(self, *args)
        Timed.seconds[name] += time.perf_counter() - start
        if name in PRODUCTS:
            x, weight, products = PRODUCTS[name]
            Timed.flops[name] += 2 * products * len(args[x]) * args[weight].numel()
        return result

    return call


def arithmetic_rate() -> float:
    """FLOP/s of a float32 matrix product of 2048^3: the best of several."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--markdown", type=Path, help="write the table here")
    args = parser.parse_args()

    for name in (*PRODUCTS, *OTHERS):
        setattr(Timed, name, _timed(name))
    ops.backend_for = lambda device: Timed()
    model = memdense_model("densenet121")
    x, target = images("", args.batch, args.size, torch.device("cpu"))
    rounds = []
    for i in range(8):
        Timed.seconds.clear()
        Timed.flops.clear()
        start = time.perf_counter()
        step(model, x, target)
        total = time.perf_counter() - start
        if i > 1:
            rounds.append((total, dict(Timed.seconds)))
    rate = arithmetic_rate()
    total = statistics.median(t for t, _ in rounds)
    lines = [
        f"| primitive | ms | GFLOP | GFLOP/s | floor at {rate / 1e9:.0f} GFLOP/s, ms |",
        "|---|---:|---:|---:|---:|",
    ]
    seen = 0.0
    medians = {n: statistics.median(r[n] for _, r in rounds) for n in rounds[0][1]}
    for name, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        seen += seconds
        flops = Timed.flops.get(name, 0.0)
        work = (
            f"{flops / 1e9:.1f} | {flops / seconds / 1e9:.0f} | {1e3 * flops / rate:.0f}"
            if flops
            else "- | - | -"
        )
        lines.append(f"| `{name}` | {1e3 * seconds:.0f} | {work} |")
    rest = total - seen
    lines.append(
        f"| the rest: first convolution, classifier, Python | {1e3 * rest:.0f} | - | - | - |"
    )
    flops = sum(Timed.flops.values())
    lines.append(
        f"| **step** | **{1e3 * total:.0f}** | {flops / 1e9:.1f} | {flops / total / 1e9:.0f} "
        f"| {1e3 * flops / rate:.0f} |"
    )
    place = ", ".join(f"{k} {v}" for k, v in describe(torch.device("cpu")).items())
    title = f"DenseNet-121 training step, {args.size} x {args.size}, float32, batch {args.batch}"
    text = "\n".join([f"{title}; medians of {len(rounds)} steps.", "", *lines, "", place])
    print(text)
    if args.markdown:
        args.markdown.write_text(
            f"# Where a training step goes on the CPU\n\n{text}\n\n"
            "Made by `python benchmarks/profile_step.py --markdown docs/profile-cpu.md`.\n"
        )


if __name__ == "__main__":
    main()
