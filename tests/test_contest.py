"""Contests: cases that were searched, and their differences from the case that each is compared with."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import experiment
from scripts.analysis import contest as module
from scripts.analysis.contest import contest_table, costs, targets
from scripts.analysis.runs import RecordedRun
from scripts.analysis.search import Axis, Found
from scripts.analysis.statistics import Difference
from scripts.command import UsageError
from scripts.experiments import horizon

LOSSES = {
    "adamw": 2.0,
    "unconstrained": 2.5,
    "all_stiefel": 2.6,
    "unconstrained_published": 3.0,
    "hetero_published": 2.7,
}


def fake(arm, steps, loss, seed):
    config = {"seed": seed, "assignment": {"name": arm.title()}, "global_batch_tokens": 1000}
    records = {"eval": [{"step": int(steps), "loss": loss}], "end": [{"step": int(steps)}]}
    return RecordedRun(Path("nowhere"), config, records, {}, {}, {"arm": arm, "max_steps": steps})


@pytest.fixture
def contest():
    """Two seeds, the second .2 worse in all cases; with four times the steps all losses are 1 lower."""
    words = ["arm=" + ",".join(LOSSES), "max_steps=250,1000"]
    found = experiment.study_of(experiment.load_experiment("horizon"), words)[0]
    for arm in LOSSES:
        for steps in ("250", "1000"):
            axes = [Axis("optim.matrices.lr", 0.05)]
            found.found[arm, steps] = Found(axes, tried={(Fraction(i),): abs(i + 0.5) for i in (0, -1)})
    losses = {(arm, steps): loss - (steps == "1000") for arm, loss in LOSSES.items() for steps in ("250", "1000")}
    groups = [[fake(*key, loss + 0.2 * seed, seed) for seed in (1, 2)] for key, loss in losses.items()]
    return replace(found, groups=groups)


def test_each_arm_is_compared_with_unconstrained_under_its_own_step_rule(contest):
    table = contest_table(contest, horizon.COLUMNS, {"Unconstrained": horizon.baseline})
    found = {tuple(line[:2]): dict(zip(table.headings, line)) for line in table.lines}
    apart = {arm: found["250", arm]["minus Unconstrained"].split(" ")[0] for arm in LOSSES}
    ours = {"adamw": "-0.500", "unconstrained": "", "all_stiefel": "+0.100"}
    assert apart == ours | {"unconstrained_published": "", "hetero_published": "-0.300"}
    line = found["1000", "all_stiefel"]
    assert line["minus Unconstrained"] == "+0.100 [+0.100, +0.100]" and line["seeds"] == "2"
    assert line["val loss"] == "1.9000 ± 0.1000" and line["best settings"] == "lr 0.05 (edge)"


def test_the_curves_are_those_of_adamw_and_our_step_rule(contest):
    found = horizon.curves(contest)
    assert found.keys() == {"AdamW", "All-Stiefel"}
    assert {tokens: d.mean for tokens, d in found["AdamW"].items()} == pytest.approx({250e3: -0.5, 1e6: -0.5})
    assert all(isinstance(d, Difference) and d.count == 2 for d in found["All-Stiefel"].values())


def test_the_curves_of_published_arms_alone_are_theirs(contest):
    contest.axes["arm"] = [arm for arm in LOSSES if arm.endswith("_published")]
    contest.groups = [runs for runs in contest.groups if runs[0].case["arm"] in contest.axes["arm"]]
    found = horizon.curves(contest)
    assert found.keys() == {"Hetero"} and found["Hetero"][250e3].mean == pytest.approx(-0.3)


def row(arm, steps, seed, loss, unstable=None):
    """A row of a table.json."""
    return {"arm": arm, "max_steps": steps, "seed": seed, "val_loss": loss, "unstable_step": unstable}


def test_a_case_is_compared_with_one_of_an_earlier_table(contest, tmp_path):
    contest.groups = [runs for runs in contest.groups if runs[0].case["arm"] != "unconstrained"]
    for steps in ("250", "1000"):
        rows = [row("unconstrained", steps, seed, 2.0 + 0.2 * seed) for seed in (1, 2)]
        (tmp_path / f"{steps}.json").write_text(json.dumps({"rows": rows}))
    contest.options["earlier"] = f"{tmp_path}/250.json,{tmp_path}/1000.json"
    table = contest_table(contest, horizon.COLUMNS, {"Unconstrained": horizon.baseline})
    found = {tuple(line[:2]): line[-1] for line in table.lines}
    assert found["250", "all_stiefel"] == "+0.600 [+0.600, +0.600]"
    assert found["1000", "all_stiefel"] == "-0.400 [-0.400, -0.400]"
    assert ("250", "unconstrained") not in found


def test_the_curves_go_on_from_an_earlier_table(contest, tmp_path):
    rows = [row("unconstrained", "50", seed, 4.0 + 0.1 * seed) for seed in (1, 2)]
    rows += [row("adamw", "50", seed, 4.3 + 0.1 * seed) for seed in (1, 2)]
    rows += [row("all_stiefel", "50", 1, 4.1), row("all_stiefel", "50", 2, None, unstable=7)]
    contest.options["earlier"] = str(tmp_path / "table.json")
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows}))
    found = horizon.curves(contest)
    assert {n: d.mean for n, d in found["AdamW"].items()} == pytest.approx({50e3: 0.3, 250e3: -0.5, 1e6: -0.5})
    assert list(found["All-Stiefel"]) == [250e3, 1e6]
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows, "overrides": ["model.n_embd=256"]}))
    with pytest.raises(
        UsageError, match=r"cannot be compared: only one of the two commands has model.n_embd=256; give both the same"
    ):
        horizon.curves(contest)
    words = ["logger.mode=offline", "log.interval=9", "probe.interval=null"]
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows, "overrides": words}))
    assert horizon.curves(contest) == found
    for content in ("[]", '{"rows": [{}]}', "x"):
        (tmp_path / "table.json").write_text(content)
        with pytest.raises(UsageError, match=r"table.json is not the table.json of another command"):
            horizon.curves(contest)


def test_an_arm_with_an_unstable_run_has_no_difference_and_sets_no_target(contest):
    assert targets(contest, "unconstrained") == pytest.approx({"250": 2.8, "1000": 1.8})
    for runs in contest.groups:
        if runs[0].case == {"arm": "unconstrained", "max_steps": "250"}:
            runs[0].records["event"] = [{"step": 5, "event": "unstable"}]
            for r in runs:
                del r.records["eval"]  # it ended before its first evaluation
    assert list(horizon.curves(contest)["All-Stiefel"]) == [1_000_000]
    assert targets(contest, "unconstrained") == pytest.approx({"1000": 1.8})


def test_a_step_that_fails_costs_only_its_own_numbers(contest, monkeypatch):
    """All training is done by then, so the table has to be written."""
    training = SimpleNamespace(optimizers=SimpleNamespace(state_bytes=lambda: {"Muon": 4.0}), step=None)
    small = SimpleNamespace(micro_batch_size=1, global_batch_tokens=1)
    monkeypatch.setattr(module, "settings_of", lambda config: small)
    monkeypatch.setattr(module, "RandomTraining", lambda *_: training)
    monkeypatch.setattr(module, "take_turns", lambda calls, **_: {name: [0.5] * (name != "adamw") for name in calls})
    found = costs(contest, "arm")
    assert found.keys() == LOSSES.keys() and found["unconstrained"] == {"ms_per_step": 500.0, "state_bytes": 4.0}
    assert all(map(math.isnan, found["adamw"].values()))


def test_the_time_to_a_target_is_its_steps_times_the_time_of_one(contest):
    cost = {"ms_per_step": 20.0, "state_bytes": 4.0}
    contest.facts.update(targets={"250": 2.5}, costs=dict.fromkeys(LOSSES, cost))
    columns = module.cost_columns(contest, "unconstrained")
    for steps, loss, expected in (("250", 2.0, [125, 2.5]), ("250", 2.7, [None, None]), ("1000", 2.0, [None, None])):
        run = fake("adamw", steps, loss, 1)
        run.records["eval"].insert(0, {"step": 0, "loss": 3.0})
        assert [column.value(run) for column in columns] == [*expected, 20.0, 4.0]


def test_an_own_unstable_case_is_not_replaced_by_an_earlier_one(contest, tmp_path):
    for runs in contest.groups:
        if runs[0].case == {"arm": "unconstrained", "max_steps": "250"}:
            runs[0].records["event"] = [{"step": 5, "event": "unstable"}]
    rows = [row("unconstrained", "250", seed, 2.0) for seed in (1, 2)]
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows}))
    contest.options["earlier"] = f"{tmp_path}/table.json"
    table = contest_table(contest, horizon.COLUMNS, {"Unconstrained": horizon.baseline})
    found = {tuple(line[:2]): line[-1] for line in table.lines}
    assert found["250", "all_stiefel"] == "" and found["1000", "all_stiefel"] != ""


def test_a_table_of_other_data_is_refused(contest, tmp_path):
    (tmp_path / "table.json").write_text(json.dumps({"rows": [], "overrides": ["data.dir=elsewhere"]}))
    contest.options["earlier"] = f"{tmp_path}/table.json"
    with pytest.raises(UsageError, match=r"has data\.dir=elsewhere; give both the same"):
        horizon.curves(contest)
