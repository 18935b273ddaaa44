"""The command line of training: Hydra composes the configuration, and the launcher starts the ranks. A user's mistake ends with exit code 2."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from training.checks import USER_ERRORS, check, read
from training.config import CONFIGS, resolved
from training.launch import USER_ERROR, RankFailed, Worker, is_main_process, launch, tell_user
from training.run import refused_name
from training.sweep import hydra_job

EXTRAS = (
    ("hydra/launcher=submitit", "hydra_submitit_launcher", "slurm"),
    ("hydra/sweeper=optuna", "hydra_optuna_sweeper", "hpo"),
)
"""How a word of the command line begins, the Hydra plugin that it needs, and the extra that brings it."""


def run_command(worker: Worker) -> None:
    """Run the worker, which must be importable by name, as the command line says: one run, a rank of one, or a sweep."""
    composed = False

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
    def run(config: Any) -> float:
        nonlocal composed
        job, composed = HydraConfig.get(), True
        if job.mode == RunMode.MULTIRUN:
            return report(hydra_job(config))
        try:
            cfg = read(resolved(config))
            if "RANK" not in os.environ:  # a rank checks where it trains, and its message is printed once
                check(cfg)
            return report(launch(worker, cfg, None, USER_ERRORS))
        except (*USER_ERRORS, RankFailed) as error:
            tell_user(error)
            raise SystemExit(getattr(error, "exit_code", USER_ERROR)) from None

    refused = refusal(sys.argv[1:])
    if refused is not None:
        if is_main_process():
            print(refused, file=sys.stderr)
        raise SystemExit(USER_ERROR)
    # Our settings of a plugin stand under its own name, where Hydra checks them against its schema and would rather not.
    warnings.filterwarnings("ignore", message="(?s).*validated against ConfigStore schema with the same name")
    try:
        run()
    except SystemExit as ended:
        # Hydra refuses a misspelt key or group with a message of its own, and exit code 1.
        raise SystemExit(ended.code if composed or ended.code != 1 else USER_ERROR) from None


def report(best: float) -> float:
    """Print a run's last line."""
    if is_main_process():
        print(f"best validation loss {best:.4f}", flush=True)
    return best


def refusal(arguments: Sequence[str]) -> str | None:
    """Why this command line cannot run here, and what to do instead; None if it can."""
    for word, plugin, extra in EXTRAS:
        if any(a.startswith(word) for a in arguments) and not _is_installed(plugin):
            return f"{word}... needs a plugin that is not installed; get it with: pip install -e '.[{extra}]'"
    # Hydra makes a sweep's directory before any of its jobs could look at the name.
    for name in _values("sweep.name", arguments):
        if why := refused_name(name):
            return f"sweep.name {why}"
    flags = {"-m", "--multirun"}
    if "RANK" not in os.environ or not flags & set(arguments):
        return None
    # Every rank would sweep by itself, and the second job would find the process group of the first.
    wanted = [a for a in arguments if a not in flags and not a.startswith("launcher.nproc=")]
    nproc = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return "a sweep cannot run under torchrun, since each of its jobs starts its own ranks; use: " + shlex.join(
        ["python", "train.py", "-m", f"launcher.nproc={nproc}", *wanted]
    )


def _is_installed(plugin: str) -> bool:
    try:
        return find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # not a single plugin is
        return False


def _values(key: str, arguments: Sequence[str]) -> Iterator[Any]:
    """What the command line gives a key, read as Hydra reads it; what Hydra cannot read, it will say itself."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    for argument in arguments:
        if argument.lstrip("+").startswith(f"{key}="):
            with suppress(OverrideParseException):
                override = OverridesParser.create().parse_override(argument)
                if not override.is_sweep_override():
                    yield override.value()
