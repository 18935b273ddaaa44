"""Files of text: .txt, .jsonl and .parquet, plain or compressed, on this machine or at a URL. Memory is bounded for files of any size.

A position in a file is the number of its documents (or rows) that are done, so reading is continued exactly there. A compressed or plain
text file is decompressed again up to that point; of a parquet file, the finished row groups are not read.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import IO, Any

from data.settings import Chunk, InputFile, Position
from data.shards import DataError

# A file without separators is cut at the first line end after this many characters, so that memory is bounded.
MAX_DOCUMENT_CHARS = 1 << 24
# A chunk has at least so many characters, if the file has.
CHUNK_CHARS = 1 << 20
# A row group with more bytes is read in parts.
GROUP_BYTES = 1 << 26

Item = tuple[Any, int, int]
"""A text, or Rows; then the number of documents of the file that are done after it, and of its bytes that are read."""


@dataclass(frozen=True)
class Format:
    """How the documents of a file are found.

    column: of .jsonl and .parquet. separator: the line between documents of a .txt file; None: the file is one document. keep_empty: whether
    empty documents are kept.
    """

    column: str
    separator: str | None = None
    keep_empty: bool = False


def read_chunks(files: Sequence[InputFile], start: Position, form: Format) -> Iterator[Chunk]:
    """The documents of the files after a position, in order. A chunk may span files, but not splits.

    Raises:
        DataError: a file cannot be read; the message names it.
    """
    texts: list[str] = []
    chars, position, read = 0, start, sum(file.size for file in files[: start[0]])
    for number, file in enumerate(files[start[0] :], start=start[0]):
        before, done = read, 0
        if texts and file.split != files[number - 1].split:
            yield Chunk(texts, files[number - 1].split, position, read)
            texts, chars = [], 0
        for item, done, here in items_of(file.path, start[1] if number == start[0] else 0, form):
            if isinstance(item, Rows):
                if texts:
                    yield Chunk(texts, file.split, position, read)
                    texts, chars = [], 0
                yield Chunk(item, file.split, (number, done), before + here)
            elif item or form.keep_empty:
                texts.append(item)
                chars += len(item)
            position, read = (number, done), before + min(here, file.size)
            if chars >= CHUNK_CHARS:
                yield Chunk(texts, file.split, position, read)
                texts, chars = [], 0
        position, read = (number + 1, 0), before + file.size
    if texts:
        yield Chunk(texts, files[-1].split, position, read)


def items_of(path: str, skip: int, form: Format) -> Iterator[Item]:
    """What a file holds after its first `skip` documents."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in OPENERS else ""
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet" and not compression:
        yield from _parquet(path, skip, form)
        return
    readers: dict[str, Callable[[IO[str], str, Format], Iterator[str]]] = {
        **dict.fromkeys((".jsonl", ".json"), _json_lines),
        **dict.fromkeys((".txt", ".text", ".md"), _documents),
    }
    if kind not in readers:
        known = "txt, jsonl and parquet; txt and jsonl also with " + ", ".join(OPENERS)
        raise DataError(f"the format of {path} is not known from its name; rename it or choose other files ({known})")
    try:
        with _raw(path) as raw:
            unpacked = OPENERS[compression](raw) if compression else raw
            text = io.TextIOWrapper(unpacked, encoding="utf-8-sig")
            for done, document in enumerate(readers[kind](text, path, form), start=1):
                if done > skip:
                    yield document, done, raw.tell()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}); convert it first, for instance with iconv") from error
    except Exception as error:
        # From the network, libraries raise errors of their own.
        if not isinstance(error, (OSError, EOFError, lzma.LZMAError, zlib.error)) and "://" not in path:
            raise
        raise DataError(f"{path} cannot be read to its end ({error}); it may be truncated: get it again") from error


def _raw(path: str) -> Any:
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()


def _zst(raw: IO[bytes]) -> IO[bytes]:
    import pyarrow  # `datasets` needs it, and it reads zstd

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))


OPENERS: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _zst}


