"""The engine of experiments: it runs what has not ended, and a run that fails or is stopped is an outcome."""

import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL
from harness import children, command, last_step, records, wait_until

from training import job as one_job
from training.config import compose
from training.job import other_settings
from training.jobs import Job, run_all, run_here
from training.machine import environment
from training.start import typed_command
from training.validate import ConfigError


def test_without_workers_nothing_is_run(tmp_path, capsys):
    assert run_all([Job(("max_steps=0",), tmp_path / "run")], workers=0) == {}
    assert not (tmp_path / "run").exists() and "1 runs, 0 done before" in capsys.readouterr().out


def test_a_finished_run_with_other_settings_is_not_taken_for_this_one(tiny_grid, tmp_path, capsys):
    job = Job((*tiny_grid, *SMALL, "max_steps=2", "logger.mode=disabled"), tmp_path / "run")
    assert run_here(job).best == run_here(job).best > 0
    assert run_all([job], workers=2) == {} and "1 runs, 1 done before" in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match=r"holds a run with other settings \(max_steps: 2 → 3.*; give another output_dir="
    ):
        run_all([Job((*job.overrides, "max_steps=3"), job.directory)], workers=2)


def test_a_run_with_another_last_evaluation_is_another_run():
    saved, now = compose(["full_eval=false"]).plain(), compose(["full_eval=true"]).plain()
    assert other_settings(saved, now) == ["full_eval: False → True"]


def test_a_job_that_could_not_run_leaves_its_directory_to_a_corrected_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(one_job, "check", raises)
        with pytest.raises(ConfigError):
            one_job.run_job(print, lambda: compose(["seed=5"]), tmp_path / "job")
    assert (tmp_path / "job/metrics.jsonl").exists() and not (tmp_path / "job/config.yaml").exists()
    assert one_job.plan_job(compose(["seed=6"]), tmp_path / "job")[1] is None


def raises(cfg):
    raise ConfigError(["no GPU here"])


def test_a_run_that_was_continued_after_its_end_is_not_finished(tiny_grid, tmp_path):
    job = Job((*tiny_grid, *SMALL, "max_steps=2", "logger.mode=disabled"), tmp_path / "run")
    run_here(job)
    log = job.directory / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"kind": "train", "step": 3, "loss": 1.0}\n')
    assert not job.ended
    with log.open("a") as file:
        file.write('{"kind": "end", "step": 3, "best_val_lo')  # torn
    assert not job.ended


def test_a_mistake_of_the_user_is_one_message(tmp_path, capsys):
    assert run_here(Job(("max_steps=-1",), tmp_path / "run")).failure.startswith("ConfigError: ")
    assert "max_steps is -1" in (said := capsys.readouterr().err) and "Traceback" not in said


def test_a_failure_is_an_outcome_and_what_it_cost_is_known(tiny_grid, tmp_path, monkeypatch, capsys):
    job = Job((*tiny_grid, *SMALL, "max_steps=2", "logger.mode=disabled"), tmp_path / "run")

    def broken(cfg, directory):
        directory.mkdir(exist_ok=True)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("train.train", broken)
        assert run_here(job).failure == "RuntimeError: out of memory"
    assert [r["message"] for r in records(job.directory)] == ["out of memory"]
    first = json.loads((job.directory / "cost.json").read_text())
    assert run_here(job).failure is None and job.ended
    then = json.loads((job.directory / "cost.json").read_text())
    assert then["wall_seconds"] > first["wall_seconds"] and then["peak_bytes"] >= first["peak_bytes"] > 2**20


