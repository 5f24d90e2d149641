"""What the kernels are timed on: each primitive's arguments, PyTorch's separate operations for the
same, and the bytes and FLOP counted from both. Whoever changes a primitive's contract changes this
file.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from measure import Clock, Run
from torch import Tensor
from torch.nn import functional as F

from memdense import convolution as chosen
from memdense import ops, use_backend
from memdense.backends import backend_for
from memdense.buffers import (
    Geometry,
    Into,
    NormGradient,
    Reader,
    Share,
    Sums,
    accumulator,
)
from memdense.convolution import dilated_conv3x3

aten = torch.ops.aten
EPS = 1e-5
LAYOUTS = {"nchw": torch.contiguous_format, "channels last": torch.channels_last}

# of those that multiply: products per row of x and entry of the weight
PRODUCTS = {
    "bn_relu_conv1x1": 1.0,
    "bn_relu_conv1x1_backward": 2.0,
    "bn_relu_conv3x3": 1.0,
    "bn_relu_conv3x3_backward": 2.0,
    "bn_relu_pool_conv1x1": 0.25,
    "bn_relu_pool_conv1x1_backward": 0.5,
}
PRIMITIVES = (
    *PRODUCTS,
    *("pack", "statistics", "settle", "bn_relu", "bn_relu_backward"),
    *("bn_relu_mean", "bn_relu_mean_backward"),
    *("bn_relu_maxpool", "bn_relu_maxpool_sums", "bn_relu_maxpool_backward"),
)


class Cost(NamedTuple):
    """The least a primitive must move, each input read and each output written once, and do."""

    bytes: int
    flop: float


def cost(primitive: str, arguments: Mapping[str, Any], result: Any) -> Cost:
    """Counted from the tensors that go in and come out, vectors and weights included."""
    given = dict(arguments)
    written = list(_tensors(result))
    if "out" in given:
        written.append(given.pop("out"))
    elif given.get("into") is not None:
        written += [given["into"].g, given["into"].sums]  # added to: read and written
    if given.get("moments") is not None:
        written.append(given.pop("moments"))
    size = sum(t.numel() * t.element_size() for t in (*_tensors(list(given.values())), *written))
    flop = 0.0
    if primitive in PRODUCTS:
        flop = 2 * PRODUCTS[primitive] * len(given["x"]) * given["weight"].numel()
    return Cost(size, flop)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Reader):
        yield from _tensors([value.mean, value.var, value.weight, value.bias])
    elif isinstance(value, NormGradient):
        yield from _tensors([value.read, value.sums])
    elif isinstance(value, Share):
        yield from _tensors([value.sums, value.mean])
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


class Draw:
    """Random arguments; a matrix is columns of a wider buffer, as in a dense block."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype, self.accumulator = device, dtype, accumulator(dtype)
        self.generator = torch.Generator(device).manual_seed(seed)

    def tensor(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, device=self.device, generator=self.generator)
        return drawn.to(self.dtype)

    def matrix(self, rows: int, channels: int, width: int = 0, start: int = 0) -> Tensor:
        return self.tensor(rows, width or channels)[:, start : start + channels]

    def vector(self, channels: int) -> Tensor:
        return self.tensor(channels).to(self.accumulator)

    def positive(self, channels: int) -> Tensor:
        drawn = torch.rand(channels, device=self.device, generator=self.generator) + 0.5
        return drawn.to(self.accumulator)

    def reader(self, channels: int) -> Reader:
        var, gamma = self.positive(channels), self.positive(channels)
        return Reader(self.vector(channels), var, gamma, self.vector(channels), EPS, True)

    def read(self, rows: int, channels: int, width: int = 0) -> dict[str, Any]:
        """x and a reader of it, away from the ReLU's kink: there rounding decides on a gradient."""
        x, read = self.matrix(rows, channels, width), self.reader(channels)
        near = (x * read.scale + read.shift).abs() < 1e-3
        x[near] = ((1 - read.shift) / read.scale).to(x.dtype).expand_as(x)[near]
        return dict(x=x, read=read)

    def behind(self, channels: int, rows: int) -> NormGradient:
        """With a below 1: run after run in place, the values stay where they are."""
        read = self.reader(channels)
        small = read.weight / read.rstd / 2
        read = Reader(read.mean, read.var, small, read.bias, EPS, True)
        return NormGradient(read, self.sums(channels, rows), rows)

    def sums(self, channels: int, rows: int) -> Sums:
        return Sums(*(rows**0.5 * self.vector(channels) for _ in range(2)))

    def moments(self, channels: int) -> Tensor:
        return torch.full((2, channels), torch.nan, dtype=self.accumulator, device=self.device)

    def into(self, g: Tensor) -> Into:
        sums = torch.zeros((2, g.shape[1]), dtype=self.accumulator, device=self.device)
        return Into(g, sums, True)


