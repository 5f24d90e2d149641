"""What a training step will take, before it runs: peak memory for each way to run a network, the
largest batch that fits a budget, and many GPUs from one GPU's figures.

Memory comes from :mod:`memdense.ledger`, buffer by buffer; time from a model that says what it
assumes.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from . import _extension
from .densenet import CONFIGURATIONS, DenseNet
from .ledger import Ledger, Machine, Network, Setting, read_network, replay
from .memory import format_bytes
from .spec import pair
from .structure import Unsupported

__all__ = ["ModelState", "Plan", "Scaling", "SettingPlan", "plan"]

# the paper's networks for small images: layers are depth - 4, in three blocks
_SMALL = re.compile(r"(bc|b|c|l)(\d+)-(\d+)")
_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# state as a multiple of the parameters
OPTIMIZERS = {"none": 0, "sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}
_POWERS = {None: 0, "": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_MIB = 1 << 20


# ---- what people write


def parse_bytes(text: int | str, least: int = 1) -> int:
    """Bytes of ``"24GiB"`` (binary), ``"24GB"`` (decimal), ``"25769803776"`` or a number.

    Raises:
        ValueError: for anything else, and for less than ``least``.
    """
    number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b)?\s*", str(text).lower())
    size = -1
    if number:
        value, prefix, binary = number.groups()
        size = round(float(value) * (1024 if binary else 1000) ** _POWERS[prefix])
    if size < least:
        raise ValueError(f"expected a size such as 24GiB, 24GB or 25769803776, got {text!r}")
    return size


def parse_bandwidth(text: float | str) -> float:
    """Bytes a second of ``"300GB/s"``, ``"25GiB/s"``, ``"400Gbit/s"`` or a number.

    Raises:
        ValueError: for anything else, and for none at all.
    """
    number = re.fullmatch(
        r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*(?:([kmgt]?)(i?)(b|bit)/s)?\s*", str(text).lower()
    )
    rate = 0.0
    if number:
        value, prefix, binary, unit = number.groups()
        rate = float(value) * (1024 if binary else 1000) ** _POWERS[prefix]
        rate /= 8 if unit == "bit" else 1
    if rate <= 0:
        raise ValueError(f"expected a bandwidth such as 300GB/s or 400Gbit/s, got {text!r}")
    return rate


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """``"fp32"``, ``"bf16"``, ``"fp16"``, torch's names or torch's dtypes.

    Raises:
        ValueError: for anything else.
    """
    for short, known in _DTYPES.items():
        if dtype in (known, short, str(known).removeprefix("torch.")):
            return known
    raise ValueError(f"expected one of the dtypes {', '.join(_DTYPES)}, got {str(dtype)!r}")


def build(arch: str | None = None, **kwargs: Any) -> DenseNet:
    """A network without memory, on the meta device.

    Args:
        arch: "densenet121" to "densenet264"; or one of the paper's for small images, by depth and
            growth rate: "bc100-12" (bottlenecks and compression), "b…", "c…", or "l40-12" with
            neither; or None for what the arguments say.
        **kwargs: of :class:`memdense.DenseNet`, in place of the architecture's own.

    Raises:
        ValueError: there is no such architecture, or sizes that make no network.
    """
    defaults: dict[str, Any] = {}
    if arch in CONFIGURATIONS:
        names = "growth_rate", "block_config", "num_init_features"
        defaults = dict(zip(names, CONFIGURATIONS[arch], strict=True))
    elif arch is not None:
        defaults = _small(arch)
    with torch.device("meta"):
        return DenseNet(**{**defaults, **kwargs})


def _small(arch: str) -> dict[str, Any]:
    known = f"{', '.join(CONFIGURATIONS)}, bc100-12 and the like (b, c, l: l40-12)"
    match = _SMALL.fullmatch(arch)
    if not match:
        raise ValueError(f"there is no architecture {arch!r}; known are {known}")
    kind, depth, growth = match[1], int(match[2]), int(match[3])
    convolutions = 2 if "b" in kind else 1  # of a layer
    layers, rest = divmod(depth - 4, 3 * convolutions)
    if rest or layers < 1:
        unit = 3 * convolutions
        raise ValueError(f"{arch}: the depth must be 4 more than a multiple of {unit}, got {depth}")
    return dict(
        growth_rate=growth,
        block_config=(layers,) * 3,
        num_init_features=2 * growth if kind == "bc" else 16,
        bn_size=4 if "b" in kind else None,
        compression=0.5 if "c" in kind else 1.0,
        small_inputs=True,
        num_classes=10,
    )


# ---- what stands whatever the batch


@dataclass(frozen=True)
class ModelState:
    """Bytes that exist before a step and after it, whatever the batch.

    Attributes:
        parameters, buffers: of the model, in float32.
        gradients: ``.grad`` of every parameter; 0 where they are views into ``buckets``.
        optimizer: its state.
        buckets: in which DistributedDataParallel gathers gradients; 0 on a single device.
        optimizer_step: what the optimiser's step needs for a moment.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    buckets: int
    optimizer_step: int

    @property
    def total(self) -> int:
        """Without ``optimizer_step``, which comes and goes."""
        return self.parameters + self.buffers + self.gradients + self.optimizer + self.buckets


