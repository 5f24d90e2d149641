"""Triton's kernels, interpreted, on memory behind whose last value a page begins that nobody may
touch. To read on ends the process: test_triton.py runs this file in one of its own.
"""

from __future__ import annotations

import copy
import ctypes
import mmap
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from exactness import into_of, reader_of
from inputs import Inputs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import memdense
from memdense import buffers
from memdense.backends.triton import Triton, conv1x1, conv3x3, replay
from memdense.backends.triton.tiles import extent

pytestmark = pytest.mark.usefixtures("interpreter")
PAGE = mmap.PAGESIZE
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
WIDE = 48
mprotect = ctypes.CDLL(None).mprotect
mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def guarded(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NaN, or 1, in memory that ends with the tensor's last value."""
    values = extent(torch.Size(size), stride)
    wanted = values * dtype.itemsize
    pages = mmap.mmap(-1, (-(-wanted // PAGE) + 1) * PAGE)
    end = len(pages) - PAGE
    assert not mprotect(ctypes.addressof(ctypes.c_char.from_buffer(pages, end)), PAGE, 0)
    flat = torch.frombuffer(pages, dtype=dtype, count=values, offset=end - wanted)
    return flat.fill_(torch.nan if dtype.is_floating_point else 1).as_strided(size, stride)


def inside(values: Tensor) -> Tensor:
    """A matrix as the last columns of one with 48."""
    m, c = values.shape
    return guarded((m, WIDE), (WIDE, 1), values.dtype)[:, -c:].copy_(values)


def ending(values: Tensor) -> Tensor:
    """A matrix in rows of 48, of which the last ends with its values."""
    return guarded(values.shape, (WIDE, 1), values.dtype).copy_(values)


def far(values: Tensor) -> Tensor:
    """A matrix whose later rows no 32 bits reach, in memory of which few pages are touched."""
    m, c = values.shape
    stride = 1 << 23
    size = ((m - 1) * stride + c) * values.element_size()
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    memory = torch.frombuffer(pages, dtype=values.dtype).untyped_storage()
    # no view of a whole that a test might look at
    return values.new_empty(0).set_(memory, 0, (m, c), (stride, 1)).copy_(values)


@pytest.mark.parametrize(
    ("size", "channels", "wrap", "dtype"),
    [
        ((1, 3, 4), 8, inside, torch.float16),
        ((1, 3, 4), 40, inside, torch.float32),
        ((1, 3, 4), 47, ending, torch.float16),
        ((1, 20, 20), 16, far, torch.float16),
    ],
)
def test_primitives(
    size: tuple[int, ...],
    channels: int,
    wrap: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same bits as elsewhere."""
    for module in (conv1x1, conv3x3):  # several splits of what rows there are
        monkeypatch.setattr(module, "SPLIT_ROWS", 32)
    inputs = Inputs(size, channels, 12)
    expected = inputs.run(Triton(), dtype)
    for name, value in inputs.run(Triton(), dtype, wrap).items():
        assert torch.equal(value, expected[name]), name
    weight = torch.randn(12, channels, 3, 3).to(dtype)
    read = reader_of(*(t.float() for t in inputs.vectors))

    def second_half(wrap: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x, dy, out, g = (wrap(t.to(dtype)) for t in (inputs.x, inputs.dz, inputs.y, inputs.g))
        into, geometry = into_of(g), inputs.geometry
        Triton().bn_relu_conv3x3(x, read, weight, (1, 1), geometry, out, None, None)
        _, sums, dweight = Triton().bn_relu_conv3x3_backward(
            dy, weight, (1, 1), x, read, geometry, into, True
        )
        return [out, g, into.sums, *sums, dweight]

    for found, wanted in zip(second_half(wrap), second_half(lambda t: t), strict=True):
        assert torch.equal(found, wanted)


class Guard(TorchDispatchMode):
    """What is allocated inside ends where nobody may read on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        zeros = function in replay.ZEROS
        if (not zeros and function not in replay.ALLOCATIONS) or not out.numel() or out.is_meta:
            return out
        memory = guarded(out.shape, out.stride(), out.dtype)
        return memory.zero_() if zeros else memory


@pytest.mark.parametrize(
    "options",
    [{"bn_size": 3, "drop_rate": 0.2}, {"bn_size": None, "small_inputs": False}],
    ids=str,
)
def test_network(options: dict[str, Any]) -> None:
    """The same bits as elsewhere, in rows that are padded as a GPU's."""
    options = {"small_inputs": True} | options
    model = memdense.DenseNet(9, (1, 1), 20, num_classes=3, **options)
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data = guarded(p.shape, p.stride(), p.dtype).copy_(p.data)
    x = torch.randn(1, 3, *((5, 4) if options["small_inputs"] else (18, 14)))

    def step(net: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        out = net(x)
        (out * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        return [out, *(p.grad for p in net.parameters())]

    with (
        mock.patch.object(buffers, "row_stride", lambda channels, _: -(-channels // 16) * 16),
        memdense.use_backend("triton"),
    ):
        expected = step(model)
        with Guard():
            found = step(twin)
    for a, b in zip(found, expected, strict=True):
        assert b.isfinite().all() and torch.equal(a, b)
