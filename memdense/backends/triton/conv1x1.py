"""bn-relu-conv1x1: forward, input gradient and weight gradient.

Specification: ``bn_relu_conv1x1`` and ``bn_relu_conv1x1_backward`` of the reference backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...buffers import Into, NormGradient, Reader, Sums
from .launch import Plan, cached, cdiv, power, precision, readable
from .reduce import merge, merge_sums, moments_partial, sums_partial
from .shared import answer, behind_vectors, norm_vectors, relu, store_moments, store_sums
from .tuning import Config, choose

MAX_BLOCKS = 3  # accumulators side by side; a wider B takes another path
PROGRAMS = 264  # two for each multiprocessor of a large GPU
SPLIT_ROWS = 1024  # the fewest that a split of the weight gradient is worth


@triton.jit
def forward_1x1(
    x, w, mean, var, weight, bias, y, partial,
    M, C, CX, CW, B, ldx, ldw, eps, tiles, plane,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = relu(s*X + t) @ W^T for X [M, C], W [B, C], Y [M, B], with each tile's statistics of Y as
    stored at partial [2, B, tiles] where it is given.

    A program owns BM rows and BLOCKS times BN columns, so that X is read once; CX and CW columns of
    X and W may be read, W's beyond C being 0.
    """
    tile = tl.program_id(0)
    row = tl.arange(0, BM)
    valid = (tile * BM + row < M)[:, None]
    n = tl.arange(0, BN)
    x += tile.to(tl.int64) * BM * ldx
    acc0 = tl.zeros([BM, BN], tl.float32)
    acc1 = acc0
    acc2 = acc0
    for start in range(0, C, BK):
        c = start + tl.arange(0, BK)
        s, t, _, _ = norm_vectors(mean, var, weight, bias, eps, c, c < C)
        values = tl.load(x + row[:, None] * ldx + c[None, :], valid & (c < CX)[None, :], 0.0)
        z = relu(values.to(tl.float32) * s[None, :] + t[None, :])
        z = tl.where((c < C)[None, :], z, 0.0).to(x.dtype.element_ty)
        at = w + n[None, :] * ldw + c[:, None]
        inside = (c < CW)[:, None]
        acc0 = tl.dot(z, tl.load(at, inside & (n < B)[None, :], 0.0), acc0, PRECISION)
        if BLOCKS > 1:
            right = inside & (n + BN < B)[None, :]
            acc1 = tl.dot(z, tl.load(at + BN * ldw, right, 0.0), acc1, PRECISION)
        if BLOCKS > 2:
            right = inside & (n + 2 * BN < B)[None, :]
            acc2 = tl.dot(z, tl.load(at + 2 * BN * ldw, right, 0.0), acc2, PRECISION)
    count = tl.minimum(M - tile * BM, BM)
    y += tile.to(tl.int64) * BM * B + row[:, None] * B
    _store(acc0, y, partial, plane, valid, count, n, B, tile, tiles)
    if BLOCKS > 1:
        _store(acc1, y, partial, plane, valid, count, n + BN, B, tile, tiles)
    if BLOCKS > 2:
        _store(acc2, y, partial, plane, valid, count, n + 2 * BN, B, tile, tiles)


@triton.jit
def _store(acc, y, partial, plane, valid, count, n, B, tile, tiles):
    """A block of Y, and its statistics."""
    stored = acc.to(y.dtype.element_ty)
    tl.store(y + n[None, :], stored, valid & (n < B)[None, :])
    if partial is not None:
        values = stored.to(tl.float32)
        store_moments(partial, plane, values, valid, count, n, n < B, tile, tiles)


