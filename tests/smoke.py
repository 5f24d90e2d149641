"""A minute's look at an installed memdense, on whichever torch runs this: `python tests/smoke.py`.

It needs nothing but torch: for the second version that one wheel has to serve.
"""

import torch
from torch.nn import functional as F

import memdense
from memdense import _extension


def convolution_error() -> float:
    """The largest difference between the extension's operation and PyTorch's, in float64."""
    x = torch.randn(2, 16, 13, 11, dtype=torch.float64)
    weight = torch.randn(12, 16, 3, 3, dtype=torch.float64)
    out = x.new_empty(2, 12, 13, 11)
    geometry = (1, 1), (2, 2), (2, 2)
    torch.ops.memdense.conv3x3(x, weight, None, *geometry, out)
    return (out - F.conv2d(x, weight, None, *geometry)).abs().max().item()


def step_error() -> float:
    """The largest difference of a training step's gradients between efficient and plain modules."""
    torch.manual_seed(0)
    model = memdense.DenseNet(12, (2, 2), 16, num_classes=5, small_inputs=True).double()
    plain = memdense.DenseNet(
        12, (2, 2), 16, num_classes=5, small_inputs=True, efficient=False
    ).double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for net in (model, plain):
        net(x).square().sum().backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return max((p.grad - q.grad).abs().max().item() for p, q in pairs)


def main() -> None:
    assert _extension.available(), _extension.reason()
    errors = convolution_error(), step_error()
    assert errors[0] < 1e-12 and errors[1] < 1e-10, errors
    # without CUDA in torch, the CUDA half must stay out of the way and say so
    assert _extension.cuda_available() == (torch.version.cuda is not None) or (
        "not built" in _extension.cuda_reason()
    ), _extension.cuda_reason()
    print(
        f"memdense {memdense.__version__} from {memdense.__path__[0]} passes on torch "
        f"{torch.__version__}; CUDA kernels: {_extension.cuda_reason() or 'built in'}"
    )


if __name__ == "__main__":
    main()
