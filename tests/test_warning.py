"""The early warning: before a planted failure, not on healthy runs, once; and stopping an unstable run."""

import math
import random

import pytest
from conftest import ROOT

from train import train
from training.config import compose
from training.fields import Section
from training.log import read_records
from training.stability import Stability, StabilityRules
from training.warning import EarlyWarning, WarningRules, crossing

SETTINGS = {"logit": 100.0, "horizon": 100, "probes": 5, "entropy": 0.1}


def stability(**changes):
    rest = {"on_unstable": "mark", "max_skipped": None, "warning": None}
    return Stability(StabilityRules(**{"max_rise": 0.5, "z_threshold": None, "z_steps": 5, **rest, **changes}))


def seen(logit, norm=None, entropy=0.9):
    return {"largest_logit": logit, "largest_qk_norm": logit / 10 if norm is None else norm, "least_entropy": entropy}


def first_alarm(warning, curve, steps, every=10):
    """Step and alarm of the first warning while a curve step → summary is probed."""
    for step in range(0, steps + 1, every):
        if alarm := warning.observe(step, curve(step)):
            return step, alarm
    return None, None


def test_the_crossing_of_a_line():
    assert crossing([0, 10, 20], [1.0, 2.0, 3.0], 10.0) == pytest.approx(90)
    assert crossing([0, 10, 20], [3.0, 2.0, 1.0], 10.0) == math.inf
    assert crossing([0, 10, 20], [1.0, 1.0, 1.0], 10.0) == math.inf
    assert crossing([0, 10, 20], [1.0, math.nan, 3.0], 10.0) == math.inf


def test_a_planted_failure_is_foreseen_to_the_step():
    """Singular values that grow linearly make the logit grow with the square: 100 at step 500 exactly."""
    step, alarm = first_alarm(EarlyWarning(WarningRules(**SETTINGS)), lambda s: seen((10 * s / 500) ** 2), 600)
    assert step == 400 and alarm.expected_step == 500 and alarm.lead == 100
    assert "step 500, in 100 steps" in alarm.message


def test_what_is_expected_is_never_past():
    warning = EarlyWarning(WarningRules(**{**SETTINGS, "probes": 3}))
    alarms = [warning.observe(step, seen(logit)) for step, logit in ((100, 25.0), (200, 72.25), (300, 98.0))]
    assert alarms[:2] == [None, None] and alarms[2].expected_step == 300 and "in 0 steps" in alarms[2].message


def test_noise_moves_the_forecast_by_little():
    rng = random.Random(0)
    for _ in range(20):
        curve = {s: seen((10 * s / 500) ** 2 * math.exp(rng.gauss(0, 0.02))) for s in range(0, 601, 10)}
        step, alarm = first_alarm(EarlyWarning(WarningRules(**SETTINGS)), curve.__getitem__, 600)
        assert 300 <= step <= 450 and abs(alarm.expected_step - 500) < 100


@pytest.mark.parametrize(
    "curve",
    [
        lambda s: seen(20.0),
        lambda s: seen(15 * (1 - math.exp(-s / 40))),  # grows and levels off
        lambda s: seen(60 - s / 100),
        lambda s: seen(20 + 10 * (s == 300)),  # a spike in one probe, with nothing behind it
        lambda s: seen(0.25 + s / 400),
    ],
)
def test_healthy_curves_are_let_alone(curve):
    assert first_alarm(EarlyWarning(WarningRules(**SETTINGS)), curve, 2000) == (None, None)


def test_logits_that_grow_without_their_weights_are_not_extrapolated():
    warning = EarlyWarning(WarningRules(**SETTINGS))
    assert first_alarm(warning, lambda s: seen(min(90.0, s / 5), norm=2.0), 480) == (None, None)


def test_collapse_is_told_at_once_and_once():
    for curve in (lambda s: seen(5.0, entropy=0.05 if s >= 30 else 0.9), lambda s: seen(120.0 if s >= 30 else 5.0)):
        warning = EarlyWarning(WarningRules(**SETTINGS))
        step, alarm = first_alarm(warning, curve, 100)
        assert step == 30 and alarm.lead == 0
        assert warning.observe(40, curve(40)) is None and warning.warned_step == 30
    assert EarlyWarning(WarningRules(**SETTINGS)).observe(0, seen(math.nan, entropy=math.nan)) is not None
    one_position = seen(5.0, entropy=math.nan)  # a context of one token has no entropy
    assert EarlyWarning(WarningRules(**SETTINGS)).observe(0, one_position) is None


