"""The data of a run."""

from __future__ import annotations

from data.prepare import prepare
from data.shards import Dataset, open_dataset
from training.settings import Settings
from training.validate import ConfigError


def open_data(cfg: Settings) -> Dataset:
    """Open the prepared data. With `data.auto_prepare`, prepare it first if it is missing.

    Raises:
        DataError: the data is missing or damaged. ConfigError: the vocabulary of the model is too small for it.
    """
    if cfg.data.auto_prepare:
        prepare(cfg.data)
    dataset = open_dataset(cfg.data.dir, settings=cfg.data)
    if dataset.manifest.vocab_size > cfg.model.vocab_size:
        raise ConfigError(
            [
                f"model.vocab_size={cfg.model.vocab_size} is smaller than the data's vocabulary of {dataset.manifest.vocab_size} "
                f"({dataset.manifest.tokenizer} tokens); raise it to at least that"
            ]
        )
    return dataset
