"""The two buffers of a dense block, X and G, with what is known of each of their channels.

Both are (M, C_max) matrices, M = N*H*W pixels by all the channels the block will ever hold. Kernels
see them only as strided prefixes and slices, and BatchNorm only as vectors; both kinds of vector
are made here and nowhere else.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import Norm, Stage


class Geometry(NamedTuple):
    """Where the rows of a (M, C) matrix lie in N images of H x W pixels."""

    n: int
    h: int
    w: int

    @property
    def rows(self) -> int:
        return self.n * self.h * self.w

    def pixels(self, matrix: Tensor) -> Tensor:
        """(M, C) seen as (N, H, W, C)."""
        return matrix.unflatten(0, (self.n, self.h, self.w))

    def images(self, matrix: Tensor) -> Tensor:
        """(M, C) seen as (N, C, H, W), channels last."""
        return self.pixels(matrix).permute(0, 3, 1, 2)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, vectors and sums beside values of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Reader(NamedTuple):
    """A BatchNorm as kernels see it: z = relu(scale * x + shift), with x_hat = (x - mean) * rstd.
    Vectors of (C,).
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor
    batch: bool


def reader(norm: Norm, mean: Tensor, var: Tensor) -> Reader:
    """s = gamma * r and t = beta - mu * s, with r = 1 / sqrt(var + eps)."""
    rstd = (var + norm.spec.eps).rsqrt()
    scale = rstd if norm.weight is None else norm.weight.to(rstd.dtype) * rstd
    shift = -mean * scale if norm.bias is None else norm.bias.to(rstd.dtype) - mean * scale
    return Reader(scale, shift, mean, rstd, norm.spec.batch)


class Sums(NamedTuple):
    """What a reader's backward leaves per channel: dbeta = sum(dz), dgamma = sum(dz * x_hat), and
    the same two sums of what a 16-bit G really took in (None where G stores without rounding).
    """

    dbeta: Tensor
    dgamma: Tensor
    stored: tuple[Tensor, Tensor] | None = None


def norm_backward(
    read: Reader, sums: Sums, rows: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(a, b, c) such that dy = a * dz + b * y + c is the gradient behind a BatchNorm with one
    reader.

    dy = r*(g - mean(g) - y_hat*mean(g*y_hat)) with g = gamma*dz; running statistics do not answer:
    dy = s*dz.
    """
    if not read.batch:
        return read.scale, None, None
    b = -read.scale * read.rstd * sums.dgamma / rows
    c = -read.scale * sums.dbeta / rows - b * read.mean
    return read.scale, b, c


def reader_columns(stage: Stage, channels: int) -> tuple[dict[tuple[int, int], slice], int]:
    """Where each reader's statistics stand in a stage's table, by (layer, 1 or 2), in order; and
    the table's width.

    The first C_max columns are the batch's statistics of X, shared by all who read by them; then
    come each bottleneck's own, and a copy of the running statistics of whoever reads by those. A
    tail counts as a last layer.
    """
    width = channels + sum(layer.growth for layer in stage.layers)
    columns = {}
    for i, norm, number, size in _readers(stage, channels):
        if number == 1 and norm.spec.batch:
            columns[i, number] = slice(0, size)
        else:
            columns[i, number] = slice(width, width := width + size)
    return columns, width


def _readers(stage: Stage, channels: int) -> Iterator[tuple[int, Norm, int, int]]:
    """(layer, norm, its number, the channels it reads) of every reader."""
    for i, layer in enumerate(stage.layers):
        yield i, layer.norm1, 1, channels
        if layer.norm2 is not None:
            yield i, layer.norm2, 2, layer.bottleneck
        channels += layer.growth
    if stage.tail is not None:
        yield len(stage.layers), stage.tail.norm, 1, channels


class StatisticsTable:
    """Mean and biased variance of every normalised channel of a stage, one (2, columns) tensor to
    keep.
    """

    def __init__(
        self, stage: Stage, channels: int, table: Tensor | None = None, like: Tensor | None = None
    ) -> None:
        self.columns, width = reader_columns(stage, channels)
        if table is None:
            # zeros: columns that nobody reads must not hold garbage that changes from run to run
            table = like.new_zeros((2, width), dtype=accumulator(like.dtype))
        self.table = table

    def store(self, columns: slice, mean: Tensor, var: Tensor) -> None:
        self.table[0, columns] = mean
        self.table[1, columns] = var

    def reader(self, norm: Norm, position: tuple[int, int]) -> Reader:
        """The vectors by which ``norm``, number 1 or 2 of a layer, reads."""
        columns = self.columns[position]
        return reader(norm, self.table[0, columns], self.table[1, columns])

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
    tail = stage.tail is not None and stage.tail.norm.spec.batch
    return tail or any(layer.norm1.spec.batch for layer in stage.layers)


class FeatureBuffer:
    """X: every channel of a block, written once at its offset, with the statistics of each."""

    def __init__(self, matrix: Tensor, geometry: Geometry) -> None:
        self.matrix = matrix
        self.geometry = geometry

    def prefix(self, channels: int) -> Tensor:
        return self.matrix[:, :channels]

    def slice(self, start: int, stop: int) -> Tensor:
        return self.matrix[:, start:stop]


class GradientBuffer:
    """G: the gradients of X's channels before BatchNorm's share, and the two sums that share is
    made of.

    Each reader l adds s_l * dz_l to G, s_l * dbeta_l to S1 and s_l * r_l * dgamma_l to S2. Once the
    last reader of a slice has done so, dy = G + p*x + q with p = -S2/M and q = -S1/M - p*mu settles
    it.
    """

    # few values round alike: there a 16-bit G leaves a mean behind that no later sum repairs
    WIDE_ROWS = 64

    def __init__(self, features: FeatureBuffer, seed: Tensor | None, wide: bool) -> None:
        x = features.matrix
        acc = accumulator(x.dtype)
        dtype = acc if wide or len(x) <= self.WIDE_ROWS else x.dtype
        self.matrix = torch.zeros_like(x, dtype=dtype)
        if seed is not None:
            features.geometry.images(self.matrix).copy_(seed)
        self.sums = x.new_zeros((2, x.shape[1]), dtype=acc)
        self.rows = len(x)
        self.credited = False

    def prefix(self, channels: int) -> Tensor:
        return self.matrix[:, :channels]

    def slice(self, start: int, stop: int) -> Tensor:
        return self.matrix[:, start:stop]

    def credit(self, read: Reader, sums: Sums) -> None:
        """Add a batch-statistics reader's share to S1 and S2; of what G stored, where it rounds."""
        if not read.batch:
            return
        channels = len(read.mean)
        if sums.stored is None:
            s1, s2 = read.scale * sums.dbeta, read.scale * read.rstd * sums.dgamma
        else:
            s1, s2 = sums.stored[0], read.rstd * sums.stored[1]
        self.sums[0, :channels] += s1
        self.sums[1, :channels] += s2
        self.credited = True

    def vectors(
        self, start: int, stop: int, mean: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """p and q of a slice whose batch mean is ``mean``; None where no reader used batch
        statistics.
        """
        if not self.credited:
            return None, None
        s1, s2 = self.sums[:, start:stop]
        p = -s2 / self.rows
        return p, -s1 / self.rows - p * mean
