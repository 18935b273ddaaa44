"""Statistics over seeds and runs: mean ± standard error, paired difference, power, what one seed can say, the significance rule of the
public optimizer track, rank correlation, regression, and the best learning rate of a curve."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error. The error is NaN if there is only one value, or if one is not finite."""

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate of at least one value."""
        known = len(values) > 1 and all(map(math.isfinite, values))
        error = statistics.stdev(values) / math.sqrt(len(values)) if known else math.nan
        return cls(sum(values) / len(values), error, len(values))

    def text(self, digits: int, sign: str = "") -> str:
        """Text such as "2.30 ± 0.17"; without an error for a single value. `sign="+"` also shows the sign of a positive mean."""
        return f"{self.mean:{sign}.{digits}f}" + (f" ± {self.error:.{digits}f}" if self.count > 1 else "")


@dataclass(frozen=True)
class Difference:
    """A mean difference over seeds that both sides have, its standard error, and Student's 95% interval.

    p: two-sided, that a difference at least as large comes from chance alone, if the differences are normal. With fewer than two seeds,
    error, interval and p are NaN.
    """

    mean: float
    error: float
    count: int
    low: float
    high: float
    p: float

    @classmethod
    def of(cls, ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
        """Ours minus theirs. Both are given by seed; at least one seed must be in both."""
        found = Estimate.of([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
        freedom = found.count - 1
        half = student_quantile(0.975, freedom) * found.error if freedom else math.nan
        t = abs(found.mean) / found.error if found.error else (math.inf if found.mean else 0.0)
        p = math.nan if math.isnan(found.error) else 2 * (1 - student_cdf(t, freedom))
        return cls(found.mean, found.error, found.count, found.mean - half, found.mean + half, p)

    @property
    def half(self) -> float:
        """Half the length of the interval, for the error bar of a picture; 0 for a single seed."""
        return 0.0 if math.isnan(self.low) else self.mean - self.low

    @property
    def deviation(self) -> float:
        """The standard deviation of the difference of one seed; NaN for a single seed."""
        return self.error * math.sqrt(self.count)

    def text(self, digits: int = 3) -> str:
        """Text such as "-0.031 [-0.040, -0.022]"; without an interval for a single seed."""
        interval = f" [{self.low:+.{digits}f}, {self.high:+.{digits}f}]" if self.count > 1 else ""
        return f"{self.mean:+.{digits}f}{interval}"


def student_cdf(t: float, freedom: int) -> float:
    """P(T ≤ t) of Student's distribution with a whole number of degrees of freedom, at least 1.

    A finite sum (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4).
    """
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    within = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + within) / 2


def student_quantile(share: float, freedom: int) -> float:
    """The t with P(T ≤ t) = share, for a share from 0.5 to below 1, by bisection."""
    return _least(lambda t: student_cdf(t, freedom) >= share, 80)


def _least(reached: Callable[[float], bool], halvings: int) -> float:
    """The least x ≥ 0 with reached(x), which stays true above it."""
    low, high = 0.0, 1.0
    while not reached(high):
        high *= 2
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


# ---- power: what so many seeds can see ----

LEVEL, POWER = 0.05, 0.8
"""The two-sided level of a test, and the probability with which a true difference is to be found: the values of most textbooks."""
MOST_SEEDS = 1000  # that a question may need to be answered here
_SLICES = 400  # of the integral in `power`; twice as many change its value by less than 1e-6


def power(effect: float, count: int) -> float:
    """The probability that a paired t-test over `count` ≥ 2 seeds finds a true difference.

    effect: the true difference over the standard deviation of the difference of one seed. The integral is that of the noncentral t
    distribution over s = √(χ²/ν), ν = count - 1, whose density is 2 (ν/2)^(ν/2) / Γ(ν/2) · s^(ν-1) · exp(-νs²/2), by Simpson's rule.
    """
    freedom, shift = count - 1, abs(effect) * math.sqrt(count)
    critical = student_quantile(1 - LEVEL / 2, freedom)
    scale = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    normal = statistics.NormalDist().cdf
    width = (1 + 8 / math.sqrt(2 * freedom)) / _SLICES
    total = 0.0
    for i in range(_SLICES + 1):
        s = i * width
        weight = 1 if i in (0, _SLICES) else 4 if i % 2 else 2
        density = math.exp(scale - freedom * s * s / 2) * s ** (freedom - 1)
        total += weight * density * (normal(shift - critical * s) + normal(-shift - critical * s))
    return min(1.0, total * width / 3)


@cache
def detectable(count: int) -> float:
    """The smallest effect, in standard deviations of the difference of one seed, that `count` ≥ 2 seeds find with the usual power."""
    return _least(lambda effect: power(effect, count) >= POWER, 30)


def seeds_needed(effect: float) -> int | None:
    """The least number of seeds that find an effect, in units of `detectable`, with the usual power; None if it is more than MOST_SEEDS."""
    low, high = 1, 2
    while power(effect, high) < POWER:
        low, high = high, 2 * high
        if low >= MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power(effect, middle) < POWER else (low, middle)
    return high if high <= MOST_SEEDS else None


def scatter_allowed(difference: float) -> float:
    """What one seed can say: a difference of two single runs is significant only if runs scatter over seeds by less than this.

    The result is a standard deviation of the loss of one run. It assumes independent normal losses of equal, known deviation σ: the
    difference then has the deviation σ√2. One seed itself says nothing about σ.
    """
    return abs(difference) / (math.sqrt(2) * statistics.NormalDist().inv_cdf(1 - LEVEL / 2))


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's step-down method (Scandinavian Journal of Statistics 6, 1979). NaN stays NaN.

    The probability that any true null hypothesis among them has an adjusted value below α is at most α.
    """
    order = sorted((i for i, p in enumerate(values) if not math.isnan(p)), key=values.__getitem__)
    adjusted, least = list(values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * values[i]))
        adjusted[i] = least
    return adjusted


