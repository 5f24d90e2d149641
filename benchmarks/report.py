"""Results as tables and plots.

    python benchmarks/report.py benchmarks/results/cpu.json --out docs/cpu --into README.md

writes docs/cpu/results.md and its plots, and fills in, in the files after --into, what stands
between lines like `<!-- begin cpu/headline -->` and `<!-- end cpu/headline -->`. Figures come from
the results and from nowhere else.
"""

import argparse
import json
import os
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from growth import BUDGETS, Fit, fit_line, fit_power, largest_batch
from rich import table as rich_table

BASE, OURS = "torchvision", "memdense"
ORDER = ("densenet121", "densenet169", "densenet201", "densenet264", "bc100-12")
LAYERS = {"densenet121": 121, "densenet169": 169, "densenet201": 201, "densenet264": 264}
Record = dict[str, Any]


@dataclass
class Results:
    """One run of the suite: where, and a record for each variant of each group."""

    about: dict[str, Any]
    records: list[Record]
    ceilings: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    command: str = ""

    def groups(self, kind: str) -> dict[str, list[Record]]:
        found: dict[str, list[Record]] = {}
        for record in self.records:
            if record["kind"] == kind:
                found.setdefault(record["group"], []).append(record)
        return found

    @property
    def place(self) -> str:
        about = ", ".join(f"{key} {value}" for key, value in self.about.items() if value)
        return f"{about}; `{self.command}`" if self.command else about


def load(path: Path) -> Results:
    return parse(json.loads(path.read_text()))


def record_of(group: str, times: list[float], facts: dict[str, Any]) -> Record:
    """A line of the tables."""
    return {"group": group, "seconds": statistics.median(times), "rounds": len(times), **facts}


def parse(data: dict[str, Any]) -> Results:
    """What pytest-benchmark, or step.py, wrote."""
    records = [
        record_of(b["group"], b["stats"]["data"], b["extra_info"]) for b in data["benchmarks"]
    ]
    more = {key.replace(" ", "_"): value for key, value in data.get("memdense", {}).items()}
    return Results(data["machine_info"], records, **more)


class Table(NamedTuple):
    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


def as_markdown(table: Table) -> str:
    """The first column to the left, the others to the right."""
    rule = "|---|" + "---:|" * (len(table.head) - 1)
    lines = [f"| {' | '.join(cells)} |" for cells in table.rows]
    text = "\n".join([f"| {' | '.join(table.head)} |", rule, *lines])
    title = f"**{table.title}**\n\n" if table.title else ""
    return f"{title}{text}" + (f"\n\n<sub>{table.note}</sub>" if table.note else "")


def as_rich(table: Table) -> rich_table.Table:
    plain = [re.sub(r"[*`]", "", cell) for cell in (table.title, table.note)]
    found = rich_table.Table(title=plain[0], caption=plain[1], title_justify="left")
    for i, heading in enumerate(table.head):
        found.add_column(heading, justify="right" if i else "left", overflow="fold")
    for cells in table.rows:
        found.add_row(*(re.sub(r"[*`]", "", cell) for cell in cells))
    return found


def seconds(value: float) -> str:
    """Three digits, in s or ms."""
    if value >= 0.9995:
        return f"{value:.2f} s"
    return f"{1e3 * value:.{2 if value < 0.01 else 1 if value < 0.1 else 0}f} ms"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB"


def bold(cells: Iterable[str]) -> list[str]:
    return [f"**{cell}**" for cell in cells]


# ---- whole networks


