"""The dilated 3x3 convolution against PyTorch's on this CPU, in both of PyTorch's layouts.

python benchmarks/bench_conv3x3.py --threads 2 --json conv3x3.json

Each round takes each variant once, so that what slows the machine slows all of them; a ratio is
PyTorch's median time, in its faster layout, over ours. Results are compared before they are timed.
On a machine that others use, medians tell little: --shared takes the least time of one thread.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from memdense import _extension
from memdense.backends import Reference
from memdense.backends.native3x3 import NativeConv3x3
from memdense.buffers import Geometry, Reader
from memdense.convolution import dilated_conv3x3

SHAPES = [(4, 128, 32, 28), (4, 128, 32, 56), (1, 256, 256, 28)]  # images, C, k, height = width
LAYERS = [(4, 128, 32, 56), (4, 128, 32, 28), (4, 128, 32, 14), (4, 128, 32, 7), (16, 48, 12, 32)]
DILATIONS = (1, 2, 4)
LAYOUTS = {"nchw": torch.contiguous_format, "channels last": torch.channels_last}


class Native(NativeConv3x3, Reference):
    pass


def interleaved(
    variants: dict[str, Callable[[], object]], seconds: float, shared: bool
) -> dict[str, float]:
    """Median seconds of each variant; where the machine is shared, the least CPU seconds."""
    clock = time.thread_time if shared else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        for name, run in variants.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    typical = min if shared else statistics.median
    return {name: typical(values) for name, values in times.items()}


def convolution(n: int, c: int, k: int, size: int, d: int) -> dict[str, Callable[[], object]]:
    """Forward and backward of the plain convolution."""
    x, weight, dy = (
        torch.randn(n, c, size, size),
        torch.randn(k, c, 3, 3),
        torch.randn(n, k, size, size),
    )
    geometry = (1, 1), (d, d), (d, d)

    def step(convolve: Callable, layout: torch.memory_format) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [t.to(memory_format=layout).requires_grad_() for t in (x, weight)]
        gradient = dy.to(memory_format=layout)

        def run() -> tuple[Tensor, ...]:
            out = convolve(*leaves, None, *geometry)
            return out.detach(), *torch.autograd.grad(out, leaves, gradient)

        return run

    variants = {name: step(F.conv2d, layout) for name, layout in LAYOUTS.items()}
    variants["memdense"] = step(dilated_conv3x3, torch.channels_last)
    return variants


def layer_forward(n: int, c: int, k: int, size: int, d: int) -> dict[str, Callable[[], object]]:
    """Read Y through BN-ReLU, convolve, write the slice, take its statistics."""
    geometry = Geometry(n, size, size)
    y, weight = torch.randn(geometry.rows, c), torch.randn(k, c, 3, 3)
    var, mean = torch.var_mean(y, 0, correction=0)
    gamma, beta = torch.rand(c) + 0.5, torch.randn(c)
    scale = gamma * (var + 1e-5).rsqrt()
    read = Reader(scale, beta - mean * scale, mean, (var + 1e-5).rsqrt(), True)
    features = torch.zeros(geometry.rows, c + k)
    native = Native()

    def fused() -> tuple[Tensor, ...]:
        out = features[:, c:]
        moments = native.bn_relu_conv3x3(y, read, weight, (d, d), geometry, out, None, True)
        return geometry.images(out), *moments

    def separate(layout: torch.memory_format) -> Callable[[], tuple[Tensor, ...]]:
        images = geometry.images(y).contiguous(memory_format=layout)
        kernel = weight.contiguous(memory_format=layout)
        wide = torch.zeros(n, c + k, size, size).to(memory_format=layout)

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                z = F.batch_norm(images, mean, var, gamma, beta, False, 0.0, 1e-5).relu_()
                new = F.conv2d(z, kernel, None, 1, d, d)
                wide[:, c:] = new
                return wide[:, c:], *torch.batch_norm_update_stats(new, None, None, 0.0)

        return run

    return {name: separate(layout) for name, layout in LAYOUTS.items()} | {"memdense": fused}


def layer_backward(n: int, c: int, k: int, size: int, d: int) -> dict[str, Callable[[], object]]:
    """Recompute z from Y; its masked gradient, the two sums and the weight's gradient."""
    geometry = Geometry(n, size, size)
    y, weight = torch.randn(geometry.rows, c), torch.randn(k, c, 3, 3)
    dy = torch.randn(geometry.rows, k)
    var, mean = torch.var_mean(y, 0, correction=0)
    gamma, beta, rstd = torch.rand(c) + 0.5, torch.randn(c), (var + 1e-5).rsqrt()
    read = Reader(gamma * rstd, beta - mean * gamma * rstd, mean, rstd, True)
    native = Native()

    def fused() -> tuple[Tensor, ...]:
        dz, sums, dweight = native.bn_relu_conv3x3_backward(
            dy, weight, (d, d), y, read, geometry, None, True
        )
        return geometry.images(dz), dweight, sums.dgamma, sums.dbeta

    def separate(layout: torch.memory_format) -> Callable[[], tuple[Tensor, ...]]:
        images, gradient = (geometry.images(t).contiguous(memory_format=layout) for t in (y, dy))
        kernel = weight.contiguous(memory_format=layout)
        aten = torch.ops.aten

        def run() -> tuple[Tensor, ...]:
            z = F.batch_norm(images, mean, var, gamma, beta, False, 0.0, 1e-5).relu_()
            da, dweight, _ = aten.convolution_backward(
                gradient, z, kernel, None, (1, 1), (d, d), (d, d), False, (0, 0), 1,
                (True, True, False),
            )  # fmt: skip
            dz = aten.threshold_backward(da, z, 0)
            # the norm's own backward: it takes the two sums, and would go on to Y's gradient
            _, dgamma, dbeta = aten.native_batch_norm_backward(
                dz, images, gamma, None, None, mean, rstd, True, 1e-5, (False, True, True)
            )
            return dz, dweight, dgamma, dbeta

        return run

    return {name: separate(layout) for name, layout in LAYOUTS.items()} | {"memdense": fused}


