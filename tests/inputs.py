"""Inputs for every primitive of a backend, and what a backend makes of them."""

from collections.abc import Callable

import torch
from exactness import into_of, reader_of
from torch import Tensor

from memdense import _extension
from memdense.backends import Reference
from memdense.buffers import (
    CHANNELS_LAST,
    Geometry,
    Into,
    NormGradient,
    Reader,
    Share,
    Sums,
    accumulator,
)

# (N, H, W) or (N, D, H, W), C, B: no multiples of a vector, of a tile, of a panel; and such
SHAPES = [
    ((1, 1, 1), 1, 1),
    ((1, 1, 1), 7, 12),
    ((2, 1, 3), 3, 7),
    ((3, 7, 5), 12, 48),
    ((2, 14, 15), 64, 128),
    ((3, 9, 11), 96, 192),
    ((1, 21, 20), 256, 128),
    ((2, 6, 8), 1000, 7),
    ((2, 10, 10), 200, 300),
    ((1, 1, 1, 1), 3, 5),
    ((2, 5, 7, 6), 12, 7),
    ((3, 2, 4, 5), 96, 48),
]
# what ATEN_CPU_CAPABILITY may ask for that differs from what runs anyway
OLDER = [c for c in ("default", "avx2") if c.upper() != torch.backends.cpu.get_cpu_capability()]
# whether bfloat16 is multiplied on tiles, in the process that looks
AMX = "AMX" in _extension.instructions()


def poisoned(values: Tensor) -> Tensor:
    """The same matrix as a slice of a wider one that is NaN all around."""
    m, c = values.shape
    buffer = torch.full((m + 2, c + 11), torch.nan, dtype=values.dtype)
    buffer[1:-1, 5 : 5 + c] = values
    return buffer[1:-1, 5 : 5 + c]


