"""Schedules as functions: their end points, their monotony, and nanoGPT's formula."""

import math
from itertools import pairwise

import pytest

from training.config import CONFIGS, compose
from training.schedule import SCHEDULES, lr_multiplier, warmup_updates


def multiplier(step, kind="cosine", warmup=10, decay_steps=100, floor=0.1):
    return lr_multiplier(step, kind=kind, warmup_steps=warmup, decay_steps=decay_steps, floor=floor, decay=0.2)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_warms_up_to_one_and_ends_at_the_floor(kind):
    assert [multiplier(s, kind) for s in range(10)] == pytest.approx([(s + 1) / 11 for s in range(10)])
    assert multiplier(10, kind) == 1
    end = 1 if kind == "constant" else 0.1
    assert multiplier(100, kind) == pytest.approx(end) and multiplier(10_000, kind) == pytest.approx(end)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_never_rises_after_warm_up(kind):
    values = [multiplier(s, kind) for s in range(10, 101)]
    assert all(a >= b for a, b in pairwise(values))


def test_cosine_is_nanogpts():
    for step in (10, 33, 70, 100):
        ratio = (step - 10) / 90
        assert multiplier(step) == pytest.approx(0.1 + 0.5 * (1 + math.cos(math.pi * ratio)) * 0.9)


def test_wsd_is_stable_until_the_last_fifth():
    assert multiplier(10 + 72, "wsd") == pytest.approx(1)
    assert multiplier(10 + 81, "wsd") == pytest.approx(0.55)
    assert multiplier(50, "linear") == pytest.approx(1 - 0.9 * 40 / 90)


def test_no_warm_up_starts_at_the_peak():
    assert multiplier(0, warmup=0) == 1


def test_warm_up_may_be_a_share_and_shrinks_where_it_does_not_fit():
    assert warmup_updates(30, 200) == warmup_updates(0.15, 200) == 30
    assert warmup_updates(199, 200) == 199 and warmup_updates(0, 5) == warmup_updates(0.01, 5) == 0
    assert warmup_updates(0.29, 100) == 29  # rounded: 0.29 x 100 is a little less
    # Of w + d updates that were asked for there are d.
    assert warmup_updates(30, 10) == 7 and warmup_updates(200, 200) == 100
    for wanted in (1, 7, 0.999, 1000):
        for updates in (1, 2, 3, 10, 100):
            assert 0 <= warmup_updates(wanted, updates) < updates
    assert multiplier(0, warmup=0.1) == multiplier(0, warmup=10)
    assert multiplier(2, warmup=6, decay_steps=4) == 1 and multiplier(4, warmup=6, decay_steps=4) == pytest.approx(0.1)


@pytest.mark.parametrize("experiment", sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml")))
def test_every_recipe_keeps_the_warm_up_it_states(experiment):
    schedule = compose([f"experiment={experiment}"]).schedule
    wanted = schedule.warmup_steps * (1 if schedule.warmup_steps >= 1 else schedule.decay_steps)
    assert warmup_updates(schedule.warmup_steps, schedule.decay_steps) == wanted