def state_of(
    model: nn.Module, optimizer: str, device: str, ddp: bool, gradient_as_bucket_view: bool
) -> ModelState:
    """The state of training ``model``, whose parameters all learn."""
    sizes = [p.nbytes for p in model.parameters()]
    size = sum(sizes)
    copies = OPTIMIZERS[optimizer]
    steps = 0
    if device == "cpu" and copies == 2:
        steps = 4 * len(sizes)  # a counter each; with a GPU they stay in the host's memory
    # foreach, the default on a GPU, makes the square roots or the decayed gradients of all
    foreach = device == "cuda" and optimizer != "none"
    return ModelState(
        parameters=size,
        buffers=sum(b.nbytes for b in model.buffers()),
        gradients=0 if ddp and gradient_as_bucket_view else size,
        optimizer=copies * size + steps,
        buckets=size if ddp else 0,
        optimizer_step=size if foreach else max(sizes) * copies,
    )


# ---- many devices


def bucket_sizes(sizes: Sequence[int], cap_mb: float) -> list[int]:
    """DistributedDataParallel's buckets, in bytes and in the order in which they are ready.

    Gradients come in the reverse order of ``sizes``, their bytes. A bucket closes once it holds its
    limit: 1 MiB for the first, ``cap_mb`` MiB for the others.
    """
    buckets, filled, limit = [], 0, _MIB
    for size in reversed(sizes):
        filled += size
        if filled >= limit:
            buckets.append(filled)
            filled, limit = 0, cap_mb * _MIB
    return [*buckets, filled] if filled else buckets


def all_reduce_bytes(devices: int, size: int) -> float:
    """What each device sends, and receives, in a ring all-reduce: 2(n-1)/n * size."""
    return 2 * (devices - 1) / devices * size


@dataclass(frozen=True)
class Scaling:
    """A step on ``devices`` devices, each with a batch of its own.

    Attributes:
        memory: bytes on each device, for the plan's first setting.
        compute_seconds: a step on one device.
        all_reduce_bytes: sent by each device, each step.
        all_reduce_seconds: they take alone.
        exposed_seconds: of these, what backward does not hide.
        images_per_second: of all devices together.
        efficiency: that, by ``devices`` times one device's.
    """

    devices: int
    memory: int
    compute_seconds: float
    all_reduce_bytes: float
    all_reduce_seconds: float
    exposed_seconds: float
    images_per_second: float
    efficiency: float

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds


def scale(
    devices: int,
    memory: int,
    batch: int,
    images_per_second: float,
    buckets: Sequence[int],
    bandwidth: float,
    overlap: bool,
    backward_share: float,
) -> Scaling:
    """See :class:`Scaling`. Gradients go in a ring, at ``bandwidth`` bytes a second and no latency.

    With ``overlap`` the all-reduce starts with backward, which takes ``backward_share`` of a step,
    and at least its last bucket goes when backward has ended:
    exposed = max(last bucket, all - backward).
    """
    compute = batch / images_per_second
    sent = all_reduce_bytes(devices, sum(buckets))
    seconds = sent / bandwidth
    exposed = seconds
    if overlap:
        last = all_reduce_bytes(devices, buckets[-1]) / bandwidth
        exposed = max(last, seconds - compute * backward_share)
    rate = devices * batch / (compute + exposed)
    efficiency = compute / (compute + exposed)
    return Scaling(devices, memory, compute, sent, seconds, exposed, rate, efficiency)


