"""The coordinate check of a run, read from its `update` records (training/coordinate.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from optim.assignment import folded
from scripts.analysis.runs import RecordedRun
from scripts.analysis.tables import Table


def update_table(run: RecordedRun, step: int | None = None) -> Table:
    """A line for each parameter, equal layers together: the size of a step and of the change of features, in their own norms.

    `step` is that of the records; None: the last. Of several layers the range is shown. "per input" is the largest change of a feature,
    divided by the step's size and by the largest input: at most 1 for maps of one input, by the definition of the norm.

    Raises:
        LookupError: the run has no such records.
    """
    records = run.records.get("update", [])
    last = max((r["step"] for r in records), default=None) if step is None else step
    chosen = [r for r in records if r["step"] == last]
    if not chosen:
        at = "" if step is None else f" of step {step}"
        raise LookupError(
            f"{run.directory} has no records 'update'{at}; train with log.interval_updates=25, for example"
        )
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
    return Table(headings, lines, [False, False, True, True, True], f"Step {last} of {run.directory}:")


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
