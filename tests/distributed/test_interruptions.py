"""However often a run is interrupted, it ends as if it had not been."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import (
    ROOT,
    TORCHRUN,
    children,
    command,
    final_state,
    finish,
    last_step,
    records,
    same,
    start,
    start_ranks,
    train_as_rank,
    train_in_process,
    wait_until,
)

from training import checkpoint
from training.config import compose

STEPS = 100
CHEAP = [
    "optim=paper",
    "optim.muon.rule.dual_steps=1",
    "optim.muon.rule.msign_steps=2",
    "log.interval_spectra=25",
    "model.dropout=0.1",
]


@pytest.fixture
def run(tiny, tmp_path):
    """A configuration of STEPS steps in `tmp_path/<name>`, with overrides."""

    def make(name, *overrides, steps=STEPS):
        common = [o for o in tiny if not o.startswith(("output_dir", "max_steps"))]
        return compose([*common, *CHEAP, f"max_steps={steps}", f"output_dir={tmp_path}/{name}", *overrides])

    return make


def newest_step(directory):
    names = [p.name for p in (directory / "checkpoints").glob("step_*")]
    return max((int(name[5:]) for name in names), default=0)


def test_killed_at_twenty_random_moments(run, tmp_path):
    assert finish([start(train_in_process, run("straight", "checkpoint.interval=50"))]) == [0]
    cfg = run("killed", "checkpoint.interval=1", "resume=auto")
    directory, chance, inside_a_save = tmp_path / "killed", random.Random(4), 0
    for kill in range(20):
        process = start(train_in_process, cfg)
        target = newest_step(directory) + chance.randint(1, STEPS // 25)
        wait_until(lambda target=target: newest_step(directory) >= target, what=f"step {target}", poll=0.001)
        if kill % 2:
            saving = directory / "checkpoints"
            wait_until(lambda saving=saving: any(saving.glob(".step_*.tmp")), what="a save", poll=0)
        time.sleep(0 if kill % 2 else chance.uniform(0, 0.03))
        process.kill()
        finish([process])
        inside_a_save += any((directory / "checkpoints").glob(".step_*.tmp"))
        loaded = checkpoint.load_newest(directory / "checkpoints")
        assert loaded.step >= target and not loaded.skipped
        assert last_step(directory) - loaded.step <= 1  # lost: at most the step since the last checkpoint
    assert inside_a_save >= 1
    assert finish([start(train_in_process, cfg)]) == [0]
    assert same(final_state(tmp_path / "straight"), final_state(directory))
    assert records(tmp_path / "straight") == records(directory)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_commands_killed_at_twenty_random_moments_start_up_included(tiny, tmp_path):
    """kill -9 of `python train.py` itself, from before its first line to its end; then it ends like one that nobody killed."""
    overrides = [*tiny[:-1], *CHEAP, "max_steps=1500", "checkpoint.interval=10", "log.interval=5", "eval_interval=50"]
    words = [sys.executable, str(ROOT / "train.py"), *overrides]
    since = time.monotonic()
    with command(*words, f"output_dir={tmp_path}/straight", cwd=tmp_path) as process:
        assert process.wait(600) == 0
    whole, chance = time.monotonic() - since, random.Random(7)
    killed, moments, steps = [*words, f"output_dir={tmp_path}/killed", "resume=auto"], [], []
    for kill in range(20):
        # Half of the kills fall into the start-up; the others find a run that has got further each time.
        moment = chance.uniform(0, 0.5 * whole) if kill % 2 else chance.uniform(0.1, 0.7) * whole
        with command(*killed, cwd=tmp_path) as process:
            time.sleep(moment)
            process.kill()
            process.wait()
        moments.append(moment)
        steps.append(newest_step(tmp_path / "killed"))
        if (tmp_path / "killed/checkpoints").is_dir():
            loaded = checkpoint.load_newest(tmp_path / "killed/checkpoints")
            assert loaded is None or not loaded.skipped
    assert steps[-1] > 0 and sorted(steps) == steps, list(zip(moments, steps))
    with command(*killed, cwd=tmp_path) as process:
        assert process.wait(600) == 0
    assert "Traceback" not in (tmp_path / "output.txt").read_text()
    assert same(final_state(tmp_path / "straight"), final_state(tmp_path / "killed"))
    assert records(tmp_path / "straight") == records(tmp_path / "killed")


def signalled(cfg, step, signum, rank):
    """A rank of a run; `rank` sends itself the signal while it computes the gradient after `step` steps. Every step counts as long."""
    import train as module
    from training import signals

    plain, calls = module.accumulate, iter(range(10**6))

    def accumulate(*args):
        if next(calls) == step and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signum)
        return plain(*args)

    module.accumulate, signals.LONG_STEP_S = accumulate, 0.0
    train_as_rank(cfg)


@pytest.mark.parametrize("world", [1, 2])
def test_signals_save_and_end_with_their_exit_code(run, tmp_path, world):
    micro = "micro_batch_size=2"  # 4 micro-batches a step, or 2 on each of two ranks
    assert set(finish(start_ranks(world, train_as_rank, run("straight", micro, steps=40)))) == {0}
    directory, cfg = tmp_path / "stopped", run("stopped", micro, "checkpoint.interval=1000", "resume=auto", steps=40)
    for interruption, signum in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), start=1):
        output, since = tmp_path / f"{signum}.txt", time.monotonic()
        ranks = start_ranks(world, signalled, cfg, 6, signum, world - 1, output=output)  # one is asked, all leave
        assert finish(ranks, timeout=30) == [128 + signum] * world
        assert time.monotonic() - since < 30
        assert newest_step(directory) == last_step(directory) == 6 * interruption  # before the step that was under way
        assert f"{signum.name}: stopped at step {6 * interruption}" in output.read_text()
    assert set(finish(start_ranks(world, train_as_rank, cfg))) == {0}
    assert same(final_state(tmp_path / "straight"), final_state(directory))
    assert records(tmp_path / "straight") == records(directory)


def test_a_signal_in_the_last_step_finishes_the_run_and_still_stops_what_follows(run, tmp_path):
    [rank] = start_ranks(1, signalled, run("run", "micro_batch_size=8", steps=5), 4, signal.SIGTERM, 0)
    assert finish([rank]) == [143]
    assert newest_step(tmp_path / "run") == 5 and records(tmp_path / "run")[-1]["kind"] == "end"


def test_a_killed_rank_ends_the_others_and_costs_only_the_steps_since_the_checkpoint(run, tmp_path):
    cfg = run("run", "checkpoint.interval=5", "resume=auto", steps=40)
    ranks = start_ranks(2, train_as_rank, cfg, output=tmp_path / "output.txt")
    wait_until(lambda: newest_step(tmp_path / "run") >= 10, what="a checkpoint")
    ranks[1].kill()
    assert finish(ranks, timeout=30) == [1, -signal.SIGKILL]
    text = (tmp_path / "output.txt").read_text()
    assert "rank 0 of 2 lost the others" in text and "resume=auto" in text and "Traceback" not in text
    assert newest_step(tmp_path / "run") >= last_step(tmp_path / "run") - 5
    assert set(finish(start_ranks(2, train_as_rank, cfg))) == {0}
    assert newest_step(tmp_path / "run") == 40


def test_a_sweep_stops_with_its_job(tiny, tmp_path):
    overrides = [*tiny[:-1], *CHEAP, "max_steps=20000", "seed=1,2", "launcher.nproc=2", "checkpoint.interval=100000"]
    sweep = tmp_path / "outputs" / "sweep"
    with command(sys.executable, str(ROOT / "train.py"), "-m", *overrides, cwd=tmp_path) as process:
        first = wait_until(lambda: next((p for p in sweep.glob("*/") if last_step(p) > 5), None), 180, "five steps")
        since = time.monotonic()
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
        assert time.monotonic() - since < 30
    assert [p for p in sweep.iterdir() if p.is_dir()] == [first]
    assert newest_step(first) == last_step(first)
    assert not children(process.pid)


def begin(*words, cwd):
    """A command line of train.py in a process group of its own; what it says on stderr is kept."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": cwd}
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], **pipes, start_new_session=True)


