"""A live table of a sweep: state, step, losses and remaining time of every job, read from its metrics.jsonl.

    python scripts/watch.py outputs/sweep                         until Ctrl-C
    python scripts/watch.py outputs/sweep once=true               once
    python scripts/watch.py outputs/sweep interval_s=10 stalled_s=1800

A job is waiting (it has written nothing yet), running, unstable (the run itself decided so), finished, failed, or stalled (it is unfinished
and has written nothing for `stalled_s` seconds). Lines that are no records are skipped and counted below the table. The command only reads
files: it may run on any machine that sees them, and it does not disturb the runs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scripts.analysis.search import TRIALS
from scripts.command import UsageError, parse, problems_of_names, run
from training.files import CONFIG_FILE, read_config
from training.log import METRICS_FILE, parse_record

DAY = 86_400  # seconds
WATCH_OPTIONS = {"once": False, "interval_s": 2.0, "stalled_s": 300.0}
_LONGEST_S = 1e9  # 30 years; a longer time is not shown
STATE_COLOURS = {"running": "cyan", "finished": "green", "unstable": "magenta", "failed": "red", "stalled": "yellow"}


class Watched:
    """What is known of a run. `update` reads what was written since its last call."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._forget()

    def _forget(self) -> None:
        self.step = 0
        self.train: float | None = None
        self.val: float | None = None
        self.tokens_per_s: float | None = None
        self.unstable = False
        self.last_kind: str | None = None  # of the last record: its kind, or an event's sort
        self.written_at = 0.0  # seconds since the epoch
        self.damaged = 0  # lines that were skipped
        self.problem: str | None = None  # why a file could not be read at the last update
        self.max_steps: int | None = None
        self.tokens_per_step: int | None = None
        self._inode, self._read_bytes = 0, 0

    def update(self) -> None:
        """Read the new lines. A resumed run has replaced its file; then the file is read from its beginning."""
        self.problem = None
        try:
            self._read_on(self.directory / METRICS_FILE)
            if self.max_steps is None and self.last_kind is not None:
                config = read_config(self.directory)
                steps, tokens = config.get("max_steps"), config.get("global_batch_tokens")
                if type(steps) is not int or type(tokens) is not int:
                    raise ValueError(f"{self.directory / CONFIG_FILE} has no max_steps or no global_batch_tokens")
                self.max_steps, self.tokens_per_step = steps, tokens
        except (OSError, ValueError) as error:
            self.problem = str(error)

    def _read_on(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._inode or stat.st_size < self._read_bytes:
                    self._forget()
                file.seek(self._read_bytes)
                new = file.read()
        except FileNotFoundError:
            return
        whole = new[: new.rfind(b"\n") + 1]  # the last line may be incomplete
        self._inode, self.written_at = stat.st_ino, stat.st_mtime
        self._read_bytes += len(whole)
        for line in whole.splitlines():
            try:
                self._take(line)
            except (ValueError, LookupError, TypeError, OverflowError):
                self.damaged += 1

    def _take(self, line: bytes) -> None:
        """Take over what a line says.

        Raises:
            ValueError, LookupError, TypeError, OverflowError: it is no record, or a field of its kind is missing.
        """
        if line.startswith(b'{"kind": "spectra"'):  # thousands of numbers that the table does not show
            self.last_kind = "spectra"
            return
        record = parse_record(line)
        if record is None:
            raise ValueError("no record")
        kind = record["kind"]
        if kind == "train":
            self.train, self.tokens_per_s = float(record["loss"]), float(record["tokens_per_s"])
        elif kind == "eval":
            self.val = float(record["loss"])
        elif kind == "event":
            kind = str(record["event"])
            self.unstable |= kind == "unstable"
        self.step, self.last_kind = record["step"], kind

    def state(self, now: float, stalled_s: float) -> str:
        """The state of the job in one word. now: seconds since the epoch."""
        if self.last_kind is None:
            return "waiting"
        if self.last_kind == "failed":
            return "failed"
        if self.last_kind != "end" and now - self.written_at > stalled_s:
            return "stalled"
        if self.unstable:
            return "unstable"
        return "finished" if self.last_kind == "end" else "running"

    def seconds_left(self) -> float | None:
        """Remaining time at the speed of the last training record; None if the speed is unknown or nothing is left."""
        if self.max_steps is None or self.tokens_per_step is None or not self.tokens_per_s or self.last_kind == "end":
            return None
        left = (self.max_steps - self.step) * self.tokens_per_step / self.tokens_per_s
        return left if 0 <= left < _LONGEST_S else None


def find_jobs(sweep: Path, known: dict[Path, Watched]) -> dict[Path, Watched]:
    """The jobs of a sweep by directory, sorted by name, with the trials of an experiment. A single run counts as a sweep of one job.

    Raises:
        UsageError: the directory cannot be read.
    """
    if (sweep / METRICS_FILE).exists():
        found = [sweep]
    else:
        try:
            inside = sorted([*sweep.iterdir(), *(sweep / TRIALS).glob("*")])
            found = [p for p in inside if p.is_dir() and not p.name.startswith(".") and _may_be_job(p)]
        except OSError as error:
            raise UsageError(f"{sweep} cannot be read ({error.strerror}); name a sweep's directory") from error
    return {path: known.get(path) or Watched(path) for path in found}


def _may_be_job(folder: Path) -> bool:
    """Whether a folder of a sweep is a job: it holds a run, or no files yet. The folder of trials and one of pictures are none."""
    files = [file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    return folder.name != TRIALS and (not files or METRICS_FILE in files or CONFIG_FILE in files)


def require_jobs(sweep: Path, jobs: Iterable[Path], once: bool) -> None:
    """Check that the directories found in a sweep's are jobs. Those of a sweep that just began have written nothing yet.

    Raises:
        UsageError: there are none and the table is printed once, or they are sweeps: runs lie below them.
    """
    jobs = list(jobs)
    if once and not jobs:
        raise UsageError(f"{sweep} holds no jobs; name the directory of a sweep, such as outputs/sweep")
    if any((job / METRICS_FILE).exists() for job in jobs):
        return
    first = next((file for job in jobs for file in sorted(job.rglob(METRICS_FILE))), None)
    if first is not None:
        found = first.parent.parent
        found = found.parent if found.name == TRIALS else found
        raise UsageError(f"{sweep} holds sweeps, no jobs; name one, such as {found}")


def short_names(jobs: Sequence[Path]) -> list[str]:
    """The names of the jobs' directories, without the overrides that all jobs share."""
    parts = [path.name.split(",") for path in jobs]
    shared = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    return [",".join(p for p in mine if p not in shared) or ",".join(mine) for mine in parts]


def jobs_table(jobs: dict[Path, Watched], stalled_s: float) -> Table:
    """The table, with one row for each job."""
    grid = Table(box=None, pad_edge=False)
    grid.add_column("job", overflow="fold")
    grid.add_column("state")
    for title in ("step", "train", "val", "left"):
        grid.add_column(title, justify="right")
    now = time.time()
    for name, job in zip(short_names(list(jobs)), jobs.values()):
        state, left = job.state(now, stalled_s), job.seconds_left()
        steps = str(job.step) if job.max_steps is None else f"{job.step}/{job.max_steps}"
        grid.add_row(
            Text(name),
            Text(state, style=STATE_COLOURS.get(state, "")),
            "" if state == "waiting" else steps,
            "" if job.train is None else f"{job.train:.4f}",
            "" if job.val is None else f"{job.val:.4f}",
            str(timedelta(seconds=round(left))) if left is not None and state in ("running", "unstable") else "",
        )
    grid.caption, grid.caption_justify = Text("\n".join(remarks(jobs))), "left"
    return grid


def remarks(jobs: dict[Path, Watched]) -> list[str]:
    """What could not be read: one line for each job."""
    found = [
        f"{path}: {job.damaged} lines are no records; they were skipped" for path, job in jobs.items() if job.damaged
    ]
    return found + [f"{path}: {job.problem}" for path, job in jobs.items() if job.problem]


def work(arguments: list[str]) -> int:
    """Print the table, once or until interrupted."""
    remedy = (
        "name one sweep and, if you like, once=true, interval_s= and stalled_s=, such as: "
        "python scripts/watch.py outputs/sweep once=true"
    )
    others, options = parse(arguments, WATCH_OPTIONS, partial(problems_of_names, count=1, remedy=remedy))
    if not 0 < options["interval_s"] <= DAY:
        raise UsageError(
            f"interval_s={options['interval_s']} is no time to wait; give seconds, above 0 and up to {DAY}"
        )
    if not options["stalled_s"] > 0:
        raise UsageError(f"stalled_s={options['stalled_s']} is no time without news; give seconds above 0, such as 300")
    sweep, stalled_s = Path(others[0]), options["stalled_s"]
    if not sweep.is_dir():
        raise UsageError(f"there is no directory {sweep}; name a sweep's, such as outputs/sweep")
    jobs = find_jobs(sweep, {})
    require_jobs(sweep, jobs, options["once"])

    def look() -> Table:
        nonlocal jobs
        jobs = find_jobs(sweep, jobs)
        for job in jobs.values():
            job.update()
        return jobs_table(jobs, stalled_s)

    if options["once"]:
        Console().print(look())
        return 0
    try:
        with Live(look(), auto_refresh=False) as live:
            while True:
                time.sleep(options["interval_s"])
                live.update(look(), refresh=True)
    except KeyboardInterrupt:
        return 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
