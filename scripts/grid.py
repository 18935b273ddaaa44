"""Many small runs side by side: what an experiment script needs to fill a grid, stop, and go on.

Each worker is one process with its share of the cores; a run that has ended is not run again, an unfinished one resumes, and one that
fails is a row of the table, not the end of the grid.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from scripts.runs import CONFIG_FILE, refuse_other_settings
from training.config import compose
from training.log import METRICS_FILE, read_records


@dataclass(frozen=True)
class Job:
    """One run: overrides of train.py, and the directory it is written to."""

    overrides: tuple[str, ...]
    directory: Path

    @property
    def ended(self) -> bool:
        """Whether it has come to its end."""
        file = self.directory / METRICS_FILE
        return file.exists() and next(read_records(file, "end"), None) is not None


def run_grid(jobs: Sequence[Job], workers: int) -> dict[Path, str]:
    """Run what has not ended yet, `workers` at a time; returns the reason for each directory whose run failed.

    No workers run nothing: whoever asks for none wants a table of what there is. Prints one line a finished run: how many are done,
    which it was, its best validation loss, the time left at this pace.

    Raises:
        UsageError: a directory holds a run with other settings; nothing was run.
    """
    for job in jobs:
        if (job.directory / CONFIG_FILE).exists():
            refuse_other_settings(compose(job.overrides), job.directory)
    waiting = [job for job in jobs if not job.ended]
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} done before, {workers} at a time", flush=True)
    if not waiting or workers < 1:
        return {}
    failures, started = {}, time.perf_counter()
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(threads,)) as pool:
        pending = {pool.submit(_run, job): job for job in waiting}
        for done, future in enumerate(as_completed(pending), start=1):
            job = pending[future]
            try:
                outcome = f"best validation loss {future.result():.4f}"
            except Exception as error:  # the other runs are worth having
                outcome = failures[job.directory] = f"{type(error).__name__}: {error}"
            left = (time.perf_counter() - started) / done * (len(waiting) - done)
            print(f"{done}/{len(waiting)}  {job.directory.name}  {outcome}  {left / 60:.0f} min left", flush=True)
    return failures


def exit_code(failures: Mapping[Path, str]) -> int:
    """Say on stderr which runs failed, and why; returns 1 if any did."""
    for directory, reason in failures.items():
        print(f"failed: {directory}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)


def _run(job: Job) -> float:
    """Train one job in this worker, silently."""
    from train import train

    job.directory.parent.mkdir(parents=True, exist_ok=True)
    if not any((job.directory / "checkpoints").glob("step_*")):
        (job.directory / METRICS_FILE).unlink(missing_ok=True)  # stopped before its first checkpoint: it starts over
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return train(compose([*job.overrides, "resume=auto"]), job.directory)
