"""The picture of an iteration for the matrix sign: its composed map on all of (0, 1], and how near to 1 it stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from optim.iterators import Quintic, band, composed, slope_at_zero
from scripts.analysis.figures import DASHES, LARGEST, SMALLEST, picture


def draw_iterator(coefficients: Sequence[Quintic], lower: float, upper: float, title: str, path: Path) -> Path:
    """Draw the composed map: from far below `lower` on logarithmic scales, and on [0, upper] after every step; returns the path.

    The band of [lower, upper] is shaded; a dashed line has the slope at 0.
    """
    low, high = band(coefficients, lower, upper)
    slope = slope_at_zero(coefficients)
    with picture(path, 9.2, 3.9) as figure:
        whole, steps = figure.subplots(1, 2)
        x = np.geomspace(lower / 30, upper, 4000)
        values = composed(coefficients, x)
        whole.loglog(x, values, color=SMALLEST, linewidth=1.6)
        below = x[slope * x <= 1]
        whole.loglog(
            below, slope * below, label=f"slope at 0: {slope:.4g}", **{**DASHES, "color": LARGEST, "zorder": 3}
        )
        whole.axvline(lower, **DASHES)
        whole.set_ylim(min(values.min(), low) / 1.5, max(high, 1.0) * 1.8)
        whole.set_title("the whole iteration", loc="left")
        whole.legend(loc="lower right", frameon=False)
        x = np.linspace(0, upper, 4000)
        for count in range(1, len(coefficients) + 1):
            last = count == len(coefficients)
            steps.plot(
                x,
                composed(coefficients[:count], x),
                color=SMALLEST if last else "#888888",
                linewidth=1.6 if last else 0.8,
                alpha=1.0 if last else 0.35 + 0.5 * count / len(coefficients),
            )
        steps.set_ylim(0, 1.25 * max(high, 1.0))
        steps.set_title(f"after each of {len(coefficients)} steps, the last in colour", loc="left")
        for axes in (whole, steps):
            axes.axhspan(low, high, color=LARGEST, alpha=0.15, linewidth=0)
            axes.set_xlabel("singular value before")
        whole.set_ylabel("singular value after")
        steps.annotate(
            f"band [{low:.4g}, {high:.4g}]", (0.98, 0.04), xycoords="axes fraction", ha="right", color=LARGEST
        )
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
    return path
