"""Statistics of channels where they stand, or on their way into a block's buffer.

Specification: ``statistics`` and ``pack`` of the reference backend.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...buffers import Geometry
from .launch import Plan, cached, readable_slice, tiling
from .reduce import merge, moments_partial
from .shared import store_moments, tile_of

Axes = tuple[tuple[int, int], ...]  # (size, stride) of each, outermost first


@triton.jit
def pack_rows(
    x, out, partial,
    M, C, CX, n1, n2, s0, s1, s2, sc, ldo, tiles, plane,
    BM: tl.constexpr, BC: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """out [M, C] = x, each tile's statistics at partial [2, C, tiles]; either may be missing.

    Row (i0*n1 + i1)*n2 + i2 of x lies at i0*s0 + i1*s1 + i2*s2, of which AXES are there; channels
    lie sc apart. CX columns of x may be read.
    """
    tile, c = tile_of(C, BC)
    row = tl.arange(0, BM)
    pixel = tile * BM + row
    valid = (pixel < M)[:, None]
    if AXES == 1:
        at = pixel.to(tl.int64) * s2
    else:
        at = (pixel % n2).to(tl.int64) * s2
        pixel //= n2
        if AXES == 2:
            at += pixel.to(tl.int64) * s1
        else:
            at += (pixel % n1).to(tl.int64) * s1 + (pixel // n1).to(tl.int64) * s0
    source = x + at[:, None] + c.to(tl.int64)[None, :] * sc
    values = tl.load(source, valid & (c < CX)[None, :], 0.0)
    if out is not None:
        out += tile.to(tl.int64) * BM * ldo
        tl.store(out + row[:, None] * ldo + c[None, :], values, valid & (c < C)[None, :])
    if partial is not None:
        count = tl.minimum(M - tile * BM, BM)
        wide = values.to(tl.float32)
        store_moments(partial, plane, wide, valid, count, c, c < C, tile, tiles)


@cached
def _plan(axes: Axes, m: int, c: int, readable: int, channel_stride: int, ldo: int) -> Plan:
    rows, columns, tiles, programs = tiling(m, c)
    (_, s0), (n1, s1), (n2, s2) = ((1, 0),) * (3 - len(axes)) + axes
    return Plan(
        pack_rows,
        (programs,),
        (m, c, readable, n1, n2, s0, s1, s2, channel_stride, ldo, tiles, c * tiles),
        (rows, columns, len(axes)),
        warps=8,
    )


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
    x: Tensor, out: Tensor | None, axes: Axes, m: int, c: int, readable: int, stride: int,
    moments: Tensor | None,
) -> None:  # fmt: skip
    tile = tiling(m, c)
    partial = None if moments is None else moments_partial(x, c, tile.tiles)
    plan = _plan(axes, m, c, readable, stride, 0 if out is None else out.stride(0))
    plan(x, out, partial)
    if moments is not None:
        merge(partial, moments, m, tile.rows)


def statistics(x: Tensor, moments: Tensor) -> None:
    """Of the columns of x (M, C), into moments (2, C)."""
    m, c = x.shape
    _run(x, None, ((m, x.stride(0)),), m, c, readable_slice(x), 1, moments)


def pack(x: Tensor, out: Tensor, geometry: Geometry, moments: Tensor | None) -> None:
    """Images x (N, C, H, W) of any strides into out (M, C), with its statistics."""
    n, c, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    _run(x, out, _axes((n, h, w), (sn, sh, sw)), geometry.rows, c, c, sc, moments)
