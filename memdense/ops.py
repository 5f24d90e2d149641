"""Registration: the stage and the stem as PyTorch operations, with shapes for tracing and autograd.

Each is functional (it returns what backward needs) and runs with autocast off: callers cast. The
backend is chosen in :mod:`memdense.backends` and nowhere else.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import make_contiguous_strides_for
from torch.nn import Parameter

from . import engine, plain
from .backends import Reference, backend_for, chosen, unless_chosen
from .buffers import CHANNELS_LAST, StatisticsTable, accumulator, row_stride
from .convolution import layout_of
from .direct import batched, is_compiling, learns, watched
from .spec import Norm, Stage, StageSpec, StemSpec, output_length, unflatten

Update = Callable[[Tensor], None]  # of running statistics, by a stage's or the stem's own

_DOUBLE_BACKWARD = (
    "memdense does not keep what differentiating a gradient (create_graph=True) needs: "
    "build or convert the model with double_backward=True, or set that of its memdense.Features"
)
_JOINT = "SyncBatchNorm's gradients cannot be differentiated, nor taken many at once"


@contextmanager
def quiet(x: Tensor) -> Iterator[None]:
    """Autocast off, and x's device the current one."""
    # torch.autocast(enabled=False) takes ten times as long
    with torch._C._DisableAutocast(), torch.cuda.device_of(x):
        yield


def _images(x: Tensor, n: int, c: int, size: Iterable[int], stride: int | None = None) -> Tensor:
    """An empty (N, C, *size), channels last, its pixels ``stride`` values apart."""
    return x.new_empty((n, *size, stride or c))[..., :c].movedim(-1, 1)


# ---- stage: a dense block and its tail


