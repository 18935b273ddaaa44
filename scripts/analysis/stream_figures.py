"""The picture of how far the sublayers turn the residual stream, and of the step that each rule makes of a sublayer's output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from optim.geonorm import DECAYS
from scripts.analysis.figures import DASHES, colours_by_label, picture
from scripts.analysis.runs import RecordedRun, at
from scripts.analysis.study import Study
from scripts.analysis.thin import learned_scales

Rules = Mapping[str, Sequence[RecordedRun]]
"""Label of a curve → its runs, one a seed."""

TITLES = ("turn at the start", "turn at the end", "all turns together", "step of each sublayer at the end")


def turns(rows: Mapping[str, Rules], path: Path) -> Path:
    """Draw the turns of the stream: a row for each title, with the probes of its runs, means over seeds.

    From left to right: the angle (radians) by which each sublayer turns the stream, at the first and at the last probe; the sum of all
    over training; and the step, the turn over the length of the output's tangential part (`model.turns`). The last panel shows pre-norm, whose
    step falls with depth because the stream grows, and GeoNorm with a normalized embedding, beside the factors of its `residual.decay`.
    """
    labels = list(dict.fromkeys(label for rules in rows.values() for label in rules))
    colours = colours_by_label(labels)
    with picture(path, 14.5, 0.9 + 2.9 * len(rows)) as figure:
        grid = figure.subplots(len(rows), len(TITLES), squeeze=False, sharex="col")
        for row, (title, rules) in zip(grid, rows.items()):
            row[0].set_ylabel(title, fontweight="bold")
            for label, runs in rules.items():
                probed = [found for r in runs if (found := [p for p in r.records.get("probe", []) if "stream" in p])]
                if probed:
                    scheduled = has_scheduled_steps(runs[0].config)
                    stepped = scheduled or at(runs[0].config, "residual.rule") == "pre_norm"
                    _rule(row, probed, colours[label], stepped)
                    if scheduled:
                        _schedule(row[3], runs[0])
        for axes, title in zip(grid[0], TITLES):
            axes.set_title(title, loc="left")
        for axes, word in zip(grid[-1], ("sublayer", "sublayer", "step", "sublayer")):
            axes.set_xlabel(word)
        for axes in grid[:, :3].flat:  # a rule may begin without any turn
            axes.set_yscale("symlog", linthresh=1e-3)
            axes.set_ylim(0, 1.5 * axes.get_ylim()[1])
        for axes in grid[:, 3]:
            axes.set_yscale("log")
        handles = [Line2D([], [], color=colours[label], linewidth=2) for label in labels]
        handles.append(Line2D([], [], **DASHES))
        names = [*labels, "1/D(l), the scheduled decay"]
        figure.legend(handles, names, loc="outside lower center", ncols=min(7, len(names)), frameon=False)
    return path


def has_scheduled_steps(config: Mapping[str, Any]) -> bool:
    """Whether the step of a run's rule is scale/D(l): under GeoNorm, if every token of the stream has the length that sublayers expect."""
    return at(config, "residual.rule") == "geonorm" and at(config, "residual.embedding") == "normalize"


def at_the_end(study: Study) -> dict[str, list[dict[str, Any]]]:
    """What `turns` and `draw_scales` show at the last probe, for each optimizer and residual rule: turn (radians) and step of each sublayer,
    means over seeds, and by layer the scales that the first seed has learned."""
    found = []
    for (optimizer, rule), runs in study.grouped("optimizer", "residual").items():
        last = [probed[-1] for r in runs if (probed := [p for p in r.records.get("probe", []) if "stream" in p])]
        fields = {field: _mean([_alternating(record, field) for record in last]) for field in ("turn", "step")}
        scales = {name: learned["mean"][-1] for name, learned in learned_scales(runs[0]).items()}
        found.append({"optimizer": optimizer, "residual": rule, **fields, "scales": scales})
    return {"stream": found}


def _rule(
    row: Sequence[Axes], probed: Sequence[Sequence[dict[str, Any]]], colour: tuple[float, ...], stepped: bool
) -> None:
    """Draw one rule, of which each run has its probes, into the panels of a row."""
    for axes, place in zip(row, (0, -1)):
        by_sublayer = _mean([_alternating(records[place], "turn") for records in probed])
        axes.plot(range(len(by_sublayer)), by_sublayer, color=colour, marker=".", linewidth=1.2)
    path = _mean([[record["stream"]["path"] for record in records] for records in probed])
    row[2].plot([record["step"] for record in probed[0]][: len(path)], path, color=colour, linewidth=1.4)
    if stepped:
        steps = _mean([_alternating(records[-1], "step") for records in probed])
        row[3].plot(range(len(steps)), steps, color=colour, marker=".", linewidth=1.2)


def _alternating(record: Mapping[str, Any], field: str) -> list[float]:
    """A field of attention and MLP as one list over the sublayers, in the order in which the stream passes them."""
    stream = record["stream"]
    return [value for pair in zip(stream[f"{field}_attn"], stream[f"{field}_mlp"]) for value in pair]


def _mean(series: Sequence[Sequence[float]]) -> list[float]:
    """The mean over runs, place by place, as far as all runs go."""
    return [math.fsum(values) / len(values) for values in zip(*series)]


def _schedule(axes: Axes, run: RecordedRun) -> None:
    """Draw the factors over depth that a run of GeoNorm schedules."""
    decay, layers = DECAYS[at(run.config, "residual.decay")], run.config["model"]["n_layer"]
    axes.plot(range(2 * layers), [decay(i // 2, layers) for i in range(2 * layers)], **DASHES)
