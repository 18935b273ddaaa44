"""Why layers like different manifolds: what the steps of each kind of matrix were made of, and which layers a difference of losses comes from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D

from optim.assignment import matches
from scripts.analysis.contest import Opponent, contest_table
from scripts.analysis.figures import ASSIGNMENT_COLOURS, DASHES, picture
from scripts.analysis.runs import RecordedRun
from scripts.analysis.statistics import Difference, Estimate
from scripts.analysis.study import Study
from scripts.analysis.tables import ATTENTION_COLUMNS, HELD_OUT, Table, case, cell

CASES = [case("setting", "setting"), HELD_OUT, *ATTENTION_COLUMNS[2:]]
"""The columns of the settings with their own best rate and decay."""
KINDS = {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 4, "mlp.c_proj": 4}
"""The matrices of a layer of GPT-2, and how many times the width d their longer side has; the shorter side has d."""
NORMAL = {"stiefel": 1, "dgram": -1}
"""Manifold → the s for which its normal space at a matrix with n columns has the dimension n (n + s)/2, see optim/manifolds.py."""
AT_THE_END = ("sigma_max", "length_mean", "length_spread")
"""What is read from the last record of spectra; everything else is a mean over the certificates of a run."""
COLUMNS = {  # key → heading, digits
    "normal_share": ("normal share (by chance)", 2),
    "length_share": ("length share (by chance)", 3),
    "size_share": ("size share (by chance)", 4),
    "momentum_top": ("top direction of the momentum", 2),
    "momentum_rank": ("effective rank of the momentum", 1),
    "step_rank": ("of the step", 1),
    "feas": ("feas", 2),
    "sigma_max": ("σ max", 2),
    "length_mean": ("length of columns", 2),
    "length_spread": ("its spread", 3),
}


@dataclass(frozen=True)
class Route:
    """An exchange of groups of layers: from the setting `start` to the setting `end`, at the same learning rate and decay.

    pairs: two settings each, in which one of two groups is exchanged; both groups together make `end`. beside: further settings that are
    compared with both ends.
    """

    start: str
    end: str
    pairs: Sequence[tuple[str, str]]
    beside: Sequence[str] = ()


def why_tables(study: Study, own: Sequence[str], routes: Sequence[Route]) -> list[Table]:
    """The settings that have their own best rate and decay; what the steps of their matrices were made of; and the exchanges of layers."""
    best = replace(study, groups=[runs for runs in study.groups if runs[0].case["setting"] in own])
    against: dict[str, Opponent] = {name: partial(dict, setting=name) for name in ("all_stiefel", "hetero")}
    known = losses(study).keys()
    exchanges = [exchange_table(study, route) for route in routes if {route.start, route.end} <= known]
    return [contest_table(best, CASES, against), matrix_table(best), *exchanges]


# ---- what steps were made of ----


def by_layer(r: RecordedRun, kind: str, field: str) -> dict[int, list[float]]:
    """Step → a number for each layer: a field of the certificates, or of the spectra, of a kind of matrix."""
    found: dict[int, list[float]] = {}
    for record in r.records.get("spectra" if field in AT_THE_END else "certificate", []):
        if matches(kind, record["name"]) and record.get(field) is not None:
            found.setdefault(record["step"], []).append(record[field])
    return found


def by_chance(field: str, manifold: str, kind: str, width: int) -> float | None:
    """The share of a random momentum; None for what is no share, or 0 where nothing is normal."""
    rows = KINDS[kind] * width
    shares = {"length_share": 1 / rows, "size_share": 1 / (rows * width)}
    if manifold in NORMAL:
        shares["normal_share"] = (width + NORMAL[manifold]) / (2 * rows)
    return shares.get(field)


def measured(study: Study) -> list[dict[str, Any]]:
    """The fields of COLUMNS for each run and kind of matrix: a mean over layers, of a certificate's field over training too."""
    lines = []
    for r in study.runs:
        for kind in KINDS:
            line: dict[str, Any] = {**r.case, "seed": r.config["seed"], "matrix": kind, "manifold": _manifold(r, kind)}
            for field in COLUMNS:
                seen = by_layer(r, kind, field)
                steps = [max(seen)] if seen and field in AT_THE_END else list(seen)
                values = [x for step in steps for x in seen[step]]
                line[field] = statistics.fmean(values) if values else None
            lines.append(line)
    return lines


