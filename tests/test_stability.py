"""The one definition of unstable: each of its rules, and what must not set it off."""

from __future__ import annotations

import math
import random

import pytest
import torch

from training.fields import Section
from training.stability import Stability, StabilityRules


def make(**changes) -> Stability:
    rest = {"on_unstable": "mark", "max_skipped": None, "warning": None}
    return Stability(StabilityRules(**{"max_rise": 0.5, "z_threshold": 6.0, "z_steps": 3, **rest, **changes}))


def healthy_loss(step: int, rng: random.Random) -> float:
    """A training loss as runs show it: falling, with noise."""
    return 3.0 + 7.0 * math.exp(-step / 80) + rng.gauss(0, 0.1)


def feed(stability: Stability, steps: int, seed: int = 0) -> int:
    """A healthy run of ``steps`` steps; returns the next step."""
    rng = random.Random(seed)
    for step in range(1, steps + 1):
        assert not stability.observe_train_loss(step, healthy_loss(step, rng))
    return steps + 1


def test_a_healthy_run_is_stable():
    for seed in range(20):
        stability = make()
        feed(stability, 2000, seed)
        assert stability.unstable_step is None and stability.reason is None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("observe", ["observe_train_loss", "observe_val_loss"])
def test_a_loss_that_is_not_finite(observe, loss):
    stability = make(z_threshold=None)
    assert not getattr(stability, observe)(4, 3.0)
    assert getattr(stability, observe)(5, loss)
    assert stability.unstable_step == 5 and str(loss) in stability.reason
    assert math.isfinite(stability.best) or observe == "observe_train_loss"


def test_what_is_not_finite_is_named_with_its_rank_if_it_has_one():
    stability = make()
    assert stability.observe_nonfinite(7, "the loss", rank=3)
    assert stability.unstable_step == 7 and stability.reason == "the loss is not finite on rank 3"
    of_all = make()
    assert of_all.observe_nonfinite(7, "the gradient of h.0.attn.c_attn.weight")
    assert of_all.reason == "the gradient of h.0.attn.c_attn.weight is not finite"


def test_more_skipped_updates_than_allowed_end_a_run():
    for max_skipped, ended in ((None, [False] * 4), (2, [False, False, False, True]), (0, [False, True, True, True])):
        stability, found = make(max_skipped=max_skipped), []
        for count in range(4):
            stability.observe_skipped(count)
            found.append(stability.stopped)
        assert found == ended


def test_the_validation_loss_may_rise_by_max_rise_and_no_more():
    stability = make()
    for step, loss in [(0, 10.0), (100, 4.0), (200, 4.25), (300, 3.5), (400, 4.0)]:
        assert not stability.observe_val_loss(step, loss)
    assert (stability.best, stability.best_step) == (3.5, 300)
    assert stability.observe_val_loss(500, 4.0 + 1e-9)
    assert stability.unstable_step == 500
    assert stability.reason == "validation loss 4 is 0.5 above its best, 3.5 at step 300"


def test_the_best_is_the_least_and_its_first_step():
    stability = make(max_rise=100.0)
    assert stability.best == math.inf and stability.best_step is None
    losses = [5.0, 3.0, 4.0, 3.0, 2.0, 9.0]
    for step, loss in enumerate(losses):
        stability.observe_val_loss(step, loss)
        assert stability.best == min(losses[: step + 1])
        assert stability.best_step == losses.index(stability.best)


def test_the_first_reason_stands_and_the_run_may_go_on():
    stability = make()
    assert stability.observe_nonfinite(5, "loss")
    first = stability.reason
    assert not stability.observe_nonfinite(6, "gradient of wte")
    assert not stability.observe_train_loss(7, math.nan)
    assert not stability.observe_val_loss(8, 2.0)
    assert not stability.observe_val_loss(9, 9.0)
    assert stability.unstable_step == 5 and stability.reason == first
    assert stability.best == 2.0, "the best is kept on"


