"""Text to ids and back, alone and as a stream of documents."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data.shards import DataError
from data.tokenizer import get_tokenizer

TEXTS = [f"Book {i}.\n\nÉtude — 文字 number {i}.\n" + "word " * i for i in range(40)]


def has_gpt2() -> bool:
    """Whether GPT-2's vocabulary is in tiktoken's cache: tests use no network."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    return bool(folder) and (Path(folder) / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").exists()


needs_gpt2 = pytest.mark.skipif(not has_gpt2(), reason="GPT-2's vocabulary is not in TIKTOKEN_CACHE_DIR")
TOKENIZERS = ["bytes", pytest.param("gpt2", marks=needs_gpt2)]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_gives_the_text_back(name):
    tokenizer = get_tokenizer(name)
    for text in ("", "plain", "Étude — 文字 🙂\r\n\t", "<|endoftext|>", "\x00" * 3, *TEXTS[:5]):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16
        assert tokenizer.eot not in ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_decoding_survives_what_a_model_may_sample(name):
    tokenizer = get_tokenizer(name)
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
    assert tokenizer.decode([tokenizer.vocab_size, 65535]) == "\ufffd\ufffd"
    assert "\ud800" not in tokenizer.decode(tokenizer.encode("a\ud800b"))


def test_bytes_are_utf8():
    tokenizer = get_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)
    np.testing.assert_array_equal(tokenizer.encode("aé"), [0x61, 0xC3, 0xA9])
    assert tokenizer.decode([0x61, 0xC3, 0x61]) == "a\ufffda"


@needs_gpt2
def test_gpt2_is_tiktokens():
    import tiktoken

    tokenizer, reference = get_tokenizer("gpt2"), tiktoken.get_encoding("gpt2")
    assert (tokenizer.vocab_size, tokenizer.eot) == (reference.n_vocab, reference.eot_token)
    for text in (*TEXTS, "a\ud800b <|endoftext|> def f(x):\n    return  x"):
        assert tokenizer.encode(text).tolist() == reference.encode_ordinary(text)


def test_a_missing_vocabulary_names_the_remedy(monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(DataError, match=r"no route to host.*TIKTOKEN_CACHE_DIR"):
        get_tokenizer.__wrapped__("gpt2")
    with pytest.raises(DataError, match=r"no tokenizer 'char'; set data\.tokenizer to one of bytes, gpt2"):
        get_tokenizer("char")