def steps(results: Results, kind: str) -> list[Table]:
    """A table for each network and batch."""
    tables = []
    for group, records in results.groups(kind).items():
        base = next((r for r in records if r["variant"] == BASE), None)
        rows = []
        for r in records:
            batch = r["batch"]
            cells = [
                r["variant"],
                f"{r['ratio']:.2f}×" if "ratio" in r else "",
                seconds(r["seconds"]),
                f"{batch / r['seconds']:.1f}",
                megabytes(r["peak bytes"] / batch),
                megabytes(r["kept bytes"] / batch) if kind == "training" else "",
                f"1/{base['peak bytes'] / r['peak bytes']:.1f}" if base else "",
            ]
            if kind != "training":
                del cells[5]
            rows.append(bold(cells) if r["variant"] == OURS else cells)
        left_out = results.left_out.get(group, {}).items()
        note = "; ".join(f"{variant} not measured: {why}" for variant, why in left_out)
        head = ["", "time", "a step", "images/s", "peak / image", "kept / image", "memory"]
        if kind != "training":
            head = [*head[:2], "a batch", *head[3:5], head[6]]
        title = f"{group}, {min(r['rounds'] for r in records)} rounds"
        tables.append(Table(title, head, rows, note))
    return tables


STEP_NOTE = (
    "Medians of interleaved rounds, ratios within each round. Memory in a pass of its own, counted "
    "in PyTorch's allocator above model, images and `.grad` (MB = 10⁶ bytes); what libraries take "
    "for themselves is not in it."
)


def headline(results: Results) -> list[Table]:
    """DenseNet-121's training step, with its origin."""
    found = [t for t in steps(results, "training") if t.title.startswith("densenet121")]
    return [
        t._replace(title="", note=f"{t.title}. {results.place}. {STEP_NOTE}") for t in found[:1]
    ]


def summary(results: Results) -> list[Table]:
    """Every network in a line: ours and channels last beside torchvision's plain modules."""
    rows = []
    for kind in ("training", "inference"):
        for group, records in results.groups(kind).items():
            by = {r["variant"]: r for r in records}
            if BASE not in by or OURS not in by:
                continue
            last, ours, base = by.get(f"{BASE}, channels last"), by[OURS], by[BASE]
            rows.append([
                group, f"{last['ratio']:.2f}×" if last else "", f"**{ours['ratio']:.2f}×**",
                megabytes(base["peak bytes"] / base["batch"]),
                f"**{megabytes(ours['peak bytes'] / ours['batch'])}**", str(ours["rounds"]),
            ])  # fmt: skip
    head = ["time against torchvision's", "channels last", "memdense", "torchvision's peak / image",
            "memdense's", "rounds"]  # fmt: skip
    return [Table("", head, rows, results.place)] if rows else []


PROFILE_NOTE = (
    "A pass of its own, in which each primitive is timed: its step may take longer than an untimed "
    "one."
)


def profile(results: Results) -> list[Table]:
    """Where a step's time goes, primitive by primitive."""
    tables = []
    for group, records in results.groups("profile").items():
        whole = next((r for r in records if r["variant"] == "step"), None)
        parts = sorted((r for r in records if r is not whole), key=lambda r: -r["seconds"])
        rows = [
            [
                f"`{r['variant']}`",
                str(r["calls"]),
                seconds(r["seconds"]),
                f"{r['share']:.0%}",
                f"{r['flop'] / 1e9:.1f}",
                f"{r['bytes'] / 1e9:.2f}",
                seconds(r["floor"]),
                f"{r['floor'] / r['seconds']:.0%}",
            ]
            for r in parts
        ]
        if whole:
            rest = max(0.0, whole["seconds"] - sum(r["seconds"] for r in parts))
            share, near = rest / whole["seconds"], whole["floor"] / whole["seconds"]
            label = "the rest: first convolution, classifier, Python"
            rows.append([label, "", seconds(rest), f"{share:.0%}", *[""] * 4])
            total, floor = bold([seconds(whole["seconds"]), seconds(whole["floor"])])
            rows.append(["**step**", "", total, "", "", "", floor, f"**{near:.0%}**"])
        head = ["primitive", "calls", "time", "of the step", "GFLOP", "GB", "floor", "floor / time"]
        note = f"{PROFILE_NOTE} {ceiling_note(results)}".strip()
        tables.append(Table(group, head, rows, note))
    return tables


# ---- kernels


