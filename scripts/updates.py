"""Print how far a run's steps moved each parameter and its features, each in its own norm.

    python train.py log.interval_updates=25 output_dir=outputs/first
    python scripts/updates.py outputs/first
    python scripts/updates.py outputs/first step=100

Name one run or more. step= chooses the records; 0 takes the last. It is the coordinate check: the records are those of
training/coordinate.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from optim.assignment import folded
from scripts.analysis.runs import RecordedRun, find_runs
from scripts.analysis.tables import Table
from scripts.command import UsageError, parse, problems_of_options, run


def update_table(recorded: RecordedRun, step: int) -> Table:
    """A line for each parameter, equal layers together: the size of a step and of the change of features, in their own norms.

    `step` is that of the records; 0: the last. Of several layers the range is shown. "per input" is the largest change of a feature,
    divided by the step's size and by the largest input: at most 1 for maps of one input, by the definition of the norm.

    Raises:
        UsageError: the run has no such records.
    """
    records = recorded.records.get("update", [])
    chosen_step = step or max((r["step"] for r in records), default=0)
    chosen = [r for r in records if r["step"] == chosen_step]
    if not records:
        raise UsageError(
            f"{recorded.directory} has no records 'update'; train with log.interval_updates=25, for example"
        )
    if not chosen:
        steps = ", ".join(map(str, sorted({r["step"] for r in records})))
        raise UsageError(f"{recorded.directory} has no records 'update' of step {step}, but of {steps}; choose one")
    lines = []
    for name, layers in _by_kind(chosen).items():
        sizes, changes = [r["size"] for r in layers], [r["change_max"] for r in layers if r["change_max"] is not None]
        shares = [
            r["change_max"] / (r["size"] * r["input_max"])
            for r in layers
            if r["change_max"] is not None and r["size"] * r["input_max"] > 0
        ]
        norm = f"{layers[0]['input']} → {layers[0]['output']}"
        lines.append([name, norm, _span(sizes), _span(changes), _span(shares)])
    headings = ["parameter", "norm", "size of the step", "largest change of a feature", "per input"]
    return Table(headings, lines, [False, False, True, True, True], f"Step {chosen_step} of {recorded.directory}:")


def _by_kind(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The records of equal layers together, under one folded name."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        kinds.setdefault(re.sub(r"\.\d+\.", ".#.", record["name"]), []).append(record)
    return {folded(r["name"] for r in layers)[0]: layers for layers in kinds.values()}


def _span(numbers: Sequence[float]) -> str:
    """The least and the largest of some numbers, or the one that all are."""
    if not numbers:
        return ""
    least, largest = f"{min(numbers):.3g}", f"{max(numbers):.3g}"
    return least if least == largest else f"{least} to {largest}"


def work(arguments: list[str]) -> int:
    """Print a table for each run."""
    places, options = parse(arguments, {"step": 0}, problems_of_options)
    if not places:
        raise UsageError("name runs or directories of runs, such as outputs/first; see --help")
    for recorded in find_runs(places):
        table = update_table(recorded, options["step"])
        print(table.text())
        if unknown := [name for name, _, _, change, _ in table.lines if not change]:
            print(
                f"\nWithout a change of features, since their modules are not called with features alone: {', '.join(unknown)}"
            )
    return 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