# ---- the plan


@dataclass(frozen=True)
class SettingPlan:
    """One way to run the network.

    Attributes:
        name: the setting.
        kept: bytes between forward and backward.
        peak: bytes at the step's peak, above state and images, as
            :func:`memdense.memory.training_step_memory` counts.
        total: bytes at the peak in all: state, images and step.
        where: what runs at the step's peak.
        buffers: (name, bytes) of what is alive there, largest first.
        largest_batch: that fits the budget; 0 where none does, None without a budget.
        largest_total: bytes in all with that batch.
    """

    name: str
    kept: int
    peak: int
    total: int
    where: str
    buffers: tuple[tuple[str, int], ...]
    largest_batch: int | None = None
    largest_total: int | None = None


@dataclass(frozen=True, repr=False)
class Plan:
    """What :func:`plan` found; prints as a table, in colour with rich.

    Attributes:
        title: network, images, dtype, batch and place.
        state: what stands whatever the batch.
        images: bytes of the batch's images.
        settings: one entry per way to run, the default first.
        budget, reserve: bytes; the budget is None where none was given.
        scaling: one entry per number of devices; empty without one device's figures.
        assumptions: sentences.
    """

    title: str
    state: ModelState
    images: int
    settings: tuple[SettingPlan, ...]
    budget: int | None
    reserve: int
    scaling: tuple[Scaling, ...]
    assumptions: tuple[str, ...]

    def __getitem__(self, name: str) -> SettingPlan:
        """A setting by its name."""
        for setting in self.settings:
            if setting.name == name:
                return setting
        raise KeyError(name)

    def __str__(self) -> str:
        blocks = [self.title, *self._state_lines(), ""]
        for rows in self._tables():
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            blocks += [_aligned(row, widths) for row in rows] + [""]
        return "\n".join([*blocks, *self._peak_lines(), "", *self._notes()])

    __repr__ = __str__

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        tables = []
        for head, *rows in self._tables():
            table = Table()
            for i, name in enumerate(head):
                table.add_column(name, justify="right" if i else "left")
            for i, row in enumerate(rows):
                table.add_row(*row, style="bold green" if i == 0 and len(tables) == 0 else "")
            tables.append(table)
        return Group(
            Text(self.title, style="bold"),
            *map(Text, self._state_lines()),
            *tables,
            *map(Text, self._peak_lines()),
            *(Text(note, style="dim") for note in self._notes()),
        )

    def _state_lines(self) -> Iterator[str]:
        s = self.state
        parts = {
            "parameters": s.parameters,
            "buffers": s.buffers,
            "gradients": s.gradients,
            "optimiser": s.optimizer,
            "DDP buckets": s.buckets,
        }
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
        images = format_bytes(self.images)
        yield f"before the step: {format_bytes(s.total)} ({listed}), images {images}"

    def _tables(self) -> Iterator[list[tuple[str, ...]]]:
        head = ("setting", "kept", "step's peak", "in all")
        if self.budget is not None:
            head += ("largest batch", "which takes")
        rows = [head]
        for s in self.settings:
            row = (s.name, *map(format_bytes, (s.kept, s.peak, s.total)))
            if self.budget is not None:
                row += (f"{s.largest_batch:,}", format_bytes(s.largest_total))
                if not s.largest_batch:
                    row = (*row[:-2], "none", "-")
            rows.append(row)
        yield rows
        if self.scaling:
            rows = [
                (
                    "devices",
                    "images/s",
                    "efficiency",
                    "step",
                    "all-reduce",
                    "exposed",
                    "each device",
                )
            ]
            for x in self.scaling:
                times = (x.step_seconds, x.all_reduce_seconds, x.exposed_seconds)
                rows.append(
                    (
                        f"{x.devices:,}",
                        f"{x.images_per_second:,.0f}",
                        f"{x.efficiency:.1%}",
                        *(f"{1000 * t:,.1f} ms" for t in times),
                        format_bytes(x.memory),
                    )
                )
            yield rows

    def _peak_lines(self) -> Iterator[str]:
        s = self.settings[0]
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in s.buffers[:6])
        more = sum(size for _, size in s.buffers[6:])
        rest = f", others {format_bytes(more)}" if more else ""
        yield f"{s.name} is at its peak in {s.where}: {listed}{rest}"

    def _notes(self) -> Iterator[str]:
        yield "assumed:"
        for sentence in self.assumptions:
            yield f"- {sentence}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first = row[0].ljust(widths[0])
    return "  ".join([first, *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])


