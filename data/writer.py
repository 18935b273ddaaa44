"""How shards are written: so that a preparation that is killed at any moment is continued without repeating or losing a document.

Every few million tokens, the shards are flushed to the disk, and then progress.json is replaced: it says how many tokens of each split are on
the disk, and which documents they came from. What a killed process wrote after that is cut off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data.settings import Chunk, InputFile, Position, Source
from data.shards import TOKEN, DataError, Shard, SplitInfo, digest, sync

PROGRESS = "progress.json"
COMMIT_TOKENS = 1 << 23
"""Tokens between two times at which the progress is saved: 16 MB of shards."""


class ShardWriter:
    """Writes one split into `directory`, a new file every `shard_tokens` tokens; `finish` returns what was written.

    Every finished file is hashed and on the disk (fsync); `close` closes an unfinished one.

    Args:
        state: what `save` returned: later tokens are cut off, and writing continues there.

    Raises:
        DataError: `shard_tokens` is below 1. OSError: a file cannot be written. ValueError: the files do not hold what `state` says.
    """

    def __init__(self, directory: Path, split: str, shard_tokens: int, state: Mapping[str, Any] | None = None):
        if shard_tokens < 1:
            raise DataError(f"data.shard_tokens={shard_tokens} leaves no room for a token; set it to 1 or more")
        self.directory, self.split, self.shard_tokens = directory, split, shard_tokens
        self.tokens = 0
        self.documents = 0
        self._shards: list[Shard] = []
        self._file: Any = None
        self._in_shard = 0
        if state is not None:
            self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._shards = [Shard(**shard) for shard in state["shards"]]
        self.tokens, self.documents = int(state["tokens"]), int(state["documents"])
        for shard in self._shards:
            if (self.directory / shard.file).stat().st_size != shard.tokens * TOKEN.itemsize:
                raise ValueError(shard.file)
        left = self.tokens - sum(shard.tokens for shard in self._shards)
        if left:
            self._open("r+b")
            self._file.truncate(left * TOKEN.itemsize)
            while block := self._file.read(1 << 22):
                self._sha.update(block)
            self._in_shard = self._file.tell() // TOKEN.itemsize
        if self._in_shard != left or self._sha_of_file() != state["sha256"]:
            raise ValueError(f"{self.split}_{len(self._shards):05d}.bin")

    def _open(self, mode: str) -> None:
        self._file = open(self.directory / f"{self.split}_{len(self._shards):05d}.bin", mode)  # noqa: SIM115
        self._sha, self._in_shard = hashlib.sha256(), 0

    def _sha_of_file(self) -> str:
        return self._sha.hexdigest() if self._file is not None else ""

    def close(self) -> None:
        """Close an unfinished file, which stays as it is."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # on a full disk closing fails too; the first error is the one to report
                self._file.close()

    def write(self, ids: np.ndarray, documents: int) -> None:
        """Append `ids` (n,) uint16, which are the tokens of `documents` documents."""
        ids = ids.astype(TOKEN, copy=False)
        self.documents += documents
        self.tokens += len(ids)
        while len(ids):
            if self._file is None:
                self._open("wb")
            part, ids = np.split(ids, [self.shard_tokens - self._in_shard])
            raw = part.tobytes()
            self._file.write(raw)
            self._sha.update(raw)
            self._in_shard += len(part)
            if self._in_shard == self.shard_tokens:
                self._finish_shard()

    def _finish_shard(self) -> None:
        sync(self._file)
        self._file.close()
        name = Path(self._file.name).name
        self._shards.append(Shard(name, self._in_shard, self._sha.hexdigest()))
        self._file = None

    def save(self) -> dict[str, Any]:
        """Flush everything to the disk; returns the state that continues here."""
        if self._file is not None:
            sync(self._file)
        shards = [asdict(shard) for shard in self._shards]
        return {"tokens": self.tokens, "documents": self.documents, "shards": shards, "sha256": self._sha_of_file()}

    def finish(self) -> SplitInfo:
        """Finish the last shard; returns the counts of the split."""
        if self._file is not None:
            self._finish_shard()
        return SplitInfo(self.tokens, self.documents, tuple(self._shards))


