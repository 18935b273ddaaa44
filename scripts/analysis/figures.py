"""The pictures of the table: validation loss of every run, and singular values and learned scales, over training and by layer.

They are drawn without pyplot, so no global state changes and no display is needed. The colours are close to those of Okabe and Ito, which
people with any colour vision can distinguish (https://jfly.uni-koeln.de/color/). Some are darker or lighter, so that each line has a
contrast of 3:1 at least on white and on the dark page, as WCAG 2.2 asks of graphics (criterion 1.4.11).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from scripts.analysis.runs import SUBLAYERS, RecordedRun
from scripts.analysis.tables import Groups, about, settings_columns
from scripts.analysis.thin import band, evenly, learned_scales, singular_values

ASSIGNMENT_COLOURS = {
    "Unconstrained": "#767676",
    "All-Stiefel": "#0072B2",
    "All-DGram": "#B98000",
    "Hetero": "#009E73",
    "Hetero-Inv": "#D55E00",
}
OTHER_COLOURS = ("#C266A0", "#3B95CC", "#8C6BB1", "#5E8C31", "#8A7A5C")
LARGEST, SMALLEST = "#D55E00", "#0072B2"  # singular values
UNSTABLE: dict[str, Any] = {"marker": "x", "linestyle": "", "markersize": 6, "markeredgewidth": 1.8}
"""The cross of an unstable run."""
UNSTABLE_KEY = Line2D([], [], color="#555555", **UNSTABLE)
"""The same in a legend."""
LINE_STYLES = ("solid", "dashed", "dotted")
DASHES: dict[str, Any] = {"color": "#888888", "linewidth": 0.9, "linestyle": (0, (3, 2))}

DPI = 130
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.solid_capstyle": "round",
}


def draw(groups: Groups, directory: Path) -> list[Path]:
    """Write val_loss.png, spectra.png, layers.png and scales.png into a directory, each if a run has records for it; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    if any(r.records.get("eval") for group in groups for r in group):
        drawn.append(draw_losses(groups, directory / "val_loss.png"))
    if any(r.records.get("spectra") for group in groups for r in group):
        drawn.append(draw_spectra(groups, directory / "spectra.png"))
        drawn.append(draw_layers(groups, directory / "layers.png"))
    if path := draw_scales(list(zip(labels_of(groups), groups)), directory / "scales.png"):
        drawn.append(path)
    for path in drawn:
        sign(path, [r for group in groups for r in group])
    return drawn


def draw_losses(groups: Groups, path: Path) -> Path:
    """Draw validation loss over steps: all of training on the left, its second half with the names of the curves on the right.

    Of a group with several seeds, the mean stands in a band from the lowest to the highest seed. A cross marks the step at which a run
    became unstable.
    """
    with picture(path, 9.2, 3.9) as figure:
        whole, end = figure.subplots(1, 2, width_ratios=(1, 1.15))
        colours = colours_of(groups)
        for i, (group, colour) in enumerate(zip(groups, colours)):
            for axes in (whole, end):
                _loss_curves(axes, group, colour, dash_of(i))
        last = max(run.step for group in groups for run in group) or 1
        finals = [run.final for group in groups for run in group if run.final is not None and math.isfinite(run.final)]
        for axes, first in ((whole, 0), (end, last // 2)):
            axes.set_xlim(first, last)
            axes.set_ylim(*loss_limits(groups, first))
            axes.set_xlabel("step")
        whole.set_ylabel("validation loss (nats per token)")
        if any(run.unstable_step is not None for group in groups for run in group):
            place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.02, 0.98), "handletextpad": 0.2}
            whole.legend([UNSTABLE_KEY], ["becomes unstable"], frameon=False, **place)
        whole.set_title("all of training", loc="left")
        end.set_title("second half", loc="left")
        if finals:
            _name_curves(end, groups, colours, last)
    return path