def plan(
    model: str | DenseNet,
    image: int | tuple[int, int] | None = None,
    batch: int = 32,
    dtype: torch.dtype | str = "fp32",
    budget: int | str | None = None,
    *,
    optimizer: str = "none",
    device: str = "cuda",
    backend: str | None = None,
    reserve: int | str = 0,
    devices: Sequence[int] = (),
    images_per_second: float | None = None,
    bandwidth: float | str | None = None,
    overlap: bool = True,
    backward_share: float = 2 / 3,
    bucket_cap_mb: float = 25,
    gradient_as_bucket_view: bool = False,
) -> Plan:
    """Predict the memory of a training step for each setting, and the largest batch that fits.

    >>> print(plan("densenet264", 512, dtype="bf16", budget="24GiB", optimizer="adamw"))

    Args:
        model: an architecture's name (see :func:`build`) or a network, in training mode and with
            float32 parameters, which may be on the meta device.
        image: side of the images, or (height, width); 224 by default, 32 for small inputs.
        batch: images of a step, on each device.
        dtype: of activations: "fp32", or "bf16" or "fp16" for autocast over float32 parameters.
        budget: memory of a device: "24GiB", "24GB" or bytes.
        optimizer: "none", "sgd", "momentum", "adam" or "adamw".
        device: "cuda" or "cpu".
        backend: "triton", "native" or "reference"; by default the device's fastest.
        reserve: the part of the budget to leave alone.
        devices: numbers of devices for data parallelism. With more than one, all figures include
            DistributedDataParallel's buckets.
        images_per_second: of one device, with ``batch`` images a step; measured.
        bandwidth: at which each device sends to the next, while it receives as much: "300GB/s",
            "400Gbit/s" or bytes a second.
        overlap, backward_share: see :func:`scale`.
        bucket_cap_mb, gradient_as_bucket_view: as for DistributedDataParallel.

    Raises:
        TypeError: ``model`` is neither a name nor a :class:`memdense.DenseNet`.
        ValueError: for what cannot be, saying what could: an unknown architecture, images too small
            for it, a budget in which no image fits.
    """
    name = model
    if isinstance(model, str):
        model = build(model)
    _check_model(model)
    height, width = _size(image, model)
    machine = _machine(device, backend, dtype)
    _check_choice("optimizer", optimizer, OPTIMIZERS)
    _check_numbers(batch, devices, images_per_second, bandwidth, backward_share, bucket_cap_mb)
    network = _network(model, height, width)
    smallest = 2 if any(p.height * p.width == 1 for p in network.parts) else 1
    if batch < smallest:
        raise ValueError(
            f"{height} x {width} pixels leave one value per channel, which BatchNorm refuses in "
            f"training: give a batch of at least {smallest}"
        )
    ddp = max(devices, default=1) > 1
    state = state_of(model, optimizer, device, ddp, gradient_as_bucket_view)
    limit = None if budget is None else parse_bytes(budget)
    reserved = parse_bytes(reserve, least=0)

    def total(setting: Setting, n: int) -> int:
        step = max(replay(network, n, setting, machine).peak, state.optimizer_step)
        return state.total + 4 * n * network.image_values + step

    def largest(setting: Setting) -> int:
        return largest_batch(lambda n: total(setting, n) <= limit - reserved, smallest)

    settings = _settings(network, model.features.double_backward)
    if limit is not None:
        least = min(total(s, smallest) for s in settings)
        if least > limit - reserved:
            left = f", {format_bytes(reserved)} of it reserved," if reserved else ""
            raise ValueError(
                f"a budget of {format_bytes(limit)}{left} holds no training step: the model's "
                f"state takes {format_bytes(state.total)}, and a step with a batch of {smallest} "
                f"needs {format_bytes(least + reserved)} at the least"
            )
    found = [
        _setting_plan(
            setting, replay(network, batch, setting, machine), batch, partial(total, setting),
            None if limit is None else largest(setting),
        )
        for setting in settings
    ]  # fmt: skip
    buckets = bucket_sizes([p.nbytes for p in model.parameters()], bucket_cap_mb)
    scaling = ()
    if images_per_second is not None:
        rate = parse_bandwidth(bandwidth)
        alone = found[0].total - state.total
        alone += state_of(model, optimizer, device, False, False).total
        scaling = tuple(
            scale(
                n, found[0].total if n > 1 else alone, batch, images_per_second, buckets, rate,
                overlap, backward_share,
            )
            for n in devices
        )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    short = next(k for k, v in _DTYPES.items() if v == machine.dtype)
    title = (
        f"{name if isinstance(name, str) else _describe(network)}, {parameters:,} parameters: "
        f"a training step of {batch} images, {height} x {width}, {short}, on {device} "
        f"({machine.backend})"
    )
    if limit is not None:
        title += f", budget {_as_given(budget)}"
        title += f" less {_as_given(reserve)}" if reserved else ""
    assumptions = _assumptions(
        machine, optimizer, ddp, gradient_as_bucket_view, scaling, bandwidth, overlap,
        backward_share, buckets,
    )  # fmt: skip
    images = 4 * batch * network.image_values
    return Plan(title, state, images, tuple(found), limit, reserved, scaling, tuple(assumptions))


