"""The pictures of experiments: heat maps, losses over learning rates, probes over training, exponents of signal propagation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from scripts.analysis.figures import (
    ASSIGNMENT_COLOURS,
    DASHES,
    OTHER_COLOURS,
    UNSTABLE,
    UNSTABLE_KEY,
    colours_by_label,
    colours_of,
    picture,
    plain,
)
from scripts.analysis.runs import RecordedRun, at, final_losses
from scripts.analysis.statistics import Difference, Estimate, best_rate
from scripts.analysis.tables import Groups

ROUNDING = 1e-15
"""The distance below which tokens in float64 count as equal."""

Curves = Mapping[str, Mapping[float, Sequence[float]]]
"""Label → learning rate → final losses, one a seed."""


def heat_map(groups: Groups, across: str, down: str, path: Path) -> Path:
    """Draw the mean final validation loss over two axes of an experiment. The error stands below each mean; a cross marks unstable runs."""
    cells = {(group[0].value_of(across), group[0].value_of(down)): group for group in groups}
    columns, rows = (list(dict.fromkeys(cell[i] for cell in cells)) for i in (0, 1))
    stable = {key: runs for key, runs in cells.items() if all(r.stable for r in runs)}
    means = {key: Estimate.of(final_losses(runs)).mean for key, runs in stable.items()}
    norm = Normalize(min(means.values(), default=0.0), max(means.values(), default=1.0))
    grid = [[means.get((x, y), math.nan) for x in columns] for y in rows]
    with picture(path, 2.5 + 1.25 * max(2, len(columns)), 1.35 + 0.62 * len(rows), grid=False) as figure:
        axes = figure.subplots()
        shade = axes.imshow(grid, cmap="viridis_r", norm=norm, aspect="auto")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(across)
        axes.set_ylabel(down)
        axes.tick_params(length=0)
        for i, y in enumerate(rows):
            for j, x in enumerate(columns):
                mean = means.get((x, y))
                colour = "white" if mean is not None and norm(mean) > 0.5 else "black"
                text = _heat(cells.get((x, y), []))
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
        axes.set_title("final validation loss: light is good", loc="left", fontsize=9)
        figure.colorbar(shade, label="nats a token")
    return path


def _heat(runs: Sequence[RecordedRun]) -> str:
    if not runs:
        return "not run"
    if unstable := sum(not r.stable for r in runs):
        return f"✗ {unstable} of {len(runs)}\nunstable"
    return Estimate.of(final_losses(runs)).text(3).replace(" ", "\n", 1)


def loss_by_rate(panels: Sequence[Sequence[tuple[str, Curves]]], path: Path, rates: str = "learning rate") -> Path:
    """Draw final loss over learning rate: rows of panels, each with a title and its curves. A large dot marks the best rate of a curve.

    A rate at which a seed became unstable has a cross near the upper edge instead of a point; the line joins its neighbours.
    """
    with picture(path, 3.2 * len(panels[0]), 0.4 + 2.6 * len(panels)) as figure:
        sharey: Literal["col", "all"] = "col" if len(panels) > 1 else "all"
        unstable = False
        grid = figure.subplots(len(panels), len(panels[0]), sharex=True, sharey=sharey, squeeze=False)
        for row, wanted in zip(grid, panels):
            for axes, (title, curves) in zip(row, wanted):
                shades = colormaps["viridis_r"]
                for i, (label, curve) in enumerate(curves.items()):
                    shade = shades((i + 1) / len(curves))
                    points = {rate: Estimate.of(v) for rate, v in sorted(curve.items()) if all(map(math.isfinite, v))}
                    unstable |= _crosses(axes, [rate for rate in curve if rate not in points], i, len(curves), shade)
                    if points:
                        means, errors = ([getattr(e, field) for e in points.values()] for field in ("mean", "error"))
                        axes.errorbar(list(points), means, errors, color=shade, marker=".", capsize=2, label=label)
                        axes.plot(*best_rate(curve)[:2], marker="o", color=shade, markersize=5)
                _rate_axis(axes, rates)
                axes.set_title(title, loc="left")
                axes.legend(frameon=False, fontsize=7)
            row[0].set_ylabel("validation loss (nats a token)")
        if unstable:
            figure.legend([UNSTABLE_KEY], ["a seed became unstable"], loc="outside lower center", frameon=False)
    return path


def _crosses(axes: Axes, places: Sequence[float], row: int, rows: int, colour: Any) -> bool:
    """Mark the places along the axis at which runs became unstable, by crosses near the upper edge. Each curve has a row of its own.

    Returns whether there are such places.
    """
    heights = [1 - min(0.03, 0.15 / rows) * row] * len(places)
    axes.plot(
        places, heights, transform=axes.get_xaxis_transform(), color=colour, clip_on=False, in_layout=False, **UNSTABLE
    )
    return bool(places)


def _rate_axis(axes: Axes, words: str) -> None:
    """Make the horizontal axis of a finished drawing one of learning rates: logarithmic, with plain numbers that do not overlap."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    subs = (1, 2, 5) if high < 30 * low else (1, 3) if high < 1000 * low else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(words)