def ceiling_note(results: Results) -> str:
    if not results.ceilings:
        return ""
    copy, product = results.ceilings["bandwidth"], results.ceilings["arithmetic"]
    return (
        f"Floor: the larger of counted bytes at {copy / 1e9:.1f} GB/s, a large copy's, and counted "
        f"FLOP at {product / 1e9:.0f} GFLOP/s, a large matrix product's, both in the same run."
    )


def best(records: list[Record], prefix: str) -> Record | None:
    found = [r for r in records if r["variant"].startswith(prefix)]
    return min(found, key=lambda r: r["seconds"]) if found else None


def ours_of(records: list[Record]) -> Record | None:
    """memdense's chosen backend: the first of its variants."""
    return next((r for r in records if r["variant"].startswith(OURS)), None)


def kernels(results: Results) -> list[Table]:
    """Each primitive against PyTorch's separate operations and its floor."""
    rows = []
    for records in results.groups("kernel").values():
        ours = ours_of(records)
        if ours is None:
            continue
        theirs = best(records, "PyTorch")
        by = {r["variant"].split(", ", 1)[1]: seconds(r["seconds"]) for r in records}
        rows.append([
            f"`{ours['primitive']}` {ours['shape']}",
            by.get("nchw", ""), by.get("channels last", ""), by.get("reference", ""),
            seconds(ours["seconds"]),
            f"{theirs['seconds'] / ours['seconds']:.2f}×" if theirs else "",
            seconds(ours["floor"]), f"**{ours['floor'] / ours['seconds']:.0%}**",
            f"{theirs['floor'] / theirs['seconds']:.0%}" if theirs else "",
        ])  # fmt: skip
    names = {ours_of(records)["variant"] for records in results.groups("kernel").values()
             if ours_of(records)}  # fmt: skip
    head = ["primitive", "PyTorch, NCHW", "channels last", "memdense, reference",
            ", ".join(sorted(names)), "gain", "floor", "floor / time", "PyTorch's"]  # fmt: skip
    if names == {"memdense, reference"}:
        head, rows = head[:3] + head[4:], [row[:3] + row[4:] for row in rows]
    note = (
        ceiling_note(results) + " Caches are emptied before each run. Gain: PyTorch's time in its "
        "faster layout over ours."
    )
    return [Table("Primitives", head, rows, note)] if rows else []


def convolutions(results: Results) -> list[Table]:
    """The dilated convolution, forward and backward, beside PyTorch's."""
    rows = []
    for records in results.groups("convolution").values():
        by = {r["variant"]: r for r in records}
        ours = by.get(OURS)
        if ours is None:
            continue
        plain = best([r for r in records if "deterministic" not in r["variant"]], "PyTorch")
        repeatable = best([r for r in records if "deterministic" in r["variant"]], "PyTorch")
        cells = [f"{ours['shape']}, dilation {ours['dilation']}"]
        for theirs in (plain, repeatable):
            cells += [seconds(theirs["seconds"]) if theirs else ""]
        cells.append(seconds(ours["seconds"]))
        for theirs in (plain, repeatable):
            cells += [f"{theirs['seconds'] / ours['seconds']:.2f}×" if theirs else ""]
        own = next((r for r in records if r["variant"].startswith(f"{OURS}, ")), None)
        cells += [seconds(own["seconds"]) if own else ""]
        rows.append(cells)
    head = ["3×3, forward + backward", "PyTorch", "deterministic", "memdense", "gain",
            "gain over deterministic", "its own kernels"]  # fmt: skip
    note = "PyTorch in the faster of its layouts; memdense's is always deterministic."
    if any(row[-1] for row in rows):
        note += " It takes cuDNN's where its own kernels are timed apart."
    else:
        head, rows = head[:-1], [row[:-1] for row in rows]
    return [Table("Dilated convolution", head, rows, note)] if rows else []


# ---- growth


