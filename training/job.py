"""One job of many: its directory, whether it is finished, what it cost, and why it failed.

All of this stands in the job's directory. So a command that runs many jobs (a sweep, an experiment, `reproduce`) can be started again: it
skips the finished jobs and continues the others.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from data.parallel import available_cores
from training.checks import USER_ERRORS, check, read
from training.config import compose, resolved
from training.data import problems_of_data
from training.directory import end_of
from training.files import CONFIG_FILE, read_config, write_whole
from training.launch import RankFailed, Worker, launch
from training.lock import DirectoryLock, InUse
from training.log import METRICS_FILE, RunLog, read_records
from training.resume import HARMLESS, differences
from training.settings import Settings
from training.signals import Stopped
from training.validate import ConfigError

COST_FILE = "cost.json"
# A run may be continued with another value of these, but a whole run has another result with it.
_DECISIVE = ("max_steps", "init_from", "full_eval")
SAME_RESULT = tuple(key for key in HARMLESS if key not in _DECISIVE)
"""Settings of which two runs may differ and still count as the same run; some change rounding."""


def run_job(worker: Worker, configure: Callable[[], Settings], directory: Path) -> float:
    """Run or continue a job in this process; returns its best validation loss (nats a token). A finished job is not run again.

    A failure is written into the job's records, where scripts/watch.py finds it, and then raised. The caller may run the other jobs.

    Raises:
        ConfigError and others of USER_ERRORS: nothing was run. SystemExit: a signal came, and the run has saved. And everything that
        `launch` raises.
    """
    try:
        cfg = configure()
        check(cfg)
        cfg, best = plan_job(cfg, directory)
    except USER_ERRORS as error:
        if not (directory / METRICS_FILE).exists():  # it may hold another run
            note_failure(directory, error)  # without its settings: with corrected ones, the job may use this directory
        raise
    if best is not None:
        print(f"{directory} is finished")
        return best
    started = time.perf_counter()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak memory of this process starts anew (Linux)
    try:
        return launch(worker, cfg, directory)
    except Stopped as stopped:
        raise SystemExit(stopped.code) from None  # `launch` has printed the message
    except Exception as error:
        note_failure(directory, error, cfg)
        raise
    finally:
        with suppress(OSError, InUse):
            add_cost(directory, time.perf_counter() - started)


def check_jobs(jobs: Sequence[tuple[str, Sequence[str]]], here: bool, directory: str | None = None) -> None:
    """Check the configuration of every job before the first one is run, and the data unless the directory of the sweep exists.

    A sweep that is continued may be finished, and then needs no data.

    Args:
        jobs: for each, what distinguishes it, and its overrides of train.py.
        here: whether the jobs run on this machine; if not, only the values are checked.
        directory: of the sweep; None for outputs/<sweep.name>.

    Raises:
        ConfigError: some are wrong. It lists each problem once, with the first job that has it if others do not.
    """
    found: dict[str, list[str]] = {}
    of_data: dict[str, list[str]] = {}  # jobs with the same data open them once
    for name, overrides in jobs:
        try:
            cfg = compose(overrides)
            if here:
                check(cfg)
                if not Path(directory or f"outputs/{cfg.sweep.name}").exists():
                    data = repr((cfg.data, cfg.model.vocab_size, cfg.resume))
                    if data not in of_data:
                        of_data[data] = problems_of_data(cfg)
                    if of_data[data]:
                        raise ConfigError(of_data[data])
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(name)
    if found:
        raise ConfigError(problem + _where(names, len(jobs)) for problem, names in found.items())


def _where(names: Sequence[str], jobs: int) -> str:
    """Which jobs of a sweep have a problem, as the end of a line; nothing if all have it."""
    if len(names) == jobs:
        return ""
    return f" (in {names[0]})" if len(names) == 1 else f" (in {len(names)} of {jobs} jobs; the first is {names[0]})"


def hydra_job(config: Any, jobs: int | None = None, given: Sequence[str] = ()) -> float:
    """Run a job for one of Hydra's launchers, here or on a node of a cluster. If a job fails, the others are still run.

    jobs: how many jobs the sweep has, if that is known. given: see `train`.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import CompactHydraException

    from train import train

    directory, number = Path(HydraConfig.get().runtime.output_dir), HydraConfig.get().job.num + 1
    label = f"job {number}/{jobs}" if jobs else f"job {number}"
    print(f"\n{label}: {directory.name}", flush=True)
    try:
        return run_job(partial(train, label=label, given=given), lambda: read(resolved(config)), directory)
    except Exception as error:
        # the other jobs do write, so without the first line of a ConfigError
        why = "\n".join(error.problems) if isinstance(error, ConfigError) else str(error)
        print(f"{directory} failed: {why}", file=sys.stderr, flush=True)
        if isinstance(error, (*USER_ERRORS, RankFailed)):
            raise CompactHydraException(why) from None  # Hydra prints it without a traceback
        raise


