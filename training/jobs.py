"""Run many jobs. A finished job is skipped, an unfinished one is continued. A job that fails is an outcome; the others are still run.

`run_all` uses worker processes on this machine, several at a time, or one of Hydra's launchers, such as a cluster's. `run_here` runs a job
in this process. Both run a job by `training.job.run_job`.

No worker outlives the process that started it. The worker reads its job from its standard input, which then stays open; when that input
ends, the parent has ended, for whatever reason, and the worker stops.

    python -m training.jobs        a worker; only `run_jobs` starts it
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.parallel import available_cores
from training.checks import USER_ERRORS
from training.config import CONFIGS, compose
from training.data import require_data
from training.directory import end_of
from training.files import CONFIG_FILE, ROOT
from training.job import finished, hydra_job, run_job
from training.launch import USER_ERROR, RankFailed
from training.lock import InUse
from training.signals import STOP_SIGNALS, Stopped, StopSignal, exit_on_stop_signals

POLL_S = 0.05
GRACE_S = 20.0
"""Seconds that a worker has for saving after it was asked to stop. Then it is killed."""


@dataclass(frozen=True)
class Job:
    """One run: overrides of train.py, and the directory that it writes to. A run that is there already is continued."""

    overrides: tuple[str, ...]
    directory: Path

    @property
    def ended(self) -> bool:
        """Whether the run has ended."""
        return end_of(self.directory) is not None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job: its best validation loss (nats a token), or the reason why it has not ended."""

    job: Job
    best: float | None
    failure: str | None = None


def run_all(jobs: Sequence[Job], workers: int, launcher: Sequence[str] = ()) -> dict[Path, str]:
    """Run the jobs that have not ended. Returns directory → reason, for those that failed.

    Args:
        workers: how many jobs run at a time; 0 runs nothing.
        launcher: overrides that choose one of Hydra's launchers and its options. It then decides how many jobs run at a time.

    Prints a line for each job: how many are done, its directory, its best validation loss or the reason of its failure, the remaining time.

    Raises:
        ConfigError: a directory holds a run with other settings; nothing was run. Stopped: a signal came, and the runs have saved.
    """
    for job in jobs:
        if (job.directory / CONFIG_FILE).exists():
            finished(compose(job.overrides), job.directory, "give another output_dir=")
    waiting = [job for job in jobs if not job.ended]
    how = launcher[0] if launcher else f"{workers} at a time"
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} done before, {how}", flush=True)
    if not waiting or workers < 1:
        return {}
    first = compose(waiting[0].overrides)
    # It prepares the data once, before several jobs need it.
    require_data(first, begins=not (waiting[0].directory / CONFIG_FILE).exists())
    failures, started = {}, time.perf_counter()
    outcomes = submit(waiting, launcher) if launcher else run_jobs(waiting, workers)
    for done, outcome in enumerate(outcomes, start=1):
        directory, result = outcome.job.directory, outcome.failure or f"best validation loss {outcome.best:.4f}"
        if outcome.failure:
            failures[directory] = result
        left = (time.perf_counter() - started) / done * (len(waiting) - done)
        print(f"{done}/{len(waiting)}  {directory.name}  {result}  {left / 60:.0f} min left", flush=True)
    return failures


def run_here(job: Job) -> Outcome:
    """Run a job in this process, with all cores. What the run prints is shown.

    Raises:
        InUse: another process is running it. SystemExit: a signal came, and the run has saved.
    """
    from train import train

    try:
        return Outcome(job, run_job(train, lambda: compose(job.overrides), job.directory))
    except InUse:
        raise
    except Exception as error:  # of any kind: the other jobs are still run
        if isinstance(error, (*USER_ERRORS, RankFailed)):
            print(error, file=sys.stderr)
        else:
            traceback.print_exc()
        return Outcome(job, None, f"{type(error).__name__}: {error}")


# ---- by Hydra's launchers ----


def submit(jobs: Sequence[Job], launcher: Sequence[str]) -> list[Outcome]:
    """Run jobs by the launcher that the overrides choose, as `python train.py -m` does, each in its own directory. Waits for all.

    Raises:
        hydra.errors.HydraException: Hydra refuses an override of the launcher.
    """
    from hydra import initialize_config_dir
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    parent = jobs[0].directory.parent
    where = [f"hydra.sweep.dir={_quoted(parent)}", f"sweep.name={_quoted(parent.name)}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None  # the `with` statement has made it
        overrides = [*jobs[0].overrides, *where, *launcher]
        config = hydra.compose_config("config", overrides, run_mode=RunMode.MULTIRUN, with_log_configuration=False)
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config))
        plugin = Plugins.instance().instantiate_launcher(context, partial(hydra_job, jobs=len(jobs)), config)
        named = [[*job.overrides, f"hydra.sweep.subdir={_quoted(job.directory.name)}"] for job in jobs]
        return [_outcome_of(job, returned) for job, returned in zip(jobs, plugin.launch(named, initial_job_idx=0))]


