"""Why layers like different manifolds: what the steps of each kind of matrix were made of, and which layers a difference of losses comes from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D

from optim.assignment import matches
from scripts.analysis.contest import contest_table, opponents
from scripts.analysis.figures import ASSIGNMENT_COLOURS, DASHES, picture
from scripts.analysis.runs import RecordedRun, held_out_by_seed
from scripts.analysis.statistics import Difference, Estimate
from scripts.analysis.study import Study
from scripts.analysis.tables import ATTENTION_COLUMNS, HELD_OUT, Table, case, cell

CASES = [case("setting", "setting"), HELD_OUT, *ATTENTION_COLUMNS[2:]]
"""The columns of the settings with their own best rate and decay."""
GAIN_STYLES: list[dict[str, Any]] = [{"marker": "o", "color": "#555555"}, {"marker": "s", "color": "#0072B2"}]
"""How the gain of a group alone, and that of a group exchanged last, are drawn."""
KINDS = {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 4, "mlp.c_proj": 4}
"""The matrices of a layer of GPT-2, and how many times the width d their longer side has; the shorter side has d."""
NORMAL = {"stiefel": 1, "dgram": -1}
"""Manifold → the s for which its normal space at a matrix with n columns has the dimension n (n + s)/2, see optim/manifolds.py."""
AT_THE_END = ("sigma_max", "length_mean", "length_spread")
"""What is read from the last record of spectra; everything else is a mean over the certificates of a run."""
MEASURES = {  # field of a record → heading, digits
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
class Exchange:
    """A group of matrices that is exchanged: its name, the setting in which it alone is, and the one in which the rest of its pair is."""

    group: str
    alone: str
    others: str


@dataclass(frozen=True)
class Route:
    """Exchanges of groups of layers between the settings `start` and `end`, all at the same learning rate and decay.

    pairs: both groups of a pair together make `end`. controls: setting → what it is, in words; they are compared with both ends.
    """

    start: str
    end: str
    pairs: Sequence[tuple[Exchange, Exchange]]
    controls: Mapping[str, str]


def pairs(*groups: Mapping[str, str]) -> list[tuple[Exchange, Exchange]]:
    """The exchanges of some pairs, each given as two groups → the setting in which a group is exchanged alone."""
    both = [tuple(pair.items()) for pair in groups]
    return [(Exchange(a, one, other), Exchange(b, other, one)) for (a, one), (b, other) in both]


def why_tables(study: Study, own: Sequence[str], routes: Sequence[Route]) -> list[Table]:
    """The settings that have their own best rate and decay; what the steps of their matrices were made of; and the exchanges of layers."""
    best = replace(study, groups=_own(study, own))
    against = opponents("setting", "all_stiefel", "hetero")
    known = [route for route in routes if {route.start, route.end} <= losses(study).keys()]
    exchanges = [exchange_table(study, route) for route in known]
    controls = [control_table(study, route) for route in known]
    return [contest_table(best, CASES, against), matrix_table(best), *exchanges, *(t for t in controls if t.lines)]


def _own(study: Study, own: Sequence[str]) -> list[list[RecordedRun]]:
    """The groups of the settings that have their own best rate and decay."""
    return [runs for runs in study.groups if runs[0].case["setting"] in own]


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
    """The fields of MEASURES for each run and kind of matrix: a mean over layers, of a certificate's field over training too."""
    lines = []
    for r in study.runs:
        for kind in KINDS:
            line: dict[str, Any] = {**r.case, "seed": r.config["seed"], "matrix": kind, "manifold": _manifold(r, kind)}
            for field in MEASURES:
                seen = by_layer(r, kind, field)
                steps = [max(seen)] if seen and field in AT_THE_END else list(seen)
                values = [x for step in steps for x in seen[step]]
                line[field] = statistics.fmean(values) if values else None
            lines.append(line)
    return lines


def _manifold(r: RecordedRun, kind: str) -> str:
    """The manifold of a kind of matrix; several, of different layers, are joined by "+"."""
    return "+".join(r.chosen(f"h.{layer}.{kind}" for layer in range(r.config["model"]["n_layer"])))


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
            for field, (_, digits) in MEASURES.items():
                chance = by_chance(field, manifold, kind, width)
                text = cell([m[field] for m in same], digits)
                texts.append(text if chance is None or not text else f"{text} ({chance:.{digits}f})")
            lines.append([runs[0].case["setting"], kind, manifold, *texts])
    headings = ["setting", "matrix", "manifold", *(heading for heading, _ in MEASURES.values())]
    caption = (
        "Shares of the momentum's ‖G‖²: normal to the manifold, which no step can follow; along the columns of W, which asks for other "
        "lengths; and along W itself, which asks for another size of the whole. Means over layers and training; σ max and lengths at the end:"
    )
    return Table(headings, lines, [False] * 3 + [True] * len(MEASURES), caption)


# ---- which layers the difference comes from ----


Losses = Mapping[str, Mapping[int, float]]
"""Setting → seed → loss at the end."""


def losses(study: Study) -> Losses:
    """Setting → seed → loss at the end, of the settings of which every run was stable, and of the seeds that all of them have."""
    grouped = study.grouped("setting").items()
    known = {setting: held_out_by_seed(runs) for (setting,), runs in grouped if all(r.stable for r in runs)}
    common = set.intersection(*map(set, known.values())) if known else set()
    return {
        setting: {s: loss for s, loss in found.items() if s in common} for setting, found in known.items() if common
    }