class Inputs:
    """What the primitives take, in float64, away from the ReLU's kink: |z| > 1e-3. Values are such
    as ``dtype`` holds.
    """

    def __init__(
        self, size: tuple[int, ...], c: int, b: int, dtype: torch.dtype = torch.float64
    ) -> None:
        def draw(*shape: int) -> Tensor:
            return rounded(torch.randn(shape))

        def rounded(t: Tensor) -> Tensor:
            return t.to(dtype).double()

        self.geometry = Geometry(*size)
        m = self.geometry.rows
        small, pooled = self.geometry.halves.rows, self.geometry.windows.rows
        scale, shift = torch.randn(c), 0.3 * torch.randn(c)
        scale[torch.randn(c) > 1.5] = 0
        shift[scale == 0] = 0.5
        scale, shift = scale.to(accumulator(dtype)).double(), shift.to(accumulator(dtype)).double()
        x = rounded(2 * torch.randn(m, c) + 1)
        x = torch.where((scale * x + shift).abs() < 0.01, rounded(x + 0.3), x)
        x = torch.where((scale * x + shift).abs() < 0.01, rounded(x + 0.3 / scale), x)
        assert (scale * x + shift).abs().min() > 1e-3
        self.vectors = [scale, shift, torch.randn(c), torch.rand(c) + 0.5]
        # of the norm behind the 1x1, and what its backward left
        self.behind = [torch.randn(b), torch.rand(b) + 0.5, torch.randn(b), torch.randn(b)]
        self.sums = [m * torch.randn(b), m * torch.randn(b)]
        self.credited = m * torch.randn(2, c)
        self.weight, self.x, self.g = draw(b, c), x, draw(m, c)
        self.dz, self.y, self.dx = draw(m, b), draw(m, b), draw(m, c)
        self.small, self.pooled = draw(small, b), draw(pooled, c)
        self.per_image = draw(size[0], c)
        self.keep = torch.rand(m, c) > 0.4

    def run(
        self,
        backend: Reference,
        dtype: torch.dtype,
        wrap: Callable[[Tensor], Tensor] = lambda t: t,
        convolutions: bool = True,
        wide: bool = False,
    ) -> dict[str, Tensor]:
        """All that all primitives return or write, by name.

        Args:
            wrap: makes a matrix the view that the primitives get.
            convolutions: the 1x1 convolutions, too.
            wide: keep G in the accumulator's dtype.
        """
        geometry, found, acc = self.geometry, {}, accumulator(dtype)
        g_before = self.g.to(acc if wide else dtype)

        def reads(vectors: list[Tensor], batch: bool = True) -> Reader:
            read = reader_of(*vectors)
            tensors = (t.to(acc) for t in (read.mean, read.var, read.weight, read.bias))
            return Reader(*tensors, read.eps, batch)

        def behind(read: Reader, *sums: Tensor) -> NormGradient:
            return NormGradient(read, Sums(*(t.to(acc) for t in sums)), geometry.rows)

        read, weight = reads(self.vectors), self.weight.to(dtype)
        share = Share(self.credited.to(acc), read.mean, geometry.rows)
        x, dz, y, dx = (wrap(t.to(dtype)) for t in (self.x, self.dz, self.y, self.dx))
        small, per_image = (wrap(t.to(dtype)) for t in (self.small, self.per_image))
        pooled = self.pooled.to(dtype)

        def into_g(name: str, method: str, *args: object, seeded: bool = True) -> None:
            g = wrap(g_before.clone() if seeded else torch.full_like(g_before, torch.nan))
            into = into_of(g, seeded)
            result = getattr(backend, method)(*(into if a is Ellipsis else a for a in args))
            give(name, result)
            found[name + " G"], found[name + " S"] = g, into.sums
            before = g_before if seeded else torch.zeros_like(g_before)
            sums = result if isinstance(result, Sums) else result[0]
            found[name + " share"] = self._share(into, before, sums, read)
            nothing_beside(name, g)

        def nothing_beside(name: str, written: Tensor) -> None:
            if written._base is not None:
                around = written._base.clone()
                place = written.shape, written.stride(), written.storage_offset()
                around.as_strided(*place).fill_(torch.nan)
                assert around.isnan().all(), f"{name} wrote beside its slice"

        def give(name: str, value: object) -> None:
            if isinstance(value, Tensor):
                found[name] = value
            elif value is not None:
                for i, v in enumerate(value):
                    give(f"{name} {i}", v)

        def moments(name: str, columns: int) -> Tensor:
            found[name] = torch.full((2, columns), torch.nan, dtype=read.mean.dtype)
            return found[name]

        if convolutions:
            give(
                "conv",
                backend.bn_relu_conv1x1(x, read, weight, moments("conv moments", len(weight))),
            )
            give("conv alone", backend.bn_relu_conv1x1(x, read, weight, None))
            back = "bn_relu_conv1x1_backward"
            for name, batch in (("conv back", True), ("conv back frozen", False)):
                dy = behind(reads(self.behind, batch), *self.sums)
                into_g(name, back, dz.clone(), y, dy, weight, x, read, ..., True)
            into_g("conv back plain", back, dz, None, None, weight, x, read, ..., False)
            into_g(
                "conv back first", back, dz, None, None, weight, x, read, ..., True, seeded=False
            )
        give("pool conv", backend.bn_relu_pool_conv1x1(x, read, weight, geometry))
        back = "bn_relu_pool_conv1x1_backward"
        for name, seeded in (("pool conv back", True), ("pool conv back first", False)):
            into_g(name, back, small, weight, x, read, geometry, ..., True, seeded=seeded)
        give("settle", backend.settle(wrap(g_before), x, share, None))
        give("settle unread", backend.settle(wrap(g_before), x, None, None))
        give("settle dropped", backend.settle(wrap(g_before), x, share, (self.keep, 1.25)))
        for relu in (True, False):
            give(f"norm {relu}", backend.bn_relu(x, read, relu))
            back = "bn_relu_backward"
            into_g(f"norm back {relu}", back, dx, x, read, relu, ..., seeded=relu)
        give("mean", backend.bn_relu_mean(x, read, geometry))
        back = "bn_relu_mean_backward"
        for name, seeded in (("mean back", True), ("mean back first", False)):
            into_g(name, back, per_image, x, read, geometry, ..., seeded=seeded)
        backend.statistics(x, moments("statistics", x.shape[1]))
        for layout in (torch.contiguous_format, CHANNELS_LAST[len(geometry) + 1]):
            images = geometry.images(x).contiguous(memory_format=layout)
            out = wrap(torch.zeros(x.shape, dtype=dtype))
            backend.pack(images, out, geometry, moments(f"pack {layout}", x.shape[1]))
            give(f"packed {layout}", out)
        give("maxpool", backend.bn_relu_maxpool(x, read, geometry))
        winner = found["maxpool 1"]
        give("maxpool sums", backend.bn_relu_maxpool_sums(pooled, winner, x, read, geometry))
        for name, batch in (("maxpool back frozen", False), ("maxpool back", True)):
            dy = behind(reads(self.vectors, batch), *self.credited)
            out = wrap(torch.zeros(x.shape, dtype=dtype))
            backend.bn_relu_maxpool_backward(pooled, winner, x, dy, geometry, out)
            give(name, out)
            nothing_beside(name, out)
        own = x.clone()
        backend.bn_relu_maxpool_backward(pooled, winner, own, dy, geometry, own)
        assert torch.equal(own.nan_to_num(9.0), out.nan_to_num(9.0)), "x's place takes other values"
        return found

    def _share(self, into: Into, before: Tensor, sums: Sums, read: Reader) -> Tensor:
        """What S1 and S2 must be, and the sums of their terms' magnitudes, in float64: (4, C)."""
        if not into.rounds:
            s, r = read.scale.double(), read.rstd.double()
            shares = torch.stack((s * sums.dbeta, s * r * sums.dgamma))
            return torch.cat((shares, shares.abs()))
        d = into.g.double() - before.double()
        x_hat = (self.x - read.mean) * read.rstd
        terms = torch.stack((d, read.rstd * d * x_hat))
        return torch.cat((terms.sum(1), terms.abs().sum(1)))


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def assert_errs_no_more(
    found: dict[str, Tensor],
    reference: dict[str, Tensor],
    exact: dict[str, Tensor],
    times: float = 1.5,
) -> None:
    """Each tensor's error is at most so many times the reference's in the same dtype; whole numbers
    are right. S1 and S2 are what the reader's sums, or the steps of a G that rounds, make of them.
    """
    for name, value in exact.items():
        mine, theirs = found[name], reference[name]
        assert mine.shape == value.shape and mine.dtype == theirs.dtype, name
        if name.endswith(" share"):
            off = (found[name.removesuffix("share") + "S"] - mine[:2]).abs()
            assert (off <= 2e-6 * mine[2:]).all(), f"{name}: S1 or S2 is off"
        elif not value.is_floating_point():
            assert torch.equal(mine, value), name
        elif not name.endswith(" S"):
            # of a few numbers the reference's may happen to be exact
            few = max(value.numel(), 1)
            luck = torch.finfo(mine.dtype).eps * (0.25 + 4 / few)
            allowed = times * rms(theirs - value) + luck * rms(value)
            error = rms(mine - value)
            assert error <= allowed, f"{name}: {error:.2e}, where {allowed:.2e} is allowed"


