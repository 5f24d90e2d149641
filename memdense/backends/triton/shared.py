"""The two halves that every kernel shares: reading through BatchNorm and ReLU, and answering.

Notation in these files: X [M, C] features, M pixels, C channels, G [M, C] their gradient; a vector
holds one value per channel. Padded rows and columns are never stored, and columns in [C, readable)
may hold anything, so they are selected away after reading.
"""

import triton
import triton.language as tl

from .launch import INTERPRETED

WORDS = tl.constexpr(not INTERPRETED)


@triton.jit
def floats(values):
    """values in float32. bfloat16 is taken out of words of two by a shift and a mask, where LLVM
    takes three instructions and rounds one by one what is also stored.
    """
    if WORDS and values.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [values],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return values.to(tl.float32)


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """acc + a @ b. In float32 without tensor cores the product is summed by itself, as one long
    chain of multiply-adds rounds more; told of imprecise sums, Triton does not make it one.
    """
    if PRECISION == "ieee":
        return acc + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    return tl.dot(a, b, acc, PRECISION)


@triton.jit
def norm_vectors(mean, var, weight, bias, eps, c, inside):
    """s = weight*r, t = bias - mean*s, mean and r = 1/sqrt(var + eps) of channels c."""
    mu = tl.load(mean + c, inside, 0.0)
    r = tl.rsqrt(tl.load(var + c, inside, 1.0) + eps)  # finite without an eps too
    s = r
    if weight is not None:
        s = r * tl.load(weight + c, inside, 0.0).to(tl.float32)
    t = -mu * s
    if bias is not None:
        t += tl.load(bias + c, inside, 0.0).to(tl.float32)
    return s, t, mu, r


@triton.jit
def behind_vectors(mean, var, weight, dbeta, dgamma, eps, count, c, inside, BATCH: tl.constexpr):
    """a, b and c of the gradient behind a BatchNorm, a*dz + b*y + c, in channels c.

    a = s; b = -s*r*dgamma/count and c = -s*dbeta/count - b*mean by batch statistics, else 0.
    """
    s, _, mu, r = norm_vectors(mean, var, weight, None, eps, c, inside)
    vb = tl.zeros_like(s)
    vc = vb
    if BATCH:
        vb = -s * r * tl.load(dgamma + c, inside, 0.0) / count
        vc = -s * tl.load(dbeta + c, inside, 0.0) / count - vb * mu
    return s, vb, vc


@triton.jit
def tile_of(C, BC: tl.constexpr):
    """This program's tile of rows and its BC channels; neighbours share rows."""
    across = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    return pid // across, pid % across * BC + tl.arange(0, BC)


@triton.jit
def walk_of(C, M, share, BC: tl.constexpr):
    """This program's walk, its first row and the one behind its last, and its BC channels."""
    walker, c = tile_of(C, BC)
    first = walker * share
    return walker, first, tl.minimum(first + share, M), c


@triton.jit
def relu(z):
    """max(z, 0), NaN kept, as PyTorch does."""
    return tl.maximum(z, 0.0, tl.PropagateNan.ALL)


@triton.jit
def answer(da, x, s, t, mu, g, mask, inside, RELU: tl.constexpr, SEEDED: tl.constexpr):
    """dz = da*[s*x + t > 0] and G += s*dz, for tiles da, x [rows, columns] and pointers g.

    Returns dz and dz*(x - mean), and d and d*(x - mean), where d is what G took in: new - old, both
    as stored. ``inside`` marks the values; ``mask``, what of G may be touched: beyond the values it
    keeps what it holds. In columns without values, all four may be anything.
    """
    x = floats(x)
    dz = da
    if RELU:
        dz = tl.where(x * s + t <= 0.0, 0.0, da)
    dz = tl.where(inside, dz, 0.0)
    centred = x - mu
    old = tl.zeros_like(dz)
    if SEEDED:
        old = floats(tl.load(g, mask, 0.0))
    new = (old + s * dz).to(g.dtype.element_ty)
    tl.store(g, new, mask)
    d = floats(new) - old
    return dz, dz * centred, d, d * centred


@triton.jit
def store_sums(
    partial, plane, dbeta, dgamma, stored_beta, stored_gamma, c, inside, tile, tiles,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """A tile's four sums (two, unless G rounds) at partial [4, C, tiles]; plane = C*tiles."""
    at = partial + c.to(tl.int64) * tiles + tile
    tl.store(at, dbeta, inside)
    tl.store(at + plane, dgamma, inside)
    if ROUNDS:
        tl.store(at + 2 * plane, stored_beta, inside)
        tl.store(at + 3 * plane, stored_gamma, inside)


@triton.jit
def store_moments(partial, plane, values, valid, count, c, inside, tile, tiles):
    """A tile's mean and M2 = sum((v - mean)^2) of values [rows, columns] at partial [2, C, tiles];
    plane = C*tiles. ``valid`` [rows, 1] marks ``count`` rows.
    """
    mean = tl.sum(tl.where(valid, values, 0.0), 0) / count
    d = tl.where(valid, values - mean[None, :], 0.0)
    at = partial + c.to(tl.int64) * tiles + tile
    tl.store(at, mean, inside)
    tl.store(at + plane, tl.sum(d * d, 0), inside)
