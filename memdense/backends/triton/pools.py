"""Norm, relu and what pools behind them: the stem's max-pool, the tails of a block.

Specification: ``bn_relu``, ``bn_relu_mean``, ``bn_relu_pool_conv1x1``, ``bn_relu_maxpool`` and
their ``_backward`` of the reference backend. The 1x1 convolution behind a pool is PyTorch's matrix
product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...buffers import Geometry, Into, NormGradient, Reader, Sums, new_matrix
from .launch import Plan, kernel
from .reduce import merge_sums, sums_partial
from .shared import (
    answer,
    behind_vectors,
    floats,
    norm_vectors,
    relu,
    store_sums,
    tile_of,
    walk_of,
)
from .tiles import cached, cdiv, power, readable, tiling, walk

# ---- tails, forward


@kernel
def norm_rows(
    x, mean, var, weight, bias, out,
    M, C, CX, ldx, eps,
    BM: tl.constexpr, BC: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """out = s*X + t, through relu where RELU; X, out [M, C]. CX columns of X may be read."""
    tile, c = tile_of(C, BC)
    row = tl.arange(0, BM)
    valid = (tile * BM + row < M)[:, None]
    top = tile.to(tl.int64) * BM
    s, t, _, _ = norm_vectors(mean, var, weight, bias, eps, c, c < C)
    x += top * ldx + row[:, None] * ldx
    z = floats(tl.load(x + c[None, :], valid & (c < CX)[None, :], 0.0))
    z = z * s[None, :] + t[None, :]
    if RELU:
        z = relu(z)
    out += top * C + row[:, None] * C
    tl.store(out + c[None, :], z.to(out.dtype.element_ty), valid & (c < C)[None, :])


@kernel
def mean_images(
    x, mean, var, weight, bias, out,
    P, C, CX, ldx, eps,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out [N, C] = the mean over an image's P rows of relu(s*X + t); X [N*P, C]."""
    image, c = tile_of(C, BC)
    row = tl.arange(0, BM)
    s, t, _, _ = norm_vectors(mean, var, weight, bias, eps, c, c < C)
    x += image.to(tl.int64) * P * ldx
    total = tl.zeros([BM, BC], tl.float32)
    for start in range(0, P, BM):
        valid = (start + row < P)[:, None]
        z = tl.load(x + row[:, None] * ldx + c[None, :], valid & (c < CX)[None, :], 0.0)
        z = relu(floats(z) * s[None, :] + t[None, :])
        total += tl.where(valid, z, 0.0)
        x += BM * ldx
    out += image.to(tl.int64) * C
    tl.store(out + c, (tl.sum(total, 0) / P).to(out.dtype.element_ty), c < C)


