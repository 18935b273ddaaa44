"""Real processes for the tests: cheap ones, forked from a server that has imported everything, and whole command lines."""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from conftest import CLOCK

from training import checkpoint
from training.log import read_records

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["train", "torch._dynamo"])  # an optimizer imports the latter, for seconds


# ---- processes ----


def start(target, *args, env=None, output=None):
    """Run `target(*args)` in a process of its own; what it prints goes to the file `output`, or nowhere."""
    process = _FORKS.Process(target=_child, args=(target, args, env or {}, output), daemon=True)
    process.start()
    return process


def _child(target, args, env, output):
    os.environ.update(env)
    torch.set_num_threads(1)
    sink = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    target(*args)


def free_port():
    """A port that nobody uses now, as text."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_ranks(world, target, *args, output=None):
    """Run `target(*args)` on `world` ranks, with the environment that torchrun would give them."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world)}
    common["LOCAL_WORLD_SIZE"] = str(world)
    return [
        start(target, *args, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, output=output)
        for rank in range(world)
    ]


def finish(processes, timeout=60):
    """The exit codes of processes; those that do not end in time are killed and the test fails."""
    until = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    hung = [p for p in processes if p.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, f"{len(hung)} of {len(processes)} processes did not end within {timeout} s"
    return [p.exitcode for p in processes]


def train_in_process(cfg):
    """A run from start to end, or to the signal that stops it."""
    from train import train

    train(cfg)


def train_all(cfgs, ports):
    """As a rank: several runs, one after the other, whose ranks meet at these ports."""
    from train import train

    for cfg, os.environ["MASTER_PORT"] in zip(cfgs, ports):
        train(cfg)


def train_as_rank(cfg):
    """A rank of a run, as the command line would run it."""
    from train import train
    from training.launch import launch

    launch(train, cfg, None)


@contextlib.contextmanager
def command(*words, cwd, env=None, prefix=()):
    """A command line in a process group of its own, which does not outlive the test; stdout and stderr go to `cwd`/output.txt."""
    with (Path(cwd) / "output.txt").open("ab") as output:
        process = subprocess.Popen(
            [*prefix, *words],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for pid in (process.pid, *children(process.pid)):  # torchrun's ranks are sessions of their own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def children(pid):
    """The processes that descend from `pid`, parents first."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *children(child)]
    return found


# ---- what they leave behind ----


def wait_until(condition, timeout=60, what="it", poll=0.03):
    """Wait for `condition()` to be true and return what it said."""
    until = time.monotonic() + timeout
    while not (answer := condition()):
        assert time.monotonic() < until, f"{what} did not happen within {timeout} s"
        time.sleep(poll)
    return answer


def last_step(directory):
    """The last step that a run wrote a training record of; 0 before the first."""
    path = Path(directory) / "metrics.jsonl"
    return max((r["step"] for r in read_records(path, "train")), default=0) if path.exists() else 0


def records(directory):
    """What a run wrote down, without the clock."""
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in read_records(directory)]


def final_state(directory):
    """The newest checkpoint, without what tells one way to the same end from another."""
    state = checkpoint.load_newest(Path(directory) / "checkpoints").state
    return {k: v for k, v in state.items() if k not in ("config", "seconds", "environment")}


def same(a, b):
    """Whether two states are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