def _stage(
    x: Tensor,
    tensors: Sequence[Tensor],
    running: Sequence[Tensor],
    mask: Tensor | None,
    spec: str,
    double_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(out, features, statistics, bottlenecks) of a stage; see :class:`memdense.engine.Forward`.

    Args:
        x: (N, C, H, W) or (N, C, D, H, W), in the dtype to compute in; channels last where there
            are no layers, or it is copied.
        tensors, running: parameters and running statistics, as :func:`memdense.spec.flatten` orders
            them.
        mask: dropout's, (M, L*k) bool, or None.
        spec: :meth:`memdense.spec.StageSpec.encode`.
        double_backward: keep x, so that gradients can be differentiated.
    """
    with quiet(x):
        out, features, statistics, *bottlenecks = _runner(x.device, spec)(
            _forward_pass, (x, mask), (*tensors, *running), spec, len(tensors)
        )
    # .data: not views to autograd, so that a user may change them in place as any module's output
    return out.data, features.data, statistics, bottlenecks


def _runner(device: torch.device, spec: str) -> Callable[..., list[Tensor]]:
    """What runs a pass: the backend's own way, or where processes talk in it one by one."""
    backend = backend_for(device)
    return partial(Reference.call, backend) if StageSpec.decode(spec).group else backend.call


def _forward_pass(
    backend: engine.Backend,
    moving: Sequence[Tensor | None],
    fixed: Sequence[Tensor],
    spec: str,
    count: int,
) -> list[Tensor]:
    """The engine's, of x and mask, ``count`` parameters and the running statistics behind them."""
    x, mask = moving
    s = unflatten(StageSpec.decode(spec), fixed[:count], fixed[count:])
    out, features, statistics, bottlenecks = engine.forward(x, s, mask, backend)
    return [out, features, statistics, *bottlenecks]


stage = torch.library.custom_op("memdense::stage", _stage, mutates_args=())


@stage.register_fake
def _(x, tensors, running, mask, spec, double_backward):
    s = unflatten(StageSpec.decode(spec), tensors)
    n, c, *size = x.shape
    last = c + sum(layer.growth for layer in s.layers)
    kept = (
        [x.new_empty((n * prod(size), each.bottleneck)) for each in s.layers if each.bottleneck]
        if s.keep_bottlenecks
        else []
    )
    statistics = StatisticsTable(s, c, like=x).table
    features = x.new_empty((0,))
    if s.layers:
        features = _images(x, n, last, size, row_stride(last, x.device))
    return _fake_out(x, s, last), features, statistics, kept


def _fake_out(x: Tensor, s: Stage, channels: int) -> Tensor:
    n, _, *size = x.shape
    if s.tail is None:
        return x.new_empty((0,))
    if s.tail.spec.kind == "pool":
        return x.new_empty((n, channels))
    if s.tail.spec.kind == "norm":
        return _images(x, n, channels, size)
    return _images(x, n, s.tail.conv.shape[0], (length // s.tail.spec.pool for length in size))


def _stage_backward(
    dout: Tensor | None,
    dfeatures: Tensor | None,
    features: Tensor,
    statistics: Tensor,
    bottlenecks: Sequence[Tensor],
    tensors: Sequence[Tensor],
    mask: Tensor | None,
    spec: str,
    need_x: bool,
    need: Sequence[bool],
) -> list[Tensor]:
    """The gradients that ``need_x`` and ``need`` ask for, in order; see
    :func:`memdense.engine.backward`.
    """
    with quiet(features):
        return _runner(features.device, spec)(
            _backward_pass,
            (dout, dfeatures, features, statistics, mask, *bottlenecks),
            tensors,
            spec,
            need_x,
            tuple(need),
        )


def _backward_pass(
    backend: engine.Backend,
    moving: Sequence[Tensor | None],
    fixed: Sequence[Tensor],
    spec: str,
    need_x: bool,
    need: Sequence[bool],
) -> list[Tensor]:
    """The engine's, of what the gradients need and the stage's parameters."""
    dout, dfeatures, features, statistics, mask, *bottlenecks = moving
    s = unflatten(StageSpec.decode(spec), fixed)
    dx, dtensors = engine.backward(
        dout, dfeatures, features, statistics, bottlenecks, s, mask, need_x, need, backend
    )
    return [g for g, n in zip([dx, *dtensors], [need_x, *need], strict=True) if n]


stage_backward = torch.library.custom_op(
    "memdense::stage_backward", _stage_backward, mutates_args=()
)


@stage_backward.register_fake
def _(dout, dfeatures, features, statistics, bottlenecks, tensors, mask, spec, need_x, need):
    n, last, *size = features.shape
    c = last - sum(layer.growth for layer in unflatten(StageSpec.decode(spec), tensors).layers)
    dx = [_images(features, n, c, size)] if need_x else []
    return dx + [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, wanted in zip(tensors, need, strict=True)
        if wanted
    ]


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, tensors, running, mask, ctx.spec, double_backward = inputs
    _, features, statistics, bottlenecks = output
    ctx.backend = chosen()
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics, *bottlenecks)
    if not StageSpec.decode(ctx.spec).layers:
        features = x
    ctx.kept, ctx.layout = len(bottlenecks), layout_of(x)
    # no gradient for running statistics, mask, spec and switch
    ctx.rest = [None] * len(running), None, None, None
    ctx.save_for_backward(
        features, statistics, mask, x if double_backward else None, *bottlenecks, *tensors
    )


def _gradients(
    ctx: Any, dout: Tensor | None, dfeatures: Tensor | None, need_x: bool, need: list[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Of x and of the stage's tensors."""
    features, statistics, mask, x, *rest = ctx.saved_tensors
    statistics = statistics.contiguous()  # which hooks of saved tensors need not hand back
    bottlenecks, tensors = rest[: ctx.kept], rest[ctx.kept :]
    spec = StageSpec.decode(ctx.spec)
    # the answers to empty outputs
    if spec.tail is None:
        dout = None
    if not spec.layers:
        dfeatures = None
    if dout is None and dfeatures is None:
        return None, [None] * len(tensors)
    if dout is None:
        # a tail nobody used: its parameters get no gradient, not a gradient of zeros
        first = len(need) - spec.tail_tensors
        need[first:] = [False] * (len(need) - first)
    twice, many = torch.is_grad_enabled(), batched(dout, dfeatures)
    if (twice or many) and spec.group:
        raise RuntimeError(_JOINT)
    if twice and x is None:
        raise RuntimeError(_DOUBLE_BACKWARD)
    if twice or many:  # PyTorch's own operations have rules for it
        if x is None:
            growths = (layer.growth for layer in unflatten(spec, tensors).layers)
            # requires_grad_ is refused in a transform
            x = Parameter(features[:, : features.shape[1] - sum(growths)])

        def again(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            s = unflatten(spec, _cast_convolutions(tensors, x))
            return plain.stage(x, StatisticsTable(s, x.shape[1], statistics).running(s), mask)

        with quiet(features):
            found = plain.gradients(again, [x, *tensors], (dout, dfeatures), [need_x, *need], twice)
        return found[0], found[1:]
    seen = watched(dout, dfeatures, features, statistics, mask, *rest)
    run = stage_backward if seen else _stage_backward
    with unless_chosen(ctx.backend):
        found = iter(
            run(
                dout,
                dfeatures,
                features,
                statistics,
                bottlenecks,
                tensors,
                mask,
                ctx.spec,
                need_x,
                need,
            )
        )
    # in x's layout, as hooks see it of modules
    dx = _in_layout(next(found), ctx.layout) if need_x else None
    return dx, [
        _laid_out(next(found), t) if n else None for n, t in zip(need, tensors, strict=True)
    ]


def _in_layout(images: Tensor, layout: torch.memory_format) -> Tensor:
    """Images in a memory format, also by the strides that one channel leaves open."""
    images = images.contiguous(memory_format=layout)
    if images.shape[1] > 1 or layout is not torch.contiguous_format:
        return images
    return images.as_strided(images.shape, make_contiguous_strides_for(images.shape))


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient with its parameter's strides, where they say the same of a 1x1 convolution's: DDP
    warns of others.
    """
    if parameter.dim() < 4 or gradient.stride() == parameter.stride():
        return gradient
    shape, strides = parameter.shape, parameter.stride()
    if shape[2:].numel() == 1 and gradient.stride()[:2] == strides[:2] == (shape[1], 1):
        return gradient.as_strided(shape, strides)
    return gradient


def _backward(ctx: Any, dout: Tensor | None, dfeatures: Tensor | None, *_: Any) -> tuple:
    need_x, need, *_ = ctx.needs_input_grad
    return *_gradients(ctx, dout, dfeatures, need_x, list(need)), *ctx.rest


def _cast_convolutions(tensors: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    return [t.to(x.dtype) if t.dim() > 1 else t for t in tensors]


stage.register_autograd(_backward, setup_context=_setup)


class _Stage(torch.autograd.Function):
    """memdense::stage, by ``run``: itself, or without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running: Sequence[Tensor],
        mask: Tensor | None,
        spec: str,
        double_backward: bool,
        update: Update | None,
        run: Callable[..., tuple],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = x, tensors, running, mask, spec, double_backward
        output = run(*inputs)
        # before anything is saved: there a checkpoint may stop what it runs again
        if update is not None:
            update(output[2])
        _setup(ctx, inputs, output)
        return *output[:3], *output[3]

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dfeatures: Tensor | None, *_: Any) -> tuple:
        need_x, *need = ctx.needs_input_grad
        dx, dtensors = _gradients(ctx, dout, dfeatures, need_x, need[6:])
        return dx, *(None,) * 6, *dtensors


def run_stage(
    x: Tensor,
    tensors: Sequence[Tensor],
    running: Sequence[Tensor],
    mask: Tensor | None,
    spec: str,
    double_backward: bool,
    update: Update | None,
) -> tuple[Tensor, Tensor]:
    """(out, features) of :func:`stage`, which it calls where something watches; ``update`` is given
    its statistics, once.
    """
    inputs = x, tensors, running, mask, spec, double_backward
    run = stage if watched(x, mask, *tensors, *running) else _stage
    if learns(x, *tensors) and not is_compiling():
        return _Stage.apply(x, running, mask, spec, double_backward, update, run, *tensors)[:2]
    out, features, statistics, _ = run(*inputs)
    if update is not None:
        update(statistics)
    return out, features


# ---- stem: conv0, norm0, relu0, pool0


def _stem(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, convolved, winner, statistics) of the stem; see :class:`memdense.engine.StemForward`.

    Args:
        x: images (N, C_in, H, W), or volumes, in the dtype to compute in.
        weight: conv0's.
        gamma, beta, mean, var: norm0's, (C,); mean and var where it reads by running statistics.
        spec: :meth:`memdense.spec.StemSpec.encode`.
    """
    s = StemSpec.decode(spec)
    with quiet(x):
        out, *rest = engine.stem_forward(
            x, weight, Norm(s.norm, gamma, beta, mean, var), s, backend_for(x.device)
        )
    return out.data, *rest


stem = torch.library.custom_op("memdense::stem", _stem, mutates_args=())


@stem.register_fake
def _(x, weight, gamma, beta, mean, var, spec):
    s = StemSpec.decode(spec)
    n, c = x.shape[0], weight.shape[0]
    geometry = s.stride, s.padding, s.dilation
    size = list(map(output_length, x.shape[2:], weight.shape[2:], *geometry))
    convolved = x.new_empty((0,)) if s.recompute else _images(x, n, c, size)
    small = [(length + 1) // 2 for length in size]
    winner = x.new_empty((n * prod(small), c), dtype=torch.uint8)
    return (
        _images(x, n, c, small),
        convolved,
        winner,
        x.new_empty((2, c + (1 if s.group else 0)), dtype=accumulator(x.dtype)),
    )


def _stem_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    convolved: Tensor,
    winner: Tensor,
    statistics: Tensor,
    spec: str,
    need: Sequence[bool],
) -> list[Tensor]:
    """The gradients of x, weight, gamma, beta that ``need`` asks for; see
    :func:`memdense.engine.stem_backward`.
    """
    s = StemSpec.decode(spec)
    norm = Norm(s.norm, gamma, beta, None, None)
    with quiet(x):
        found = engine.stem_backward(
            dout, x, weight, norm, convolved, winner, statistics, s, need, backend_for(x.device)
        )
    tensors = (x, weight, gamma, beta)
    return [g.to(t.dtype) for g, t, n in zip(found, tensors, need, strict=True) if n]


stem_backward = torch.library.custom_op("memdense::stem_backward", _stem_backward, mutates_args=())


@stem_backward.register_fake
def _(dout, x, weight, gamma, beta, convolved, winner, statistics, spec, need):
    packed = torch.contiguous_format
    layouts = (CHANNELS_LAST[x.dim()], packed, packed, packed)
    found = zip((x, weight, gamma, beta), layouts, need, strict=True)
    return [torch.empty_like(t, memory_format=layout) for t, layout, n in found if n]


def _setup_stem(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, gamma, beta, _, _, ctx.spec = inputs
    _, convolved, winner, statistics = output
    ctx.backend = chosen()
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(convolved, winner, statistics)
    ctx.save_for_backward(x, weight, gamma, beta, convolved, winner, statistics)


def _backward_stem(ctx: Any, dout: Tensor | None, *_: Any) -> tuple:
    x, weight, gamma, beta, convolved, winner, statistics = ctx.saved_tensors
    # which hooks of saved tensors need not hand back
    winner, statistics = winner.contiguous(), statistics.contiguous()
    need = list(ctx.needs_input_grad[:4])
    rest = (None,) * 3
    if dout is None:
        return (None,) * 4 + rest
    twice = torch.is_grad_enabled()
    if twice or batched(dout):
        s = StemSpec.decode(ctx.spec)
        if s.group:
            raise RuntimeError(_JOINT)
        running = (None, None) if s.norm.batch else statistics.unbind()

        def again(x: Tensor, weight: Tensor, *affine: Tensor | None) -> list[Tensor]:
            return [plain.stem(x, weight.to(x.dtype), Norm(s.norm, *affine, *running), s)]

        with quiet(x):
            found = plain.gradients(again, [x, weight, gamma, beta], [dout], need, twice)
        return (*found, *rest)
    seen = watched(dout, x, weight, gamma, beta, convolved, winner, statistics)
    run = stem_backward if seen else _stem_backward
    tensors = x, weight, gamma, beta, convolved, winner, statistics
    with unless_chosen(ctx.backend):
        found = iter(run(dout, *tensors, ctx.spec, need))
    dx, *others = (next(found) if n else None for n in need)
    # in the images' layout, as hooks see it of modules
    return dx if dx is None else _in_layout(dx, layout_of(x)), *others, *rest


stem.register_autograd(_backward_stem, setup_context=_setup_stem)


class _Stem(torch.autograd.Function):
    """memdense::stem, by ``run``: itself, or without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *inputs, update, run = inputs
        output = run(*inputs)
        if update is not None:
            update(output[3])
        _setup_stem(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *rest: Any) -> tuple:
        return *_backward_stem(ctx, dout, *rest), None, None


def run_stem(x: Tensor, *tensors: Tensor | None, spec: str, update: Update | None) -> Tensor:
    """The output of :func:`stem`, which it calls where something watches; ``update`` is given its
    statistics, once. ``tensors``: weight to var.
    """
    run = stem if watched(x, *tensors) else _stem
    if learns(x, *tensors) and not is_compiling():
        return _Stem.apply(x, *tensors, spec, update, run)[0]
    out, _, _, statistics = run(x, *tensors, spec)
    if update is not None:
        update(statistics)
    return out


# ---- running statistics


def _update_running_statistics(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    counts: Sequence[Tensor],
    statistics: Tensor,
    starts: Sequence[int],
    momenta: Sequence[float],
    rows: int,
) -> None:
    """One training step of BatchNorm's buffers: running = (1 - m)*running + m*batch, with the
    unbiased variance.

    Args:
        means, variances: the buffers, each (C,).
        counts: num_batches_tracked, which go up by one; may be empty.
        statistics: mean and biased variance of the batch, (2, columns).
        starts: where each buffer's C columns begin.
        momenta: below 0 for ``momentum=None``: m = 1 / count.
        rows: how many values each channel had.
    """
    with quiet(statistics):
        backend_for(statistics.device).update_running(
            means, variances, counts, statistics, starts, momenta, rows
        )


update_running_statistics = torch.library.custom_op(
    "memdense::update_running_statistics",
    _update_running_statistics,
    mutates_args=("means", "variances", "counts"),
)


@update_running_statistics.register_fake
def _(means, variances, counts, statistics, starts, momenta, rows) -> None:
    return None


def move_running_statistics(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    counts: Sequence[Tensor],
    statistics: Tensor,
    *rest: Any,
) -> None:
    """:func:`update_running_statistics`, which it calls where something watches."""
    seen = watched(*means, *variances, *counts, statistics)
    run = update_running_statistics if seen else _update_running_statistics
    run(means, variances, counts, statistics, *rest)