def in_double(value: Any) -> Any:
    """The same arguments in float64, nothing shared with the given ones."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Reader):
        tensors = (in_double(v) for v in (value.mean, value.var, value.weight, value.bias))
        return Reader(*tensors, value.eps, value.batch)
    if isinstance(value, NormGradient):
        return NormGradient(in_double(value.read), in_double(value.sums), value.rows)
    if isinstance(value, Share):
        return Share(in_double(value.sums), in_double(value.mean), value.rows)
    if isinstance(value, Into | Sums):
        return type(value)(*(in_double(v) for v in value))
    if isinstance(value, tuple) and not isinstance(value, Geometry):
        return tuple(in_double(v) for v in value)
    return value


class Norm:
    """PyTorch's BatchNorm by given statistics: the module that a Reader stands for."""

    def __init__(self, read: Reader) -> None:
        self.mean, self.var, self.rstd = read.mean, read.var, read.rstd
        self.gamma, self.beta = read.weight, read.bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, False, 0.0, EPS)

    def sums(self, dz: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """dbeta and dgamma: the reductions of the norm's own backward, without its pass to dx."""
        _, dgamma, dbeta = aten.native_batch_norm_backward(
            dz, x, self.gamma, None, None, self.mean, self.rstd, True, EPS, (False, True, True)
        )
        return dbeta, dgamma


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """A batch's mean and variance, as a BatchNorm in training takes them."""
    if x.device.type == "cpu":
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean, var


def convolution_backward(
    dy: Tensor, z: Tensor, weight: Tensor, dilation: tuple[int, int] = (1, 1)
) -> tuple[Tensor, Tensor]:
    padding = dilation if weight.shape[-1] == 3 else (0, 0)
    return aten.convolution_backward(
        dy, z, weight, None, (1, 1), padding, dilation, False, (0, 0), 1, (True, True, False)
    )[:2]


class Separate:
    """A primitive's arguments as PyTorch's modules would hold them: packed images of one layout."""

    def __init__(self, geometry: Geometry, layout: torch.memory_format) -> None:
        self.geometry, self.layout = geometry, layout
        self.small = Geometry(geometry.n, geometry.h // 2, geometry.w // 2)
        self.half_up = Geometry(geometry.n, (geometry.h + 1) // 2, (geometry.w + 1) // 2)

    def images(self, rows: Tensor, geometry: Geometry | None = None) -> Tensor:
        images = (geometry or self.geometry).images(rows)
        return images.clone(memory_format=self.layout)

    def kernel(self, weight: Tensor) -> Tensor:
        weight = weight if weight.dim() == 4 else weight[:, :, None, None]
        return weight.contiguous(memory_format=self.layout)

    @staticmethod
    def channels(vector: Tensor, like: Tensor) -> Tensor:
        return vector.to(like.dtype).view(1, -1, 1, 1)


Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A primitive at one shape.

    Attributes:
        arguments: fresh ones, by the primitive's parameter names.
        outputs: what it returned or wrote, as images and vectors, to compare.
        separate: PyTorch's operations for the same, in one layout; they return the same outputs.
    """

    primitive: str
    shape: str
    arguments: Callable[[Draw], Arguments]
    outputs: Callable[[Arguments, Any], tuple[Tensor, ...]]
    separate: Callable[[Arguments, torch.memory_format], Callable[[], tuple[Tensor, ...]]]


def backends(device: torch.device) -> dict[str, Any]:
    """The backend that memdense would choose, and the reference."""
    found = {backend.name: backend for backend in (backend_for(device),)}
    with use_backend("reference"):
        found.setdefault("reference", backend_for(device))
    return found


class Fused(NamedTuple):
    """A primitive on a backend. What makes its results comparable is not part of a run."""

    case: Case
    backend: Any
    arguments: Arguments

    def run(self) -> Any:
        return getattr(self.backend, self.case.primitive)(**self.arguments)

    def outputs(self, result: Any) -> tuple[Tensor, ...]:
        return self.case.outputs(self.arguments, result)


# ---- a dense layer


def conv1x1(geometry: Geometry, c: int, b: int, width: int) -> Case:
    def arguments(draw: Draw) -> Arguments:
        x = draw.matrix(geometry.rows, c, width)
        return dict(x=x, read=draw.reader(c), weight=draw.tensor(b, c), moments=draw.moments(b))

    def outputs(a: Arguments, y: Any) -> tuple[Tensor, ...]:
        return geometry.images(y), *a["moments"]

    def separate(a: Arguments, layout: torch.memory_format) -> Run:
        to = Separate(geometry, layout)
        x, norm, weight = to.images(a["x"]), Norm(a["read"]), to.kernel(a["weight"])

        def run() -> tuple[Tensor, ...]:
            y = F.conv2d(norm(x).relu_(), weight)
            return y, *moments(y)

        return run

    shape = f"{geometry.n} x {geometry.h}x{geometry.w}, {c} -> {b}"
    return Case("bn_relu_conv1x1", shape, arguments, outputs, separate)


def conv1x1_backward(geometry: Geometry, c: int, b: int, width: int) -> Case:
    def arguments(draw: Draw) -> Arguments:
        rows = geometry.rows
        return dict(
            dz=draw.matrix(rows, b), y=draw.matrix(rows, b),
            behind=draw.behind(b, rows), weight=draw.tensor(b, c),
            **draw.read(rows, c, width),
            into=draw.into(draw.matrix(rows, c, width)), need_weight=True,
        )  # fmt: skip

    def outputs(a: Arguments, result: Any) -> tuple[Tensor, ...]:
        sums, dweight = result
        return geometry.images(a["into"].g), sums.dbeta, sums.dgamma, dweight[:, :, None, None]

    def separate(args: Arguments, layout: torch.memory_format) -> Run:
        to = Separate(geometry, layout)
        dz, y, x = (to.images(args[name]) for name in ("dz", "y", "x"))
        g = to.images(args["into"].g)
        a, b, c = (to.channels(v, x) for v in args["behind"].vectors)
        norm, weight, scale = (
            Norm(args["read"]),
            to.kernel(args["weight"]),
            to.channels(args["read"].scale, x),
        )

        def run() -> tuple[Tensor, ...]:
            dy = torch.addcmul(c, y, b).addcmul_(dz, a)
            z = norm(x).relu_()
            da, dweight = convolution_backward(dy, z, weight)
            dz1 = aten.threshold_backward(da, z, 0)
            sums = norm.sums(dz1, x)
            return g.addcmul_(dz1, scale), *sums, dweight

        return run

    shape = f"{geometry.n} x {geometry.h}x{geometry.w}, {c} -> {b}"
    return Case("bn_relu_conv1x1_backward", shape, arguments, outputs, separate)


def conv3x3(geometry: Geometry, c: int, k: int, d: int, width: int) -> Case:
    def arguments(draw: Draw) -> Arguments:
        out = draw.matrix(geometry.rows, k, width, width - k).fill_(torch.nan)
        return dict(
            x=draw.matrix(geometry.rows, c), read=draw.reader(c), weight=draw.tensor(k, c, 3, 3),
            dilation=(d, d), geometry=geometry, out=out, keep=None, moments=draw.moments(k),
        )  # fmt: skip

    def outputs(a: Arguments, result: Any) -> tuple[Tensor, ...]:
        return geometry.images(a["out"]), *a["moments"]

    def separate(a: Arguments, layout: torch.memory_format) -> Run:
        to = Separate(geometry, layout)
        x, norm, weight = to.images(a["x"]), Norm(a["read"]), to.kernel(a["weight"])
        new = to.images(a["out"])

        def run() -> tuple[Tensor, ...]:
            new.copy_(F.conv2d(norm(x).relu_(), weight, None, 1, d, d))
            return new, *moments(new)

        return run

    shape = f"{geometry.n} x {geometry.h}x{geometry.w}, {c} -> {k}, dilation {d}"
    return Case("bn_relu_conv3x3", shape, arguments, outputs, separate)


def conv3x3_backward(geometry: Geometry, c: int, k: int, d: int) -> Case:
    def arguments(draw: Draw) -> Arguments:
        return dict(
            dy=draw.matrix(geometry.rows, k), weight=draw.tensor(k, c, 3, 3), dilation=(d, d),
            **draw.read(geometry.rows, c), geometry=geometry, into=None, need_weight=True,
        )  # fmt: skip

    def outputs(_: Arguments, result: Any) -> tuple[Tensor, ...]:
        dz, sums, dweight = result
        return geometry.images(dz), sums.dbeta, sums.dgamma, dweight

    def separate(a: Arguments, layout: torch.memory_format) -> Run:
        to = Separate(geometry, layout)
        dy, x, norm, weight = (
            to.images(a["dy"]),
            to.images(a["x"]),
            Norm(a["read"]),
            to.kernel(a["weight"]),
        )

        def run() -> tuple[Tensor, ...]:
            z = norm(x).relu_()
            da, dweight = convolution_backward(dy, z, weight, (d, d))
            dz = aten.threshold_backward(da, z, 0)
            return dz, *norm.sums(dz, x), dweight

        return run

    shape = f"{geometry.n} x {geometry.h}x{geometry.w}, {c} -> {k}, dilation {d}"
    return Case("bn_relu_conv3x3_backward", shape, arguments, outputs, separate)


def settle(geometry: Geometry, k: int, width: int) -> Case:
    def arguments(draw: Draw) -> Arguments:
        g, x = (draw.matrix(geometry.rows, k, width, width - k) for _ in range(2))
        share = Share(geometry.rows * draw.vector(2 * k).view(2, k), draw.vector(k), geometry.rows)
        return dict(g=g, x=x, share=share, keep=None)

    def separate(a: Arguments, layout: torch.memory_format) -> Run:
        to = Separate(geometry, layout)
        g, x = to.images(a["g"]), to.images(a["x"])
        p, q = (to.channels(v, x) for v in a["share"].vectors)
        return lambda: (torch.addcmul(q, x, p).add_(g),)

    shape = f"{geometry.n} x {geometry.h}x{geometry.w}, {k}"
    return Case("settle", shape, arguments, lambda _, dy: (geometry.images(dy),), separate)


# ---- entering a block, its tails


def pack(geometry: Geometry, c: int, width: int) -> Case:
    def arguments(draw: Draw) -> Arguments:
        out = draw.matrix(geometry.rows, c, width).fill_(torch.nan)
        x = geometry.images(draw.matrix(geometry.rows, c))
        return dict(x=x, out=out, geometry=geometry, moments=draw.moments(c))

    def outputs(a: Arguments, result: Any) -> tuple[Tensor, ...]:
        return geometry.images(a["out"]), *a["moments"]

    def separate(a: Arguments, layout: torch.memory_format) -> Run:
        x = a["x"].contiguous(memory_format=layout)
        wide = torch.empty(
            geometry.n, width, geometry.h, geometry.w, dtype=x.dtype, device=x.device,
            memory_format=layout,
        )[:, :c]  # fmt: skip
        return lambda: (wide.copy_(x), *moments(x))

    shape = f"{geometry.n} x {geometry.h}x{geometry.w}, {c}"
    return Case("pack", shape, arguments, outputs, separate)


def pool_conv1x1(geometry: Geometry, c: int, b: int) -> Case:
    small = Geometry(geometry.n, geometry.h // 2, geometry.w // 2)

    def arguments(draw: Draw) -> Arguments:
        x = draw.matrix(geometry.rows, c)
        return dict(x=x, read=draw.reader(c), weight=draw.tensor(b, c), geometry=geometry)

    def separate(a: Arguments, layout: torch.memory_format) -> Run:
        to = Separate(geometry, layout)
        x, norm, weight = to.images(a["x"]), Norm(a["read"]), to.kernel(a["weight"])
        return lambda: (F.avg_pool2d(F.conv2d(norm(x).relu_(), weight), 2),)

    shape = f"{geometry.n} x {geometry.h}x{geometry.w}, {c} -> {b}"
    return Case("bn_relu_pool_conv1x1", shape, arguments, lambda _, y: (small.images(y),), separate)


def pool_conv1x1_backward(geometry: Geometry, c: int, b: int) -> Case:
    small = Geometry(geometry.n, geometry.h // 2, geometry.w // 2)

    def arguments(draw: Draw) -> Arguments:
        return dict(
            dout=draw.matrix(small.rows, b), weight=draw.tensor(b, c),
            **draw.read(geometry.rows, c), geometry=geometry,
            into=draw.into(draw.matrix(geometry.rows, c)), need_weight=True,
        )  # fmt: skip

    def outputs(a: Arguments, result: Any) -> tuple[Tensor, ...]:
        sums, dweight = result
        return geometry.images(a["into"].g), sums.dbeta, sums.dgamma, dweight[:, :, None, None]

    def separate(a: Arguments, layout: torch.memory_format) -> Run:
        to = Separate(geometry, layout)
        dout, x, g = to.images(a["dout"], small), to.images(a["x"]), to.images(a["into"].g)
        norm, weight = Norm(a["read"]), to.kernel(a["weight"])
        scale = to.channels(a["read"].scale, x)

        def run() -> tuple[Tensor, ...]:
            z = norm(x).relu_()
            y = z.new_empty(geometry.n, b, geometry.h, geometry.w)
            dy = aten.avg_pool2d_backward(dout, y, (2, 2), (2, 2), (0, 0), False, True, None)
            da, dweight = convolution_backward(dy, z, weight)
            dz = aten.threshold_backward(da, z, 0)
            return g.addcmul_(dz, scale), *norm.sums(dz, x), dweight

        return run

    shape = f"{geometry.n} x {geometry.h}x{geometry.w}, {c} -> {b}"
    return Case("bn_relu_pool_conv1x1_backward", shape, arguments, outputs, separate)


def norm_relu(geometry: Geometry, c: int) -> Case:
    def arguments(draw: Draw) -> Arguments:
        return dict(x=draw.matrix(geometry.rows, c), read=draw.reader(c), relu=True)

    def separate(a: Arguments, layout: torch.memory_format) -> Run:
        x, norm = Separate(geometry, layout).images(a["x"]), Norm(a["read"])
        return lambda: (norm(x).relu_(),)

    shape = f"{geometry.n} x {geometry.h}x{geometry.w}, {c}"
    return Case("bn_relu", shape, arguments, lambda _, z: (geometry.images(z),), separate)


def norm_relu_backward(geometry: Geometry, c: int, mean: bool) -> Case:
    """Of ``bn_relu``, or of ``bn_relu_mean``, where the gradient is one value per image."""
    primitive = "bn_relu_mean_backward" if mean else "bn_relu_backward"
    pixels = geometry.h * geometry.w

    def arguments(draw: Draw) -> Arguments:
        given = draw.read(geometry.rows, c)
        # a last block's G is wide
        into = draw.into(draw.matrix(geometry.rows, c).to(draw.accumulator))
        if mean:
            dout = draw.tensor(geometry.n, c)
            return dict(dout=dout, **given, geometry=geometry, into=into)
        return dict(dout=draw.matrix(geometry.rows, c), **given, relu=True, into=into)

    def outputs(a: Arguments, sums: Any) -> tuple[Tensor, ...]:
        return geometry.images(a["into"].g), sums.dbeta, sums.dgamma

    def separate(a: Arguments, layout: torch.memory_format) -> Run:
        to = Separate(geometry, layout)
        x, norm = to.images(a["x"]), Norm(a["read"])
        g = to.images(a["into"].g.to(x.dtype))  # modules keep gradients in the features' dtype
        scale = to.channels(a["read"].scale, x)
        dout = a["dout"][:, :, None, None] if mean else to.images(a["dout"])

        def run() -> tuple[Tensor, ...]:
            z = norm(x).relu_()
            da = (dout / pixels).expand_as(z) if mean else dout
            dz = aten.threshold_backward(da, z, 0)
            return g.addcmul_(dz, scale), *norm.sums(dz, x)

        return run

    shape = f"{geometry.n} x {geometry.h}x{geometry.w}, {c}"
    return Case(primitive, shape, arguments, outputs, separate)


def mean(geometry: Geometry, c: int) -> Case:
    def arguments(draw: Draw) -> Arguments:
        return dict(x=draw.matrix(geometry.rows, c), read=draw.reader(c), geometry=geometry)

    def separate(a: Arguments, layout: torch.memory_format) -> Run:
        x, norm = Separate(geometry, layout).images(a["x"]), Norm(a["read"])
        return lambda: (norm(x).relu_().mean((2, 3)),)

    shape = f"{geometry.n} x {geometry.h}x{geometry.w}, {c}"
    return Case("bn_relu_mean", shape, arguments, lambda _, out: (out,), separate)


# ---- the stem


def statistics(geometry: Geometry, c: int) -> Case:
    def separate(a: Arguments, layout: torch.memory_format) -> Run:
        x = Separate(geometry, layout).images(a["x"])
        return lambda: moments(x)

    shape = f"{geometry.n} x {geometry.h}x{geometry.w}, {c}"
    return Case(
        "statistics", shape,
        lambda draw: dict(x=draw.matrix(geometry.rows, c), moments=draw.moments(c)),
        lambda a, _: tuple(a["moments"]), separate,
    )  # fmt: skip


def maxpool(geometry: Geometry, c: int) -> Case:
    half = Geometry(geometry.n, (geometry.h + 1) // 2, (geometry.w + 1) // 2)

    def arguments(draw: Draw) -> Arguments:
        return dict(x=draw.matrix(geometry.rows, c), read=draw.reader(c), geometry=geometry)

    def separate(a: Arguments, layout: torch.memory_format) -> Run:
        x, norm = Separate(geometry, layout).images(a["x"]), Norm(a["read"])
        return lambda: aten.max_pool2d_with_indices(norm(x).relu_(), (3, 3), (2, 2), (1, 1))[:1]

    shape = f"{geometry.n} x {geometry.h}x{geometry.w}, {c}"
    # PyTorch names a winner by its place in the image, we by its place in the window
    return Case(
        "bn_relu_maxpool", shape, arguments, lambda _, found: (half.images(found[0]),), separate
    )


def _unpool_arguments(geometry: Geometry, c: int, draw: Draw) -> Arguments:
    given = draw.read(geometry.rows, c)
    with use_backend("reference"):
        winner = backend_for(draw.device).bn_relu_maxpool(**given, geometry=geometry)[1]
    dout = draw.matrix(geometry.windows.rows, c)
    return dict(dout=dout, winner=winner, **given, geometry=geometry)


def _separate_unpool(
    geometry: Geometry, a: Arguments, read: Reader, layout: torch.memory_format
) -> tuple[Callable[[], Tensor], Tensor, Norm]:
    """(what makes dz, x as images, its norm)."""
    to = Separate(geometry, layout)
    dout, x, norm = to.images(a["dout"], geometry.windows), to.images(a["x"]), Norm(read)
    window = (3, 3), (2, 2), (1, 1)
    index = aten.max_pool2d_with_indices(norm(x).relu_(), *window)[1]

    def dz() -> Tensor:
        z = norm(x).relu_()
        da = aten.max_pool2d_with_indices_backward(dout, z, *window, (1, 1), False, index)
        return aten.threshold_backward(da, z, 0)

    return dz, x, norm


def maxpool_sums(geometry: Geometry, c: int) -> Case:
    def separate(a: Arguments, layout: torch.memory_format) -> Run:
        dz, x, norm = _separate_unpool(geometry, a, a["read"], layout)
        return lambda: norm.sums(dz(), x)

    shape = f"{geometry.n} x {geometry.h}x{geometry.w}, {c}"
    return Case(
        "bn_relu_maxpool_sums", shape, partial(_unpool_arguments, geometry, c),
        lambda _, sums: tuple(sums), separate,
    )  # fmt: skip


def maxpool_backward(geometry: Geometry, c: int) -> Case:
    def arguments(draw: Draw) -> Arguments:
        given = _unpool_arguments(geometry, c, draw)
        behind = NormGradient(given.pop("read"), draw.sums(c, geometry.rows), geometry.rows)
        return dict(**given, behind=behind, out=torch.empty_like(given["x"]))

    def separate(args: Arguments, layout: torch.memory_format) -> Run:
        behind = args["behind"]
        dz, x, _ = _separate_unpool(geometry, args, behind.read, layout)
        a, b, c = (Separate(geometry, layout).channels(v, x) for v in behind.vectors)
        return lambda: (dz().mul_(a).addcmul_(x, b).add_(c),)

    shape = f"{geometry.n} x {geometry.h}x{geometry.w}, {c}"
    return Case(
        "bn_relu_maxpool_backward", shape, arguments,
        lambda a, _: (geometry.images(a["out"]),), separate,
    )  # fmt: skip


def cases(batch: int, every: bool = False, quick: bool = False) -> list[Case]:
    """The primitives at the shapes of DenseNet-121 at 224 x 224.

    Those of a dense layer for a middle one of the first and the third block; with ``every``, of
    each block and dilation, and of BC-100-12. ``quick``: a few pixels.
    """
    k, b = 32, 128
    found = []
    # side, channels read by a middle layer, channels of the whole block
    blocks = [(56, 160, 256), (28, 320, 512), (14, 640, 1024), (7, 768, 1024)]
    if quick:
        blocks = [(9, 48, 64)]
    elif not every:
        blocks = [blocks[0], blocks[2]]
    for side, c, width in blocks:
        at = Geometry(batch, side, side)
        found += [
            conv1x1(at, c, b, width),
            conv1x1_backward(at, c, b, width),
            *(conv3x3(at, b, k, d, width) for d in ((1, 2, 4) if every else (1,))),
            *(conv3x3_backward(at, b, k, d) for d in ((1, 2, 4) if every else (1,))),
            settle(at, k, width),
        ]
    if every and not quick:
        at = Geometry(4 * batch, 32, 32)
        found += [conv1x1(at, 240, 48, 408), conv1x1_backward(at, 240, 48, 408)]
        found += [conv3x3(at, 48, 12, 1, 408), conv3x3_backward(at, 48, 12, 1)]
    stem, transition, head = ((10, 16), (9, 32), (3, 64)) if quick else ((112, 64), (28, 512),
                                                                       (7, 1024))  # fmt: skip
    at, c = Geometry(batch, stem[0], stem[0]), stem[1]
    found += [statistics(at, c), maxpool(at, c), maxpool_sums(at, c), maxpool_backward(at, c)]
    at, c = Geometry(batch, transition[0], transition[0]), transition[1]
    found += [
        pack(at, c // 4, c),
        pool_conv1x1(at, c, c // 2),
        pool_conv1x1_backward(at, c, c // 2),
    ]
    at, c = Geometry(batch, head[0], head[0]), head[1]
    found += [
        norm_relu(at, c),
        norm_relu_backward(at, c, mean=False),
        mean(at, c),
        norm_relu_backward(at, c, mean=True),
    ]
    return found


# ---- the dilated convolution on its own

CONVOLUTIONS = [(4, 128, 32, 28), (4, 128, 32, 56), (1, 256, 256, 28)]  # images, C, k, side
OWN = "memdense, its own kernels"


def chooses_cudnn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ours leaves the plain convolution to cuDNN there."""
    return device.type == "cuda" and dtype not in chosen._DTYPES["cuda"]


def convolution(
    x: Tensor, weight: Tensor, dy: Tensor, d: int
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Forward and backward of the plain convolution: PyTorch's in both layouts, as it comes and
    deterministic, and ours, which always is, also on its own kernels where it would not take them.
    """

    def step(convolve: Callable, layout: torch.memory_format) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [t.clone(memory_format=layout).requires_grad_() for t in (x, weight)]
        gradient = dy.clone(memory_format=layout)

        def run() -> tuple[Tensor, ...]:
            out = convolve(*leaves, None, (1, 1), (d, d), (d, d))
            return out.detach(), *torch.autograd.grad(out, leaves, gradient)

        return run

    def deterministic(run: Run) -> tuple[Tensor, ...]:
        mode, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic
        before = filled.fill_uninitialized_memory
        # filling is for finding bugs, and would be timed
        filled.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
        try:
            return run()
        finally:
            torch.use_deterministic_algorithms(mode)
            filled.fill_uninitialized_memory = before

    def own(run: Run) -> tuple[Tensor, ...]:
        before, chosen._DTYPES["cuda"] = chosen._DTYPES["cuda"], (x.dtype,)
        try:
            return run()
        finally:
            chosen._DTYPES["cuda"] = before

    found = {f"PyTorch, {name}": step(F.conv2d, layout) for name, layout in LAYOUTS.items()}
    for name, layout in LAYOUTS.items():
        run = step(F.conv2d, layout)
        found[f"PyTorch, {name}, deterministic"] = partial(deterministic, run)
    found["memdense"] = step(dilated_conv3x3, torch.channels_last)
    if chooses_cudnn(x.device, x.dtype):
        found[OWN] = partial(own, step(dilated_conv3x3, torch.channels_last))
    return found


def convolution_cost(x: Tensor, weight: Tensor, dy: Tensor) -> Cost:
    """x, dy and the weight read; output and both gradients written; three products."""
    size = 2 * sum(t.numel() * t.element_size() for t in (x, weight, dy))
    return Cost(size, 3 * 2 * dy.numel() * weight[0].numel())


# ---- where a step's time goes


class Profile:
    """Marks around every primitive that memdense calls while it is entered."""

    def __init__(self, clock: Clock, count: bool = False) -> None:
        self.clock, self.count = clock, count
        self.marks: list[tuple[str, Any, Any]] = []
        self.costs: list[tuple[str, Cost]] = []

    def __enter__(self) -> "Profile":
        self.chosen = ops.backend_for
        ops.backend_for = lambda device: _Profiled(self.chosen(device), self)
        return self

    def __exit__(self, *_: object) -> None:
        ops.backend_for = self.chosen

    def seconds(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, start, end in self.marks:
            found[name] = found.get(name, 0.0) + self.clock.between(start, end)
        return found


class _Profiled:
    def __init__(self, backend: Any, profile: Profile) -> None:
        self._backend, self._profile = backend, profile

    def call(self, function: Any, *args: Any) -> Any:
        """A pass through a stage, one primitive after another: a replay would call none."""
        return function(self, *args)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._backend, name)
        if name not in PRIMITIVES:
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            start = self._profile.clock.mark()
            result = method(*args, **kwargs)
            self._profile.marks.append((name, start, self._profile.clock.mark()))
            if self._profile.count:
                bound = inspect.signature(method).bind(*args, **kwargs).arguments
                self._profile.costs.append((name, cost(name, bound, result)))
            return result

        return call