# ---- what stands in a directory ----


def plan_job(cfg: Settings, directory: Path) -> tuple[Settings, float | None]:
    """The configuration to run, and the best validation loss (nats a token) if the job is finished already, else None.

    Args:
        cfg: the job's configuration.
        directory: the job's; it may hold an unfinished run of the job, which is continued.

    Raises:
        ConfigError: the directory holds another run, or `sweep.resume` is false and it holds any.
    """
    if cfg.sweep.resume:
        begun = cfg.resume in ("never", "auto") or (directory / METRICS_FILE).exists()
        cfg = replace(cfg, resume="auto" if begun else cfg.resume)  # a checkpoint named is where each job begins
    elif (directory / METRICS_FILE).exists():
        raise ConfigError(
            [f"{directory} already holds a run; set sweep.resume=true to continue it, or choose another sweep.name"]
        )
    return cfg, finished(cfg, directory)


def finished(cfg: Settings, directory: Path, remedy: str = "choose a sweep.name") -> float | None:
    """The best validation loss (nats a token) of a job that has ended; None if it has not.

    Raises:
        ConfigError: the directory holds a run with other settings, or its configuration cannot be read. The message ends with `remedy`.
    """
    if not (directory / METRICS_FILE).exists() or not (directory / CONFIG_FILE).exists():
        return None
    try:
        saved = read_config(directory)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{error}; repair that file, or {remedy}"]) from error
    if changed := other_settings(saved, cfg.plain()):
        raise ConfigError([f"{directory} holds a run with other settings ({'; '.join(changed)}); {remedy}"])
    end = end_of(directory)
    return None if end is None else end["best_val_loss"]


def other_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two configurations that make them different runs, as "key: before → after"."""
    return differences(saved, now, ignore=SAME_RESULT)


def note_failure(directory: Path, error: BaseException, cfg: Settings | None = None) -> None:
    """Write into a job's records that it failed, and its configuration if it has none; not if another process is running it."""
    with suppress(InUse, OSError), DirectoryLock(directory):  # the reason may be a full disk
        if cfg is not None and not (directory / CONFIG_FILE).exists():
            write_whole(directory / CONFIG_FILE, yaml.safe_dump(cfg.plain(), sort_keys=False))
        exists = (directory / METRICS_FILE).exists()
        step = max((record["step"] for record in read_records(directory)), default=0) if exists else 0
        log = RunLog(directory)
        log.write("event", step, event="failed", message=" ".join(str(error).split()) or type(error).__name__)
        log.close()


def add_cost(directory: Path, seconds: float) -> None:
    """Add this process's seconds to the cost of the job, and note the peak memory (bytes) of its largest process."""
    if not directory.exists() or os.environ.get("SLURM_NODEID", "0") != "0":
        return  # the run wrote nothing; or the first node notes the cost
    path, unit = directory / COST_FILE, 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    used = (resource.getrusage(who).ru_maxrss * unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    with DirectoryLock(directory):
        before = json.loads(path.read_text()) if path.exists() else {"wall_seconds": 0.0, "peak_bytes": 0}
        cost = {
            "wall_seconds": before["wall_seconds"] + seconds,
            "peak_bytes": max(before["peak_bytes"], *used),
            "cores": available_cores(),
            "threads": torch.get_num_threads(),
        }
        write_whole(path, json.dumps(cost) + "\n")
