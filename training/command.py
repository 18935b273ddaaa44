"""The command line of training: Hydra composes the configuration, the launcher starts the ranks. An error of the user ends with exit code 2."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import IntervalSweep
from hydra.types import RunMode
from omegaconf import OmegaConf

from training.config import CONFIGS, error_of_words, resolved
from training.help import help_text
from training.overrides import (
    REFUSALS,
    jobs_of,
    keys_set,
    parsed,
    problems_of_words,
    refuse_values_for_groups,
    swept_keys,
)
from training.validate import ConfigError

EXTRAS = (
    ("hydra/launcher=submitit", "hydra_submitit_launcher", "slurm"),
    ("hydra/sweeper=optuna", "hydra_optuna_sweeper", "hpo"),
)
"""Start of a word of the command line, the Hydra plugin that it needs, and the extra of this package that installs it."""

SWEEP_FLAGS = {"-m", "--multirun"}


def run_command(about: str) -> int:
    """Run the process's command line: one run, one rank of a run, or a sweep; returns the exit code.

    Help (`about` and what is in configs/) and `--cfg` do not import torch, which takes a second.
    """
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends without a traceback
        print(help_text(about, words))
        return 0
    given, unknown = get_args_parser().parse_known_args(words)
    if unknown:
        return _refuse(f"{' '.join(unknown)}: {rewritten(words, given.overrides, unknown)}")
    jobs = jobs_of(given.overrides) if given.multirun else None
    if (why := refusal(words)) is not None:
        return _refuse(why)
    if jobs is not None and given.cfg is None and (wrong := wrong_jobs(given.overrides, jobs)) is not None:
        return _refuse(wrong)
    # Our settings of a plugin have the name of its schema; Hydra warns that it checks them against this schema.
    warnings.filterwarnings("ignore", message="(?s).*validated against ConfigStore schema with the same name")
    if given.multirun and (swept := swept_keys(given.overrides)):
        place = sys.argv.index(given.overrides[0])
        sys.argv[place:place] = naming(swept)  # the parser of Hydra refuses overrides behind options
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors; otherwise it prints the first one
    composed = False

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
    def run(config: Any) -> float:
        nonlocal composed
        composed = True
        sys.argv[1:] = words  # the run notes what was typed, without the words of `naming`
        return _job(config, len(jobs) if jobs is not None else None)

    try:
        refuse_values_for_groups(given.overrides)
        run()
    except REFUSALS as error:
        if not composed:
            return _refuse(error_of_words(given.overrides, error, given.multirun))
        reason = str(error).partition("\n")[0]
        print(f"not every job of the sweep ended; the first that failed: {reason}", file=sys.stderr)
        return 1
    return 0


def rewritten(words: Sequence[str], overrides: Sequence[str], unknown: Sequence[str]) -> str:
    """The remedy for words that are no options: settings have no dashes, and stand together, behind the options."""
    settings = [word.lstrip("-") for word in words if word in (*overrides, *unknown)]
    options = [word for word in words if word not in (*overrides, *unknown)]
    return "write settings without dashes, behind the options: " + shlex.join(
        ["python", "train.py", *options, *settings]
    )


def naming(swept: Sequence[str]) -> list[str]:
    """Words for Hydra: the directories of a sweep are named by the keys that differ between its jobs, whichever these are."""
    name = "hydra.job.config.override_dirname.exclude_keys"
    left_out = OmegaConf.select(OmegaConf.load(CONFIGS / "config.yaml"), name)
    return [
        f"{name}=[{','.join(key for key in left_out if key not in swept)}]",
        f"hydra.sweep.subdir='${{directory_name:${{hydra.job.override_dirname}},{' '.join(swept)}}}'",
    ]


def _refuse(why: object) -> int:
    """Print once for all ranks why the command line cannot run; returns the exit code."""
    from training.launch import USER_ERROR, is_main_process

    if is_main_process():
        print(why, file=sys.stderr)
    return USER_ERROR


def _job(config: Any, jobs: int | None) -> float:
    """Run a composed configuration: the run of the command, or one job of its sweep, which has `jobs` of them."""
    from train import train
    from training.checks import USER_ERRORS, check, read
    from training.job import hydra_job
    from training.launch import RankFailed, launch, tell_user

    words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)  # not resolved: a word may have a reference
    given = keys_set(words, config)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return report(hydra_job(config, jobs, given))
    try:
        cfg = read(resolved(config))
        if "RANK" not in os.environ:  # each rank checks in `train`; the message is printed once
            check(cfg)
        return report(launch(partial(train, given=given), cfg, None))
    except (*USER_ERRORS, RankFailed) as error:
        raise SystemExit(tell_user(error)) from None


def report(best: float) -> float:
    """Print the last line of a run."""
    from training.launch import is_main_process

    if is_main_process():
        print(f"best validation loss {best:.4f}", flush=True)
    return best


def refusal(arguments: Sequence[str]) -> str | None:
    """Why this command line cannot run here, and what to do instead; None if it can."""
    for word, plugin, extra in EXTRAS:
        if any(a.startswith(word) for a in arguments) and not _is_installed(plugin):
            return f"{word}... needs a plugin that is not installed; get it with: pip install -e '.[{extra}]'"
    sweep = bool(SWEEP_FLAGS & set(arguments))
    for override in parsed(arguments):
        if sweep and override.key_or_group == "output_dir":
            return "output_dir names the directory of one run; a sweep has one for each job: use sweep.name to name the sweep's"
        if override.key_or_group == "sweep.name" and override.is_sweep_override():
            return f"{override.input_line} gives several names; a sweep has one, and a directory in it for each job"
        # Hydra creates the directory of a sweep before a job can check the name.
        if override.key_or_group == "sweep.name":
            from training.directory import refused_name

            if why := refused_name(override.value()):
                return f"sweep.name {why}"
        ends = override.value()
        if sweep and isinstance(ends, IntervalSweep) and not any(a.startswith("hydra/sweeper=") for a in arguments):
            return (
                f"{override.input_line} needs a sweeper that chooses values: hydra/sweeper=optuna, of pip install -e '.[hpo]'; "
                f"or list the values: {override.key_or_group}={ends.start:g},{ends.end:g}"
            )
    if "RANK" not in os.environ or not sweep:
        return None
    # Every rank would start its own sweep, and the second job would find the process group of the first.
    wanted = [a for a in arguments if a not in SWEEP_FLAGS and not a.startswith("launcher.nproc=")]
    nproc = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return "a sweep cannot run under torchrun, since each of its jobs starts its own ranks; use: " + shlex.join(
        ["python", "train.py", "-m", f"launcher.nproc={nproc}", *wanted]
    )


def wrong_jobs(words: Sequence[str], jobs: Sequence[tuple[str, list[str]]]) -> Exception | None:
    """Why some jobs of a sweep cannot run; None if all can. Nothing is written. On a cluster, the machine is not checked."""
    from training.checks import USER_ERRORS
    from training.job import check_jobs

    plain = [word for word in words if not word.startswith("hydra")]
    try:
        if problems := problems_of_words(plain, sweep=True)[0]:  # they concern all jobs
            raise error_of_words(plain, ConfigError(problems), sweep=True)
        own = [word.partition("=")[2] for word in words if word.startswith("hydra.sweep.dir=")]
        here = not any(word.startswith("hydra/launcher=") for word in words)
        check_jobs(jobs, here, own[-1] if own else None)
    except USER_ERRORS as error:
        return error
    return None


def _is_installed(plugin: str) -> bool:
    try:
        return find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # no plugin is installed
        return False