def _manifold(r: RecordedRun, kind: str) -> str:
    """The manifold of a kind of matrix; several, of different layers, are joined by "+"."""
    names = [f"h.{layer}.{kind}" for layer in range(r.config["model"]["n_layer"])]
    chosen = [
        choice
        for name in names
        for pattern, choice in r.config["assignment"]["rules"].items()
        if matches(pattern, name)
    ]
    return "+".join(dict.fromkeys(chosen))


def matrix_table(study: Study) -> Table:
    """A line for each case of the study and kind of matrix, from the fact `matrices`."""
    lines = []
    for runs in study.groups:
        for kind in KINDS:
            same = [
                m for m in study.facts["matrices"] if m["matrix"] == kind and m["setting"] == runs[0].case["setting"]
            ]
            manifold, width = same[0]["manifold"], runs[0].config["model"]["n_embd"]
            texts = []
            for field, (_, digits) in COLUMNS.items():
                chance = by_chance(field, manifold, kind, width)
                text = cell([m[field] for m in same], digits)
                texts.append(text if chance is None or not text else f"{text} ({chance:.{digits}f})")
            lines.append([runs[0].case["setting"], kind, manifold, *texts])
    headings = ["setting", "matrix", "manifold", *(heading for heading, _ in COLUMNS.values())]
    caption = (
        "Shares of the momentum's ‖G‖²: normal to the manifold, which no step can follow; along the columns of W, which asks for other "
        "lengths; and along W itself, which asks for another size of the whole. Means over layers and training; σ max and lengths at the end:"
    )
    return Table(headings, lines, [False] * 3 + [True] * len(COLUMNS), caption)


# ---- which layers the difference comes from ----


def losses(study: Study) -> dict[str, dict[int, float]]:
    """Setting → seed → loss at the end, of the settings of which every run was stable, and of the seeds that all of them have."""
    stable = {setting: runs for (setting,), runs in study.grouped("setting").items() if all(r.stable for r in runs)}
    known = {
        setting: {r.config["seed"]: r.held_out for r in runs if r.held_out is not None}
        for setting, runs in stable.items()
    }
    common = set.intersection(*map(set, known.values())) if known else set()
    return {
        setting: {s: loss for s, loss in found.items() if s in common} for setting, found in known.items() if common
    }


def share(part: Mapping[int, float], whole: Mapping[int, float]) -> Estimate:
    """The mean of the parts (seed → nats) over the mean of the wholes, and its standard error to first order (delta method)."""
    seeds = [seed for seed in part if seed in whole]
    mean = statistics.fmean(whole[seed] for seed in seeds)
    ratio = statistics.fmean(part[seed] for seed in seeds) / mean if mean else math.nan
    left = Estimate.of([part[seed] - ratio * whole[seed] for seed in seeds])
    return Estimate(ratio, left.error / abs(mean) if mean else math.nan, left.count)


def minus(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """The difference of two losses, seed by seed."""
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def exchange_table(study: Study, route: Route) -> Table:
    """A line for each setting of a route, whose ends must be there: loss, difference from both ends, and its group's share of the gap.

    The share of a group that is exchanged last is what is left when the other group of its pair has been exchanged.
    """
    found, lines = losses(study), []
    partner = {a: b for pair in route.pairs for a, b in (pair, pair[::-1])}
    start, end = found[route.start], found[route.end]
    gap = minus(start, end)
    for name in (route.start, *partner, route.end, *route.beside):
        if name in found:
            text = Estimate.of(list(found[name].values())).text(4)
            apart = [Difference.of(found[name], one).text() if one is not found[name] else "" for one in (start, end)]
            inner, last = name not in (route.start, route.end), found.get(partner.get(name, ""))
            first = share(minus(start, found[name]), gap).text(2) if inner else ""
            lines.append([name, text, *apart, first, share(minus(last, end), gap).text(2) if last else ""])
    headings = [
        "on DGram",
        "val loss",
        f"minus {route.start}",
        f"minus {route.end}",
        "share of the gap",
        "share if exchanged last",
    ]
    settings = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in study.found["hetero",].best.items())
    caption = f"From {route.start} to {route.end}, all at the best settings of hetero ({settings}):"
    return Table(headings, lines, [False, *[True] * 5], caption)


