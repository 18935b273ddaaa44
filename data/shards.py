"""Token shards on disk: how they are verified and read. data/writer.py writes them.

A prepared dataset is a directory of

    manifest.json      the counts, the settings and the SHA-256 of every shard
    train_00000.bin    tokens, little-endian uint16, no header; every document is followed by the tokenizer's `eot`
    val_00000.bin
    verified.json      the shards that were already verified (a cache; it may be deleted)
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
from bisect import bisect_right
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from data.command import prepare_command

if TYPE_CHECKING:
    from data.settings import Source

FORMAT = 1
TOKEN = np.dtype("<u2")
MANIFEST = "manifest.json"
VERIFIED = "verified.json"
_ANEW = "set data.dir to a folder that does not exist yet, and prepare the data there"


class DataError(Exception):
    """The data cannot be used; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Shard:
    """One file of consecutive tokens."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """The counts of one split ("train" or "val"), and its shards in reading order."""

    tokens: int
    documents: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says about a prepared directory.

    settings: the settings the data was prepared with; preparing again with the same settings does nothing.
    inputs: local files the tokens came from, path → bytes; empty for sources that are not files.
    expected: published counts of this dataset, if there are any; they may differ from `splits`.
    made_by: versions, platform and time; for information only.
    """

    format: int
    name: str
    source: str
    tokenizer: str
    vocab_size: int
    splits: dict[str, SplitInfo]
    settings: dict[str, Any]
    inputs: dict[str, int]
    expected: dict[str, Any]
    made_by: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens and their splits: the same text has the same fingerprint on every machine."""
        splits = {split: asdict(info) for split, info in self.splits.items()}
        return digest([self.format, self.tokenizer, self.vocab_size, splits])


@dataclass(frozen=True)
class Split:
    """One split as a sequence of tokens; threads and processes may share it.

    header: bytes before the tokens of each file. limit: if the files were not verified, the size of the vocabulary that tokens are compared
    with when they are read.
    """

    directory: Path
    shards: tuple[Shard, ...]
    header: int = 0
    limit: int | None = None

    @cached_property
    def tokens(self) -> int:
        """Number of tokens in the split."""
        return self._ends[-1]

    @cached_property
    def _ends(self) -> list[int]:
        """Position after the last token of each shard, behind a 0."""
        return [0, *accumulate(shard.tokens for shard in self.shards)]

    @cached_property
    def _opened(self) -> dict[int, io.FileIO]:
        """The files that were read, by their number. They stay open: opening one takes longer than reading a window."""
        return {}

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens `start : start + length` as a new array (length,) uint16, across shard borders.

        The file is read, not memory-mapped, so that the resident memory of a long run does not grow.

        Raises:
            IndexError: outside the split. DataError: a shard is missing or was truncated after the dataset was opened, or holds a token that
                is not in the vocabulary.
        """
        if start < 0 or length < 0 or start + length > self.tokens:
            raise IndexError(f"tokens {start} to {start + length} of a split of {self.tokens}; stay inside the split")
        out = np.empty(length, dtype=TOKEN)
        number, done = bisect_right(self._ends, start) - 1, 0
        while done < length:
            offset = start + done - self._ends[number]
            count = min(length - done, self.shards[number].tokens - offset)
            self._read_into(out[done : done + count], number, self.header + offset * TOKEN.itemsize)
            done, number = done + count, number + 1
        if self.limit is not None and length and out.max() >= self.limit:
            raise DataError(
                f"a file of {self.directory} holds token {out.max()}, but its vocabulary is {self.limit}; "
                f"find it with: python -m data.verify {shlex.quote(str(self.directory))} vocab_size={self.limit}"
            )
        return out

    def _read_into(self, out: np.ndarray, number: int, offset: int) -> None:
        """Fill `out` (n,) uint16 from the byte `offset` of a file."""
        try:
            if number not in self._opened:
                self._opened[number] = io.FileIO(self.directory / self.shards[number].file)
            size = os.preadv(self._opened[number].fileno(), [out.data], offset)
        except OSError as error:
            raise DataError(
                f"cannot read shard {self.directory / self.shards[number].file} ({error}); prepare the data again in another "
                "folder (data.dir)"
            ) from error
        if size != out.nbytes:
            raise DataError(
                f"shard {self.directory / self.shards[number].file} was truncated while it was used; prepare the data again in "
                "another folder (data.dir)"
            )

    @property
    def parts(self) -> tuple[Split, ...]:
        """As of a mixture: this split alone."""
        return (self,)

    @property
    def weights(self) -> tuple[float, ...]:
        """As of a mixture."""
        return (1.0,)


