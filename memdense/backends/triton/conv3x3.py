"""bn-relu-conv3x3, any dilation: forward, input gradient and weight gradient.

Specification: ``bn_relu_conv3x3`` and ``bn_relu_conv3x3_backward`` of the reference backend.

A pixel m lies at line y and column x of its image. Tap (ky, kx) of the kernel meets the pixel at
(y + (ky - 1)*dilation_y, x + (kx - 1)*dilation_x), which is row m + shift of the matrix, or nothing
outside the image: padding is 0 after the ReLU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...buffers import Geometry, Into, Reader, Sums
from .launch import Plan, kernel
from .reduce import merge, merge_sums, moments_partial, sums_partial
from .shared import add_product, answer, floats, norm_vectors, relu, store_moments, store_sums
from .tiles import cached, cdiv, multiprocessors, power, precision, readable, share_of
from .tuning import Config

SPLIT_ROWS = 512  # the fewest that a split of the weight's gradient is worth


@triton.jit
def _inside(y, x, down, right, H, W):
    """Whether the pixel ``down`` and ``right`` of (y, x) lies in the image."""
    return (y + down >= 0) & (y + down < H) & (x + right >= 0) & (x + right < W)


@triton.jit
def _tap(
    x, w, valid, py, px, columns, weights, H, W, DY, DX, line, step, sy, sx, TAP: tl.constexpr
):  # fmt: skip
    """One tap's tiles of X and W, and which rows meet a pixel: x and w point to the centre and to
    tap 0; a line down is ``line`` values on in X and sy in W, a column ``step`` and sx.
    """
    ky: tl.constexpr = TAP // 3
    kx: tl.constexpr = TAP % 3
    inside = valid & _inside(py, px, (ky - 1) * DY, (kx - 1) * DX, H, W)[:, None]
    at = x + (ky - 1) * line + (kx - 1) * step
    return tl.load(at, inside & columns, 0.0), tl.load(w + ky * sy + kx * sx, weights, 0.0), inside


@triton.jit
def _convolve(
    x, w, mean, var, weight, bias, tile, n,
    M, H, W, C, CX, N, DY, DX, ldx, line, step, sc, sn, sy, sx, eps,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM rows and columns n of conv3x3(relu(s*X + t), W), of conv3x3(X, W) where there is no mean,
    for X [M, C] and W [N, C, 3, 3] with strides sn, sc, sy, sx.

    The nine taps of some channels follow each other: most of their reads hit the nearest cache. The
    next tap is under way while this one is multiplied.
    """
    row = tl.arange(0, BM)
    pixel = tile * BM + row
    valid = (pixel < M)[:, None]
    px = pixel % W
    py = pixel // W % H
    x += tile.to(tl.int64) * BM * ldx
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, C, BK):
        c = start + tl.arange(0, BK)
        columns = (c < CX)[None, :]
        weights = (c < C)[:, None] & (n < N)[None, :]
        at = x + row[:, None] * ldx + c[None, :]
        of = w + n[None, :] * sn + c[:, None] * sc
        if mean is not None:
            s, t, _, _ = norm_vectors(mean, var, weight, bias, eps, c, c < C)
        values, taps, inside = _tap(
            at, of, valid, py, px, columns, weights, H, W, DY, DX, line, step, sy, sx, 0
        )
        for tap in tl.static_range(9):
            z, b, there = values, taps, inside
            if RAGGED:
                z = tl.where((c < C)[None, :], z, 0.0)
            if tap < 8:
                values, taps, inside = _tap(
                    at, of, valid, py, px, columns, weights,
                    H, W, DY, DX, line, step, sy, sx, tap + 1,
                )  # fmt: skip
            if mean is not None:
                z = relu(floats(z) * s[None, :] + t[None, :])
                # a minimum, since a select would cost three instructions where values are 16 bits
                z = tl.minimum(z, tl.where(there, float("inf"), 0.0), tl.PropagateNan.ALL)
                z = z.to(x.dtype.element_ty)
            acc = add_product(acc, z, b, PRECISION)
    return acc


