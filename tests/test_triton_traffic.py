"""Bytes a pixel that the Triton kernels move, counted load by load in the interpreter.

DESIGN's table, in 16 bits: every operand of a primitive once. ``unique`` is what device memory must
deliver, ``issued`` what passes through the L2 cache. What grows with the rows counts; weights that
every tile reads again do, vectors of one launch do not.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from traffic import Traffic, per_row, total

from memdense.backends.triton import Triton, conv1x1, launch, pools, tiles, tuning
from memdense.backends.triton import statistics as packing
from memdense.buffers import Geometry, Into, NormGradient, Reader, Share, Sums

pytestmark = [
    pytest.mark.usefixtures("quick_interpreter"),
    pytest.mark.skipif(not launch.INTERPRETED, reason="counts in Triton's interpreter"),
]
HALF = torch.float16
LARGE = 1 << 20  # rows of a network on a GPU, by which configurations are chosen
ROWS = (256, 768)
B = 128


def reader(channels: int) -> Reader:
    return Reader(*torch.rand(4, channels), 1e-5, True)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape).to(HALF)


def forward(c: int, statistics: bool) -> Traffic:
    def run(m: int) -> None:
        moments = torch.empty(2, B) if statistics else None
        Triton().bn_relu_conv1x1(normal(m, c), reader(c), normal(B, c), moments)

    config = conv1x1.forward_configs(HALF, "tf32", LARGE, B, True, 132)[0]
    with tuning.forced("forward_1x1", config):
        return total(per_row(run, ROWS))


def backward(c: int, need_weight: bool) -> Traffic:
    def run(m: int) -> None:
        into = Into(normal(m, c), torch.zeros(2, c), True)
        behind = NormGradient(reader(B), Sums(*torch.rand(2, B)), m)
        Triton().bn_relu_conv1x1_backward(
            normal(m, B), normal(m, B), behind, normal(B, c), normal(m, c), reader(c), into,
            need_weight,
        )  # fmt: skip

    return total(per_row(run, ROWS))


@pytest.mark.parametrize("c", [64, 256])
def test_forward(c):
    """A tile of 128 rows reads W through the L2 cache, as many values as X has. One of 256 would be
    within 1.6 times the table at any C, and took 1.3 to 1.6 times as long on an H200.
    """
    table = 2 * c + 2 * B
    for statistics in (False, True):
        found = forward(c, statistics)
        assert table <= found.unique <= 1.1 * table
        assert found.issued <= (1.6 if c < B else 1.75) * table


@pytest.mark.parametrize("c", [64, 256])
def test_backward(c):
    """Less than the table: dY is made in dz2's place in a pass of its own, of dz2 and Y; one walk
    then reads it, X and G and writes G. What each of its programs owns are columns, so that dY
    passes the L2 cache once for every 64 of them.
    """
    table = (2 * 2 * B + 2 * c + 4 * c) + (2 * 2 * B + 2 * c)
    for need_weight in (True, False):
        found = backward(c, need_weight)
        made, walked = 3 * 2 * B, 2 * B + 6 * c
        assert made + walked <= found.unique <= 1.1 * (made + walked) <= 1.1 * table
        assert found.issued <= 1.6 * table


def test_weight_partials_stay_small():
    """What the splits of a weight's gradient write and read again, at blocks 1 to 3 of
    DenseNet-121 at batch 256, beside what the two gradients move.
    """
    for side, channels in ((56, (64, 224)), (28, (128, 480)), (14, (256, 992))):
        for c in channels:
            m = 256 * side * side
            k = conv1x1.gradient_configs(torch.bfloat16, "tf32", B, True, True)[0]
            partial = conv1x1.gradient_splits(k, m, c, 132) * B * c * 4
            assert 2 * partial <= 0.1 * m * (8 * c + 8 * B), (side, c)


def without_product(c: int) -> dict[str, tuple[Callable[[int], object], float]]:
    """The other primitives on m rows of images of 16 x 16, and what each must move for a row."""
    triton = Triton()

    def share(m: int) -> Share:
        return Share(torch.rand(2, c), torch.rand(c), m)

    def into(m: int) -> Into:
        return Into(normal(m, c), torch.zeros(2, c), False)

    def behind(m: int) -> NormGradient:
        return NormGradient(reader(c), Sums(*torch.rand(2, c)), m)

    def images(m: int) -> Geometry:
        return Geometry(m // 256, 16, 16)

    def winner(m: int) -> Tensor:
        return torch.zeros(m // 4, c, dtype=torch.uint8)

    return {
        "pack": (
            lambda m: triton.pack(
                normal(m // 256, c, 16, 16), normal(m, c), images(m), torch.empty(2, c)
            ),
            4 * c,
        ),
        "settle": (lambda m: triton.settle(normal(m, c), normal(m, c), share(m), None), 6 * c),
        "mean back": (
            lambda m: triton.bn_relu_mean_backward(
                normal(m // 256, c), normal(m, c), reader(c), images(m), into(m)
            ),
            4 * c,
        ),
        "pool": (
            lambda m: triton.bn_relu_pool_conv1x1(normal(m, c), reader(c), normal(8, c), images(m)),
            2.5 * c,
        ),
        "pool back": (
            lambda m: triton.bn_relu_pool_conv1x1_backward(
                normal(m // 4, 8), normal(8, c), normal(m, c), reader(c), images(m), into(m), False
            ),
            4.5 * c,
        ),
        "maxpool": (lambda m: triton.bn_relu_maxpool(normal(m, c), reader(c), images(m)), 2.75 * c),
        "maxpool sums": (
            lambda m: triton.bn_relu_maxpool_sums(
                normal(m // 4, c), winner(m), normal(m, c), reader(c), images(m)
            ),
            2.75 * c,
        ),
        "maxpool back": (
            lambda m: triton.bn_relu_maxpool_backward(
                normal(m // 4, c), winner(m), normal(m, c), behind(m), images(m), normal(m, c)
            ),
            4.75 * c,
        ),
    }


@pytest.mark.parametrize("name", without_product(16))
def test_without_product(name, monkeypatch, interpreter):
    """Every operand once; what a maxpool's windows share is read from the cache or not at all."""
    for module, plan in (
        (pools, "_strips"), (pools, "_maxpool_plan"), (pools, "_maxpool_gradient_plan"),
        (pools, "_answer_plan"), (packing, "_plan"),
    ):  # fmt: skip
        monkeypatch.setattr(module, plan, getattr(module, plan).__wrapped__)
    # programs walk down lines and rows, as on large inputs
    monkeypatch.setattr(pools, "BUSY", 0)
    monkeypatch.setattr(tiles, "WALKERS", 1)
    run, table = without_product(64)[name]
    found = total(per_row(run, ROWS))
    assert table <= 1.001 * found.unique and found.unique <= 1.1 * table
    assert found.issued <= 1.6 * table
