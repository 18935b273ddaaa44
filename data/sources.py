"""Where text comes from: one class for each source. Its fields are its settings, and `documents` yields (split, text).

A source is deterministic: the same settings and inputs give the same documents in the same order. It imports what it needs only when
it is read. Where possible, validation documents come first, so that `max_tokens`, which limits the training tokens, never removes any.
To add a source, write such a class, enter it in SOURCES, and give the defaults in configs/data/<name>.yaml.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from data.bin import Bin
from data.files import Format, read_chunks
from data.hub import Hub, OpenWebText
from data.mix import Mix
from data.settings import Chunk, Data, Document, InputFile, Position, Source, evenly_spaced
from data.shards import DataError

# --- this Python's own library --------------------------------------------------------------------------------------

# Folders that are left out: installed packages, tests, applications, code pages.
NOT_LIBRARY = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "ensurepip",
    "lib-dynload", "__pycache__", "encodings",
}  # fmt: skip

# A larger module (bytes) is never validation: pydoc's topics (750 kB) alone would be most of it.
MAX_VAL_MODULE = 1 << 18


@dataclass(frozen=True)
class Stdlib(Source):
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
            own = NOT_LIBRARY.isdisjoint(relative.parts) and not path.name.startswith("_sysconfigdata")
            if own and path.is_file():  # a link may lead nowhere
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
class TextFiles(Source):
    """Local files by path or glob: .txt, .jsonl and .parquet; the first two plain or compressed (.gz, .xz, .bz2, .zst).

    A document of a .txt file ends at a line that equals `separator` (null: a file is one document; "": paragraphs); of the others it is the
    field `column` of a row. Validation is `val_files`, or the share `val_fraction` of the documents, evenly spaced from a start that
    `split_seed` decides. Files are read in sorted order, those of validation first; empty documents are left out.
    """

    files: tuple[str, ...] | str
    val_files: Annotated[tuple[str, ...] | str | None, ("null", "takes val_fraction of the documents")]
    split_seed: Annotated[int, ("low", 0)]
    separator: Annotated[str | None, ("shortest", 0), ("null", "makes every file one document")]
    column: str

    def inputs(self) -> list[InputFile]:
        train = _expand(self.files, "files")
        if not self.val_files:
            if not 0 < self.val_fraction < 1:
                raise DataError(
                    f"data.val_fraction={self.val_fraction} is not a share of the documents; set it between 0 and 1"
                )
            return [_described(path, "") for path in train]
        val = _expand(self.val_files, "val_files")
        shared = {path.resolve() for path in val} & {path.resolve() for path in train}
        if shared:
            raise DataError(f"{min(shared)} is in data.files and in data.val_files; take it out of one of the two")
        return [*(_described(path, "val") for path in val), *(_described(path, "train") for path in train)]

    def chunks(self, files: Sequence[InputFile], start: Position) -> Iterator[Chunk]:
        return read_chunks(files, start, Format(self.column, self.separator))

    def is_validation(self, first: int, count: int, files: Sequence[InputFile]) -> np.ndarray:
        return evenly_spaced(first, count, self.val_fraction, self.split_seed)

    def input_files(self) -> dict[str, int]:
        patterns = [*_as_list(self.files), *_as_list(self.val_files)]
        found = {str(Path(path)) for pattern in patterns for path in _matching(pattern)}
        return {path: os.path.getsize(path) for path in sorted(found)}


def _described(path: Path, split: str) -> InputFile:
    stat = path.stat()
    return InputFile(str(path), stat.st_size, split, stat.st_mtime_ns)


def _as_list(patterns: str | Iterable[str] | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or [])


def _matching(pattern: str) -> list[str]:
    return [path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path)]


def _expand(patterns: str | Iterable[str], key: str) -> list[Path]:
    """All matching files, sorted; DataError if a pattern matches none."""
    paths: set[Path] = set()
    for pattern in _as_list(patterns):
        files = set(map(Path, _matching(pattern)))
        if not files and os.path.isdir(os.path.expanduser(pattern)):
            raise DataError(
                f"data.{key}={pattern} is a folder; name the files in it: 'data.{key}={pattern.rstrip('/')}/**/*.txt'"
            )
        if not files:
            raise DataError(f"no file matches {pattern!r}; correct data.{key} (globs are relative to {Path.cwd()})")
        paths |= files
    if not paths:
        raise DataError(f"data.{key} names no file; set it to a path or a glob: data.{key}='folder/*.txt'")
    return sorted(paths)


SOURCES: dict[str, type[Data]] = {
    "stdlib": Stdlib,
    "text": TextFiles,
    "openwebtext": OpenWebText,
    "hub": Hub,
    "bin": Bin,
    "mix": Mix,
}
"""Sources by the name that `data.source` gives."""