def second_half() -> tuple[dict[str, object], dict[str, object]]:
    """Arguments that ``bn_relu_conv3x3`` and its backward take, in their order, to spoil one by
    one.
    """
    weight = {"weight": torch.zeros(6, 5, 3, 3), "dilation": (1, 1)}
    norm = {"mean": torch.zeros(5), "var": torch.ones(5), "gamma": None, "beta": None, "eps": 1e-5}
    size = {"n": 1, "h": 5, "w": 4}
    y = {"y": torch.zeros(20, 5)}
    forward = y | norm | weight | size | {"keep": None, "factor": 1.0}
    forward |= {"out": torch.zeros(20, 6), "moments": torch.zeros(2, 6)}
    backward = {"dy": torch.zeros(20, 6)} | weight | y | norm | size
    backward |= {"dz": torch.zeros(20, 5), "dbeta": torch.zeros(5), "dgamma": torch.zeros(5)}
    return forward, backward | {"dweight": torch.zeros(6, 5, 3, 3)}


# of the forward, with what is said of each
REFUSALS = [
    ({"y": torch.zeros(5, 20).t()}, "expected y with unit column stride"),
    ({"n": 2}, "2 images of 5 by 4 pixels are not 20 rows"),
    ({"n": 1 + 2**62}, "images of 5 by 4 pixels are not 20 rows"),  # 20 in 64 bits
    ({"mean": torch.zeros(4)}, "expected mean to be a contiguous vector of 5"),
    ({"mean": torch.zeros(10)[::2]}, "expected mean to be a contiguous vector of 5"),
    (
        {"weight": torch.zeros(6, 4, 3, 3)},
        r"expected weight of shape \(6, 5, 3, 3\), got \(6, 4, 3, 3\)",
    ),
    ({"dilation": (0, 1)}, "expected dilation >= 1, got 0 and 1"),
    ({"dilation": (1,)}, "expected a dilation of two numbers"),
    ({"keep": torch.zeros(20, 6)}, "expected keep in Bool, got Float"),
    ({"keep": torch.ones(20, 5).bool()}, r"expected keep of shape \(20, 6\)"),
    ({"moments": torch.zeros(6, 2)}, r"expected moments of shape \(2, 6\), got \(6, 2\)"),
    ({"moments": torch.zeros(1, 6).expand(2, 6)}, "expected moments not to be expanded, got Float"),
    ({"out": torch.zeros(1, 6).expand(20, 6)}, r"not to be expanded, got Float \(20, 6\)"),
    (
        {"y": torch.zeros(20, 1).expand(20, 2**32 + 8)},
        "expected at most 134217728 channels, got 4294967304 and 6",
    ),
]
# of the backward
BACKWARD_REFUSALS = [
    ({"dy": torch.zeros(20, 6).double()}, "expected dy in Float, got Double"),
    ({"dz": torch.zeros(20, 6)}, r"expected dz of shape \(20, 5\)"),
    ({"dz": torch.zeros(5, 20).t()}, "expected dz with unit column stride"),
    ({"dbeta": torch.zeros(4)}, "expected dbeta to be a contiguous vector of 5"),
    ({"dgamma": torch.zeros(5).double()}, "expected dgamma in Float, got Double"),
    ({"dweight": torch.zeros(6, 5, 3, 3).double()}, "expected dweight in Float, got Double"),
    ({"dweight": torch.zeros(5, 6, 3, 3)}, "expected dweight to be contiguous, of the weight"),
    ({"dweight": torch.zeros(6, 3, 3, 5).permute(0, 3, 1, 2)}, "dweight to be contiguous"),
]


