"""Two runs that start together never share a directory, and whoever comes second to a live run leaves it alone."""

import errno
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_train
from harness import finish, records, start, start_ranks, train_as_rank, wait_until

from scripts import reproduce
from train import train
from training.checks import check
from training.command import refusal
from training.config import compose
from training.directory import claim
from training.job import note_failure
from training.lock import LOCK_FILE, DirectoryLock, InUse
from training.log import RunLog
from training.signals import Stopped
from training.validate import ConfigError, problems_of_directory

NEVER, AUTO = (compose(["assignment=hetero_inv", f"resume={r}"]) for r in ("never", "auto"))


def write_run(directory, name=None, when=None):
    """What a run leaves, as far as choosing a directory goes."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump({"name": name}))
    (directory / "metrics.jsonl").write_text("")
    if when is not None:
        os.utime(directory / "metrics.jsonl", (when, when))
    return directory


# ---- the lock ----


def test_a_lock_says_who_holds_it_and_leaves_nothing_behind(tmp_path):
    directory = tmp_path / "a" / "b"
    with DirectoryLock(directory):
        about = json.loads((directory / LOCK_FILE).read_text())
        assert about["pid"] == os.getpid() and about["host"] == socket.gethostname()
        with pytest.raises(InUse) as caught:
            DirectoryLock(directory)
        for said in (str(directory), f"process {os.getpid()} on {about['host']}, since {about['since']}", "another"):
            assert said in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # to the other ranks
        assert json.loads((directory / LOCK_FILE).read_text()) == about
    assert list(tmp_path.iterdir()) == []
    with DirectoryLock(directory):
        (directory / "kept").touch()
    assert [p.name for p in directory.iterdir()] == ["kept"]
    with pytest.raises(FileExistsError):
        DirectoryLock(directory, new=True)


def hold(directory):
    DirectoryLock(Path(directory))
    time.sleep(60)


def test_the_lock_of_a_killed_process_holds_up_nobody(tmp_path):
    process = start(hold, str(tmp_path / "run"))
    wait_until((tmp_path / "run" / LOCK_FILE).exists, what="a lock", poll=0.001)
    with pytest.raises(InUse):
        wait_until(lambda: DirectoryLock(tmp_path / "run").release(), what="a refusal")
    process.kill()
    finish([process])
    assert (tmp_path / "run" / LOCK_FILE).exists()
    DirectoryLock(tmp_path / "run").release()


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    DirectoryLock(tmp_path / "run").release()
    assert "without locks: do not start a second run in it" in capsys.readouterr().err


def claim_at(moment, cfg, where, number):
    os.chdir(where)
    time.sleep(max(0.0, moment - time.time() - 0.05))
    while time.time() < moment:
        pass
    try:
        lock = claim(cfg)
    except InUse:
        Path(f"{number}.refused").touch()
        return
    Path(f"{number}.claimed").write_text(str(lock.directory))
    while (
        len([*Path().glob("*.claimed"), *Path().glob("*.refused")]) < 8
    ):  # until all have tried, however slow the machine is
        time.sleep(0.05)
    (lock.directory / "metrics.jsonl").touch()
    lock.release()


@pytest.mark.parametrize("given", [True, False])
def test_of_eight_that_claim_at_once_each_has_its_own(tmp_path, given):
    cfg = replace(NEVER, output_dir="run" if given else None)
    moment = time.time() + 1.5
    assert set(finish([start(claim_at, moment, cfg, str(tmp_path), n) for n in range(8)])) == {0}
    claimed = [p.read_text() for p in tmp_path.glob("*.claimed")]
    assert len(set(claimed)) == len(claimed) == (1 if given else 8)
    assert len(list(tmp_path.glob("*.refused"))) == (7 if given else 0)
    assert not list(tmp_path.rglob(LOCK_FILE))


# ---- which directory ----


@pytest.fixture
def day(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path("outputs") / "2020-02-20"


@pytest.mark.parametrize("name", ["lr0.05", "a[1]", "a*", "x y", "a=b,c", "v1.2.", ".hidden", "ü", "-m", "5"])
def test_any_name_of_a_directory_is_taken_up_again(day, name):
    write_run(day / name, name, when=1000)
    newest = write_run(day / f"{name}.2", name, when=2000)
    write_run(day / f"{name}x", f"{name}x", when=3000)
    write_run(day / f"{name}.0", f"{name}.0", when=3000)
    write_run(day / f"{name}.3", f"{name}.3", when=3000)  # the first of a name that looks like the third of ours
    (day / f"{name}.4").mkdir()  # nothing in it
    (day / f"{name}.5").touch()
    with claim(replace(AUTO, name=name)) as lock:
        assert lock.directory == newest
        with pytest.raises(InUse):
            claim(replace(AUTO, name=name))
    with claim(replace(NEVER, name=name)) as lock:
        assert lock.directory.parent != day and lock.directory.name == name


def test_numbers_skip_what_is_there_and_what_begins_is_seen(day):
    with claim(NEVER) as one, claim(NEVER) as two:
        assert [lock.directory.name for lock in (one, two)] == ["hetero_inv", "hetero_inv.2"]
        with pytest.raises(InUse):
            claim(AUTO)  # nothing is written yet, but one of these is the newest run
    assert not Path("outputs").exists()
    (day / "hetero_inv").mkdir(parents=True)
    (day / "hetero_inv" / LOCK_FILE).write_text("{}")  # killed before it wrote anything
    with claim(AUTO) as lock:
        assert lock.directory.parent != day


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "''", ".", "..", "a/b", "x" * 251])
def test_names_that_leave_their_folder_are_refused(tiny, tmp_path, name):
    for key in ("name", "sweep.name"):
        with pytest.raises(ConfigError, match=rf"- {key} (is|has)"):
            check(compose([*tiny, f"{key}={name}"]))
        refused = refusal(["-m", "seed=1,2", f"{key}={name}"])
        assert (refused is None) == (key == "name")
    assert not any(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_a_message(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to("missing")
    for place in ("file", "file/run", "nowhere", "nowhere/run", "x" * 300):
        with pytest.raises(ConfigError, match=r"cannot be written to .*choose another output_dir"):
            claim(replace(NEVER, output_dir=str(tmp_path / place)))
    with pytest.raises(ConfigError, match="File name too long"):
        claim(replace(NEVER, output_dir=str(tmp_path / "new" / ("x" * 300))))
    assert {p.name for p in tmp_path.iterdir()} == {"file", "nowhere"}


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc here, in which nobody can write")
def test_a_directory_that_only_seems_to_be_writable_is_a_message_too():
    assert problems_of_directory(Path("/proc/self/run")) != []
    with pytest.raises(ConfigError, match="choose another output_dir"):
        claim(replace(NEVER, output_dir="/proc/self/run"))


# ---- runs ----


def everything(directory):
    return {p: p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


def test_a_live_run_is_left_alone(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    cfg = compose([*tiny, "max_steps=5", "assignment=adamw"])
    train(cfg)
    (run / "checkpoints" / ".step_00000006.tmp").mkdir()
    (run / "checkpoints" / ".step_00000006.tmp" / "state.pt").touch()
    with pytest.raises(ConfigError, match="already holds a run; add resume=auto"):
        train(cfg)
    with DirectoryLock(run):
        before = everything(run)
        for resume in ("auto", "never", str(run / "checkpoints" / "step_00000005")):
            with pytest.raises(InUse):
                train(replace(cfg, resume=resume, max_steps=10))
        note_failure(run, ValueError("not of this run"))
        assert everything(run) == before
        done = run_train(*tiny, "max_steps=10", "resume=auto", cwd=tmp_path)
        assert done.returncode == 2 and f"is in use by process {os.getpid()} on" in done.stderr
        assert "Traceback" not in done.stderr and done.stderr.count("in use") == 1
        assert everything(run) == before
    train(replace(cfg, resume="auto"))


def test_a_run_that_was_killed_before_it_wrote_its_end_writes_it(tiny, tmp_path):
    cfg, run = compose([*tiny, "max_steps=5", "assignment=adamw"]), tmp_path / "run"
    best, whole = train(cfg), (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(whole[:-1]))
    for _ in range(2):
        assert train(replace(cfg, resume="auto")) == best
        assert [r["kind"] for r in records(run)] == [json.loads(line)["kind"] for line in whole]
        assert records(run)[-1]["best_val_loss"] == best


def test_ranks_learn_of_a_refusal(tiny, tmp_path):
    with DirectoryLock(tmp_path / "run"):
        ranks = start_ranks(2, train_as_rank, compose([*tiny, "assignment=adamw"]), output=tmp_path / "output.txt")
        assert finish(ranks) == [2, 2]
    assert (tmp_path / "output.txt").read_text().count("in use by process") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["output.txt"]


def test_a_run_that_cannot_begin_leaves_nothing(tiny, tmp_path, monkeypatch):
    cfg = replace(compose(tiny), resume=str(tmp_path / "none"))
    with pytest.raises(Exception, match="not a checkpoint"):
        train(cfg)
    monkeypatch.setattr("train.Run.__init__", lambda *_: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr("train.Run.finished", False)
    monkeypatch.setattr("train.Run.step", 0, raising=False)
    with pytest.raises(Stopped, match="143"):
        train(compose(tiny))
    assert not any(tmp_path.iterdir())


def test_the_table_leaves_a_live_run_alone(tiny, tmp_path, capsys):
    common = [o for o in tiny if not o.startswith("output_dir")]
    run = tmp_path / "runs" / "unconstrained"
    with DirectoryLock(run):
        RunLog(run).write("eval", 0, loss=1.0)
        before = everything(run)
        assert (
            reproduce.main(["scale=demo", *common, f"output_dir={tmp_path}/runs", f"results={tmp_path}/results"]) == 2
        )
        assert everything(run) == before
    assert "in use" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["runs"]


# ---- a campaign ----


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", [[], ["output_dir=run"], ["output_dir=run", "resume=auto"], ["resume=auto"]])
def test_eight_pairs_started_together(tiny, tmp_path, how):
    common = [o for o in tiny if not o.startswith("output_dir")]
    for pair in range(8):
        where = tmp_path / str(pair)
        where.mkdir()
        words = [sys.executable, str(ROOT / "train.py"), *common, "max_steps=60", *how]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": where}
        processes = {seed: subprocess.Popen([*words, f"seed={seed}"], **pipes) for seed in (1, 2)}
        ends = {seed: (*process.communicate(timeout=120), process.returncode) for seed, process in processes.items()}
        runs = {yaml.safe_load(p.read_text())["seed"]: p.parent for p in where.rglob("config.yaml")}
        assert not list(where.rglob(LOCK_FILE))
        for seed, (out, err, code) in ends.items():
            assert code == (0 if seed in runs else 2), err
            if seed in runs:  # its loss is that of its own weights
                assert f"best validation loss {records(runs[seed])[-1]['best_val_loss']:.4f}" in out
                steps = [r["step"] for r in records(runs[seed]) if r["kind"] == "train"]
                assert steps == list(range(1, 61))
            else:
                reasons = (
                    "in use by process",
                    "already holds a run",
                    "was made under other settings",
                )  # at once, or a little later
                assert any(reason in err for reason in reasons), err
        assert len(runs) in {(): (2,), ("resume=auto",): (1, 2)}.get(tuple(how), (1,))
