"""BatchNorm's own share in a gradient: of a slice whose readers have answered, and behind a norm
with one reader.

Specification: ``settle`` of the reference backend, and what precedes its
``bn_relu_conv1x1_backward``.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ...buffers import NormGradient, Share
from .launch import Plan, kernel
from .shared import behind_vectors, floats, tile_of
from .tiles import cached, readable, tiling


@kernel
def settle_rows(
    g, x, sums, mean, keep, dy,
    M, C, CG, CX, ldg, ldx, ldk, stride, count, factor,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dY = (G + p*X + q) * keep * factor, p = -S2/count, q = -S1/count - p*mean, for G, X, keep,
    dY [M, C] and S1, S2 in sums [2, C]; without sums p = q = 0. CG and CX columns of G and X may be
    read.
    """
    tile, c = tile_of(C, BC)
    row = tl.arange(0, BM)
    valid = (tile * BM + row < M)[:, None]
    inside = valid & (c < C)[None, :]
    top = tile.to(tl.int64) * BM
    g += top * ldg + row[:, None] * ldg
    d = floats(tl.load(g + c[None, :], valid & (c < CG)[None, :], 0.0))
    if sums is not None:
        p = -tl.load(sums + stride + c, c < C, 0.0) / count
        q = -tl.load(sums + c, c < C, 0.0) / count - p * tl.load(mean + c, c < C, 0.0)
        x += top * ldx + row[:, None] * ldx
        values = floats(tl.load(x + c[None, :], valid & (c < CX)[None, :], 0.0))
        d += p[None, :] * values + q[None, :]
    if keep is not None:
        keep += top * ldk + row[:, None] * ldk
        d *= tl.where(tl.load(keep + c[None, :], inside, 0) != 0, factor, 0.0)
    dy += top * C + row[:, None] * C
    tl.store(dy + c[None, :], d.to(dy.dtype.element_ty), inside)


@kernel
def normalise_rows(
    dz, x, mean, var, weight, dbeta, dgamma,
    M, C, CX, ldz, ldx, count, eps,
    BM: tl.constexpr, BC: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """dY = a*dZ + b*X + c, the gradient behind a BatchNorm, in dZ's place; dZ, X [M, C]."""
    tile, c = tile_of(C, BC)
    row = tl.arange(0, BM)
    valid = (tile * BM + row < M)[:, None]
    inside = valid & (c < C)[None, :]
    top = tile.to(tl.int64) * BM
    va, vb, vc = behind_vectors(mean, var, weight, dbeta, dgamma, eps, count, c, c < C, BATCH)
    dz += top * ldz + row[:, None] * ldz + c[None, :]
    dy = va[None, :] * tl.load(dz, inside, 0.0).to(tl.float32)
    if BATCH:
        x += top * ldx + row[:, None] * ldx
        values = tl.load(x + c[None, :], valid & (c < CX)[None, :], 0.0).to(tl.float32)
        dy += vb[None, :] * values + vc[None, :]
    tl.store(dz, dy.to(dz.dtype.element_ty), inside)


@cached
def _settle_plan(
    m: int, c: int, touched: tuple[int, int], strides: tuple[int, ...], count: int, factor: float
) -> Plan:
    rows, columns, programs = tiling(m, c)
    sizes = (m, c, *touched, *strides, count, factor)
    return Plan(settle_rows, (programs,), sizes, (rows, columns), warps=8)


def settle(g: Tensor, x: Tensor, share: Share | None, keep: tuple[Tensor, float] | None) -> Tensor:
    """dy of slices g and x (M, C), packed, in x's dtype."""
    m, c = x.shape
    dy = x.new_empty((m, c))
    sums, mean = (None, None) if share is None else (share.sums, share.mean)
    mask, factor = (None, 1.0) if keep is None else keep
    strides = (
        g.stride(0), x.stride(0),
        0 if mask is None else mask.stride(0), 0 if sums is None else sums.stride(0),
    )  # fmt: skip
    touched = readable(g), readable(x)
    count = 0 if share is None else share.rows
    plan = _settle_plan(m, c, touched, strides, count, factor)
    plan(g, x, sums, mean, mask, dy)
    return dy


@cached
def _normalise_plan(
    m: int, c: int, touched: int, ldz: int, ldx: int, count: int, eps: float, batch: bool
) -> Plan:
    rows, columns, programs = tiling(m, c)
    sizes = (m, c, touched, ldz, ldx, count, eps)
    return Plan(normalise_rows, (programs,), sizes, (rows, columns, batch), warps=8)


def normalised_(dz: Tensor, x: Tensor, behind: NormGradient) -> Tensor:
    """dy of dz and x (M, C), in dz's place."""
    read, (m, c) = behind.read, x.shape
    plan = _normalise_plan(
        m, c, readable(x), dz.stride(0), x.stride(0), behind.rows, read.eps, read.batch
    )
    plan(dz, x, read.mean, read.var, read.weight, *behind.sums)
    return dz
