"""The best rate seed by seed, axes that are extended, and the number of steps that a race needs."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.shards import Split
from model.gpt import GPT, GPTConfig
from scripts.analysis import conduct, optima, speed_up, study
from scripts.analysis.optima import further_cases, optimum_table, seed_slopes, slope_table
from scripts.analysis.runs import RecordedRun
from scripts.analysis.speed_up import Race, context_table, speed_table, steps_needed
from scripts.experiments import lr_transfer, ngpt_speed
from training.config import compose
from training.jobs import Job

RATE, WIDTH = "optim.adamw.lr", "model.n_embd"
AXES = {WIDTH: ["32", "64"], RATE: ["0.01", "0.02"]}


def fake(loss, seed=1, **case):
    """A run with this final loss, whose names of axes have dots."""
    return RecordedRun(Path("nowhere"), {"seed": seed}, {"eval": [{"step": 9, "loss": loss}]}, {}, {}, case)


def asked(experiment, axes, around, runs, **facts):
    """A study of an experiment whose runs have ended."""
    found = study.Study(experiment, axes, around, ["1", "2", "3"], dict(experiment.all_options), [], facts=facts)
    return replace(found, groups=[[r] for r in runs])


# ---- an axis that is extended ----


def row(losses, seed=1, width="32"):
    return [fake(loss, seed, **{WIDTH: width, RATE: rate}) for rate, loss in losses.items()]


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [
        ({"0.01": 2.0, "0.02": 1.0, "0.04": 1.5}, []),
        ({"0.01": 1.0, "0.02": 2.0}, ["0.005"]),
        ({"0.01": 3.0, "0.02": 2.0, "0.06": 1.0}, ["0.18"]),
        ({"0.01": math.inf, "0.02": math.inf}, ["0.005"]),
        ({"0.02": 1.0, "0.04": math.inf, "0.01": 1.5}, ["0.0283"]),
        ({"0.01": 1.0, "0.04": math.inf}, ["0.0025", "0.02"]),
        ({"0.01": 1.0}, ["0.005", "0.02"]),
    ],
)
def test_an_end_asks_for_the_next_value(losses, wanted):
    assert [case[RATE] for case in further_cases(row(losses), RATE, AXES)] == wanted


def test_every_row_and_seed_asks_for_itself():
    runs = [*row({"0.01": 1.0, "0.02": 2.0}), *row({"0.01": 2.0, "0.02": 1.0}, seed=2)]
    runs += row({"0.01": 2.0, "0.02": 1.0}, width="64")
    found = [(case[WIDTH], case[RATE]) for case in further_cases(runs, RATE, AXES)]
    assert found == [("32", "0.005"), ("32", "0.04"), ("64", "0.04")]


def test_an_experiment_is_extended_until_no_best_rate_is_at_an_end(monkeypatch, tmp_path):
    experiment = study.Experiment("?", axes={WIDTH: "32,64", RATE: "0.01,0.02"}, extended=RATE, seeds="1,2")
    best, jobs = {"32": 0.09, "64": 0.015}, []

    def run_all(wanted, workers, launcher):
        jobs.append(len(wanted))
        return {}

    def read_run(directory):
        case = dict(part.split("=") for part in directory.name.split(","))
        loss = abs(math.log(float(case[RATE]) / best[case[WIDTH]]))
        return RecordedRun(directory, {"seed": int(case["seed"])}, {"eval": [{"step": 1, "loss": loss}]}, {}, {})

    monkeypatch.setattr(conduct, "run_all", run_all)
    monkeypatch.setattr(conduct, "read_run", read_run)
    monkeypatch.setattr(Job, "ended", True)
    monkeypatch.setattr(conduct, "compose", lambda overrides: None)
    monkeypatch.setattr(conduct, "check", lambda cfg: None)
    axes = {WIDTH: ["32", "64"], RATE: ["0.01", "0.02"]}
    found = study.Study(experiment, axes, {}, ["1", "2"], dict(experiment.all_options), [])
    conduct.Conductor(found, tmp_path, 1).run()
    tried = {width: [float(r.case[RATE]) for r in found.runs if r.case[WIDTH] == width] for width in best}
    assert set(tried["32"]) == {0.01, 0.02, 0.04, 0.08, 0.16} and set(tried["64"]) == {0.01, 0.02, 0.04}
    assert jobs[0] == 8 and sum(jobs) == len(found.runs) == 2 * 8
    bounded = study.Study(experiment, axes, {}, ["1"], {"extensions": 1}, [])
    conduct.Conductor(bounded, tmp_path, 1).run()
    assert {r.case[RATE] for r in bounded.runs if r.case[WIDTH] == "32"} == {"0.01", "0.02", "0.04"}


def test_an_extension_runs_no_case_a_second_time(monkeypatch, tmp_path):
    """Where a run is missing, a seed has its best rate at the end of the others, and asks for a rate of the experiment's own."""
    experiment = study.Experiment("?", axes={RATE: "0.01,0.02,0.04"}, extended=RATE, seeds="1,2")
    missing = "seed=2" + "," + f"{RATE}=0.04"

    def read_run(directory):
        case = dict(part.split("=") for part in directory.name.split(","))
        loss = abs(math.log(float(case[RATE]) / 0.03))
        return RecordedRun(directory, {"seed": int(case["seed"])}, {"eval": [{"step": 1, "loss": loss}]}, {}, {})

    def ended(job):
        return not all(part in job.directory.name for part in missing.split(","))

    monkeypatch.setattr(conduct, "run_all", lambda *_: {})
    monkeypatch.setattr(conduct, "read_run", read_run)
    monkeypatch.setattr(Job, "ended", property(ended))
    monkeypatch.setattr(conduct, "compose", lambda overrides: None)
    monkeypatch.setattr(conduct, "check", lambda cfg: None)
    found = study.Study(experiment, {RATE: ["0.01", "0.02", "0.04"]}, {}, ["1", "2"], dict(experiment.all_options), [])
    conduct.Conductor(found, tmp_path, 0).run()
    assert sorted((r.case[RATE], r.config["seed"]) for r in found.runs).count(("0.04", 1)) == 1
    assert found.missing[0] == f"{RATE}=0.04, seed=2"