def gains(found: Losses, route: Route) -> dict[str, tuple[Difference | None, Difference | None]]:
    """Group → what its exchange gains alone, and when it comes last; None if a loss is not known."""
    exchanges = [exchange for pair in route.pairs for exchange in pair]
    return {e.group: (_fall(found, route.start, e.alone), _fall(found, e.others, route.end)) for e in exchanges}


def _fall(found: Losses, before: str, after: str) -> Difference | None:
    """The loss before an exchange minus the loss after it."""
    return Difference.of(found[before], found[after]) if {before, after} <= found.keys() else None


def exchange_table(study: Study, route: Route) -> Table:
    """A line for each group of a route, whose ends must be there: what its exchange gains."""
    found = losses(study)
    whole = Difference.of(found[route.start], found[route.end])
    lines = [
        [group, *("" if gain is None else gain.text() for gain in both)]
        for group, both in gains(found, route).items()
        if any(both)
    ]
    caption = (
        f"From {route.start} to {route.end}, {_at_the_best(study, whole.count)}. A gain is the loss before the exchange minus the loss "
        f"after it, in nats, with an interval that is not adjusted for their number. The whole exchange gains {whole.text()}:"
    )
    return Table(["group on DGram", "gain alone", "gain when exchanged last"], lines, [False, True, True], caption)


def control_table(study: Study, route: Route) -> Table:
    """A line for each control of a route, whose ends must be there: what it is, its loss, and the difference from both ends."""
    found, ends = losses(study), (route.start, route.end)
    lines = [
        [name, words, Estimate.of(list(found[name].values())).text(4)]
        + [Difference.of(found[name], found[end]).text() for end in ends]
        for name, words in route.controls.items()
        if name in found
    ]
    headings = ["setting", "what it is", "val loss", *(f"minus {end}" for end in ends)]
    caption = f"Controls, {_at_the_best(study, len(found[route.start]))}:"
    return Table(headings, lines, [False, False, True, True, True], caption)


def _at_the_best(study: Study, seeds: int) -> str:
    settings = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in study.found["hetero",].best.items())
    return f"at the best settings of hetero ({settings}), {seeds} seed{'s' * (seeds > 1)}"


def sums(study: Study, routes: Sequence[Route]) -> str:
    """A sentence for each route on how far the gains of its pairs add up; empty if no pair is known."""
    found, sentences = losses(study), []
    for route in routes:
        apart = []
        for a, b in route.pairs:
            if {route.start, route.end, a.alone, b.alone} <= found.keys():
                start, end, one, other = (found[name] for name in (route.start, route.end, a.alone, b.alone))
                left = Difference.of(*({s: x[s] + y[s] for s in x} for x, y in ((start, end), (one, other))))
                apart.append(f"{a.group} and {b.group} {left.text()}")
        if apart:
            sentences.append(
                f"The sum of the two gains alone, minus the gain of the whole exchange from {route.start} to {route.end} (0 if the "
                f"groups do not interact): {'; '.join(apart)} nats."
            )
    return " ".join(sentences)


# ---- the picture ----


def draw_why(study: Study, own: Sequence[str], routes: Sequence[Route], path: Path) -> Path:
    """Draw the measures over training, a column for each kind of matrix and a line for each assignment; below, the exchanges and controls.

    A thick line is the mean over layers; in the first row, a thin line is a layer. Both are means over seeds.
    """
    groups = _own(study, own)
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
                if chance:
                    axes.axhline(chance, **DASHES)
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


def _draw_routes(figure: FigureBase, found: Losses, routes: Sequence[Route]) -> None:
    """Panels side by side: the gains of the groups of each route and of the whole; then the controls of each route that has some."""
    lines: dict[str, Mapping[str, Sequence[Difference | None]]] = {}
    for route in routes:
        whole = (_fall(found, route.start, route.end),)
        lines[f"from {route.start}, on DGram:"] = {**(gains(found, route) if any(whole) else {}), "all together": whole}
    for route in routes:
        known = {fill(words, 20): (_fall(found, route.start, name),) for name, words in route.controls.items()}
        lines |= {f"from {route.start} to a control:": known} if known else {}
    for axes, (title, shown) in zip(figure.subplots(1, len(lines), squeeze=False).flat, lines.items()):
        _draw_gains(axes, shown)
        axes.set_title(title, loc="left")
        axes.set_xlabel("gain (nats a token)")
    handles = [Line2D([], [], linestyle="", **style) for style in GAIN_STYLES]
    names = ["alone", "exchanged last, after the rest of its pair"]
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)


def _draw_gains(axes: Axes, lines: Mapping[str, Sequence[Difference | None]]) -> None:
    """The gains of each line and their 95% intervals, from the top. A single seed has no interval."""
    axes.axvline(0.0, **DASHES)
    for i, known in enumerate(lines.values()):
        for gain, style, shift in zip(known, GAIN_STYLES, (-0.12, 0.12)):
            if gain is not None:
                axes.errorbar([gain.mean], [i + shift], xerr=[gain.half], capsize=3, **style)
    axes.set_yticks(range(len(lines)), list(lines))
    axes.set_ylim(len(lines) - 0.5, -0.5)
