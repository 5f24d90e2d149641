"""Running statistics of a stage's norms, moved in one launch.

Specification: ``update_running`` of the reference backend.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cast import SOURCES
from .launch import Plan, keep_while_read, kernel, table_of
from .tiles import cached

FIELDS = tl.constexpr(7)  # of a line in the table
BLOCK = 1024  # channels that a program takes at a time


@triton.jit
def _move(at, inside, m, batch):
    """(1 - m)*old + m*batch in float64."""
    old = tl.load(at, inside, 0.0).to(tl.float32).to(tl.float64)
    new = ((1 - m) * old + m * batch).to(tl.float32)
    tl.store(at, new.to(at.dtype.element_ty), inside)


@triton.jit
def _move_as(dtype, pointer, c, inside, m, batch):
    """Channels c behind a pointer to ``dtype``."""
    if dtype == 0:
        _move(pointer.to(tl.pointer_type(tl.float32)) + c, inside, m, batch)
    elif dtype == 1:
        _move(pointer.to(tl.pointer_type(tl.float16)) + c, inside, m, batch)
    else:
        _move(pointer.to(tl.pointer_type(tl.bfloat16)) + c, inside, m, batch)


@kernel
def move_running(table, statistics, columns, rows, BLOCK: tl.constexpr):
    """mean = (1 - m)*mean + m*batch_mean, var likewise with the batch's rows/(rows - 1)*var, and
    count += 1; statistics [2, columns] hold the batch's.

    A line of the table is one norm, and a program: pointers to mean, var and count (or 0), dtype,
    C, its first column, and the momentum's bits. A momentum below 0 is 1 / count.
    """
    line = table + tl.program_id(0) * FIELDS
    mean = tl.load(line)
    var = tl.load(line + 1)
    count = tl.load(line + 2)
    dtype = tl.load(line + 3)
    channels = tl.load(line + 4).to(tl.int32)
    batch = statistics + tl.load(line + 5)
    m = tl.load(line + 6).to(tl.float64, bitcast=True)
    if count != 0:
        at = count.to(tl.pointer_type(tl.int64))
        steps = tl.load(at) + 1
        # every thread loads, one stores: not before the last warp has loaded
        tl.debug_barrier()
        tl.store(at, steps)
        m = tl.where(m < 0, 1 / steps.to(tl.float64), m)
    unbiased = rows.to(tl.float64) / (rows.to(tl.float64) - 1)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < channels
        _move_as(dtype, mean, c, inside, m, tl.load(batch + c, inside, 0.0).to(tl.float64))
        wide = tl.load(batch + columns + c, inside, 0.0).to(tl.float64)
        _move_as(dtype, var, c, inside, m, wide * unbiased)


# Like cast's, it only says where tensors are that are alive when it is looked up.
@lru_cache(maxsize=256)
def _table(
    pointers: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    shapes: tuple[torch.Size, ...],
    strides: tuple[tuple[int, ...], ...],
    starts: tuple[int, ...],
    momenta: tuple[float, ...],
    device: torch.device,
) -> Tensor | None:
    """Of means, variances and counts (shapes of means, strides of buffers), where the kernel takes
    them: packed, on one device, in one dtype of a norm's, each norm's its own.
    """
    n = len(starts)
    means, variances, counts = dtypes[:n], dtypes[n : 2 * n], dtypes[2 * n :]
    if not (
        {*devices} == {device}
        and means == variances
        and {*means} <= {*SOURCES}
        and {*counts} <= {torch.int64}
        and {*strides} == {(1,)}
        and len({*pointers}) == len(pointers)
    ):
        return None
    lines = zip(
        pointers[:n], pointers[n : 2 * n], pointers[2 * n :] or [0] * n,
        map(SOURCES.index, means), [shape[0] for shape in shapes], starts,
        [struct.unpack("q", struct.pack("d", m))[0] for m in momenta], strict=True,
    )  # fmt: skip
    return table_of([*lines], device)


@cached
def _plan(norms: int, columns: int, rows: int) -> Plan:
    return Plan(move_running, (norms,), (columns, rows), (BLOCK,))


def update(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    counts: Sequence[Tensor],
    statistics: Tensor,
    starts: Sequence[int],
    momenta: Sequence[float],
    rows: int,
) -> bool:
    """In place; False where the kernel does not take them and nothing was done."""
    if statistics.dtype != torch.float32 or not statistics.is_contiguous():
        return False
    tensors = *means, *variances, *counts
    table = _table(
        tuple(map(Tensor.data_ptr, tensors)),
        tuple([t.dtype for t in tensors]),
        tuple([t.device for t in tensors]),
        tuple([t.shape for t in means]),
        tuple(map(Tensor.stride, tensors[: 2 * len(means)])),
        tuple(starts),
        tuple(momenta),
        statistics.device,
    )
    if table is None:
        return False
    keep_while_read(table)
    _plan(len(means), statistics.shape[1], rows)(table, statistics)
    # as BatchNorm does it: autograd hears of its counts, not of what F.batch_norm moves
    torch.autograd.graph.increment_version([t for t in counts if not t.is_inference()])
    return True