@kernel
def pool_quads(
    x, mean, var, weight, bias, out,
    H, W, M, C, CX, CO, ldx, ldo, eps,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out [M, C] = the 2x2 means of relu(s*X + t) over images of H x W rows of X; M = N*(H//2)*
    (W//2). CX columns of X may be read, CO of out written.
    """
    tile, c = tile_of(C, BC)
    row = tl.arange(0, BM)
    quad = tile * BM + row
    mask = (quad < M)[:, None] & (c < CX)[None, :]
    line = quad // (W // 2)
    image = line // (H // 2)
    pixel = (image * H + line % (H // 2) * 2) * W + quad % (W // 2) * 2
    s, t, _, _ = norm_vectors(mean, var, weight, bias, eps, c, c < C)
    x += pixel.to(tl.int64)[:, None] * ldx + c[None, :]
    total = tl.zeros([BM, BC], tl.float32)
    for i in tl.static_range(4):
        z = floats(tl.load(x + (i // 2 * W + i % 2) * ldx, mask, 0.0))
        total += relu(z * s[None, :] + t[None, :])
    out += tile.to(tl.int64) * BM * ldo + row[:, None] * ldo + c[None, :]
    total = tl.where((c < C)[None, :], total * 0.25, 0.0)
    tl.store(out, total.to(out.dtype.element_ty), (quad < M)[:, None] & (c < CO)[None, :])


# ---- tails, backward


@kernel
def answer_rows(
    d, x, mean, var, weight, bias, g, partial,
    H, W, M, C, CD, CX, CG, ldd, ldx, ldg, eps, share, walkers, plane,
    BM: tl.constexpr, BC: tl.constexpr, FROM: tl.constexpr,
    RELU: tl.constexpr, SEEDED: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """dZ = dA*[s*X + t > 0], G += s*dZ, and each walk's sums at partial [4, C, walkers]; X, G
    [M, C].

    dA is d's row of the same number, or FROM "images" of H x W rows, d's row of the image over H*W;
    or FROM "quads" of 2x2, d's row of the quad over 4, a last odd line or column having none. CD,
    CX and CG columns of d, X and G may be touched.
    """
    walker, first, last, c = walk_of(C, M, share, BC)
    row = tl.arange(0, BM)
    s, t, mu, _ = norm_vectors(mean, var, weight, bias, eps, c, c < C)
    x += first.to(tl.int64) * ldx + row[:, None] * ldx + c[None, :]
    g += first.to(tl.int64) * ldg + row[:, None] * ldg + c[None, :]
    dbeta = tl.zeros([BM, BC], tl.float32)
    dgamma = dbeta
    stored_beta = dbeta
    stored_gamma = dbeta
    for start in tl.range(first, last, BM, num_stages=3):  # or else nothing is loaded ahead
        pixel = start + row
        valid = pixel < last
        answered = valid
        part = 1.0
        if FROM == "images":
            source = pixel // (H * W)
            part = 1.0 / (H * W)
        elif FROM == "quads":
            line = pixel // W
            i = line % H // 2
            j = pixel % W // 2
            answered = valid & (i < H // 2) & (j < W // 2)
            source = (line // H * (H // 2) + i) * (W // 2) + j
            part = 0.25
        else:
            source = pixel
        answered = answered[:, None]
        inside = answered & (c < C)[None, :]
        at = d + source.to(tl.int64)[:, None] * ldd + c[None, :]
        da = floats(tl.load(at, answered & (c < CD)[None, :], 0.0)) * part
        values = tl.load(x, answered & (c < CX)[None, :], 0.0)
        touched = answered if SEEDED else valid[:, None]
        dz, turned, taken, taken_turned = answer(
            da, values, s[None, :], t[None, :], mu[None, :],
            g, touched & (c < CG)[None, :], inside, RELU, SEEDED,
        )  # fmt: skip
        dbeta += dz
        dgamma += turned
        if ROUNDS:
            stored_beta += taken
            stored_gamma += taken_turned
        x += BM * ldx
        g += BM * ldg
    _, _, _, r = norm_vectors(
        mean, var, weight, bias, eps, c, c < C
    )  # again: the loop lacks registers
    store_sums(
        partial, plane, tl.sum(dbeta, 0), r * tl.sum(dgamma, 0), tl.sum(stored_beta, 0),
        r * tl.sum(stored_gamma, 0), c, c < C, walker, walkers, ROUNDS,
    )  # fmt: skip


# ---- the stem


@triton.jit
def strip_of(N_LINES, SEGMENTS, C, BC: tl.constexpr, LINES: tl.constexpr):
    """(image, first line, segment, tile, channels) of a program that walks down LINES lines of
    windows, of N_LINES in an image, in one of SEGMENTS segments.
    """
    tile, c = tile_of(C, BC)
    strips = tl.cdiv(N_LINES, LINES)
    strip = tile // SEGMENTS
    return strip // strips, strip % strips * LINES, tile % SEGMENTS, tile, c


@triton.jit
def later(a, a_at, b, b_at):
    """The maximum of a and b, which is later, and its place: the first of equals, the last NaN."""
    wins = (b > a) | (b != b)
    return tl.where(wins, b, a), tl.where(wins, b_at, a_at)


@triton.jit
def line_maximum(x, column, s, t, line_inside, inside, W, ldx, INSIDE: tl.constexpr):
    """Of relu(s*X + t) over columns 2j - 1 to 2j + 1 of a line, column = 2j; -1 outside of it.
    INSIDE: the line is, and so is all of it but column -1.
    """
    value = tl.full(inside.shape, -1.0, tl.float32)
    at = tl.zeros(inside.shape, tl.int32)
    for i in tl.static_range(3):
        mask = inside
        if i == 0:
            mask &= (column > 0)[:, None]
        if not INSIDE:
            mask &= (column + (i - 1) < W)[:, None] & line_inside
        z = relu(floats(tl.load(x + (i - 1) * ldx, mask, 0.0)) * s + t)
        if i == 0:
            value = tl.where(mask, z, -1.0)
        elif INSIDE:
            value, at = later(value, at, z, i)
        else:
            value, at = later(value, at, tl.where(mask, z, -1.0), i)
    return value, at


@kernel
def maxpool(
    x, mean, var, weight, bias, out, winner,
    H, W, H2, W2, C, CX, ldx, eps, segments,
    BW: tl.constexpr, BC: tl.constexpr, LINES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out [M', C] = the maxima of relu(s*X + t) over windows of 3x3, stride 2, padding 1, and where
    in its window each stands, 0 to 8 in reading order; X [N*H*W, C], M' = N*H2*W2.

    A program walks down LINES windows, BW side by side; a window's last line is the next one's
    first. EVEN: H and W are.
    """
    image, first, segment, _, c = strip_of(H2, segments, C, BC, LINES)
    column = segment * BW + tl.arange(0, BW)
    s, t, _, _ = norm_vectors(mean, var, weight, bias, eps, c, c < C)
    s = s[None, :]
    t = t[None, :]
    readable = (column < W2)[:, None] & (c < CX)[None, :]
    writable = (column < W2)[:, None] & (c < C)[None, :]
    x += (image.to(tl.int64) * H + 2 * first) * W * ldx
    x += 2 * column[:, None] * ldx + c[None, :]
    to = (image.to(tl.int64) * H2 + first) * W2 * C + column[:, None] * C + c[None, :]
    step = W * ldx
    top, top_at = line_maximum(x - step, 2 * column, s, t, first > 0, readable, W, ldx, False)
    for line in range(first, tl.minimum(first + LINES, H2)):
        value, at = line_maximum(x, 2 * column, s, t, 2 * line < H, readable, W, ldx, EVEN)
        value, at = later(top, top_at, value, at + 3)
        top, top_at = line_maximum(
            x + step, 2 * column, s, t, 2 * line + 1 < H, readable, W, ldx, EVEN
        )
        value, at = later(value, at, top, top_at + 6)
        tl.store(out + to, value.to(out.dtype.element_ty), writable)
        tl.store(winner + to, at.to(tl.uint8), writable)
        x += 2 * step
        to += W2 * C


@triton.jit
def unpool_pixel(
    da, values, out, s, t, mu, r, a, b, c, inside, beta, gamma, BATCH: tl.constexpr
):  # fmt: skip
    """dZ = dA*[s*X + t > 0], where dA is 0 outside: out takes a*dZ + b*X + c where ``inside``;
    without it two sums take dZ and dZ*x_hat.
    """
    values = floats(values)
    dz = tl.where(values * s + t <= 0.0, 0.0, da)
    if out is not None:
        dz *= a
        if BATCH:
            dz += b * values + c
        tl.store(out, dz.to(out.dtype.element_ty), inside)
    else:
        beta += dz
        gamma += dz * ((values - mu) * r)
    return beta, gamma


@triton.jit
def won(d, at, place):
    """d where the window's winner stands at ``place``."""
    return tl.where(at == place, floats(d), 0.0)


@kernel
def maxpool_gradient(
    d, winner, x, mean, var, weight, bias, dbeta, dgamma, out, partial,
    H, W, H2, W2, C, CX, ldx, ldo, eps, count, segments, tiles, plane,
    BW: tl.constexpr, BC: tl.constexpr, LINES: tl.constexpr, EVEN: tl.constexpr,
    BATCH: tl.constexpr,
):  # fmt: skip
    """With dZ = [s*X + t > 0] * the sum of d over the windows that a pixel won: out = a*dZ + b*X +
    c, which may be X, with X, out [N*H*W, C] and d, winner [N*H2*W2, C]; without an out each tile's
    sums of dZ and dZ*x_hat at partial [2, C, tiles].

    Pixels (2i, 2j) to (2i + 1, 2j + 1) lie in the windows (i, j) to (i + 1, j + 1) and no others. A
    program walks down LINES such quads, BW side by side. EVEN: H and W are.
    """
    image, first, segment, tile, c = strip_of(H2, segments, C, BC, LINES)
    column = segment * BW + tl.arange(0, BW)
    s, t, mu, r = norm_vectors(mean, var, weight, bias, eps, c, c < C)
    s = s[None, :]
    t = t[None, :]
    mu = mu[None, :]
    r = r[None, :]
    va = s
    vb = s
    vc = s
    if out is not None:
        va, vb, vc = behind_vectors(mean, var, weight, dbeta, dgamma, eps, count, c, c < C, BATCH)
        va = va[None, :]
        vb = vb[None, :]
        vc = vc[None, :]
        out += (image.to(tl.int64) * H + 2 * first) * W * ldo + 2 * column[:, None] * ldo
        out += c[None, :]
    left = (column < W2)[:, None] & (c < C)[None, :]
    right = (column + 1 < W2)[:, None] & (c < C)[None, :]
    odd = left
    if not EVEN:
        odd &= (2 * column + 1 < W)[:, None]
    readable = (column < W2)[:, None] & (c < CX)[None, :]
    odd_readable = readable
    if not EVEN:
        odd_readable &= (2 * column + 1 < W)[:, None]
    at = (image.to(tl.int64) * H2 + first) * W2 * C + column[:, None] * C + c[None, :]
    d += at
    winner += at
    x += (image.to(tl.int64) * H + 2 * first) * W * ldx + 2 * column[:, None] * ldx + c[None, :]
    beta = tl.zeros([BW, BC], tl.float32)
    gamma = beta
    d00 = tl.load(d, left, 0.0)
    d01 = tl.load(d + C, right, 0.0)
    w00 = tl.load(winner, left, 255)
    w01 = tl.load(winner + C, right, 255)
    for line in range(first, tl.minimum(first + LINES, H2)):
        d += W2 * C
        winner += W2 * C
        below = line + 1 < H2
        d10 = tl.load(d, left & below, 0.0)
        d11 = tl.load(d + C, right & below, 0.0)
        w10 = tl.load(winner, left & below, 255)
        w11 = tl.load(winner + C, right & below, 255)
        lower = True
        if not EVEN:
            lower = 2 * line + 1 < H
        # all four before anything is stored, which may be where they are
        x00 = tl.load(x, readable, 0.0)
        x01 = tl.load(x + ldx, odd_readable, 0.0)
        x10 = tl.load(x + W * ldx, readable & lower, 0.0)
        x11 = tl.load(x + (W + 1) * ldx, odd_readable & lower, 0.0)
        beside = out
        under = out
        across = out
        if out is not None:
            beside = out + ldo
            under = out + W * ldo
            across = out + (W + 1) * ldo
        beta, gamma = unpool_pixel(
            won(d00, w00, 4), x00, out, s, t, mu, r, va, vb, vc, left, beta, gamma, BATCH
        )  # fmt: skip
        beta, gamma = unpool_pixel(
            won(d00, w00, 5) + won(d01, w01, 3), x01, beside,
            s, t, mu, r, va, vb, vc, odd, beta, gamma, BATCH,
        )  # fmt: skip
        beta, gamma = unpool_pixel(
            won(d00, w00, 7) + won(d10, w10, 1), x10, under,
            s, t, mu, r, va, vb, vc, left & lower, beta, gamma, BATCH,
        )  # fmt: skip
        beta, gamma = unpool_pixel(
            won(d00, w00, 8) + won(d01, w01, 6) + won(d10, w10, 2) + won(d11, w11, 0),
            x11, across, s, t, mu, r, va, vb, vc, odd & lower, beta, gamma, BATCH,
        )  # fmt: skip
        x += 2 * W * ldx
        if out is not None:
            out += 2 * W * ldo
        d00 = d10
        d01 = d11
        w00 = w10
        w01 = w11
    if out is None:
        beta = tl.sum(beta, 0)
        gamma = tl.sum(gamma, 0)
        store_sums(partial, plane, beta, gamma, beta, gamma, c, c < C, tile, tiles, False)


# ---- their plans and calls


def _vectors(read: Reader) -> tuple[Tensor | None, ...]:
    return read.mean, read.var, read.weight, read.bias


@cached
def _norm_plan(m: int, c: int, touched: int, ldx: int, eps: float, relu: bool) -> Plan:
    rows, columns, programs = tiling(m, c)
    sizes = (m, c, touched, ldx, eps)
    return Plan(norm_rows, (programs,), sizes, (rows, columns, relu), warps=8)


def bn_relu(x: Tensor, read: Reader, relu: bool) -> Tensor:
    """(M, C), packed."""
    m, c = x.shape
    out = x.new_empty((m, c))
    _norm_plan(m, c, readable(x), x.stride(0), read.eps, relu)(x, *_vectors(read), out)
    return out


@cached
def _mean_plan(n: int, pixels: int, c: int, touched: int, ldx: int, eps: float) -> Plan:
    rows, columns = min(64, power(pixels)), min(128, power(c))
    sizes = (pixels, c, touched, ldx, eps)
    return Plan(mean_images, (n * cdiv(c, columns),), sizes, (rows, columns), warps=8)


def bn_relu_mean(x: Tensor, read: Reader, geometry: Geometry) -> Tensor:
    """(N, C)."""
    n, c = geometry.n, x.shape[1]
    out = x.new_empty((n, c))
    plan = _mean_plan(n, geometry.each, c, readable(x), x.stride(0), read.eps)
    plan(x, *_vectors(read), out)
    return out


@cached
def _pool_plan(
    geometry: Geometry, m: int, c: int, touched: int, ldx: int, ldo: int, eps: float
) -> Plan:
    columns = min(64, power(c))
    rows = min(2048 // columns, power(m))  # of four pixels each
    sizes = (geometry.h, geometry.w, m, c, touched, ldo, ldx, ldo, eps)
    grid = (cdiv(m, rows) * cdiv(c, columns),)
    return Plan(pool_quads, grid, sizes, (rows, columns))


def _pool(x: Tensor, read: Reader, geometry: Geometry) -> Tensor:
    """avg_pool2x2(relu(s*x + t)): (N * H//2 * W//2, C)."""
    m, c = geometry.halves.rows, x.shape[1]
    out = new_matrix(x, m, c)
    plan = _pool_plan(geometry, m, c, readable(x), x.stride(0), out.stride(0), read.eps)
    plan(x, *_vectors(read), out)
    return out


def bn_relu_pool_conv1x1(x: Tensor, read: Reader, weight: Tensor, geometry: Geometry) -> Tensor:
    """(N * H//2 * W//2, B)."""
    return torch.mm(_pool(x, read, geometry), weight.t())


@cached
def _answer_plan(
    source: str, geometry: Geometry, m: int, c: int, touched: tuple[int, int, int],
    strides: tuple[int, int, int], eps: float,
    relu: bool, seeded: bool, rounds: bool,
) -> Plan:  # fmt: skip
    rows, columns, across, walkers, share = walk(m, c)
    sizes = (geometry.h, geometry.w, m, c, *touched, *strides, eps, share, walkers, c * walkers)
    constants = (rows, columns, source, relu, seeded, rounds)
    # so that two programs share a multiprocessor
    return Plan(answer_rows, (across * walkers,), sizes, constants, warps=8, registers=128)


def _answer(
    d: Tensor, source: str, geometry: Geometry, x: Tensor, read: Reader, relu: bool, into: Into
) -> Sums:
    (m, c), g = x.shape, into.g
    partial = sums_partial(x, c, walk(m, c).walkers, into)
    plan = _answer_plan(
        source, geometry, m, c, (readable(d), readable(x), readable(g) if into.seeded else c),
        (d.stride(0), x.stride(0), g.stride(0)), read.eps,
        relu, into.seeded, into.rounds,
    )  # fmt: skip
    plan(d, x, *_vectors(read), g, partial)
    return merge_sums(partial, read, into)[0]


def bn_relu_backward(dout: Tensor, x: Tensor, read: Reader, relu: bool, into: Into) -> Sums:
    """Into G."""
    return _answer(dout, "rows", Geometry(1, 1, len(x)), x, read, relu, into)


def bn_relu_mean_backward(
    dout: Tensor, x: Tensor, read: Reader, geometry: Geometry, into: Into
) -> Sums:
    """Into G."""
    return _answer(dout, "images", Geometry(geometry.n, 1, geometry.each), x, read, True, into)


def bn_relu_pool_conv1x1_backward(
    dout: Tensor,
    weight: Tensor,
    x: Tensor,
    read: Reader,
    geometry: Geometry,
    into: Into,
    need_weight: bool,
) -> tuple[Sums, Tensor | None]:
    """Into G; the reader's sums and dW (B, C) in float32."""
    dweight = _product(dout.t(), _pool(x, read, geometry)) if need_weight else None
    dpooled = torch.mm(dout, weight, out=new_matrix(x, len(dout), x.shape[1]))
    return _answer(dpooled, "quads", geometry, x, read, True, into), dweight


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


WALK_LINES = 8  # lines of windows that a program walks down
BUSY = 1024  # programs that keep a large GPU busy


@cached
def _strips(
    dtype: torch.dtype, n: int, lines: int, width: int, c: int
) -> tuple[int, int, int, int, int]:
    """(windows side by side, channels, lines, segments of a line, tiles) of programs over n images
    of lines x width windows.
    """
    columns = min(64, power(c))
    # 8 in float16, whose conversions take registers, would not fit two programs' in backward
    values = 8 if dtype == torch.bfloat16 else 4  # a thread
    side = min(values * 256 // columns, power(width))
    segments, walk = cdiv(width, side), WALK_LINES
    while walk > 1 and n * cdiv(lines, walk) * segments * cdiv(c, columns) < BUSY:
        walk //= 2
    return side, columns, walk, segments, n * cdiv(lines, walk) * segments


@cached
def _maxpool_plan(
    dtype: torch.dtype, geometry: Geometry, c: int, touched: int, ldx: int, eps: float
) -> Plan:
    _, h, w = geometry
    n, h2, w2 = geometry.windows
    side, columns, walk, segments, tiles = _strips(dtype, n, h2, w2, c)
    sizes = (h, w, h2, w2, c, touched, ldx, eps, segments)
    constants = (side, columns, walk, not (h % 2 or w % 2))
    return Plan(maxpool, (tiles * cdiv(c, columns),), sizes, constants, warps=8)


def bn_relu_maxpool(x: Tensor, read: Reader, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Values (M', C) and winners (M', C), uint8."""
    m, c = geometry.windows.rows, x.shape[1]
    out, winner = x.new_empty((m, c)), x.new_empty((m, c), dtype=torch.uint8)
    plan = _maxpool_plan(x.dtype, geometry, c, readable(x), x.stride(0), read.eps)
    plan(x, *_vectors(read), out, winner)
    return out, winner


@cached
def _maxpool_gradient_plan(
    dtype: torch.dtype, geometry: Geometry, c: int, touched: int, strides: tuple[int, int],
    eps: float, count: int, batch: bool,
) -> Plan:  # fmt: skip
    _, h, w = geometry
    n, h2, w2 = geometry.windows
    side, columns, walk, segments, tiles = _strips(dtype, n, h2, w2, c)
    sizes = (h, w, h2, w2, c, touched, *strides, eps, count, segments, tiles, c * tiles)
    constants = (side, columns, walk, not (h % 2 or w % 2), batch)
    # so that two programs share a multiprocessor
    return Plan(
        maxpool_gradient, (tiles * cdiv(c, columns),), sizes, constants, warps=8, registers=128
    )


def bn_relu_maxpool_sums(
    dout: Tensor, winner: Tensor, x: Tensor, read: Reader, geometry: Geometry
) -> Sums:
    """Of dz (M, C)."""
    c = x.shape[1]
    partial = sums_partial(x, c, _strips(x.dtype, *geometry.windows, c)[-1], None)
    plan = _maxpool_gradient_plan(
        x.dtype, geometry, c, readable(x), (x.stride(0), 0), read.eps, 0, False
    )
    plan(dout, winner, x, *_vectors(read), None, None, None, partial)
    return merge_sums(partial, read, None)[0]


def bn_relu_maxpool_backward(
    dout: Tensor, winner: Tensor, x: Tensor, behind: NormGradient, geometry: Geometry, out: Tensor
) -> None:
    """The gradient of x (M, C) into out."""
    read = behind.read
    plan = _maxpool_gradient_plan(
        x.dtype, geometry, x.shape[1], readable(x), (x.stride(0), out.stride(0)), read.eps,
        behind.rows, read.batch,
    )  # fmt: skip
    plan(dout, winner, x, *_vectors(read), *behind.sums, out, None)