def _documents(file: IO[str], path: str, form: Format) -> Iterator[str]:
    """Documents between lines that equal the separator, without these lines and without the line end before them."""
    lines: list[str] = []
    chars = 0
    while line := file.readline(MAX_DOCUMENT_CHARS):  # bounded, because a file may be one very long line
        if form.separator is not None and line.rstrip("\n") == form.separator:
            yield "".join(lines).removesuffix("\n")
            lines, chars = [], 0
            continue
        lines.append(line)
        chars += len(line)
        if chars >= MAX_DOCUMENT_CHARS:
            yield "".join(lines)
            lines, chars = [], 0
    yield "".join(lines)


def _json_lines(file: IO[str], path: str, form: Format) -> Iterator[str]:
    row = 0
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} cannot be read as json: line {number} ({error}); correct the file") from error
        if not isinstance(content, dict):
            raise DataError(
                f"{path} cannot be read as json: line {number} is no object; write one object a line, such as "
                f'{{"{form.column}": "..."}}, for instance with: jq -c .[]; correct the file'
            )
        yield _text(content.get(form.column), row, path, form.column, content)
        row += 1


def _text(value: Any, row: int, path: str, column: str, columns: Any) -> str:
    """A value of the column with the text; DataError if it is no text."""
    if isinstance(value, str):
        return value
    raise _no_text(row, path, column, columns)


def _no_text(row: int, path: str, column: str, columns: Any) -> DataError:
    return DataError(
        f"row {row} of {path} holds no text in the column {column!r} (columns: {', '.join(columns)}); set data.column to the "
        "column with the text, or remove such rows from a copy of the file"
    )


# ---- parquet ----


@dataclass(frozen=True)
class Rows:
    """One row group of a parquet file. The process that encodes the texts reads them, so that reading is parallel too."""

    path: str
    group: int
    first: int
    form: Format

    def read(self) -> list[str]:
        """The texts; DataError if they cannot be read."""
        return list(_group_texts(self.path, self.group, self.first, self.form))


@lru_cache(maxsize=2)
def parquet_file(path: str) -> Any:
    """The opened parquet file (pyarrow.parquet.ParquetFile); its errors are those of pyarrow and fsspec."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(_raw(path), pre_buffer=False, buffer_size=1 << 20)


def parquet_rows(path: str) -> int:
    """The number of rows of a parquet file; DataError if it cannot be read."""
    try:
        return int(parquet_file(path).metadata.num_rows)
    except Exception as error:  # as below
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> DataError:
    cause = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path} cannot be read as parquet ({cause}); correct the file, or get it again")


def _parquet(path: str, skip: int, form: Format) -> Iterator[Item]:
    try:
        meta = parquet_file(path).metadata
        names = parquet_file(path).schema_arrow.names
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        rows, sizes = [g.num_rows for g in groups], [g.total_byte_size for g in groups]
    except Exception as error:  # pyarrow and fsspec have no common base class of errors
        raise _unreadable(path, error) from error
    if form.column not in names:
        raise _no_text(0, path, form.column, names)
    first, read, whole = 0, 0, max(1, sum(sizes))
    packed = sum(g.column(i).total_compressed_size for g in groups for i in range(g.num_columns))
    for group, (count, size) in enumerate(zip(rows, sizes)):
        read += size
        here, end = packed * read // whole, first + count
        if end > skip and first >= skip and size <= GROUP_BYTES:
            yield Rows(path, group, first, form), end, here
        elif end > skip:
            before = packed * (read - size) // whole
            for row, text in enumerate(_group_texts(path, group, first, form, all_rows=True), start=first):
                if row >= skip:
                    yield text, row + 1, before + (here - before) * (row + 1 - first) // count
        first = end


def _group_texts(path: str, group: int, first: int, form: Format, all_rows: bool = False) -> Iterator[str]:
    """The texts of a row group whose first row has the number `first` in the file; with `all_rows`, empty ones too."""
    row = first
    try:
        for batch in parquet_file(path).iter_batches(
            1000, row_groups=[group], columns=[form.column], use_threads=False
        ):
            for value in batch.column(0).to_pylist():
                text = _text(value, row, path, form.column, parquet_file(path).schema_arrow.names)
                if text or form.keep_empty or all_rows:
                    yield text
                row += 1
    except DataError:
        raise
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
