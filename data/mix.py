"""Several corpora, of which windows are drawn in proportion to weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data.bin import Bin
from data.settings import Data
from data.shards import MANIFEST, DataError, Dataset, Mixture, digest, open_dataset

NO_PARTS = "data.parts names no folder; write data.parts={folder: weight, other: weight}"


@dataclass(frozen=True)
class Mix(Bin):
    """Folders and their weights; only the ratios of the weights matter. A folder without a manifest is read as data=bin reads it."""

    parts: Mapping[str, Annotated[float, ("above", 0)]]

    def open(self) -> Dataset:
        if not self.parts:
            raise DataError(NO_PARTS)
        opened, problems = [], []
        for name in self.parts:
            try:
                part = self._part(Path(self.dir) / name)
            except DataError as error:
                problems.append(f"data.parts: {name}: {error}")
                continue
            opened.append(part)
            if (part.tokenizer, part.separator_first) != (self.tokenizer, opened[0].separator_first):
                how = "begins" if part.separator_first else "ends"
                problems.append(
                    f"the parts of data.parts do not fit together: {name} has {part.tokenizer} tokens, and the end-of-text token {how} a "
                    "document; use parts that agree, and set data.tokenizer to theirs"
                )
        if problems:
            raise DataError("\n".join(problems))
        first = opened[0]
        weights = tuple(float(weight) for weight in self.parts.values())
        train, val = (
            Mixture(tuple(split for part in opened for split in of(part).parts), weights)
            for of in (lambda part: part.train, lambda part: part.val)
        )
        fingerprint = digest([[part.fingerprint, weight / sum(weights)] for part, weight in zip(opened, weights)])
        vocabulary = max(part.vocab_size for part in opened)
        return Dataset(fingerprint, vocabulary, first.tokenizer, first.separator, first.separator_first, train, val)

    def _part(self, folder: Path) -> Dataset:
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}; correct data.parts, or data.dir, the folder of the parts")
        if (folder / MANIFEST).exists():
            return open_dataset(folder)
        plain = {key: getattr(self, key) for key in ("name", "source", "tokenizer", "train", "val", "vocab_size")}
        return Bin(dir=str(folder), **plain).open()

    def vocabulary(self) -> int:
        return Data.vocabulary(self)