# ---- slopes ----


def test_the_slope_is_that_of_the_seeds():
    optimum = {"32": 6.0, "64": 5.5, "128": 5.0}
    found = seed_slopes({size: {seed: (o * seed, 2.0, False) for seed in (1, 2)} for size, o in optimum.items()})
    assert found == pytest.approx({1: -0.5, 2: -1.0})
    assert seed_slopes({"32": {1: (6.0, 2.0, False)}}) == {}
    ends = {"2": {1: (1.0, 2.0, True), 2: (1.0, 2.0, False)}, "4": {1: (3.0, 2.0, False), 2: (3.0, 2.0, False)}}
    assert list(seed_slopes(ends)) == [2]  # the first seed's best rate is at an end


def test_the_tables_of_the_best_rates():
    """Parabolas whose optimum falls by an octave when the width doubles, and a tenth of an octave lower with each seed."""
    home, runs = {WIDTH: "64", "model.n_layer": "4", "max_steps": "200"}, []
    for width in ("32", "64", "128"):
        for seed in (1, 2, 3):
            for rate in ("0.00125", "0.0025", "0.005", "0.01", "0.02", "0.04"):
                away = math.log2(float(rate) / 0.01 * float(width) / 64) + 0.1 * seed * math.log2(float(width) / 32)
                runs.append(fake(2 + away**2, seed, **{**home, "arm": "gpt", WIDTH: width, RATE: rate}))
    axes = {"arm": ["gpt"], WIDTH: ["32", "64", "128"], "model.n_layer": ["4"], "max_steps": ["200"], RATE: ["0.01"]}
    about = asked(lr_transfer.EXPERIMENT, axes, home, runs), RATE, lr_transfer.MODELS, lr_transfer.SIZES
    assert slope_table(*about).lines[0] == ["GPT", "width", "-1.20 ± 0.06", "[-1.45, -0.95]", "3"]
    assert slope_table(*about).lines[1] == ["GPT", "depth", "not known", "", "0"]
    lines = optimum_table(*about).lines
    assert lines[0] == ["GPT", "width", "32", "0.0200", "+1.20 ± 0.06", "2.0000 ± 0.0000"]
    assert lines[1][3:5] == [f"{0.01 * 2**-0.2:.4f}", "+0.00 ± 0.00"]


