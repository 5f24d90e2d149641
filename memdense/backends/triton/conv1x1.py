"""bn-relu-conv1x1: forward, and its input and weight gradients in one walk.

Specification: ``bn_relu_conv1x1`` and ``bn_relu_conv1x1_backward`` of the reference backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...buffers import Into, NormGradient, Reader, Sums
from .launch import Plan, kernel
from .reduce import merge, merge_sums, moments_partial, sums_partial
from .settle import normalised_
from .shared import add_product, floats, norm_vectors, relu, store_moments, store_sums
from .tiles import cached, cdiv, hopper, multiprocessors, power, precision, readable, share_of
from .tuning import Config, choose

MAX_BLOCKS = 3  # accumulators side by side; a wider B takes another path
SPLIT_ROWS = 896  # the fewest that a split of the gradients is worth


@kernel
def forward_1x1(
    x, w, mean, var, weight, bias, y, partial,
    M, C, CX, CW, B, ldx, ldw, eps, tiles, plane,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr,
    EVEN: tl.constexpr, FULL: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = relu(s*X + t) @ W^T for X [M, C], W [B, C], Y [M, B], with each tile's statistics of Y as
    stored at partial [2, B, tiles] where it is given.

    A program owns BM rows and BLOCKS times BN columns, so that X is read once; CX and CW columns of
    X and W may be read, W's beyond C being 0. FULL: all these columns are there, which saves a
    mask for each row of W.
    """
    tl.assume(C > 0)  # else the accumulators are made twice
    if FULL:
        B = BN * BLOCKS
    tile = tl.program_id(0)
    row = tl.arange(0, BM)
    valid = (tile * BM + row < M)[:, None]
    if EVEN:
        valid = tl.full([BM, 1], True, tl.int1)
    n = tl.arange(0, BN)
    x += tile.to(tl.int64) * BM * ldx
    acc0 = tl.zeros([BN, BM], tl.float32)
    acc1 = acc0
    acc2 = acc0
    for start in range(0, C, BK):
        c = start + tl.arange(0, BK)
        s, t, _, _ = norm_vectors(mean, var, weight, bias, eps, c, c < C)
        values = tl.load(x + row[:, None] * ldx + c[None, :], valid & (c < CX)[None, :], 0.0)
        z = relu(floats(values) * s[None, :] + t[None, :])
        if RAGGED:
            z = tl.where((c < C)[None, :], z, 0.0)
        z = tl.trans(z.to(x.dtype.element_ty))
        at = w + n[:, None] * ldw + c[None, :]
        inside = (c < CW)[None, :]
        acc0 = add_product(acc0, tl.load(at, inside & (n < B)[:, None], 0.0), z, PRECISION)
        if BLOCKS > 1:
            below = inside & (n + BN < B)[:, None]
            acc1 = add_product(acc1, tl.load(at + BN * ldw, below, 0.0), z, PRECISION)
        if BLOCKS > 2:
            below = inside & (n + 2 * BN < B)[:, None]
            acc2 = add_product(acc2, tl.load(at + 2 * BN * ldw, below, 0.0), z, PRECISION)
    count = tl.minimum(M - tile * BM, BM)
    row = _dealt(BM)
    dealt = (tile * BM + row < M)[:, None]
    if EVEN:
        dealt = valid
    y += tile.to(tl.int64) * BM * B + row[:, None] * B
    _store(acc0, y, partial, plane, valid, dealt, count, n, B, tile, tiles, BN, BM)
    if BLOCKS > 1:
        _store(acc1, y, partial, plane, valid, dealt, count, n + BN, B, tile, tiles, BN, BM)
    if BLOCKS > 2:
        _store(acc2, y, partial, plane, valid, dealt, count, n + 2 * BN, B, tile, tiles, BN, BM)


