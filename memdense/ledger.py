"""The ledger of a training step: every buffer in the order in which it comes and goes.

The walks below replay, in bytes, what the code allocates; each line names the buffer that it stands
for. Shapes come from the modules themselves (on the meta device they cost nothing), so that the
ledger follows the model. Notation as in :mod:`memdense.engine`: M = N*H*W pixels, C_l the channels
that layer l reads, C_max all of a block's, B its bottleneck's, k its growth rate.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .backends.native import Native
from .backends.reference import Reference, equal_parts
from .buffers import Geometry, GradientBuffer, reader_columns, row_stride
from .densenet import DenseNet
from .explain import size_after
from .features import Features
from .spec import Layer, Stage, flatten
from .structure import Unsupported, article

# bytes of statistics, sums, weight gradients and a wide G: float32
WIDE = 4
# bytes of an index of PyTorch's own max-pool
INDEX = 8


class Buffer(NamedTuple):
    name: str
    size: int


NOTHING = Buffer("", 0)


class Ledger:
    """What is alive, buffer by buffer, and the moment at which most was.

    Attributes:
        total: bytes alive now.
        kept: bytes alive between forward and backward.
        peak: the most bytes that were ever alive.
        at_peak: those bytes by the buffers' names.
        where: what runs now; ``peak_where``: what ran at the peak.
    """

    def __init__(self) -> None:
        self.live: dict[str, int] = {}
        self.total = self.kept = self.peak = 0
        self.where = self.peak_where = ""
        self.at_peak: dict[str, int] = {}

    def new(self, name: str, size: int) -> Buffer:
        self.live[name] = self.live.get(name, 0) + size
        self.total += size
        if self.total > self.peak:
            self.peak, self.peak_where, self.at_peak = self.total, self.where, self.live.copy()
        return Buffer(name, size)

    def free(self, *buffers: Buffer) -> None:
        for name, size in buffers:
            if size:
                self.live[name] -= size
                self.total -= size

    @contextmanager
    def hold(self, name: str, size: int) -> Iterator[None]:
        """A buffer that lives as long as a ``with`` block."""
        buffer = self.new(name, size)
        yield
        self.free(buffer)

    def spike(self, name: str, size: int) -> None:
        """A buffer that comes and goes at once."""
        self.free(self.new(name, size))


@dataclass(frozen=True)
class Part:
    """A part of a network and the size of what it works on.

    Attributes:
        kind: "conv" (a lone first convolution), "stem" or "stage".
        name: its first module's.
        height, width: of a stage's pixels, or of the first convolution's output.
        stage: a stage's layers and tail.
        conv: the others' convolution.
    """

    kind: str
    name: str
    height: int
    width: int
    stage: Stage | None = None
    conv: nn.Conv2d | None = None

    def geometry(self, images: int) -> Geometry:
        return Geometry(images, self.height, self.width)


class Network(NamedTuple):
    """A DenseNet as the ledger sees it.

    Attributes:
        parts: from the first convolution to the last block.
        image_values: of one image.
        classifier: what follows the global mean.
    """

    parts: tuple[Part, ...]
    image_values: int
    classifier: nn.Linear


def read_network(model: DenseNet, height: int, width: int) -> Network:
    """``model``, in training mode and on any device, for images of ``height`` x ``width``.

    Raises:
        ValueError: nothing is left of such images somewhere in it.
        Unsupported: a part of it would run as plain modules, or is not a DenseNet's.
    """
    features = model.features
    for name, module, kind in (
        ("features", features, Features), ("classifier", model.classifier, nn.Linear)
    ):  # fmt: skip
        if not isinstance(module, kind):
            raise Unsupported(f"{name} is {article(type(module).__name__)}")
    parts = []
    size: tuple[int, int] = (height, width)
    steps = features.steps("pool")
    if not steps or steps[-1].tail != "pool":
        raise Unsupported("features does not end with a norm")
    for step in steps:
        modules = [features._modules[name] for name in step.names]
        if step.kind == "stage":
            part = Part("stage", step.names[0], *size, stage=features.read(step).stage)
            modules = modules[1:]
        else:
            kind = "stem" if step.kind == "stem" else "conv"
            if not isinstance(modules[0], nn.Conv2d):
                name = type(modules[0]).__name__
                raise Unsupported(f"{step.names[0]} is {article(name)}, not a convolution")
            part = Part(kind, step.names[0], *size_after(modules[0], size), conv=modules[0])
        parts.append(part)
        for module in modules:
            size = size_after(module, size)
        if min(*size, part.height, part.width) < 1:
            raise ValueError(f"nothing is left of {height} x {width} pixels behind {part.name}")
    values = features[0].in_channels * height * width
    return Network(tuple(parts), values, model.classifier)


def channels_of(stage: Stage) -> tuple[int, int]:
    """(C_0, C_max)"""
    first = stage.layers[0].conv1.shape[1]
    return first, first + sum(layer.growth for layer in stage.layers)


def reading(stage: Stage) -> Iterator[tuple[int, Layer]]:
    """(C_l, layer) of each layer."""
    channels = channels_of(stage)[0]
    for layer in stage.layers:
        yield channels, layer
        channels += layer.growth


class Setting(NamedTuple):
    """How a network runs.

    Attributes:
        name: as people read it.
        kind: "memdense"; "plain", module by module; or "checkpoint", torchvision's
            ``memory_efficient``.
        keep_bottlenecks, recompute_stem, double_backward: see :class:`memdense.DenseNet`.
    """

    name: str
    kind: str = "memdense"
    keep_bottlenecks: bool = False
    recompute_stem: bool = True
    double_backward: bool = False


class Machine(NamedTuple):
    """Where and in what numbers a network runs.

    Attributes:
        device: "cpu" or "cuda".
        backend: "triton", "native" or "reference".
        dtype: of activations; a 16-bit one means autocast over float32 parameters.
        threads: that the CPU's kernels use.
    """

    device: str
    backend: str
    dtype: torch.dtype
    threads: int = 1


def replay(network: Network, batch: int, setting: Setting, machine: Machine) -> Ledger:
    """The ledger of a training step with ``batch`` images: forward, cross entropy, backward.

    It counts what :func:`memdense.memory.training_step_memory` counts: bytes above parameters,
    buffers, images and ``.grad``, which exist before.
    """
    walk = {"memdense": Efficient, "plain": Plain, "checkpoint": Checkpoint}[setting.kind]
    return walk(network, batch, setting, machine).run()


class Walk:
    """From the first convolution to the loss and back; subclasses know the parts.

    A part's forward takes the buffer it reads and returns the one it hands on, its backward the
    gradients of both; what it keeps in between goes to ``self.kept``.
    """

    def __init__(self, network: Network, batch: int, setting: Setting, machine: Machine) -> None:
        self.ledger = Ledger()
        self.parts, values, self.classifier = network
        self.until_loss: list[Buffer] = []  # what autocast holds for the whole forward pass
        self.kept: dict[str, list[Buffer]] = {part.name: [] for part in self.parts}
        self.images = batch * values
        self.n = batch
        self.setting, self.machine = setting, machine
        self.a = machine.dtype.itemsize  # of an activation
        self.autocast = self.a < WIDE

    def run(self) -> Ledger:
        ledger = self.ledger
        handed = images = ledger.new("images in 16 bits", self.images * self.a * self.autocast)
        for part in self.parts:
            ledger.where = f"{part.name}, forward"
            handed = getattr(self, f"{part.kind}_forward")(part, handed)
        ledger.where = "classifier"
        handed = self.head(handed)
        for part in reversed(self.parts):
            ledger.where = f"{part.name}, backward"
            handed = getattr(self, f"{part.kind}_backward")(part, handed)
        ledger.free(images)
        return ledger

    def cast(self, weights: int) -> Buffer:
        """Autocast's 16-bit copies of weights."""
        return self.ledger.new("weights in 16 bits", weights * self.a * self.autocast)

    def weight_gradient(self, weights: int, *kept: Buffer) -> None:
        """A module's: made, then (under autocast) in 32 bits, added to ``.grad``, freed. What the
        module kept goes before.
        """
        with self.ledger.hold("weight gradients", weights * self.a):
            self.ledger.free(*kept)
            self.ledger.spike("weight gradients", weights * WIDE * self.autocast)

    def head(self, pooled: Buffer) -> Buffer:
        """Classifier and cross entropy, forward and backward: returns the gradient of ``pooled``,
        the means of the last features.
        """
        ledger, linear = self.ledger, self.classifier
        weights, logits = linear.weight.numel(), self.n * linear.out_features
        casts = self.cast(weights + linear.out_features)
        with ledger.hold("loss", logits * self.a):  # logits
            ledger.free(*self.until_loss)
            loss = ledger.new("loss", logits * WIDE)  # log-softmax, kept
        ledger.kept = ledger.total
        with ledger.hold("loss", logits * WIDE):  # the gradient of log-softmax
            ledger.spike("loss", logits * WIDE)  # of the logits
            ledger.free(loss)
            handed = ledger.new("handed back", self.n * linear.in_features * self.a)
            self.weight_gradient(weights, casts, pooled)
        return handed

    # ---- a lone first convolution, a module in every setting

    def conv_forward(self, part: Part, images: Buffer) -> Buffer:
        self.kept[part.name] = [self.cast(part.conv.weight.numel())]
        rows = part.geometry(self.n).rows
        return self.ledger.new("handed on", rows * part.conv.out_channels * self.a)

    def conv_backward(self, part: Part, handed: Buffer) -> Buffer:
        self.weight_gradient(part.conv.weight.numel(), *self.kept.pop(part.name))
        self.ledger.free(handed)
        return NOTHING


