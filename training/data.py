"""The data of a run."""

from __future__ import annotations

from data.prepare import prepare
from data.settings import Source
from data.shards import Dataset
from training.settings import Settings
from training.validate import ConfigError


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
