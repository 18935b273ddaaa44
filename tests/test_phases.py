"""What a log says of time, speed and the program: phases, MFU, the commit; and the trace of the profiler."""

import gzip
import json
import re
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from model.gpt import GPT
from scripts.analysis.runs import read_run
from scripts.command import UsageError
from train import train
from training import machine, start
from training import phases as module
from training.build import gpt_config
from training.config import compose
from training.files import ENVIRONMENT_FILE
from training.log import read_records
from training.phases import Phases
from training.start import earlier_environments
from training.trace import WAITED, Trace
from training.validate import ConfigError, problems_of_capture

STEP = {"data", "forward_backward", "optimizer"}


def test_a_phase_within_another_interrupts_it(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    phase = Phases(torch.device("cpu"))
    for _ in range(2):
        with phase("outer"):
            clock.now += 1
            with phase("inner"):
                clock.now += 10
            clock.now += 2
        clock.now += 100  # belongs to no phase
    assert phase.read() == {"outer": 6.0, "inner": 20.0} and phase.read() == {}
    with pytest.raises(ValueError), phase("outer"):
        clock.now += 1
        raise ValueError
    assert phase.read() == {"outer": 1.0}


class FakeEvent:
    """A CUDA event of a device whose clock is the number of events so far, in seconds."""

    count, waited = 0, []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.count += 1
        self.at = FakeEvent.count

    def synchronize(self):
        FakeEvent.waited.append(self.at)

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_on_a_gpu_events_are_read_only_with_a_record(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    phase = Phases(torch.device("cuda"))
    for _ in range(5):
        with phase("outer"), phase("inner"):
            pass
    assert FakeEvent.waited == []
    assert phase.read() == {"outer": 10.0, "inner": 5.0} and FakeEvent.waited == [20]  # the last
    assert phase.read() == {}


def test_the_phases_of_a_run_add_up_to_its_time(tiny, tmp_path):
    start = time.perf_counter()
    train(compose([*tiny, "assignment=adamw", "max_steps=6", "log.interval=3", "profile=2"]))
    whole = time.perf_counter() - start
    records = list(read_records(tmp_path / "run"))
    times = [r["time"] for r in records if "time" in r]
    assert [r["kind"] for r in records if "time" in r] == ["train", "train", "end"]
    assert all(times[i].keys() >= STEP for i in (0, 1)) and "checkpoint" in times[2] and "exchange" not in times[0]
    assert set().union(*times) == STEP | {"eval", "spectra", "certificate", "probe", "checkpoint"}
    assert 0 < sum(sum(t.values()) for t in times) < whole
    assert records[-1]["train_seconds"] >= sum(t.get(name, 0) for t in times for name in STEP)
    written = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert written["code"] == machine.code_version()
    trace = json.loads(gzip.decompress((tmp_path / "run/profile/trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert all(names.count(name) == 2 for name in STEP) and WAITED + 2 <= 6
    table = (tmp_path / "run/profile/table.txt").read_text()
    assert all(name in table for name in STEP) and "calls" in table


@pytest.mark.parametrize(("updates", "traced"), [(WAITED + 2, 2), (WAITED + 1, 1), (WAITED, 0), (2, 0)])
def test_a_trace_that_is_cut_short_counts_the_updates_that_it_has(tmp_path, capsys, updates, traced):
    trace = Trace(5, tmp_path, torch.device("cpu"))
    for _ in range(updates):
        torch.ones(3).cumsum(0)
        trace.step()
    trace.close()
    assert f"of the {updates} that were made it has {traced}" in capsys.readouterr().out
    assert (tmp_path / "profile" / "table.txt").exists() == (traced > 0)
    if traced:
        [line] = re.findall(r"aten::cumsum .*", (tmp_path / "profile" / "table.txt").read_text())
        assert float(line.split()[-2]) == 1.0  # calls in an update


def test_mfu_is_a_share_of_the_peak_of_all_devices(monkeypatch):
    model = GPT(gpt_config(compose(["model.n_layer=1", "model.n_embd=16", "model.n_head=2"])))
    ranks = SimpleNamespace(world=2)
    assert machine.speed(10.0, model, torch.device("cpu"), ranks)["mfu"] is None
    monkeypatch.setattr(machine, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(machine, "peak_device_bytes", lambda device: 7)
    found = machine.speed(1e6, model, torch.device("cuda"), ranks)
    assert found == {
        "tokens_per_s": 1e6,
        "mfu": 1e6 * model.flops_per_token() / (2 * 989e12),
        "peak_device_bytes": 7,
    }
    monkeypatch.setattr(machine, "device_name", lambda: "Unheard-of 9000")
    assert machine.peak_flops(torch.device("cuda")) is None


def test_the_code_is_named_by_its_commit(monkeypatch, tmp_path):
    def answer(root):
        monkeypatch.setattr(machine, "ROOT", root)
        machine.code_version.cache_clear()
        return machine.code_version()

    try:
        folder = (tmp_path / "a").resolve()
        folder.mkdir()
        monkeypatch.delenv("MANIFOLD_GPT_CODE", raising=False)
        assert answer(folder) == "unknown"
        monkeypatch.setenv("MANIFOLD_GPT_CODE", "a copy of 1234567")
        assert answer(folder) == "a copy of 1234567"

        def git(*words):
            names = ["-c", "user.name=a", "-c", "user.email=a@b"]
            done = subprocess.run(["git", *names, *words], cwd=folder, capture_output=True, text=True, check=True)
            return done.stdout.strip()

        git("init", "-q")
        (folder / "file").write_text("1")
        git("add", "file")
        git("commit", "-qm", "one")
        commit = git("rev-parse", "HEAD")
        assert answer(folder) == commit
        (folder / "another").write_text("not tracked, such as outputs/")
        assert answer(folder) == commit
        (folder / "file").write_text("2")
        assert answer(folder) == f"{commit} + changes"
        inside = folder / "site-packages"
        inside.mkdir()
        assert answer(inside) == "a copy of 1234567"  # a program that is installed in another repository
    finally:
        monkeypatch.setattr(machine, "ROOT", ROOT)
        machine.code_version.cache_clear()


@pytest.mark.parametrize(("wrong", "message"), [("profile=0", "profile is 0"), ("capture=true", "use capture=false")])
def test_what_cannot_be_is_refused(tiny, wrong, message):
    with pytest.raises(ConfigError, match=message):
        train(compose([*tiny, wrong]))


def test_a_solver_that_waits_cannot_be_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert problems_of_capture(compose(["capture=true", "device=cuda"])) == []
    [problem] = problems_of_capture(compose(["capture=true", "device=cuda", "optim=paper"]))
    assert "use optim.muon.rule.retraction=manifold" in problem


def test_the_environments_of_earlier_steps_are_kept(tmp_path):
    """Of those in whose time no step was computed that is kept, nothing is."""
    a, b, c = ({"torch": version, "command": "python train.py"} for version in "abc")
    cases = [  # what stands in the file, what is now, from which step → what is kept
        (a, a, 5, []),
        (a, b, 5, [{**a, "until": 5}]),
        ({**b, "earlier": [{**a, "until": 5}]}, c, 9, [{**a, "until": 5}, {**b, "until": 9}]),
        ({**b, "earlier": [{**a, "until": 5}]}, b, 9, [{**a, "until": 5}]),
        ({**b, "earlier": [{**a, "until": 5}]}, c, 5, [{**a, "until": 5}]),  # b was killed before it saved
        ({**b, "earlier": [{**a, "until": 5}]}, a, 3, []),  # the later checkpoints are gone
        ({**a, "earlier": "none"}, b, 5, []),
    ]
    for before, now, step, kept in cases:
        (tmp_path / ENVIRONMENT_FILE).write_text(json.dumps(before))
        assert earlier_environments(tmp_path, now, step) == kept
    (tmp_path / ENVIRONMENT_FILE).write_text("{")
    assert earlier_environments(tmp_path, a, 5) == []


def test_a_resumed_run_names_what_computed_its_first_steps(copied, monkeypatch):
    run, overrides = copied
    before = json.loads((run / ENVIRONMENT_FILE).read_text())
    monkeypatch.setattr(start, "environment", lambda device: {"torch": "9"})
    train(compose([*overrides, "allow_changes=true", "resume=auto", "max_steps=12"]))
    now = json.loads((run / ENVIRONMENT_FILE).read_text())
    assert now["torch"] == "9" and now["earlier"] == [{**before, "until": 10}]
    assert [e["torch"] for e in read_run(run).environments] == [before["torch"], "9"]
    (run / ENVIRONMENT_FILE).write_text(json.dumps({**now, "earlier": 3}))
    with pytest.raises(UsageError, match=r"environment.json has no proper earlier"):
        read_run(run)
