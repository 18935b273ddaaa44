"""Datasets of the Hugging Face Hub, streamed: only the shards are stored.

`datasets` finds the files of a dataset, its configuration and its split, at one commit; data/files.py reads them.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any

import numpy as np

from data.files import Format, parquet_rows, read_chunks
from data.settings import Chunk, Count, InputFile, Position, Source, TokenizerName, evenly_spaced
from data.shards import DataError


@dataclass(frozen=True)
class Expected:
    """Published counts of a dataset."""

    tokenizer: TokenizerName
    documents: Count
    train_tokens: Count
    val_tokens: Count


@dataclass(frozen=True)
class Hub(Source):
    """A dataset of the Hub. Validation is the share `val_fraction` of the documents, evenly spaced from a start that `split_seed` decides.

    Each of `revisions` (branches, tags or commits) is tried in turn. The commit that was found first is kept for the whole preparation, also
    if it is interrupted.
    """

    repository: Annotated[str, ("shortest", 0)]  # training does not need it
    subset: Annotated[str | None, ("null", "is the only one")]
    split: str
    revisions: tuple[Annotated[str | None, ("null", "is the current one")], ...]
    column: str
    split_seed: Annotated[int, ("low", 0), ("high", 2**32 - 1)]
    expected: Annotated[Expected | None, ("null", "compares nothing")]

    def inputs(self) -> list[InputFile]:
        if not self.repository.strip():
            raise DataError("data.repository names no dataset; set it, such as data.repository=wikimedia/wikipedia")
        if not self.revisions:
            raise DataError("data.revisions names none; set it, such as data.revisions=[null] for the current one")
        errors = []
        for revision in self.revisions:
            try:
                return self._listed(revision)
            except DataError as error:
                errors.append(str(error))
        raise DataError(
            f"{self.repository} cannot be loaded from the Hugging Face Hub ({' | '.join(errors)}); connect to the network, or "
            "prepare local copies of its files: data=text data.files='folder/*.parquet'"
        )

    def still_valid(self, files: Sequence[InputFile]) -> bool:
        return True  # they are those of one commit

    def _listed(self, revision: str | None) -> list[InputFile]:
        """The files of a revision with their sizes; DataError if there are none."""
        import datasets
        import fsspec

        with _hub_errors():
            builder = datasets.load_dataset_builder(self.repository, name=self.subset, revision=revision)
            found: Any = builder.config.data_files or {}
            if self.split not in found:
                raise DataError(
                    f"it has no files of the split {self.split!r} (splits: {', '.join(map(str, found)) or 'none'}); set data.split"
                )
            sizes: dict[str, int] = {}
            files = []
            for url in map(str, found[self.split]):
                system, path = fsspec.core.url_to_fs(url)
                if path not in sizes:  # one question for all files of a folder
                    parent = path.rpartition("/")[0]
                    sizes |= {str(entry["name"]): int(entry["size"] or 0) for entry in system.ls(parent, detail=True)}
                files.append(InputFile(url, sizes.get(path) or int(system.info(path)["size"])))
            return files

    def chunks(self, files: Sequence[InputFile], start: Position) -> Iterator[Chunk]:
        return read_chunks(files, start, Format(self.column, keep_empty=True))

    def is_validation(self, first: int, count: int, files: Sequence[InputFile]) -> np.ndarray:
        return evenly_spaced(first, count, self.val_fraction, self.split_seed)


@dataclass(frozen=True)
class OpenWebText(Hub):
    """OpenWebText in nanoGPT's split: the documents of each split are nanoGPT's (test_size 0.0005, seed 2357), in the order of the files.

    nanoGPT also shuffles the documents, for which all of them must be on the disk: 54 GB. For its very bytes, run its recipe
    (https://github.com/karpathy/nanoGPT/blob/master/data/openwebtext/prepare.py) and use data=bin. `datasets` 4 no longer runs the loading
    script that the dataset had at first, so a revision that has parquet files is used.
    """

    def _listed(self, revision: str | None) -> list[InputFile]:
        files = super()._listed(revision)
        if other := next((file.path for file in files if not file.path.endswith(".parquet")), None):
            raise DataError(f"{other} is no parquet file, so the number of its rows is not known")
        with ThreadPoolExecutor(8) as pool:
            rows = pool.map(parquet_rows, [file.path for file in files])
            return [replace(file, rows=count) for file, count in zip(files, rows)]

    def is_validation(self, first: int, count: int, files: Sequence[InputFile]) -> np.ndarray:
        rows = _test_rows(sum(file.rows for file in files), self.val_fraction, self.split_seed)
        found = np.zeros(count, dtype=bool)
        inside = rows[(rows >= first) & (rows < first + count)]
        found[inside - first] = True
        return found


@lru_cache(maxsize=1)
def _test_rows(rows: int, share: float, seed: int) -> np.ndarray:
    """The rows that `train_test_split` of `datasets` takes for its test split, sorted."""
    return np.sort(np.random.default_rng(seed).permutation(rows)[: int(np.ceil(share * rows))])


@contextlib.contextmanager
def _hub_errors() -> Iterator[None]:
    """Turn every error into DataError: those of the Hub, the network and the dataset builder have no common base class."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            from datasets.config import HF_CACHE_HOME

            raise DataError(
                f"the disk of the Hugging Face cache {HF_CACHE_HOME} is full; set HF_HOME to a folder on a larger disk"
            ) from error
        raise DataError(f"{type(error).__name__}: {error}") from error
