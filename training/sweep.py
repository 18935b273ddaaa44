"""A sweep that is started twice: its jobs have fixed directories, so what is finished is skipped and what is not is continued."""

from __future__ import annotations

import hashlib
import re
from collections import deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from training.checkpoint import check_same
from training.files import CONFIG_FILE, read_config
from training.lock import DirectoryLock, InUse
from training.log import METRICS_FILE, RunLog, read_records
from training.resume import HARMLESS
from training.settings import Settings
from training.validate import ConfigError

_LONGEST_PART, _LONGEST_NAME = 40, 200  # characters; file systems stop at 255 bytes


def directory_name(overrides: str) -> str:
    """A job's overrides (`a=1,b=2`) as the name of one directory.

    What a name cannot hold is replaced and what is long is shortened; a hash then keeps such names apart.

    >>> directory_name("assignment=hetero,seed=1")
    'assignment=hetero,seed=1'
    """
    parts = [re.sub(r"[^\w.=+:-]+", "_", part)[:_LONGEST_PART] for part in overrides.split(",")]
    name = ",".join(parts)[:_LONGEST_NAME]
    if name == overrides and name not in ("", ".", ".."):
        return name
    return f"{name}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}" if overrides else "defaults"


# Named in configs/config.yaml, where Hydra resolves it; registered on import, so that it is known on a cluster's nodes too.
OmegaConf.register_new_resolver("directory_name", directory_name, replace=True)


def plan_job(cfg: Settings, directory: Path) -> tuple[Settings, float | None]:
    """What a sweep does with a job: the configuration to run, and the best validation loss if it is finished already.

    Args:
        cfg: the job's configuration.
        directory: of the job; it may hold an earlier attempt, which is continued.

    Raises:
        ConfigError: the directory holds another run, or `sweep.resume` is false and it holds any.
    """
    if cfg.sweep.resume:
        cfg = replace(cfg, resume="auto")
    elif (directory / METRICS_FILE).exists():
        raise ConfigError([f"{directory} already holds a run; set sweep.resume=true to go on with it, or a sweep.name"])
    if not (directory / METRICS_FILE).exists() or not (directory / CONFIG_FILE).exists():
        return cfg, None
    try:
        saved = read_config(directory)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{error}; mend that file, or choose a sweep.name"]) from error
    changed = check_same(saved, cfg.plain(), ignore=[key for key in HARMLESS if key != "max_steps"])
    if changed:
        raise ConfigError([f"{directory} holds a run with other settings ({'; '.join(changed)}); choose a sweep.name"])
    last = _last_record(directory)
    if last is not None and last["kind"] == "end":
        return cfg, last["best_val_loss"]
    return cfg, None


def note_failure(directory: Path, error: BaseException) -> None:
    """Write into a job's records that it failed, for whoever watches the sweep; not where another process goes on with it."""
    with suppress(InUse), DirectoryLock(directory):
        last = _last_record(directory) if (directory / METRICS_FILE).exists() else None
        message = " ".join(str(error).split()) or type(error).__name__
        log = RunLog(directory)
        log.write("event", 0 if last is None else last["step"], event="failed", message=message)
        log.close()


def _last_record(directory: Path) -> dict[str, Any] | None:
    return next(iter(deque(read_records(directory), maxlen=1)), None)