class Progress:
    """The two writers of a preparation, and how far it has come; what an earlier process saved in the directory is continued.

    files: the input. position: after the last document that was written. read, index: bytes and documents of the input up to there.
    """

    def __init__(self, directory: Path, cfg: Source) -> None:
        self.directory, self.cfg = directory, cfg
        self.position: Position = (0, 0)
        self.read, self.index, self._saved, self._whole = 0, 0, 0, True
        found = self._found()
        self.files = found[0] if found else cfg.inputs()
        if not found or not self._continued(found[1]):
            self.train, self.val = (ShardWriter(directory, split, cfg.shard_tokens) for split in ("train", "val"))
        self._remove_others()

    @property
    def tokens(self) -> int:
        """Tokens written so far, of both splits."""
        return self.train.tokens + self.val.tokens

    @property
    def documents(self) -> int:
        """Complete documents written so far, of both splits."""
        return self.train.documents + self.val.documents

    def _identity(self) -> dict[str, Any]:
        """What must be the same for continuing: the standard library is that of one version of Python."""
        return {"settings": self.cfg.content, "python": platform.python_version()}

    def _found(self) -> tuple[list[InputFile], dict[str, Any]] | None:
        """The files and the state that an earlier process saved; None if there is none that belongs to these settings and files."""
        try:
            content = json.loads((self.directory / PROGRESS).read_bytes())
            checksum = content.pop("checksum")
            if checksum != digest(content) or content["identity"] != self._identity():
                return None
            files = [InputFile(**file) for file in content["files"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return (files, content) if self.cfg.still_valid(files) else None

    def _continued(self, state: Mapping[str, Any]) -> bool:
        try:
            self.train, self.val = (
                ShardWriter(self.directory, split, self.cfg.shard_tokens, state[split]) for split in ("train", "val")
            )
        except (OSError, ValueError):  # somebody removed or changed a file
            return False
        number, item = state["position"]
        self.position, self.read, self.index, self._saved = (number, item), state["read"], state["index"], self.tokens
        return True

    def _remove_others(self) -> None:
        """Remove what a killed process left, and no progress knows."""
        known = {PROGRESS} if self.tokens else set()
        for writer in (self.train, self.val):
            count = len(writer._shards) + (writer._file is not None)
            known |= {f"{writer.split}_{number:05d}.bin" for number in range(count)}
        for path in self.directory.iterdir():
            if path.name not in known:
                path.unlink()

    @property
    def full(self) -> bool:
        """Whether `max_tokens` is reached, and there is validation text."""
        cap = self.cfg.max_tokens
        return cap is not None and self.train.tokens >= cap and self.val.tokens > 0

    @property
    def share(self) -> float | None:
        """How much of the work is done, 0 to 1; None if that is not known."""
        whole, cap = sum(file.size for file in self.files), self.cfg.max_tokens
        shares = [self.read / whole] if whole else []
        shares += [self.train.tokens / cap] if cap and whole else []
        return min(1.0, max(shares)) if shares else None

    def add(self, chunk: Chunk, ids: np.ndarray, lengths: np.ndarray, eot: int) -> None:
        """Write a chunk whose documents have `lengths` (d,) tokens of `ids` (n,), up to the document that completes `max_tokens`."""
        if chunk.splits == "":
            val = self.cfg.is_validation(self.index, len(lengths), self.files)
        elif isinstance(chunk.splits, str):
            val = np.full(len(lengths), chunk.splits == "val")
        else:
            val = np.array([split == "val" for split in chunk.splits], dtype=bool)
        cap = self.cfg.max_tokens
        if cap is not None:
            train = self.train.tokens + np.cumsum(np.where(val, 0, lengths))
            ends = np.flatnonzero((train >= cap) & ((self.val.tokens > 0) | (np.cumsum(val) > 0)))
            if len(ends):
                val, lengths = val[: ends[0] + 1], lengths[: ends[0] + 1]
                ids = ids[: lengths.sum()]
        of_val = np.repeat(val, lengths)
        of_train = ids[~of_val][: None if cap is None else max(0, cap - self.train.tokens)]
        self._whole = False  # an interruption between the following lines must not be saved
        self.train.write(of_train, int(np.count_nonzero(of_train == eot)))  # complete ones: the cap may cut the last
        self.val.write(ids[of_val], int(val.sum()))
        self.position, self.read, self.index = chunk.position, chunk.read, self.index + len(lengths)
        self._whole = True

    def save(self, always: bool = True) -> None:
        """Save the progress; without `always`, only if COMMIT_TOKENS were written since the last time."""
        new = self.tokens - self._saved
        if not new or not self._whole or (new < COMMIT_TOKENS and not always):
            return
        content: dict[str, Any] = {"identity": self._identity(), "files": [asdict(file) for file in self.files]}
        content |= {"position": list(self.position), "read": self.read, "index": self.index}
        content |= {"train": self.train.save(), "val": self.val.save()}
        content["checksum"] = digest(content)
        temporary = self.directory / f".{PROGRESS}"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file)
            sync(file)
        temporary.replace(self.directory / PROGRESS)
        sync_directory(self.directory)
        self._saved = self.tokens

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            with contextlib.suppress(OSError):  # a full disk: the progress that was saved before is valid
                self.save()
        for writer in (self.train, self.val):
            writer.close()


def sync_directory(directory: Path) -> None:
    """Write the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
