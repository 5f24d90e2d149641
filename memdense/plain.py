"""A stage in plain differentiable PyTorch: what its operation computes, and how it is
differentiated twice, or for many gradients at once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .spec import Norm, Stage, StemSpec

CONVOLVE = {4: F.conv2d, 5: F.conv3d}
MAXIMUM = {4: F.max_pool2d, 5: F.max_pool3d}


def _norm(x: Tensor, norm: Norm) -> Tensor:
    return F.batch_norm(
        x, norm.mean, norm.var, norm.weight, norm.bias, norm.spec.batch, 0.0, norm.spec.eps
    )


def stage(x: Tensor, s: Stage, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(tail's output, features) of x (N, C, H, W), or volumes. No running statistics move; dropout
    takes its mask (M, L*k).
    """
    features, convolve = x, CONVOLVE[x.dim()]
    dropped = 0
    for layer in s.layers:
        new = F.relu(_norm(features, layer.norm1))
        if layer.norm2 is None:
            weight = layer.conv1
        else:
            new = F.relu(_norm(convolve(new, layer.conv1), layer.norm2))
            weight = layer.conv2
        new = convolve(new, weight, padding=layer.dilation, dilation=layer.dilation)
        if mask is not None:
            n, k, *size = new.shape
            keep = mask[:, dropped : dropped + k].view(n, *size, k).movedim(-1, 1)
            new = new * keep * (1 / (1 - s.drop_rate) if s.drop_rate < 1 else 0.0)
            dropped += k
        features = torch.cat((features, new), 1)
    return _tail(features, s), features


def _tail(features: Tensor, s: Stage) -> Tensor:
    if s.tail is None:
        return features.new_empty((0,))
    z = _norm(features, s.tail.norm)
    if s.tail.spec.relu:
        z = F.relu(z)
    if s.tail.spec.kind == "norm":
        return z
    if s.tail.spec.kind == "pool":
        return z.flatten(2).mean(2)
    z = CONVOLVE[z.dim()](z, s.tail.conv)
    return _mean(z) if s.tail.spec.pool == 2 else z


def _mean(z: Tensor) -> Tensor:
    """Over two pixels along each axis; of volumes in float32 at least, since on a CPU PyTorch has
    it in no 16 bits.
    """
    if z.dim() == 4:
        return F.avg_pool2d(z, 2)
    return F.avg_pool3d(z.to(torch.promote_types(z.dtype, torch.float32)), 2).to(z.dtype)


def stem(x: Tensor, weight: Tensor, norm: Norm, spec: StemSpec) -> Tensor:
    """conv0, norm0, relu0 and pool0."""
    z = CONVOLVE[x.dim()](x, weight, None, spec.stride, spec.padding, spec.dilation)
    return MAXIMUM[x.dim()](F.relu(_norm(z, norm)), 3, 2, 1)


def _renamed(t: Tensor | None, needed: bool) -> Tensor | None:
    """One input may be made of another, of which autograd asks elsewhere; and one whose gradient
    was needed in forward may have been frozen since.
    """
    if needed and not t.requires_grad:
        return t.detach().requires_grad_()
    # a view would have another stride along an axis of length 1
    return t if t is None else torch.ops.aten.alias(t)


def gradients(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    need: Sequence[bool],
    twice: bool,
) -> list[Tensor | None]:
    """Gradients of what ``function`` makes of its inputs, for those that ``need`` marks, None
    elsewhere; differentiable where they are needed ``twice``.
    """
    with torch.enable_grad():
        inputs = [_renamed(t, n) for t, n in zip(inputs, need, strict=True)]
        outputs = function(*inputs)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [t for t, n in zip(inputs, need, strict=True) if n]
    result = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=twice,
            allow_unused=True,
        )
    )
    return [next(result) if n else None for n in need]
