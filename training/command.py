"""The command line of training: Hydra composes the configuration, the launcher starts the ranks. An error of the user ends with exit code 2."""

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
"""Start of a word of the command line, the Hydra plugin that it needs, and the extra of this package that installs it."""


def run_command(worker: Worker) -> None:
    """Run the worker as the command line says: one run, one rank of a run, or a sweep. Ranks import the worker by name."""
    composed = False

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
    def run(config: Any) -> float:
        nonlocal composed
        job, composed = HydraConfig.get(), True
        if job.mode == RunMode.MULTIRUN:
            return report(hydra_job(config))
        try:
            cfg = read(resolved(config))
            if "RANK" not in os.environ:  # each rank checks in `worker`; the message is printed once
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
    # Our settings of a plugin have the name of its schema; Hydra warns that it checks them against this schema.
    warnings.filterwarnings("ignore", message="(?s).*validated against ConfigStore schema with the same name")
    try:
        run()
    except SystemExit as ended:
        # For a misspelt key or group, Hydra prints a message and exits with code 1.
        raise SystemExit(ended.code if composed or ended.code != 1 else USER_ERROR) from None


def report(best: float) -> float:
    """Print the last line of a run."""
    if is_main_process():
        print(f"best validation loss {best:.4f}", flush=True)
    return best


def refusal(arguments: Sequence[str]) -> str | None:
    """Why this command line cannot run here, and what to do instead; None if it can."""
    for word, plugin, extra in EXTRAS:
        if any(a.startswith(word) for a in arguments) and not _is_installed(plugin):
            return f"{word}... needs a plugin that is not installed; get it with: pip install -e '.[{extra}]'"
    # Hydra creates the directory of a sweep before a job can check the name.
    for name in _values("sweep.name", arguments):
        if why := refused_name(name):
            return f"sweep.name {why}"
    flags = {"-m", "--multirun"}
    if "RANK" not in os.environ or not flags & set(arguments):
        return None
    # Every rank would start its own sweep, and the second job would find the process group of the first.
    wanted = [a for a in arguments if a not in flags and not a.startswith("launcher.nproc=")]
    nproc = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return "a sweep cannot run under torchrun, since each of its jobs starts its own ranks; use: " + shlex.join(
        ["python", "train.py", "-m", f"launcher.nproc={nproc}", *wanted]
    )


def _is_installed(plugin: str) -> bool:
    try:
        return find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # no plugin is installed
        return False


def _values(key: str, arguments: Sequence[str]) -> Iterator[Any]:
    """The values that the command line gives a key, parsed by Hydra. Hydra reports later what it cannot parse."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    for argument in arguments:
        if argument.lstrip("+").startswith(f"{key}="):
            with suppress(OverrideParseException):
                override = OverridesParser.create().parse_override(argument)
                if not override.is_sweep_override():
                    yield override.value()