GROUPS = {
    "convolution, forward + backward": (convolution, SHAPES),
    "dense layer's second half, forward": (layer_forward, LAYERS),
    "dense layer's second half, backward": (layer_backward, LAYERS),
}


def check(variants: dict[str, Callable[[], tuple[Tensor, ...]]]) -> None:
    results = [run() for run in variants.values()]
    for values in zip(*results, strict=True):
        size = values[0].abs().max()
        for value in values[1:]:
            assert (value - values[0]).abs().max() <= 1e-4 * size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    parser.add_argument("--shared", action="store_true", help="least CPU time of one thread")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if not _extension.available():
        raise SystemExit(_extension.reason())
    threads = 1 if arguments.shared else arguments.threads
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    statistic = "minima" if arguments.shared else "medians"
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"torch {torch.__version__}, {capability}, {threads} thread(s), float32, {statistic} in ms"
    )
    rows = []
    for group, (make, shapes) in GROUPS.items():
        print(f"\n{group}\n{'':24}{'nchw':>9}{'ch. last':>10}{'memdense':>10}{'ratio':>8}")
        for n, c, k, size in shapes:
            for d in DILATIONS:
                variants = make(n, c, k, size, d)
                check(variants)
                found = interleaved(variants, arguments.seconds, arguments.shared)
                ratio = min(found[name] for name in LAYOUTS) / found["memdense"]
                rows.append({"group": group, "shape": [n, c, k, size], "dilation": d,
                             "seconds": found, "ratio": ratio})  # fmt: skip
                label = f"{n} x {c}->{k} {size}x{size} d={d}"
                times = "".join(f"{1e3 * value:10.2f}" for value in found.values())
                print(f"{label:23}{times}{ratio:8.2f}", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"torch": torch.__version__, "threads": threads, "rows": rows}, file)


if __name__ == "__main__":
    main()
