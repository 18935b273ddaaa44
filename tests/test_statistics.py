"""Level, power and what one seed can say, on synthetic losses of seeds."""

import math
import random

import pytest

from scripts.analysis.statistics import (
    LEVEL,
    POWER,
    Difference,
    Regression,
    detectable,
    holm,
    power,
    rank_correlation_p,
    rank_regression,
    scatter_allowed,
    seeds_needed,
    student_quantile,
)

TRIALS = 2000


def differences(effect, seeds, rng):
    """Paired differences of two settings whose losses share what the seed does; the difference scatters by 0.01."""
    for _ in range(TRIALS):
        common = [rng.gauss(2.0, 0.05) for _ in range(seeds)]
        ours = {i: x + rng.gauss(effect * 0.01, 0.01) for i, x in enumerate(common)}
        yield Difference.of(ours, dict(enumerate(common)))


@pytest.mark.parametrize("seeds", [2, 3, 8])
@pytest.mark.parametrize("effect", [0.0, 1.5])
def test_a_difference_is_found_as_often_as_the_power_says(seeds, effect):
    found = sum(d.p < LEVEL for d in differences(effect, seeds, random.Random(seeds)))
    expected = power(effect, seeds)
    assert expected == pytest.approx(LEVEL, abs=1e-6) if effect == 0 else expected > LEVEL
    assert abs(found / TRIALS - expected) < 3.5 * math.sqrt(expected * (1 - expected) / TRIALS)


def test_the_interval_covers_the_truth_at_its_level_and_agrees_with_p():
    covered = 0
    for d in differences(1.5, 4, random.Random(1)):
        covered += d.low <= 0.015 <= d.high
        assert (d.low <= 0 <= d.high) == (d.p >= LEVEL)
    assert abs(covered / TRIALS - 0.95) < 3.5 * math.sqrt(0.05 * 0.95 / TRIALS)


def test_power_is_that_of_tables():
    # G*Power 3.1, t tests, difference of two dependent means, two-sided, alpha .05
    assert power(0.5, 34) == pytest.approx(0.8078, abs=2e-4) and power(1.0, 10) == pytest.approx(0.8031, abs=2e-4)
    assert power(-1.0, 10) == power(1.0, 10)


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_the_detectable_effect_has_the_wanted_power(count):
    assert power(detectable(count), count) == pytest.approx(POWER, abs=1e-6)


def test_the_least_number_of_seeds():
    for effect in (0.4, 1.0, 3.0):
        count = seeds_needed(effect)
        assert power(effect, count) >= POWER > power(effect, count - 1)
    assert seeds_needed(100.0) == 2 and seeds_needed(0.01) is None and seeds_needed(0.0) is None
    assert seeds_needed(0.0882) is None  # 1,011 would be needed
    assert 512 < seeds_needed(0.106) < 1000


def test_one_seed_says_how_little_runs_may_scatter():
    allowed = scatter_allowed(-0.02)
    assert allowed * math.sqrt(2) * 1.959964 == pytest.approx(0.02, rel=1e-6)
    rng = random.Random(3)
    beyond = sum(abs(rng.gauss(0, allowed) - rng.gauss(0, allowed)) > 0.02 for _ in range(TRIALS))
    assert abs(beyond / TRIALS - LEVEL) < 3.5 * math.sqrt(0.05 * 0.95 / TRIALS)


def test_adjusted_p_values_hold_the_level_of_the_family():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    adjusted = holm([0.5, math.nan, 0.9])
    assert adjusted[::2] == [1.0, 1.0] and math.isnan(adjusted[1])
    rng = random.Random(4)
    wrong = sum(min(holm([rng.random() for _ in range(6)])) < LEVEL for _ in range(TRIALS))
    assert wrong / TRIALS < LEVEL + 3.5 * math.sqrt(0.05 * 0.95 / TRIALS)


def test_the_deviation_of_a_difference_is_that_of_one_seed():
    found = Difference.of({1: 1.0, 2: 2.0, 3: 3.0}, {1: 0.0, 2: 0.0, 3: 0.0})
    assert found.deviation == pytest.approx(1.0) and math.isnan(Difference.of({1: 1.0}, {1: 0.0}).deviation)
    half = student_quantile(0.975, 2) * found.deviation / math.sqrt(3)
    assert found.high - found.mean == pytest.approx(half) and found.half == pytest.approx(half)


def test_a_regression_finds_the_plane_and_foretells_what_it_left_out():
    rng = random.Random(0)
    x = {name: [rng.gauss(0, 1) for _ in range(40)] for name in ("a", "b")}
    plane = [1 + 2 * a - 3 * b for a, b in zip(*x.values())]
    exact = Regression.of(x, plane)
    assert exact.explained == pytest.approx(1) and exact.foretold == pytest.approx(1) and exact.error < 1e-9
    assert exact.slopes["a"] == pytest.approx((2, 2, 2)) and exact.slopes["b"] == pytest.approx((-3, -3, -3))
    noisy = [y + rng.gauss(0, 1) for y in plane]
    missed = []
    for i in range(40):
        others = {name: [v for j, v in enumerate(values) if j != i] for name, values in x.items()}
        fit = Regression.of(others, [y for j, y in enumerate(noisy) if j != i])
        mean = sum(y for j, y in enumerate(noisy) if j != i) / 39
        centre = {name: sum(values) / 39 for name, values in others.items()}
        missed.append(noisy[i] - mean - sum(fit.slopes[n][0] * (x[n][i] - centre[n]) for n in x))
    assert Regression.of(x, noisy).error == pytest.approx(math.sqrt(sum(m * m for m in missed) / 40))


def test_the_interval_of_a_slope_holds_it_as_often_as_it_says():
    rng, x = random.Random(1), {"a": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}
    slope = Regression.of(x, [0.0, 1.0, 1.0, 3.0, 4.0, 6.0]).slopes["a"]
    assert slope == pytest.approx((1.171429, 0.766939, 1.575919), rel=1e-5)  # Student's interval, 4 degrees of freedom
    held = 0
    for _ in range(500):
        _, low, high = Regression.of(x, [2 * a + rng.gauss(0, 1) for a in x["a"]]).slopes["a"]
        held += low < 2 < high
    assert held / 500 == pytest.approx(0.95, abs=0.03)


def test_ranks_are_fitted_when_losses_are_not_finite_and_nothing_is_when_nothing_can_be():
    x = {"a": [0.1, 0.2, 0.3, 5.0, 6.0, 7.0]}
    fit = rank_regression(x, [1.0, 1.1, 1.2, 9.0, math.inf, math.inf])
    assert fit.slopes["a"][0] == pytest.approx(34 / 35) and fit.count == 6
    assert rank_regression(x, [1.0] * 6) is None and rank_regression({"a": [1.0] * 6}, list(range(6))) is None
    few = {"a": [1.0, 2.0, 4.0, 5.0]}
    assert Regression.of(few, [1.0, 2.0, 3.0, 5.0]) is None  # two points to spare
    assert Regression.of({"a": [*few["a"], 7.0]}, [1.0, 2.0, 3.0, 5.0, 6.0]) is not None


def test_the_p_of_a_rank_correlation():
    assert rank_correlation_p(0.6, 10) == pytest.approx(0.0667, abs=1e-4)
    assert (
        rank_correlation_p(1.0, 5) == rank_correlation_p(-1.0, 5) == pytest.approx(2 / 120)
    )  # of 5! orders, two have |ρ| = 1
    assert math.isnan(rank_correlation_p(0.5, 2))
