"""Count the bytes that Triton kernels load and store, by running them in the interpreter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
from triton.runtime.interpreter import interpreter_builder

from memdense.backends.triton.launch import Plan


class Traffic(NamedTuple):
    """Bytes: all that was issued, and how many are distinct in each launch, loads and stores
    apart.
    """

    issued: float = 0
    unique: float = 0

    def plus(self, other: Traffic, factor: float = 1) -> Traffic:
        return Traffic(self.issued + factor * other.issued, self.unique + factor * other.unique)


class _Launch:
    """What one launch touched."""

    def __init__(self) -> None:
        self.issued = 0
        self.touched: dict[str, list[np.ndarray]] = {"load": [], "store": []}

    def take(self, kind: str, pointers, mask) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        # the interpreter makes integers of some masks
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        self.issued += addresses.size * size
        # addresses are far below 2**59
        self.touched[kind].append(np.unique(addresses) * 16 + size)

    def total(self) -> Traffic:
        parts = (np.unique(np.concatenate(p)) for p in self.touched.values() if p)
        return Traffic(self.issued, sum(int((part % 16).sum()) for part in parts))


@contextmanager
def counted() -> Iterator[dict[str, Traffic]]:
    """Every kernel's traffic inside, by name."""
    found: dict[str, Traffic] = defaultdict(Traffic)
    now = _Launch()
    call = Plan.__call__
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def launch(plan: Plan, *tensors) -> None:
        nonlocal now
        now = _Launch()
        call(plan, *tensors)
        found[plan.name] = found[plan.name].plus(now.total())

    def masked_load(pointers, mask, *rest):
        now.take("load", pointers, mask)
        return load(pointers, mask, *rest)

    def masked_store(pointers, value, mask, *rest):
        now.take("store", pointers, mask)
        return store(pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "__call__", launch)
        patch.setattr(interpreter_builder, "create_masked_load", masked_load)
        patch.setattr(interpreter_builder, "create_masked_store", masked_store)
        yield found


def per_row(run: Callable[[int], None], rows: tuple[int, int]) -> dict[str, Traffic]:
    """Each kernel's traffic for every row more: what does not grow with the rows drops out."""
    few, many = (_measure(run, m) for m in rows)
    share = 1 / (rows[1] - rows[0])
    return {name: Traffic().plus(many[name], share).plus(few[name], -share) for name in many}


def _measure(run: Callable[[int], None], rows: int) -> dict[str, Traffic]:
    with counted() as found:
        run(rows)
    return found


def total(found: dict[str, Traffic]) -> Traffic:
    result = Traffic()
    for traffic in found.values():
        result = result.plus(traffic)
    return result
