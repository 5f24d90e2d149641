"""Primitives of volumes (N, C, D, H, W), by a backend's own for images: those of their planes.

Each is an identity; the specification is the reference's method of the same name. Memory of (M, 3k)
is taken beside a bottleneck's (M, B); forward in 16 bits, of another (M, B).
"""

import torch
from torch import Tensor

from ..buffers import Geometry, Into, NormGradient, Reader, Sums, accumulator
from .reference import Reference, conv3x3_arguments, strided


def bn_relu_conv3x3(
    backend: Reference,
    x: Tensor,
    read: Reader,
    weight: Tensor,
    dilation: tuple[int, ...],
    geometry: Geometry,
    out: Tensor,
    keep: tuple[Tensor, float] | None,
    moments: Tensor | None,
) -> None:
    """out[d] = P_0[d-s] + P_1[d] + P_2[d+s], with P a 3x3 of 3k outputs of every plane. In 16 bits,
    which would round each of the three, PyTorch convolves.
    """
    target = geometry.pixels(out)
    if x.element_size() == 2:
        z = geometry.images(backend.bn_relu(x, read, True))
        new = torch.ops.aten.convolution(z, weight, None, *conv3x3_arguments(dilation))
        target.copy_(new.movedim(1, -1))
    else:
        k, s = len(weight), dilation[0]
        products = x.new_empty((len(x), 3 * k))
        backend.bn_relu_conv3x3(
            x, read, _stacked(weight), dilation[1:], geometry.planes, products, None, None
        )
        below, here, above = geometry.pixels(products).split(k, -1)
        inner = max(0, geometry.lines - s)
        target.copy_(here)
        target[:, s:].add_(below[:, :inner])
        target[:, :inner].add_(above[:, s:])
    if keep is not None:
        out.mul_(keep[0]).mul_(keep[1])
    if moments is not None:
        backend.statistics(out, moments)


def bn_relu_conv3x3_backward(
    backend: Reference,
    dy: Tensor,
    weight: Tensor,
    dilation: tuple[int, ...],
    x: Tensor,
    read: Reader,
    geometry: Geometry,
    into: Into | None,
    need_weight: bool,
) -> tuple[Tensor | None, Sums, Tensor | None]:
    """Answers dP_0[d] = dy[d+s], dP_1[d] = dy[d] and dP_2[d] = dy[d-s], 0 beyond the edges."""
    k, s = len(weight), dilation[0]
    answers = dy.new_zeros((len(dy), 3 * k))
    below, here, above = geometry.pixels(answers).split(k, -1)
    source, inner = geometry.pixels(dy), max(0, geometry.lines - s)
    below[:, :inner] = source[:, s:]
    here.copy_(source)
    above[:, s:] = source[:, :inner]
    dz, sums, dweight = backend.bn_relu_conv3x3_backward(
        answers, _stacked(weight), dilation[1:], x, read, geometry.planes, into, need_weight
    )
    if dweight is not None:
        dweight = dweight.unflatten(0, (3, k)).movedim(0, 2).contiguous()
    return dz, sums, dweight


def _stacked(weight: Tensor) -> Tensor:
    """(k, C, 3, 3, 3) as (3k, C, 3, 3)."""
    return weight.movedim(2, 0).flatten(0, 1)


def bn_relu_pool_conv1x1(
    backend: Reference, x: Tensor, read: Reader, weight: Tensor, geometry: Geometry
) -> Tensor:
    """The means of two planes' results each, a last odd plane left out."""
    planes = backend.bn_relu_pool_conv1x1(x, read, weight, geometry.planes)
    return _pairs(planes, geometry).mean(2).flatten(0, 2)


def bn_relu_pool_conv1x1_backward(
    backend: Reference,
    dout: Tensor,
    weight: Tensor,
    x: Tensor,
    read: Reader,
    geometry: Geometry,
    into: Into,
    need_weight: bool,
) -> tuple[Sums, Tensor | None]:
    """Half of dout for each of two planes."""
    planes = geometry.planes
    answers = dout.new_zeros((planes.halves.rows, dout.shape[1]))
    pairs = _pairs(answers, geometry)
    pairs.copy_((dout / 2).reshape(*pairs.shape[:2], 1, *pairs.shape[3:]))
    return backend.bn_relu_pool_conv1x1_backward(
        answers, weight, x, read, planes, into, need_weight
    )


def _pairs(rows: Tensor, geometry: Geometry) -> Tensor:
    """What stands for planes pooled already, (N, D // 2, 2, H // 2 * W // 2, C)."""
    n, half, h, w = geometry.halves
    planes = rows.view(n, geometry.lines, h * w, rows.shape[1])
    return planes[:, : 2 * half].unflatten(1, (half, 2))


def bn_relu_maxpool(
    backend: Reference, x: Tensor, read: Reader, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """The largest of three planes' maxima; of equal ones the first."""
    small = geometry.windows
    values, winners = (
        t.view(geometry.n, geometry.lines, -1)
        for t in backend.bn_relu_maxpool(x, read, geometry.planes)
    )
    out = values.new_full((small.n, small.lines, values.shape[2]), -torch.inf)
    winner = torch.empty_like(out, dtype=torch.uint8)
    for i in range(3):
        windows, planes = strided(small.lines, i - 1, geometry.lines)
        new, known = values[:, planes], out[:, windows]
        better = (new > known) | new.isnan()
        out[:, windows] = torch.where(better, new, known)
        winner[:, windows] = torch.where(better, winners[:, planes] + 9 * i, winner[:, windows])
    return out.view(small.rows, -1), winner.view(small.rows, -1)


def bn_relu_maxpool_sums(
    backend: Reference, dout: Tensor, winner: Tensor, x: Tensor, read: Reader, geometry: Geometry
) -> Sums:
    """A plane's maxima answer for the windows that they won."""
    answers = _planes_answers(dout, winner, geometry)
    return backend.bn_relu_maxpool_sums(*answers, x, read, geometry.planes)


def bn_relu_maxpool_backward(
    backend: Reference,
    dout: Tensor,
    winner: Tensor,
    x: Tensor,
    behind: NormGradient,
    geometry: Geometry,
    out: Tensor,
) -> None:
    """Of the same dz."""
    answers = _planes_answers(dout, winner, geometry)
    backend.bn_relu_maxpool_backward(*answers, x, behind, geometry.planes, out)


def _planes_answers(dout: Tensor, winner: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """dout and the winners of the planes' maxima."""
    n, lines, channels = geometry.n, geometry.windows.lines, dout.shape[1]
    dout, winner = dout.reshape(n, lines, -1), winner.view(n, lines, -1)
    # a plane may answer for two windows at once
    dtype = accumulator(dout.dtype)
    answers = dout.new_zeros((n, geometry.lines, dout.shape[2]), dtype=dtype)
    # where a plane won nothing: a window's middle is never outside
    winners = torch.full_like(answers, 4, dtype=winner.dtype)
    for i in range(3):
        windows, planes = strided(lines, i - 1, geometry.lines)
        won = winner[:, windows] // 9 == i
        answers[:, planes].add_(torch.where(won, dout[:, windows], 0))
        winners[:, planes] = torch.where(won, winner[:, windows] % 9, winners[:, planes])
    return answers.view(-1, channels), winners.view(-1, channels)