@kernel
def forward_3x3(
    x, w, mean, var, weight, bias, keep, out, partial,
    M, H, W, C, CX, K, DY, DX, ldx, line, step, sk, sc, sy, sx, ldk, ldo, eps, factor, tiles, plane,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT = conv3x3(relu(s*X + t), W) * keep * factor for X [M, C], W [K, C, 3, 3], keep and OUT
    [M, K], with each tile's statistics of OUT as stored at partial [2, K, tiles]; keep and partial
    where they are given.

    A program owns BM rows and BN columns. CX columns of X may be read.
    """
    tile = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = _convolve(
        x, w, mean, var, weight, bias, tile, n,
        M, H, W, C, CX, K, DY, DX, ldx, line, step, sc, sk, sy, sx, eps,
        BM, BN, BK, RAGGED, PRECISION,
    )  # fmt: skip
    row = tl.arange(0, BM)
    valid = (tile * BM + row < M)[:, None]
    mask = valid & (n < K)[None, :]
    if keep is not None:
        keep += tile.to(tl.int64) * BM * ldk
        kept = tl.load(keep + row[:, None] * ldk + n[None, :], mask, False)
        acc *= kept.to(tl.float32) * factor
    stored = acc.to(out.dtype.element_ty)
    out += tile.to(tl.int64) * BM * ldo
    tl.store(out + row[:, None] * ldo + n[None, :], stored, mask)
    if partial is not None:
        count = tl.minimum(M - tile * BM, BM)
        values = floats(stored)
        store_moments(partial, plane, values, valid, count, n, n < K, tile, tiles)


@kernel
def input_gradient_3x3(
    dy, w, x, mean, var, weight, bias, g, partial,
    M, H, W, C, CX, CG, K, CK, DY, DX, ldy, line, step, sk, sc, sy, sx, ldx, ldg, eps, tiles, plane,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    INTO: tl.constexpr, SEEDED: tl.constexpr, ROUNDS: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA = sum over taps of dY[m - shift] @ W[:, :, tap], dZ = dA*[s*X + t > 0], with INTO
    G += s*dZ, else G = dZ, and each tile's sums at partial [2 or 4, C, tiles], without INTO of dZ
    as stored; dY [M, K], W [K, C, 3, 3], X, G [M, C].

    That is a convolution by the turned kernel. A program owns BM rows and BC columns. CX, CG and CK
    columns of X, G and dY may be touched.
    """
    tile = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    da = _convolve(
        dy, w + 2 * sy + 2 * sx, None, None, None, None, tile, c,
        M, H, W, K, CK, C, DY, DX, ldy, line, step, sk, sc, -sy, -sx, eps,
        BM, BC, BK, RAGGED, PRECISION,
    )  # fmt: skip
    row = tl.arange(0, BM)
    valid = (tile * BM + row < M)[:, None]
    inside = valid & (c < C)[None, :]
    s, t, mu, r = norm_vectors(mean, var, weight, bias, eps, c, c < C)
    x += tile.to(tl.int64) * BM * ldx
    values = tl.load(x + row[:, None] * ldx + c[None, :], valid & (c < CX)[None, :], 0.0)
    g += tile.to(tl.int64) * BM * ldg
    at = g + row[:, None] * ldg + c[None, :]
    if INTO:
        dz, turned, taken, taken_turned = answer(
            da, values, s[None, :], t[None, :], mu[None, :],
            at, valid & (c < CG)[None, :], inside, True, SEEDED,
        )  # fmt: skip
        dbeta = tl.sum(dz, 0)
        dgamma = r * tl.sum(turned, 0)
        stored_beta = tl.sum(taken, 0)
        stored_gamma = r * tl.sum(taken_turned, 0)
    else:
        wide = floats(values)
        dz = tl.where(inside & ~(wide * s[None, :] + t[None, :] <= 0.0), da, 0.0)
        stored = dz.to(g.dtype.element_ty)
        tl.store(at, stored, inside)
        dz = floats(stored)  # whoever takes the sums reads what was stored
        x_hat = tl.where(inside, (wide - mu[None, :]) * r[None, :], 0.0)
        dbeta = tl.sum(dz, 0)
        dgamma = tl.sum(dz * x_hat, 0)
        stored_beta = dbeta
        stored_gamma = dgamma
    store_sums(
        partial, plane, dbeta, dgamma, stored_beta, stored_gamma, c, c < C, tile, tiles, ROUNDS
    )


@triton.jit
def _meeting(
    dy, x, start, last, py, px, c, j, j4, tap, H, W, CX, CK, DY, DX, ldy, ldx, line, step,
    BM: tl.constexpr,
):  # fmt: skip
    """BM rows of X from row ``start`` on, and the rows of dY that meet them: through four taps side
    by side, where column i is output j4[i] through tap[i]; through the centre; through the last
    four. x and dy point to row ``start``.
    """
    row = tl.arange(0, BM)
    valid = (start + row < last)[:, None]
    dy += row[:, None] * ldy
    values = tl.load(x + row[:, None] * ldx + c[None, :], valid & (c < CX)[None, :], 0.0)
    centre = tl.load(dy + j[None, :], valid & (j < CK)[None, :], 0.0)
    outputs = valid & (j4 < CK)[None, :]
    down = (1 - tap // 3)[None, :]
    right = (1 - tap % 3)[None, :]
    inside = outputs & _inside(py[:, None], px[:, None], down * DY, right * DX, H, W)
    before = tl.load(dy + (j4[None, :] + down * line + right * step), inside, 0.0)
    down = (1 - (tap + 5) // 3)[None, :]
    right = (1 - (tap + 5) % 3)[None, :]
    inside = outputs & _inside(py[:, None], px[:, None], down * DY, right * DX, H, W)
    after = tl.load(dy + (j4[None, :] + down * line + right * step), inside, 0.0)
    return values, before, centre, after


@kernel
def weight_gradient_3x3(
    dy, x, mean, var, weight, bias, partial,
    M, H, W, C, CX, K, CK, DY, DX, ldy, line, step, ldx, eps, share, lines, columns, size,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW[:, :, tap] = sum over m of dY[m - shift]^T @ relu(s*X[m] + t) for dY [M, K], X [M, C]: the
    sum over one split's ``share`` rows m at partial [splits, K, C, 3, 3], size = K*C*9.

    A program owns BK by BC by 9 of it: X is read once and meets dY through four taps, four more,
    and the centre. BM rows on lie ``lines`` lines and ``columns`` columns. What stands behind C and
    K stays in rows and columns of the product that nobody stores.
    """
    split = tl.program_id(2)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    j = tl.program_id(1) * BK + tl.arange(0, BK)
    i = tl.arange(0, 4 * BK)
    j4 = tl.program_id(1) * BK + i % BK
    tap = i // BK
    row = tl.arange(0, BM)
    first = split * share
    last = tl.minimum(first + share, M)
    px = (first + row) % W
    py = (first + row) // W % H
    dy += split.to(tl.int64) * share * ldy
    x += split.to(tl.int64) * share * ldx
    s, t, _, _ = norm_vectors(mean, var, weight, bias, eps, c, c < C)
    before = tl.zeros([BC, 4 * BK], tl.float32)
    after = before
    centre = tl.zeros([BC, BK], tl.float32)
    values, d0, d4, d5 = _meeting(
        dy, x, first, last, py, px, c, j, j4, tap, H, W, CX, CK, DY, DX, ldy, ldx, line, step, BM
    )
    for start in range(first, last, BM):
        z = relu(values.to(tl.float32) * s[None, :] + t[None, :])
        z = tl.trans(z.to(x.dtype.element_ty))
        b0, b4, b5 = d0, d4, d5
        px += columns
        wrap = px >= W
        px = tl.where(wrap, px - W, px)
        py += lines + wrap.to(tl.int32)
        py = tl.where(py >= H, py - H, py)
        dy += BM * ldy
        x += BM * ldx
        values, d0, d4, d5 = _meeting(
            dy, x, start + BM, last, py, px, c, j, j4, tap,
            H, W, CX, CK, DY, DX, ldy, ldx, line, step, BM,
        )  # fmt: skip
        before = add_product(before, z, b0, PRECISION)
        centre = add_product(centre, z, b4, PRECISION)
        after = add_product(after, z, b5, PRECISION)
    partial += split.to(tl.int64) * size + c[:, None] * 9
    at = partial + j4[None, :] * C * 9 + tap[None, :]
    inside = (c < C)[:, None]
    tl.store(at, before, inside & (j4 < K)[None, :])
    tl.store(at + 5, after, inside & (j4 < K)[None, :])
    tl.store(partial + j[None, :] * C * 9 + 4, centre, inside & (j < K)[None, :])


def reachable(geometry: Geometry, dilation: tuple[int, int], stride: int) -> bool:
    """Whether the taps of a pixel lie within 32-bit offsets of it."""
    return (dilation[0] * geometry.w + dilation[1]) * stride < 2**30


def forward_config(dtype: torch.dtype, precise: str, c: int, k: int) -> Config:
    """Columns are outputs, the inner ones input channels."""
    if precise == "ieee":
        return Config(64, min(power(k), 32), 16, 8 if k <= 16 else 4, 1)
    columns = min(power(k), 64)
    # nine taps are unrolled: registers are scarce
    inner = 16 if columns == 64 or dtype == torch.float32 else min(power(c), 32)
    return Config(64, columns, inner, 4, 1)


def input_config(precise: str, c: int, k: int, into: bool) -> Config:
    """Columns are input channels, the inner ones outputs."""
    if precise == "ieee":
        return Config(64, min(power(c), 32), 16, 4, 1)
    # with few outputs, or ones that come 2 bytes at a time, or sums of what G took in, four spill
    warps = 8 if k <= 16 or k % 16 or into else 4
    return Config(64, min(power(c), 64), min(power(k), 32), warps, 1)


def weight_config(dtype: torch.dtype, precise: str, c: int, k: int) -> Config:
    """Columns are input channels, the inner ones outputs."""
    if precise == "ieee":
        return Config(16, min(power(c), 32), 16, 8, 1)
    rows = 16 if dtype == torch.float32 else 32
    # outputs that come 2 bytes at a time take registers
    return Config(rows, min(power(c), 64), 16 if k % 16 else min(power(k), 32), 8, 1)


def _shifts(dilation: tuple[int, int], width: int, stride: int) -> tuple[int, int]:
    """How far the next tap's values are, a line down and a column right."""
    return dilation[0] * width * stride, dilation[1] * stride


@cached
def _forward_plan(
    dtype: torch.dtype, precise: str, geometry: Geometry, c: int, k: int,
    dilation: tuple[int, int], touched: int,
    strides: tuple[int, ...], eps: float, factor: float, tiles: int,
) -> Plan:  # fmt: skip
    config = forward_config(dtype, precise, c, k)
    _, h, w = geometry
    ldx, *rest = strides
    return Plan(
        forward_3x3,
        (tiles, cdiv(k, config.columns)),
        (
            geometry.rows, h, w, c, touched, k, *dilation,
            ldx, *_shifts(dilation, w, ldx), *rest, eps, factor, tiles, k * tiles,
        ),
        (config.rows, config.columns, config.inner, touched != c, precise),
        config.warps,
        config.stages,
    )  # fmt: skip


def forward(
    x: Tensor,
    read: Reader,
    weight: Tensor,
    dilation: tuple[int, int],
    geometry: Geometry,
    out: Tensor,
    keep: tuple[Tensor, float] | None,
    moments: Tensor | None,
) -> None:
    """Into out (M, k), and its statistics where ``moments`` (2, k) wants them."""
    (m, c), k, precise = x.shape, len(weight), precision(x.dtype)
    rows = forward_config(x.dtype, precise, c, k).rows
    tiles = cdiv(m, rows)
    partial = None if moments is None else moments_partial(x, k, tiles)
    mask, factor = (None, 1.0) if keep is None else keep
    plan = _forward_plan(
        x.dtype, precise, geometry, c, k, dilation, readable(x),
        (x.stride(0), *weight.stride(), 0 if mask is None else mask.stride(0), out.stride(0)),
        read.eps, factor, tiles,
    )  # fmt: skip
    plan(x, weight, read.mean, read.var, read.weight, read.bias, mask, out, partial)
    if moments is not None:
        merge(partial, moments, m, rows)


@cached
def _input_plan(
    precise: str, geometry: Geometry, c: int, k: int,
    dilation: tuple[int, int], touched: tuple[int, int, int],
    strides: tuple[int, ...], eps: float, into: bool, seeded: bool, rounds: bool, tiles: int,
) -> Plan:  # fmt: skip
    config = input_config(precise, c, k, into)
    _, h, w = geometry
    ldy, *rest, ldx, ldg = strides
    cx, cg, ck = touched
    return Plan(
        input_gradient_3x3,
        (tiles, cdiv(c, config.columns)),
        (
            geometry.rows, h, w, c, cx, cg, k, ck, *dilation,
            ldy, *_shifts(dilation, w, ldy), *rest, ldx, ldg, eps, tiles, c * tiles,
        ),
        (
            config.rows, config.columns, config.inner, into, seeded, rounds, ck != k, precise,
        ),
        config.warps,
        config.stages,
    )  # fmt: skip


@cached
def _weight_plan(
    dtype: torch.dtype, precise: str, geometry: Geometry, c: int, k: int,
    dilation: tuple[int, int], touched: tuple[int, int],
    ldy: int, ldx: int, eps: float, splits: int,
) -> Plan:  # fmt: skip
    config = weight_config(dtype, precise, c, k)
    _, h, w = geometry
    cx, ck = touched
    share = share_of(geometry.rows, splits, config.rows)
    return Plan(
        weight_gradient_3x3,
        (cdiv(c, config.columns), cdiv(k, config.inner), splits),
        (
            geometry.rows, h, w, c, cx, k, ck, *dilation,
            ldy, *_shifts(dilation, w, ldy), ldx, eps, share,
            config.rows // w % h, config.rows % w, k * c * 9,
        ),
        (config.rows, config.columns, config.inner, precise),
        config.warps,
        config.stages,
    )  # fmt: skip


def weight_splits(dtype: torch.dtype, precise: str, m: int, c: int, k: int, processors: int) -> int:
    """How many programs share the rows, as for the 1x1."""
    config = weight_config(dtype, precise, c, k)
    programs = cdiv(c, config.columns) * cdiv(k, config.inner)
    splits = max(1, min(processors // programs, m // SPLIT_ROWS))
    return cdiv(m, share_of(m, splits, config.rows))


def backward(
    dy: Tensor,
    weight: Tensor,
    dilation: tuple[int, int],
    x: Tensor,
    read: Reader,
    geometry: Geometry,
    into: Into | None,
    need_weight: bool,
) -> tuple[Tensor | None, Sums, Tensor | None]:
    """dz (M, C), or into G; the reader's sums and dW (k, C, 3, 3) in float32."""
    (m, c), k, precise = x.shape, len(weight), precision(x.dtype)
    tiles = cdiv(m, input_config(precise, c, k, into is not None).rows)
    partial = sums_partial(x, c, tiles, into)
    g = x.new_empty((m, c)) if into is None else into.g
    seeded = into is not None and into.seeded
    plan = _input_plan(
        precise, geometry, c, k, dilation,
        (readable(x), readable(g) if seeded else c, readable(dy)),
        (dy.stride(0), *weight.stride(), x.stride(0), g.stride(0)),
        read.eps, into is not None, seeded, into is not None and into.rounds, tiles,
    )  # fmt: skip
    plan(dy, weight, x, read.mean, read.var, read.weight, read.bias, g, partial)
    weights = None
    if need_weight:
        splits = weight_splits(x.dtype, precise, m, c, k, multiprocessors(x.device))
        weights = x.new_empty((splits, k, c, 3, 3), dtype=torch.float32)
        plan = _weight_plan(
            x.dtype, precise, geometry, c, k, dilation, (readable(x), readable(dy)),
            dy.stride(0), x.stride(0), read.eps, splits,
        )  # fmt: skip
        plan(dy, x, read.mean, read.var, read.weight, read.bias, weights)
    sums, dweight = merge_sums(partial, read, into, weights)
    return (g if into is None else None), sums, dweight
