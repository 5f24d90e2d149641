"""A stage's weights as its kernels read them, in one launch.

Specification: ``cast`` of the reference backend; the layout is this backend's own.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from ...buffers import ROW_UNIT
from .launch import Plan, constant, kernel, table_of
from .tiles import cached, cdiv

BLOCK = 4096  # values that a program writes
SOURCES = (torch.float32, torch.float16, torch.bfloat16)
FIELDS = tl.constexpr(12)  # of a line in the table


@kernel
def cast_weights(table, out, BLOCK: tl.constexpr):
    """out[first + r*P + c] = w[r // T, c, r % T // K, r % K] for c < C, and 0 for C <= c < P; a
    turned weight has its first two axes exchanged.

    A line of the table is one weight: its pointer, dtype, first, size, C, P, T and K (taps in all
    and in a line) and four strides. Programs (i, j) write block i of weight j.
    """
    line = table + tl.program_id(1) * FIELDS
    size = tl.load(line + 3).to(tl.int32)
    start = tl.program_id(0) * BLOCK
    if start < size:
        pointer = tl.load(line)
        dtype = tl.load(line + 1)
        columns = tl.load(line + 4).to(tl.int32)
        padded = tl.load(line + 5).to(tl.int32)
        taps = tl.load(line + 6).to(tl.int32)
        across = tl.load(line + 7).to(tl.int32)
        i = start + tl.arange(0, BLOCK)
        c = i % padded
        r = i // padded
        at = (r // taps) * tl.load(line + 8) + c * tl.load(line + 9)
        at += (r % taps // across) * tl.load(line + 10) + (r % across) * tl.load(line + 11)
        inside = (i < size) & (c < columns)
        if dtype == 0:
            value = tl.load(pointer.to(tl.pointer_type(tl.float32)) + at, inside, 0.0)
        elif dtype == 1:
            value = tl.load(pointer.to(tl.pointer_type(tl.float16)) + at, inside, 0.0).to(
                tl.float32
            )
        else:
            value = tl.load(pointer.to(tl.pointer_type(tl.bfloat16)) + at, inside, 0.0).to(
                tl.float32
            )
        tl.store(out + tl.load(line + 2) + i, value.to(out.dtype.element_ty), i < size)


def _padded(channels: int) -> int:
    return cdiv(channels, ROW_UNIT) * ROW_UNIT


def _ready(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels can read it as it is. Rows longer than C do not count: nobody says that the
    rest of them is 0.
    """
    if weight.dtype != dtype:
        return False
    return weight.dim() == 4 or (weight.is_contiguous() and not weight.shape[1] % ROW_UNIT)


# (pointer, dtype, shape, strides)
Source = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]


@cached
def _layout(shapes: tuple[tuple[int, ...], ...], turned: bool) -> tuple[list[tuple], int, int]:
    """((shape, strides, start) of each weight in the packed memory, its size, the largest of them).

    2-D (B, C) in padded rows; 4-D (k, C, h, w) channels last, or ``turned`` with k innermost.
    """
    places, start, largest = [], 0, 0
    for shape in shapes:
        if len(shape) == 2:
            row = _padded(shape[1])
            strides, size = (row, 1), shape[0] * row
        else:
            k, c, h, w = shape
            size = k * c * h * w
            strides = (1, h * w * k, w * k, k) if turned else (h * w * c, 1, w * c, c)
        places.append((shape, strides, start))
        start += _padded(size)
        largest = max(largest, size)
    return places, start, largest


# A table holds pointers as numbers and keeps nothing alive. It is only looked up by the pointers,
# shapes and strides of weights that are alive, so it says what is true of them, whoever owned that
# memory when it was made.
@lru_cache(maxsize=256)
def _table(sources: tuple[Source, ...], turned: bool, device: torch.device) -> Tensor:
    lines = []
    places, _, _ = _layout(tuple(shape for _, _, shape, _ in sources), turned)
    for (pointer, dtype, shape, strides), (_, _, start) in zip(sources, places, strict=True):
        if len(shape) == 2:
            rows, c, taps, across = *shape, 1, 1
            padded, strides = _padded(c), (*strides, 0, 0)
        else:
            outer, inner = (1, 0) if turned else (0, 1)
            rows, c, taps, across = shape[outer], shape[inner], shape[2] * shape[3], shape[3]
            padded, strides = c, (strides[outer], strides[inner], *strides[2:])
        size = rows * taps * padded
        lines.append(
            (pointer, SOURCES.index(dtype), start, size, c, padded, taps, across, *strides)
        )
    return table_of(lines, device)


@cached
def _plan(weights: int, largest: int) -> Plan:
    return Plan(cast_weights, (cdiv(largest, BLOCK), weights), (), (BLOCK,), warps=8)


def cast(weights: list[Tensor], dtype: torch.dtype, turned: bool = False) -> list[Tensor]:
    """Weights in ``dtype``: (B, C) in rows padded with 0 to multiples of 16 values, (k, C, h, w)
    channels last, or ``turned`` with k innermost, as a gradient of the input reads them. Those that
    need no cast come back as they are.
    """
    wanted = [i for i, w in enumerate(weights) if not _ready(w, dtype)]
    if not wanted:
        return weights
    sources = tuple(
        (w.data_ptr(), w.dtype, tuple(w.shape), w.stride()) for w in (weights[i] for i in wanted)
    )
    device = weights[wanted[0]].device
    table = constant(lambda: _table(sources, turned, device))
    places, total, largest = _layout(tuple(source[2] for source in sources), turned)
    packed = torch.empty(total, dtype=dtype, device=device)
    _plan(len(wanted), largest)(table, packed)
    cast = list(weights)
    for i, place in zip(wanted, places, strict=True):
        cast[i] = packed.as_strided(*place)
    return cast
