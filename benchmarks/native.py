"""Each native primitive against the reference's, at DenseNet-121's shapes, interleaved: milliseconds and GFLOP/s.

    OMP_NUM_THREADS=1 python benchmarks/native.py [--batch 4] [--repeat 15] [--only conv1x1]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from memdense import _extension
from memdense.backends.native import Native
from memdense.backends.reference import Reference
from memdense.buffers import Geometry, Reader

# side, channels of the whole block, channels read, bottleneck
LAYERS = [(56, 256, 64, 128), (56, 256, 224, 128), (28, 512, 480, 128), (14, 1024, 512, 128), (14, 1024, 992, 128),
          (7, 1024, 992, 128)]  # fmt: skip


def read_of(channels: int) -> Reader:
    return Reader(torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels), torch.rand(channels), True)


def compare(name: str, run: Callable[[Reference], object], repeat: int, flop: float = 0, mm: Callable | None = None) -> None:
    """Print medians of interleaved runs; ``mm`` is the product alone, by PyTorch."""
    calls = {"reference": lambda: run(Reference()), "native": lambda: run(Native())}
    if mm is not None:
        calls["torch.mm"] = mm
    times = {key: [] for key in calls}
    for _ in range(repeat):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - start)
    medians = {key: min(t) for key, t in times.items()}
    rates = " ".join(f"{key} {flop / t / 1e9:.0f}" for key, t in medians.items()) if flop else ""
    figures = " ".join(f"{key} {1e3 * t:7.3f}" for key, t in medians.items())
    print(f"{name:44} ms: {figures}  {medians['reference'] / medians['native']:.2f}x  {rates and 'GFLOP/s: ' + rates}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}")
    assert _extension.available(), _extension.reason()
    for name, run, flop, mm in cases(args.batch):
        if args.only in name:
            compare(name, run, args.repeat, flop, mm)


def cases(n: int):  # noqa: ANN201
    """(name, run, FLOP, the product alone) of each primitive."""
    torch.manual_seed(0)
    for side, last, c, b in LAYERS:
        geometry = Geometry(n, side, side)
        m = geometry.rows
        x, g = torch.randn(m, last), torch.zeros(m, last)
        weight, read = torch.randn(b, c), read_of(c)
        dz, y, abc = torch.randn(m, b), torch.randn(m, b), tuple(torch.randn(b) for _ in range(3))
        z, da, dw = torch.randn(m, c), torch.empty(m, c), torch.empty(b, c)
        at = f"{side}x{side} {c}->{b}"
        flop = 2 * m * b * c

        def products(dz: Tensor = dz, weight: Tensor = weight, z: Tensor = z, da: Tensor = da, dw: Tensor = dw) -> None:
            torch.mm(dz, weight, out=da)
            torch.mm(dz.t(), z, out=dw)

        yield (f"bn_relu_conv1x1 {at}",
               lambda o, x=x, c=c, r=read, w=weight: o.bn_relu_conv1x1(x[:, :c], r, w, True), flop,
               lambda z=z, w=weight, y=y: torch.mm(z, w.t(), out=y))  # fmt: skip
        yield (f"bn_relu_conv1x1_backward {at}",
               lambda o, x=x, c=c, r=read, w=weight, dz=dz, y=y, abc=abc, g=g:
               o.bn_relu_conv1x1_backward(dz, y, abc, w, x[:, :c], r, g[:, :c], True), 2 * flop, products)  # fmt: skip
        p, q = torch.randn(32), torch.randn(32)
        yield (f"settle {side}x{side} 32",
               lambda o, x=x, g=g, p=p, q=q: o.settle(g[:, -32:], x[:, -32:], p, q, None), 0, None)  # fmt: skip
        if c in (224, 480, 992):
            images, read = torch.randn(m, last // 2), read_of(last)
            images = geometry.images(images)
            weight, dout = torch.randn(last // 2, last), torch.randn(n * (side // 2) ** 2, last // 2)
            flop = len(dout) * weight.numel() * 2
            yield (f"pack {side}x{side} {last // 2}",
                   lambda o, i=images, x=x, ge=geometry: o.pack(i, x[:, : i.shape[1]], ge, True), 0, None)  # fmt: skip
            yield f"statistics {side}x{side} {last}", lambda o, x=x: o.statistics(x), 0, None
            if side > 7:
                yield (f"bn_relu_pool_conv1x1 {side}x{side} {last}",
                       lambda o, x=x, r=read, w=weight, ge=geometry: o.bn_relu_pool_conv1x1(x, r, w, ge), flop, None)  # fmt: skip
                yield (f"bn_relu_pool_conv1x1_backward {side}x{side} {last}",
                       lambda o, x=x, r=read, w=weight, ge=geometry, d=dout, g=g:
                       o.bn_relu_pool_conv1x1_backward(d, w, x, r, ge, g, True), 2 * flop, None)  # fmt: skip
            else:
                dout = torch.randn(n, last)
                yield (f"bn_relu_mean {side}x{side} {last}",
                       lambda o, x=x, r=read, ge=geometry: o.bn_relu_mean(x, r, ge), 0, None)  # fmt: skip
                yield (f"bn_relu_mean_backward {side}x{side} {last}",
                       lambda o, x=x, r=read, ge=geometry, d=dout, g=g: o.bn_relu_mean_backward(d, x, r, ge, g), 0, None)  # fmt: skip
                yield f"bn_relu {side}x{side} {last}", lambda o, x=x, r=read: o.bn_relu(x, r, True), 0, None
                yield (f"bn_relu_backward {side}x{side} {last}",
                       lambda o, x=x, r=read, g=g: o.bn_relu_backward(x, x, r, True, g), 0, None)  # fmt: skip
    geometry, read = Geometry(n, 112, 112), read_of(64)
    x, dout = torch.randn(geometry.rows, 64), torch.randn(geometry.rows // 4, 64)
    winner = Reference().bn_relu_maxpool(x, read, geometry)[1]
    dz, abc = torch.randn_like(x), tuple(torch.randn(64) for _ in range(3))
    yield "statistics 112x112 64", lambda o: o.statistics(x), 0, None
    yield "bn_relu_maxpool 112x112 64", lambda o: o.bn_relu_maxpool(x, read, geometry), 0, None
    yield ("bn_relu_maxpool_backward 112x112 64",
           lambda o: o.bn_relu_maxpool_backward(dout, winner, x, read, geometry), 0, None)  # fmt: skip
    yield "normalised_ 112x112 64", lambda o: o.normalised_(dz, x, abc), 0, None


if __name__ == "__main__":
    main()
