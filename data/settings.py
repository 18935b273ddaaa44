"""What all data has: its settings (configs/data), and for text that is prepared, how its documents are read.

The sources are in data/sources.py and data/hub.py; data that others prepared is in data/bin.py, and mixtures in data/mix.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from data.files import Rows
    from data.shards import Dataset

Document = tuple[str, str]  # (split, text); split is "train" or "val"
Position = tuple[int, int]  # number of files that are done, and of documents or rows that are done in the next one
Count = Annotated[int, ("low", 1)]
TokenizerName = Literal["bytes", "gpt2"]
_CHUNK_CHARS = 1 << 20


@dataclass(frozen=True)
class Data:
    """Data of a run. The fields are its settings; Annotated gives their ranges, which training/fields.py reads."""

    name: Annotated[str, ("longest", 100)]
    source: str
    dir: Annotated[str, ("path", True)]
    tokenizer: TokenizerName

    def open(self) -> Dataset:
        """Open the tokens.

        Raises:
            DataError: they are missing or damaged.
        """
        raise NotImplementedError

    def vocabulary(self) -> int:
        """The number of token ids."""
        from data.tokenizer import TOKENIZERS

        return TOKENIZERS[self.tokenizer].vocab_size


@dataclass(frozen=True)
class InputFile:
    """One file of text.

    path: of this machine, or a URL. size: bytes, as stored. split: of all its documents, or "" if each has its own. changed: time of the last
    change in nanoseconds; 0 for a URL. rows: of a parquet file, if the source needs them; otherwise 0.
    """

    path: str
    size: int
    split: str = ""
    changed: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents that are encoded together.

    texts: the documents, or the rows of a file that the encoding process reads. splits: that of all documents; one for each document; or "" if
    `Source.is_validation` decides. position: after these documents. read: bytes of the input that are read after them.
    """

    texts: Sequence[str] | Rows
    splits: str | tuple[str, ...]
    position: Position
    read: int


@dataclass(frozen=True)
class Source(Data):
    """Text that `python -m data.prepare` turns into tokens, in the same order every time.

    A source has either `documents`, which is simple; or `inputs`, `chunks` and `is_validation`: then a preparation that is continued
    does not read the finished files again, and the remaining time is known.
    """

    auto_prepare: bool
    shard_tokens: Count
    val_fraction: Annotated[float, ("above", 0), ("below", 1)]
    max_tokens: Annotated[Count | None, ("null", "takes all there are")]

    def open(self) -> Dataset:
        from data.shards import DataError, open_dataset

        dataset = open_dataset(self.dir, settings=self)
        if dataset.tokenizer != self.tokenizer:
            raise DataError(
                f"{self.dir} holds {dataset.tokenizer} tokens, and data.tokenizer is {self.tokenizer}; add data.tokenizer="
                f"{dataset.tokenizer}, or prepare the text again under another data.name"
            )
        return dataset

    def documents(self) -> Iterator[Document]:
        """All documents.

        Raises:
            DataError: the text cannot be read.
        """
        raise NotImplementedError

    def inputs(self) -> list[InputFile]:
        """The files that are read, in order; DataError if they cannot be found. Empty for a source that has only `documents`."""
        return []

    def still_valid(self, files: Sequence[InputFile]) -> bool:
        """Whether the list of files of an interrupted preparation is still that of this source."""
        return list(files) == self.inputs()

    def input_files(self) -> dict[str, int]:
        """The local files that are read and that exist, path → bytes; empty for a source that reads none."""
        return {}

    def chunks(self, files: Sequence[InputFile], start: Position) -> Iterator[Chunk]:
        """The documents after a position, in chunks that do not depend on it.

        Raises:
            DataError: the text cannot be read.
        """
        splits: list[str] = []
        texts: list[str] = []
        chars = number = 0
        for number, (split, text) in enumerate(self.documents(), start=1):
            if number <= start[1]:
                continue
            splits.append(split)
            texts.append(text)
            chars += len(text)
            if chars >= _CHUNK_CHARS:
                yield Chunk(texts, tuple(splits), (0, number), 0)
                splits, texts, chars = [], [], 0
        yield Chunk(texts, tuple(splits), (0, number), 0)

    def is_validation(self, first: int, count: int, files: Sequence[InputFile]) -> np.ndarray:
        """Which of the documents `first` to `first + count` are validation, (count,) bool, if their chunk does not say it."""
        raise NotImplementedError

    @property
    def content(self) -> dict[str, Any]:
        """The settings that decide the tokens, as the manifest holds them: all but `dir` and `auto_prepare`."""
        plain = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in plain.items() if key not in ("dir", "auto_prepare")}


def evenly_spaced(first: int, count: int, fraction: float, seed: int) -> np.ndarray:
    """Which of the documents `first` to `first + count` are validation, (count,) bool: every (1/fraction)-th, from a start that `seed` decides.

    That is systematic sampling: exact in number, and in one pass.
    """
    phase = np.random.Philox(key=seed % 2**64).random_raw() / 2**64
    place = np.floor(np.arange(first, first + count + 1) * fraction + phase)
    return place[1:] > place[:-1]
