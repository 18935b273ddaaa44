"""Odd quintics for the matrix sign: published lists by name, and how to design one.

p(x) = a·x + b·x³ + c·x⁵, applied to a matrix by products, maps every singular value x and leaves the singular vectors as they are. A list
of such polynomials, one after the other, is an iteration. What it does is the composed map on (0, 1]: the slope at 0, which says how fast
small singular values grow, and the band, between which values it leaves those of an interval.

Three ways to a list:

    ITERATORS                     lists that others published, by name
    steepest                      one quintic of chosen fixed points, as steep at 0 as they allow
    polar_express_coefficients    the composition of a number of quintics that is nearest to 1 on an interval

Everything here is float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

Quintic = tuple[float, float, float]
"""(a, b, c) of p(x) = a·x + b·x³ + c·x⁵."""

# The authors' list of Polar Express is made for singular values down to 1e-3, with a cushion that keeps early slopes moderate.
LOWER = 1e-3
CUSHION = 0.02407327424182761
SAFETY = 1.01  # the list is widened by this factor so that rounding cannot push a singular value out of its interval
LARGEST_GAMMA = 1e6  # that is tried; nothing with a band comes near it
HIGHEST = 2.0  # the composed map of a sound list stays below this on (0, 1]
_EXCHANGES = 100  # of Remez; ten are enough


class IteratorError(ValueError):
    """No such iteration exists; the message says why."""


# ---- what an iteration does ----


def composed(coefficients: Sequence[Quintic], x: Any) -> Any:
    """The composed map at x, a number or an array of float64 of any shape; infinite where it overflows."""
    x = np.asarray(x, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for a, b, c in coefficients:
            x = x * (a + x * x * (b + c * x * x))
    return x


def slope_at_zero(coefficients: Sequence[Quintic]) -> float:
    """The slope of the composed map at 0: the factor by which small singular values grow."""
    return float(np.prod([a for a, _, _ in coefficients]))


def band(
    coefficients: Sequence[Quintic], lower: float = LOWER, upper: float = 1.0, rounding: float = 0.0
) -> tuple[float, float]:
    """The least and the largest value of the composed map on [lower, upper], 0 < lower ≤ upper.

    rounding: by this share, the argument of every polynomial may be off in either direction. From the ends of an interval and the
    turning points inside it, so there is no grid.
    """
    for quintic in coefficients:
        lower, upper = lower - abs(lower) * rounding, upper + abs(upper) * rounding
        inside = [x for y in _turning_points(quintic) for x in (y, -y) if lower < x < upper]
        values = composed([quintic], [lower, upper, *inside])
        lower, upper = float(values.min()), float(values.max())
    return lower, upper


def unsound(coefficients: Sequence[Quintic], rounding: float = 0.0) -> str | None:
    """Why a list of coefficients is no iteration for the sign; None if it is one. rounding: see `band`.

    On (0, 1] the composed map must be positive, or a sign is lost, and at most HIGHEST, beyond which lists diverge.
    """
    if not coefficients:
        return "it has no polynomials"
    low, high = band(coefficients, 1e-12, 1.0, rounding)
    if not np.isfinite([low, high]).all():
        return "its composed map is not finite on (0, 1]"
    if low <= 0:
        return f"its composed map reaches {low:.3g} on (0, 1], and a value that is not positive loses a sign"
    return f"its composed map reaches {high:.3g} on (0, 1], above {HIGHEST:g}" if high > HIGHEST else None


def _turning_points(quintic: Quintic) -> list[float]:
    """The x > 0 at which p'(x) = a + 3b·x² + 5c·x⁴ is 0, in order."""
    a, b, c = quintic
    squares = [-a / (3 * b)] if c == 0 and b else []
    if c and (root := 9 * b * b - 20 * a * c) >= 0:
        squares = [(-3 * b + sign * root**0.5) / (10 * c) for sign in (-1, 1)]
    return sorted(y**0.5 for y in squares if 0 < y < np.inf)


# ---- one quintic of chosen fixed points ----


def with_fixed_points(gamma: float, l: float, r: float) -> Quintic:
    """The quintic x + γ·x·(x² - (1-l)²)·(x² - (1+r)²), whose fixed points are 0, ±(1-l) and ±(1+r).

    Source: F. L. Cesista, Squeezing 1-2% efficiency gains out of Muon by optimizing the Newton-Schulz coefficients
    (leloykun.github.io/ponder/muon-opt-coeffs).
    """
    inner, outer = (1 - l) ** 2, (1 + r) ** 2
    return 1 + gamma * inner * outer, -gamma * (inner + outer), gamma