def _check_numbers(
    batch: int,
    devices: Sequence[int],
    images_per_second: float | None,
    bandwidth: float | str | None,
    backward_share: float,
    bucket_cap_mb: float,
) -> None:
    if not isinstance(batch, Integral):
        raise ValueError(f"batch must be a whole number, got {batch!r}")
    _check_positive(batch=batch, backward_share=backward_share, bucket_cap_mb=bucket_cap_mb)
    if backward_share > 1:
        raise ValueError(f"backward_share must be at most 1, got {backward_share}")
    if not isinstance(devices, Sequence) or not all(isinstance(n, Integral) for n in devices):
        raise ValueError(f"devices must be whole numbers, got {devices!r}")
    _check_positive(**{f"devices[{i}]": n for i, n in enumerate(devices)})
    if (images_per_second is None) != (bandwidth is None):
        raise ValueError("images_per_second and bandwidth go together")
    if images_per_second is not None:
        _check_positive(images_per_second=images_per_second)
        if not devices:
            raise ValueError("images_per_second needs devices: how many there are, say 1, 2, 4, 8")


def _setting_plan(
    setting: Setting, ledger: Ledger, batch: int, total: Callable[[int], int], largest: int | None
) -> SettingPlan:
    """``total``: all bytes by the batch; ``largest``: the batch that fits, 0 if none does."""
    alive = sorted(ledger.at_peak.items(), key=lambda item: -item[1])
    return SettingPlan(
        setting.name,
        ledger.kept,
        ledger.peak,
        total(batch),
        ledger.peak_where,
        tuple((name, size) for name, size in alive if size),
        largest,
        total(largest) if largest else largest,
    )


def _as_given(size: int | str) -> str:
    return size if isinstance(size, str) else format_bytes(size)


def largest_batch(fits: Callable[[int], bool], smallest: int = 1) -> int:
    """A batch that fits while one image more does not; 0 where even ``smallest`` does not."""
    if not fits(smallest):
        return 0
    low, high = smallest, 2 * smallest
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, DenseNet):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(f"expected a memdense.DenseNet or an architecture's name, got {kind}")
    if not model.training:
        raise ValueError("expected a model in training mode: call model.train()")
    for p in model.parameters():
        if p.dtype != torch.float32:
            raise ValueError(f"expected float32 parameters, got {p.dtype} (dtype= is for autocast)")


def _describe(network: Network) -> str:
    stages = [part.stage for part in network.parts if part.stage]
    blocks = ", ".join(str(len(stage.layers)) for stage in stages)
    return f"DenseNet (k = {stages[0].layers[0].growth}, blocks of {blocks})"