class Efficient(Walk):
    """:mod:`memdense.engine`, line by line."""

    def call(self) -> "FusedScratch":
        """A backend's scratch: it belongs to one call."""
        backend = self.machine.backend
        if backend == "native" and self.machine.dtype not in Native.dtypes:
            backend = "reference"
        return SCRATCH[backend](self.ledger, self.machine)

    def row(self, channels: int) -> int:
        """The row stride of X and G: on a GPU rows start at multiples of 16 channels."""
        return row_stride(channels, torch.device(self.machine.device))

    # ---- the stem

    def stem_forward(self, part: Part, images: Buffer) -> Buffer:
        ledger, geometry, channels = self.ledger, part.geometry(self.n), part.conv.out_channels
        pooled = geometry.windows.rows * channels
        scratch = self.call()
        convolved = self.convolve(part)
        scratch.statistics(geometry.rows, channels)
        out = ledger.new("handed on", pooled * self.a)
        self.kept[part.name].append(ledger.new("stem: winners", pooled))  # a byte each
        scratch.maxpool(geometry, channels)
        if self.setting.recompute_stem:
            ledger.free(convolved)
        else:
            self.kept[part.name].append(convolved)
        scratch.close()
        return out

    def convolve(self, part: Part) -> Buffer:
        weight = self.cast(part.conv.weight.numel())
        with self.ledger.hold("images, channels last", self.images * self.a):
            values = part.geometry(self.n).rows * part.conv.out_channels
            convolved = self.ledger.new("stem: conv0's output", values * self.a)
        self.ledger.free(weight)
        return convolved

    def stem_backward(self, part: Part, handed: Buffer) -> Buffer:
        ledger, geometry, channels = self.ledger, part.geometry(self.n), part.conv.out_channels
        scratch = self.call()
        if self.setting.recompute_stem:
            self.kept[part.name].append(self.convolve(part))
        scratch.maxpool_sums(geometry, channels)
        # where conv0's output was recomputed it takes its place
        size = 0 if self.setting.recompute_stem else geometry.rows * channels * self.a
        with ledger.hold("stem: gradient of conv0's output", size):
            scratch.maxpool_backward(geometry, channels)
            # and on the CPU copies of the weight, in layouts of the convolution's own
            copies = 3 * part.conv.weight.numel() * self.a * (self.machine.device == "cpu")
            with ledger.hold("images, channels last", self.images * self.a + copies):
                self.weight_gradient(part.conv.weight.numel())
        scratch.close()
        ledger.free(handed, *self.kept.pop(part.name))
        return NOTHING

    # ---- a stage

    def stage_forward(self, part: Part, x: Buffer) -> Buffer:
        ledger, stage, geometry = self.ledger, part.stage, part.geometry(self.n)
        rows, (first, last) = geometry.rows, channels_of(stage)
        kept = self.kept[part.name]
        if stage.drop_rate:
            masks = rows * (last - first)
            with ledger.hold("dropout masks", masks):  # one for each layer, and what each is
                ledger.spike("dropout masks", rows * stage.layers[-1].growth * self.a)  # drawn in
                kept.append(ledger.new("dropout masks", masks))
        casts = self.cast(convolution_weights(stage))
        scratch = self.call()
        kept.append(ledger.new("X, features", rows * self.row(last) * self.a))
        kept.append(ledger.new("statistics", 2 * reader_columns(stage, first)[1] * WIDE))
        scratch.pack(geometry, first)
        for channels, layer in reading(stage):
            if layer.norm2 is None:
                scratch.conv3x3(Conv3x3(geometry, channels, layer.growth, layer.dilation))
                continue
            y = ledger.new("Y, bottlenecks", rows * layer.bottleneck * self.a)
            scratch.conv1x1(rows, channels, layer.bottleneck)
            scratch.conv3x3(Conv3x3(geometry, layer.bottleneck, layer.growth, layer.dilation))
            if self.setting.keep_bottlenecks:
                kept.append(y)
            else:
                ledger.free(y)
        out = self.tail_forward(stage, geometry, last, scratch)
        scratch.close()
        ledger.free(casts)
        if self.setting.double_backward:
            kept.append(x)
        else:
            ledger.free(x)
        return out

    def tail_forward(
        self, stage: Stage, geometry: Geometry, last: int, scratch: "FusedScratch"
    ) -> Buffer:
        tail = stage.tail
        if tail.conv is None:
            scratch.mean(geometry, last)
            return self.ledger.new("pooled", self.n * last * self.a)
        pool, channels = tail.spec.pool, tail.conv.shape[0]
        rows = geometry.halves.rows if pool == 2 else geometry.rows
        out = self.ledger.new("handed on", rows * channels * self.a)
        if pool == 2:
            scratch.pool_conv1x1(geometry, last, channels)
        else:
            scratch.conv1x1(rows, last, channels)
        return out

    def stage_backward(self, part: Part, dout: Buffer) -> Buffer:
        ledger, stage, geometry = self.ledger, part.stage, part.geometry(self.n)
        rows, (first, last) = geometry.rows, channels_of(stage)
        casts = self.cast(convolution_weights(stage))
        scratch = self.call()
        wide = stage.tail.spec.kind != "transition" or rows <= GradientBuffer.WIDE_ROWS
        scratch.g_rounds = self.autocast and not wide
        size = WIDE if wide else self.a
        g = ledger.new("G, gradient of X", rows * self.row(last) * size)
        gradients = [self.tail_backward(stage, geometry, last, scratch)]
        before: list[Buffer] = []
        for channels, layer in reversed(list(reading(stage))):
            dy = ledger.new("dy, of new features", rows * layer.growth * self.a)
            scratch.settle(rows, layer.growth)
            ledger.free(*before)
            conv = layer.conv1 if layer.norm2 is None else layer.conv2
            gradients.append(ledger.new("weight gradients", conv.numel() * WIDE))
            gradients.append(ledger.new("statistics", scratch.sums(channels, layer.bottleneck)))
            if layer.norm2 is None:
                conv3x3 = Conv3x3(geometry, channels, layer.growth, layer.dilation)
                scratch.conv3x3_backward(conv3x3, True)
                before = [dy]  # until the next is made
                continue
            y = []
            if not self.setting.keep_bottlenecks:
                y = [ledger.new("Y, bottlenecks", rows * layer.bottleneck * self.a)]
                scratch.conv1x1(rows, channels, layer.bottleneck, False)
            dz = ledger.new("dz, of bottlenecks", rows * layer.bottleneck * self.a)
            conv3x3 = Conv3x3(geometry, layer.bottleneck, layer.growth, layer.dilation)
            scratch.conv3x3_backward(conv3x3, False)
            ledger.free(dy)
            gradients.append(ledger.new("weight gradients", layer.conv1.numel() * WIDE))
            scratch.conv1x1_backward(rows, channels, layer.bottleneck)
            ledger.free(dz, *y)
        dx = ledger.new("handed back", rows * first * self.a)
        scratch.settle(rows, first)
        scratch.close()
        vectors = sum(t.numel() for t in flatten(stage)[0] if t.dim() == 1)
        with ledger.hold("weight gradients", vectors * WIDE):
            # all of a stage's stand until they are added to .grad
            ledger.free(g, casts, dout, *before, *gradients, *self.kept.pop(part.name))
        return dx

    def tail_backward(
        self, stage: Stage, geometry: Geometry, last: int, scratch: "FusedScratch"
    ) -> Buffer:
        """Returns the gradient of its convolution's weight."""
        conv = stage.tail.conv
        if conv is None:
            scratch.mean_backward(geometry, last)
            return NOTHING
        gradient = self.ledger.new("weight gradients", conv.numel() * WIDE)
        if stage.tail.spec.pool == 2:
            scratch.pool_conv1x1_backward(geometry, last, conv.shape[0])
        else:
            scratch.conv1x1_backward(geometry.rows, last, conv.shape[0])
        return gradient