def loss_of_trials(rows: Mapping[str, Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]], path: Path) -> Path:
    """Draw the trials of a search: searched setting → title of a panel → label of a curve → pairs of the setting's value and loss.

    Trials of one case may have the same value and differ in other settings; the line joins the best of each. The best of all has a large dot.
    A trial that became unstable is a cross near the upper edge. A panel ends 0.6 above its lowest loss, and worse trials lie outside.
    """
    labels = list(dict.fromkeys(label for panels in rows.values() for curves in panels.values() for label in curves))
    colours = colours_by_label(labels)
    columns = list(dict.fromkeys(title for panels in rows.values() for title in panels))
    with picture(path, max(7.4, 3.4 * len(columns)), 1.0 + 3.2 * len(rows)) as figure:
        grid = figure.subplots(len(rows), len(columns), squeeze=False)
        unstable = False
        for line, (setting, panels) in zip(grid, rows.items()):
            line[0].set_ylabel("validation loss (nats a token)")
            for axes, title in zip(line, columns):
                unstable |= _trials(axes, panels.get(title, {}), colours)
                _rate_axis(axes, "learning rate" if setting == "lr" else setting)
                axes.set_title(title, loc="left")
        handles, names = [Line2D([], [], color=colours[label], linewidth=2) for label in labels], labels
        if unstable:
            handles, names = [*handles, UNSTABLE_KEY], [*names, "unstable"]
        figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)), frameon=False, fontsize=7.5)
    return path


def _trials(axes: Axes, curves: Mapping[str, Sequence[tuple[float, float]]], colours: Mapping[str, Any]) -> bool:
    """A panel of `loss_of_trials`; returns whether a trial became unstable."""
    unstable = False
    every = [loss for trials in curves.values() for _, loss in trials if math.isfinite(loss)]
    for i, (label, trials) in enumerate(curves.items()):
        places = [value for value, loss in trials if not math.isfinite(loss)]
        unstable |= _crosses(axes, places, i, len(curves), colours[label])
        finite = sorted((value, loss) for value, loss in trials if math.isfinite(loss))
        if finite:
            lowest = dict(reversed(finite))  # of equal values, the last one stays, which is that of the lowest loss
            axes.plot(*zip(*finite), linestyle="", marker=".", color=colours[label], alpha=0.6)
            axes.plot(sorted(lowest), [lowest[value] for value in sorted(lowest)], color=colours[label], linewidth=1.2)
            axes.plot(*min(finite, key=lambda pair: pair[1]), marker="o", color=colours[label], markersize=6)
    if every:
        low = min(every)
        axes.set_ylim(low - 0.03, min(max(every), low + 0.6) + 0.03)
    return unstable