def plain() -> dict[str, object]:
    """Arguments that ``conv3x3`` takes, likewise."""
    images = {"x": torch.zeros(1, 5, 7, 7), "weight": torch.zeros(4, 5, 3, 3), "bias": None}
    geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    return images | geometry | {"out": torch.zeros(1, 4, 7, 7)}


PLAIN_REFUSALS = [
    ({"out": torch.zeros(1, 4, 6, 6)}, "expected an output 7 long, got 6"),
    ({"out": torch.zeros(2, 4, 7, 7)}, "expected 1 outputs, got 2"),
    ({"out": torch.zeros(4, 7, 7)}, "expected 4-D images, got 4-D and 3-D"),
    ({"out": torch.zeros(1, 4, 7, 7).double()}, "expected out in Float, got Double"),
    ({"weight": torch.zeros(4, 6, 3, 3)}, r"expected weight of shape \(4, 5, 3, 3\)"),
    ({"bias": torch.zeros(5)}, "expected bias to be a contiguous vector of 4"),
    ({"stride": (1,)}, "expected stride, padding and dilation of two numbers"),
    ({"stride": (0, 1)}, "expected stride >= 1, padding >= 0 and dilation >= 1, got 0, 1 and"),
    ({"padding": (0, 0), "dilation": (4, 4)}, "is smaller than the kernel with dilation 4"),
    ({"x": torch.zeros(1, 5, 7, 7).half()}, "expected weight in Half, got Float"),
    ({"out": torch.zeros(1, 4, 7, 1).expand(1, 4, 7, 7)}, "not to be expanded"),
    (
        {"x": torch.zeros(0, 5, 7, 7), "out": torch.zeros(0, 4, 7, 7), "bias": torch.zeros(9)},
        "expected bias to be a contiguous vector of 4",
    ),
]