def draw_spectra(groups: Groups, path: Path) -> Path:
    """Draw the largest and the smallest singular value of every matrix over steps: a column for each group's first run, a row for each sublayer."""
    runs = [first_with(group, "spectra") or group[0] for group in groups]
    with picture(path, max(4.5, 0.8 + 1.75 * len(runs)), 4.4) as figure:
        panels = figure.subplots(len(SUBLAYERS), len(runs), sharex=True, sharey="row", squeeze=False)
        for row, sublayer in zip(panels, SUBLAYERS):
            for axes, run in zip(row, runs):
                _spectrum(axes, run, sublayer)
            _log_scale(row[0], [r for run in runs for records in run.spectra(sublayer).values() for r in records])
            row[0].set_ylabel(f"{_words(sublayer)}\nsingular values")
        for top, bottom, label in zip(panels[0], panels[-1], labels_of(groups)):
            top.set_title(label, loc="left", fontweight="bold", fontsize=9.5, pad=16)
            bottom.set_xlabel("step")
            bottom.set_xlim(0, max(r.step for r in runs) or 1)
        handles = [Line2D([], [], color=c, linewidth=1.6) for c in (LARGEST, SMALLEST)]
        names = ["largest singular value of each matrix", "smallest"]
        if any(run.unstable_step is not None for run in runs):
            handles, names = [*handles, Line2D([], [], **DASHES)], [*names, "becomes unstable"]
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return path


def draw_layers(groups: Groups, path: Path) -> Path:
    """Draw the largest singular value over steps and layers: a column for each group's first run, a row for each kind of matrix."""
    maps = [singular_values(first_with(group, "spectra") or group[0]) for group in groups]
    kinds = list(dict.fromkeys(kind for found in maps for kind in found))
    every = [v for found in maps for kind in found.values() for row in kind["sigma_max"] for v in row if v is not None]
    norm = LogNorm(max(min(every), 1e-3 * max(every)), max(every) * 1.001) if max(every, default=0) > 0 else None
    with picture(path, max(4.5, 1.6 + 1.75 * len(groups)), 0.9 + 1.05 * len(kinds), grid=False) as figure:
        panels = figure.subplots(len(kinds), len(groups), sharex=True, squeeze=False)
        for row, kind in zip(panels, kinds):
            for axes, found in zip(row, maps):
                if kind not in found:
                    axes.set_axis_off()
                    continue
                layers, steps = found[kind]["layers"], found[kind]["steps"]
                values = [[math.nan if v is None else v for v in line] for line in found[kind]["sigma_max"]]
                places = steps, range(len(layers))
                mesh = axes.pcolormesh(*places, values, norm=norm, cmap="viridis", shading="nearest")
                shown = evenly(range(len(layers)), 4)
                axes.set_yticks(shown, [str(layers[i]) for i in shown])
                axes.invert_yaxis()
            row[0].set_ylabel(f"{kind}\nlayer")
        for top, bottom, label in zip(panels[0], panels[-1], labels_of(groups)):
            top.set_title(label, loc="left", fontweight="bold", fontsize=9.5)
            bottom.set_xlabel("step")
        bar = figure.colorbar(mesh, ax=panels, label="largest singular value", format=FuncFormatter(plain), aspect=40)
        bar.ax.yaxis.set_minor_formatter(NullFormatter() if max(every) > 20 * min(every) else plain)
    return path


def draw_scales(groups: Sequence[tuple[str, Sequence[RecordedRun]]], path: Path) -> Path | None:
    """Draw the learned scales over steps: a row for each scale, a column with a title for the first run of each group.

    A line is the mean of a layer, dark for the first layer; its band is a standard deviation of the entries to each side. None, and no
    picture, if no run has records of scales.
    """
    recorded = [(title, first_with(group, "scales")) for title, group in groups]
    found = [(title, learned_scales(run)) for title, run in recorded if run is not None]
    names = list(dict.fromkeys(name for _, scales in found for name in scales))
    if not names:
        return None
    with picture(path, max(4.5, 0.8 + 2.3 * len(found)), 0.8 + 1.35 * len(names)) as figure:
        panels = figure.subplots(len(names), len(found), sharex=True, sharey="row", squeeze=False)
        for row, name in zip(panels, names):
            for axes, (_, scales) in zip(row, found):
                if name not in scales:
                    axes.set_axis_off()
                    continue
                steps, layers = scales[name]["steps"], len(scales[name]["mean"][-1])
                for layer in range(layers):
                    shade = colormaps["viridis"](0.85 * layer / max(1, layers - 1))
                    mean, spread = (
                        np.array([line[layer] for line in scales[name][key]]) for key in ("mean", "deviation")
                    )
                    axes.fill_between(steps, mean - spread, mean + spread, color=shade, alpha=0.15, linewidth=0)
                    axes.plot(steps, mean, color=shade, linewidth=1.4)
            row[0].set_ylabel(name)
        for (title, _), top, bottom in zip(found, panels[0], panels[-1]):
            top.set_title(title, loc="left", fontweight="bold", fontsize=9.5)
            bottom.set_xlabel("step")
    return path


