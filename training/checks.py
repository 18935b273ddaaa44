"""Whether a configuration can run: every problem at once, before anything is written."""

from __future__ import annotations

from typing import Any

import torch

from data.shards import DataError
from model.gpt import GPT
from training.build import gpt_config, rehearse
from training.checkpoint import CheckpointError
from training.limits import MachineError
from training.run import problems_of_names
from training.settings import problems
from training.transfer import problems_of_transfer
from training.validate import ConfigError, problems_of_batch, problems_of_clip, problems_of_machine

USER_ERRORS = (ConfigError, DataError, CheckpointError, MachineError)
"""What a person can correct: the message is all that is shown, with exit code 2."""


def check(cfg: dict[str, Any], world: int | None = None) -> None:
    """Raise ConfigError with every problem of the configuration: of single values, and of the relations whose values are sound.

    `world` is the number of ranks; None for those that `launcher.nproc` starts.
    """
    wrong = problems(cfg)
    unsound = {problem.key.partition(".")[0] for problem in wrong}

    def sound(*keys: str) -> bool:
        return unsound.isdisjoint(keys)

    found = [str(problem) for problem in wrong]
    found += problems_of_machine(cfg) if sound("device", "output_dir") else []
    found += problems_of_names(cfg) if sound("name", "assignment", "sweep") else []
    if sound("global_batch_tokens", "model", "launcher"):
        found += problems_of_batch(cfg, world or cfg["launcher"]["nproc"])
    if sound("transfer", "model", "residual", "assignment", "optim", "max_steps"):
        refused = problems_of_transfer(cfg)
        found += refused or (problems_of_model(cfg) if sound("attention", "init") else [])
    if found:
        raise ConfigError(found)


def problems_of_model(cfg: dict[str, Any]) -> list[str]:
    """Whether the model can be built, and every parameter gets exactly one optimizer."""
    shape = gpt_config(cfg)
    if found := shape.problems():
        return found
    with torch.device("meta"):
        model = GPT(shape)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    rows, refused = rehearse(shapes, cfg, model.unit_vectors())
    return refused + problems_of_clip(cfg, rows)