def peak_and_trough(quintic: Quintic) -> tuple[float, float] | None:
    """The value at the first local maximum on x > 0, and at the local minimum behind it; None if it is monotone there."""
    points = _turning_points(quintic)
    if quintic[0] <= 0 or len(points) < 2:
        return None
    peak, trough = composed([quintic], points)
    return float(peak), float(trough)


def steepest(l: float, r: float) -> Quintic:
    """The quintic with fixed points 0, ±(1-l), ±(1+r) and the largest slope at 0 whose values on (0, 1+r] stay in (0, 1+r].

    γ is found by bisection: the peak on (0, 1-l) is to be 1+r. The trough behind the peak must then lie above 0, since the map would lose the
    sign of a singular value there. It reaches 0 at γ = 4 / ((1+r)² - (1-l)²)². [the recipe is that of a thread by the author of
    `with_fixed_points`; the closed form is ours]

    Raises:
        IteratorError: l is not in [0, 1) or r is negative; or the trough comes first.
    """
    if not (0 <= l < 1 and 0 <= r < np.inf):
        raise IteratorError(f"l={l:g} and r={r:g} give no interval [1-l, 1+r] around 1; give 0 ≤ l < 1 and r ≥ 0")

    def peak(gamma: float) -> float:
        found = peak_and_trough(with_fixed_points(gamma, l, r))
        return max(found[0] if found else 0.0, 1 - l)

    width = (1 + r) ** 2 - (1 - l) ** 2
    high = 4 / width**2 if width > 0 else np.inf
    if peak(min(high, LARGEST_GAMMA)) < 1 + r:
        raise IteratorError(
            f"l={l:g} and r={r:g} have no valid slope: at gamma={high:.4f} the trough on (1-l, 1+r) reaches 0, while the peak on (0, 1-l) "
            f"is still at {peak(high):.4f}, below 1+r={1 + r:g}; make l or r smaller"
        )
    low, high = 0.0, min(high, LARGEST_GAMMA)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if peak(middle) > 1 + r else (middle, high)
    return with_fixed_points(low, l, r)


# ---- several quintics, nearest to 1 on an interval ----


def optimal_quintic(lower: float, upper: float) -> Quintic:
    """Best uniform odd quintic approximation of 1 on [lower, upper], by Remez exchange on four points.

    Returns (a, b, c) of p(x) = a·x + b·x³ + c·x⁵. Source: arXiv 2505.16932, Algorithm 1 and its published code. When the interval
    is a point to within 5e-6 the Taylor quintic (15/8, -10/8, 3/8) takes over, as there.
    """
    if lower / upper >= 1 - 5e-6:
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    error, previous = np.inf, np.nan
    for _ in range(_EXCHANGES):
        if abs(previous - error) <= 1e-15:
            break
        previous = error
        nodes = np.array([lower, q, r, upper])
        system = np.stack([nodes, nodes**3, nodes**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b**2 - 20 * a * c)
        q, r = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
    return float(a), float(b), float(c)


@lru_cache
def polar_express_coefficients(
    steps: int, lower: float = LOWER, upper: float = 1.0, cushion: float = CUSHION, safety: float = SAFETY
) -> tuple[Quintic, ...]:
    """The `steps` Polar Express polynomials for singular values in [lower, upper]. Source: arXiv 2505.16932 and its published code.

    `cushion` bounds how small the lower end of an interval is taken to be, relative to its upper end; `safety` rescales the argument
    of each polynomial. The authors' list ends with the eighth entry, the Taylor quintic, which is repeated without safety. The defaults
    are the authors' list, except for `steps`.
    """
    coefficients, l, u = [], lower, upper
    for step in range(steps):
        a, b, c = optimal_quintic(max(l, cushion * u), u)

        def value(x: float, a: float = a, b: float = b, c: float = c) -> float:
            return a * x + b * x**3 + c * x**5

        # Centre the image of [l, u] on 1: with a cushion, p(l) lies below the equioscillation band.
        centre = 2 / (value(l) + value(u))
        a, b, c = a * centre, b * centre, c * centre
        l = value(l) * centre
        u = 2 - l
        s = safety if step < 7 else 1.0
        coefficients.append((a / s, b / s**3, c / s**5))
    return tuple(coefficients)


def widened(coefficients: Sequence[Quintic], safety: float) -> tuple[Quintic, ...]:
    """The list with the argument of every polynomial but the last divided by `safety`, so that rounding cannot leave its interval.

    Source: arXiv 2505.16932, where the list is made like that; here for lists of others.
    """
    s = [safety] * (len(coefficients) - 1) + [1.0]
    return tuple((a / x, b / x**3, c / x**5) for (a, b, c), x in zip(coefficients, s))


# ---- published lists ----


@dataclass(frozen=True)
class Iteration:
    """A list of coefficients as it is used.

    band: the least and the largest value of its composed map on [LOWER, 1]. margin: a matrix is first divided by
    margin·‖X‖_F, for lists that diverge on singular values just above 1, where rounding may put them.
    """

    coefficients: tuple[Quintic, ...]
    band: tuple[float, float]
    margin: float = SAFETY

    def require(self, dtype: torch.dtype) -> None:
        """Raise IteratorError if rounding to `dtype` between the polynomials may make the iteration diverge.

        The entries of a matrix are off by up to eps/2 each, in no order; its singular values by less. On matrices of 16 to 256 rows, eps/4
        refused every list that diverged, and some that did not. [ours]
        """
        if reason := unsound(self.coefficients, torch.finfo(dtype).eps / 4):
            name = str(dtype).removeprefix("torch.")
            raise IteratorError(
                f"this iterator is not safe in {name}: if values are rounded, {reason}; compute in float32, or widen the list by a "
                "safety factor (`widened`)"
            )


_CANS = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)
_YOU_JIACHENG = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_YOU_JIACHENG_6 = (  # in units of 1/1024
    (3955, -8306, 5008),
    (3735, -6681, 3463),
    (3799, -6499, 3211),
    (4019, -6385, 2906),
    (2677, -3029, 1162),
    (2172, -1833, 682),
)