def test_a_warning_taken_over_goes_on_as_if_never_interrupted():
    def curve(step):
        return seen((10 * step / 500) ** 2)

    for cut in range(0, 600, 70):
        first, second = (stability(warning=WarningRules(**SETTINGS)) for _ in range(2))
        told = []
        for step in range(0, 600, 10):
            current = first if step < cut else second
            if step >= cut and step - 10 < cut:
                second.load_state_dict(first.state_dict())
            told.append(current.observe_probe(step, curve(step)))
        assert [i * 10 for i, alarm in enumerate(told) if alarm] == [400]


@pytest.mark.parametrize(("key", "value"), [("logit", 0), ("probes", 2), ("horizon", 0), ("entropy", 1.0)])
def test_a_senseless_setting_names_itself_and_what_to_give(key, value):
    [problem] = Section(WarningRules).problems("stability.warning", {**SETTINGS, key: value})
    assert str(problem).startswith(f"stability.warning.{key} is {value}; give")


# ---- the record of stability ----


def test_the_lead_is_told_when_both_came_in_this_order():
    early = stability(warning=WarningRules(**SETTINGS))
    assert early.lead is None
    early.observe_probe(0, seen(500.0))
    assert early.lead is None
    early.observe_val_loss(10, 2.0)
    early.observe_val_loss(120, 3.0)
    assert early.lead == 120
    late = stability(warning=WarningRules(**SETTINGS))
    late.observe_nonfinite(5, "loss")
    late.observe_probe(10, seen(500.0))
    assert late.lead is None


def test_on_unstable():
    marked, stopped = stability(on_unstable="mark"), stability(on_unstable="stop")
    for record in (marked, stopped):
        assert not record.stopped
        record.observe_nonfinite(5, "loss")
    assert stopped.stopped and not marked.stopped
    [problem] = Section(StabilityRules).problems("stability", {**vars(marked.rules), "on_unstable": "halt"})
    assert str(problem) == "stability.on_unstable is 'halt'; choose mark or stop"


# ---- in training ----

# DGram on everything, no decay, and steps far too long: logits grow until the loss breaks.
PLANTED = (
    "assignment=all_dgram",
    "optim=manifold_muon",
    "optim.muon.lr=1.0",
    "optim.muon.weight_decay=0",
    "optim.adamw.lr=0.1",
)
PROBED = ("probe.interval=1", "eval_interval=1", "stability.warning.horizon=10", "stability.warning.probes=3")


def test_a_run_driven_to_failure_is_warned_of_first_and_stopped(tiny, tmp_path):
    ending = ("max_steps=60", "schedule=constant", "stability.on_unstable=stop", "stability.max_rise=0.3")
    overrides = [*tiny, *PLANTED, *PROBED, *ending, "log.interval=100"]
    train(compose(overrides))
    events = {e["event"]: e for e in read_records(tmp_path / "run", "event")}
    assert events["warning"]["step"] < events["unstable"]["step"]
    assert events["unstable"]["lead"] == events["unstable"]["step"] - events["warning"]["step"]
    [end] = read_records(tmp_path / "run", "end")
    assert end["step"] <= events["unstable"]["step"] + 1 < 60 and end["warning_lead"] == events["unstable"]["lead"]
    assert end["train_seconds"] > 0 and not list(read_records(tmp_path / "run", "train"))  # it ends between two records
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    train(compose([*overrides, "resume=auto"]))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_the_demonstration_runs_on_record_were_not_warned_of():
    runs = sorted((ROOT / "tests" / "oracles" / "healthy").glob("*.jsonl"))
    assert len(runs) == 10
    settings = compose([]).stability.warning
    for path in runs:
        records = list(read_records(path, "probe"))
        warning = EarlyWarning(settings)
        assert len(records) > 5 and not any(warning.observe(r["step"], r) for r in records), path.name


def test_a_warning_at_the_step_of_the_instability_has_no_lead():
    same = stability(warning=WarningRules(**SETTINGS))
    same.observe_probe(10, seen(500.0))
    same.observe_nonfinite(10, "loss")
    assert same.lead == 0
