"""Two results side by side; marks what became slower or larger, and fails if anything did.

    python benchmarks/compare.py old.json new.json [--limit 5]

Exit status: 0 without regressions, 1 with some, 2 where the two cannot be compared.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from report import Results, Table, as_rich, load
from rich.console import Console

MEASURES = {"seconds": "time", "peak bytes": "peak", "kept bytes": "kept"}


class Change(NamedTuple):
    """One measure of one variant; ``ratio`` is new over old."""

    group: str
    variant: str
    measure: str
    old: float
    new: float

    @property
    def ratio(self) -> float:
        return self.new / self.old


def incomparable(old: Results, new: Results) -> str:
    """Why the two say nothing about each other; empty where they do."""
    for key in ("device", "threads"):
        if old.about[key] != new.about[key]:
            return f"{key}: {old.about[key]} and {new.about[key]}"
    return ""


def changes(old: Results, new: Results) -> Iterator[Change]:
    """Every measure that both have, in the new one's order."""
    before = {(r["group"], r["variant"]): r for r in old.records}
    for r in new.records:
        key = r["group"], r["variant"]
        for measure, name in MEASURES.items():
            if key in before and r.get(measure) and before[key].get(measure):
                yield Change(*key, name, before[key][measure], r[measure])


def is_regression(change: Change, limit: float) -> bool:
    """More than ``limit`` per cent slower or larger."""
    return change.ratio > 1 + limit / 100


def table(found: list[Change], limit: float, everything: bool) -> Table:
    rows = []
    for change in found:
        mark = "REGRESSION" if is_regression(change, limit) else ""
        if change.ratio < 1 / (1 + limit / 100):
            mark = "better"
        if mark or everything:
            figures = [f"{value:.4g}" for value in (change.old, change.new)]
            rows.append([change.group, change.variant, change.measure, *figures,
                         f"{100 * (change.ratio - 1):+.1f} %", mark])  # fmt: skip
    head = ["group", "variant", "", "old", "new", "change", ""]
    return Table(f"beyond {limit:g} %" if not everything else "all", head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Two results side by side.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--limit", type=float, default=5.0, help="per cent that are no regression")
    parser.add_argument("--all", action="store_true", help="print what did not change too")
    parser.add_argument("--across-devices", action="store_true", help="compare them all the same")
    args = parser.parse_args()
    old, new = load(args.old), load(args.new)
    reason = incomparable(old, new)
    if reason and not args.across_devices:
        print(f"not compared: {reason}; --across-devices compares all the same", file=sys.stderr)
        return 2
    found = list(changes(old, new))
    if not found:
        print("not compared: no group and variant is in both", file=sys.stderr)
        return 2
    console = Console(width=160)
    console.print(as_rich(table(found, args.limit, args.all)))
    worse = sum(is_regression(change, args.limit) for change in found)
    keys = [{(r["group"], r["variant"]) for r in results.records} for results in (old, new)]
    console.print(f"{len(found)} measures compared, {worse} beyond {args.limit:g} %; "
                  f"{len(keys[0] - keys[1])} only in the old, {len(keys[1] - keys[0])} only in the "
                  "new")  # fmt: skip
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