def curves(results: Results) -> dict[tuple[str, str, str], list[Record]]:
    """Records by (axis, network, variant), from small to large."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for records in results.groups("growth").values():
        for r in records:
            found.setdefault((r["axis"], r["arch"], r["variant"]), []).append(r)
    return {key: sorted(rs, key=lambda r: r["value"]) for key, rs in found.items()}


def growth(results: Results) -> list[Table]:
    """Fitted exponents of peak memory and time."""
    rows = []
    for (axis, arch, variant), records in curves(results).items():
        if len(records) < 3:
            continue
        xs = [r["value"] for r in records]
        memory = fit_power(xs, [r["peak bytes"] for r in records])
        time = fit_power(xs, [r["seconds"] for r in records])
        where = "32 x 32" if axis == "depth" else "" if axis == "resolution" else (
            f"{records[0]['size']} x {records[0]['size']}")  # fmt: skip
        batch = "" if axis == "batch" else f"batch {records[0]['batch']}"
        rows.append([
            ", ".join(filter(None, (axis, arch, where, batch))), f"{xs[0]} to {xs[-1]}", variant,
            power(memory), power(time),
            f"{megabytes(records[0]['peak bytes'])} to {megabytes(records[-1]['peak bytes'])}",
        ])  # fmt: skip
    head = ["grows with", "from", "", "memory ~ x^p", "time ~ x^p", "peak of a step"]
    note = f"Least squares on logarithms; R² in brackets. {results.place}"
    return [Table("Growth of a training step", head, rows, note)] if rows else []


def power(fit: Fit) -> str:
    return f"{fit.slope:.2f} ({fit.r2:.3f})"


def capacity(results: Results) -> list[Table]:
    """The largest batch for each memory size, from lines through measured peaks."""
    rows = []
    for (axis, arch, variant), records in curves(results).items():
        if axis != "batch" or len(records) < 2:
            continue
        line = fit_line([r["value"] for r in records], [r["peak bytes"] for r in records])
        image, fixed = 3 * 4 * records[0]["size"] ** 2, records[0]["fixed bytes"]
        batches = [f"{largest_batch(line, image, fixed, b << 30):,}" for b in BUDGETS]
        side = records[0]["size"]
        measured = "batch " + ", ".join(str(r["value"]) for r in records)
        cells = [f"{arch}, {side} x {side}", variant, f"{measured} (R² {line.r2:.4f})",
                 megabytes(line.slope), *batches]  # fmt: skip
        rows.append(bold(cells) if variant == OURS else cells)
    head = ["", "", "measured", "an image"] + [f"{b} GiB" for b in BUDGETS]
    note = (
        "Extrapolated, not run: a line through the measured peaks, plus images, and parameters, "
        "gradients and momentum in float32. What a device's libraries and a fragmented allocator "
        f"take is not in it. {results.place}"
    )
    return [Table("Largest batch, extrapolated", head, rows, note)] if rows else []


def all_tables(results: Results) -> list[Table]:
    return [
        *steps(results, "training"), *steps(results, "inference"), *profile(results),
        *kernels(results), *convolutions(results), *growth(results), *capacity(results),
    ]  # fmt: skip


# ---- plots

COLOURS = {
    "torchvision": "#999999",
    "torchvision, channels last": "#666666",
    "torchvision, torch.compile": "#CC79A7",
    "torchvision, memory_efficient": "#E69F00",
    "checkpointed layers": "#D55E00",
    "memdense": "#0072B2",
    "memdense without extension": "#56B4E9",
    "memdense, 3x3 in Triton": "#56B4E9",
    "memdense, recompute_stem=False": "#009E73",
    "memdense, keep_bottlenecks=True": "#004466",
}


def _figure(columns: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), dpi=150, squeeze=False)
    for ax in axes[0]:
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _place(results: Results) -> str:
    about = results.about
    return f"{about['device']}, threads: {about['threads']}, torch {about['torch']}"


def plot_step(results: Results, path: Path, first: bool = True) -> bool:
    """Time against peak memory of every peer: down and to the left is better. Of the first network
    or of all.
    """
    found = results.groups("training")
    groups = sorted(found.values(), key=lambda rs: ORDER.index(rs[0]["arch"]))
    groups = groups[:1] if first else groups
    if not groups:
        return False
    panel = 5.4 if first else 2.7
    figure, axes = _figure(len(groups), 2.2 + panel * len(groups), 3.6)
    for ax, records in zip(axes, groups, strict=True):
        for r in records:
            if "ratio" in r:
                ax.scatter(
                    r["peak bytes"] / r["batch"] / 1e6, r["ratio"], s=60, zorder=3,
                    color=COLOURS.get(r["variant"], "#000000"), label=r["variant"],
                )  # fmt: skip
        ax.set_xlim(0, 1.08 * ax.get_xlim()[1])
        ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
        ax.set_title(records[0]["group"].replace(" training step, ", "\n"), fontsize=8, loc="left")
        ax.set_xlabel("peak MB per image", fontsize=8)
    axes[0].set_ylabel("time of a training step, torchvision = 1", fontsize=8)
    handles = {label: handle for ax in axes for handle, label in
               zip(*ax.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.legend(handles.values(), handles, loc="center right", fontsize=7, frameon=False)
    figure.text(0.01, 0.01, _place(results), fontsize=6, color="#666666")
    figure.tight_layout(rect=(0, 0.03, 1 - 2.2 / figure.get_figwidth(), 1))
    figure.savefig(path)
    return True


def plot_depth(results: Results, path: Path) -> bool:
    """Peak memory against layers: BC networks, and ImageNet's."""
    lines = {key: rs for key, rs in curves(results).items() if key[0] == "depth"}
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (_, arch, variant), records in lines.items():
        title = f"{arch}, 32 x 32"
        points = [(r["value"], r["peak bytes"] / r["batch"] / 1e6) for r in records]
        panels.setdefault(title, {})[variant] = points
    for records in results.groups("training").values():
        for r in records:
            if r["arch"] in LAYERS:
                title = f"ImageNet's networks, {r['size']} x {r['size']}"
                point = LAYERS[r["arch"]], r["peak bytes"] / r["batch"] / 1e6
                panels.setdefault(title, {}).setdefault(r["variant"], []).append(point)
    panels = {t: p for t, p in panels.items() if max(map(len, p.values())) > 1}
    if not panels:
        return False
    figure, axes = _figure(len(panels), 4.6 * len(panels), 3.6)
    for ax, (title, variants) in zip(axes, panels.items(), strict=True):
        for variant in ("torchvision", "torchvision, memory_efficient", "memdense",
                        "memdense, keep_bottlenecks=True"):  # fmt: skip
            if variant in variants:
                xs, ys = zip(*sorted(variants[variant]), strict=True)
                ax.plot(xs, ys, marker="o", color=COLOURS[variant], label=variant)
        ax.set_title(title, fontsize=9, loc="left")
        ax.set_xlabel("layers", fontsize=8)
        ax.set_ylabel("peak MB per image of a training step", fontsize=8)
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=7, frameon=False)
    figure.text(0.01, 0.01, _place(results), fontsize=6, color="#666666")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path)
    return True