def gap_by_tokens(
    gaps: Mapping[str, Mapping[float, Difference]], path: Path, published: Mapping[str, tuple[float, float]]
) -> Path | None:
    """Draw the loss minus that of the baseline over training tokens: label → tokens → paired difference, whose 95% interval is a bar.

    Nothing is drawn without gaps.

    published: label → tokens and gap of a published run, one seed, drawn as a hollow mark of the label's colour. Its tokens may be others.
    The axis of the gaps is linear up to 0.05 and logarithmic beyond. Marks at the same tokens stand side by side.
    """
    if not gaps:
        return None
    with picture(path, 7.2, 4.2) as figure:
        axes = figure.subplots()
        for i, (label, line) in enumerate(gaps.items()):
            colour = ASSIGNMENT_COLOURS.get(label, OTHER_COLOURS[i % len(OTHER_COLOURS)])
            points = sorted(line.items())
            tokens = [n * 1.04 ** (i - len(gaps) / 2) for n, _ in points]
            means, halves = [d.mean for _, d in points], [d.half for _, d in points]
            axes.errorbar(tokens, means, halves, color=colour, marker="o", capsize=3, label=label)
            if label in published:
                axes.plot(*published[label], marker="D", markerfacecolor="none", color=colour, markersize=7)
                axes.annotate(
                    f"{label}, published (GPT-2's tokens)",
                    published[label],
                    xytext=(-6, 8),
                    textcoords="offset points",
                    fontsize=7.5,
                    ha="right",
                )
        axes.axhline(0.0, **DASHES)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=0.05)
        ticks = [-0.05, -0.02, 0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
        low, high = axes.get_ylim()
        axes.set_yticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks], minor=False)
        axes.set_ylim(low, high)
        axes.set_xlabel("training tokens, of the tokenizer of each run")
        axes.set_ylabel("loss minus that of Unconstrained (nats a token)")
        axes.legend(frameon=False)
    return path


SIGNS = [  # record kind, field, title, and whether the axis is logarithmic
    ("probe", "largest_logit", "largest attention logit", True),
    ("probe", "least_entropy", "least entropy of a layer / log(position)", False),
    ("probe", "greatest_saturation", "rows with a probability above .99", False),
    ("eval", "loss", "validation loss (nats per token)", False),
]


def warning_signs(rows: Mapping[str, Sequence[RecordedRun]], path: Path) -> Path:
    """Draw logit, entropy, saturation and loss over steps, a column for each, and a row for each setting in words, such as a learning rate.

    Every assignment has a colour, every seed a thin line. A triangle marks the early warning, a cross the step at which a run became unstable.
    The panels of the loss end 2 above the lowest loss after the first fifth of training; what is higher lies outside.
    """
    examples = {run.assignment: run for runs in rows.values() for run in runs}
    colours = dict(zip(examples, colours_of([[run] for run in examples.values()])))
    with picture(path, 12.0, 0.9 + min(2.35 * len(rows), 10.0)) as figure:  # a page at most
        panels = figure.subplots(len(rows), len(SIGNS), squeeze=False, sharex=True, sharey="col")
        for axes, (_, _, title, _) in zip(panels[0], SIGNS):
            axes.set_title(title, loc="left", fontsize=9)
        for row, (setting, runs) in zip(panels, rows.items()):
            for axes, (kind, field, _, logarithmic) in zip(row, SIGNS):
                for run in runs:
                    _curve(axes, run, kind, field, colours[run.assignment])
                if logarithmic:
                    axes.set_yscale("log")
                    axes.yaxis.set_major_formatter(plain)
            row[0].set_ylabel(setting, fontweight="bold")
        if losses := [x for runs in rows.values() for run in runs for x in _losses(run)]:
            low = min(losses)
            panels[0][-1].set_ylim(low - 0.05, min(max(losses), low + 2.0) + 0.05)
        for axes in panels[0][1:3]:
            axes.set_ylim(-0.03, 1.03)
        for axes in panels[-1]:
            axes.set_xlabel("step")
        handles = [Line2D([], [], color=colour, linewidth=2) for colour in colours.values()]
        handles += [Line2D([], [], color="#555555", **{**UNSTABLE, "marker": m}) for m in "^x"]
        names = [*colours, "early warning", "unstable"]
        figure.legend(handles, names, loc="outside lower center", ncols=len(handles), frameon=False)
    return path


def _losses(run: RecordedRun) -> list[float]:
    """Finite validation losses after the first fifth of training, in which every loss falls so steeply that it hides the rest."""
    steps, losses = run.curve("eval")
    return [x for step, x in zip(steps, losses) if 5 * step > steps[-1] and math.isfinite(x)]


def _curve(axes: Axes, run: RecordedRun, kind: str, field: str, colour: str) -> None:
    records = [r for r in run.records.get(kind, []) if field in r and math.isfinite(r[field])]
    steps, values = [r["step"] for r in records], [r[field] for r in records]
    axes.plot(steps, values, color=colour, linewidth=1.2, alpha=0.8)
    for step, marker in ((run.warned_step, "^"), (run.unstable_step, "x")):
        if step is not None and steps:
            nearest = min(range(len(steps)), key=lambda i: abs(steps[i] - step))
            axes.plot([steps[nearest]], [values[nearest]], color=colour, **{**UNSTABLE, "marker": marker})