ITERATORS = {
    # Keller Jordan, Muon (kellerjordan.github.io/posts/muon)
    "jordan": Iteration(((3.4445, -4.7750, 2.0315),) * 5, (0.470, 1.203), margin=1.0),
    # YouJiacheng's lists of five and of six, as in the public speedrun (github.com/KellerJordan/modded-nanogpt)
    "you_jiacheng": Iteration(_YOU_JIACHENG, (0.474, 1.146), margin=1.0),
    "you_jiacheng_6": Iteration(
        tuple((a / 1024, b / 1024, c / 1024) for a, b, c in _YOU_JIACHENG_6), (0.866, 1.0), margin=1.0
    ),
    # Amsel, Persson, Musco, Gower, arXiv 2505.16932
    "polar_express": Iteration(polar_express_coefficients(5), (0.845, 1.125)),
    # Grishina, Smirnov, Rakhuba, arXiv 2506.10935, as in NVIDIA's Emerging-Optimizers; only for float32: see `Iteration.require`
    "cans": Iteration(_CANS, (0.884, 1.120)),
    # the Taylor quintic of 1/√y at 1; as many steps as leave 1e-3 within 2% of 1
    "newton_schulz": Iteration(((15 / 8, -10 / 8, 3 / 8),) * 12, (0.980, 1.001)),
    # twelve times one quintic with the fixed points 0, 1 and √2, as in the speedrun's optimizer track
    "aurora": Iteration(((2.0, -1.5, 0.5),) * 12, (0.999, 1.001)),
}
"""The published lists by name, each as long as its users have it. `polar_express_coefficients` makes others."""


def iterator(chosen: str | Sequence[Quintic]) -> Iteration:
    """The iteration of a name in ITERATORS, or of a list of coefficients.

    Raises:
        IteratorError: an unknown name, or a list that is `unsound` or not of three numbers each.
    """
    if isinstance(chosen, str):
        if chosen not in ITERATORS:
            raise IteratorError(f"unknown iterator {chosen!r}; choose one of {', '.join(ITERATORS)}, or give a list")
        return ITERATORS[chosen]
    try:
        coefficients = tuple((float(a), float(b), float(c)) for a, b, c in chosen)
    except (TypeError, ValueError):
        raise IteratorError(
            f"{chosen!r} is no list of coefficients; give three numbers [a, b, c] for each step"
        ) from None
    if reason := unsound(coefficients):
        raise IteratorError(f"this list of coefficients is no iterator: {reason}")
    return Iteration(coefficients, band(coefficients))