@triton.jit
def _behind(
    dz, y, mean, var, weight, dbeta, dgamma, valid, b, B, M, eps,
    BEHIND: tl.constexpr, BATCH: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Columns b of a tile of dY = a*dZ + b*Y + c, the gradient behind a BatchNorm (dY = dZ where
    there is none), in dZ's place where STORE; dz and y point to the tile's rows.
    """
    inside = valid & (b < B)[None, :]
    dz += b[None, :]
    dy = tl.load(dz, inside, 0.0)
    if BEHIND:
        va, vb, vc = behind_vectors(mean, var, weight, dbeta, dgamma, eps, M, b, b < B, BATCH)
        wide = va[None, :] * dy.to(tl.float32)
        if BATCH:
            wide += vb[None, :] * tl.load(y + b[None, :], inside, 0.0).to(tl.float32) + vc[None, :]
        dy = tl.where(inside, wide, 0.0).to(dz.dtype.element_ty)
        if STORE:
            tl.store(dz, dy, inside)
    return dy


@triton.jit
def input_gradient_1x1(
    dz, y, mean2, var2, weight2, dbeta2, dgamma2, w, x, mean, var, weight, bias, g, partial,
    M, C, CX, CW, CG, B, ldz, ldy, ldw, ldx, ldg, eps2, eps, tiles, plane,
    BM: tl.constexpr, BC: tl.constexpr, BB: tl.constexpr, BLOCKS: tl.constexpr,
    BEHIND: tl.constexpr, BATCH: tl.constexpr, STORE: tl.constexpr,
    SEEDED: tl.constexpr, ROUNDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dY = a*dZ + b*Y + c, dA = dY @ W, dX = dA*[s*X + t > 0], G += s*dX, and each tile's sums at
    partial [4, C, tiles]; dZ, Y [M, B], W [B, C], X, G [M, C].

    A program owns BM rows: it makes dY once and walks over W's and X's columns. With STORE dY takes
    dZ's place, for the weight gradient. CX, CW and CG columns of X, W and G may be touched.
    """
    tile = tl.program_id(0)
    row = tl.arange(0, BM)
    valid = (tile * BM + row < M)[:, None]
    b = tl.arange(0, BB)
    top = tile.to(tl.int64) * BM
    dz += top * ldz + row[:, None] * ldz
    if y is not None:
        y += top * ldy + row[:, None] * ldy
    dy0 = _behind(
        dz, y, mean2, var2, weight2, dbeta2, dgamma2,
        valid, b, B, M, eps2, BEHIND, BATCH, STORE,
    )  # fmt: skip
    dy1 = dy0
    dy2 = dy0
    if BLOCKS > 1:
        dy1 = _behind(
            dz, y, mean2, var2, weight2, dbeta2, dgamma2,
            valid, b + BB, B, M, eps2, BEHIND, BATCH, STORE,
        )  # fmt: skip
    if BLOCKS > 2:
        dy2 = _behind(
            dz, y, mean2, var2, weight2, dbeta2, dgamma2,
            valid, b + 2 * BB, B, M, eps2, BEHIND, BATCH, STORE,
        )  # fmt: skip
    x += top * ldx
    g += top * ldg
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        columns = (c < CW)[None, :]
        tail = w + b[:, None] * ldw + c[None, :]
        da = tl.dot(dy0, tl.load(tail, columns & (b < B)[:, None], 0.0), input_precision=PRECISION)
        if BLOCKS > 1:
            right = columns & (b + BB < B)[:, None]
            da = tl.dot(dy1, tl.load(tail + BB * ldw, right, 0.0), da, PRECISION)
        if BLOCKS > 2:
            right = columns & (b + 2 * BB < B)[:, None]
            da = tl.dot(dy2, tl.load(tail + 2 * BB * ldw, right, 0.0), da, PRECISION)
        s, t, mu, r = norm_vectors(mean, var, weight, bias, eps, c, c < C)
        values = tl.load(x + row[:, None] * ldx + c[None, :], valid & (c < CX)[None, :], 0.0)
        dbeta, dgamma, stored_beta, stored_gamma = answer(
            da, values, s[None, :], t[None, :], mu[None, :], r[None, :],
            g + row[:, None] * ldg + c[None, :], valid & (c < CG)[None, :],
            valid & (c < C)[None, :], True, SEEDED,
        )  # fmt: skip
        store_sums(
            partial, plane, dbeta, dgamma, stored_beta, stored_gamma, c, c < C, tile, tiles, ROUNDS
        )


@triton.jit
def weight_gradient_1x1(
    dy, x, mean, var, weight, bias, partial,
    M, C, CX, B, ldy, ldx, eps, share, size,
    BM: tl.constexpr, BC: tl.constexpr, BB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW = dY^T @ relu(s*X + t) for dY [M, B], X [M, C]: the sum over one split's ``share`` rows at
    partial [splits, B, C], size = B*C. A program owns BB by BC of it.
    """
    split = tl.program_id(2)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    b = tl.program_id(1) * BB + tl.arange(0, BB)
    row = tl.arange(0, BM)
    first = split * share
    last = tl.minimum(first + share, M)
    dy += split.to(tl.int64) * share * ldy
    x += split.to(tl.int64) * share * ldx
    s, t, _, _ = norm_vectors(mean, var, weight, bias, eps, c, c < C)
    acc = tl.zeros([BB, BC], tl.float32)
    for start in range(first, last, BM):
        valid = start + row < last
        d = tl.load(dy + row[None, :] * ldy + b[:, None], valid[None, :] & (b < B)[:, None], 0.0)
        mask = valid[:, None] & (c < CX)[None, :]
        values = tl.load(x + row[:, None] * ldx + c[None, :], mask, 0.0)
        z = relu(values.to(tl.float32) * s[None, :] + t[None, :])
        # what stands behind C, or a NaN behind the last row, must not meet dY's zeros
        z = tl.where(mask & (c < C)[None, :], z, 0.0).to(x.dtype.element_ty)
        acc = tl.dot(d, z, acc, PRECISION)
        dy += BM * ldy
        x += BM * ldx
    at = partial + split.to(tl.int64) * size + b[:, None] * C + c[None, :]
    tl.store(at, acc, (b < B)[:, None] & (c < C)[None, :])


def blocks(columns: int, precise: str) -> tuple[int, int]:
    """(width, count) of the accumulators that hold ``columns``."""
    if columns <= 128:
        return power(columns), 1
    # without tensor cores a wider product does not fit the registers
    width = 64 if columns <= 192 or precise == "ieee" else 128
    return width, cdiv(columns, width)


def takes(dtype: torch.dtype, columns: int) -> bool:
    """Whether these kernels hold B = ``columns``."""
    return blocks(columns, precision(dtype))[1] <= MAX_BLOCKS


@cached
def forward_configs(dtype: torch.dtype, precise: str, m: int, b: int) -> tuple[Config, ...]:
    """Of :func:`forward_1x1`, the default first: rows, accumulator width, inner columns."""
    width, count = blocks(b, precise)
    if precise == "ieee":
        return (Config(64 if count == 1 else 16, width, 32, 8, 2),)
    if dtype == torch.float32:
        low = Config(64, width, 32, 8, 2)
        return (Config(128, width, 32, 8, 2), low) if count == 1 else (low,)
    if count > 1:
        return Config(64, width, 32, 8, 3), Config(64, width, 32, 8, 2)
    # W is read once per tile: tall tiles, as long as there are enough to fill a GPU
    tall, low = Config(256, width, 32, 16, 3), Config(128, width, 32, 8 if width > 64 else 4, 3)
    if m >= 256 * PROGRAMS:
        return tall, low
    return (low, tall) if m >= 64 * PROGRAMS else (Config(64, width, 32, 8, 3), low)


@cached
def input_configs(dtype: torch.dtype, precise: str, m: int, b: int) -> tuple[Config, ...]:
    """Of :func:`input_gradient_1x1`: rows, columns of X at a time, width of dY's parts."""
    width, count = blocks(b, precise)
    if precise == "ieee":
        return (Config(64, 32, width, 8, 2) if count == 1 else Config(16, 32, width, 8, 1),)
    if dtype == torch.float32:
        return (Config(64, 32, width, 8, 2 if count == 1 else 1),)
    low = Config(64, 64, width, 8, 2)
    if count > 1 or m < 64 * PROGRAMS:
        return (low,)
    return Config(128, 64, width, 16, 2), low, Config(128, 32, width, 8, 2)


@cached
def weight_configs(dtype: torch.dtype, precise: str) -> tuple[Config, ...]:
    """Of :func:`weight_gradient_1x1`: rows at a time, columns of X, columns of dY."""
    if precise == "ieee":
        return (Config(32, 64, 64, 8, 2),)
    if dtype == torch.float32:
        return (Config(32, 64, 128, 8, 2),)
    return Config(64, 128, 128, 8, 2), Config(32, 128, 128, 8, 3)


@cached
def _forward_plan(
    k: Config, precise: str, m: int, c: int, b: int, ldx: int, ldw: int, eps: float
) -> Plan:
    tiles = cdiv(m, k.rows)
    return Plan(
        forward_1x1,
        (tiles,),
        (m, c, readable(c, ldx), readable(c, ldw), b, ldx, ldw, eps, tiles, b * tiles),
        (k.rows, k.columns, k.inner, blocks(b, precise)[1], precise),
        k.warps,
        k.stages,
    )


def forward(x: Tensor, read: Reader, weight: Tensor, moments: Tensor | None) -> Tensor:
    """Y of X (M, C) and W (B, C), and its statistics where ``moments`` (2, B) wants them."""
    (m, c), b, precise = x.shape, len(weight), precision(x.dtype)
    k = choose("forward_1x1", x.dtype, (m, c, b), forward_configs(x.dtype, precise, m, b))
    y = x.new_empty((m, b))
    partial = None if moments is None else moments_partial(x, b, cdiv(m, k.rows))
    plan = _forward_plan(
        k, precise, m, c, b, x.stride(0), weight.stride(0), read.eps
    )  # fmt: skip
    plan(x, weight, read.mean, read.var, read.weight, read.bias, y, partial)
    if moments is not None:
        merge(partial, moments, m, k.rows)
    return y


@cached
def _input_plan(
    k: Config, precise: str, m: int, c: int, b: int, strides: tuple[int, ...],
    eps: tuple[float, float], behind: bool, batch: bool, store: bool, seeded: bool, rounds: bool,
) -> Plan:  # fmt: skip
    tiles, count = cdiv(m, k.rows), blocks(b, precise)[1]
    _, _, ldw, ldx, ldg = strides
    writable = readable(c, ldg) if seeded else c
    return Plan(
        input_gradient_1x1,
        (tiles,),
        (m, c, readable(c, ldx), readable(c, ldw), writable, b, *strides, *eps, tiles, c * tiles),
        (k.rows, k.columns, k.inner, count, behind, batch, store, seeded, rounds, precise),
        k.warps,
        k.stages,
    )


@cached
def _weight_plan(
    k: Config, precise: str, m: int, c: int, b: int, ldy: int, ldx: int, eps: float, splits: int
) -> Plan:
    columns, inner = min(k.columns, power(c)), min(k.inner, power(b))
    share = cdiv(cdiv(m, splits), k.rows) * k.rows
    return Plan(
        weight_gradient_1x1,
        (cdiv(c, columns), cdiv(b, inner), splits),
        (m, c, readable(c, ldx), b, ldy, ldx, eps, share, b * c),
        (k.rows, columns, inner, precise),
        k.warps,
        k.stages,
    )


def weight_splits(k: Config, m: int, c: int, b: int) -> int:
    """How many programs share the rows: enough to fill a GPU, few enough to keep partial sums
    small beside what they read.
    """
    programs = cdiv(c, k.columns) * cdiv(b, k.inner)
    splits = max(1, min(PROGRAMS // programs, m // SPLIT_ROWS))
    share = cdiv(cdiv(m, splits), k.rows) * k.rows
    return cdiv(m, share)


def backward(
    dz: Tensor,
    y: Tensor | None,
    behind: NormGradient | None,
    weight: Tensor,
    x: Tensor,
    read: Reader,
    into: Into,
    need_weight: bool,
) -> tuple[Sums, Tensor | None]:
    """Into G; the reader's sums and dW (B, C) in float32."""
    (m, c), b, g, precise = x.shape, len(weight), into.g, precision(x.dtype)
    k = choose("input_gradient_1x1", x.dtype, (m, c, b), input_configs(x.dtype, precise, m, b))
    partial = sums_partial(x, c, cdiv(m, k.rows), into)
    batch, norm2, eps2 = False, (None,) * 5, 0.0
    if behind is not None:
        read2 = behind.read
        batch, eps2 = read2.batch, read2.eps
        norm2 = (read2.mean, read2.var, read2.weight, *behind.sums)
    plan = _input_plan(
        k, precise, m, c, b,
        (dz.stride(0), y.stride(0) if batch else 0, weight.stride(0), x.stride(0), g.stride(0)),
        (eps2, read.eps), behind is not None, batch, behind is not None and need_weight,
        into.seeded, into.rounds,
    )  # fmt: skip
    plan(
        dz, y if batch else None, *norm2, weight, x, read.mean, read.var, read.weight, read.bias,
        g, partial,
    )  # fmt: skip
    weights = None
    if need_weight:
        k = choose("weight_gradient_1x1", x.dtype, (m, c, b), weight_configs(x.dtype, precise))
        splits = weight_splits(k, m, c, b)
        weights = x.new_empty((splits, b, c), dtype=torch.float32)
        plan = _weight_plan(k, precise, m, c, b, dz.stride(0), x.stride(0), read.eps, splits)
        plan(dz, x, read.mean, read.var, read.weight, read.bias, weights)
    return merge_sums(partial, read, into, weights)
