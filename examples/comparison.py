"""What ``train.py`` measures and shows of a plain and an efficient DenseNet."""

import copy
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from memdense import DenseNet, densenet121
from memdense.memory import StepMemory, format_bytes, training_step_memory

if TYPE_CHECKING:
    from train import Run

COLOURS = {"plain": "#E69F00", "efficient": "#0072B2"}  # of Okabe and Ito's colour-blind-safe set


class Memory(NamedTuple):
    """Of a training step, without optimiser."""

    title: str
    plain: StepMemory
    efficient: StepMemory


class Measured(NamedTuple):
    memory: list[Memory]
    differences: dict[str, float]


def plain_and_efficient(model: DenseNet) -> dict[str, DenseNet]:
    """Two copies of ``model``."""
    twins = {"plain": copy.deepcopy(model), "efficient": copy.deepcopy(model)}
    for name, twin in twins.items():
        twin.features.efficient = name == "efficient"
    return twins


def measure(name: str, model: DenseNet, images: Tensor, labels: Tensor) -> Measured:
    """Memory of ``model`` and of DenseNet-121, and the differences of one step in float64."""
    large = torch.randn(2, 3, 224, 224, device=images.device)
    classes = torch.tensor([0, 1], device=images.device)
    memory = [
        _measure_memory(name, model, images, labels),
        _measure_memory("densenet121", densenet121().to(images.device), large, classes),
    ]
    return Measured(memory, _float64_differences(model, images, labels))


def _measure_memory(name: str, model: DenseNet, images: Tensor, labels: Tensor) -> Memory:
    twins = plain_and_efficient(model)
    steps = (training_step_memory(twin, images, labels) for twin in twins.values())
    count, _, height, width = images.shape
    return Memory(f"{name}, {count} images of {height}×{width}", *steps)


def _float64_differences(model: DenseNet, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Largest differences between plain and efficient, as shares of the largest plain value."""
    outcomes = []
    for twin in plain_and_efficient(model).values():
        logits = twin.double()(images.double())
        F.cross_entropy(logits, labels).backward()
        outcomes.append((logits, torch.cat([p.grad.flatten() for p in twin.parameters()])))
    return {
        what: ((plain - efficient).abs().max() / plain.abs().max()).item()
        for what, plain, efficient in zip(("logits", "gradients"), *outcomes, strict=True)
    }


def print_comparison(plain: "Run", efficient: "Run", measured: Measured, caption: str) -> None:
    table = Table(box=SIMPLE_HEAD, caption=caption, caption_justify="left")
    table.add_column()
    for heading in ("plain", "efficient", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)

    def add(what: str, show: Callable[[float], str], a: float, b: float) -> None:
        table.add_row(what, show(a), show(b), f"{b / a:.2f}")

    table.add_row("test accuracy", *(f"{run.accuracies[-1]:.2%}" for run in (plain, efficient)))
    seconds = (median(run.seconds) for run in (plain, efficient))
    add("seconds per step, median", "{:.3f}".format, *seconds)
    for title, plain_step, efficient_step in measured.memory:
        table.add_section()
        table.add_row(title)
        add("  peak memory of a step", format_bytes, plain_step.peak, efficient_step.peak)
        add("  kept for backward", format_bytes, plain_step.live, efficient_step.live)
    table.add_section()
    table.add_row("largest difference in one float64 step")
    for what, difference in measured.differences.items():
        table.add_row(f"  {what}, relative to the largest", "", f"{difference:.0e}")
    Console().print(table)


def draw(runs: list["Run"], measured: Measured | None, file: Path) -> None:
    """Loss and accuracy of the runs and, where measured, bars of memory."""
    style = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    style |= {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"}
    with rc_context(style):
        figure = Figure(figsize=(10 if measured else 5.5, 4.6), layout="constrained")
        panels = figure.subfigures(1, 2, wspace=0.05) if measured else [figure]
        loss, accuracy = panels[0].subplots(2, 1, sharex=True)
        _draw_curves(loss, accuracy, runs)
        if measured:
            for axes, memory in zip(panels[1].subplots(2, 1), measured.memory, strict=True):
                _draw_bars(axes, memory)
        figure.legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        figure.savefig(file, dpi=200)


def _draw_curves(loss: Axes, accuracy: Axes, runs: list["Run"]) -> None:
    for run, over in zip(runs, (len(runs) == 1, True), strict=False):
        # They lie on top of each other until rounding parts them: the one below is broad and pale.
        look = {"color": COLOURS[run.name], "lw": 1.3 if over else 5, "alpha": 1 if over else 0.5}
        window = min(10, len(run.losses))
        smooth = np.convolve(run.losses, np.full(window, 1 / window), "valid")
        loss.plot(np.arange(window, len(run.losses) + 1), smooth, label=run.name, **look)
        ends = np.linspace(0, len(run.losses), len(run.accuracies) + 1)[1:]
        accuracy.plot(ends, 100 * np.array(run.accuracies), marker="o", ms=3 if over else 6, **look)
    loss.set(title=f"Training loss, mean of {window} steps", ylim=0)
    accuracy.set(title="Test accuracy, %", xlabel="step")


def _draw_bars(axes: Axes, memory: Memory) -> None:
    peaks, kept = (np.array([getattr(m, part) for m in memory[1:]]) for part in ("peak", "live"))
    for i, (name, colour) in enumerate(COLOURS.items()):
        sizes = np.array([peaks[i], kept[i]])
        labels = [format_bytes(size) for size in sizes]
        if name == "efficient":
            less = np.array([peaks[0], kept[0]]) / sizes
            labels = [
                f"{label}, {times:.1f}× less" for label, times in zip(labels, less, strict=True)
            ]
        bars = axes.barh(np.arange(2) + 0.38 * (i - 0.5), sizes, 0.35, color=colour)
        axes.bar_label(bars, labels, padding=4)
    axes.set_title(memory.title)
    axes.set_yticks(range(2), ["peak of a step", "kept for backward"])
    axes.tick_params(left=False)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
