"""What the runs of a case amount to: steps to a loss, best rates, means and errors, the best against the best, the verdict."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import experiment
from scripts.analysis import conduct
from scripts.analysis.runs import RecordedRun
from scripts.analysis.statistics import Estimate, best_rate
from scripts.analysis.study import best_of, pivot
from scripts.analysis.tables import cell
from scripts.command import UsageError
from scripts.experiments import crossing, mechanism, solver_sweep, stream_dtype


def fake(assignment="hetero", seed=1, losses=((0, 5.0), (10, 3.0), (20, 2.0)), unstable=None, **case):
    """A run with such evaluations."""
    found = {"eval": [{"step": s, "loss": x} for s, x in losses], "end": [{"step": losses[-1][0]}]}
    if unstable is not None:
        found["event"] = [{"step": unstable, "event": "unstable"}]
    config = {"assignment": {"name": assignment}, "residual": {"rule": "geonorm"}, "seed": seed}
    return RecordedRun(Path("nowhere"), config, found, {}, {}, {"assignment": assignment, **case})


def study(name, *arguments):
    """A study as the command line asks for it."""
    return experiment.study_of(experiment.load_experiment(name), arguments)[0]


def test_steps_to_a_target_loss():
    assert fake().steps_to(4.0) == pytest.approx(5)
    assert fake().steps_to(2.5) == pytest.approx(15)
    assert fake().steps_to(5.5) == 0 and fake().steps_to(1.0) is None
    assert fake(losses=((0, 5.0), (10, math.inf), (20, 2.0))).steps_to(3.0) == 20


def test_the_whole_split_counts_at_the_last_evaluation_only():
    run = fake(losses=((0, 5.0), (10, 3.0)))
    run.records["full_eval"] = [{"step": 10, "loss": 3.1}]
    assert run.held_out == 3.1
    run.records["eval"].append({"step": 15, "loss": 2.5})  # the run goes on
    assert run.held_out == 2.5


def test_the_target_is_one_that_every_stable_case_reaches():
    groups = [
        [fake(), fake(losses=((0, 5.0), (10, 2.111)))],
        [fake(losses=((0, 5.0), (10, 4.9)), unstable=10)],
        [fake(losses=((0, 5.0), (10, math.nan)))],
    ]
    asked = replace(study("crossing"), groups=groups)
    target = crossing.target(asked)["target"]
    assert target == pytest.approx(2.12)
    assert all(r.steps_to(target) is not None for r in groups[0])
    assert [all(r.stable for r in group) for group in groups] == [True, False, False]
    assert crossing.target(study("crossing", "target=3.5"))["target"] == 3.5


def test_optimum_of_a_parabola_is_exact():
    curve = {r: [3 + math.log(r / 0.013) ** 2] for r in (0.004, 0.01, 0.02, 0.05)}
    rate, loss, at_end = best_rate(curve)
    assert rate == pytest.approx(0.013) and loss == pytest.approx(3) and not at_end
    assert best_rate({0.1: [2.0], 0.2: [1.0]}) == (0.2, 1.0, True)
    assert best_rate({0.1: [2.0], 0.2: [1.0], 0.3: [math.inf]}) == (0.2, 1.0, True)


def test_means_and_errors():
    assert Estimate.of([2.0, 2.3, 2.6]).text(2) == "2.30 ± 0.17" and Estimate.of([2.0]).text(3) == "2.000"
    assert Estimate.of([1.0, math.inf]).text(1) == "inf ± nan" and Estimate.of([0.5]).text(2, "+") == "+0.50"


def test_best_is_compared_with_best_among_the_stable():
    rate = "optim.muon.lr"
    losses = {("0.01", 1): 2.0, ("0.01", 2): 2.2, ("0.02", 1): 1.9, ("0.02", 2): 1.9}
    runs = [
        fake(
            "hetero", seed, ((0, 5.0), (9, loss)), 5 if (lr, seed) == ("0.02", 2) else None, optim="paper", **{rate: lr}
        )
        for (lr, seed), loss in losses.items()
    ]
    asked = replace(study("solver_sweep", f"{rate}=0.01,0.02,0.05"), groups=[runs[:2], runs[2:]])
    assert best_of(asked, rate, assignment="hetero", optim="paper")[0] == "0.01"
    assert best_of(asked, rate, assignment="hetero", optim="manifold_muon") is None
    table = pivot(asked, rate, "lr")
    assert table.headings == ["assignment", "optim", "lr 0.01", "lr 0.02", "lr 0.05"]
    assert table.lines == [["hetero", "paper", "2.100 ± 0.100", "1.900 ± 0.000 (1 of 2 unstable)", "not run"]]


def test_gains_are_paired_by_seed():
    rate = "optim.muon.lr"
    losses = {("paper", 1): 2.0, ("paper", 2): 2.2, ("manifold_muon", 1): 1.9, ("manifold_muon", 2): 1.9}
    runs = [
        fake("hetero", seed, ((0, 5.0), (9, loss)), optim=optim, **{rate: "0.01"})
        for (optim, seed), loss in losses.items()
    ]
    asked = replace(study("solver_sweep", f"{rate}=0.01", "assignment=hetero"), groups=[runs[:2], runs[2:]])
    assert solver_sweep.tables(asked)[1].lines[0][-1] == "-0.200 [-1.471, +1.071]"
    assert solver_sweep.tables(replace(asked, groups=[runs[:1], runs[2:3]]))[1].lines[0][-1] == "-0.100"
    assert solver_sweep.tables(replace(asked, groups=[runs[:1], runs[3:]]))[1].lines[0][-1] == ""


def test_without_a_stable_case_there_is_no_target():
    asked = study("crossing", "assignment=hetero", "residual=pre_norm")
    asked.groups = [[fake("hetero", 1, ((0, 5.0), (9, 2.0)), 5)]]
    asked.facts = crossing.target(asked)
    assert asked.facts == {"target": None} and not any("steps to" in c.heading for c in crossing.columns(asked))
    for wrong in ("-1.0", "inf"):
        with pytest.raises(UsageError, match="is no loss"):
            crossing.EXPERIMENT.check(study("crossing", f"target={wrong}"))


def test_runs_that_have_not_ended_are_named_below_the_table():
    asked = replace(study("crossing"), groups=[[fake()]], missing=[f"hetero, seed {i}" for i in range(7)])
    assert conduct._missing(asked) == (
        "7 of 8 runs have not ended and are left out: hetero, seed 0; hetero, seed 1; hetero, seed 2; hetero, seed 3; hetero, seed 4; and others."
    )


def test_a_number_of_all_runs_has_no_error():
    assert cell([90.0, 90.0, 90.0], 1) == "90.0" and cell([1.0, 3.0], 1) == "2.0 ± 1.0"
    assert cell([90.0, None, 90.0], 0) == "90 (2 of 3)"


def test_what_a_stream_changes_is_said_of_the_seeds_that_both_have():
    """The first seed of float32 failed."""
    found = {("float32", 2): 2.0, ("bfloat16", 1): 5.0, ("bfloat16", 2): 2.25}
    runs = {
        key: fake("hetero", key[1], ((0, 5.0), (9, loss)), dtype="float32", **{stream_dtype.STREAM: key[0]})
        for key, loss in found.items()
    }
    asked = replace(study("stream_dtype", "seeds=1,2"), groups=[[r] for r in runs.values()])
    assert "by +2.5e-01 nats" in stream_dtype.difference(asked)
    assert stream_dtype.difference(replace(asked, groups=asked.groups[:2])) == ""


def test_the_verdict_names_what_restored_attention():
    asked = study("mechanism", "assignment=hetero", "remedy=none,qk_norm,decay,norm_cap")
    shares = {"none": [0.5], "qk_norm": [0.01, 0.02], "decay": [0.01, 0.3], "norm_cap": [0.01]}
    asked.groups = [
        [replace(fake(remedy=name), records={"probe": [{"greatest_saturation": x}]}) for x in found]
        for name, found in shares.items()
    ]
    asked.groups[-1][0].records["event"] = [{"step": 5, "event": "unstable"}]
    said = mechanism.verdict(asked)
    assert "hetero: attention was restored by qk_norm; not, or not with every seed, by decay, norm_cap." in said