def convolution_weights(stage: Stage) -> int:
    return sum(t.numel() for t in flatten(stage)[0] if t.dim() == 4)


class Conv3x3(NamedTuple):
    """A layer's 3x3 convolution."""

    geometry: Geometry
    channels: int  # that it reads
    growth: int
    dilation: tuple[int, int]


class FusedScratch:
    """Kernels that need nothing worth counting beside their results: one method per primitive."""

    def __init__(self, ledger: Ledger, machine: Machine) -> None:
        self.ledger, self.a = ledger, machine.dtype.itemsize
        self.threads = machine.threads
        self.g_rounds = False

    def sums(self, channels: int, bottleneck: int) -> int:
        """Bytes of the sums that a layer's norms leave: dbeta and dgamma, and what G took in."""
        return (2 + 2 * self.g_rounds) * channels * WIDE + 2 * bottleneck * WIDE

    def nothing(self, *_: object) -> None:
        """No scratch."""

    statistics = maxpool = maxpool_sums = maxpool_backward = nothing
    pack = conv1x1 = conv3x3 = settle = conv1x1_backward = conv3x3_backward = nothing
    mean = mean_backward = pool_conv1x1 = pool_conv1x1_backward = close = nothing


class NativeScratch(FusedScratch):
    """csrc/cpu, of its own word: packed weights and, per thread, rows in work and a partial weight
    gradient.
    """

    def __init__(self, ledger: Ledger, machine: Machine) -> None:
        super().__init__(ledger, machine)
        self.reference = ReferenceScratch(ledger, machine)
        self.rounds = self.reference.rounds

    def close(self) -> None:
        self.reference.close()

    def conv1x1(
        self,
        rows: int,
        channels: int,
        out: int,
        statistics: bool = True,
        backward: bool = False,
    ) -> None:
        size = torch.ops.memdense.conv1x1_scratch(
            rows, channels, out, self.threads, self.rounds, backward
        )
        self.ledger.spike("scratch", size)

    def conv1x1_backward(self, rows: int, channels: int, out: int) -> None:
        self.conv1x1(rows, channels, out, backward=True)

    def pool_conv1x1(self, geometry: Geometry, channels: int, out: int) -> None:
        self.conv1x1(geometry.halves.rows, channels, out)

    def pool_conv1x1_backward(self, geometry: Geometry, channels: int, out: int) -> None:
        self.conv1x1(geometry.halves.rows, channels, out, backward=True)

    def conv3x3(self, conv: Conv3x3, backward: bool = False) -> None:
        size = torch.ops.memdense.conv3x3_scratch(
            *conv.geometry, conv.channels, conv.growth, conv.dilation, self.threads, self.rounds,
            backward,
        )  # fmt: skip
        self.ledger.spike("scratch", size)

    def conv3x3_backward(self, conv: Conv3x3, into_g: bool) -> None:
        if into_g and self.rounds:  # Native leaves it to its twin
            self.reference.g_rounds = self.g_rounds
            self.reference.conv3x3_backward(conv, into_g)
        else:
            self.conv3x3(conv, True)


