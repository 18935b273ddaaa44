"""A stop within a step: the step is not applied, several ranks agree, and a second Ctrl-C leaves at once."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_train import assert_equal, records

import train as module
from train import train
from training import signals
from training.checkpoint import load_newest
from training.config import compose


def state_of(directory):
    return load_newest(directory / "checkpoints").state


def test_a_stop_between_micro_batches_leaves_no_trace_of_the_step(tiny, tmp_path, monkeypatch):
    common = [*tiny[:-1], "max_steps=12", "model.dropout=0.1", "micro_batch_size=2", "checkpoint.interval=100"]
    train(compose([*common, f"output_dir={tmp_path}/straight"]))
    plain, asked = module.accumulate, []

    def signalled(*args):
        def interrupted():
            asked.append(None)
            if len(asked) in (1, 23):  # three questions a step
                os.kill(os.getpid(), signal.SIGTERM)
            return args[-1]()

        return plain(*args[:-1], interrupted)

    monkeypatch.setattr(module, "accumulate", signalled)
    cfg = compose([*common, f"output_dir={tmp_path}/run", "resume=auto"])
    for step in (0, 7):
        with pytest.raises(SystemExit, match="143"):
            train(cfg)
        saved = [p.name for p in (tmp_path / "run/checkpoints").glob("step_*")]
        assert saved == ([f"step_{step:08d}"] if step else [])
    train(cfg)
    straight, stopped = state_of(tmp_path / "straight"), state_of(tmp_path / "run")
    for part in ("model", "optimizers", "rng", "stability"):
        assert_equal(straight[part], stopped[part])
    assert records(tmp_path / "straight") == records(tmp_path / "run")


def test_several_ranks_ask_each_other_within_long_steps_only(monkeypatch):
    asked = []
    ranks = SimpleNamespace(world=2, max=lambda noted: asked.append(noted) or 15, largest=lambda *values: list(values))
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=100.0)
    monkeypatch.setattr(signals, "time", clock)
    stop = signals.StopSignal()
    assert not stop.requested(ranks)
    assert stop.interrupts(ranks) and asked, "the first step may compile for minutes"
    for seconds, long in ((1.0, False), (3.0, True), (1.9, False)):
        clock.now += seconds
        asked.clear()
        assert not stop.requested(ranks)
        assert stop.interrupts(ranks) == bool(asked) == long


@pytest.mark.parametrize(("pause", "code"), [(0.3, 130), (0.0, 0)])
def test_a_second_ctrl_c_leaves_at_once(pause, code):
    program = f"""
import os, signal, time
from training.signals import Stopped, StopSignal
try:
    with StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep({pause})
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
except Stopped:
    raise SystemExit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stderr.count("another Ctrl-C leaves at once") == 1
    assert ("left without a save" in done.stderr) == (code == 130)