def test_a_worker_that_is_killed_is_one_failed_job(tiny_grid, tmp_path, capsys):
    small = (*tiny_grid, "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "schedule.warmup_steps=1")
    long, short = (Job((*small, f"max_steps={n}", "logger.mode=disabled"), tmp_path / str(n)) for n in (100_000, 4))
    bad, before = Job(("max_steps=-1",), tmp_path / "bad"), children(os.getpid())

    def kill_one():
        wait_until(lambda: last_step(long.directory) > 2, 120, "two steps")
        os.kill(worker_of(os.getpid(), long), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    failures = run_all([long, short, bad], workers=2)
    killer.join()
    assert set(failures) == {long.directory, bad.directory} and short.ended
    assert json.loads((short.directory / "environment.json").read_text())["command"] == typed_command()
    assert re.search("killed by SIGKILL .*the same command continues it", failures[long.directory])
    assert "max_steps is -1" in failures[bad.directory]
    assert "3/3" in capsys.readouterr().out and children(os.getpid()) == before


def test_a_run_notes_the_program_with_its_place_in_the_repository(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts/reproduce.py"), "seeds=1", "name=a b"])
    assert typed_command() == "python scripts/reproduce.py seeds=1 'name=a b'"
    monkeypatch.setattr(sys, "argv", ["/elsewhere/train.py"])
    assert typed_command() == "python train.py"


def test_a_run_notes_its_system_without_the_name_of_the_kernel(monkeypatch):
    noted = environment()["platform"]
    assert platform.system() in noted and platform.machine() in noted and platform.release() not in noted
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))  # as on macOS
    assert environment()["platform"] == f"{platform.system()} {platform.machine()}"


def worker_of(parent, job):
    """The process that runs a job: it has the job's lock."""
    pid = json.loads((job.directory / ".lock").read_text())["pid"]
    assert pid in children(parent)
    return pid


def test_jobs_go_through_a_launcher_of_hydras(tiny_grid, tmp_path, capsys):
    small = (*tiny_grid, *SMALL, "max_steps=4", "logger.mode=disabled")
    good, bad = Job(small, tmp_path / "it's, a=1"), Job((*small, "grad_clip=-1"), tmp_path / "bad")
    launcher = ["hydra/launcher=basic"]
    failures = run_all([good, bad], 1, launcher)
    assert list(failures) == [bad.directory] and failures[bad.directory].startswith("grad_clip is -1")
    assert good.ended and [r["event"] for r in records(bad.directory)] == ["failed"]
    straight = Job(small, tmp_path / "straight")
    run_here(straight)
    assert records(good.directory) == records(straight.directory)
    before = (good.directory / "metrics.jsonl").read_bytes()
    assert run_all([good], 1, launcher) == {} and "1 done before" in capsys.readouterr().out
    assert (good.directory / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(good.directory / "checkpoints" / "step_00000004")
    lines = before.splitlines(keepends=True)
    (good.directory / "metrics.jsonl").write_bytes(b"".join(line for line in lines if b'"end"' not in line))
    assert run_all([good], 1, launcher) == {} and records(good.directory) == records(straight.directory)


GRID = ["assignment=adamw,unconstrained", "residual=pre_norm", "seeds=1,2", "target=100", "workers=2"]


@pytest.fixture(scope="module")
def crossing_command(tiny_grid):
    """The words of a grid of four runs that take some seconds each."""
    spent = ["max_steps=300", "output_dir=runs", "results=results"]
    return [sys.executable, str(ROOT / "scripts/experiment.py"), "crossing", *GRID, *tiny_grid, *SMALL, *spent]


@pytest.fixture(scope="module")
def straight(crossing_command, tmp_path_factory):
    """What the runs of the grid write when nobody interrupts them."""
    where = tmp_path_factory.mktemp("straight")
    subprocess.run(crossing_command, cwd=where, check=True, capture_output=True)
    return {p.name: records(p) for p in (where / "runs").iterdir()}


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("attempt", range(3))
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGKILL", "SIGTERM of a worker", "SIGKILL of a worker"])
def test_interrupted_grids_end_and_go_on(crossing_command, straight, tmp_path, how, attempt):
    chance, runs = random.Random(f"{how} {attempt}"), tmp_path / "runs"
    with command(*crossing_command, cwd=tmp_path) as process:
        after = chance.randint(1, 200) if attempt else 0  # steps; 0: while the workers start
        begun = lambda: len(children(process.pid)) >= 2 and max(map(last_step, runs.glob("*")), default=0) >= after  # noqa: E731
        wait_until(begun, 200, "workers")
        time.sleep(chance.uniform(0, 3))
        workers, since = children(process.pid), time.monotonic()
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(workers[0] if "worker" in how else process.pid, signal.Signals[how.split()[0]])
        if "worker" not in how:
            assert process.wait(30) == {"Ctrl-C": 130, "SIGTERM": 143, "SIGKILL": -9}[how]
            wait_until(lambda: not any(map(alive, workers)), 30 - (time.monotonic() - since), "the end of the workers")
        else:
            assert process.wait(250) == 1
    text = (tmp_path / "output.txt").read_text()
    assert "Traceback" not in text and text.count(f"by {how.split()[0]}") == (2 if "worker" in how else 0), text
    assert subprocess.run(crossing_command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    assert {p.name: records(p) for p in runs.iterdir()} == straight


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
