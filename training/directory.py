"""The directory of a run: its name, its lock, and the record with which the run in it ended."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import date
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training.files import CONFIG_FILE, read_config
from training.lock import LOCK_FILE, DirectoryLock, InUse
from training.log import METRICS_FILE, parse_record
from training.machine import peak_device_bytes
from training.settings import Settings
from training.stability import Stability
from training.validate import ConfigError

if TYPE_CHECKING:
    from training.ranks import Ranks

_TAIL_BYTES = 1 << 16  # the end of a log; larger than any `end` record
LONGEST_NAME = 250  # bytes; file systems allow 255, and a dot and a number may be added


def run_name(cfg: Settings) -> str:
    """The configured name, or that of the assignment in lower case with `_` for `-`."""
    return _as_name(cfg.assignment.name) if cfg.name is None else cfg.name


def _as_name(assignment: str) -> str:
    return assignment.lower().replace("-", "_")


def problems_of_names(cfg: Settings) -> list[str]:
    """Names of the run and of its sweep that cannot be names of directories."""
    run = "assignment.name" if cfg.name is None else "name"
    names = {run: run_name(cfg), "sweep.name": cfg.sweep.name}
    return [f"{key} {why}" for key, name in names.items() if (why := refused_name(name))]


def refused_name(name: Any) -> str | None:
    """Why a text cannot be the name of one directory; None if it can."""
    name = str(name)
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        return f'is {name!r}, which is not the name of one directory; leave out "/" and ".."'
    if len(os.fsencode(name)) > LONGEST_NAME:
        return f"has {len(os.fsencode(name))} bytes; file systems allow {LONGEST_NAME} and a number"
    return None


@contextmanager
def claimed(ranks: Ranks, cfg: Settings, directory: Path | None) -> Iterator[Path]:
    """A context with the directory of this run, the same on all ranks; rank 0 holds its lock.

    Args:
        directory: where the run is written; None if the configuration decides.

    Raises:
        ConfigError: as `claim`, on every rank.
    """
    with ExitStack() as stack:
        yield ranks.from_main(lambda: stack.enter_context(claim(cfg, directory)).directory)


def claim(cfg: Settings, directory: Path | None = None) -> DirectoryLock:
    """Choose the directory of a run and lock it. With `resume=auto` and no directory, it is that of the newest run of the same name.

    Raises:
        InUse: another process writes there. ConfigError: the directory holds a run that `resume` does not continue, or it cannot be
        written to.
    """
    given = directory or (Path(cfg.output_dir) if cfg.output_dir else None)
    try:
        if given is None:
            newest = _claim_newest(run_name(cfg)) if cfg.resume == "auto" else None
            return newest or _claim_new(run_name(cfg))
        lock = DirectoryLock(given)
    except OSError as error:
        where = given or error.filename
        raise ConfigError([f"{where} cannot be written to ({error.strerror}); choose another output_dir"]) from error
    if cfg.resume == "never" and (given / METRICS_FILE).exists():
        lock.release()
        raise ConfigError(
            [f"{given} already holds a run; add resume=auto to continue it, or choose another output_dir"]
        )
    return lock


def _claim_new(name: str) -> DirectoryLock:
    first = Path("outputs") / date.today().isoformat() / name
    for number in count(1):
        with suppress(FileExistsError, InUse):
            return DirectoryLock(first if number == 1 else first.with_name(f"{name}.{number}"), new=True)
    raise AssertionError  # never reached


def _claim_newest(name: str) -> DirectoryLock | None:
    """The lock of the newest run of this name; None if there is none. A run that another process has just started counts too."""
    found = []
    for path in Path("outputs").glob("[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]/*"):
        if _is_named(path, name) and (time := _time(path / METRICS_FILE) or _time(path / LOCK_FILE)):
            found.append((time, path))
    for _, path in sorted(found, reverse=True):
        lock = DirectoryLock(path)
        if (path / METRICS_FILE).exists():
            return lock
        lock.release()  # left by a process that was killed before it wrote a record
    return None


def _time(path: Path) -> float | None:
    """When a file was last written (seconds); None if it does not exist."""
    try:
        return path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_named(directory: Path, name: str) -> bool:
    """Whether the run in a directory has this name, numbered or not: "a.2" is the second run of "a", or the first of "a.2"."""
    if directory.name != name and not re.fullmatch(re.escape(name) + r"\.[1-9][0-9]*", directory.name):
        return False
    config = directory / CONFIG_FILE
    try:
        saved = read_config(directory) if config.exists() else None
        return saved is None or str(saved["name"] or _as_name(saved["assignment"]["name"])) == name
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True


def end_of(directory: Path) -> dict[str, Any] | None:
    """The `end` record of a run (`end_summary`), if it is the last record; None if the run has not ended or was continued."""
    try:
        with (directory / METRICS_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().rpartition(b"\n")[0].splitlines()  # the last may be incomplete
    except (FileNotFoundError, NotADirectoryError):
        return None
    last = next((record for line in reversed(lines) if (record := parse_record(line))), None)
    return last if last is not None and last["kind"] == "end" else None


def end_summary(stability: Stability, seconds: float, device: torch.device) -> dict[str, Any]:
    """The fields of the `end` record: what a table shows of a finished run. Times in seconds, memory in bytes."""
    return {
        "best_val_loss": stability.best,
        "best_step": stability.best_step,
        "unstable_step": stability.unstable_step,
        "reason": stability.reason,
        "warning_lead": stability.lead,
        "train_seconds": seconds,
        "peak_device_bytes": peak_device_bytes(device),
    }