def test_the_table_of_the_best_rates_counts_the_seeds_at_an_end():
    home, rates = {WIDTH: "64", "model.n_layer": "4", "max_steps": "200"}, ["0.01", "0.02", "0.04"]
    losses = {1: (1.0, 2.0, 3.0), 2: (2.0, 1.0, 2.0)}
    runs = [
        fake(loss, seed, arm="gpt", **{**home, RATE: rate})
        for seed in losses
        for rate, loss in zip(rates, losses[seed])
    ]
    axes = {"arm": ["gpt"], **{axis: [value] for axis, value in home.items()}, RATE: rates}
    found = asked(lr_transfer.EXPERIMENT, axes, home, runs)
    best = optimum_table(found, RATE, lr_transfer.MODELS, lr_transfer.SIZES).lines[0][3]
    assert best == "0.0141 (an end of the stable rates with 1 of 2 seeds)"


# ---- a race ----


def test_steps_needed_are_read_between_finished_lengths():
    losses = {50: 3.0, 100: 2.5, 200: 2.0}
    assert steps_needed(losses, 2.25) == (pytest.approx(100 * 2**0.5), "")
    assert steps_needed(losses, 2.0) == (pytest.approx(200), "") and steps_needed(losses, 3.0) == (50, "")
    assert steps_needed(losses, 3.5) == (50, "<") and steps_needed(losses, 1.9) == (200, ">")
    assert steps_needed({50: math.inf, 100: 2.5}, 2.6) == (100, "<")


def test_the_tables_of_a_race():
    context = ngpt_speed.CONTEXT
    race, runs = Race("GPT", "nGPT", context), []
    for at, target in (("256", 2.25), ("1024", 3.5)):
        for seed in (1, 2):
            runs.append(fake(target, seed, arm="GPT", max_steps="200", **{context: at}))
            for steps, loss in (("50", 3.0), ("100", 2.5), ("200", 2.0)):
                runs.append(fake(loss, seed, arm="nGPT", max_steps=steps, **{context: at}))
    runs += [
        replace(r, config={"seed": 3}) for r in runs[:4]
    ]  # a third seed at the first context, whose slow run diverges
    runs[-4] = replace(runs[-4], records={"eval": [{"step": 9, "loss": math.nan}]})
    axes = {"arm": ["GPT", "nGPT"], context: ["256", "1024"], "max_steps": ["50", "100", "200"]}
    costs = {f"{arm}, {at}": {"ms_per_step": ms} for arm, ms in (("GPT", 10.0), ("nGPT", 20.0)) for at in axes[context]}
    beyond = [{**runs[0].case, "multiple": m, "loss": loss} for m, loss in ((1, 3.0), (1, None), (2, 4.0))]
    found = asked(ngpt_speed.EXPERIMENT, axes, {}, runs, costs=costs, beyond=beyond)
    found.groups = list(found.grouped(*axes).values())
    table = speed_table(found, race)
    assert table.lines[0][:2] == ["256", "2.250 ± 0.000 (1 of 3 unstable)"] and table.lines[0][5:] == [
        *("2", "141 ± 0", "1.41 ± 0.00", "10.0", "20.0", "0.71 ± 0.00"),
    ]
    assert table.lines[1][5:] == ["2", "<50", ">4.00", "10.0", "20.0", ">2.00"]
    assert context_table(found, race).lines == [["256", "GPT", "3.000 (1 of 2)", "4.000", ""]]
    assert [title for title, _ in race.longest(found, "nGPT")] == ["nGPT, context 256", "nGPT, context 1024"]


