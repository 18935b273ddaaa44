"""The data of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.command import given_settings
from data.in_order import InOrder, first_windows
from data.loader import Loader, validation_windows
from data.prepare import prepare
from data.settings import Source
from data.shards import DataError, Dataset, Prepared, Split, Tokens
from training.settings import Settings
from training.validate import ConfigError


def open_data(cfg: Settings) -> Dataset:
    """Open the data. With `data.auto_prepare`, prepare it first if it is missing.

    Raises:
        DataError: the data is missing or damaged. ConfigError: the vocabulary of the model is too small for it.
    """
    if isinstance(cfg.data, Source) and cfg.data.auto_prepare:
        prepare(cfg.data)
    dataset = cfg.data.open()
    if dataset.vocab_size > cfg.model.vocab_size:
        raise ConfigError(
            [
                f"model.vocab_size={cfg.model.vocab_size} is smaller than the data's vocabulary of {dataset.vocab_size} "
                f"({dataset.tokenizer} tokens); raise it to at least that, or set it to auto"
            ]
        )
    return dataset


def require_as_prepared(cfg: Settings, dataset: Dataset) -> None:
    """Refuse settings of the text that differ from those it was prepared with: they would be recorded but have no effect.

    Only for runs that start at step 0.

    Raises:
        DataError: such settings were given.
    """
    if not (isinstance(cfg.data, Source) and isinstance(dataset, Prepared)):
        return
    there, given = dataset.manifest.settings, given_settings(cfg.data)
    if other := [key for key in given if key != "name" and key in there and there[key] != given[key]]:
        changes = ", ".join(f"{key}: {there[key]!r} there, {given[key]!r} asked" for key in other)
        raise DataError(
            f"{cfg.data.dir} was prepared with other settings ({changes}); leave out {', '.join(f'data.{key}' for key in other)} "
            "to use it as it is, or prepare the text again under another data.name"
        )


def require_data(cfg: Settings, begins: bool) -> None:
    """Before the first of several runs: open the data, see `open_data`, and for runs that begin compare the settings, see `require_as_prepared`.

    Raises:
        DataError, ConfigError: see there.
    """
    dataset = open_data(cfg)
    if begins:
        require_as_prepared(cfg, dataset)


def problems_of_data(cfg: Settings) -> list[str]:
    """What keeps a run from beginning on its data, without preparing any; a run at a checkpoint does not begin."""
    if isinstance(cfg.data, Source) and cfg.data.auto_prepare and not holds_files(cfg.data.dir):
        return []
    try:
        require_data(cfg, begins=cfg.resume in ("never", "auto"))
    except ConfigError as error:
        return error.problems
    except DataError as error:
        return [str(error)]
    return []


def holds_files(directory: str) -> bool:
    """Whether there is such a directory, and something in it."""
    return Path(directory).is_dir() and any(Path(directory).iterdir())


def batches_of(cfg: Settings, train: Tokens, rank: int, world: int) -> Loader:
    """The training batches of a rank, in the order of `batches.order`.

    Raises:
        DataError: see Loader and InOrder.
    """
    block = cfg.model.block_size
    given = (block, cfg.seed, cfg.global_batch_tokens // block, rank, world)
    if cfg.batches.order != "in_order":
        return Loader(train, *given, order=cfg.batches.order)
    return InOrder(_one(train), *given)


def held_out_windows(cfg: Settings, val: Tokens) -> np.ndarray:
    """The validation windows (n, block_size + 1) uint16: evenly spaced, or the first ones if batches are in order."""
    if cfg.batches.order != "in_order":
        return validation_windows(val, cfg.model.block_size, cfg.eval_windows)
    return first_windows(_one(val), cfg.model.block_size, cfg.eval_windows)


def separator_of(cfg: Settings, data: Dataset) -> tuple[int, bool] | None:
    """`GPT.separator`: the token between documents and whether it begins one, if `batches.documents` asks for it.

    Raises:
        ConfigError: the data does not say it.
    """
    if not cfg.batches.documents:
        return None
    if data.separator is None:
        raise ConfigError(
            [f"batches.documents=true: the token between documents of {cfg.data.name} is not known; use false"]
        )
    return data.separator, data.separator_first


def _one(split: Tokens) -> Split:
    assert isinstance(split, Split)  # `check` refuses a mixture
    return split