def largest_part(size: int, most: int, unit: int = 1) -> int:
    return next(equal_parts(size, most, unit)).stop


class ReferenceScratch(FusedScratch):
    """:mod:`memdense.backends.reference`: scratch of a band's size, by name, and what a band makes
    beside it.
    """

    def __init__(self, ledger: Ledger, machine: Machine) -> None:
        super().__init__(ledger, machine)
        cpu = machine.device == "cpu"
        limit = Reference.CPU_BAND_BYTES if cpu else Reference.BAND_BYTES
        self.band_values = limit // WIDE
        self.rounds = self.a < WIDE
        # on the CPU an operation on mixed dtypes first converts what is narrower
        self.converts = WIDE * (self.rounds and cpu)
        # and a convolution makes copies of a weight in layouts of its own
        self.forward_copies, self.backward_copies = (2, 4) if cpu else (0, 1)
        self.blocks: dict[str, Buffer] = {}

    def close(self) -> None:
        self.ledger.free(*self.blocks.values())

    # ---- Scratch.take, row_bands and image_bands

    def take(self, name: str, size: int) -> None:
        old = self.blocks.get(name)
        if old is None or old.size < size:
            self.blocks[name] = self.ledger.new("scratch", size)
            if old is not None:
                self.ledger.free(old)

    def row_band(self, rows: int, channels: int) -> int:
        return largest_part(rows, max(1, self.band_values // channels))

    def image_band(self, geometry: Geometry, channels: int, unit: int = 1) -> tuple[int, int]:
        """(images, lines)"""
        lines = self.band_values // (channels * geometry.w)
        images = largest_part(geometry.n, max(1, lines // geometry.h))
        return images, largest_part(geometry.h, max(unit, lines), unit)

    def pixels(self, geometry: Geometry, channels: int, unit: int = 1) -> int:
        images, lines = self.image_band(geometry, channels, unit)
        return images * lines * geometry.w

    # ---- the halves that every primitive shares

    def read(self, values: int) -> None:
        self.take("z", values * WIDE)
        self.ledger.spike("scratch", values * self.converts)
        if self.rounds:
            self.take("z rounded", values * self.a)

    def moments(self, values: int, contiguous: bool) -> None:
        if self.rounds or not contiguous:
            self.take("moments", values * WIDE)

    def answer(self, values: int) -> None:
        if self.rounds:
            self.ledger.spike("scratch", values * WIDE)  # da in float32

    def add_into(self, values: int) -> None:
        if self.g_rounds:
            self.take("g", values * WIDE)
            self.ledger.spike("scratch", values * (WIDE + self.converts))  # g + s*dz

    # ---- primitives, in Reference's order

    def pack(self, geometry: Geometry, channels: int) -> None:
        self.moments(self.pixels(geometry, channels) * channels, False)

    def conv1x1(self, rows: int, channels: int, out: int, statistics: bool = True) -> None:
        band = self.row_band(rows, max(channels, out))
        self.read(band * channels)
        if statistics:
            self.moments(band * out, True)

    def conv3x3(self, conv: Conv3x3) -> None:
        geometry, channels, growth, _ = conv
        band, halo = self.halo_band(geometry, channels)
        self.read(halo * channels)
        with self.ledger.hold("scratch", halo * growth * self.a):  # new
            weight = 9 * channels * growth * self.a
            self.ledger.spike("scratch", self.forward_copies * weight)
            self.moments(band * growth, band == halo)

    def halo_band(self, geometry: Geometry, channels: int) -> tuple[int, int]:
        images, lines = self.image_band(geometry, channels)
        with_halo = min(geometry.h, lines + 2)  # dilated ones reach further, by little
        return images * lines * geometry.w, images * with_halo * geometry.w

    def settle(self, rows: int, channels: int) -> None:
        self.ledger.spike("scratch", self.row_band(rows, channels) * channels * WIDE)

    def conv1x1_backward(self, rows: int, channels: int, out: int) -> None:
        band = self.row_band(rows, max(channels, out))
        self.take("dy", band * out * WIDE)
        self.read(band * channels)
        with self.ledger.hold("scratch", band * out * self.a * self.rounds):  # dy, rounded
            if self.rounds:
                self.ledger.spike("scratch", band * (out + channels) * WIDE)  # dy^T @ z's
            self.take("da", band * channels * self.a)
            self.answer(band * channels)
            self.add_into(band * channels)

    def conv3x3_backward(self, conv: Conv3x3, into_g: bool) -> None:
        geometry, channels, growth, _ = conv
        band, halo = self.halo_band(geometry, channels)
        self.read(halo * channels)
        da = halo * channels * self.a
        self.weight_product(halo, channels, growth)
        with self.ledger.hold("scratch", da):
            self.answer(band * channels)
            if into_g:
                self.add_into(band * channels)

    def weight_product(self, halo: int, channels: int, growth: int) -> None:
        """A band's dW of a 3x3, from its operands in float32."""
        operands = halo * (channels + growth) * WIDE if self.rounds else halo * growth * self.a
        weight = 9 * channels * growth * WIDE
        self.ledger.spike("scratch", operands + self.backward_copies * weight)

    def mean(self, geometry: Geometry, channels: int) -> None:
        self.read(self.pixels(geometry, channels) * channels)

    def mean_backward(self, geometry: Geometry, channels: int) -> None:
        values = self.pixels(geometry, channels) * channels
        self.take("da", values * self.a)
        self.read(values)
        self.answer(values)
        self.add_into(values)

    def pool_conv1x1(self, geometry: Geometry, channels: int, out: int) -> None:
        values = self.pixels(geometry, channels, 2) * channels
        self.read(values)
        self.ledger.spike("scratch", values // 4 * self.a)  # pooled

    def pool_conv1x1_backward(self, geometry: Geometry, channels: int, out: int) -> None:
        values = self.pixels(geometry, channels, 2) * channels
        self.read(values)
        with self.ledger.hold("scratch", (values // 4 + values) * self.a):  # dpooled and da
            self.answer(values)
            self.add_into(values)

    def statistics(self, rows: int, channels: int) -> None:
        self.moments(self.row_band(rows, channels) * channels, True)

    def maxpool(self, geometry: Geometry, channels: int) -> None:
        images, lines = self.image_band(geometry, channels, 2)
        lines = min(geometry.h, lines + 2)
        values = images * lines * geometry.w * channels
        self.read(values)
        # values and indices of a quarter, and three steps of arithmetic with the latter
        self.ledger.spike("scratch", values // 4 * (self.a + 4 * INDEX))

    def maxpool_sums(self, geometry: Geometry, channels: int) -> None:
        values = self.pixels(geometry.windows, channels) * channels
        with self.ledger.hold("scratch", values * INDEX):  # winners' places
            self.ledger.spike("scratch", values * (INDEX + 4))
            with self.ledger.hold("scratch", values * 2 * self.a):  # and values, and dz
                self.read(values)
                self.answer(values)

    def maxpool_backward(self, geometry: Geometry, channels: int) -> None:
        images, lines = self.image_band(geometry, channels, 2)
        windows = min(lines // 2 + 1, geometry.windows.h)
        self.take("da", images * (2 * windows + 1) * geometry.w * channels * self.a)
        values = images * windows * geometry.windows.w * channels
        self.ledger.spike("scratch", values * (1 + self.a))  # whose window it is, times d
        values = images * lines * geometry.w * channels
        self.read(values)
        self.take("dy", values * WIDE)
        if self.rounds:
            self.ledger.spike("scratch", values * self.a)


SCRATCH = {"triton": FusedScratch, "native": NativeScratch, "reference": ReferenceScratch}


class Plain(Walk):
    """The modules one by one, with what autograd keeps for each, and a block's features listed."""

    def through(self, gradient: Buffer, size: int, *kept: Buffer) -> Buffer:
        """A module's backward: makes its gradient, frees the one it answers and what it kept."""
        made = self.ledger.new("gradients", size)
        self.ledger.free(gradient, *kept)
        return made

    # ---- the stem

    def stem_forward(self, part: Part, images: Buffer) -> Buffer:
        ledger, geometry, channels = self.ledger, part.geometry(self.n), part.conv.out_channels
        values, pooled = geometry.rows * channels, geometry.windows.rows * channels
        weight = self.cast(part.conv.weight.numel())
        convolved = ledger.new("stem", values * self.a)
        normed = ledger.new("stem", values * self.a)  # relu0 works in place
        out = ledger.new("handed on", pooled * self.a)
        indices = ledger.new("stem", pooled * INDEX)
        self.kept[part.name] = [weight, convolved, normed, indices]
        return out

    def stem_backward(self, part: Part, handed: Buffer) -> Buffer:
        weight, convolved, normed, indices = self.kept[part.name]
        size = convolved.size
        handed = self.through(handed, size, indices)  # pool0
        handed = self.through(handed, size, normed)  # relu0
        handed = self.through(handed, size, convolved)  # norm0
        self.weight_gradient(part.conv.weight.numel(), weight)
        self.ledger.free(handed)
        return NOTHING

    # ---- a stage

    def stage_forward(self, part: Part, x: Buffer) -> Buffer:
        ledger, stage, kept = self.ledger, part.stage, self.kept[part.name]
        rows, (_, last) = part.geometry(self.n).rows, channels_of(stage)
        features = [x]
        for channels, layer in reading(stage):
            kept.append(self.layer_forward(rows, channels, layer, stage.drop_rate))
            features.append(ledger.new("features", rows * layer.growth * self.a))
        joined = ledger.new("concatenations", rows * last * self.a)
        kept.append(self.let_go(features))
        normed = ledger.new("norms and ReLUs", rows * last * self.a)
        tail = stage.tail
        if tail.conv is None:
            kept.append([joined, normed])
            return ledger.new("pooled", self.n * last * self.a)
        weight, channels = self.cast(tail.conv.numel()), tail.conv.shape[0]
        out = ledger.new("handed on", rows * channels * self.a)
        kept.append([joined, normed, weight])
        if tail.spec.pool == 1:
            return out
        kept[-1].append(out)  # for the pool
        small = part.geometry(self.n).halves.rows
        return ledger.new("handed on", small * channels * self.a)

    def let_go(self, features: list[Buffer]) -> list[Buffer]:
        """At a block's end its list of features goes; returns those that stay."""
        self.ledger.free(*features)
        return []

    def layer_forward(self, rows: int, channels: int, layer: Layer, drop_rate: float) -> list:
        """Returns what is kept, as :meth:`layer_backward` wants it."""
        ledger, a, width = self.ledger, self.a, layer.bottleneck
        read = rows * channels * a
        return [
            self.cast(layer.conv1.numel()),
            self.cast(0 if layer.conv2 is None else layer.conv2.numel()),
            # each with the statistics that its norm keeps
            ledger.new("concatenations", read + 2 * channels * WIDE),
            ledger.new("norms and ReLUs", read),
            ledger.new("bottlenecks", rows * width * a + 2 * width * WIDE),
            ledger.new("norms and ReLUs", rows * width * a),
            self.dropout(rows * layer.growth, drop_rate),
        ]

    def dropout(self, values: int, drop_rate: float) -> Buffer:
        """Its mask, in the activations' dtype on the CPU; the values before it go."""
        cpu = self.machine.device == "cpu"
        size = values * (self.a if cpu else 1) * (drop_rate > 0)
        return self.ledger.new("dropout masks", size)

    def stage_backward(self, part: Part, handed: Buffer) -> Buffer:
        ledger, stage, kept = self.ledger, part.stage, self.kept[part.name]
        rows, (first, last) = part.geometry(self.n).rows, channels_of(stage)
        tail, features = kept.pop(), kept.pop()
        handed = self.tail_backward(stage, rows * last * self.a, handed, tail)
        # gradients of the features, one tensor each once the second has been added to the first
        sums: list[Buffer] = []
        for channels, layer in reversed(list(reading(stage))):
            dy = sums.pop() if sums else ledger.new("gradients", rows * layer.growth * self.a)
            answer = self.layer_backward(rows, channels, layer, dy, kept.pop())
            if handed is not None:
                sizes = [first] + [x.growth for x in stage.layers[: len(kept)]]
                sums = [ledger.new("gradients", rows * c * self.a) for c in sizes]
                ledger.free(handed)
                handed = None
            ledger.free(answer)
            if features:
                ledger.free(features.pop())
        return sums[0]

    def tail_backward(self, stage: Stage, size: int, handed: Buffer, kept: list[Buffer]) -> Buffer:
        """Gradient of the concatenation, of ``size`` bytes."""
        joined, normed, *rest = kept
        if rest:
            weight, *convolved = rest
            if convolved:
                handed = self.through(handed, convolved[0].size, *convolved)  # pool
            handed = self.convolution(handed, size, stage.tail.conv.numel(), weight)
        else:
            handed = self.through(handed, size)  # mean
        handed = self.through(handed, size, normed)  # relu
        return self.through(handed, size, joined)  # norm

    def layer_backward(
        self, rows: int, channels: int, layer: Layer, dy: Buffer, kept: list[Buffer]
    ) -> Buffer:
        """Gradient of the concatenation that the layer reads."""
        cast1, cast2, joined, normed1, convolved, normed2, mask = kept
        if mask.size:
            dy = self.through(dy, dy.size, mask)
        if layer.norm2 is not None:
            width = rows * layer.bottleneck * self.a
            dy = self.convolution(dy, width, layer.conv2.numel(), cast2)
            dy = self.through(dy, width, normed2)  # relu2
            dy = self.through(dy, width, convolved)  # norm2
        width = rows * channels * self.a
        cast1, joined, normed1 = self.again(layer, width, cast1, joined, normed1)
        dy = self.convolution(dy, width, layer.conv1.numel(), cast1)
        dy = self.through(dy, width, normed1)  # relu1
        return self.through(dy, width, joined)  # norm1

    def convolution(self, dy: Buffer, size: int, weights: int, *kept: Buffer) -> Buffer:
        """A convolution's backward, its weight's gradient included."""
        dx = self.ledger.new("gradients", size)
        self.weight_gradient(weights, dy, *kept)
        return dx

    def again(self, layer: Layer, size: int, *kept: Buffer) -> tuple[Buffer, ...]:
        """conv1's weight in 16 bits, the concatenation and norm1's output: there in backward."""
        return kept


class Checkpoint(Plain):
    """torchvision's ``memory_efficient``: concatenation, norm1 and ReLU of each layer are made
    again in backward, for which the features in the list stay.
    """

    # what each checkpoint keeps of the generator, in the host's memory
    RNG_STATE = 5056

    def let_go(self, features: list[Buffer]) -> list[Buffer]:
        self.ledger.free(features.pop())
        return features

    def layer_forward(self, rows: int, channels: int, layer: Layer, drop_rate: float) -> list:
        cast1, cast2, joined, normed1, *rest = super().layer_forward(
            rows, channels, layer, drop_rate
        )
        self.ledger.free(joined, normed1)
        self.until_loss.append(cast1)
        state = self.RNG_STATE * (self.machine.device == "cpu")
        return [NOTHING, cast2, self.ledger.new("generators' states", state), NOTHING, *rest]

    def again(self, layer: Layer, size: int, *kept: Buffer) -> tuple[Buffer, ...]:
        self.ledger.free(*kept)
        return (
            self.cast(layer.conv1.numel()),
            self.ledger.new("concatenations", size),
            self.ledger.new("norms and ReLUs", size),
        )