@pytest.mark.parametrize("z_steps", [1, 3, 5])
def test_the_z_score_must_stay_high_for_m_steps_on_end(z_steps):
    stability = make(z_steps=z_steps)
    step = feed(stability, 500)
    for _ in range(4):  # spikes one step too short, each followed by a healthy loss
        for _ in range(z_steps - 1):
            assert not stability.observe_train_loss(step, 6.0)
            step += 1
        assert not stability.observe_train_loss(step, 3.0)
        step += 1
    assert [stability.observe_train_loss(step + k, 6.0) for k in range(z_steps)] == [False] * (z_steps - 1) + [True]
    assert stability.unstable_step == step + z_steps - 1


def test_the_z_score_is_measured_against_the_moving_statistics():
    """Around losses of spread 0.1 the threshold of 6 lies at +0.6, give or take what the moving average errs."""
    assert not any(flags_at(rise) for rise in (0.0, 0.2, 0.4))
    assert all(flags_at(rise) for rise in (0.9, 1.2, 5.0))


@pytest.mark.parametrize(("deviations", "high"), [(5.95, False), (6.05, True)])
def test_the_threshold_counts_standard_deviations(deviations, high):
    stability = make(z_steps=1)
    for step in range(500):
        stability.observe_train_loss(step, 3.0 + 0.1 * (-1) ** step)
    loss = stability._mean + deviations * math.sqrt(stability._variance)
    assert stability.observe_train_loss(500, loss) == high


def flags_at(rise: float) -> bool:
    stability = make(z_steps=1)
    rng = random.Random(3)
    for step in range(1000):
        stability.observe_train_loss(step, rng.gauss(3.0, 0.1))
    assert stability._mean == pytest.approx(3.0, abs=0.05)
    assert math.sqrt(stability._variance) == pytest.approx(0.1, rel=0.3)
    return stability.observe_train_loss(1000, stability._mean + rise)


def test_the_first_averages_are_plain_ones():
    stability = make()
    losses = [random.Random(1).uniform(2, 4) for _ in range(50)]
    for step, loss in enumerate(losses):
        stability.observe_train_loss(step, loss)
    values = torch.tensor(losses, dtype=torch.float64)
    assert stability._mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert stability._variance == pytest.approx(values.var(correction=0).item(), rel=1e-12, abs=1e-15)


def test_the_z_score_waits_for_its_statistics_and_can_be_switched_off():
    early = make(z_steps=1)
    step = feed(early, 49)
    assert not early.observe_train_loss(step, 100.0)
    off = make(z_threshold=None, z_steps=1)
    step = feed(off, 500)
    assert not any(off.observe_train_loss(step + k, 100.0) for k in range(50))
    constant = make(z_steps=1)
    assert not any(constant.observe_train_loss(step, 3.0 + 1e-9 * (step % 2)) for step in range(500))
    assert not constant.observe_train_loss(500, 3.01)  # within a thousandth of the mean a loss counts as constant
    assert constant.observe_train_loss(501, 3.1)


def test_a_record_taken_over_goes_on_as_if_never_interrupted():
    rng = random.Random(5)
    losses = [healthy_loss(step, rng) for step in range(600)] + [6.0] * 6
    for cut in range(0, len(losses), 13):
        straight, first, second = make(), make(), make()
        for step, loss in enumerate(losses):
            if step == cut:
                second.load_state_dict(first.state_dict())
            (first if step < cut else second).observe_train_loss(step, loss)
            straight.observe_train_loss(step, loss)
            if step % 50 == 0 and step < 600:
                (first if step < cut else second).observe_val_loss(step, loss)
                straight.observe_val_loss(step, loss)
        assert straight.unstable_step == 602
        assert second.state_dict() == straight.state_dict()


def test_the_record_is_plain_and_complete():
    stability = make()
    state = stability.state_dict()
    early = state.pop("early")
    assert early == {} and all(value is None or type(value) in (int, float, str) for value in state.values())
    assert state.keys() == vars(stability).keys() - {"rules", "_early"}
    with pytest.raises(ValueError, match="version"):
        stability.load_state_dict({"best": 1.0})


@pytest.mark.parametrize(
    "key, value", [("max_rise", 0), ("max_rise", math.nan), ("z_threshold", -1.0), ("z_steps", 0), ("max_skipped", -1)]
)
def test_a_senseless_setting_names_itself_and_what_to_give(key, value):
    [problem] = Section(StabilityRules).problems("stability", {**vars(make().rules), key: value})
    assert str(problem).startswith(f"stability.{key} is ") and "; give" in str(problem)
