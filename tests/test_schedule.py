"""Schedules as functions: their end points, their monotony, and nanoGPT's formula."""

import math
from itertools import pairwise

import pytest

from optim.schedule import SCHEDULES, lr_multiplier


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