def plot_floors(results: Results, path: Path) -> bool:
    """How much of the time of each kernel its floor is, ours and PyTorch's."""
    bars = []
    for records in results.groups("kernel").values():
        ours, theirs = ours_of(records), best(records, "PyTorch")
        if ours and theirs:
            label = f"{ours['primitive']}  {ours['shape']}"
            bars.append((label, *(r["floor"] / r["seconds"] for r in (ours, theirs))))
    if not bars:
        return False
    figure, (ax,) = _figure(1, 8.5, 1.2 + 0.27 * len(bars))
    places = range(len(bars))
    ax.barh([y - 0.2 for y in places], [100 * b[1] for b in bars], 0.38, color=COLOURS[OURS],
            label="memdense")  # fmt: skip
    ax.barh([y + 0.2 for y in places], [100 * b[2] for b in bars], 0.38, color=COLOURS[BASE],
            label="PyTorch's separate operations, faster layout")  # fmt: skip
    ax.set_yticks(list(places), [b[0] for b in bars], fontsize=7)
    ax.invert_yaxis()
    ax.axvline(100, color="#444444", linewidth=0.8)
    ax.set_xlabel("floor / time, %", fontsize=8)
    ax.legend(fontsize=7, frameon=False)
    figure.text(0.01, 0.01, _place(results), fontsize=6, color="#666666")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path)
    return True


