"""Many small runs side by side: what an experiment script needs to fill a grid, stop, and go on.

A run that has ended is not run again, an unfinished one resumes, and one that fails is a row of the table, not the end of the grid.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.runs import refuse_other_settings
from training.config import compose
from training.engine import Job, run_jobs
from training.files import CONFIG_FILE

__all__ = ["Job", "exit_code", "run_grid"]


def run_grid(jobs: Sequence[Job], workers: int) -> dict[Path, str]:
    """Run what has not ended yet, `workers` at a time; returns the reason for each directory whose run failed.

    No workers run nothing: whoever asks for none wants a table of what there is. Prints one line a finished run: how many are done,
    which it was, its best validation loss, the time left at this pace.

    Raises:
        UsageError: a directory holds a run with other settings; nothing was run. Stopped: a signal came, and the runs have saved.
    """
    for job in jobs:
        if (job.directory / CONFIG_FILE).exists():
            refuse_other_settings(compose(job.overrides).plain(), job.directory)
    waiting = [job for job in jobs if not job.ended]
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} done before, {workers} at a time", flush=True)
    if not waiting or workers < 1:
        return {}
    failures, started = {}, time.perf_counter()
    for done, outcome in enumerate(run_jobs(waiting, workers), start=1):
        directory, said = outcome.job.directory, outcome.failure or f"best validation loss {outcome.best:.4f}"
        if outcome.failure:
            failures[directory] = said
        left = (time.perf_counter() - started) / done * (len(waiting) - done)
        print(f"{done}/{len(waiting)}  {directory.name}  {said}  {left / 60:.0f} min left", flush=True)
    return failures


def exit_code(failures: Mapping[Path, str]) -> int:
    """Say on stderr which runs failed, and why; returns 1 if any did."""
    for directory, reason in failures.items():
        print(f"failed: {directory}: {reason}", file=sys.stderr)
    return 1 if failures else 0
