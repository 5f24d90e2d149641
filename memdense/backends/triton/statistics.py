"""Statistics of channels where they stand, or on their way into a block's buffer.

Specification: ``statistics`` and ``pack`` of the reference backend.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...buffers import Geometry
from .launch import Plan, kernel
from .reduce import merge, moments_partial
from .shared import floats, walk_of
from .tiles import cached, readable, walk

Axes = tuple[tuple[int, int], ...]  # (size, stride) of each, outermost first


@triton.jit
def _rows_at(pixel, n1, n2, s0, s1, s2, AXES: tl.constexpr):
    """Where rows ``pixel`` lie."""
    if AXES == 1:
        return pixel.to(tl.int64) * s2
    at = (pixel % n2).to(tl.int64) * s2
    pixel //= n2
    if AXES == 2:
        return at + pixel.to(tl.int64) * s1
    return at + (pixel % n1).to(tl.int64) * s1 + (pixel // n1).to(tl.int64) * s0


@kernel
def pack_rows(
    x, out, partial,
    M, C, CX, n1, n2, s0, s1, s2, sc, ldo, share, walkers, plane,
    BM: tl.constexpr, BC: tl.constexpr, AXES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """out [M, C] = x, each walk's statistics at partial [2, C, walkers]; either may be missing.

    Row (i0*n1 + i1)*n2 + i2 of x lies at i0*s0 + i1*s1 + i2*s2, of which AXES are there; channels
    lie sc apart. CX columns of x may be read. WHOLE: s2 is 1, and n2 a multiple of 16. With
    d = x - shift, where shift is the mean of the first rows, mean = shift + sum(d)/n and
    M2 = sum(d^2) - sum(d)^2/n.
    """
    if WHOLE:  # wide loads want to know it of each
        M, n2, share = M // 16 * 16, n2 // 16 * 16, share // 16 * 16
    walker, first, last, c = walk_of(C, M, share, BC)
    row = tl.arange(0, BM)
    x += c.to(tl.int64)[None, :] * sc
    readable = (c < CX)[None, :]
    total = tl.zeros([BM, BC], tl.float32)
    square = total
    shift = tl.zeros([BC], tl.float32)
    if partial is not None:
        valid = (first + row < last)[:, None]
        at = x + _rows_at(first + row, n1, n2, s0, s1, s2, AXES)[:, None]
        head = floats(tl.load(at, valid & readable, 0.0))
        shift = tl.sum(tl.where(valid, head, 0.0), 0) / tl.minimum(last - first, BM)
    if out is not None:
        out += first.to(tl.int64) * ldo + row[:, None] * ldo + c[None, :]
    # loaded ahead, but not through shared memory where a thread's channels lie far apart
    for start in tl.range(first, last, BM, num_stages=1 if WHOLE else 4):
        valid = (start + row < last)[:, None]
        at = x + _rows_at(start + row, n1, n2, s0, s1, s2, AXES)[:, None]
        values = tl.load(at, valid & readable, 0.0)
        if out is not None:
            tl.store(out, values, valid & (c < C)[None, :])
            out += BM * ldo
        if partial is not None:
            d = tl.where(valid, floats(values) - shift[None, :], 0.0)
            total += d
            square += d * d
    if partial is not None:
        sums = tl.sum(total, 0)
        mean = sums / (last - first)
        # a NaN stays one
        m2 = tl.maximum(tl.sum(square, 0) - sums * mean, 0.0, tl.PropagateNan.ALL)
        at = partial + c.to(tl.int64) * walkers + walker
        tl.store(at, shift + mean, c < C)
        tl.store(at + plane, m2, c < C)


@cached
def _plan(axes: Axes, m: int, c: int, touched: int, channel_stride: int, ldo: int) -> Plan:
    rows, columns, across, walkers, share = walk(m, c)
    (_, s0), (n1, s1), (n2, s2) = ((1, 0),) * (3 - len(axes)) + axes
    sizes = (m, c, touched, n1, n2, s0, s1, s2, channel_stride, ldo, share, walkers, c * walkers)
    constants = rows, columns, len(axes), s2 == 1 and n2 % 16 == 0
    return Plan(pack_rows, (across * walkers,), sizes, constants, warps=8)


def _axes(sizes: tuple[int, ...], strides: tuple[int, ...]) -> Axes:
    """The axes that rows run over, with those merged that are one in memory."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = axes[-1][0] * size, stride
        else:
            axes.append((size, stride))
    return tuple(axes) or ((1, 0),)


def _run(
    x: Tensor, out: Tensor | None, axes: Axes, m: int, c: int, touched: int, stride: int,
    moments: Tensor | None,
) -> None:  # fmt: skip
    walks = walk(m, c)
    partial = None if moments is None else moments_partial(x, c, walks.walkers)
    plan = _plan(axes, m, c, touched, stride, 0 if out is None else out.stride(0))
    plan(x, out, partial)
    if moments is not None:
        merge(partial, moments, m, walks.share)


def statistics(x: Tensor, moments: Tensor) -> None:
    """Of the columns of x (M, C), into moments (2, C)."""
    m, c = x.shape
    _run(x, None, ((m, x.stride(0)),), m, c, readable(x), 1, moments)


def pack(x: Tensor, out: Tensor, geometry: Geometry, moments: Tensor | None) -> None:
    """Images x (N, C, H, W) of any strides into out (M, C), with its statistics."""
    n, c, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    _run(x, out, _axes((n, h, w), (sn, sh, sw)), geometry.rows, c, c, sc, moments)
