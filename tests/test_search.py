"""The search for the best settings of a case, and the comparison of two cases seed by seed."""

import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import experiment
from scripts.analysis import conduct
from scripts.analysis.search import Axis, Found, best_of_searches
from scripts.analysis.statistics import Difference, student_cdf, student_quantile
from training.jobs import Job


def search(loss, trials, **first):
    """The search of a loss in the learning rate and the decay, after so many trials."""
    found = Found([Axis("lr", 0.01), Axis("decay", 0.1, 4.0)], **first)
    for _ in range(trials):
        point = found.next_point()
        assert point not in found.tried
        found.tried[point] = loss(*(float(place) for place in point))
    return found


def bowl(rate, decay):
    return (rate - 2.4) ** 2 + 0.3 * (decay + 1) ** 2


def test_a_search_leaves_the_edge_and_then_halves_its_distance():
    assert search(bowl, 1).best == {"lr": "0.01", "decay": "0.1"} and not search(bowl, 1).bracketed
    found = search(bowl, 9)
    assert found.best == {"lr": "0.04", "decay": "0.025"} and found.bracketed
    assert float(search(bowl, 30).best["lr"]) == pytest.approx(0.01 * 2**2.4, rel=0.1)
    assert search(bowl, 6, start=found.point).tried[found.point] == bowl(2, -1)


def test_a_search_goes_on_until_no_best_value_is_at_an_edge():
    found = Found([Axis("lr", 0.01), Axis("decay", 0.1, 4.0)])
    while found.goes_on(2, 20):
        point = found.next_point()
        found.tried[point] = bowl(*map(float, point))
    assert found.bracketed and not search(bowl, len(found.tried) - 1).bracketed and len(found.tried) > 5
    assert not found.goes_on(len(found.tried), 1) and found.goes_on(len(found.tried) + 1, 0)
    assert search(bowl, 2).goes_on(2, 1) and not search(bowl, 2).goes_on(2, 0)


def test_a_search_flees_from_unstable_rates():
    found = search(lambda rate, decay: math.inf if rate > -3 else -rate, 4)
    assert [float(point[0]) for point in found.tried] == [0, -1, -2, -3] and found.best["lr"] == "0.00125"


def test_a_search_from_a_second_start_finds_another_valley():
    def valleys(rate, decay):
        return min(bowl(rate, decay), bowl(rate - 8, decay) - 1)

    first, second = search(valleys, 12), search(valleys, 12, start=(Fraction(8), Fraction(0)))
    best = best_of_searches([first, second])
    assert best is second and best.loss == second.loss < first.loss and best.others == [first]
    assert best_of_searches([first, Found(first.axes)]) is first and Found(first.axes).loss == math.inf
    again = Found(first.axes, tried=dict(first.tried))  # came to the same values
    assert best_of_searches([first, again]) is first and len(first.trials) == 12
    best.others = [first]
    assert len(best.trials) == 24 and best.trials[0] == ({"lr": "2.56", "decay": "0.1"}, valleys(8, 0))


def test_students_distribution_and_paired_differences():
    for freedom, t in (
        (1, 12.7062),
        (2, 4.30265),
        (3, 3.18245),
        (4, 2.77645),
        (9, 2.26216),
        (30, 2.04227),
    ):  # printed tables
        assert student_quantile(0.975, freedom) == pytest.approx(t, rel=1e-5)
        assert student_cdf(t, freedom) == pytest.approx(0.975, abs=1e-6) and student_cdf(-t, freedom) == pytest.approx(
            0.025, abs=1e-6
        )
    found = Difference.of({1: 2.0, 2: 2.2, 3: 2.1, 4: 9.0}, {3: 2.0, 2: 2.1, 1: 1.8})
    assert (found.count, found.mean) == (3, pytest.approx(0.4 / 3)) and found.low < 0 < found.high
    assert found.p == pytest.approx(0.0572, abs=1e-4)  # t = 4 with two degrees of freedom
    assert (
        Difference.of({1: 2.0, 2: 3.0}, {1: 2.0, 2: 3.0}).p == 1
        and Difference.of({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0}).p == 0
    )
    assert Difference.of({1: 2.0}, {1: 1.5}).text() == "+0.500" and math.isnan(Difference.of({1: 2.0}, {1: 1.5}).p)


def test_a_case_that_takes_the_best_settings_of_another_has_no_trials():
    asked = experiment.study_of(experiment.load_experiment("why_hetero"), ["setting=hetero,c_fc"])[0]
    asked.found["hetero",] = Found([Axis("optim.muon.lr", 0.1)], tried={(Fraction(-1),): 2.0})
    jobs = asked.jobs(Path("out"))
    assert len(jobs) == 6 and {case["optim.muon.lr"] for case, _ in jobs} == {"0.05"}
    assert all("optim.muon.lr=0.05" in job.overrides and "lr=0.05" in job.directory.name for _, job in jobs)


@pytest.mark.parametrize(("losses", "mean"), [((2.5, 3.5), 3.0), ((2.5, None), math.inf)])
def test_of_a_trial_with_several_seeds_the_mean_counts(losses, mean, tmp_path, monkeypatch):
    words = ["optimizer=muon", "residual=pre_norm", "trials=1", "further_trials=0", "search_seeds=0,7"]
    asked = experiment.study_of(experiment.load_experiment("residual_tuned"), words)[0]
    by_seed, started = dict(zip(("0", "7"), losses)), []

    def read(directory):
        final = by_seed[directory.name.rpartition("=")[2]]
        return SimpleNamespace(directory=directory, stable=final is not None, final=final)

    monkeypatch.setattr(conduct, "run_all", lambda jobs, workers, launcher: started.extend(jobs) or {})
    monkeypatch.setattr(Job, "ended", True)
    monkeypatch.setattr(conduct, "read_run", read)
    monkeypatch.setattr(conduct, "train_seconds", lambda runs: 1.0)
    conduct.Conductor(asked, tmp_path, workers=1)._search(asked.cases())
    assert asked.found["muon", "pre_norm"].loss == mean and len(started) == asked.trial_seconds == 2


def test_an_edge_is_one_at_the_best_of_the_other_settings():
    points = ((1, 1), (0, 1), (2, 1), (0, 0), (2, 2))
    found = Found(
        [Axis("lr", 0.01), Axis("decay", 0.1)], tried={(Fraction(a), Fraction(b)): i for i, (a, b) in enumerate(points)}
    )
    assert not found.bracketed  # of the second, other values were tried at other rates only
    found.tried |= {(Fraction(1), Fraction(0)): 9.0, (Fraction(1), Fraction(2)): 9.0}
    assert found.bracketed
