"""Everything of the page put together: the data of its charts and tables, in the template page.html."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from scripts.analysis import thin
from scripts.analysis.figures import colours_of, dash_of, labels_of, loss_limits
from scripts.analysis.page import charts
from scripts.analysis.page.charts import Line
from scripts.analysis.page.details import costs, geometries, machines, settings_table
from scripts.analysis.page.verdict import Setting, verdict
from scripts.analysis.runs import RecordedRun
from scripts.analysis.tables import Column, Groups, about, make_table, report_columns

HERE = Path(__file__).parent

Curve = Callable[[RecordedRun], tuple[Sequence[float], Sequence[float]]]


def make(groups: Groups, name: str, command: str, reload_s: float = 0) -> str:
    """The page of some groups of runs, as one HTML document that needs nothing else.

    name: of the sweep, for the title. command: what wrote the page. reload_s: how often the page asks the server whether there is something
    new; 0 for a page without a server.
    """
    settings = named(groups)
    runs = [r for s in settings for r in s.runs]
    names = {r.directory: s.label for s in settings for r in s.runs}
    first = Column("setting", "setting", lambda r: names[r.directory])
    columns = [c for c in report_columns(groups)[1:] if c.key != "steps"]
    found = {key: chart for key, chart in _curves(settings, groups).items() if chart}
    stores = {f"run-{i}": _store(r) for i, r in enumerate(runs)}
    found |= _maps(settings, stores)
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters["json"] = _script
    return environment.get_template("page.html").render(
        title=name,
        about=about(runs),
        written=f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        command=command,
        reload_s=reload_s,
        library=Markup(charts.javascript()),
        style=Markup((HERE / "page.css").read_text()),
        script=Markup((HERE / "page.js").read_text()),
        settings=settings,
        dashes=[dash_of(i) for i in range(len(settings))],
        states=_states(runs),
        verdict=verdict(settings),
        loss_table=make_table(groups, [first, *columns]),
        charts=found,
        scales=[key for key in found if key.startswith("scale-")],
        texts=TEXTS if any(r.unstable_step is not None for r in runs) else {**TEXTS, "val_loss": _STABLE},
        stores=stores,
        runs=_run_names(settings),
        cost_table=costs(settings),
        geometries=geometries(settings),
        settings_table=settings_table(settings),
        machines=machines(settings),
    )


def named(groups: Groups) -> list[Setting]:
    """The groups with names of their own and colours."""
    return [Setting(*parts) for parts in zip(labels_of(groups), colours_of(groups), groups)]


TEXTS = {
    "val_loss": ("Validation loss, all of training", "A cross marks the step at which a run became unstable."),
    "val_loss_end": ("Validation loss, second half", "The same curves, with limits that show their distances."),
    "train_loss": ("Training loss", "Smoothed if there are many points."),
    "grad_norm": ("Gradient norm", "Of all parameters, before clipping. If there are many points, the peaks."),
    "logit": ("Largest attention logit", "Of all layers and heads, on a fixed batch."),
    "entropy": (
        "Least entropy of a layer's attention",
        "Relative to log(position): 1 is uniform, 0 looks at one token.",
    ),
    "saturation": ("Most saturated layer", "Share of attention rows with a probability above .99."),
    "feas": (
        "Quality of the steps",
        "Mean over matrices of the certified share of the optimum of the step problem; 1 is best.",
    ),
    "distance": ("Distance from the manifold", "The largest of all matrices. Matrices without a manifold have none."),
    "average": ("Validation loss of the average of the weights", "It is measured beside the loss of the weights."),
    "update": ("Size of the steps", "The largest of all parameters, each in its own norm."),
    "change": ("Change of the features by a step", "The largest of all parameters and tokens, each in its own norm."),
    "speed": ("Speed", "Smoothed if there are many points."),
    "shape": (
        "Whole spectra",
        "One matrix at one step, of the first seed of every setting, from the largest singular value to the smallest.",
    ),
}
"""Chart → its title and what a reader must know of it."""
_STABLE = ("Validation loss, all of training", "")


def _curves(settings: Sequence[Setting], groups: Groups) -> dict[str, str]:
    """The charts of curves, as JSON; empty for those without a record."""
    last = max((r.step for s in settings for r in s.runs), default=0) or 1
    curve = partial(_chart, settings)

    def losses(first: int) -> dict[str, Any]:
        return {"x_limits": (first, last), "y_limits": loss_limits(groups, first)}

    def field(kind: str, key: str, reduce: Any = max) -> Curve:
        return lambda r: thin.per_step(r.records.get(kind, []), key, reduce)

    nats = "nats a token"
    return {
        "val_loss": curve(lambda r: r.curve("eval"), nats, marked=True, **losses(0)),
        "val_loss_end": curve(lambda r: r.curve("eval"), nats, marked=True, **losses(last // 2)),
        "train_loss": curve(lambda r: r.curve("train"), nats, stretch=np.nanmean),
        "grad_norm": curve(field("train", "grad_norm"), "norm", logarithmic=True, stretch=np.nanmax),
        "logit": curve(field("probe", "largest_logit"), "logit", logarithmic=True),
        "entropy": curve(field("probe", "least_entropy"), "entropy", y_limits=(-0.02, 1.02)),
        "saturation": curve(field("probe", "greatest_saturation"), "share of rows", y_limits=(-0.02, 1.02)),
        "feas": curve(field("certificate", "feas", statistics.fmean), "share of the optimum"),
        "distance": curve(field("spectra", "distance"), "distance", logarithmic=True),
        "average": curve(field("eval", "average_loss"), nats),
        "update": curve(field("update", "size"), "size", logarithmic=True),
        "change": curve(field("update", "change_max"), "size", logarithmic=True),
        "speed": curve(field("train", "tokens_per_s"), "tokens a second", stretch=np.nanmean),
        **{f"scale-{name}": curve(partial(_mean_scale, name), "value") for name in _scale_names(settings)},
    }


def _scale_names(settings: Sequence[Setting]) -> list[str]:
    """The names of all learned scales of which a run has records."""
    return list(
        dict.fromkeys(record["name"] for s in settings for r in s.runs for record in r.records.get("scales", []))
    )


def _mean_scale(name: str, run: RecordedRun) -> tuple[list[int], list[float]]:
    """The mean of a learned scale over its entries and layers, at every step that has it."""
    scale = thin.learned_scales(run).get(name, {"steps": [], "mean": []})
    return scale["steps"], [statistics.fmean(layers) for layers in scale["mean"]]


def _chart(
    settings: Sequence[Setting],
    values: Curve,
    unit: str,
    logarithmic: bool = False,
    marked: bool = False,
    stretch: Callable[[np.ndarray], float] | None = None,
    **limits: Any,
) -> str:
    """A chart with a line for each setting: the mean of its seeds, between the lowest and the highest.

    stretch: of a long curve that scatters, what is taken of the values of a stretch.
    """
    drawn = []
    for index, s in enumerate(settings):
        curves = [pair for r in s.runs if len((pair := values(r))[0])]
        if stretch is not None:
            curves = [thin.stretches(*pair, stretch) for pair in thin.shared(curves)]
        if not curves:
            continue
        x, mean, low, high = thin.band(curves)
        if logarithmic:
            mean, low, high = (np.where(v > 0, v, np.nan) for v in (mean, low, high))
        if not np.isfinite(mean).any():
            continue
        steps, y = thin.thin(x, mean)
        # The extremes of a band stand at other steps than those of the mean; all three are read at the steps of the mean.
        edges = [np.interp(steps, *thin.thin(x, v)) if len(curves) > 1 else None for v in (low, high)]
        cross = _unstable(s, x, mean) if marked else None
        drawn.append(Line(index, s.label, s.colour, steps, y, edges[0], edges[1], cross))
    return charts.lines(drawn, unit, logarithmic, **limits) if drawn else ""


def _unstable(s: Setting, x: np.ndarray, y: np.ndarray) -> tuple[float, float] | None:
    """The place on the curve nearest to the first instability of a setting; None if there was none."""
    steps = [r.unstable_step for r in s.runs if r.unstable_step is not None]
    finite = np.flatnonzero(np.isfinite(y))
    if not steps or not len(finite):
        return None
    at = finite[np.abs(x[finite] - min(steps)).argmin()]
    return float(x[at]), float(y[at])


def _store(run: RecordedRun) -> dict[str, Any]:
    """What page.js needs of one run to fill the charts that show a single run."""
    return {"sigma": thin.singular_values(run), "heads": thin.heads(run)}


def _maps(settings: Sequence[Setting], stores: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The charts that page.js fills: a heat map for each kind of matrix, whole spectra, and a heat map for each quantity of a head."""
    kinds = dict.fromkeys(kind for store in stores.values() for kind in store["sigma"])
    found = {f"heat-{kind}": charts.heat("layer @row<br>step @left{0,0}: @value{0.0000a}", 210) for kind in kinds}
    if kinds:
        found["shape"] = charts.shapes([(s.label, s.colour) for s in settings])
    if any(store["heads"] for store in stores.values()):
        tooltip = "layer, head @row<br>step @left{0,0}: @value{0.0000a}"
        found |= {f"heads-{key}": charts.heat(tooltip) for key in thin.HEADS}
    return found


def _run_names(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Every run with its name, the index of its setting, and whether it is the first of it."""
    found = []
    for index, s in enumerate(settings):
        for i, r in enumerate(s.runs):
            found.append({"name": s.name_of(r), "setting": index, "first": i == 0})
    return found


def _states(runs: Sequence[RecordedRun]) -> str:
    """How many runs are finished, unstable and so on."""
    words = [r.status.split(" ")[0].replace("ok", "finished") for r in runs]
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))


def _script(value: Any) -> Markup:
    """JSON that can stand in a script element: `<` is written as an escape, so no text of a run can end the element."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))
