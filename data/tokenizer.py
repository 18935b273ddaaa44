"""From text to token ids and back: raw bytes, or GPT-2's byte-pair encoding (tiktoken)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Protocol

import numpy as np

from data.shards import DataError

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\ufffd"


class Tokenizer(Protocol):
    """name: as in the configuration. vocab_size: number of ids, at most 65,536. eot: the id after each document."""

    name: str
    vocab_size: int
    eot: int

    def encode(self, text: str) -> np.ndarray:
        """Ids (n,) uint16, without `eot`; words such as <|endoftext|> are ordinary text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text; ids outside the vocabulary (a padded embedding may produce them) become U+FFFD."""

    def token_bytes(self) -> list[bytes]:
        """The bytes of every id of the vocabulary; of `eot`, which is not text, none."""


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8; 256 ends a document."""

    name = "bytes"
    vocab_size = 257
    eot = 256

    def encode(self, text: str) -> np.ndarray:
        """UTF-8 bytes (n,) uint16; a lone surrogate, which has no UTF-8, becomes '?'."""
        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """The text; invalid UTF-8 and ids above 256 become U+FFFD."""
        special = {self.eot: END_OF_TEXT.encode()}
        parts = (bytes([i]) if i < 256 else special.get(i, UNKNOWN.encode()) for i in map(int, ids))
        return b"".join(parts).decode("utf-8", "replace")

    def token_bytes(self) -> list[bytes]:
        return [*(bytes([i]) for i in range(256)), b""]


class GPT2Tokenizer:
    """GPT-2's 50,257 byte pairs (tiktoken "gpt2"), the encoding of nanoGPT's OpenWebText."""

    name = "gpt2"
    vocab_size = 50257
    eot = 50256

    def __init__(self) -> None:
        import tiktoken

        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken does not catch the errors of its download
            raise DataError(
                f"GPT-2's vocabulary cannot be loaded ({type(error).__name__}: {error}); tiktoken downloads it once: "
                "connect to the network, or set TIKTOKEN_CACHE_DIR to a folder that contains it"
            ) from error

    def encode(self, text: str) -> np.ndarray:
        """tiktoken's `encode_ordinary` as (n,) uint16."""
        try:
            # As an array and without the GIL. Words such as <|endoftext|> are ordinary text.
            ids = self._encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, which encode_ordinary replaces
            ids = np.array(self._encoding.encode_ordinary(text))
        return ids.astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """The text; invalid UTF-8 and ids above 50,256 become U+FFFD."""
        token = self._encoding.decode_single_token_bytes
        parts = (token(i) if i < self.vocab_size else UNKNOWN.encode() for i in map(int, ids))
        return b"".join(parts).decode("utf-8", "replace")

    def token_bytes(self) -> list[bytes]:
        return [*map(self._encoding.decode_single_token_bytes, range(self.eot)), b""]


TOKENIZERS: dict[str, type[Tokenizer]] = {"bytes": ByteTokenizer, "gpt2": GPT2Tokenizer}


@lru_cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`; DataError if there is none, or if its vocabulary cannot be loaded."""
    if name not in TOKENIZERS:
        raise DataError(f"there is no tokenizer {name!r}; set data.tokenizer to one of {', '.join(sorted(TOKENIZERS))}")
    return TOKENIZERS[name]()
