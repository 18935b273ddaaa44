"""Few points of many: curves and grids small enough for a page, whatever the length of the runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from scripts.analysis.runs import RecordedRun

POINTS, STRETCHES, COLUMNS, SPECTRA = 600, 120, 60, 24
"""Most points of a curve, stretches of one that scatters, columns of a heat map, and recorded steps of a whole spectrum."""


Numbers = Sequence[float] | np.ndarray


def thin(steps: Numbers, values: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points (n,) float64 of a curve: of every stretch its least and its greatest value, so that no spike is lost.

    Values that are not finite become NaN, which is a gap of the line.
    """
    x, y = _with_gaps(steps, values)
    if len(x) <= POINTS:
        return x, y
    kept = []
    for part in np.array_split(np.arange(len(x)), POINTS // 2):
        here = y[part]
        if np.isnan(here).all():
            kept.append(part[0])
        else:
            kept += sorted({part[np.nanargmin(here)], part[np.nanargmax(here)]})
    return x[kept], y[kept]


def stretches(
    steps: Sequence[float], values: Sequence[float], reduce: Callable[[np.ndarray], float], most: int = STRETCHES
) -> tuple[list[float], list[float]]:
    """At most `most` points of a curve that scatters: the last step of each stretch, and its reduced finite values; NaN if there is none."""
    x, y = _with_gaps(steps, values)
    if len(x) <= most:
        return x.tolist(), y.tolist()
    parts = np.array_split(np.arange(len(x)), most)
    return [x[p[-1]] for p in parts], [math.nan if np.isnan(y[p]).all() else float(reduce(y[p])) for p in parts]


def _with_gaps(steps: Numbers, values: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """A curve in float64, with NaN for what is not finite."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    return x, np.where(np.isfinite(y), y, np.nan)


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items at equal distances, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def shared(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[tuple[list[float], list[float]]]:
    """The curves, cut to the steps that all have, so that stretches of them are stretches of the same steps."""
    steps = set.intersection(*(set(steps) for steps, _ in curves)) if curves else set()
    kept = [[(x, y) for x, y in zip(*curve) if x in steps] for curve in curves]
    return [([x for x, _ in pairs], [y for _, y in pairs]) for pairs in kept]


def band(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[np.ndarray, ...]:
    """Step, mean, lowest and highest value (n,) at the steps that all curves have; values that are not finite are NaN."""
    known = [dict(zip(steps, values)) for steps, values in curves]
    steps = sorted(set.intersection(*map(set, known)))
    grid = np.array([[curve[step] for step in steps] for curve in known], float).reshape(len(known), len(steps))
    grid = np.where(np.isfinite(grid), grid, np.nan)
    if not len(steps):
        return (np.empty(0),) * 4
    return np.array(steps, float), grid.mean(0), grid.min(0), grid.max(0)


def kind_and_layer(name: str) -> tuple[str, int]:
    """The kind of a matrix and its layer: "transformer.h.3.attn.c_attn.weight" → ("attn.c_attn", 3). Without a number the layer is 0."""
    parts = [part for part in name.split(".") if part != "weight"]
    layer = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if layer is None:
        return ".".join(parts), 0
    return ".".join(parts[layer + 1 :]) or ".".join(parts[:layer]), int(parts[layer])


def shortened(value: Any) -> Any:
    """Numbers with four significant digits, and None for those that are not finite: short JSON."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [shortened(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def singular_values(run: RecordedRun) -> dict[str, Any]:
    """What the page shows of the spectra of a run: kind of matrix → layers, steps, and for each statistic a list (layer, step)."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for record in run.records.get("spectra", []):
        by_name.setdefault(record["name"], {})[record["step"]] = record
    kinds: dict[str, list[tuple[int, dict[int, dict[str, Any]]]]] = {}
    for name, records in by_name.items():
        kind, layer = kind_and_layer(name)
        kinds.setdefault(kind, []).append((layer, records))
    return {kind: _kind(sorted(rows, key=lambda row: row[0])) for kind, rows in kinds.items()}


def _kind(rows: list[tuple[int, dict[int, dict[str, Any]]]]) -> dict[str, Any]:
    steps = sorted({step for _, records in rows for step in records})
    coarse, few = evenly(steps, COLUMNS), evenly(steps, SPECTRA)
    found: dict[str, Any] = {"layers": [layer for layer, _ in rows], "steps": coarse, "shape_steps": few}
    for key in ("sigma_max", "sigma_median", "sigma_min", "distance"):
        found[key] = [[shortened(_number(records, step, key)) for step in coarse] for _, records in rows]
    found["shape"] = [
        [shortened(records[step]["sigma_shape"]) if step in records else [] for step in few] for _, records in rows
    ]
    return found


def _number(records: dict[int, dict[str, Any]], step: int, key: str) -> float:
    value = records.get(step, {}).get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan


def learned_scales(run: RecordedRun) -> dict[str, dict[str, Any]]:
    """Name of a learned scale → `steps`, and `mean` and `deviation` by step and layer (one layer for a scale of the whole model)."""
    found: dict[str, dict[str, Any]] = {}
    for record in run.records.get("scales", []):
        known = found.setdefault(record["name"], {"steps": [], "mean": [], "deviation": []})
        known["steps"].append(record["step"])
        for key in ("mean", "deviation"):
            known[key].append(record[key] if isinstance(record[key], list) else [record[key]])
    return found


HEADS = {"logit_max": "largest logit", "entropy": "entropy / log(position)", "saturated": "saturated rows"}


def heads(run: RecordedRun) -> dict[str, Any]:
    """What the page shows of the probes of a run: steps, layers, heads, and for each quantity of HEADS a list (layer · head, step)."""
    fit = [r for r in run.records.get("probe", []) if all(_is_grid(r.get(key)) for key in HEADS)]
    if not fit:
        return {}
    size = len(fit[-1]["entropy"]), len(fit[-1]["entropy"][0])
    few = evenly([r for r in fit if (len(r["entropy"]), len(r["entropy"][0])) == size], COLUMNS)
    found: dict[str, Any] = {"steps": [r["step"] for r in few], "layers": size[0], "heads": size[1]}
    for key in HEADS:
        flat = [[x for layer in r[key] for x in layer] for r in few]
        found[key] = shortened(list(zip(*flat)))
    return found


def _is_grid(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, list) and row for row in value)


def per_step(records: Iterable[dict[str, Any]], key: str, reduce: Any) -> tuple[list[int], list[float]]:
    """Steps, and at each the reduced numbers of all records of that step, such as the mean over matrices."""
    found: dict[int, list[float]] = {}
    for record in records:
        if isinstance(record.get(key), (int, float)):
            found.setdefault(record["step"], []).append(float(record[key]))
    return list(found), [reduce(values) for values in found.values()]