PROBE_CURVES = [
    ("largest_logit", "largest logit"),
    ("least_entropy", "least entropy of a layer"),
    ("greatest_saturation", "rows with a probability above .99"),
    ("largest_qk_norm", "largest ‖W_qᵀW_k‖₂ of a head"),
    ("distance_from_mean", "distance from the mean token, by depth"),
    ("mean_cosine", "mean cosine of tokens, by depth"),
    ("effective_rank", "effective rank of tokens, by depth"),
    ("recovery", "R² of a head from the sum, by layer"),
    ("stream.turn_attn", "turn by attention (radians), by layer"),
    ("stream.turn_mlp", "turn by the MLP (radians), by layer"),
]


def probe_curves(run: RecordedRun, path: Path) -> Path:
    """Draw everything that the probes of a run measured over training. A quantity by depth has a line for each depth, dark for the first layer."""
    with picture(path, 15.0, 5.0) as figure:
        for axes, (field, title) in zip(figure.subplots(2, 5, sharex=True).flat, PROBE_CURVES):
            records = [r for r in run.records["probe"] if at(r, field) is not None]  # a run need not have every field
            if not records:
                axes.set_axis_off()
                continue
            steps = [r["step"] for r in records]
            series = [
                [_mean(v) for v in value] if isinstance(value := at(r, field), list) else [value] for r in records
            ]
            depths = len(series[0])
            for depth in range(depths):
                shade = colormaps["viridis"](0.9 * depth / max(1, depths - 1)) if depths > 1 else "#D55E00"
                axes.plot(steps, [values[depth] for values in series], color=shade, linewidth=1.3)
            axes.set_title(title, loc="left", fontsize=9)
            if run.unstable_step is not None:
                axes.axvline(run.unstable_step, **DASHES)
        for axes in figure.axes[5:]:
            axes.set_xlabel("step")
    return path