def said(process, signum):
    """What a process said that was sent a signal, without the progress of the run; it has ended as it should."""
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + signum, err
    lines = [line for line in err.splitlines() if not re.match(r"\S+ +(\d+/\d+ |step \d+: )", line)]
    assert len(lines) == 1 and lines[0].startswith(f"{signum.name}: stopped"), err
    return lines[0]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_during_the_imports_is_one_message(tiny, tmp_path, signum):
    process = begin(*tiny, "launcher.nproc=2", cwd=tmp_path)
    wait_until(lambda: listens(process), what="the first line of train.py", poll=0.001)
    process.send_signal(signum)
    assert "while no run was active" in said(process, signum)
    assert not any(tmp_path.iterdir())


def listens(process):
    """Whether a process has handlers of its own for the stop signals: Python itself has one for SIGINT alone."""
    [mask] = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return "train.py" in words_of(process.pid) and bool(int(mask, 16) >> (signal.SIGUSR2 - 1) & 1)


def test_ctrl_c_while_ranks_start_is_one_message(tiny, tmp_path):
    process = begin(*tiny, "launcher.nproc=2", cwd=tmp_path)
    ranks = wait_until(lambda: [p for p in children(process.pid) if "spawn_main" in words_of(p)], 120, "a rank", 0.001)
    os.killpg(process.pid, signal.SIGINT)
    said(process, signal.SIGINT)
    assert not any(tmp_path.iterdir())
    wait_until(lambda: not any(Path(f"/proc/{p}").exists() for p in ranks), what="the end of the ranks")


