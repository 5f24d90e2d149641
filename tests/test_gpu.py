"""What only a CUDA device can show. Everything else is tested on the CPU through the same
operations.
"""

import copy

import pytest
import torch
from exactness import assert_same_step, randomise, twins
from torch import Tensor, nn
from torchvision.models import DenseNet as Torchvision

import memdense
from memdense import memory

pytestmark = pytest.mark.gpu
ARGS = (8, (3, 4, 2), 12, 4, 0, 5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_agrees_with_torchvision(training: bool, layout: torch.memory_format) -> None:
    expected = Torchvision(*ARGS).double()
    randomise(expected, torch.Generator().manual_seed(1))
    found, expected = twins(expected, memdense.DenseNet(*ARGS).double())
    x = torch.randn(3, 3, 64, 72, dtype=torch.float64, device="cuda")

    def step(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x.contiguous(memory_format=layout))
        (out * torch.linspace(-1, 2, out.numel(), device="cuda").view_as(out)).sum().backward()
        return out

    assert_same_step(found.cuda().train(training), expected.cuda().train(training), x, step)


def test_autocast_is_as_near_float64_as_torchvision() -> None:
    theirs = Torchvision(*ARGS).cuda()
    ours = memdense.DenseNet(*ARGS).cuda()
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(ours).double()
    x = torch.randn(8, 3, 64, 64, device="cuda")
    exact(x.double()).square().sum().backward()
    errors = []
    for model in (ours, theirs):
        with torch.autocast("cuda", torch.bfloat16):
            out = model(x)
        out.float().square().sum().backward()
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        errors.append(sum((p.grad - q.grad).square().sum().item() for p, q in pairs) ** 0.5)
    assert errors[0] <= 1.5 * errors[1]


def test_peak_of_densenet121() -> None:
    """bf16 autocast, 224, against torchvision in the same dtype."""
    x = torch.randn(16, 3, 224, 224, device="cuda")
    peaks = []
    for model in (memdense.densenet121().cuda(), Torchvision().cuda()):

        def forward(x: Tensor, model: nn.Module = model) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return model(x)

        def step(forward=forward) -> None:
            forward(x).float().sum().backward()

        step()
        peaks.append(memory.peak_memory(step, device=torch.device("cuda")).peak)
    assert peaks[0] <= peaks[1] / 4


def test_a_side_stream_is_respected() -> None:
    model = memdense.DenseNet(*ARGS).double().cuda()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64, device="cuda")
    expected = copy.deepcopy(model)(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = model(x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
