"""Whether a configuration can run: the one place where a plain one becomes typed, and where everything that is wrong with it is listed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from data.shards import DataError
from model.gpt import GPT
from training.build import gpt_config, rehearse
from training.checkpoint import CheckpointError
from training.fields import Section
from training.limits import MachineError
from training.run import problems_of_names
from training.settings import Data, Settings, read_sound
from training.transfer import problems_of_transfer
from training.validate import ConfigError, problems_of_batch, problems_of_machine

USER_ERRORS = (ConfigError, DataError, CheckpointError, MachineError)
"""What a user can mend: the message is all that is shown."""


def read(cfg: Mapping[str, Any]) -> Settings:
    """A plain configuration, typed.

    Raises:
        ConfigError: a single value is wrong. The message also lists what `check` finds between the others.
    """
    settings, found = read_sound(cfg)
    if found:
        unsound = {problem.key.partition(".")[0] for problem in found}
        raise ConfigError([*map(str, found), *_problems_of_relations(settings, None, unsound)])
    return settings


def check(cfg: Settings, world: int | None = None) -> None:
    """Raise ConfigError with every problem between settings, and between them and this machine.

    `world` is the number of ranks; None for those that `launcher.nproc` starts.
    """
    if found := _problems_of_relations(cfg, world):
        raise ConfigError(found)


def _problems_of_relations(cfg: Settings, world: int | None, unsound: Collection[str] = ()) -> list[str]:
    def sound(*keys: str) -> bool:
        return not any(key in unsound for key in keys)

    found = problems_of_machine(cfg) if sound("device", "output_dir") else []
    found += problems_of_names(cfg) if sound("name", "assignment", "sweep") else []
    if sound("global_batch_tokens", "model", "launcher"):
        found += problems_of_batch(cfg, world or cfg.launcher.nproc)
    if sound("transfer", "model", "residual", "assignment", "optim", "max_steps"):
        refused = problems_of_transfer(cfg)
        found += refused or (problems_of_model(cfg) if sound("attention", "init") else [])
    return found


def problems_of_model(cfg: Settings) -> list[str]:
    """Whether the model can be built, and every parameter gets exactly one optimizer."""
    shape = gpt_config(cfg)
    if found := shape.problems():
        return found
    with torch.device("meta"):
        model = GPT(shape)
    rows, refused = rehearse({name: tuple(p.shape) for name, p in model.named_parameters()}, cfg, model.unit_vectors())
    clipped = model.clipped_names()
    held = [row.name for row in rows if row.name in clipped and row.manifold not in (None, "euclidean")]
    if held:
        refused.append(
            f"attention.qk_clip_on=weights would take {len(held)} matrices such as '{held[0]}' off their manifold; "
            "use attention.qk_clip_on=gain"
        )
    return refused


def read_data(section: Any) -> Data:
    """The plain section `data` alone, typed.

    Raises:
        ConfigError: listing everything that is wrong with its values.
    """
    kind = Section(Settings).kinds["data"]
    if found := kind.problems("data", section):
        raise ConfigError(map(str, found))
    return kind.read(section)
