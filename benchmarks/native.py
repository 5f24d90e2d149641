"""The native backend against the reference, interleaved, least times of each.

Primitives at the shapes of DenseNet-121, in milliseconds and GFLOP/s, or with --step whole
training steps beside torchvision's:

    OMP_NUM_THREADS=1 python benchmarks/native.py [--batch 4] [--repeat 15] [--only conv1x1]
    OMP_NUM_THREADS=1 python benchmarks/native.py --step
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from memdense import _extension
from memdense.backends.native import Native
from memdense.backends.reference import Reference
from memdense.buffers import Geometry, Reader

# side, channels of the whole block, channels read, bottleneck
LAYERS = [
    (56, 256, 64, 128),
    (56, 256, 224, 128),
    (28, 512, 480, 128),
    (14, 1024, 512, 128),
    (14, 1024, 992, 128),
    (7, 1024, 992, 128),
]


def read_of(channels: int) -> Reader:
    return Reader(
        torch.rand(channels) + 0.5,
        torch.randn(channels),
        torch.randn(channels),
        torch.rand(channels),
        True,
    )


def compare(
    name: str, method: str, args: tuple, flop: float, product: Callable | None, repeat: int
) -> None:
    """Print the least times of interleaved runs; ``product`` is the arithmetic by PyTorch."""
    backends = {"reference": Reference(), "native": Native()}
    calls = {key: partial(getattr(b, method), *args) for key, b in backends.items()}
    if product is not None:
        calls["torch.mm"] = product
    times = {key: [] for key in calls}
    for _ in range(repeat):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - start)
    least = {key: min(t) for key, t in times.items()}
    line = f"{method + ' ' + name:44} ms" + "".join(
        f"  {k} {1e3 * t:7.3f}" for k, t in least.items()
    )
    line += f"  ratio {least['reference'] / least['native']:.2f}"
    if flop:
        line += "  GFLOP/s" + "".join(f"  {k} {flop / t / 1e9:.0f}" for k, t in least.items())
    print(line)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--only", default="")
    parser.add_argument("--step", action="store_true")
    args = parser.parse_args()
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {capability}")
    assert _extension.available(), _extension.reason()
    if args.step:
        return steps(args.batch, args.repeat)
    for size, method, arguments, flop, product in cases(args.batch):
        if args.only in f"{method} {size}":
            compare(size, method, arguments, flop, product, args.repeat)


def steps(n: int, repeat: int) -> None:
    """Training steps of DenseNet-121 at 224 x 224, gradients allocated before."""
    import torchvision

    import memdense

    torch.manual_seed(0)
    x, target = torch.randn(n, 3, 224, 224), torch.randint(1000, (n,))
    plain, ours = torchvision.models.densenet121(), memdense.densenet121()
    last = torchvision.models.densenet121().to(memory_format=torch.channels_last)
    models = {
        "torchvision": (plain, x, nullcontext),
        "channels_last": (last, x.to(memory_format=torch.channels_last), nullcontext),
        "reference": (ours, x, lambda: memdense.use_backend("reference")),
        "native": (ours, x, lambda: memdense.use_backend("native")),
    }
    times = {name: [] for name in models}
    for i in range(repeat + 1):
        for name, (model, images, context) in models.items():
            with context():
                start = time.perf_counter()
                torch.nn.functional.cross_entropy(model(images), target).backward()
                if i:
                    times[name].append(time.perf_counter() - start)
    for name, t in times.items():
        print(
            f"{name:16} least {1e3 * min(t):7.0f} ms, median {1e3 * statistics.median(t):7.0f} ms"
        )


def cases(n: int) -> Iterator[tuple[str, str, tuple, float, Callable | None]]:
    """(shape, method, arguments, FLOP, the product alone) of each primitive."""
    torch.manual_seed(0)
    for side, last, c, b in LAYERS:
        geometry = Geometry(n, side, side)
        m = geometry.rows
        x, g = torch.randn(m, last), torch.zeros(m, last)
        weight, read = torch.randn(b, c), read_of(c)
        dz, y, abc = torch.randn(m, b), torch.randn(m, b), tuple(torch.randn(b) for _ in range(3))
        size, flop = f"{side}x{side} {c}->{b}", 2 * m * b * c
        forward, backward = products(dz, weight)
        yield size, "bn_relu_conv1x1", (x[:, :c], read, weight, True), flop, forward
        args = dz, y, abc, weight, x[:, :c], read, g[:, :c], True
        yield size, "bn_relu_conv1x1_backward", args, 2 * flop, backward
        args = g[:, -32:], x[:, -32:], torch.randn(32), torch.randn(32), None
        yield f"{side}x{side} 32", "settle", args, 0, None
        if c not in (224, 480, 992):
            continue
        images, read, size = (
            geometry.images(torch.randn(m, last // 2)),
            read_of(last),
            f"{side}x{side} {last}",
        )
        yield size, "pack", (images, x[:, : last // 2], geometry, True), 0, None
        yield size, "statistics", (x,), 0, None
        if side > 7:
            weight, dout = (
                torch.randn(last // 2, last),
                torch.randn(n * (side // 2) ** 2, last // 2),
            )
            flop = 2 * len(dout) * weight.numel()
            yield size, "bn_relu_pool_conv1x1", (x, read, weight, geometry), flop, None
            args = dout, weight, x, read, geometry, g, True
            yield size, "bn_relu_pool_conv1x1_backward", args, 2 * flop, None
        else:
            yield size, "bn_relu_mean", (x, read, geometry), 0, None
            args = torch.randn(n, last), x, read, geometry, g
            yield size, "bn_relu_mean_backward", args, 0, None
            yield size, "bn_relu", (x, read, True), 0, None
            yield size, "bn_relu_backward", (x, x, read, True, g), 0, None
    geometry, read = Geometry(n, 112, 112), read_of(64)
    x, dout = torch.randn(geometry.rows, 64), torch.randn(geometry.rows // 4, 64)
    winner = Reference().bn_relu_maxpool(x, read, geometry)[1]
    abc = tuple(torch.randn(64) for _ in range(3))
    yield "112x112 64", "statistics", (x,), 0, None
    yield "112x112 64", "bn_relu_maxpool", (x, read, geometry), 0, None
    yield "112x112 64", "bn_relu_maxpool_backward", (dout, winner, x, read, geometry), 0, None
    yield "112x112 64", "normalised_", (torch.randn_like(x), x, abc), 0, None


def products(dz: Tensor, weight: Tensor) -> tuple[Callable, Callable]:
    """The matrix products of a 1x1 convolution's forward and backward on their own."""
    z, y = torch.randn(len(dz), weight.shape[1]), torch.empty_like(dz)
    da, dweight = torch.empty_like(z), torch.empty_like(weight)

    def backward() -> None:
        torch.mm(dz, weight, out=da)
        torch.mm(dz.t(), z, out=dweight)

    return lambda: torch.mm(z, weight.t(), out=y), backward


if __name__ == "__main__":
    main()
