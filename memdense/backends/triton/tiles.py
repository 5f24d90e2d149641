"""How kernels divide a matrix, how far they may read it, and what of the device decides that."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _extension
from ...buffers import ROW_UNIT

# for what depends on sizes alone, plans above all; one that is lost is made again
cached = lru_cache(maxsize=1 << 14)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n: the size of a tile that holds n."""
    return max(least, 1 << (n - 1).bit_length())


@cached
def extent(shape: torch.Size, stride: tuple[int, ...]) -> int:
    """Values from a tensor's first to its last, both included."""
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def room(t: Tensor) -> int:
    """Values in t's storage behind its last one, up to as many as padding ever takes."""
    values = t.untyped_storage().nbytes() // t.itemsize
    behind = values - t.storage_offset() - extent(t.shape, t.stride())
    return behind if behind < ROW_UNIT else ROW_UNIT - 1


def readable(matrix: Tensor) -> int:
    """How many columns of a (M, C) matrix may be read: up to the next multiple of 16, where its
    rows and, behind the last of them, its storage reach that far. What lies behind C may be
    anything, so kernels select on it.
    """
    c = matrix.shape[1]
    wide = cdiv(c, ROW_UNIT) * ROW_UNIT
    return wide if wide == c or (wide <= matrix.stride(0) and wide - c <= room(matrix)) else c


def share_of(rows: int, programs: int, height: int) -> int:
    """The rows of each of ``programs`` that share ``rows``: whole tiles of ``height``."""
    return cdiv(cdiv(rows, programs), height) * height


class Tiling(NamedTuple):
    """Tiles over a (M, C) matrix: one's rows and columns, and how many programs that makes, one a
    tile.
    """

    rows: int
    columns: int
    programs: int


TILE = 8192  # values: 16 KB of a 16-bit matrix


def tiling(rows: int, channels: int) -> Tiling:
    """What kernels without a product use."""
    columns = min(64, power(channels))
    # channels that are no multiple of 16 come 2 bytes at a time, which takes registers
    wide = 2 * columns if channels % 16 else columns
    height = min(TILE // max(wide, 32), power(rows))
    return Tiling(height, columns, cdiv(rows, height) * cdiv(channels, columns))


class Walk(NamedTuple):
    """Tiles that programs walk down, each over ``share`` rows of its own columns: what they sum
    stays with them. ``across`` columns of ``walkers`` programs.
    """

    rows: int
    columns: int
    across: int
    walkers: int
    share: int


WALKERS = 528  # programs of eight warps that a large GPU holds at once, or half of them


def walk(rows: int, channels: int) -> Walk:
    """What kernels without a product use that sum over rows."""
    columns = min(64, power(channels))
    height = min(TILE // 4 // columns, power(rows))
    across = cdiv(channels, columns)
    walkers = min(cdiv(rows, height), max(1, WALKERS // across))
    share = share_of(rows, walkers, height)
    return Walk(height, columns, across, cdiv(rows, share), share)


@cached
def hopper(device: torch.device) -> bool:
    """Whether products take 64 rows at a time, from shared memory of 227 KB, which 12.x does not
    have; where nothing runs on tensor cores, in the interpreter, as if.
    """
    if device.type != "cuda":
        return True
    return (9, 0) <= torch.cuda.get_device_capability(device) < (12, 0)


@cached
def multiprocessors(device: torch.device) -> int:
    """How many the device has; where there is none, those of a large one."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s ``input_precision``."""
    return "tf32" if dtype != torch.float32 or _extension.tf32() else "ieee"