def collapse_curves(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> Path:
    """Draw how alike tokens become with depth: title of a panel → label → ‖X - 1x̄ᵀ‖/‖X‖ of the embeddings and after each block.

    The axis is -log₁₀ of that on a logarithmic scale. So a straight rising line is doubly exponential decay, and a line that becomes flat
    is exponential decay or none. The dashed line is the rounding of float64, below which nothing is seen.
    """
    with picture(path, 3.4 * len(panels), 3.4) as figure:
        for axes, (title, curves) in zip(
            figure.subplots(1, len(panels), sharey=True, squeeze=False).flat, panels.items()
        ):
            for i, (label, distances) in enumerate(curves.items()):
                digits = [-math.log10(max(x, ROUNDING)) for x in distances]
                axes.plot(range(len(digits)), digits, color=OTHER_COLOURS[i], marker=".", label=label)
            axes.axhline(-math.log10(ROUNDING), **DASHES)
            axes.set_yscale("log")
            axes.set_title(title, loc="left")
            axes.set_xlabel("block")
        figure.axes[0].set_ylabel("digits in which tokens are equal")
        figure.axes[0].legend(frameon=False, fontsize=7)
    return path


def _mean(value: Any) -> float:
    return sum(value) / len(value) if isinstance(value, list) else value


ZERO_LINES = {"angle": ("λ_a (angle)", "#111111"), "gradient": ("λ_g (gradient)", "#7A1FA2")}
WAYS: dict[str, tuple[str, Any]] = {
    "synthetic": ("measured", "solid"),
    "closed": ("our closed form", "dashed"),
    "paper": ("the paper's map", "dotted"),
}


def phase_diagram(planes: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw λ_a and λ_g over planes of initial scales, a row each. Both panels show both zero lines: measured, by our closed form for GPT-2,
    and by the layer map of arXiv 2403.02579, which has no causal mask and a tanh."""
    with picture(path, 9.6, 0.5 + 3.5 * len(planes), grid=False) as figure:
        grid = figure.subplots(len(planes), 2, squeeze=False)
        for row, scan in zip(grid, planes):
            places, sides = (scan["across"], scan["down"]), (scan["plane"]["across"], scan["plane"]["down"])
            for axes, (field, (title, _)) in zip(row, ZERO_LINES.items()):
                measured = scan[f"{field}_synthetic"]
                most = max(abs(v) for line in measured for v in line) or 1.0
                mesh = axes.pcolormesh(*places, measured, cmap="RdBu_r", vmin=-most, vmax=most, shading="nearest")
                figure.colorbar(mesh, ax=axes, shrink=0.85)
                _zero_lines(axes, scan)
                for side, scale, where in zip(sides, (axes.set_xscale, axes.set_yscale), (axes.xaxis, axes.yaxis)):
                    if side["log"]:
                        scale("log")
                        where.set_major_formatter(plain)
                axes.set_xlabel(sides[0]["label"])
                axes.set_title(title, loc="left")
            row[0].set_ylabel(sides[1]["label"])
            fixed = ", ".join(f"{name} {value:g}" for name, value in scan["plane"]["fixed"].items())
            row[1].set_title(f"{fixed}, skip {scan['skip']}", loc="right", fontsize=7.5, color="#555555")
        handles = [Line2D([], [], color=colour) for _, colour in ZERO_LINES.values()]
        handles += [Line2D([], [], color="#555555", linestyle=style) for _, style in WAYS.values()]
        names = ["λ_a = 0", "λ_g = 0", *(name for name, _ in WAYS.values())]
        figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    return path


def _zero_lines(axes: Axes, scan: Mapping[str, Any]) -> None:
    for field, (_, colour) in ZERO_LINES.items():
        for way, (_, style) in WAYS.items():
            values = scan[f"{field}_{way}"]
            known = [v for line in values for v in line if math.isfinite(v)]
            if known and min(known) < 0 < max(known):
                axes.contour(
                    scan["across"], scan["down"], values, [0.0], colors=colour, linestyles=style, linewidths=1.6
                )


KIND_STYLES = {  # how a network differs from GPT-2 under AdamW → marker and colour
    "initial scales": (".", "#999999"),
    "residual rules": ("o", "#0072B2"),
    "assignments": ("D", "#D55E00"),
    "rules and assignments": ("s", "#009E73"),
}


def loss_against_exponents(cells: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the final loss of every trained model over |λ_a| and |λ_g| at its initialisation, and as a colour in the plane of both.

    Markers say how a network differs from GPT-2 under AdamW. A cross is a run that became unstable.
    """
    known = [c["loss"] if c["loss"] is not None else math.inf for c in cells]
    finite = [x for x in known if math.isfinite(x)]
    low, ceiling = min(finite, default=0.0), max(finite, default=1.0) * 1.05
    with picture(path, 12.0, 4.2) as figure:
        panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
        panels[1].sharey(panels[0])
        norm = Normalize(low, ceiling)
        for cell, loss in zip(cells, known):
            marker, colour = KIND_STYLES[cell["kind"]]
            fine = math.isfinite(loss)
            style: dict[str, Any] = {"marker": marker if fine else "x", "markersize": 5, "linestyle": ""}
            for axes, field in zip(panels, ("angle", "gradient")):
                axes.plot([abs(cell[field])], [loss if fine else ceiling], color=colour, **style)
            shade = colormaps["viridis"](norm(min(loss, ceiling)))
            panels[2].plot([cell["angle"]], [cell["gradient"]], color=shade, **style)
        for axes, name in zip(panels, ("|λ_a|", "|λ_g|")):
            axes.set_xscale("symlog", linthresh=0.01)
            axes.set_xlabel(name)
        panels[0].set_ylabel("final validation loss (nats a token)")
        for set_scale, draw in ((panels[2].set_xscale, panels[2].axvline), (panels[2].set_yscale, panels[2].axhline)):
            set_scale("symlog", linthresh=0.1)
            draw(0.0, **DASHES)
        panels[2].set_xlabel("λ_a")
        panels[2].set_ylabel("λ_g")
        figure.colorbar(ScalarMappable(norm, "viridis"), ax=panels[2], label="final validation loss")
        shown = {kind: style for kind, style in KIND_STYLES.items() if any(c["kind"] == kind for c in cells)}
        handles = [Line2D([], [], marker=m, color=colour, linestyle="") for m, colour in shown.values()]
        names = list(shown)
        if not all(map(math.isfinite, known)):
            handles, names = [*handles, UNSTABLE_KEY], [*names, "unstable"]
        figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    return path
