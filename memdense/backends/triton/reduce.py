"""Partial results of tiles, merged in their order: statistics, sums and weight gradients.

One program per channel walks that channel's tiles, [channel, tile] in memory; the order never
depends on which tile ended first, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...buffers import Into, Reader, Sums
from .launch import Plan, kernel
from .tiles import cached, cdiv

WALKS = 128, 1024  # tiles that a program takes at a time: few sizes, as each is compiled
BLOCK = 128  # weights that a program sums
SIDE = 32  # splits that it reads side by side, as there are few programs and each waits for memory


@kernel
def merge_moments(partial, moments, M, rows, tiles, plane, stride, BLOCK: tl.constexpr):
    """mean = sum(n_i*mean_i)/M, var = sum(M2_i + n_i*(mean_i - mean)^2)/M of channel c over tiles
    of n_i rows (Chan et al., 1979); partial [2, C, tiles], moments [2, C], plane = C*tiles.
    """
    c = tl.program_id(0).to(tl.int64)
    means = partial + c * tiles
    squares = means + plane
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)
        n = tl.minimum(M - i * rows, rows).to(tl.float64)
        total += n * tl.load(means + i, i < tiles, 0.0).to(tl.float64)
    mean = tl.sum(total, 0) / M
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)
        n = tl.minimum(M - i * rows, rows).to(tl.float64)
        d = tl.load(means + i, i < tiles, 0.0).to(tl.float64) - mean
        m2 = tl.load(squares + i, i < tiles, 0.0).to(tl.float64)
        total += tl.where(i < tiles, m2 + n * d * d, 0.0)
    tl.store(moments + c, mean.to(tl.float32))
    tl.store(moments + stride + c, (tl.sum(total, 0) / M).to(tl.float32))


@triton.jit
def totals(values, plane, tiles, FOUR: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of ``tiles`` values in each of FOUR planes, or of two and two zeros. All are under
    way at once.
    """
    sums0 = tl.zeros([BLOCK], tl.float64)
    sums1 = sums0
    sums2 = sums0
    sums3 = sums0
    for start in range(0, tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = values + i
        sums0 += tl.load(at, i < tiles, 0.0).to(tl.float64)
        sums1 += tl.load(at + plane, i < tiles, 0.0).to(tl.float64)
        if FOUR:
            sums2 += tl.load(at + 2 * plane, i < tiles, 0.0).to(tl.float64)
            sums3 += tl.load(at + 3 * plane, i < tiles, 0.0).to(tl.float64)
    return (
        tl.sum(sums0, 0).to(tl.float32), tl.sum(sums1, 0).to(tl.float32),
        tl.sum(sums2, 0).to(tl.float32), tl.sum(sums3, 0).to(tl.float32),
    )  # fmt: skip


@kernel
def merge_gradients(
    partial, var, weight, dbeta, dgamma, credit, weights, dweight,
    channels, tiles, plane, eps, stride, size, splits,
    ROUNDS: tl.constexpr, WALK: tl.constexpr, BLOCK: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Programs 0 to C - 1, of C channels: dbeta and dgamma of channel c, and its share in S1 and
    S2, which is s*dbeta and s*r*dgamma, or where G rounds the sums of what G took in, d and
    r*(d*x_hat). partial [2 or 4, C, tiles], credit [2, C].

    The others: dweight = sum over splits of weights [splits, size], a block each.
    """
    pid = tl.program_id(0)
    if pid < channels:
        c = pid.to(tl.int64)
        beta, gamma, s1, s2 = totals(partial + c * tiles, plane, tiles, ROUNDS, WALK)
        tl.store(dbeta + c, beta)
        tl.store(dgamma + c, gamma)
        if credit is not None:
            r = tl.rsqrt(tl.load(var + c) + eps)
            if ROUNDS:
                s2 *= r
            else:
                s = r
                if weight is not None:
                    s = r * tl.load(weight + c).to(tl.float32)
                s1 = s * beta
                s2 = s * r * gamma
            tl.store(credit + c, tl.load(credit + c) + s1)
            tl.store(credit + stride + c, tl.load(credit + stride + c) + s2)
    elif weights is not None:
        i = (pid - channels).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        j = tl.arange(0, SIDE)
        sums = tl.zeros([SIDE, BLOCK], tl.float32)
        for start in range(0, splits, SIDE):
            at = weights + (start + j).to(tl.int64)[:, None] * size + i[None, :]
            sums += tl.load(at, (start + j < splits)[:, None] & (i < size)[None, :], 0.0)
        tl.store(dweight + i, tl.sum(sums, 0), i < size)


def _walk(tiles: int) -> int:
    return WALKS[tiles > WALKS[0]]


@cached
def _moments_plan(rows: int, channels: int, tiles: int, stride: int, tile_rows: int) -> Plan:
    return Plan(
        merge_moments,
        (channels,),
        (rows, tile_rows, tiles, channels * tiles, stride),
        (_walk(tiles),),
    )


def moments_partial(like: Tensor, channels: int, tiles: int) -> Tensor:
    """Room for each tile's mean and M2."""
    return like.new_empty((2, channels, tiles), dtype=torch.float32)


def merge(partial: Tensor, moments: Tensor, rows: int, tile_rows: int) -> None:
    """Statistics of tiles of ``tile_rows`` rows, partial [2, C, tiles], into moments [2, C]."""
    _, channels, tiles = partial.shape
    _moments_plan(rows, channels, tiles, moments.stride(0), tile_rows)(partial, moments)


@cached
def _gradients_plan(
    channels: int, tiles: int, eps: float, stride: int, size: int, splits: int, rounds: bool
) -> Plan:
    blocks = cdiv(size, BLOCK) if size else 0
    return Plan(
        merge_gradients,
        (channels + blocks,),
        (channels, tiles, channels * tiles, eps, stride, size, splits),
        (rounds, _walk(tiles), BLOCK, SIDE),
    )


def sums_partial(like: Tensor, channels: int, tiles: int, into: Into | None) -> Tensor:
    """Room for each tile's sums."""
    planes = 4 if into is not None and into.rounds else 2
    return like.new_empty((planes, channels, tiles), dtype=torch.float32)


def merge_sums(
    partial: Tensor, read: Reader, into: Into | None, weights: Tensor | None = None
) -> tuple[Sums, Tensor | None]:
    """A reader's sums from partial [2 or 4, C, tiles], its share credited, and a weight's gradient
    from weights [splits, ...], in one launch.
    """
    planes, channels, tiles = partial.shape
    sums = Sums(partial.new_empty((channels,)), partial.new_empty((channels,)))
    credit = None if into is None else into.sums
    dweight = None if weights is None else weights.new_empty(weights.shape[1:])
    plan = _gradients_plan(
        channels, tiles, read.eps, 0 if credit is None else credit.stride(0),
        0 if dweight is None else dweight.numel(), 0 if weights is None else len(weights),
        planes == 4,
    )  # fmt: skip
    plan(partial, read.var, read.weight, *sums, credit, weights, dweight)
    return sums, dweight
