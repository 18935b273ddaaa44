"""Branches and ends: where a run begins again, and that the last step has its measurements once."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_resume import state_of
from test_train import records

import train as module
from train import train
from training.checkpoint import Loaded
from training.config import compose
from training.job import plan_job
from training.log import METRICS_FILE
from training.resume import resumption


def test_a_run_that_ends_at_the_step_it_resumes_at_has_the_measurements_of_an_end(tiny, tmp_path):
    """And each once: what was due at that step anyway is not done again."""
    overrides = [o for o in tiny if not o.startswith(("max_steps", "full_eval", "checkpoint.", "log.interval_spectra"))]
    overrides += ["full_eval=true", "checkpoint.interval=5", "schedule.decay_steps=20", "log.interval_spectra=5"]
    for interval in (5, 7):
        run = [*overrides, f"eval_interval={interval}", f"output_dir={tmp_path}/{interval}"]
        train(compose([*run, "max_steps=8"]))
        shutil.rmtree(tmp_path / f"{interval}/checkpoints/step_00000008")
        metrics = tmp_path / f"{interval}/{METRICS_FILE}"
        kept = [line for line in metrics.read_text().splitlines(True) if json.loads(line)["kind"] != "end"]
        metrics.write_text("".join(kept))  # as if it had been killed
        train(compose([*run, "max_steps=5", "resume=auto", "allow_changes=true"]))
        found = [(r["kind"], r["step"]) for r in records(tmp_path / str(interval))]
        assert all(found.count((kind, 5)) == 1 for kind in ("eval", "full_eval", "end"))
        assert found.count(("spectra", 5)) == found.count(("spectra", 0)) > 0 and max(found)[1] == 5


def test_later_checkpoints_of_a_branch_that_was_left_are_gone_before_the_first_step(copied, monkeypatch):
    run, overrides = copied
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Run, "make_step", killed)
        train(compose([*overrides, f"resume={run}/checkpoints/step_00000005"]))
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000005"] and records(run)[-1]["step"] == 5
    train(compose([*overrides, "resume=auto"]))
    assert state_of(run)["step"] == 10 and [r["step"] for r in records(run, "train")] == list(range(1, 11))


def killed(*_):
    raise KeyboardInterrupt


def test_a_branch_that_dies_before_its_first_checkpoint_begins_again_where_it_began(copied, tmp_path, monkeypatch):
    run, overrides = copied
    begin = f"{run}/checkpoints/step_00000005"
    words = [*overrides[:-1], f"output_dir={tmp_path}/branch", "checkpoint.interval=100"]
    for resume in (f"resume={begin}", "resume=auto", "resume=auto"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module.Run, "make_step", killed)
            train(compose([*words, resume]))
    train(compose([*words, f"resume={begin}"]))  # the first command, given again
    assert [r["step"] for r in records(tmp_path / "branch", "train")] == list(range(6, 11))
    assert state_of(tmp_path / "branch")["step"] == 10


def test_the_command_of_a_branch_given_again_continues_it_and_loses_nothing(copied, tmp_path, monkeypatch):
    run, overrides = copied
    words = [*overrides[:-1], f"output_dir={tmp_path}/branch", f"resume={run}/checkpoints/step_00000005"]
    words += ["checkpoint.interval=2", "checkpoint.keep=9"]
    plain, steps = module.Run.make_step, []

    def until_nine(self, *args):
        steps.append(self.step)
        return killed() if self.step == 9 else plain(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Run, "make_step", until_nine)
        train(compose(words))
    before = {p.name for p in (tmp_path / "branch/checkpoints").iterdir()}
    assert before == {"step_00000006", "step_00000008"}
    for resume in spellings(words.pop(-3), tmp_path, monkeypatch):
        steps.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module.Run, "make_step", until_nine)
            train(compose([*words, resume]))
        assert steps == [8, 9] and {p.name for p in (tmp_path / "branch/checkpoints").iterdir()} == before
    train(compose([*words, resume]))
    assert {p.name for p in (tmp_path / "branch/checkpoints").iterdir()} == before | {"step_00000010"}
    assert [r["step"] for r in records(tmp_path / "branch", "train")] == list(range(6, 11))


def test_a_run_goes_back_to_an_earlier_checkpoint_that_is_its_end_now(copied):
    run, overrides = copied
    back = ["max_steps=5", "schedule.decay_steps=20", f"resume={run}/checkpoints/step_00000005"]
    best = train(compose([*overrides, *back]))
    assert state_of(run)["step"] == 5 and state_of(run)["ended"]
    assert max(r["step"] for r in records(run)) == 5 and records(run, "end")[-1]["best_val_loss"] == best


def spellings(word, here, monkeypatch):
    """The same `resume=<absolute path>` otherwise: with a slash at its end, and relative to a folder."""
    path = word.partition("=")[2]
    monkeypatch.chdir(here)
    relative = Path(path).relative_to(here)
    return [word, f"{word}/", f"resume={relative}", f"resume=./{relative}/"]


def test_a_resumed_run_says_what_it_does_not_do():
    state = {"config": {"full_eval": False}, "ended": True}
    loaded = Loaded(state, Path("a/checkpoints/step_00000004"), 4)
    _, beyond, split = resumption(loaded, compose(["full_eval=true", "max_steps=2"]), [])
    assert beyond == "max_steps=2: the run is beyond it already, and is not trained further"
    assert split.startswith("full_eval=true: the run had ended without it") and split.endswith("scripts/evaluate.py a")
    assert len(resumption(loaded, compose(["full_eval=true", "max_steps=9"]), [])) == 1
    whole = replace(loaded, state={"config": {"full_eval": True}, "ended": True})
    assert len(resumption(whole, compose(["full_eval=true", "max_steps=4"]), [])) == 1  # it had ended with it
    passed = replace(loaded, skipped=[(Path("a/checkpoints/step_00000008"), "it was truncated")])
    skipped, used = resumption(passed, compose(["max_steps=9"]), [])
    assert skipped == "skipped a/checkpoints/step_00000008: it was truncated" and used.endswith("step 4 of 9")


def test_a_sweep_may_begin_at_a_checkpoint(copied, tmp_path):
    run, overrides = copied
    cfg = compose([*overrides, f"resume={run}/checkpoints/step_00000005"])
    assert plan_job(cfg, tmp_path / "job")[0].resume == cfg.resume
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / METRICS_FILE).touch()
    assert plan_job(cfg, tmp_path / "job")[0].resume == "auto"


def test_a_failure_that_a_save_finds_ends_the_run_with_the_measurements_of_an_end(tiny, tmp_path, monkeypatch):
    """An update is left out at step 7; the checkpoint of step 8 is the first to ask."""
    plain, calls = module.accumulate, []

    def poisoned(model, *args):
        loss = plain(model, *args)
        calls.append(loss)
        if len(calls) == 7:
            next(model.parameters()).grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(module, "accumulate", poisoned)
    overrides = [o for o in tiny if not o.startswith(("log.interval=", "max_steps", "eval_interval", "full_eval"))]
    overrides += ["log.interval=10", "max_steps=20", "checkpoint.interval=8", "eval_interval=5", "full_eval=true"]
    train(cfg := compose([*overrides, "stability.on_unstable=stop"]))
    found = [(r["kind"], r["step"]) for r in records(tmp_path / "run")]
    assert all((kind, 8) in found for kind in ("eval", "full_eval", "end")) and state_of(tmp_path / "run")["ended"]
    train(replace(cfg, resume="auto"))
    assert found == [(r["kind"], r["step"]) for r in records(tmp_path / "run")] and len(calls) == 8