def sums(study: Study, routes: Sequence[Route]) -> str:
    """A sentence for each pair of groups: how far their shares add up."""
    found, sentences = losses(study), []
    for route in routes:
        for a, b in route.pairs:
            if {route.start, route.end, a, b} <= found.keys():
                start, gap = found[route.start], minus(found[route.start], found[route.end])
                alone = {seed: 2 * start[seed] - found[a][seed] - found[b][seed] for seed in gap}
                sentences.append(
                    f"{a} and {b} alone make up {share(alone, gap).text(2)} of the gap from {route.start} to {route.end}."
                )
    return " ".join(["Shares that add up to 1 do not interact.", *sentences] if sentences else [])


# ---- the picture ----


def draw_why(study: Study, own: Sequence[str], routes: Sequence[Route], path: Path) -> Path:
    """Draw the measures over training, a column for each kind of matrix and a line for each assignment; below, the exchanges.

    A thin line is a layer, a thick one the mean over layers, both means over seeds.
    """
    groups = [runs for runs in study.groups if runs[0].case["setting"] in own]
    rows: list[tuple[str, str, bool]] = [
        ("normal_share", "share of the momentum\nnormal to the manifold", False),
        ("length_share", "share along\nthe columns", True),
        ("momentum_rank", "effective rank\nof the momentum", False),
        ("length_mean", "mean length\nof columns", True),
    ]
    with picture(path, 10.4, 11.0) as figure:
        upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(2.9, 1)).flat
        panels = upper.subplots(len(rows), len(KINDS), sharex=True, sharey="row", squeeze=False)
        for line, (field, words, logarithmic) in zip(panels, rows):
            for axes, kind in zip(line, KINDS):
                for runs in groups:
                    _measure(axes, runs, kind, field)
                chance = by_chance(field, "stiefel", kind, groups[0][0].config["model"]["n_embd"]) if groups else None
                axes.axhline(chance, **DASHES) if chance else None
                axes.set_yscale("log" if logarithmic else "linear")
            line[0].set_ylabel(words)
        for axes, kind in zip(panels[0], KINDS):
            axes.set_title(kind, loc="left")
        for axes in panels[-1]:
            axes.set_xlabel("step")
        handles = [Line2D([], [], color=ASSIGNMENT_COLOURS[runs[0].assignment], linewidth=2) for runs in groups]
        names = [runs[0].assignment for runs in groups]
        handles, names = [*handles, Line2D([], [], **DASHES)], [*names, "by chance, Stiefel"]
        upper.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
        _draw_routes(lower, losses(study), routes)
    return path


def _measure(axes: Axes, runs: Sequence[RecordedRun], kind: str, field: str) -> None:
    """The curves of a field of some seeds: thin for each layer, thick for their mean. Without a manifold, nothing is normal."""
    seen = [by_layer(r, kind, field) for r in runs]
    steps = [step for step in seen[0] if all(step in s for s in seen)]
    if not steps or (field == "normal_share" and _manifold(runs[0], kind) not in NORMAL):
        return
    layers = [[statistics.fmean(values) for values in zip(*(s[step] for s in seen))] for step in steps]
    colour = ASSIGNMENT_COLOURS[runs[0].assignment]
    if field == "normal_share":
        axes.plot(steps, layers, color=colour, linewidth=0.6, alpha=0.5)
    axes.plot(steps, [statistics.fmean(values) for values in layers], color=colour, linewidth=1.8)


def _draw_routes(figure: FigureBase, found: Mapping[str, Mapping[int, float]], routes: Sequence[Route]) -> None:
    """The losses of the settings of each route minus that of its start, with 95% intervals, one below the other."""
    for axes, route in zip(figure.subplots(1, len(routes), squeeze=False).flat, routes):
        names = [route.start, *(name for pair in route.pairs for name in pair), route.end, *route.beside]
        known = [name for name in names if name in found and {route.start, route.end} <= found.keys()]
        axes.axvline(0.0, **DASHES)
        for i, name in enumerate(known):
            if name != route.start:
                d = Difference.of(found[name], found[route.start])
                axes.errorbar(
                    [d.mean],
                    [i],
                    xerr=[0.0 if math.isnan(d.low) else d.mean - d.low],
                    marker="o",
                    capsize=3,
                    color="#555555",
                )
        axes.set_yticks(range(len(known)), known)
        axes.invert_yaxis()
        axes.set_xlabel(f"loss minus that of {route.start} (nats a token)")
        axes.set_title("on DGram:", loc="left")
