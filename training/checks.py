"""Checks of a configuration. Here a plain configuration becomes typed, and all its problems are listed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import reduce
from typing import Any

import torch

from data.shards import DataError
from model.gpt import GPT
from optim.manifolds import MANIFOLDS
from training.build import gpt_config, rehearse
from training.checkpoint import CheckpointError
from training.directory import problems_of_names
from training.fields import Problem, Section
from training.limits import MachineError
from training.settings import Data, Settings, read_sound
from training.transfer import problems_of_transfer, transferred
from training.validate import (
    ConfigError,
    problems_of_backend,
    problems_of_batch,
    problems_of_capture,
    problems_of_compiler,
    problems_of_documents,
    problems_of_machine,
    problems_of_order,
    problems_of_shard,
)

VOCABULARY_MULTIPLE = 128
"""What model.vocab_size=auto pads to, for the matrix units of GPUs."""

USER_ERRORS = (ConfigError, DataError, CheckpointError, MachineError)
"""Errors that a user can correct: only the message is printed, no traceback."""


FOLLOWS = {
    "schedule.decay_steps": "max_steps",
    "probe.interval": "eval_interval",
    "log.interval_certificate": "log.interval_spectra",
}
"""Settings that refer to another one unless they are given: of a wrong value, only the other one is named."""


def read(cfg: Mapping[str, Any]) -> Settings:
    """Turn a plain configuration into a typed one.

    Raises:
        ConfigError: a value is wrong. The message also lists the problems that `check` finds between the other values.
    """
    settings, found = read_sound(_with_vocabulary(cfg))
    if found:
        unsound = {problem.key.partition(".")[0] for problem in found}
        wrong = {problem.key for problem in found}
        found = [p for p in found if FOLLOWS.get(p.key) not in wrong or not _is_equal(cfg, p.key, FOLLOWS[p.key])]
        raise ConfigError([*_lines(found), *_problems_of_relations(settings, None, unsound)])
    return settings


def _is_equal(cfg: Mapping[str, Any], *keys: str) -> bool:
    """Whether the values of these dotted keys are the same; they may be missing or anything, also nan."""

    def inside(section: Any, name: str) -> Any:
        return section.get(name) if isinstance(section, Mapping) else None

    return len({repr(reduce(inside, key.split("."), cfg)) for key in keys}) == 1


def _lines(found: Iterable[Problem]) -> list[str]:
    """The messages, with one for all settings of the model that are missing. An experiment may give what else is missing."""
    lines, shape = [], []
    for problem in found:
        section = problem.key.partition(".")[0]
        if problem.missing and section == "model":
            shape.append(problem.key)
        else:
            experiment = ", or choose an experiment" if problem.missing and section not in ("data", "optim") else ""
            lines.append(f"{problem}{experiment}")
    missing = f"{', '.join(shape)} {'is' if len(shape) == 1 else 'are'} missing; choose a whole model, such as model=gpt2_124m"
    return [*([missing] if shape else []), *lines]


def _with_vocabulary(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with the number that model.vocab_size=auto means: the data's vocabulary, padded to a multiple of 128.

    1 if the section `data` is wrong, which is listed anyway.
    """
    model = cfg.get("model")
    if not isinstance(model, Mapping) or model.get("vocab_size") != "auto":
        return cfg
    kind = Section(Settings).kinds["data"]
    sound = not kind.problems("data", cfg.get("data"))
    size = kind.read(cfg["data"]).vocabulary() if sound else 1
    return {**cfg, "model": {**model, "vocab_size": -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE}}


def check(cfg: Settings, world: int | None = None) -> None:
    """Raise ConfigError with every problem between settings, and between them and this machine.

    `world` is the number of ranks; None for `launcher.nproc`.
    """
    if found := _problems_of_relations(cfg, world):
        raise ConfigError(found)


def _problems_of_relations(cfg: Settings, world: int | None, unsound: Collection[str] = ()) -> list[str]:
    def sound(*keys: str) -> bool:
        return not any(key in unsound for key in keys)

    found = problems_of_machine(cfg) if sound("device", "output_dir") else []
    found += problems_of_capture(cfg) if sound("capture", "device", "optim") else []
    found += problems_of_compiler(cfg) if sound("assignment", "device", "optim") else []
    found += problems_of_backend(cfg) if sound("attention_backend", "attention", "batches", "device") else []
    found += problems_of_names(cfg) if sound("name", "assignment", "sweep") else []
    if sound("global_batch_tokens", "model", "launcher"):
        found += problems_of_batch(cfg, world or cfg.launcher.nproc)
    found += problems_of_order(cfg) if sound("batches", "data") else []
    found += problems_of_documents(cfg) if sound("batches", "attention", "probe") else []
    if sound("launcher", "attention", "model", "average", "capture", "optim", "log"):
        found += problems_of_shard(cfg)
    if sound("transfer", "model", "residual", "assignment", "optim", "max_steps"):
        refused = problems_of_transfer(cfg)
        found += refused or (problems_of_model(cfg) if sound("attention", "init") else [])
    return found


def problems_of_model(cfg: Settings) -> list[str]:
    """Problems of building the model and of giving every parameter exactly one optimizer."""
    shape = gpt_config(cfg)
    if found := shape.problems():
        return found
    with torch.device("meta"):
        model = GPT(shape)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    rows, refused = rehearse(shapes, transferred(cfg), model.unit_vectors())
    clipped = model.clipped_names()
    held = [row.name for row in rows if row.name in clipped and row.manifold not in (None, "euclidean")]
    if held:
        refused.append(
            f"attention.qk_clip_on=weights would take {len(held)} matrices such as '{held[0]}' off their manifold; "
            "use attention.qk_clip_on=gain"
        )
    zero = model.zero_names()
    stuck = [row for row in rows if row.name in zero and row.manifold and not MANIFOLDS[row.manifold].moves_zero]
    if stuck:
        refused.append(
            f"'{stuck[0].name}' starts at zero with residual={cfg.residual.rule}, and no step on {stuck[0].manifold} leaves zero; "
            "give such matrices another manifold, or choose another residual"
        )
    return refused


def read_data(section: Any) -> Data:
    """Turn the plain section `data` into a typed one.

    Raises:
        ConfigError: values are wrong; the message lists all of them.
    """
    kind = Section(Settings).kinds["data"]
    if found := kind.problems("data", section):
        raise ConfigError(map(str, found))
    return kind.read(section)
