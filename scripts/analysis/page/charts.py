"""The interactive charts, made by Bokeh. Each is a document of its own, so the page draws it when it comes into view.

Bokeh was chosen because its Python package brings its JavaScript: about 1.3 MB for a page that works offline, against 4.7 MB of Plotly.
The page's own script (page.js) fills the charts of one run, hides a setting in all charts, and gives them the colours of light or dark.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.embed import json_item
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    CustomJSTicker,
    CustomJSTickFormatter,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    PanTool,
    Range1d,
    ResetTool,
    SaveTool,
    WheelZoomTool,
)
from bokeh.models.annotations import ColorBar
from bokeh.palettes import Viridis256
from bokeh.plotting import figure
from bokeh.resources import Resources

from scripts.analysis.figures import dash_of

HEIGHT = 300  # pixels
_FONT = "system-ui, sans-serif"
_TICKS = """
const {start, end} = cb_data.range;
const decades = Math.log10(end / start), found = [];
if (decades < 0.6) {
  const raw = (end - start) / 5, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= raw);
  for (let v = Math.ceil(start / step) * step; v <= end; v += step) found.push(v);
} else {
  const every = Math.ceil(decades / 7);
  for (let k = Math.floor(Math.log10(start)); k <= Math.log10(end); k++)
    for (const m of decades < 2.2 ? [1, 2, 5] : [1])
      if (k % every === 0 && m * 10 ** k >= start && m * 10 ** k <= end) found.push(m * 10 ** k);
}
return found;
"""
"""Ticks of a logarithmic axis. Bokeh's own leaves most of a range below two decades without a label."""
_NUMBER = """
const size = Math.abs(tick);
return size !== 0 && (size < 1e-3 || size >= 1e6) ? String(Number(tick.toPrecision(3)).toExponential()) : Number(tick.toPrecision(6)).toLocaleString("en", {maximumFractionDigits: 6});
"""


@dataclass(frozen=True)
class Line:
    """A curve of the setting with this index: steps and values (n,); low and high (n,) of the band over seeds, if there are several."""

    index: int
    label: str
    colour: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    mark: tuple[float, float] | None = None


def javascript() -> str:
    """The script tags with the library, without its widgets."""
    return Resources(mode="inline", components=["bokeh"]).render_js()


def lines(
    curves: Sequence[Line],
    unit: str,
    logarithmic: bool = False,
    x_limits: tuple[float, float] | None = None,
    y_limits: tuple[float, float] | None = None,
) -> str:
    """A chart of curves over steps, as JSON. A cross marks the step at which a run became unstable."""
    chart = _empty("step", unit, logarithmic, x_limits, y_limits)
    drawn = []
    for curve in curves:
        style = {"line_color": curve.colour, "tags": [f"setting-{curve.index}"]}
        if curve.low is not None:
            chart.varea(
                x=curve.x, y1=curve.low, y2=curve.high, fill_color=curve.colour, fill_alpha=0.18, tags=style["tags"]
            )
        dash = dash_of(curve.index)
        drawn.append(chart.line(curve.x, curve.y, name=curve.label, line_width=2, line_dash=dash, **style))
        if len(curve.x) == 1:
            drawn.append(chart.scatter(curve.x, curve.y, name=curve.label, size=7, fill_color=curve.colour, **style))
        if curve.mark is not None:
            chart.scatter(*([v] for v in curve.mark), marker="x", size=12, line_width=3, **style)
    _hover(chart, drawn, "<b>$name</b><br>step @x{0,0}: @y{0.0000a}")
    return _json(chart)


def shapes(labels: Sequence[tuple[str, str]]) -> str:
    """The chart of whole spectra, as JSON: a line for each (label, colour), which page.js fills with shares of the rank and values."""
    chart = _empty("share of the rank", "singular value", True, (0, 1), None)
    drawn = []
    for index, (label, colour) in enumerate(labels):
        source = ColumnDataSource({"x": [], "y": []}, name=f"shape-{index}")
        dash = dash_of(index)
        style: dict[str, Any] = {"line_color": colour, "line_width": 2, "line_dash": dash}
        drawn.append(chart.line("x", "y", source=source, name=label, tags=[f"setting-{index}"], **style))
    chart.xaxis.formatter = NumeralTickFormatter(format="0%")
    _hover(chart, drawn, "<b>$name</b><br>@x{0%} of the rank: @y{0.0000a}")
    return _json(chart)


def heat(tooltip: str, height: int = HEIGHT) -> str:
    """An empty heat map over steps and layers, as JSON, which page.js fills with cells (left, right, bottom, top, value, row)."""
    chart = _empty("step", "layer", False, None, None, height)
    source = ColumnDataSource({key: [] for key in ("left", "right", "bottom", "top", "value", "row")}, name="cells")
    mapper = LinearColorMapper(palette=list(Viridis256), low=0, high=1, nan_color="rgba(0,0,0,0)", name="mapper")
    cells = chart.quad(
        "left",
        "right",
        "top",
        "bottom",
        source=source,
        fill_color={"field": "value", "transform": mapper},
        line_color={"field": "value", "transform": mapper},  # no seams between cells
    )
    chart.x_range, chart.y_range = Range1d(start=0, end=1, name="across"), Range1d(start=1, end=0, name="down")
    chart.yaxis.ticker = FixedTicker(ticks=[], name="rows")
    chart.grid.visible = False
    bar = ColorBar(color_mapper=mapper, width=10, padding=4, major_label_text_font=_FONT, background_fill_alpha=0)
    chart.add_layout(bar, "right")
    _hover(chart, [cells], tooltip)
    return _json(chart)


def _empty(
    across: str,
    unit: str,
    logarithmic: bool,
    x_limits: tuple[float, float] | None,
    y_limits: tuple[float, float] | None,
    height: int = HEIGHT,
) -> Any:
    """A chart without content, in the style of all: no fixed colour, since page.js gives those of light or dark."""
    limits: dict[str, Any] = {
        key: Range1d(start=v[0], end=v[1]) for key, v in (("x_range", x_limits), ("y_range", y_limits)) if v is not None
    }
    zoom = BoxZoomTool()
    chart: Any = figure(
        height=height,
        sizing_mode="stretch_width",
        y_axis_type="log" if logarithmic else "linear",
        tools=[zoom, PanTool(), WheelZoomTool(), ResetTool(), SaveTool()],
        active_drag=zoom,
        toolbar_location="above",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        **limits,
    )
    chart.toolbar.logo = None
    chart.toolbar.autohide = False
    chart.xaxis.axis_label, chart.yaxis.axis_label = across, unit
    if across == "step":
        chart.xaxis.formatter = NumeralTickFormatter(format="0,0")
    chart.yaxis.formatter = CustomJSTickFormatter(code=_NUMBER)
    if logarithmic:
        chart.yaxis.ticker = chart.ygrid.ticker = CustomJSTicker(major_code=_TICKS)
    chart.xaxis.ticker.desired_num_ticks = 5
    for axis in (*chart.xaxis, *chart.yaxis):
        axis.axis_label_text_font = axis.major_label_text_font = _FONT
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.minor_tick_line_color = None
    return chart


def _hover(chart: Any, renderers: Sequence[Any], tooltip: str) -> None:
    text = f"<div style='font: 13px {_FONT}; color: #222'>{tooltip}</div>"
    chart.add_tools(HoverTool(renderers=list(renderers), tooltips=text))


def _json(chart: Any) -> str:
    return json.dumps(json_item(chart))
