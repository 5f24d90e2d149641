"""The two buffers of a dense block, X and G, with what is known of each of their channels.

Both are (M, C_max) matrices, the M pixels of all images or volumes by all the channels the block
will ever hold. Kernels see them only as strided prefixes and slices. A BatchNorm is vectors, whose
formulas are here.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from . import joint
from .spec import Norm, Stage, reads_of


class Geometry(tuple[int, ...]):
    """Where the rows of a (M, C) matrix lie: (n, h, w) in N images of H x W pixels, (n, d, h, w) in
    N volumes of D x H x W.
    """

    def __new__(cls, *sizes: int) -> "Geometry":
        return tuple.__new__(cls, sizes)

    def __getnewargs__(self) -> tuple[int, ...]:
        return tuple(self)

    n = property(itemgetter(0))
    h = property(itemgetter(-2))
    w = property(itemgetter(-1))
    rows = property(prod)
    axes = property(lambda self: len(self) - 1)  # 2, or 3 of volumes
    lines = property(itemgetter(1))  # along the first axis; of volumes these are planes
    line = property(lambda self: prod(self[2:]))  # pixels of one of them
    each = property(lambda self: prod(self[1:]))  # pixels of an image

    @property
    def of_images(self) -> bool:
        return self.axes == 2

    @property
    def planes(self) -> "Geometry":
        """A volume's planes as images."""
        return Geometry(self.n * self.lines, self.h, self.w)

    @property
    def halves(self) -> "Geometry":
        """Of the means over two pixels along each axis, a last odd line or column left out."""
        return Geometry(self[0], *[size // 2 for size in self[1:]])

    @property
    def windows(self) -> "Geometry":
        """Of its maxima over windows of three along each axis with stride 2 and padding 1."""
        return Geometry(self[0], *[(size + 1) // 2 for size in self[1:]])

    def pixels(self, matrix: Tensor) -> Tensor:
        """(M, C) seen as (N, H, W, C) or (N, D, H, W, C)."""
        return matrix.unflatten(0, tuple(self))

    def images(self, matrix: Tensor) -> Tensor:
        """(M, C) seen as (N, C, H, W) or (N, C, D, H, W), channels last."""
        return self.pixels(matrix).movedim(-1, 1)


# of images and of volumes, by their number of axes
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# a GPU reads 16 bytes at a time: rows of X and G start at multiples of 16 channels there
ROW_UNIT = 16


def row_stride(channels: int, device: torch.device) -> int:
    """Of X and G, in values."""
    return -(-channels // ROW_UNIT) * ROW_UNIT if device.type == "cuda" else channels


def new_matrix(like: Tensor, rows: int, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (rows, channels) beside ``like``, with the row stride of X and G."""
    wide = like.new_empty((rows, row_stride(channels, like.device)), dtype=dtype or like.dtype)
    return wide[:, :channels]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, vectors and sums beside values of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Reader:
    """A BatchNorm as kernels see it: z = relu(s*x + t) and x_hat = (x - mean) * r, with
    r = 1 / sqrt(var + eps), s = weight * r and t = bias - mean * s.

    Vectors of (C,). A kernel makes s and t itself or takes them ready made: the same numbers.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    batch: bool

    @cached_property
    def rstd(self) -> Tensor:
        return (self.var + self.eps).rsqrt()

    @cached_property
    def scale(self) -> Tensor:
        return self.rstd if self.weight is None else self.weight.to(self.rstd.dtype) * self.rstd

    @cached_property
    def shift(self) -> Tensor:
        s = self.mean * self.scale
        return -s if self.bias is None else self.bias.to(s.dtype) - s

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:
        """What a kernel that makes s and t itself takes."""
        return self.mean, self.var, self.weight, self.bias, self.eps


def reader(norm: Norm, mean: Tensor, var: Tensor) -> Reader:
    """``norm``, reading by these statistics; kernels want vectors packed."""
    weight, bias = (v if v is None else v.contiguous() for v in (norm.weight, norm.bias))
    return Reader(mean, var, weight, bias, norm.spec.eps, norm.spec.batch)


def mask_in_rows(keep: tuple[Tensor, float] | None) -> bool:
    """Whether dropout's mask (M, k), if there is one, has unit column stride: kernels want it."""
    return keep is None or keep[0].stride(1) == 1


class Sums(NamedTuple):
    """What a reader's backward leaves per channel, each (C,) in memory of its own: dbeta = sum(dz)
    and dgamma = sum(dz * x_hat).
    """

    dbeta: Tensor
    dgamma: Tensor


@dataclass(frozen=True, eq=False)
class NormGradient:
    """The gradient behind a BatchNorm with one reader, dy = a*dz + b*y + c, as three vectors."""

    read: Reader
    sums: Sums
    rows: int

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(a, b, c) of dy = r*(g - mean(g) - y_hat*mean(g*y_hat)) with g = gamma*dz; running
        statistics do not answer: dy = s*dz, and b and c are None.
        """
        read, sums = self.read, self.sums
        if not read.batch:
            return read.scale, None, None
        b = -read.scale * read.rstd * sums.dgamma / self.rows
        return read.scale, b, -read.scale * sums.dbeta / self.rows - b * read.mean


def behind(read: Reader, sums: Sums, rows: int, statistics: Tensor, group: str) -> NormGradient:
    """Of this process's sums; ``statistics``' last column tells its share in a ``group``'s rows."""
    if group and read.batch:
        sums = Sums(*joint.add_up(torch.stack(sums), statistics[0, -1], group))
    return NormGradient(read, sums, rows)


class Into(NamedTuple):
    """Where a reader's answer goes: the prefix of G that it adds s*dz to, and S1 and S2."""

    g: Tensor  # (M, C)
    sums: Tensor | None  # (2, C): S1 and S2; None where the reader uses running statistics
    seeded: bool  # False: G holds nothing yet, and is written to instead of added to

    @property
    def rounds(self) -> bool:
        """Whether G stores less than it is given; S1 and S2 then count what it stored."""
        return self.g.dtype != accumulator(self.g.dtype)

    def start(self) -> Tensor:
        """G, to be added to."""
        return self.g if self.seeded else self.g.zero_()

    def credit(self, read: Reader, sums: Sums, stored: tuple[Tensor, Tensor] | None = None) -> None:
        """Add the reader's share, s*dbeta and s*r*dgamma, to S1 and S2; where G rounds, that of
        what it took in: ``stored``, the same two sums with G's steps d in place of s*dz.
        """
        if self.sums is not None:
            if stored is None:
                s1, s2 = read.scale * sums.dbeta, read.scale * read.rstd * sums.dgamma
            else:
                s1, s2 = stored[0], read.rstd * stored[1]
            self.sums[0] += s1
            self.sums[1] += s2


@dataclass(frozen=True, eq=False)
class Share:
    """BatchNorm's share in the gradient of a slice, p*x + q, as two vectors."""

    sums: Tensor  # (2, k): S1 and S2
    mean: Tensor  # (k,)
    rows: int

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """p = -S2/M and q = -S1/M - p*mean."""
        s1, s2 = self.sums
        p = -s2 / self.rows
        return p, -s1 / self.rows - p * self.mean


def reader_columns(stage: Stage, channels: int) -> tuple[dict[tuple[int, int], slice], int]:
    """Where each reader's statistics stand in a stage's table, by (layer, 1 or 2), in order; and
    the table's width.

    The first C_max columns are the batch's statistics of X, shared by all who read by them; then
    come each bottleneck's own, and a copy of the running statistics of whoever reads by those. A
    tail counts as a last layer.
    """
    read = [channels]  # by each layer's first norm, and the tail's
    for layer in stage.layers:
        read.append(read[-1] + layer.growth)
    width, columns = read[-1], {}
    for i, number, norm, _ in reads_of(stage):
        size = read[i] if number == 1 else stage.layers[i].bottleneck
        if number == 1 and norm.spec.batch:
            columns[i, number] = slice(0, size)
        else:
            columns[i, number] = slice(width, width := width + size)
    return columns, width


class StatisticsTable:
    """Mean and biased variance of every normalised channel of a stage, one (2, columns) tensor to
    keep. Where processes hold the batch together a last column tells this one's share in its rows,
    and how many they are.
    """

    def __init__(
        self, stage: Stage, channels: int, table: Tensor | None = None, like: Tensor | None = None
    ) -> None:
        self.columns, width = reader_columns(stage, channels)
        if table is None:
            # zeros: columns that nobody reads must not hold garbage that changes from run to run
            width += 1 if stage.group else 0  # no bool, to a traced width
            table = like.new_zeros((2, width), dtype=accumulator(like.dtype))
        self.table, self.group = table, stage.group
        self.mean, self.var = table.unbind()

    def of(self, columns: slice) -> Tensor:
        """(2, columns): where their mean and variance stand."""
        return self.table[:, columns]

    def gather(self, moments: Tensor | None, rows: int) -> None:
        """Statistics of all processes' rows in place of this one's."""
        if self.group and moments is not None:
            self.table[:, -1] = joint.gather(moments, rows, self.group)

    def add_up(self, sums: Tensor) -> Tensor:
        """Sums (2, C) over all processes' rows, by this one's share in them."""
        return joint.add_up(sums, self.table[0, -1], self.group) if self.group else sums

    def keep_running(self, stage: Stage) -> None:
        """Copy the running statistics that norms read by: the modules' may move before backward."""
        kept = [(norm, self.columns[i, number]) for i, number, norm, _ in reads_of(stage)]
        pairs = [(norm, self.of(columns)) for norm, columns in kept if not norm.spec.batch]
        if pairs:
            torch._foreach_copy_(
                [row for _, copy in pairs for row in copy],
                [t for norm, _ in pairs for t in (norm.mean, norm.var)],
            )

    def reader(self, norm: Norm, position: tuple[int, int]) -> Reader:
        """The vectors by which ``norm``, number 1 or 2 of a layer, reads."""
        columns = self.columns[position]
        return reader(norm, self.mean[columns], self.var[columns])

    def running(self, stage: Stage) -> Stage:
        """``stage`` with the kept copies in place of its running statistics."""

        def norm(n: Norm | None, position: tuple[int, int]) -> Norm | None:
            if n is None or n.spec.batch:
                return n
            mean, var = self.table[:, self.columns[position]]
            return n._replace(mean=mean, var=var)

        layers = [
            x._replace(norm1=norm(x.norm1, (i, 1)), norm2=norm(x.norm2, (i, 2)))
            for i, x in enumerate(stage.layers)
        ]
        tail = stage.tail and stage.tail._replace(norm=norm(stage.tail.norm, (len(layers), 1)))
        return stage._replace(layers=layers, tail=tail)


def needs_statistics(stage: Stage) -> bool:
    """Whether any norm reads the block's channels by their batch statistics."""
    return any(number == 1 and norm.spec.batch for _, number, norm, _ in reads_of(stage))


class FeatureBuffer:
    """X: every channel of a block, written once at its offset."""

    def __init__(self, matrix: Tensor, geometry: Geometry) -> None:
        self.matrix = matrix
        self.geometry = geometry

    def prefix(self, channels: int) -> Tensor:
        return self.matrix[:, :channels]

    def slice(self, columns: slice) -> Tensor:
        return self.matrix[:, columns]


class GradientBuffer:
    """G: the gradients of X's channels before BatchNorm's share, and the two sums that share is
    made of.

    Each reader l adds s_l * dz_l to G, s_l * dbeta_l to S1 and s_l * r_l * dgamma_l to S2. Once the
    last reader of a slice has done so, dy = G + p*x + q settles it.
    """

    # few values round alike: there a 16-bit G leaves a mean behind that no later sum repairs
    WIDE_ROWS = 64

    def __init__(self, features: FeatureBuffer, seed: Tensor | None, wide: bool) -> None:
        x = features.matrix
        acc = accumulator(x.dtype)
        dtype = acc if wide or len(x) <= self.WIDE_ROWS else x.dtype
        self.matrix = new_matrix(x, *x.shape, dtype)
        if seed is not None:
            features.geometry.images(self.matrix).copy_(seed)
        self.seeded = seed is not None
        self.sums = x.new_zeros((2, x.shape[1]), dtype=acc)
        self.rows = len(x)
        self.credited = False

    def into(self, channels: int, read: Reader) -> Into:
        """Where a reader of the first ``channels`` answers."""
        into = Into(
            self.matrix[:, :channels],
            self.sums[:, :channels] if read.batch else None,
            self.seeded,
        )
        self.seeded = True
        self.credited = self.credited or read.batch
        return into

    def slice(self, columns: slice) -> Tensor:
        return self.matrix[:, columns]

    def share(self, columns: slice, table: StatisticsTable) -> Share | None:
        """Of a slice; None where no reader used batch statistics."""
        if not self.credited:
            return None
        return Share(table.add_up(self.sums[:, columns]), table.mean[columns], self.rows)