@dataclass(frozen=True)
class Mixture:
    """The same split of several corpora, with the weight of each; only the ratios matter."""

    parts: tuple[Split, ...]
    weights: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens in all parts."""
        return sum(part.tokens for part in self.parts)


Tokens = Split | Mixture


@dataclass(frozen=True)
class Dataset:
    """Data that was opened. fingerprint: a checkpoint stores it, so that a run is not resumed on other data.

    separator: the token between documents, None if it is not known. separator_first: whether it begins a document, as in the files of the
    speedruns; otherwise it ends one.
    """

    fingerprint: str
    vocab_size: int
    tokenizer: str
    separator: int | None
    separator_first: bool
    train: Tokens
    val: Tokens


@dataclass(frozen=True)
class Prepared(Dataset):
    """A prepared directory that was checked."""

    train: Split
    val: Split
    manifest: Manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json with a checksum of its content; it is on the disk when this returns."""
    content = json.loads(json.dumps(asdict(manifest)))
    content["checksum"] = digest(content)
    with open(directory / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        sync(file)


def sync(file: IO[Any]) -> None:
    """Write what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a prepared directory; DataError if it is damaged, FileNotFoundError if there is none."""
    path = directory / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); make it readable or set data.dir elsewhere"
        ) from error
    try:
        content = json.loads(raw)
        checksum = content.pop("checksum")
        if content["format"] != FORMAT:
            raise DataError(f"{path} has format {content['format']!r}, this code reads format {FORMAT}; {_ANEW}")
        if checksum != digest(content):
            raise DataError(f"{path} is damaged: its checksum does not match its content; {_ANEW}")
        splits = {
            name: SplitInfo(info["tokens"], info["documents"], tuple(Shard(**shard) for shard in info["shards"]))
            for name, info in content.pop("splits").items()
        }
        manifest = Manifest(splits=splits, **content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); {_ANEW}") from error
    if problem := _problem_of(manifest):
        raise DataError(f"{path} cannot be trusted: {problem}; {_ANEW}")
    return manifest


def _problem_of(manifest: Manifest) -> str | None:
    """What is impossible in a manifest, even if its checksum is right; None if nothing is."""

    def count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 62

    texts = (manifest.name, manifest.source, manifest.tokenizer)
    tables = (manifest.settings, manifest.inputs, manifest.expected, manifest.made_by)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(table, dict) for table in tables):
        return "a field is of another type"
    if not (count(manifest.vocab_size) and 0 < manifest.vocab_size <= 1 << 16):
        return f"a vocabulary of {manifest.vocab_size!r} tokens"
    counts = [manifest.expected.get(key) for key in ("documents", "train_tokens", "val_tokens")]
    if manifest.expected and not (all(map(count, counts)) and "met" in manifest.expected):
        return "its published counts are not numbers"
    if sorted(manifest.splits) != ["train", "val"]:
        return f"its splits are {', '.join(sorted(manifest.splits)) or 'none'} instead of train and val"
    for split, info in manifest.splits.items():
        for shard in info.shards:
            if not _is_file_name(shard.file):
                return f"the shard {shard.file!r} is not a file name"
            if not count(shard.tokens) or not isinstance(shard.sha256, str):
                return f"the size or the SHA-256 of {shard.file} is not valid"
        if not count(info.documents) or info.tokens != sum(shard.tokens for shard in info.shards):
            return f"the counts of the split {split} do not agree"
    return None