PLOTS: dict[str, tuple[Callable[[Results, Path], bool], str]] = {
    "step": (plot_step, "Time against peak memory of a training step"),
    "steps": (partial(plot_step, first=False), "Time against peak memory, all networks"),
    "depth": (plot_depth, "Peak memory against depth"),
    "floors": (plot_floors, "Share of the floor, kernel by kernel"),
}
TABLES: dict[str, Callable[[Results], list[Table]]] = {
    "headline": headline,
    "summary": summary,
    "training": lambda results: steps(results, "training"),
    "inference": lambda results: steps(results, "inference"),
    "profile": profile,
    "kernels": kernels,
    "convolution": convolutions,
    "growth": growth,
    "capacity": capacity,
}


def sections(results: Results, out: Path, beside: Path) -> dict[str, str]:
    """Every piece of markdown by name, with links to plots as seen from the folder ``beside``."""
    found = {name: "\n\n".join(map(as_markdown, make(results))) for name, make in TABLES.items()}
    for name, (_, title) in PLOTS.items():
        plot = out / f"{name}.png"
        if plot.exists():
            link = Path(os.path.relpath(plot.resolve(), beside.resolve())).as_posix()
            found[f"plot {name}"] = f"![{title}]({link})"
    return {name: text for name, text in found.items() if text}


def fill_in(text: str, prefix: str, pieces: dict[str, str]) -> str:
    """``text`` with what stands between its markers replaced; markers of other results stay.

    Raises:
        KeyError: a marker asks for a piece that these results do not have.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in pieces:
            raise KeyError(f"the results have no {name!r}; they have {', '.join(pieces)}")
        return f"{match['begin']}\n{pieces[name]}\n{match['end']}"

    pattern = (
        rf"(?P<begin><!-- begin {re.escape(prefix)}/(?P<name>[\w ]+) -->)\n"
        rf"(?:.*?\n)?(?P<end><!-- end {re.escape(prefix)}/(?P=name) -->)"
    )
    return re.sub(pattern, replace, text, flags=re.DOTALL)


def page(results: Results, pieces: dict[str, str]) -> str:
    """Everything on one page."""
    headings = {
        "training": "Training step", "inference": "Inference",
        "profile": "Where a training step's time goes", "kernels": "Kernels",
        "convolution": "Dilated convolution", "growth": "Growth", "capacity": "Largest batch",
    }  # fmt: skip
    plots = {"training": "plot steps", "kernels": "plot floors", "growth": "plot depth"}
    parts = [f"# Results: {results.about['device']}", results.place + ".", STEP_NOTE]
    for name, heading in headings.items():
        if name in pieces:
            parts += [f"## {heading}", pieces.get(plots.get(name, ""), ""), pieces[name]]
    return "\n\n".join(filter(None, parts)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Results as tables and plots.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a folder: results.md and plots")
    parser.add_argument("--into", type=Path, nargs="*", default=[], help="files with markers")
    args = parser.parse_args()
    results = load(args.results)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (plot, _) in PLOTS.items():
        plot(results, args.out / f"{name}.png")
    target = args.out / "results.md"
    target.write_text(page(results, sections(results, args.out, args.out)))
    written = [target]
    for path in args.into:
        text = path.read_text()
        filled = fill_in(text, args.out.name, sections(results, args.out, path.parent))
        if filled != text:
            path.write_text(filled)
            written.append(path)
    print("wrote", ", ".join(map(str, written)))


if __name__ == "__main__":
    main()
