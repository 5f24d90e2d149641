"""What the library is for: bytes, exact and asserted."""

import itertools

import pytest
import torch
from exactness import BACKENDS
from torch import nn

import memdense
from memdense import memory

MB = 1e6


def per_image(model: nn.Module, size: int, batch: int) -> memory.StepMemory:
    x = torch.randn(batch, 3, size, size)
    return memory.training_step_memory(model, x).per_image


# the ledger: X of four blocks, a byte for each pooled value; conv0's output where it is kept
BUFFERS = 4 * sum(c * s * s for c, s in ((256, 56), (512, 28), (1024, 14), (1024, 7)))
WINNERS, STEM = 64 * 56 * 56, 4 * 64 * 112 * 112


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute_stem", "peak", "ledger"),
    [(True, 13 * MB, BUFFERS + WINNERS), (False, 17 * MB, BUFFERS + WINNERS + STEM)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_densenet121_at_224_keeps_its_promise(
    recompute_stem: bool, peak: float, ledger: float, backend: str
) -> None:
    """fp32, batch 4: peak of a step (.grad allocated), and bytes between forward and backward."""
    with memdense.use_backend(backend):
        step = per_image(memdense.densenet121(recompute_stem=recompute_stem), 224, 4)
    assert step.peak <= peak
    assert ledger <= step.live <= ledger + 0.1 * MB <= 11 * MB


def saved(model: nn.Module, x: torch.Tensor) -> int:
    return memory.saved_bytes(model, x, exclude=(model, x))


def test_saved_bytes_are_the_buffers() -> None:
    """To the byte: X, its statistics and Y's, the classifier's input; Y too where it is kept; masks
    in bytes.
    """
    k, layers, init, batch, size = 4, 3, 6, 2, 16
    args = dict(
        growth_rate=k, block_config=(layers,), num_init_features=init, bn_size=2, num_classes=3
    )
    x = torch.randn(batch, 5, size, size)
    pixels, last, width = batch * size * size, init + layers * k, 2 * k
    base = 4 * (pixels * last + 2 * (last + layers * width) + batch * last)

    def count(**kwargs) -> int:
        model = memdense.DenseNet(**args, small_inputs=True, in_channels=5, **kwargs)
        return saved(model, x)

    # conv0's output is the block's input: small_inputs has no stem to recompute, and X holds a copy
    assert count() == base
    assert count(keep_bottlenecks=True) == base + 4 * pixels * width * layers
    assert count(drop_rate=0.5) == base + pixels * layers * k
    assert count(double_backward=True) == base + 4 * pixels * init


@pytest.mark.parametrize("what", ["peak", "live"])
def test_memory_grows_linearly_with_depth(what: str) -> None:
    """Each further layer of a block costs the same bytes: second differences vanish beside first
    ones.
    """
    figures = []
    for layers in (4, 8, 12, 16, 20):
        model = memdense.DenseNet(8, (layers,), 16, num_classes=2, small_inputs=True)
        step = memory.training_step_memory(model, torch.randn(8, 3, 32, 32))
        figures.append(getattr(step, what))
    steps = [b - a for a, b in itertools.pairwise(figures)]
    # 4 layers of 8 channels: X alone is 4 * 8 floats a pixel, X and G twice that
    pixels, copies = 8 * 32 * 32, dict(peak=2, live=1)[what]
    for step in steps:
        assert step == pytest.approx(copies * 4 * 32 * pixels, rel=0.1)
    plain = [
        saved(
            memdense.DenseNet(8, (n,), 16, num_classes=2, small_inputs=True, efficient=False),
            torch.randn(8, 3, 32, 32),
        )
        for n in (4, 8, 12)
    ]
    assert plain[2] - plain[1] > 1.3 * (plain[1] - plain[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_scratch_does_not_grow_with_the_batch(backend: str) -> None:
    """From 16 to 32 images everything but a band's scratch doubles."""

    def scratch(batch: int) -> int:
        block = memdense.Features(denseblock(), efficient=True)
        x = torch.randn(batch, 64, 28, 28).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), memdense.use_backend(backend):
            peak = memory.peak_memory(block, x).peak
        pixels = batch * 28 * 28
        return peak - 4 * pixels * (64 + 2 * 16 + 64)  # X, and one Y

    small, large = scratch(16), scratch(32)
    # vectors and weights beside it, too
    assert abs(large - small) <= 0.1 * max(small, 1e5)


def denseblock() -> dict:
    from collections import OrderedDict

    return OrderedDict(denseblock1=memdense.DenseBlock(2, 64, 4, 16))


def test_inference_keeps_nothing() -> None:
    model = memdense.DenseNet(8, (4, 4), 16, num_classes=2).eval()
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        measured = memory.peak_memory(model, x)
        model.features.keep_bottlenecks = True
        again = memory.peak_memory(model, x)
    assert measured.retained == measured.result.nbytes
    assert again.peak == measured.peak


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_holds_one_block_at_a_time(backend: str) -> None:
    """`extract_features` has to hold all of them, of which the last three are large."""
    model = memdense.DenseNet(32, (1, 8, 8, 8), 8, num_classes=2, output_stride=8).eval()
    x = torch.randn(16, 3, 64, 64)
    with torch.no_grad(), memdense.use_backend(backend):
        every = memory.peak_memory(model.extract_features, x)
        one = memory.peak_memory(model, x)
    before = sum(block.nbytes for block in every.result[:-1])
    assert one.peak <= every.peak - 0.99 * before  # a few vectors lie beside


def test_less_than_torchvision_by_far() -> None:
    """The same net, small: a fifth of what plain modules save."""
    from torchvision.models import DenseNet

    x = torch.randn(4, 3, 64, 64)
    ours, theirs = memdense.DenseNet(16, (6, 8), 32), DenseNet(16, (6, 8), 32)
    assert 5 * saved(ours, x) <= saved(theirs, x)