# ---- the rule of the public optimizer track ----

TARGET, SIGMA, MARGIN = 3.28, 0.0013, 0.004
"""Its target (nats), the standard deviation of a run's loss over seeds that it assumes, and 3.09 of these, for p < .001."""


def significance(losses: Sequence[float], target: float = TARGET) -> tuple[bool, float]:
    """Whether the mean of these losses is below the target by the track's rule, and the one-sided p of a z-test at σ = SIGMA.

    The rule is (target - mean)·√n ≥ MARGIN, from github.com/KellerJordan/modded-nanogpt, records/track_3_optimization, rule 3. The
    losses must be those of all runs, at a step that is the same for all.
    """
    lead = (target - sum(losses) / len(losses)) * math.sqrt(len(losses))
    return lead >= MARGIN * (1 - 1e-9), statistics.NormalDist().cdf(-lead / SIGMA)


def stopping_step(curves: Sequence[Mapping[int, float]], target: float = TARGET) -> int | None:
    """The first step at which all runs were evaluated and their losses (step → loss) pass `significance`; None if there is none."""
    shared = set.intersection(*map(set, curves))
    return next((step for step in sorted(shared) if significance([c[step] for c in curves], target)[0]), None)


def judged(curves: Sequence[Mapping[int, float]], target: float = TARGET) -> tuple[int | None, int, list[float], float]:
    """What the rule says of all runs of a setting (step → loss, at least one step in all): the stopping step, or None; the step at which
    the runs are judged, which without a stopping step is the last that all have; their losses there; and the p of `significance` at that
    step. That p is not adjusted for the evaluations before it, each of which could have passed the rule.
    """
    stopped = stopping_step(curves, target)
    step = max(set.intersection(*map(set, curves))) if stopped is None else stopped
    losses = [curve[step] for curve in curves]
    return stopped, step, losses, significance(losses, target)[1]


# ---- ranks and rates ----


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value, from 1 on; equal values share their mean rank."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's ρ: the correlation of the ranks. NaN if all values of one side are equal."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    return statistics.correlation(ranks(a), ranks(b))


