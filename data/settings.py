"""The settings of every source of text; configs/data. Annotated gives their ranges, which training/fields.py reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

Count = Annotated[int, ("low", 1)]
TokenizerName = Literal["bytes", "gpt2"]


@dataclass(frozen=True)
class Data:
    """What every source has."""

    name: Annotated[str, ("longest", 100)]
    source: str
    dir: Annotated[str, ("path", True)]
    auto_prepare: bool
    tokenizer: TokenizerName
    shard_tokens: Count
    val_fraction: Annotated[float, ("above", 0), ("below", 1)]
    max_tokens: Annotated[Count | None, ("null", "takes all there are")]

    @property
    def content(self) -> dict[str, Any]:
        """The settings that decide what is prepared, as a manifest holds them; where and when are left out."""
        plain = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in plain.items() if key not in ("dir", "auto_prepare")}


@dataclass(frozen=True)
class Stdlib(Data):
    """The standard library of the running Python."""


@dataclass(frozen=True)
class TextFiles(Data):
    """Local files."""

    files: tuple[str, ...] | str
    val_files: Annotated[tuple[str, ...] | str | None, ("null", "takes val_fraction of the documents")]
    split_seed: Annotated[int, ("low", 0)]
    separator: Annotated[str | None, ("shortest", 0), ("null", "makes every file one document")]
    column: str


@dataclass(frozen=True)
class FineWeb(Data):
    """FineWeb-Edu from the Hugging Face Hub."""

    repository: str
    subset: str
    column: str
    split_seed: Annotated[int, ("low", 0)]


@dataclass(frozen=True)
class Expected:
    """Published counts of a dataset."""

    tokenizer: TokenizerName
    documents: Count
    train_tokens: Count
    val_tokens: Count


@dataclass(frozen=True)
class OpenWebText(Data):
    """OpenWebText from the Hugging Face Hub."""

    repository: str
    revisions: tuple[Annotated[str | None, ("null", "is the current one")], ...]
    column: str
    split_seed: Annotated[int, ("low", 0), ("high", 2**32 - 1)]
    expected: Annotated[Expected | None, ("null", "compares nothing")]
