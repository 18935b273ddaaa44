"""scripts/gpu_runs.py: all runs get the same number of steps, in the time there is, whatever happens to one of them."""

import json
import signal
import time
from types import SimpleNamespace

import pytest

from scripts import gpu_runs
from training.signals import Stopped


def settings_of(overrides):
    """What `TimedRuns` asks of a configuration."""
    steps = next(int(o.removeprefix("max_steps=")) for o in overrides if o.startswith("max_steps="))
    return SimpleNamespace(max_steps=steps, global_batch_tokens=128)


def pretend_to_train(cfg, directory, begun=0, compiling=0):
    """Write what `TimedRuns` reads of a run."""
    (directory / "checkpoints" / f"step_{cfg.max_steps:08d}").mkdir(parents=True, exist_ok=True)
    steps = range(1, cfg.max_steps + 1)
    rates = {step: cfg.global_batch_tokens / (1 + compiling * (step == begun + 1)) for step in steps}
    records = [{"kind": "train", "step": step, "tokens_per_s": rate} for step, rate in rates.items()]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_all_runs_get_the_same_number_of_steps(tmp_path, monkeypatch):
    """A clock that trains: every assignment takes a second a step, three beside, and five to compile its update, once in a process."""
    now, trained, compiled = [0.0], [], set()

    def train(cfg, directory):
        begun = max((int(p.name[5:]) for p in directory.glob("checkpoints/step_*")), default=0)
        compiling = 0 if directory.name in compiled else 5
        now[0] += 3 + compiling + cfg.max_steps - begun
        compiled.add(directory.name)
        trained.append((directory.name, cfg.max_steps))
        pretend_to_train(cfg, directory, begun, compiling)

    monkeypatch.setattr(gpu_runs, "train", train)
    monkeypatch.setattr(gpu_runs, "compose", settings_of)
    monkeypatch.setattr(gpu_runs.gc, "collect", lambda: 0)  # a second of a test's heap
    monkeypatch.setattr(gpu_runs.time, "monotonic", lambda: now[0])
    timed = gpu_runs.TimedRuns(tmp_path, gpu_runs.TINY_SETTINGS, first=4, most=100, end=200.0)
    timed.run()
    assert timed.costs == {name: {"step": 1, "known": 3, "new": 8} for name in gpu_runs.RUNS}
    assert [timed.reached(name) for name in gpu_runs.RUNS] == [
        18
    ] * 6  # 4, and (.8 · 128 - 18) / 6 more: nothing is compiled again
    assert now[0] <= 200 and len(trained) == 12
    again = gpu_runs.TimedRuns(tmp_path, gpu_runs.TINY_SETTINGS, first=4, most=100, end=now[0] + 100)
    again.run()  # takes compilation into account; what that did not take is used then
    assert [steps for name, steps in trained[12:] if name == "hetero"] == [
        23,
        26,
    ]  # (80 - 48) / 6 more; (.8 · 52 - 18) / 6
    last = gpu_runs.TimedRuns(tmp_path, gpu_runs.TINY_SETTINGS, first=4, most=100, end=now[0] + 1000)
    last.run()
    assert [last.reached(name) for name in gpu_runs.RUNS] == [100] * 6 and len(trained) == 30


def test_no_run_begins_that_the_time_is_too_short_for(tmp_path, monkeypatch, capsys):
    """Each takes 20 seconds of 50: the third would end too late."""
    now = [0.0]

    def train(cfg, directory):
        now[0] += 20
        pretend_to_train(cfg, directory)

    monkeypatch.setattr(gpu_runs, "train", train)
    monkeypatch.setattr(gpu_runs, "compose", settings_of)
    monkeypatch.setattr(gpu_runs.gc, "collect", lambda: 0)
    monkeypatch.setattr(gpu_runs.time, "monotonic", lambda: now[0])
    timed = gpu_runs.TimedRuns(tmp_path, gpu_runs.TINY_SETTINGS, first=4, most=100, end=50.0)
    timed.run()
    assert [timed.reached(name) for name in gpu_runs.RUNS] == [4, 4, 0, 0, 0, 0] and now[0] == 40
    assert "stays at 0, since the time is too short for 4" in capsys.readouterr().out


def test_a_signal_after_the_last_save_of_a_run_costs_only_its_note(tmp_path, monkeypatch):
    def train(cfg, directory):
        pretend_to_train(cfg, directory)
        if directory.name == "hetero" and not stopped:
            stopped.append(1)
            raise Stopped(signal.SIGTERM)

    stopped = []
    monkeypatch.setattr(gpu_runs, "train", train)
    monkeypatch.setattr(gpu_runs, "compose", settings_of)
    monkeypatch.setattr(gpu_runs.gc, "collect", lambda: 0)
    with pytest.raises(Stopped):
        gpu_runs.TimedRuns(tmp_path, [], first=4, most=10, end=time.monotonic() + 1000).run()
    again = gpu_runs.TimedRuns(tmp_path, [], first=4, most=10, end=time.monotonic() + 1000)
    again.run()
    assert [again.reached(name) for name in gpu_runs.RUNS] == [10] * 6 and not again.failed


def test_a_run_that_ends_early_is_not_waited_for(tmp_path, monkeypatch, capsys):
    """Such as one that ends because it became unstable."""
    monkeypatch.setattr(
        gpu_runs, "train", lambda cfg, directory: pretend_to_train(settings_of(["max_steps=2"]), directory)
    )
    monkeypatch.setattr(gpu_runs, "compose", settings_of)
    monkeypatch.setattr(gpu_runs.gc, "collect", lambda: 0)
    timed = gpu_runs.TimedRuns(tmp_path, [], first=4, most=10, end=time.monotonic() + 1000)
    timed.run()
    assert timed.failed == list(gpu_runs.RUNS) and "hetero ended before step 4" in capsys.readouterr().err


def test_a_failed_run_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """All others make the same number of steps; the next command tries it again."""

    def train(cfg, directory):
        if directory.name == "hetero" and cfg.max_steps == 4:
            raise RuntimeError("no memory")
        pretend_to_train(cfg, directory)

    monkeypatch.setattr(gpu_runs, "train", train)
    monkeypatch.setattr(gpu_runs, "compose", settings_of)
    monkeypatch.setattr(gpu_runs.gc, "collect", lambda: 0)
    timed = gpu_runs.TimedRuns(tmp_path, [], first=4, most=10, end=time.monotonic() + 1000)
    timed.run()
    assert {name: timed.reached(name) for name in gpu_runs.RUNS} == dict.fromkeys(gpu_runs.RUNS, 10) | {"hetero": 0}
    assert timed.failed == ["hetero"] and "no memory" in capsys.readouterr().err


def test_the_table_has_the_seconds_until_the_first_record_and_the_largest_distance_at_the_end():
    rate = {"kind": "train", "step": 10, "tokens_per_s": 64.0}
    distances = [{"step": 0, "distance": 1.0}, {"step": 40, "distance": 2e-6}, {"step": 40, "distance": 1e-6}]
    run = SimpleNamespace(config={"global_batch_tokens": 128}, records={"train": [rate], "spectra": distances})
    assert gpu_runs.start_seconds(run) == 20 and gpu_runs.farthest(run) == 2e-6
    free = SimpleNamespace(config={}, records={"spectra": [{"step": 40, "distance": 0}, {"step": 40}]})
    assert gpu_runs.start_seconds(free) is None and gpu_runs.farthest(free) is None


def test_a_schedule_is_not_negative(capsys):
    assert gpu_runs.main(["folder=a", "results=b", "steps=-1"]) == 2
    assert "steps= and seconds= must not be below 0" in capsys.readouterr().err
