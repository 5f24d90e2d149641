"""What a stage is, apart from its tensors: hashable, and a string where an operation's schema needs
one.
"""

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from typing import NamedTuple

from torch import Tensor


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """One number per axis of an image."""
    return per_axis(value, 2)


def per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One number, or one per axis, as PyTorch's modules take them."""
    # a tuple is known much faster than what else may be many
    many = type(value) is tuple or isinstance(value, Iterable)
    numbers = tuple(map(index, value)) if many else (index(value),)
    return numbers * axes if len(numbers) == 1 else numbers


def output_length(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Of a convolution or a pool, along one axis; below 1 where there is none."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def convolution_arguments(
    stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple:
    """What aten.convolution takes behind its tensors."""
    return stride, padding, dilation, False, (0,) * len(stride), 1


@dataclass(frozen=True)
class NormSpec:
    """How a BatchNorm reads: by the batch's statistics or running ones, affine or not."""

    eps: float
    batch: bool
    affine: bool


def _text(norm: NormSpec | None) -> str:
    # formatting takes torch.compile's symbolic numbers too, repr() does not
    return "None" if norm is None else f"({norm.eps}, {norm.batch}, {norm.affine})"


def _numbers(values: tuple[int, ...]) -> str:
    return f"({''.join(f'{value}, ' for value in values)})"


@dataclass(frozen=True)
class LayerSpec:
    norm1: NormSpec
    norm2: NormSpec | None  # None: a layer without bottleneck
    dilation: tuple[int, ...]  # one number per axis, as all of these


@dataclass(frozen=True)
class TailSpec:
    """What follows a block: ``transition`` (norm, relu, pool, 1x1), ``norm`` or ``pool`` (norm,
    relu, global mean).
    """

    kind: str
    norm: NormSpec
    relu: bool = True
    pool: int = 1


@dataclass(frozen=True)
class StageSpec:
    layers: tuple[LayerSpec, ...]
    tail: TailSpec | None
    drop_rate: float = 0.0
    keep_bottlenecks: bool = False
    group: str = ""  # of processes that norms synchronise with

    @property
    def tail_tensors(self) -> int:
        """How many of the stage's parameters are its tail's: the last ones."""
        if self.tail is None:
            return 0
        return 2 * self.tail.norm.affine + (self.tail.kind == "transition")

    def encode(self) -> str:
        layers = "".join(
            f"({_text(x.norm1)}, {_text(x.norm2)}, {_numbers(x.dilation)}), " for x in self.layers
        )
        t = self.tail
        tail = t and f"('{t.kind}', {_text(t.norm)}, {t.relu}, {t.pool})"
        return f"([{layers}], {tail}, {self.drop_rate}, {self.keep_bottlenecks}, '{self.group}')"

    @staticmethod
    @lru_cache(maxsize=4096)
    def decode(text: str) -> "StageSpec":
        layers, tail, *rest = ast.literal_eval(text)
        layers = tuple(
            LayerSpec(NormSpec(*norm1), norm2 and NormSpec(*norm2), tuple(dilation))
            for norm1, norm2, dilation in layers
        )
        if tail is not None:
            kind, norm, relu, pool = tail
            tail = TailSpec(kind, NormSpec(*norm), relu, pool)
        return StageSpec(layers, tail, *rest)


@dataclass(frozen=True)
class StemSpec:
    """A first convolution with BN-ReLU and a 3x3 max-pool of stride 2 behind it."""

    norm: NormSpec
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    recompute: bool
    group: str = ""

    def encode(self) -> str:
        geometry = ", ".join(map(_numbers, (self.stride, self.padding, self.dilation)))
        return f"({_text(self.norm)}, {geometry}, {self.recompute}, '{self.group}')"

    @staticmethod
    @lru_cache(maxsize=64)
    def decode(text: str) -> "StemSpec":
        norm, stride, padding, dilation, *rest = ast.literal_eval(text)
        return StemSpec(NormSpec(*norm), tuple(stride), tuple(padding), tuple(dilation), *rest)


class Norm(NamedTuple):
    """A BatchNorm's tensors, each (C,). ``mean`` and ``var`` are its running statistics where it
    reads by them.
    """

    spec: NormSpec
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None


class Layer(NamedTuple):
    norm1: Norm
    conv1: Tensor
    norm2: Norm | None
    conv2: Tensor | None
    dilation: tuple[int, ...]

    @property
    def growth(self) -> int:
        return (self.conv1 if self.conv2 is None else self.conv2).shape[0]

    @property
    def bottleneck(self) -> int:
        return 0 if self.conv2 is None else self.conv1.shape[0]


class Tail(NamedTuple):
    spec: TailSpec
    norm: Norm
    conv: Tensor | None  # the transition's


class Stage(NamedTuple):
    """A block's layers and its tail, tensors and all."""

    layers: list[Layer]
    tail: Tail | None
    drop_rate: float
    keep_bottlenecks: bool
    group: str = ""


def reads_of(stage: Stage) -> Iterator[tuple[int, int, Norm, Tensor | None]]:
    """(layer, number, norm, the convolution behind it) of each norm, number 1 or 2 of its layer, in
    the order of all lists of a stage's tensors; a tail counts as a last layer.
    """
    for i, layer in enumerate(stage.layers):
        yield i, 1, layer.norm1, layer.conv1
        if layer.norm2 is not None:
            yield i, 2, layer.norm2, layer.conv2
    if stage.tail is not None:
        yield len(stage.layers), 1, stage.tail.norm, stage.tail.conv


def flatten(stage: Stage) -> tuple[list[Tensor], list[Tensor]]:
    """A stage's tensors in order, parameters and running statistics apart.

    Parameters: of each norm gamma and beta, if affine, and the convolution behind it. Running
    statistics: mean and var of each norm that reads by them.
    """
    tensors: list[Tensor] = []
    running: list[Tensor] = []
    for _, _, norm, conv in reads_of(stage):
        if norm.spec.affine:
            tensors += (norm.weight, norm.bias)
        if not norm.spec.batch:
            running += (norm.mean, norm.var)
        if conv is not None:
            tensors.append(conv)
    return tensors, running


def unflatten(
    spec: StageSpec, tensors: Sequence[Tensor], running: Sequence[Tensor] | None = None
) -> Stage:
    """The inverse of :func:`flatten`; without ``running``, every norm's mean and var are None."""
    parameters, buffers = iter(tensors), iter(running or ())

    def norm(s: NormSpec) -> Norm:
        weight, bias = (next(parameters), next(parameters)) if s.affine else (None, None)
        if s.batch or running is None:
            return Norm(s, weight, bias, None, None)
        return Norm(s, weight, bias, next(buffers), next(buffers))

    layers = []
    for s in spec.layers:
        norm1, conv1 = norm(s.norm1), next(parameters)
        norm2, conv2 = (None, None) if s.norm2 is None else (norm(s.norm2), next(parameters))
        layers.append(Layer(norm1, conv1, norm2, conv2, s.dilation))
    tail = None
    if spec.tail is not None:
        tail = Tail(
            spec.tail,
            norm(spec.tail.norm),
            next(parameters) if spec.tail.kind == "transition" else None,
        )
    return Stage(layers, tail, spec.drop_rate, spec.keep_bottlenecks, spec.group)


def parameter_names(stage: Stage) -> list[tuple[int, str]]:
    """(layer, name) of each parameter in :func:`flatten`'s order."""
    names: list[tuple[int, str]] = []
    for i, number, norm, conv in reads_of(stage):
        if norm.spec.affine:
            names += ((i, f"gamma{number}"), (i, f"beta{number}"))
        if conv is not None:
            names.append((i, f"conv{number}"))
    return names


def spec_of(stage: Stage) -> StageSpec:
    layers = tuple(
        LayerSpec(x.norm1.spec, x.norm2 and x.norm2.spec, x.dilation) for x in stage.layers
    )
    tail = stage.tail and stage.tail.spec
    return StageSpec(layers, tail, stage.drop_rate, stage.keep_bottlenecks, stage.group)
