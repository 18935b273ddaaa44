"""Statistics over seeds and runs: mean ± standard error, paired difference, the significance rule of the public optimizer track, rank
correlation, and the best learning rate of a curve."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


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
        t = abs(found.mean) / found.error if found.error else math.inf
        p = math.nan if math.isnan(found.error) else 2 * (1 - student_cdf(t, freedom))
        return cls(found.mean, found.error, found.count, found.mean - half, found.mean + half, p)

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
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < share:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < share else (low, middle)
    return high


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


def lower_at_equal_steps(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether our mean is lower by the track's pairwise rule: the difference / √(1/n₁ + 1/n₂) ≥ MARGIN, at the same number of steps."""
    lead = sum(theirs) / len(theirs) - sum(ours) / len(ours)
    return lead / math.sqrt(1 / len(ours) + 1 / len(theirs)) >= MARGIN * (1 - 1e-9)


# ---- ranks and rates ----


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's ρ: the correlation of the ranks; equal values share their mean rank."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]

    return statistics.correlation(ranks(a), ranks(b))


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
    bend = (right - left) / (x2 - x0)
    if bend <= 0:
        return rates[i], means[i], False
    x = (x0 + x1) / 2 - left / (2 * bend)
    return math.exp(x), y1 + (x - x1) * (left + bend * (x - x0)), False