def rank_correlation_p(rho: float, count: int) -> float:
    """The two-sided p of Spearman's ρ of `count` pairs, from Student's t with count - 2 degrees of freedom; NaN for fewer than 3.

    It is never below 2/count!, the share of all orders in which |ρ| is 1.
    """
    if count < 3 or math.isnan(rho):
        return math.nan
    t = abs(rho) * math.sqrt((count - 2) / (1 - rho**2)) if abs(rho) < 1 else math.inf
    return max(2 * (1 - student_cdf(t, count - 2)), 2 / math.factorial(count))


@dataclass(frozen=True)
class Regression:
    """A linear fit by least squares, with an intercept.

    slopes: name → (slope, low, high), with Student's 95% interval. explained: R², the share of the variance that the fit explains.
    foretold: the same when every point is foretold by a fit to all others; it may be below zero. error: the root mean square of the
    differences from these forecasts, in the units of y.
    """

    slopes: dict[str, tuple[float, float, float]]
    explained: float
    foretold: float
    error: float
    count: int

    @classmethod
    def of(cls, x: Mapping[str, Sequence[float]], y: Sequence[float]) -> Regression | None:
        """The fit of y by the variables x. None if y is constant, the variables are dependent, or there are fewer than 3 points to spare.

        The forecast of a point that is left out differs from its value by its residual / (1 - its leverage).
        """
        matrix, target = np.column_stack([np.ones(len(y)), *x.values()]), np.asarray(y, float)
        freedom = len(y) - matrix.shape[1]
        if freedom < 3 or len(set(y)) < 2 or np.linalg.matrix_rank(matrix) < matrix.shape[1]:
            return None
        inverse = np.linalg.inv(matrix.T @ matrix)
        fitted = inverse @ matrix.T @ target
        residual = target - matrix @ fitted
        left_out = residual / np.maximum(1 - ((matrix @ inverse) * matrix).sum(1), 1e-12)
        spread = np.sqrt((residual @ residual) / freedom * inverse.diagonal()) * student_quantile(0.975, freedom)
        slopes = {n: (float(b), float(b - h), float(b + h)) for n, b, h in zip(x, fitted[1:], spread[1:])}
        squares, total = float(left_out @ left_out), float(((target - target.mean()) ** 2).sum())
        return cls(
            slopes,
            1 - float(residual @ residual) / total,
            1 - squares / total,
            math.sqrt(squares / len(y)),
            len(y),
        )


def rank_regression(x: Mapping[str, Sequence[float]], y: Sequence[float]) -> Regression | None:
    """The fit of the ranks of y by the ranks of each variable (Conover, Iman, The American Statistician 35, 1981). None: see `Regression.of`.

    It does not depend on the form of a monotonous relation, and an infinite value is just the last. A slope of 1: as many places as x.
    """
    return Regression.of({name: ranks(values) for name, values in x.items()}, ranks(y))


def best_rate(curve: Mapping[float, Sequence[float]]) -> tuple[float, float, bool]:
    """The best learning rate, the mean loss there, and whether the lowest mean has no finite neighbour on one side.

    It is the minimum of the parabola through the lowest mean and its two neighbours, over the logarithm of the rate.
    """
    rates = sorted(curve)
    means = [Estimate.of(curve[rate]).mean for rate in rates]
    i = min(range(len(rates)), key=means.__getitem__)
    if i in (0, len(rates) - 1) or not all(map(math.isfinite, means[i - 1 : i + 2])):
        return rates[i], means[i], True
    (x0, x1, x2), (y0, y1, y2) = (math.log(r) for r in rates[i - 1 : i + 2]), means[i - 1 : i + 2]
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (right - left) / (x2 - x0)  # above 0, since the lowest mean is the first of its kind
    x = (x0 + x1) / 2 - left / (2 * bend)
    return math.exp(x), y1 + (x - x1) * (left + bend * (x - x0)), False
