"""The best learning rate of a grid, seed by seed: where it lies, whether the grid is wide enough, and how far it moves with the size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from scripts.analysis.runs import RecordedRun
from scripts.analysis.statistics import Difference, Estimate, best_rate
from scripts.analysis.tables import Table

if TYPE_CHECKING:
    from scripts.analysis.study import Study

EXTEND_OPTIONS = {"extensions": 6}
"""The option of an experiment with an extended axis, and its default: how often the axis may get further values."""


def losses_by(runs: Sequence[RecordedRun], axis: str) -> dict[float, list[float]]:
    """Final losses by the value of an axis of numbers, one for each seed; infinite if the run was unstable."""
    found: dict[float, list[float]] = {}
    for r in runs:
        found.setdefault(float(r.case[axis]), []).append(r.final if r.stable and r.final is not None else math.inf)
    return found


def by_seed(runs: Sequence[RecordedRun], axis: str) -> dict[int, dict[float, list[float]]]:
    """Seed → the losses of its runs, as in `losses_by`."""
    seeds = dict.fromkeys(r.config["seed"] for r in runs)
    return {seed: losses_by([r for r in runs if r.config["seed"] == seed], axis) for seed in seeds}


def further_cases(runs: Sequence[RecordedRun], axis: str, axes: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """The cases that the runs ask for, so that the lowest loss of every seed has a finite loss on both sides.

    At an end of the axis, the next value continues with the ratio of the last two values there; a single value has the ratio 2. If the
    neighbour of the best value was unstable, the next value is their geometric mean. Where every loss is infinite, the values go down.
    """
    rows: dict[tuple[str, ...], list[RecordedRun]] = {}
    for r in runs:
        rows.setdefault(tuple(r.case[key] for key in axes if key != axis), []).append(r)
    found = []
    for row in rows.values():
        case = {key: row[0].case[key] for key in axes}
        values: set[float] = set()
        for curve in by_seed(row, axis).values():
            values.update(_asked({value: losses[0] for value, losses in curve.items()}))
        found += [{**case, axis: f"{value:.3g}"} for value in sorted(values)]
    return found


def _asked(curve: Mapping[float, float]) -> list[float]:
    """The values that a curve (value → loss) lacks beside its lowest loss."""
    tried = sorted(curve)
    i = min(range(len(tried)), key=lambda i: curve[tried[i]])
    best, factor, found = tried[i], {-1: 0.5, 1: 2.0}, []
    if len(tried) > 1:
        factor = {-1: tried[0] / tried[1], 1: tried[-1] / tried[-2]}
    for side in (-1, 1) if math.isfinite(curve[best]) else (-1,):
        if not 0 <= i + side < len(tried):
            found.append(best * factor[side])
        elif math.isinf(curve[tried[i + side]]):
            found.append(math.sqrt(best * tried[i + side]))
    return found


# ---- tables ----


def optimum_table(study: Study, rate: str, models: Mapping[str, str], sizes: Mapping[str, str]) -> Table:
    """The best learning rate at every size, and its distance in octaves from that at the values of `around`, mean ± standard error.

    The best rate is that of `best_rate`, seed by seed; the table has the geometric mean.

    Args:
        rate: the axis of the learning rate. models: the values of the study's first axis → words. sizes: axis → word.
    """
    lines = []
    first = next(iter(study.axes))
    for model in study.axes[first]:
        home = _optima(study.along(first).get(model, []), rate)
        for axis, word in sizes.items():
            for value, runs in study.along(axis, **{first: model}).items():
                best = _optima(runs, rate)
                mean = 2 ** statistics.fmean(octave for octave, _, _ in best.values())
                moved = [best[seed][0] - home[seed][0] for seed in best if seed in home]
                ends = sum(at_end for _, _, at_end in best.values())
                mark = f" (an end of the stable rates with {ends} of {len(best)} seeds)" if ends else ""
                loss = Estimate.of([loss for _, loss, _ in best.values()]).text(4)
                apart = Estimate.of(moved).text(2, "+") if moved else ""
                lines.append([models[model], word, value, f"{mean:.4f}{mark}", apart, loss])
    headings = ["model", "varied", "to", "best rate", "octaves from the base's", "val loss there"]
    return Table(headings, lines, [False, False, True, True, True, True])


def slope_table(study: Study, rate: str, models: Mapping[str, str], sizes: Mapping[str, str]) -> Table:
    """How far the best learning rate moves when a size doubles: the slope of log2(rate) over log2(size), seed by seed.

    A seed is left out of a slope if one of its best rates has no stable neighbour on one side. Arguments: as in `optimum_table`.
    """
    lines = []
    first = next(iter(study.axes))
    for model in study.axes[first]:
        for axis, word in sizes.items():
            slopes = seed_slopes({v: _optima(runs, rate) for v, runs in study.along(axis, **{first: model}).items()})
            if not slopes:
                lines.append([models[model], word, "not known", "", "0"])
                continue
            found = Difference.of(slopes, dict.fromkeys(slopes, 0.0))
            interval = f"[{found.low:+.2f}, {found.high:+.2f}]" if found.count > 1 else ""
            mean = Estimate(found.mean, found.error, found.count).text(2, "+")
            lines.append([models[model], word, mean, interval, str(found.count)])
    headings = ["model", "doubled", "octaves that the best rate moves", "95% interval", "seeds"]
    return Table(headings, lines, [False, False, True, True, True], "Per doubling:")


Optima = Mapping[int, tuple[float, float, bool]]
"""Seed → log2 of its best learning rate, the loss there, and whether a side has no stable neighbour."""


def seed_slopes(optima: Mapping[str, Optima]) -> dict[int, float]:
    """Seed → the slope (least squares) of log2(best rate) over log2(size), from size → optima.

    A seed that lacks a size, or has a best rate at an end, is left out. Empty with fewer than two sizes.
    """
    seeds = set.intersection(*(set(found) for found in optima.values())) if len(optima) > 1 else set()
    x = [math.log2(float(size)) for size in optima]
    return {
        seed: statistics.linear_regression(x, [found[seed][0] for found in optima.values()]).slope
        for seed in sorted(seeds)
        if not any(found[seed][2] for found in optima.values())
    }


def _optima(runs: Sequence[RecordedRun], rate: str) -> dict[int, tuple[float, float, bool]]:
    best = {seed: best_rate(curve) for seed, curve in by_seed(runs, rate).items()}
    return {seed: (math.log2(found), loss, at_end) for seed, (found, loss, at_end) in best.items()}
