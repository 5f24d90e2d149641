"""bn-relu-conv1x1: forward, and its input and weight gradients in one walk.

Specification: ``bn_relu_conv1x1`` and ``bn_relu_conv1x1_backward`` of the reference backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...buffers import Into, NormGradient, Reader, Sums
from .launch import Plan, cached, cdiv, hopper, power, precision, readable
from .reduce import merge, merge_sums, moments_partial, sums_partial
from .settle import normalised_
from .shared import norm_vectors, relu, store_moments, store_sums
from .tuning import Config, choose

MAX_BLOCKS = 3  # accumulators side by side; a wider B takes another path
PROGRAMS = 132  # one for each multiprocessor of a large GPU
SPLIT_ROWS = 512  # the fewest that a split of the gradients is worth


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
def _pairs(values, BM: tl.constexpr, BC: tl.constexpr):
    """Sums of rows g and g + 8 of every 16, which one thread holds of a product."""
    return tl.sum(tl.reshape(values, [BM // 16, 2, 8, BC]), 1)


@triton.jit
def _column_sums(pairs):
    return tl.sum(tl.sum(pairs, 0), 0)


@triton.jit
def gradients_1x1(
    dy, w, x, mean, var, weight, bias, g, partial, weights,
    M, C, CX, CW, CG, B, ldy, ldw, ldx, ldg, eps, across, share, plane, size,
    BM: tl.constexpr, BC: tl.constexpr, BB: tl.constexpr, BLOCKS: tl.constexpr,
    WEIGHT: tl.constexpr, SEEDED: tl.constexpr, ROUNDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA = dY @ W, dX = dA*[s*X + t > 0], G += s*dX and with WEIGHT dW = dY^T @ relu(s*X + t);
    dY [M, B], W [B, C], X, G [M, C].

    A program owns BC columns and walks down one split's ``share`` rows. W's columns, the norm's
    vectors and all sums stay with it; the latter, of dX and dX*x_hat and of what G took in, go to
    partial [2 or 4, C, splits], its share of dW to weights [splits, B, C] (plane = C*splits,
    size = B*C). CX, CW and CG columns of X, W and G may be touched, W's beyond C being 0.
    """
    split = tl.program_id(0) // across
    c = tl.program_id(0) % across * BC + tl.arange(0, BC)
    b = tl.arange(0, BB)
    row = tl.arange(0, BM)
    s, t, mu, _ = norm_vectors(mean, var, weight, bias, eps, c, c < C)
    s = tl.where(c < C, s, 0.0)  # so that G keeps what stands behind C
    at = w + b[:, None] * ldw + c[None, :]
    columns = (c < CW)[None, :]
    w0 = tl.load(at, columns & (b < B)[:, None], 0.0)
    if BLOCKS > 1:
        w1 = tl.load(at + BB * ldw, columns & (b + BB < B)[:, None], 0.0)
    if BLOCKS > 2:
        w2 = tl.load(at + 2 * BB * ldw, columns & (b + 2 * BB < B)[:, None], 0.0)
    first = split * share
    last = tl.minimum(first + share, M)
    top = split.to(tl.int64) * share
    dy += top * ldy
    x += top * ldx
    g += top * ldg
    in_dy = row[:, None] * ldy + b[None, :]
    in_x = row[:, None] * ldx + c[None, :]
    in_g = row[:, None] * ldg + c[None, :]
    readable = (c < CX)[None, :]
    writable = (c < CG)[None, :]
    acc0 = tl.zeros([BB, BC], tl.float32)
    acc1 = acc0
    acc2 = acc0
    dbeta = tl.zeros([BM // 16, 8, BC], tl.float32)
    dgamma = dbeta
    stored_beta = dbeta
    stored_gamma = dbeta
    if SEEDED:
        held = tl.load(g + in_g, (first + row < last)[:, None] & writable, 0.0)
    for start in range(first, last, BM):
        valid = (start + row < last)[:, None]
        d0 = tl.load(dy + in_dy, valid & (b < B)[None, :], 0.0)
        values = tl.load(x + in_x, valid & readable, 0.0).to(tl.float32)
        if SEEDED:
            old = held.to(tl.float32)
            # the next rows are under way while these are answered
            later = (start + BM + row < last)[:, None]
            held = tl.load(g + BM * ldg + in_g, later & writable, 0.0)
        da = tl.dot(d0, w0, input_precision=PRECISION)
        if BLOCKS > 1:
            d1 = tl.load(dy + BB + in_dy, valid & (b + BB < B)[None, :], 0.0)
            da = tl.dot(d1, w1, da, PRECISION)
        if BLOCKS > 2:
            d2 = tl.load(dy + 2 * BB + in_dy, valid & (b + 2 * BB < B)[None, :], 0.0)
            da = tl.dot(d2, w2, da, PRECISION)
        z = values * s[None, :] + t[None, :]
        dx = tl.where(z <= 0.0, 0.0, da)
        # one expression, so that what G took in is summed where the product left it: as a value of
        # its own, s*dX would be laid out for the store, and the sums with it
        if SEEDED:
            new = (old + s[None, :] * dx).to(g.dtype.element_ty)
            taken = new.to(tl.float32) - old
        else:
            new = (s[None, :] * dx).to(g.dtype.element_ty)
            taken = new.to(tl.float32)
        tl.store(g + in_g, new, valid & writable)
        if WEIGHT:
            z = relu(z).to(x.dtype.element_ty)
            acc0 = tl.dot(tl.trans(d0), z, acc0, PRECISION)
            if BLOCKS > 1:
                acc1 = tl.dot(tl.trans(d1), z, acc1, PRECISION)
            if BLOCKS > 2:
                acc2 = tl.dot(tl.trans(d2), z, acc2, PRECISION)
        centred = values - mu[None, :]
        dbeta += _pairs(dx, BM, BC)
        dgamma += _pairs(dx * centred, BM, BC)
        if ROUNDS:
            stored_beta += _pairs(taken, BM, BC)
            stored_gamma += _pairs(taken * centred, BM, BC)
        dy += BM * ldy
        x += BM * ldx
        g += BM * ldg
    r = tl.rsqrt(tl.load(var + c, c < C, 0.0) + eps)
    store_sums(
        partial, plane, _column_sums(dbeta), r * _column_sums(dgamma),
        _column_sums(stored_beta), r * _column_sums(stored_gamma),
        c, c < C, split, tl.num_programs(0) // across, ROUNDS,
    )  # fmt: skip
    if WEIGHT:
        at = weights + split.to(tl.int64) * size + b[:, None] * C + c[None, :]
        inside = (c < C)[None, :]
        tl.store(at, acc0, inside & (b < B)[:, None])
        if BLOCKS > 1:
            tl.store(at + BB * C, acc1, inside & (b + BB < B)[:, None])
        if BLOCKS > 2:
            tl.store(at + 2 * BB * C, acc2, inside & (b + 2 * BB < B)[:, None])


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
def forward_configs(
    dtype: torch.dtype, precise: str, m: int, b: int, hopper: bool
) -> tuple[Config, ...]:
    """Of :func:`forward_1x1`, the default first: rows, accumulator width, inner columns."""
    width, count = blocks(b, precise)
    if precise == "ieee":
        return (Config(64 if count == 1 else 16, width, 32, 8, 2),)
    if dtype == torch.float32:
        low = Config(64, width, 32, 8, 2)
        return (Config(128, width, 32, 8, 2), low) if count == 1 else (low,)
    if count > 1:
        return Config(64, width, 32, 8, 3), Config(64, width, 32, 8, 2)
    if hopper:
        # With few warps a thread has more rows of a channel, whose vectors it makes for itself, and
        # two programs share a multiprocessor. Measured on an H200 at B = 128.
        tall, low = Config(128, width, 64, 4, 2), Config(64, width, 64, 4, 3)
        return (tall, low) if m >= 512 * PROGRAMS else (low, tall)
    # W is read once per tile: tall tiles, as long as there are enough to fill a GPU
    tall = Config(256, width, 32, 16, 3)
    low = Config(128, width, 32, 8 if width > 64 else 4, 3)
    if m >= 512 * PROGRAMS:
        return tall, low
    return (low, tall) if m >= 128 * PROGRAMS else (Config(64, width, 32, 8, 3), low)


@cached
def gradient_configs(dtype: torch.dtype, precise: str, b: int, hopper: bool) -> tuple[Config, ...]:
    """Of :func:`gradients_1x1`: rows at a time, columns of X, width of dY's parts."""
    width, count = blocks(b, precise)
    if precise == "ieee":
        return (Config(16, 32, width, 8, 1),)
    columns = 32 if width * count <= 256 else 16  # registers hold so much of dW
    if not hopper:
        rows = 64 if count == 1 else 32 if columns == 32 else 16
        return (Config(rows, columns, width, 8, 2),)
    return (Config(64, 64 if count == 1 else columns, width, 8, 2),)


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
    candidates = forward_configs(x.dtype, precise, m, b, hopper(x.device))
    k = choose("forward_1x1", x.dtype, (m, c, b), candidates)
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
def _gradients_plan(
    k: Config, precise: str, m: int, c: int, b: int, strides: tuple[int, ...], eps: float,
    splits: int, need_weight: bool, seeded: bool, rounds: bool,
) -> Plan:  # fmt: skip
    across, count = cdiv(c, k.columns), blocks(b, precise)[1]
    _, ldw, ldx, ldg = strides
    writable = readable(c, ldg) if seeded else c
    return Plan(
        gradients_1x1,
        (across * splits,),
        (
            m, c, readable(c, ldx), readable(c, ldw), writable, b, *strides, eps,
            across, cdiv(cdiv(m, splits), k.rows) * k.rows, c * splits, b * c,
        ),
        (k.rows, k.columns, k.inner, count, need_weight, seeded, rounds, precise),
        k.warps,
        k.stages,
    )  # fmt: skip


def gradient_splits(k: Config, m: int, c: int) -> int:
    """How many programs share the rows: enough to fill a GPU, few enough to keep partial results
    small beside what they read.
    """
    splits = max(1, min(PROGRAMS // cdiv(c, k.columns), m // SPLIT_ROWS))
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
    dy = dz if behind is None else normalised_(dz, y, behind)
    candidates = gradient_configs(x.dtype, precise, b, hopper(x.device))
    k = choose("gradients_1x1", x.dtype, (m, c, b), candidates)
    splits = gradient_splits(k, m, c)
    partial = sums_partial(x, c, splits, into)
    weights = x.new_empty((splits, b, c), dtype=torch.float32) if need_weight else None
    plan = _gradients_plan(
        k, precise, m, c, b, (dy.stride(0), weight.stride(0), x.stride(0), g.stride(0)),
        read.eps, splits, need_weight, into.seeded, into.rounds,
    )  # fmt: skip
    plan(dy, weight, x, read.mean, read.var, read.weight, read.bias, g, partial, weights)
    return merge_sums(partial, read, into, weights)
