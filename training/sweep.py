"""One job among many: where it is written, whether it is finished, what it cost, and why it failed.

A job's directory says all of it. So whatever runs many jobs (a sweep, an experiment, `reproduce`) can be started again: what is
finished is skipped, and what is not is continued.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf

from training.checkpoint import check_same
from training.checks import USER_ERRORS, check
from training.files import CONFIG_FILE, read_config, write_whole
from training.launch import RankFailed, Worker, launch
from training.lock import DirectoryLock, InUse
from training.log import METRICS_FILE, RunLog, read_records
from training.resume import HARMLESS
from training.run import end_of
from training.settings import Settings
from training.signals import Stopped
from training.validate import ConfigError

COST_FILE = "cost.json"

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


def run_job(worker: Worker, configure: Callable[[], Settings], directory: Path) -> float:
    """Run a job in this process, or go on with it; returns its best validation loss (nats a token), at once if it is finished.

    A failure is written into the job's records, for whoever watches, and then raised: the caller may go on with the other jobs.

    Raises:
        ConfigError and others of USER_ERRORS: nothing was run. SystemExit: a signal came, and the run has saved. Whatever else
        `launch` raises.
    """
    try:
        cfg = configure()
        check(cfg)
        cfg, best = plan_job(cfg, directory)
    except USER_ERRORS as error:
        if not (directory / METRICS_FILE).exists():  # it may hold another run
            note_failure(directory, error)
        raise
    if best is not None:
        print(f"{directory} is finished")
        return best
    started = time.perf_counter()
    try:
        return launch(worker, cfg, directory, USER_ERRORS)
    except Stopped as stopped:
        raise SystemExit(stopped.code) from None  # which is all that is left to say: `launch` has printed the rest
    except Exception as error:
        with suppress(OSError):  # a full disk may be what went wrong
            note_failure(directory, error, cfg)
        raise
    finally:
        with suppress(OSError, InUse):
            add_cost(directory, time.perf_counter() - started)


def hydra_job(config: Any) -> float:
    """A job as Hydra's launchers call it, here or on a node of a cluster; after one that fails the others go on."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import CompactHydraException

    from train import train
    from training.checks import read
    from training.config import resolved

    directory = Path(HydraConfig.get().runtime.output_dir)
    try:
        return run_job(train, lambda: read(resolved(config)), directory)
    except Exception as error:
        print(f"{directory} failed: {error}", file=sys.stderr, flush=True)
        if isinstance(error, (*USER_ERRORS, RankFailed)):
            raise CompactHydraException(str(error)) from None  # which Hydra prints without a traceback
        raise


# ---- what a directory says ----


def plan_job(cfg: Settings, directory: Path) -> tuple[Settings, float | None]:
    """What is to be done with a job: the configuration to run, and the best validation loss if it is finished already.

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
    return cfg, finished(cfg, directory)


def finished(cfg: Settings, directory: Path, remedy: str = "choose a sweep.name") -> float | None:
    """The best validation loss of a job that has come to its end; None if something is left to do.

    Raises:
        ConfigError: the directory holds a run with other settings, or one whose configuration cannot be read; with the remedy.
    """
    if not (directory / METRICS_FILE).exists() or not (directory / CONFIG_FILE).exists():
        return None
    try:
        saved = read_config(directory)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{error}; mend that file, or {remedy}"]) from error
    if changed := other_settings(saved, cfg.plain()):
        raise ConfigError([f"{directory} holds a run with other settings ({'; '.join(changed)}); {remedy}"])
    end = end_of(directory)
    return None if end is None else end["best_val_loss"]


def other_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations and makes two runs of them, as "key: before → after"."""
    # A run may be continued to more steps; one that ended at fewer is another result all the same.
    return check_same(saved, now, ignore=[key for key in HARMLESS if key != "max_steps"])


def note_failure(directory: Path, error: BaseException, cfg: Settings | None = None) -> None:
    """Write into a job's records that it failed, and its configuration where it has none; not where another process goes on with it."""
    with suppress(InUse), DirectoryLock(directory):
        if cfg is not None and not (directory / CONFIG_FILE).exists():
            write_whole(directory / CONFIG_FILE, yaml.safe_dump(cfg.plain(), sort_keys=False))
        exists = (directory / METRICS_FILE).exists()
        step = max((record["step"] for record in read_records(directory)), default=0) if exists else 0
        log = RunLog(directory)
        log.write("event", step, event="failed", message=" ".join(str(error).split()) or type(error).__name__)
        log.close()


def add_cost(directory: Path, seconds: float) -> None:
    """Add this process's time to what the job has cost so far, and note the most memory (bytes) that any of its processes needed."""
    if not directory.exists() or os.environ.get("SLURM_NODEID", "0") != "0":
        return  # it ended before it began; or the first of the nodes says it
    path = directory / COST_FILE
    before = json.loads(path.read_text()) if path.exists() else {"wall_seconds": 0.0, "peak_bytes": 0}
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    used = (resource.getrusage(who).ru_maxrss * unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cost = {
        "wall_seconds": before["wall_seconds"] + seconds,
        "peak_bytes": max(before["peak_bytes"], *used),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
    }
    with DirectoryLock(directory):
        write_whole(path, json.dumps(cost) + "\n")


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
