"""Bytes a pixel that the Triton kernels move, counted load by load in the interpreter.

DESIGN's table, in 16 bits: every operand of a primitive once. ``unique`` is what device memory must
deliver, ``issued`` what passes through the L2 cache. What grows with the rows counts; weights that
every tile reads again do, vectors of one launch do not.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from traffic import Traffic, per_row, total

from memdense.backends.triton import Triton, conv1x1, launch, tuning
from memdense.buffers import Into, NormGradient, Reader, Sums

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="counts in Triton's interpreter")
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

    with tuning.forced("forward_1x1", conv1x1.forward_configs(HALF, "tf32", LARGE, B)[0]):
        return total(per_row(run, ROWS))


def backward(c: int, need_weight: bool) -> Traffic:
    def run(m: int) -> None:
        into = Into(normal(m, c), torch.zeros(2, c), True)
        behind = NormGradient(reader(B), Sums(*torch.rand(2, B)), m)
        Triton().bn_relu_conv1x1_backward(
            normal(m, B), normal(m, B), behind, normal(B, c), normal(m, c), reader(c), into,
            need_weight,
        )  # fmt: skip

    with tuning.forced("input_gradient_1x1", conv1x1.input_configs(HALF, "tf32", LARGE, B)[0]):
        return total(per_row(run, ROWS))


@pytest.mark.parametrize("c", [64, 256])
def test_forward(c):
    table = 2 * c + 2 * B
    for statistics in (False, True):
        found = forward(c, statistics)
        assert table <= found.unique <= 1.1 * table
        assert found.issued <= 1.6 * table


@pytest.mark.parametrize("c", [64, 256])
def test_backward(c):
    """Input gradient: dz2, Y, X and G twice. Weight gradient: dz2, Y and X; here the first kernel
    leaves dY in dz2's place, so that the second reads that alone: the same sum.
    """
    table = (2 * 2 * B + 2 * c + 4 * c) + (2 * 2 * B + 2 * c)
    found = backward(c, True)
    assert 0.9 * table <= found.unique <= 1.1 * table
    assert found.issued <= 1.6 * table
    alone = backward(c, False)
    table = 2 * 2 * B + 6 * c
    assert table <= alone.unique <= 1.1 * table
    assert alone.issued <= 1.6 * table


def test_weight_partials_stay_small():
    """What the splits of a weight's gradient write and read again, at blocks 1 to 3 of
    DenseNet-121 at batch 256, beside what the two gradients move.
    """
    for side, channels in ((56, (64, 224)), (28, (128, 480)), (14, (256, 992))):
        for c in channels:
            m = 256 * side * side
            k = conv1x1.weight_configs(torch.bfloat16, "tf32")[0]
            partial = conv1x1.weight_splits(k, m, c, B) * B * c * 4
            assert 2 * partial <= 0.1 * m * (8 * c + 8 * B), (side, c)