def test_a_bound_of_the_steps_is_the_opposite_bound_of_the_speed():
    context, runs = ngpt_speed.CONTEXT, []
    for seed, target in ((1, 2.25), (2, 1.9)):
        runs.append(fake(target, seed, arm="GPT", max_steps="200", **{context: "256"}))
        for steps, loss in (("100", 2.5), ("200", 2.0)):
            runs.append(fake(loss, seed, arm="nGPT", max_steps=steps, **{context: "256"}))
    axes = {"arm": ["GPT", "nGPT"], context: ["256"], "max_steps": ["100", "200"]}
    costs = {"GPT, 256": {"ms_per_step": 10.0}, "nGPT, 256": {"ms_per_step": 20.0}}
    [line] = speed_table(asked(ngpt_speed.EXPERIMENT, axes, {}, runs, costs=costs), ngpt_speed.RACE).lines
    assert line[4:] == ["2", "141, >200", "1.41, <1.00", "10.0", "20.0", "0.71, <0.50"]


@pytest.mark.parametrize("rope", [True, False])
def test_all_lengths_of_windows_have_the_same_targets(monkeypatch, tmp_path, rope):
    model = GPT(GPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=1, n_embd=8, rope=rope))
    cfg = compose(["data=stdlib", "global_batch_tokens=16", "micro_batch_size=1"])
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "text")
    text, read = Split(tmp_path, (SimpleNamespace(file="text", tokens=1000),)), {}

    def measure(model, windows, token_bytes):
        assert windows.shape[1] == model.config.block_size + 1 and model.separator == (3, False)
        assert (np.diff(windows.astype(int)) == 1).all()  # each is a piece of the text
        read[windows.shape[1] - 1] = np.sort(windows[:, 1:], axis=None)
        return SimpleNamespace(loss=float(windows.shape[1] - 1))

    monkeypatch.setattr(speed_up, "load_model", lambda directory: (model, cfg, None))
    monkeypatch.setattr(speed_up, "open_data", lambda cfg: SimpleNamespace(val=text))
    monkeypatch.setattr(speed_up, "separator_of", lambda cfg, dataset: (3, False))
    monkeypatch.setattr(speed_up, "measure", measure)
    context = ngpt_speed.CONTEXT
    runs = [
        fake(2.0, seed, arm="nGPT", max_steps=steps, **{context: "4"}) for seed in (1, 2) for steps in ("50", "100")
    ]
    axes = {"arm": ["GPT", "nGPT"], context: ["4"], "max_steps": ["50", "100"]}
    found = asked(ngpt_speed.EXPERIMENT, axes, {}, runs)
    lines = speed_up.losses_beyond(found, Race("GPT", "nGPT", context))
    lengths = [4, 8, 16] if rope else [4]
    assert [line["loss"] for line in lines] == 2 * lengths and [line["seed"] for line in lines[:: len(lengths)]] == [
        1,
        2,
    ]
    assert {line["max_steps"] for line in lines} == {"100"} and list(read) == lengths
    assert all(np.array_equal(read[4], targets) and len(set(targets)) == 256 for targets in read.values())


def test_losses_by_rate_of_an_unstable_run_are_infinite():
    broken = replace(fake(1.0, **{RATE: "0.1"}), records={"eval": [{"step": 9, "loss": math.nan}]})
    assert optima.losses_by([broken, fake(2.0, **{RATE: "0.1"})], RATE) == {0.1: [math.inf, 2.0]}
