"""Tokens that another program wrote, read where they lie and never changed. Two formats, little-endian uint16 each:

nanoGPT         train.bin, val.bin: tokens only (https://github.com/karpathy/nanoGPT/blob/master/data/openwebtext/prepare.py);
                the end-of-text token ends a document
the speedruns   fineweb_train_000001.bin, ...: 256 int32 (magic 20240520, version 1, number of tokens, zeros), then the tokens
                (https://github.com/KellerJordan/modded-nanogpt/blob/master/data/fineweb.py); the end-of-text token begins a document
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml

from data.command import CONFIGS
from data.settings import Data
from data.shards import TOKEN, DataError, Dataset, Shard, Split, digest, eot_of

MAGIC, VERSION, HEADER = 20240520, 1, 1024
MAGIC_OF_4_BYTES = 20240801  # llm.c's files for Llama 3
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


@dataclass(frozen=True)
class Bin(Data):
    """A folder of such files. `train` and `val` are patterns of names: the files of the first that matches are read, in sorted order.

    Opening reads the sizes, the headers and a sample of each file. The fingerprint is of these, so that 17 GB are not read at every start.
    Every window that is read is compared with the vocabulary, and `python -m data.verify` reads everything.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    vocab_size: Annotated[int, ("low", 1), ("high", 1 << 16)]

    def open(self) -> Dataset:
        folder = Path(self.dir)
        train, val = (open_split(folder, names, self.vocab_size) for names in (self.train, self.val))
        if bool(train.header) != bool(val.header):
            raise DataError(
                f"in {folder}, only one of {train.shards[0].file} and {val.shards[0].file} has a header; set data.train and data.val"
            )
        eot = eot_of(self.tokenizer)
        separator = eot if eot is not None and eot < self.vocab_size else None
        seen = [[(shard.tokens, shard.sha256) for shard in split.shards] for split in (train, val)]
        about = (digest([self.vocab_size, seen]), self.vocab_size, self.tokenizer, separator, bool(train.header))
        return Dataset(*about, train, val)

    def vocabulary(self) -> int:
        return self.vocab_size


def bin_of(folder: Path, **changed: Any) -> Bin:
    """The settings of configs/data/bin.yaml for a folder, and `changed`."""
    settings = yaml.safe_load((CONFIGS / "data" / "bin.yaml").read_text()) | {"dir": str(folder)} | changed
    return Bin(**settings | {key: tuple(settings[key]) for key in ("train", "val")})


def open_split(folder: Path, patterns: Sequence[str], vocab_size: int) -> Split:
    """The files of the first pattern that matches. The `sha256` of a shard is that of its size and samples.

    Raises:
        DataError: nothing matches, or a file is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; set data.dir to the folder of the .bin files")
    if not patterns:
        raise DataError("data.train and data.val name the files; give each of them at least one pattern")
    paths = next((found for pattern in patterns if (found := sorted(folder.glob(pattern)))), [])
    if not paths:
        names = ", ".join(sorted(path.name for path in folder.glob("*.bin"))[:5]) or "no .bin files"
        raise DataError(f"no file of {folder} matches {' or '.join(patterns)} (it has {names}); correct data.dir")
    headers = {layout(path)[0] for path in paths}
    if len(headers) > 1:
        raise DataError(f"some files that match in {folder} have a header and some have none; name one kind only")
    header = headers.pop()
    shards = []
    for path in paths:
        tokens = layout(path)[1]
        sha, largest = hashlib.sha256(str(tokens).encode()), -1
        for block in _samples(path, header, tokens):
            sha.update(block.tobytes())
            largest = max(largest, int(block.max()))
        if largest >= vocab_size:
            raise DataError(
                f"{path} holds token {largest}, but its vocabulary is {vocab_size}; set data.vocab_size to that of its tokenizer"
            )
        shards.append(Shard(path.name, tokens, sha.hexdigest()))
    return Split(folder, tuple(shards), header, vocab_size)


def _samples(path: Path, header: int, tokens: int) -> Iterator[np.ndarray]:
    count = min(tokens, _SAMPLE_BYTES // TOKEN.itemsize)
    for start in sorted({(tokens - count) * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
        yield np.fromfile(path, TOKEN, count, offset=header + start * TOKEN.itemsize)


def layout(path: Path) -> tuple[int, int]:
    """Bytes of the header (0 or 1024), and number of tokens.

    Raises:
        DataError: the file is empty, or its size does not fit.
    """
    try:
        size = path.stat().st_size
        start = np.fromfile(path, "<i4", 256)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    if size == 0:
        raise DataError(f"{path} is empty; get it again")
    magic = int(start[0]) if len(start) else 0
    if magic == MAGIC_OF_4_BYTES:
        raise DataError(f"{path} holds tokens of 4 bytes (magic {magic}); use files of a vocabulary below 65,536")
    if magic != MAGIC:
        if size % TOKEN.itemsize:
            raise DataError(
                f"{path} has {size:,} bytes, an odd number, so it is truncated or not of uint16; get it again"
            )
        if wider := _wider(start):
            raise DataError(
                f"{path} looks like {wider}, and tokens here are uint16; if all ids are below 65,536, convert it with NumPy: "
                f"np.fromfile('{path}', np.{wider}).astype(np.uint16).tofile('new.bin'); if not, use files of a smaller vocabulary"
            )
        return 0, size // TOKEN.itemsize
    if len(start) < 256:
        raise DataError(f"{path} ends within its header of {HEADER} bytes; get it again")
    if start[1] != VERSION:
        raise DataError(
            f"the header of {path} has version {start[1]}, and this code reads version {VERSION}; convert it"
        )
    tokens, there = int(start[2]), (size - HEADER) / TOKEN.itemsize
    if tokens < 1 or tokens != there:
        how = "truncated" if there < tokens else "not what its header says"
        raise DataError(f"{path} is {how}: {tokens:,} tokens in its header, {there:,.10g} in the file; get it again")
    return HEADER, tokens


def _wider(start: np.ndarray) -> str | None:
    """The wider type of which tokens seem to be, from the first bytes as int32 (256,): read as uint16, every second token is almost 0."""
    most = 3  # of the upper two bytes: no vocabulary has more than 262,144 ids
    if len(start) < 32 or not 0 <= start.min() <= start.max() < (most + 1) << 16 or (start & 0xFFFF).max() <= most:
        return None
    return "uint32" if start[1::2].any() else "uint64"