def words_of(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("how", ["one process", "two ranks", "sweep", "sweep of two ranks"])
def test_ten_signals_at_random_moments(tiny, tmp_path, how):
    words = [*tiny[:-1], *CHEAP, "max_steps=20000", "checkpoint.interval=100000"]
    words += ["launcher.nproc=2"] if "two ranks" in how else []
    words = ["-m", *words, "seed=1,2"] if "sweep" in how else [*words, "output_dir=run"]
    chance, before_the_first_step = random.Random(how), 0
    for attempt in range(10):
        where, signum = tmp_path / str(attempt), (signal.SIGTERM, signal.SIGINT)[attempt % 2]
        where.mkdir()
        process = begin(*words, cwd=where)
        wait_until(lambda process=process: listens(process), what="the first line of train.py", poll=0.001)
        time.sleep(chance.uniform(0, 20 if "two ranks" in how else 8))
        to_all = chance.random() < 0.5  # as Ctrl-C reaches them
        os.killpg(process.pid, signum) if to_all else process.send_signal(signum)
        line = said(process, signum)
        assert not [p for p in where.rglob("*") if p.suffix == ".tmp" or p.name == ".lock"]
        found = [p.parent for p in where.rglob("metrics.jsonl")]
        before_the_first_step += not found
        for directory in found:
            assert newest_step(directory) == last_step(directory)
            assert f"stopped at step {last_step(directory)};" in line
    assert before_the_first_step > 0


def test_torchrun_passes_a_signal_on(run, tiny, tmp_path):
    overrides = [*tiny[:-1], *CHEAP, "max_steps=20000", "output_dir=run", "checkpoint.interval=100000"]
    words = [*TORCHRUN, "--standalone", "--nproc_per_node=2", str(ROOT / "train.py"), *overrides]
    with command(*words, cwd=tmp_path) as process:
        wait_until(lambda: last_step(tmp_path / "run") > 5, 180, "five steps")
        process.terminate()
        assert process.wait(30) != 0
    assert newest_step(tmp_path / "run") == last_step(tmp_path / "run")
    assert "SIGTERM: stopped at step" in (tmp_path / "output.txt").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"run", "output.txt"}  # no directories of Hydra, of no rank