def open_dataset(directory: str | Path, verify: bool = True, settings: Source | None = None) -> Prepared:
    """Open a prepared directory and check it against its manifest.

    The size of every shard is always checked. With `verify`, its SHA-256 and its largest token are checked too. verified.json records the
    size and the modification time of every verified shard, which is read again only if one of them has changed: 17 GB are not read
    at every start, but a change that keeps both goes unnoticed. `settings` is the section `data` of the configuration; error
    messages use it to name the command that prepares the data.

    Raises:
        DataError: the directory is missing, its manifest is damaged, a shard is missing, truncated or altered, or the name of the dataset
            is not that of a folder.
    """
    directory = Path(directory)
    if settings is not None:
        require_name(settings.name)
    command = prepare_command(settings) if settings is not None else "python -m data.prepare"
    if directory.exists() and not directory.is_dir():
        raise DataError(f"{directory} is a file; set data.dir to a directory")
    if not directory.exists():
        raise DataError(f"there is no prepared data in {directory}; make it with: {command}")
    try:
        manifest = read_manifest(directory)
    except FileNotFoundError:
        raise DataError(
            f"{directory} holds no {MANIFEST}, so it is not prepared data, and it was not changed; set data.dir to "
            "a folder that does not exist yet or is empty"
        ) from None
    remedy = f"move {directory} elsewhere and run: {command}"
    shards = [shard for info in manifest.splits.values() for shard in info.shards]
    for shard in shards:
        if wrong := size_problem(directory / shard.file, shard):
            raise DataError(f"shard {directory / shard.file} is {wrong}; {remedy}")
    if verify:
        _check_hashes(directory, shards, manifest.vocab_size, remedy)
    train, val = (Split(directory, manifest.splits[split].shards) for split in ("train", "val"))
    separator = eot_of(manifest.tokenizer)
    about = (manifest.fingerprint, manifest.vocab_size, manifest.tokenizer, separator, False)
    return Prepared(*about, train, val, manifest)


def eot_of(tokenizer: str) -> int | None:
    """The id after each document; None for a tokenizer that is not known here."""
    from data.tokenizer import TOKENIZERS

    return TOKENIZERS[tokenizer].eot if tokenizer in TOKENIZERS else None


def require_name(name: Any) -> None:
    """Raise DataError unless the name of a dataset can be the name of a folder."""
    if not _is_file_name(name):
        raise DataError(f"data.name={name!r} is not the name of a folder; give one without '/', such as data.name=mine")


def _is_file_name(name: Any) -> bool:
    """Whether a value is the name of one file or folder, not a path."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def size_problem(path: Path, shard: Shard) -> str:
    """What is wrong with the size of a file; "" if nothing is."""
    if not path.is_file():
        return "missing"
    size, expected = path.stat().st_size, shard.tokens * TOKEN.itemsize
    how = "truncated" if size < expected else "altered"
    return "" if size == expected else f"{how}: {size:,} bytes instead of {expected:,}"


def _check_hashes(directory: Path, shards: list[Shard], vocab_size: int, remedy: str) -> None:
    states = {}
    for shard in shards:
        stat = (directory / shard.file).stat()
        states[shard.file] = [stat.st_size, stat.st_mtime_ns, shard.sha256, vocab_size]
    known = _read_verified(directory)
    fresh = [shard for shard in shards if known.get(shard.file) != states[shard.file]]
    if not fresh:
        return
    with ThreadPoolExecutor(min(len(fresh), 8)) as pool:  # hashing releases the GIL
        found = pool.map(hash_file, [directory / shard.file for shard in fresh])
        for shard, (digest, largest) in zip(fresh, found):
            path = directory / shard.file
            if digest != shard.sha256:
                raise DataError(f"shard {path} is altered: its SHA-256 is not the recorded one; {remedy}")
            if largest >= vocab_size:
                raise DataError(f"shard {path} holds token {largest}, but its vocabulary is {vocab_size}; {remedy}")
    _write_verified(directory, states)


def _read_verified(directory: Path) -> Mapping[str, list]:
    try:
        known = json.loads((directory / VERIFIED).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_verified(directory: Path, states: Mapping[str, list]) -> None:
    temporary = directory / f".{VERIFIED}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(states, indent=2), encoding="utf-8")
        temporary.replace(directory / VERIFIED)  # if several ranks do this at once, the last one wins
    except OSError:
        temporary.unlink(missing_ok=True)  # a read-only directory: verified again next time


def hash_file(path: Path, skip: int = 0) -> tuple[str, int]:
    """SHA-256 and largest token (-1: none) of a shard, without its first `skip` bytes; DataError if it cannot be read."""
    sha, largest = hashlib.sha256(), -1
    try:
        with open(path, "rb") as file:
            file.seek(skip)
            while block := file.read(1 << 22):
                sha.update(block)
                largest = max(largest, int(np.frombuffer(block, TOKEN).max()))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    return sha.hexdigest(), largest


def digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