def sign(path: Path, runs: Sequence[RecordedRun]) -> None:
    """Write model, steps and data of the runs below a picture. Without runs, the picture stays as it is."""
    image = Image.open(path).convert("RGB")
    lines = textwrap.wrap(
        about(runs), max(20, (image.width - 12) // 7)
    )  # a letter is less than 7 pixels wide; a margin on each side
    if not lines:
        return
    strip = Figure(figsize=(image.width / DPI, 0.06 + 0.15 * len(lines)), dpi=DPI)
    strip.text(0.05 / strip.get_figwidth(), 1, "\n".join(lines), fontsize=7.5, color="#59626d", va="top")
    drawn = BytesIO()
    strip.savefig(drawn, format="png")
    words = Image.open(drawn).convert("RGB")
    whole = Image.new("RGB", (image.width, image.height + words.height), "white")
    whole.paste(image)
    whole.paste(words, (0, image.height))
    _save(whole, path)


# ---- pieces ----


def first_with(group: Sequence[RecordedRun], kind: str) -> RecordedRun | None:
    """The first run of a group that has records of a kind; None if none has."""
    return next((r for r in group if r.records.get(kind)), None)


def _loss_curves(axes: Axes, group: Sequence[RecordedRun], colour: str, dash: str) -> None:
    curves = [r.curve("eval") for r in group]
    if len(group) > 1:
        shared, mean, low, high = band(curves)
        axes.fill_between(shared, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(shared, mean, color=colour, linestyle=dash, linewidth=1.6, alpha=0.9)
    for run, (steps, losses) in zip(group, curves):
        thick, alpha = (1.6, 0.9) if len(group) == 1 else (0.5, 0.6)
        axes.plot(steps, losses, color=colour, linestyle=dash, linewidth=thick, alpha=alpha)
        if (
            run.unstable_step is not None
            and run.unstable_step in steps
            and math.isfinite(at := losses[steps.index(run.unstable_step)])
        ):
            axes.plot([run.unstable_step], [at], color=colour, **UNSTABLE)


def loss_limits(groups: Groups, first: int) -> tuple[float, float]:
    """The limits of the loss axis: from just below the best loss to the highest loss of a stable run from step `first` on."""
    shown, stable = [], []
    for group in groups:
        for run in group:
            points = [x for step, x in zip(*run.curve("eval")) if step >= first and math.isfinite(x)]
            shown += points
            stable += points if run.unstable_step is None else []
    if not shown:
        return 0.0, 1.0
    low, high = min(shown), max(stable or shown)
    high = max(high, min(max(shown), high + 0.5 * (high - low)))  # space for the rise of an unstable run
    margin = 0.04 * (high - low) or 0.1
    return low - margin, high + margin


def _name_curves(axes: Axes, groups: Groups, colours: Sequence[str], last: int) -> None:
    """Write the name and final loss of each group beside the end of its curve, moved apart if they would overlap.

    The loss is the mean of the finite ones; where some runs have none, the text says of how many.
    """
    low, high = axes.get_ylim()
    places = []
    for group, label, colour in zip(groups, labels_of(groups), colours):
        finals = [r.final for r in group if r.final is not None and math.isfinite(r.final)]
        if finals:
            mean = sum(finals) / len(finals)
            count = "" if len(finals) == len(group) else f" ({len(finals)} of {len(group)})"
            above = " ↑" if mean > high else ""  # the end of the curve lies above the picture
            places.append((min(mean, high), f"{label}  {mean:.3f}{count}{above}", colour))
    places.sort(key=lambda place: place[0])
    gap = 0.062 * (high - low)  # a line of text
    heights = _spread([height for height, _, _ in places], gap)
    for height, (end, text, colour) in zip(heights, places):
        axes.annotate(
            text,
            xy=(last, end),
            xytext=(1.05, (height - low) / (high - low)),
            textcoords="axes fraction",
            color=text_colour(colour),
            va="center",
            fontweight="bold",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 1},
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights so that they lie at least `gap` apart. Heights that are too close form a cluster around their mean."""
    clusters: list[list[float]] = []
    for height in heights:
        clusters.append([height])
        while len(clusters) > 1 and _bottom(clusters[-1], gap) - _top(clusters[-2], gap) < gap:
            upper = clusters.pop()
            clusters[-1] += upper
    return [_bottom(cluster, gap) + i * gap for cluster in clusters for i in range(len(cluster))]


def _bottom(cluster: Sequence[float], gap: float) -> float:
    return sum(cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def _top(cluster: Sequence[float], gap: float) -> float:
    return sum(cluster) / len(cluster) + gap * (len(cluster) - 1) / 2


def _spectrum(axes: Axes, run: RecordedRun, sublayer: str) -> None:
    """Draw one panel: two thin lines for each matrix, and the manifold's name."""
    matrices = run.spectra(sublayer)
    style: dict[str, Any] = {"linewidth": 1.1 if len(matrices) <= 8 else 0.7, "alpha": 0.75}
    for records in matrices.values():
        steps = [r["step"] for r in records]
        axes.plot(steps, [r["sigma_max"] for r in records], color=LARGEST, **style)
        axes.plot(steps, [r["sigma_min"] for r in records], color=SMALLEST, **style)
    if run.unstable_step is not None:
        axes.axvline(run.unstable_step, **DASHES)
    manifold = run.geometry(sublayer)
    text = f"{_words(sublayer)}: {'no manifold' if manifold == '-' else manifold}"
    axes.text(0, 1.03, text, transform=axes.transAxes, fontsize=8, color="#555555")


def _log_scale(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    """Set a logarithmic scale for a row of panels. It is cut at the bottom, because a smallest singular value may be zero."""
    values = [r[key] for r in records for key in ("sigma_max", "sigma_min") if math.isfinite(r[key])]
    high = max(values, default=1.0)
    low = max(min(values, default=0.1), 1e-3 * high)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.3, high * 1.3)
    few = high / low < 30
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(NullFormatter())


def plain(value: float, _: object) -> str:
    """The number at a tick of an axis, written as shortly as possible: 0.5, 20."""
    return f"{value:g}"


def _words(sublayer: str) -> str:
    return {"mlp": "MLP"}.get(sublayer, sublayer)


def contrast(a: str, b: str) -> float:
    """The contrast of two colours such as "#0072B2", from 1 to 21 (WCAG 2.2, "contrast ratio")."""

    def luminance(colour: str) -> float:
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def text_colour(colour: str) -> str:
    """The colour, darkened until a text of it has a contrast of 4.5:1 on white, as WCAG 2.2 asks (criterion 1.4.3)."""
    while contrast(colour, "#ffffff") < 4.5:
        colour = "#" + "".join(f"{int(colour[i : i + 2], 16) * 24 // 25:02x}" for i in (1, 3, 5))
    return colour


def colours_of(groups: Groups) -> list[str]:
    """A colour for each group: that of its assignment if no group before has it, else the next of OTHER_COLOURS."""
    free, used = list(OTHER_COLOURS), set()
    chosen = []
    for group in groups:
        colour = ASSIGNMENT_COLOURS.get(group[0].assignment)
        if colour is None or colour in used:
            colour = free[0]
            free = [*free[1:], free[0]]
        used.add(colour)
        chosen.append(colour)
    return chosen


def colours_by_label(labels: Sequence[str]) -> dict[str, Any]:
    """A colour for each of up to forty labels; from the twenty-first on, colours come again."""
    return dict(zip(labels, colormaps["tab20"].colors * 2))  # type: ignore[attr-defined]


def dash_of(index: int) -> str:
    """The line style of a group by its place: five groups in a row have different colours, the next five another style."""
    return LINE_STYLES[index // len(OTHER_COLOURS) % len(LINE_STYLES)]


def labels_of(groups: Groups) -> list[str]:
    """A label of its own for each group: its assignment, and the first two settings in which the groups differ.

    Groups that would have the same label are numbered.
    """
    columns, choice = settings_columns(groups), ("rule", "kind", "name")
    labels = []
    for group in groups:
        values = [(column.heading.split("."), column.value(group[0])) for column in columns]
        settings = [f"{key[-2 if key[-1] in choice else -1]} {value}" for key, value in values if value]
        labels.append(", ".join([group[0].assignment, *settings[:2]]))
    alike = [labels[: i + 1].count(label) for i, label in enumerate(labels)]
    return [f"{label} ({number})" if labels.count(label) > 1 else label for label, number in zip(labels, alike)]


@contextmanager
def picture(path: Path, width: float, height: float, grid: bool = True) -> Iterator[Figure]:
    """An empty figure of that size in inches, in the style of all pictures, without pyplot; written to `path` as PNG at the end.

    The PNG has at most 255 colours, which makes it a third as large. It holds no date or version, so equal pictures are equal files.
    """
    style: Any = {**STYLE, "axes.grid": grid}  # matplotlib's own type lists every key
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        yield figure
        full = BytesIO()
        figure.savefig(full, format="png")
    _save(Image.open(full).convert("RGB"), path)


def _save(image: Image.Image, path: Path) -> None:
    few = image.quantize(255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