@triton.jit
def _dealt(BM: tl.constexpr):
    """The rows of a tile as :func:`_deal` orders them."""
    i = tl.arange(0, BM)
    return i % (BM // 4) // 2 * 8 + i // (BM // 4) * 2 + i % 2


@triton.jit
def _deal(values, BC: tl.constexpr, BM: tl.constexpr):
    """A product [BC, BM] as rows to be stored, [BM, BC]. In a product's layout and in a store's the
    threads of a warp have rows together and a thread has rows far apart. Triton converts what a
    thread has in both piece by piece, with two barriers each; in this order, that is little.
    """
    parts = tl.reshape(values, [BC, BM // 8, 4, 2])
    return tl.reshape(tl.permute(parts, (2, 1, 3, 0)), [BM, BC])


@triton.jit
def _store(
    acc, y, partial, plane, valid, dealt, count, n, B, tile, tiles,
    BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """A block of Y, whose rows are dealt, and its statistics."""
    stored = acc.to(y.dtype.element_ty)
    tl.store(y + n[None, :], _deal(stored, BN, BM), dealt & (n < B)[None, :])
    if partial is not None:
        values = floats(tl.trans(stored))
        store_moments(partial, plane, values, valid, count, n, n < B, tile, tiles)


@triton.jit
def _quads(values, BC: tl.constexpr, BM: tl.constexpr):
    """Sums [BC, 4] of a product's columns, those that one thread holds of a row."""
    return tl.sum(tl.sum(tl.reshape(values, [BC, BM // 8, 4, 2]), 3), 1)


@kernel
def gradients_1x1(
    dy, w, x, mean, var, weight, bias, g, partial, weights,
    M, C, CX, CW, CG, B, ldy, ldw, ldx, ldg, eps, across, share, plane, size,
    BM: tl.constexpr, BC: tl.constexpr, BB: tl.constexpr, BLOCKS: tl.constexpr,
    WEIGHT: tl.constexpr, SEEDED: tl.constexpr, ROUNDS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dA = dY @ W, dX = dA*[s*X + t > 0], G += s*dX and with WEIGHT dW = dY^T @ relu(s*X + t);
    dY [M, B], W [B, C], X, G [M, C]. All of it transposed, channels along rows: a thread then has
    few channels, whose vectors and sums fit its registers.

    A program owns BC channels and walks down one split's ``share`` rows. W's columns, the norm's
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
    at = w + b[None, :] * ldw + c[:, None]
    inside = (c < CW)[:, None]
    w0 = tl.load(at, inside & (b < B)[None, :], 0.0)
    if BLOCKS > 1:
        w1 = tl.load(at + BB * ldw, inside & (b + BB < B)[None, :], 0.0)
    if BLOCKS > 2:
        w2 = tl.load(at + 2 * BB * ldw, inside & (b + 2 * BB < B)[None, :], 0.0)
    first = split * share
    last = tl.minimum(first + share, M)
    top = split.to(tl.int64) * share
    dy += top * ldy
    x += top * ldx
    g += top * ldg
    in_dy = row[:, None] * ldy + b[None, :]
    in_x = row[:, None] * ldx + c[None, :]
    in_g = row[:, None] * ldg + c[None, :]
    DEAL: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 16  # float32 lacks the registers
    to = row
    if DEAL:
        to = _dealt(BM)
    to_g = to[:, None] * ldg + c[None, :]
    readable = (c < CX)[None, :]
    writable = (c < CG)[None, :]
    acc0 = tl.zeros([BC, BB], tl.float32)
    acc1 = acc0
    acc2 = acc0
    dbeta = tl.zeros([BC, 4], tl.float32)
    dgamma = dbeta
    stored_beta = dbeta
    stored_gamma = dbeta
    # stages by name, or else G, which no product reads, is not loaded ahead
    for start in tl.range(first, last, BM, num_stages=STAGES):
        valid = (start + row < last)[:, None]
        if EVEN:
            valid = tl.full([BM, 1], True, tl.int1)
        d0 = tl.load(dy + in_dy, valid & (b < B)[None, :], 0.0)
        values = floats(tl.trans(tl.load(x + in_x, valid & readable, 0.0)))
        da = tl.dot(w0, tl.trans(d0), input_precision=PRECISION)
        if BLOCKS > 1:
            d1 = tl.load(dy + BB + in_dy, valid & (b + BB < B)[None, :], 0.0)
            da = add_product(da, w1, tl.trans(d1), PRECISION)
        if BLOCKS > 2:
            d2 = tl.load(dy + 2 * BB + in_dy, valid & (b + 2 * BB < B)[None, :], 0.0)
            da = add_product(da, w2, tl.trans(d2), PRECISION)
        z = values * s[:, None] + t[:, None]
        dx = tl.where(z <= 0.0, 0.0, da)
        if SEEDED:
            old = floats(tl.trans(tl.load(g + in_g, valid & writable, 0.0)))
            new = (old + s[:, None] * dx).to(g.dtype.element_ty)
            taken = floats(new) - old
        else:
            new = (s[:, None] * dx).to(g.dtype.element_ty)
            taken = floats(new)
        if WEIGHT:
            # never true, but so z stays in dA's layout, which in 16 bits is the operand's too
            z = tl.where(da > float("inf"), 0.0, z)
            z = relu(z).to(x.dtype.element_ty)
            acc0 = add_product(acc0, z, d0, PRECISION)
            if BLOCKS > 1:
                acc1 = add_product(acc1, z, d1, PRECISION)
            if BLOCKS > 2:
                acc2 = add_product(acc2, z, d2, PRECISION)
        centred = values - mu[:, None]
        dbeta += _quads(dx, BC, BM)
        dgamma += _quads(dx * centred, BC, BM)
        if ROUNDS:
            stored_beta += _quads(taken, BC, BM)
            stored_gamma += _quads(taken * centred, BC, BM)
        dealt = (start + to < last)[:, None]
        if EVEN:
            dealt = valid
        answer = _deal(new, BC, BM) if DEAL else tl.trans(new)
        tl.store(g + to_g, answer, dealt & writable)
        dy += BM * ldy
        x += BM * ldx
        g += BM * ldg
    r = tl.rsqrt(tl.load(var + c, c < C, 1.0) + eps)
    store_sums(
        partial, plane, tl.sum(dbeta, 1), r * tl.sum(dgamma, 1), tl.sum(stored_beta, 1),
        r * tl.sum(stored_gamma, 1), c, c < C, split, tl.num_programs(0) // across, ROUNDS,
    )  # fmt: skip
    if WEIGHT:
        at = weights + split.to(tl.int64) * size + b[:, None] * C + c[None, :]
        inside = (c < C)[None, :]
        tl.store(at, tl.trans(acc0), inside & (b < B)[:, None])
        if BLOCKS > 1:
            tl.store(at + BB * C, tl.trans(acc1), inside & (b + BB < B)[:, None])
        if BLOCKS > 2:
            tl.store(at + 2 * BB * C, tl.trans(acc2), inside & (b + 2 * BB < B)[:, None])


def blocks(columns: int, precise: str) -> tuple[int, int]:
    """(width, count) of the accumulators that hold ``columns``."""
    if columns <= 128:
        # 64 of them are a product's rows on Hopper's tensor cores
        return power(columns, 16 if precise == "ieee" else 64), 1
    # without tensor cores a wider product does not fit the registers
    width = 64 if columns <= 192 or precise == "ieee" else 128
    return width, cdiv(columns, width)


def takes(dtype: torch.dtype, columns: int) -> bool:
    """Whether these kernels hold B = ``columns``: in float32, where dW takes the registers of two
    values in 16 bits, up to 256.
    """
    width, count = blocks(columns, precision(dtype))
    return count <= MAX_BLOCKS and width * count * dtype.itemsize <= 1024


@cached
def forward_configs(
    dtype: torch.dtype, precise: str, m: int, b: int, hopper: bool, processors: int
) -> tuple[Config, ...]:
    """Of :func:`forward_1x1`, the default first: rows, accumulator width, inner columns."""
    width, count = blocks(b, precise)
    if precise == "ieee":
        if width == 128:  # masks take registers
            return (Config(64, width, 16, 8, 1 if m % 64 or b < width else 2),)
        return (Config(64 if count == 1 else 16, width, 32, 8, 2),)
    if dtype == torch.float32:
        low = Config(64, width, 32, 8, 2)
        return (Config(128, width, 32, 8, 2), low) if count == 1 else (low,)
    if count > 1:
        return Config(64, width, 32, 8, 3), Config(64, width, 32, 8, 2)
    if hopper:
        # With few warps a thread has more rows of a channel, whose vectors it makes for itself, and
        # two programs share a multiprocessor. With three stages X is under way a step ahead.
        tall = Config(128, width, 64, 4, 3), Config(128, width, 64, 4, 2)
        if m % 128:
            tall = (Config(128, width, 64, 8, 3),)  # masks of rows take registers
        low = Config(64, width, 64, 4, 3)
        return (*tall, low) if m >= 512 * processors else (low, *tall)
    # W is read once per tile: tall tiles, as long as there are enough to fill a GPU
    tall = Config(256, width, 32, 16, 3)
    low = Config(128, width, 32, 8 if width > 64 else 4, 3)
    if m >= 512 * processors:
        return tall, low
    return (low, tall) if m >= 128 * processors else (Config(64, width, 32, 8, 3), low)


def roomy(m: int, dtype: torch.dtype) -> bool:
    """Whether :func:`gradients_1x1` needs no masks of m rows and reads G in 16 bits."""
    return m % 64 == 0 and dtype.itemsize == 2


@cached
def gradient_configs(
    dtype: torch.dtype, precise: str, b: int, hopper: bool, roomy: bool
) -> tuple[Config, ...]:
    """Of :func:`gradients_1x1`: rows at a time, columns of X, width of dY's parts. A program waits
    at barriers for most of its time, so that several share a multiprocessor where registers allow;
    ``roomy``: none go to masks of rows and to a G in 32 bits.
    """
    width, count = blocks(b, precise)
    wide = width * count
    if precise == "ieee":
        return (Config(16, 32 if count == 1 else 16, width, 8, 1),)
    if dtype == torch.float32:
        return (Config(32 if hopper and count == 1 else 16, 64, width, 8, 2),)
    if hopper and count == 1:
        low = Config(32, 64, width, 4, 3, 2)
        if not roomy:
            return (low,)
        tall = Config(64, 64, width, 4, 3, 2), Config(64, 64, width, 4, 2, 2)
        # the last reads dY half as often
        return (*tall, low, Config(32, 128, width, 8, 2))
    if hopper:
        return (Config(32, 128 if roomy and wide <= 256 else 64, width, 8, 2),)
    if wide == 64:
        return (Config(32, 64, width, 4, 2, 2),)
    # warps stand above each other there, 16 channels each; registers hold so much of dW
    tile = {128: (32 if roomy else 16, 128), 192: (16, 128),
            256: (32, 64) if roomy else (64, 32), 384: (64, 32)}  # fmt: skip
    return (Config(*tile[wide], width, 8, 2),)


@cached
def _forward_plan(
    k: Config, precise: str, m: int, c: int, b: int, touched: tuple[int, int],
    strides: tuple[int, int], eps: float,
) -> Plan:  # fmt: skip
    tiles, count = cdiv(m, k.rows), blocks(b, precise)[1]
    return Plan(
        forward_1x1,
        (tiles,),
        (m, c, *touched, b, *strides, eps, tiles, b * tiles),
        (
            k.rows, k.columns, k.inner, count, m % k.rows == 0, b == k.columns * count,
            touched[0] > c, precise,
        ),
        k.warps,
        k.stages,
        k.registers,
    )  # fmt: skip


def forward(x: Tensor, read: Reader, weight: Tensor, moments: Tensor | None) -> Tensor:
    """Y of X (M, C) and W (B, C), and its statistics where ``moments`` (2, B) wants them."""
    (m, c), b, precise = x.shape, len(weight), precision(x.dtype)
    device = x.device
    candidates = forward_configs(x.dtype, precise, m, b, hopper(device), multiprocessors(device))
    k = choose("forward_1x1", x.dtype, (m, c, b), candidates)
    y = x.new_empty((m, b))
    partial = None if moments is None else moments_partial(x, b, cdiv(m, k.rows))
    touched, strides = (readable(x), readable(weight)), (x.stride(0), weight.stride(0))
    plan = _forward_plan(k, precise, m, c, b, touched, strides, read.eps)
    plan(x, weight, read.mean, read.var, read.weight, read.bias, y, partial)
    if moments is not None:
        merge(partial, moments, m, k.rows)
    return y


@cached
def _gradients_plan(
    k: Config, precise: str, m: int, c: int, b: int, touched: tuple[int, int, int],
    strides: tuple[int, ...], eps: float,
    splits: int, need_weight: bool, seeded: bool, rounds: bool,
) -> Plan:  # fmt: skip
    across, count = cdiv(c, k.columns), blocks(b, precise)[1]
    return Plan(
        gradients_1x1,
        (across * splits,),
        (
            m, c, *touched, b, *strides, eps,
            across, share_of(m, splits, k.rows), c * splits, b * c,
        ),
        (
            k.rows, k.columns, k.inner, count, need_weight, seeded, rounds, m % k.rows == 0,
            precise, k.stages,
        ),
        k.warps,
        k.stages,
        k.registers,
    )  # fmt: skip


def gradient_splits(k: Config, m: int, c: int, processors: int) -> int:
    """How many programs share the rows: enough to fill a GPU, few enough to keep partial results
    small beside what they read.
    """
    splits = max(1, min(processors * k.resident // cdiv(c, k.columns), m // SPLIT_ROWS))
    return cdiv(m, share_of(m, splits, k.rows))


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
    candidates = gradient_configs(x.dtype, precise, b, hopper(x.device), roomy(m, g.dtype))
    k = choose("gradients_1x1", x.dtype, (m, c, b), candidates)
    splits = gradient_splits(k, m, c, multiprocessors(x.device))
    partial = sums_partial(x, c, splits, into)
    weights = x.new_empty((splits, b, c), dtype=torch.float32) if need_weight else None
    plan = _gradients_plan(
        k, precise, m, c, b, (readable(x), readable(weight), readable(g) if into.seeded else c),
        (dy.stride(0), weight.stride(0), x.stride(0), g.stride(0)),
        read.eps, splits, need_weight, into.seeded, into.rounds,
    )  # fmt: skip
    plan(dy, weight, x, read.mean, read.var, read.weight, read.bias, g, partial, weights)
    return merge_sums(partial, read, into, weights)