def _size(image: int | tuple[int, int] | None, model: DenseNet) -> tuple[int, int]:
    if image is None:
        image = 224 if hasattr(model.features, "pool0") else 32
    try:
        height, width = pair(image)
    except (TypeError, ValueError):
        raise ValueError(f"image must be a side or (height, width), got {image!r}") from None
    _check_positive(height=height, width=width)
    return height, width


def _network(model: DenseNet, height: int, width: int) -> Network:
    try:
        return read_network(model, height, width)
    except Unsupported as reason:
        raise ValueError(f"there is no plan for a part of the model: {reason}") from None
    except ValueError as reason:
        smallest = next((side for side in range(1, 4096) if _holds(model, side)), None)
        least = f": it takes {smallest} x {smallest} at the least" if smallest else ""
        raise ValueError(f"{reason}{least}") from None


def _holds(model: DenseNet, side: int) -> bool:
    try:
        read_network(model, side, side)
    except ValueError:
        return False
    return True


def _machine(device: str, backend: str | None, dtype: torch.dtype | str) -> Machine:
    _check_choice("device", device, ("cuda", "cpu"))
    fastest = "triton" if device == "cuda" else "native"
    if fastest == "native" and not _extension.available():
        if backend == fastest:
            raise ValueError(f"backend native is not available: {_extension.reason()}")
        fastest = "reference"
    backend = fastest if backend is None else backend
    _check_choice(f"backend on {device}", backend, (fastest, "reference"))
    return Machine(device, backend, parse_dtype(dtype), torch.get_num_threads())


def _check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(choices)}, got {value!r}")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not isinstance(value, Real) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value!r}")


def _settings(network: Network, double_backward: bool) -> list[Setting]:
    """Those that make a difference to this network; ``double_backward`` where it is on."""
    layers = [layer for part in network.parts if part.stage for layer in part.stage.layers]
    bottlenecks = any(layer.norm2 is not None for layer in layers)
    settings = [Setting("memdense")]
    if network.parts[0].kind == "stem":
        settings.append(Setting("memdense, recompute_stem=False", recompute_stem=False))
    if double_backward:
        settings.append(Setting("memdense, double_backward=True", double_backward=True))
    if bottlenecks:
        settings.append(Setting("memdense, keep_bottlenecks=True", keep_bottlenecks=True))
        settings.append(Setting("torchvision, memory_efficient=True", "checkpoint"))
    return [*settings, Setting("plain modules, as torchvision's", "plain")]


def _assumptions(
    machine: Machine,
    optimizer: str,
    ddp: bool,
    gradient_as_bucket_view: bool,
    scaling: Sequence[Scaling],
    bandwidth: float | str | None,
    overlap: bool,
    backward_share: float,
    buckets: Sequence[int],
) -> Iterator[str]:
    yield (
        "one batch of float32 images that need no gradient, cross entropy of the classifier's "
        "output, all parameters learn and are float32; .grad exists before the step (with "
        "set_to_none=True it is a little less)"
    )
    if machine.dtype.itemsize < 4:
        yield f"{str(machine.dtype).removeprefix('torch.')} by autocast, weights cast as needed"
    if machine.device == "cuda":
        yield (
            "not counted: the CUDA context, workspaces of cuDNN and cuBLAS, kernels' partial sums, "
            "fragmentation: keep some of the budget in reserve for them"
        )
        yield "checked against measurements on the CPU only"
    if optimizer != "none":
        how = "foreach, PyTorch's default there" if machine.device == "cuda" else "one by one"
        yield f"{optimizer} updates parameters {how}"
    if ddp:
        view = "share the buckets' memory" if gradient_as_bucket_view else "are copied to buckets"
        yield f"DistributedDataParallel: gradients {view}; its buffers' broadcast is not counted"
    if scaling:
        yield (
            f"ring all-reduce of float32 gradients: each device sends 2(n-1)/n of their bytes at "
            f"{bandwidth} to the next while it receives as many; no latency, no stragglers, input "
            f"always ready"
        )
        if overlap:
            yield (
                f"backward takes {backward_share:.0%} of a step and hides the all-reduce, which "
                f"starts with it, but for the last of {len(buckets)} buckets "
                f"({format_bytes(buckets[-1])})"
            )
        else:
            yield "the all-reduce starts when backward has ended"