def _outcome_of(job: Job, returned: Any) -> Outcome:
    """The outcome in a launcher's JobReturn."""
    from hydra.errors import CompactHydraException

    try:
        return Outcome(job, returned.return_value)
    except Exception as error:
        name = "" if isinstance(error, CompactHydraException) else f"{type(error).__name__}: "
        return Outcome(job, None, name + " ".join(str(error).split()))


def _quoted(value: object) -> str:
    """A value in quotation marks, so that Hydra reads it back with every character."""
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"


# ---- by workers on this machine ----


def run_jobs(jobs: Iterable[Job], workers: int) -> Iterator[Outcome]:
    """Run jobs, `workers` at a time, each with an equal share of the cores. Yields each outcome when the job ends.

    Raises:
        Stopped: a signal came; all workers have saved and ended, or were killed after GRACE_S.
    """
    waiting, running = deque(jobs), list[_Worker]()
    threads = max(1, available_cores() // workers)
    with StopSignal() as stop:
        try:
            while (waiting or running) and not stop.noted:
                while waiting and len(running) < workers:
                    running.append(_Worker(waiting.popleft(), threads))
                time.sleep(POLL_S)
                for worker in [w for w in running if w.ended]:
                    running.remove(worker)
                    yield worker.outcome()
        finally:
            _stop(running)
        if stop.noted:
            left = sum(not worker.job.ended for worker in running) + len(waiting)
            raise Stopped(stop.noted, f"stopped; {left} runs are left, and the same command continues them")


class _Worker:
    """A process that runs one job."""

    def __init__(self, job: Job, threads: int) -> None:
        self.job = job
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "training.jobs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C reaches only the parent, which stops the workers
        )
        assert self._process.stdin is not None  # it is a pipe
        self._stdin = self._process.stdin
        task = {"overrides": job.overrides, "directory": str(job.directory), "threads": threads, "argv": sys.argv}
        with contextlib.suppress(BrokenPipeError):  # the worker was killed already
            self._stdin.write(json.dumps(task).encode() + b"\n")
            self._stdin.flush()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def outcome(self) -> Outcome:
        """The outcome of the process, which has ended. Closes its files."""
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        self._stderr.close()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        code, go_on = self._process.returncode, "the same command continues it"
        signum = code - 128 if code > 128 else -code
        if code == 0 and (end := end_of(self.job.directory)) is not None:
            return Outcome(self.job, end["best_val_loss"])
        if signum in STOP_SIGNALS:
            return Outcome(self.job, None, f"stopped by {signal.Signals(signum).name}; {go_on}")
        if code < 0:
            name = signal.Signals(signum).name
            return Outcome(self.job, None, f"killed by {name} (SIGKILL often means that memory ran out); {go_on}")
        return Outcome(self.job, None, lines[-1] if lines else f"ended with exit code {code}")

    def terminate(self) -> None:
        self._process.terminate()

    def end_by(self, moment: float) -> None:
        """Wait until a moment of time.monotonic(), then kill the process."""
        try:
            self._process.wait(max(0.0, moment - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.terminate()
    moment = time.monotonic() + GRACE_S
    for worker in workers:
        worker.end_by(moment)
        worker.outcome()


# ---- the worker ----


def run_worker() -> None:
    """Run the job that is read from standard input. If it fails, the last line on stderr is the reason."""
    exit_on_stop_signals()
    task = json.loads(sys.stdin.buffer.readline() or "null")
    if task is None:
        return  # the parent ended before it wrote the job
    threading.Thread(target=_stop_with_parent, daemon=True).start()

    import torch

    from train import train

    sys.argv = task["argv"]  # the run notes the command that was typed
    torch.set_num_threads(task["threads"])
    try:
        run_job(train, lambda: compose(task["overrides"]), Path(task["directory"]))
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(USER_ERROR if isinstance(error, USER_ERRORS) else 1) from None


def _stop_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    run_worker()
