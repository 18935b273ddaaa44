"""Where text comes from. A source is a generator of (split, document), split being "train" or "val".

A source takes its settings (data/settings.py, configs/data/<name>.yaml) and imports what it needs when it is called.
It is deterministic: the same configuration and the same inputs give the same documents in the same order. Validation
comes first where that is possible, so that a cap on the training tokens (`max_tokens`) never cuts it. To add a
source, write such a function and the dataclass of its settings, enter them in SOURCES and SETTINGS, and give the defaults in a YAML file.
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
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.settings import Data, FineWeb, OpenWebText, Stdlib, TextFiles
from data.shards import DataError

Document = tuple[str, str]  # (split, text)

# A file without separators is cut at the first line end after this many characters, so that memory stays bounded.
MAX_DOCUMENT_CHARS = 1 << 24


# --- this Python's own library --------------------------------------------------------------------------------------

# Folders of the standard library that are no library text: installed packages, tests, fixtures, applications, code pages.
NOT_LIBRARY = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "ensurepip",
    "lib-dynload", "__pycache__", "encodings",
}  # fmt: skip

# Bytes above which a module is never validation: pydoc's topics (750 kB) would alone be most of it.
MAX_VAL_MODULE = 1 << 18


def stdlib(cfg: Stdlib) -> Iterator[Document]:
    """The sources, documentation strings included, of the running Python's standard library: one document a module.

    About 9 MB of English and Python that every machine has. Order and split follow from the SHA-256 of a module's
    path: the share `val_fraction` with the smallest hashes is validation, so a module keeps its side from one Python
    to the next. The text depends on the Python version, which the manifest records. Needs no network.
    """
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
        is_val = rank < cfg.val_fraction and path.stat().st_size <= MAX_VAL_MODULE
        yield ("val" if is_val else "train"), path.read_text(encoding="utf-8", errors="replace")


# --- local files ----------------------------------------------------------------------------------------------------


def text(cfg: TextFiles) -> Iterator[Document]:
    """Local files by glob: .txt, .jsonl and .parquet, plain or compressed (.gz, .xz, .bz2, .zst).

    .txt is read by ourselves, as `datasets` knows lines, paragraphs and whole files, but not documents between lines
    that say `separator` (null: a file is one document; "": paragraphs). .jsonl and .parquet go through `datasets`,
    streamed, one document a row of `column`. Validation is `val_files`, or the share `val_fraction` of the documents,
    evenly spread from a beginning that `split_seed` decides. Files are taken in sorted order; empty documents are
    left out.
    """
    if cfg.val_files:
        val, train = _expand(cfg.val_files, "val_files"), _expand(cfg.files, "files")
        shared = {path.resolve() for path in val} & {path.resolve() for path in train}
        if shared:
            raise DataError(f"{min(shared)} is in data.files and in data.val_files; take it out of one of the two")
        yield from (("val", document) for document in _read_files(val, cfg))
        yield from (("train", document) for document in _read_files(train, cfg))
    else:
        yield from _spread(_read_files(_expand(cfg.files, "files"), cfg), cfg.val_fraction, cfg.split_seed)


def input_files(cfg: Data) -> dict[str, int]:
    """The local files that `cfg` names and that exist, path → bytes; empty for a source that reads none."""
    named = (cfg.files, cfg.val_files) if isinstance(cfg, TextFiles) else ()
    patterns = [pattern for part in named for pattern in _as_list(part)]
    paths = {path for pattern in patterns for path in glob.glob(os.path.expanduser(pattern), recursive=True)}
    return {path: os.path.getsize(path) for path in sorted(paths) if os.path.isfile(path)}


def _as_list(patterns: str | Iterable[str] | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or [])


def _expand(patterns: str | Iterable[str], key: str) -> list[Path]:
    """All files that match, each pattern at least one; DataError otherwise."""
    paths: set[Path] = set()
    for pattern in _as_list(patterns):
        found = [Path(path) for path in glob.glob(os.path.expanduser(pattern), recursive=True)]
        files = {path for path in found if path.is_file()}
        if not files:
            raise DataError(f"no file matches {pattern!r}; correct data.{key} (globs are relative to {Path.cwd()})")
        paths |= files
    if not paths:
        raise DataError(f"data.{key} names no file; set it to a path or a glob: data.{key}='folder/*.txt'")
    return sorted(paths)


def _spread(documents: Iterable[str], fraction: float, seed: int) -> Iterator[Document]:
    """Every 1/fraction-th document is validation: systematic sampling, exact in number and without a second pass."""
    if not 0 < fraction < 1:
        raise DataError(f"data.val_fraction={fraction} is no share of the documents; set it between 0 and 1")
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
            raise DataError(f"the kind of {path} is not known by its name; rename it or choose other files ({known})")
        yield from (document for document in documents if document)


def _open_zst(path: Path, mode: str = "rb") -> IO[bytes]:
    import pyarrow  # comes with `datasets` and reads zstd without another package

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


OPENERS: dict[str, Callable[[Path, str], Any]] = {
    ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zst,
}  # fmt: skip


def _read_text(path: Path, compression: str, separator: str | None) -> Iterator[str]:
    """Documents between the lines that equal `separator`, without those lines and the line end before them."""
    lines: list[str] = []
    chars = 0
    try:
        with OPENERS.get(compression, open)(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
            # A bounded readline: a file may be one endless line.
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
        raise DataError(f"{path} cannot be read to its end ({error}); it may be truncated: fetch it again") from error
    yield "".join(lines)


def _read_rows(path: Path, kind: str, column: str) -> Iterator[str]:
    """The texts in `column` of a .jsonl or .parquet file, streamed by `datasets`."""
    import datasets
    import fsspec.compression
    import pyarrow

    if "zstd" not in fsspec.compression.compr:  # otherwise .zst would need one more package
        fsspec.compression.register_compression(
            "zstd", lambda file, **_: io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd")), ("zst", "zstd")
        )
    builder, options = ("parquet", {"columns": [column]}) if kind == ".parquet" else ("json", {})
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs the error that we report in one sentence
    try:
        rows = datasets.load_dataset(builder, data_files=[str(path)], split="train", streaming=True, **options)
        for number, row in enumerate(rows):
            document = row.get(column)
            if not isinstance(document, str):
                columns = ", ".join(row)
                raise DataError(
                    f"row {number} of {path} holds no text in the column {column!r} (columns: {columns}); set "
                    "data.column to the column with the text, or give a copy of the file without such rows"
                )
            yield document
    except DataError:
        raise
    except Exception as error:  # datasets, pyarrow and fsspec each have their own
        cause = " ".join(str(error).split()) or "no rows"
        raise DataError(
            f"{path} cannot be read as {builder} with a column {column!r} ({cause}); correct the file"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


# --- the Hugging Face Hub -------------------------------------------------------------------------------------------


def openwebtext(cfg: OpenWebText) -> Iterator[Document]:
    """OpenWebText in nanoGPT's split: test_size 0.0005, seed 2357, shuffled.

    Source: https://github.com/karpathy/nanoGPT/blob/master/data/openwebtext/prepare.py. `datasets` 4 dropped the
    loading scripts that the dataset began with, so each of `revisions` is tried in turn. Needs about 54 GB of Hugging
    Face cache.
    """
    errors = []
    for revision in cfg.revisions:
        try:
            rows = _load(cfg.repository, split="train", revision=revision, num_proc=os.cpu_count())
            break
        except DataError as error:
            errors.append(str(error))
    else:
        raise DataError(_unreachable(cfg.repository, " | ".join(errors)))
    with _hub_errors():  # the shuffled order is written into the cache
        halves = rows.train_test_split(test_size=cfg.val_fraction, seed=cfg.split_seed, shuffle=True)
    for split, part in (("val", "test"), ("train", "train")):
        for batch in halves[part].iter(batch_size=1000):
            yield from ((split, document) for document in batch[cfg.column])


def fineweb(cfg: FineWeb) -> Iterator[Document]:
    """FineWeb-Edu, streamed: nothing is kept on the disk but the shards. `max_tokens` ends the download early.

    Validation is the share `val_fraction` of the documents, evenly spread from a beginning that `split_seed` decides.
    Source: https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu.
    """

    def documents() -> Iterator[str]:
        try:
            rows = _load(cfg.repository, name=cfg.subset, split="train", streaming=True)
            yield from (row[cfg.column] for row in rows)
        except DataError as error:
            raise DataError(_unreachable(cfg.repository, str(error))) from error
        except Exception as error:  # a stream fails with whatever its network layer raises
            raise DataError(_unreachable(cfg.repository, f"{type(error).__name__}: {error}")) from error

    yield from _spread(documents(), cfg.val_fraction, cfg.split_seed)


def _load(repository: str, **options: Any) -> Any:
    """`datasets.load_dataset`; DataError with the cause for whatever goes wrong."""
    import datasets

    with _hub_errors():
        return datasets.load_dataset(repository, **options)


@contextlib.contextmanager
def _hub_errors() -> Iterator[None]:
    """Turn what `datasets` raises into DataError: the Hub's, the network's and the builder's errors have no common base."""
    from datasets.config import HF_CACHE_HOME

    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DataError(
                f"the disk holding the Hugging Face cache {HF_CACHE_HOME} is full; set HF_HOME to a larger one"
            ) from error
        raise DataError(f"{type(error).__name__}: {error}") from error


def _unreachable(repository: str, cause: str) -> str:
    return (
        f"{repository} cannot be loaded from the Hugging Face Hub ({cause}); connect to the network or set HF_HOME to "
        "a cache that holds it, or prepare local copies of its files: data=text data.files='folder/*.parquet'"
    )


SOURCES: dict[str, Callable[[Any], Iterator[Document]]] = {
    "stdlib": stdlib,
    "text": text,
    "openwebtext": openwebtext,
    "fineweb": fineweb,
}

SETTINGS = {"stdlib": Stdlib, "text": TextFiles, "openwebtext": OpenWebText, "fineweb": FineWeb}
"""What each source is given."""
