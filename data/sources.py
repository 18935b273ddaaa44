"""Where text comes from: one class for each source. Its fields are its settings, and `documents` yields (split, text).

A source is deterministic: the same settings and inputs give the same documents in the same order. It imports what it needs only when
it is read. Where possible, validation documents come first, so that `max_tokens`, which limits the training tokens, never removes any.
To add a source, write such a class, enter it in SOURCES, and give the defaults in configs/data/<name>.yaml.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import glob
import gzip
import hashlib
import io
import lzma
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np

from data.settings import Count, Data, Document, TokenizerName
from data.shards import DataError

# A file without separators is cut at the first line end after this many characters, so that memory is bounded.
MAX_DOCUMENT_CHARS = 1 << 24


# --- this Python's own library --------------------------------------------------------------------------------------

# Folders that are left out: installed packages, tests, applications, code pages.
NOT_LIBRARY = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "ensurepip",
    "lib-dynload", "__pycache__", "encodings",
}  # fmt: skip

# A larger module (bytes) is never validation: pydoc's topics (750 kB) alone would be most of it.
MAX_VAL_MODULE = 1 << 18


@dataclass(frozen=True)
class Stdlib(Data):
    """The standard library of the running Python, with its documentation strings: one document for each module.

    About 9 MB of English and Python that every machine has; it needs no network. Order and split follow from the SHA-256 of a module's
    path: the share `val_fraction` with the smallest hashes is validation, so a module stays in its split from one Python version to the
    next. The text depends on the Python version, which the manifest records.
    """

    def documents(self) -> Iterator[Document]:
        root = Path(sysconfig.get_path("stdlib"))
        ranked = []
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            # _sysconfigdata holds the compiler flags and folders of the machine that Python was built on.
            if NOT_LIBRARY.isdisjoint(relative.parts) and not path.name.startswith("_sysconfigdata"):
                digest = hashlib.sha256(relative.as_posix().encode()).digest()
                ranked.append((int.from_bytes(digest[:8], "big") / 2**64, path))
        if not ranked:
            raise DataError(
                f"the standard library of this Python is not in {root} as .py files (it may be zipped or compiled); run "
                "with another Python, or use your own text: data=text data.files=<path>"
            )
        for rank, path in sorted(ranked):
            is_val = rank < self.val_fraction and path.stat().st_size <= MAX_VAL_MODULE
            yield ("val" if is_val else "train"), path.read_text(encoding="utf-8", errors="replace")


# --- local files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextFiles(Data):
    """Local files by path or glob: .txt, .jsonl and .parquet, plain or compressed (.gz, .xz, .bz2, .zst).

    We read .txt ourselves, because `datasets` cannot split a file at lines that equal `separator` (null: a file is one document; "":
    paragraphs). `datasets` streams .jsonl and .parquet; a document is the field `column` of a row. Validation is `val_files`, or the share
    `val_fraction` of the documents, evenly spaced from a start that `split_seed` decides. Files are read in sorted order; empty
    documents are left out.
    """

    files: tuple[str, ...] | str
    val_files: Annotated[tuple[str, ...] | str | None, ("null", "takes val_fraction of the documents")]
    split_seed: Annotated[int, ("low", 0)]
    separator: Annotated[str | None, ("shortest", 0), ("null", "makes every file one document")]
    column: str

    def documents(self) -> Iterator[Document]:
        if self.val_files:
            val, train = _expand(self.val_files, "val_files"), _expand(self.files, "files")
            shared = {path.resolve() for path in val} & {path.resolve() for path in train}
            if shared:
                raise DataError(f"{min(shared)} is in data.files and in data.val_files; take it out of one of the two")
            yield from (("val", document) for document in _read_files(val, self))
            yield from (("train", document) for document in _read_files(train, self))
        else:
            yield from _spread(_read_files(_expand(self.files, "files"), self), self.val_fraction, self.split_seed)

    def input_files(self) -> dict[str, int]:
        patterns = [*_as_list(self.files), *_as_list(self.val_files)]
        return {path: os.path.getsize(path) for path in sorted({p for pattern in patterns for p in _matching(pattern)})}


def _as_list(patterns: str | Iterable[str] | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or [])


def _matching(pattern: str) -> list[str]:
    return [path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path)]


def _expand(patterns: str | Iterable[str], key: str) -> list[Path]:
    """All matching files, sorted; DataError if a pattern matches none."""
    paths: set[Path] = set()
    for pattern in _as_list(patterns):
        files = set(map(Path, _matching(pattern)))
        if not files:
            raise DataError(f"no file matches {pattern!r}; correct data.{key} (globs are relative to {Path.cwd()})")
        paths |= files
    if not paths:
        raise DataError(f"data.{key} names no file; set it to a path or a glob: data.{key}='folder/*.txt'")
    return sorted(paths)


def _spread(documents: Iterable[str], fraction: float, seed: int) -> Iterator[Document]:
    """Every (1/fraction)-th document is validation: systematic sampling, exact in number and in one pass."""
    if not 0 < fraction < 1:
        raise DataError(f"data.val_fraction={fraction} is not a share of the documents; set it between 0 and 1")
    phase = np.random.Philox(key=seed % 2**64).random_raw() / 2**64
    for i, document in enumerate(documents):
        picked = int((i + 1) * fraction + phase) > int(i * fraction + phase)
        yield ("val" if picked else "train"), document


def _read_files(paths: Iterable[Path], cfg: TextFiles) -> Iterator[str]:
    for path in paths:
        suffixes = [suffix.lower() for suffix in path.suffixes]
        compression = suffixes.pop() if suffixes and suffixes[-1] in OPENERS else ""
        kind = suffixes[-1] if suffixes else ""
        if kind in (".jsonl", ".json", ".parquet"):
            documents = _read_rows(path, kind, cfg.column)
        elif kind in (".txt", ".text", ".md"):
            documents = _read_text(path, compression, cfg.separator)
        else:
            known = "txt, jsonl and parquet, plain or with " + ", ".join(OPENERS)
            raise DataError(
                f"the format of {path} is not known from its name; rename it or choose other files ({known})"
            )
        yield from (document for document in documents if document)


def _open_zst(path: Path, mode: str = "rb") -> IO[bytes]:
    import pyarrow  # `datasets` needs it, and it reads zstd

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


OPENERS: dict[str, Callable[[Path, str], Any]] = {
    ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zst,
}  # fmt: skip


def _read_text(path: Path, compression: str, separator: str | None) -> Iterator[str]:
    """Documents between lines that equal `separator`, without these lines and without the line end before them."""
    lines: list[str] = []
    chars = 0
    try:
        with OPENERS.get(compression, open)(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
            # Bounded, because a file may be one very long line.
            while line := file.readline(MAX_DOCUMENT_CHARS):
                if separator is not None and line.rstrip("\n") == separator:
                    yield "".join(lines).removesuffix("\n")
                    lines, chars = [], 0
                    continue
                lines.append(line)
                chars += len(line)
                if chars >= MAX_DOCUMENT_CHARS:
                    yield "".join(lines)
                    lines, chars = [], 0
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}); convert it first, for instance with iconv") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} cannot be read to its end ({error}); it may be truncated: get it again") from error
    yield "".join(lines)


def _read_rows(path: Path, kind: str, column: str) -> Iterator[str]:
    """The texts in `column` of a .jsonl or .parquet file, streamed by `datasets`."""
    import datasets
    import fsspec.compression
    import pyarrow

    if "zstd" not in fsspec.compression.compr:  # otherwise .zst needs one more package
        fsspec.compression.register_compression(
            "zstd", lambda file, **_: io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd")), ("zst", "zstd")
        )
    builder, options = ("parquet", {"columns": [column]}) if kind == ".parquet" else ("json", {})
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would log the error that we report
    try:
        rows = datasets.load_dataset(builder, data_files=[str(path)], split="train", streaming=True, **options)
        for number, row in enumerate(rows):
            document = row.get(column)
            if not isinstance(document, str):
                columns = ", ".join(row)
                raise DataError(
                    f"row {number} of {path} holds no text in the column {column!r} (columns: {columns}); set "
                    "data.column to the column with the text, or remove such rows from a copy of the file"
                )
            yield document
    except DataError:
        raise
    except Exception as error:  # datasets, pyarrow and fsspec have no common base class of errors
        cause = " ".join(str(error).split()) or "no rows"
        raise DataError(
            f"{path} cannot be read as {builder} with a column {column!r} ({cause}); correct the file"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


# --- the Hugging Face Hub -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """Published counts of a dataset."""

    tokenizer: TokenizerName
    documents: Count
    train_tokens: Count
    val_tokens: Count


@dataclass(frozen=True)
class OpenWebText(Data):
    """OpenWebText from the Hugging Face Hub in nanoGPT's split: test_size 0.0005, seed 2357, shuffled.

    Source: https://github.com/karpathy/nanoGPT/blob/master/data/openwebtext/prepare.py. `datasets` 4 no longer runs the loading script
    that the dataset had at first, so each of `revisions` is tried in turn. Needs about 54 GB of Hugging Face cache.
    """

    repository: str
    revisions: tuple[Annotated[str | None, ("null", "is the current one")], ...]
    column: str
    split_seed: Annotated[int, ("low", 0), ("high", 2**32 - 1)]
    expected: Annotated[Expected | None, ("null", "compares nothing")]

    def documents(self) -> Iterator[Document]:
        errors = []
        for revision in self.revisions:
            try:
                rows = _load(self.repository, split="train", revision=revision, num_proc=os.cpu_count())
                break
            except DataError as error:
                errors.append(str(error))
        else:
            raise DataError(_unreachable(self.repository, " | ".join(errors)))
        with _hub_errors():  # it writes the shuffled order into the cache
            halves = rows.train_test_split(test_size=self.val_fraction, seed=self.split_seed, shuffle=True)
        for split, part in (("val", "test"), ("train", "train")):
            for batch in halves[part].iter(batch_size=1000):
                yield from ((split, document) for document in batch[self.column])


@dataclass(frozen=True)
class FineWeb(Data):
    """FineWeb-Edu from the Hugging Face Hub, streamed: only the shards are stored. `max_tokens` ends the download early.

    Validation is the share `val_fraction` of the documents, evenly spaced from a start that `split_seed` decides.
    Source: https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu.
    """

    repository: str
    subset: str
    column: str
    split_seed: Annotated[int, ("low", 0)]

    def documents(self) -> Iterator[Document]:
        yield from _spread(self._stream(), self.val_fraction, self.split_seed)

    def _stream(self) -> Iterator[str]:
        try:
            rows = _load(self.repository, name=self.subset, split="train", streaming=True)
            yield from (row[self.column] for row in rows)
        except DataError as error:
            raise DataError(_unreachable(self.repository, str(error))) from error
        except Exception as error:  # a stream raises whatever its network layer raises
            raise DataError(_unreachable(self.repository, f"{type(error).__name__}: {error}")) from error


def _load(repository: str, **options: Any) -> Any:
    """`datasets.load_dataset`; every error becomes a DataError with its cause."""
    import datasets

    with _hub_errors():
        return datasets.load_dataset(repository, **options)


@contextlib.contextmanager
def _hub_errors() -> Iterator[None]:
    """Turn every error into DataError: those of the Hub, the network and the dataset builder have no common base class."""
    from datasets.config import HF_CACHE_HOME

    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DataError(
                f"the disk of the Hugging Face cache {HF_CACHE_HOME} is full; set HF_HOME to a folder on a larger disk"
            ) from error
        raise DataError(f"{type(error).__name__}: {error}") from error


def _unreachable(repository: str, cause: str) -> str:
    return (
        f"{repository} cannot be loaded from the Hugging Face Hub ({cause}); connect to the network or set HF_HOME to "
        "a cache that holds it, or prepare local copies of its files: data=text data.files='folder/*.parquet'"
    )


SOURCES: dict[str, type[Data]] = {"stdlib": Stdlib, "text": TextFiles, "openwebtext": OpenWebText, "fineweb": FineWeb}
"""Sources by the name that `data.source` gives."""
