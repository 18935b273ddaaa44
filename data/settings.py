"""What every source of text has: its settings (configs/data), and how its documents are read. The sources are in data/sources.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

Document = tuple[str, str]  # (split, text); split is "train" or "val"
Count = Annotated[int, ("low", 1)]
TokenizerName = Literal["bytes", "gpt2"]


@dataclass(frozen=True)
class Data:
    """A source of text. Its fields are its settings; Annotated gives their ranges, which training/fields.py reads."""

    name: Annotated[str, ("longest", 100)]
    source: str
    dir: Annotated[str, ("path", True)]
    auto_prepare: bool
    tokenizer: TokenizerName
    shard_tokens: Count
    val_fraction: Annotated[float, ("above", 0), ("below", 1)]
    max_tokens: Annotated[Count | None, ("null", "takes all there are")]

    def documents(self) -> Iterator[Document]:
        """The documents, in the same order every time.

        Raises:
            DataError: the text cannot be read.
        """
        raise NotImplementedError

    def input_files(self) -> dict[str, int]:
        """The local files that are read and that exist, path → bytes; empty for a source that reads none."""
        return {}

    @property
    def content(self) -> dict[str, Any]:
        """The settings that decide the tokens, as the manifest holds them: all but `dir` and `auto_prepare`."""
        plain = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in plain.items() if key not in ("dir", "auto_prepare")}
