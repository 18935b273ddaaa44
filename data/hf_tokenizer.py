"""The files with which Hugging Face's libraries encode text as a tokenizer of this project does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from data.tokenizer import END_OF_TEXT, Tokenizer


def tokenizer_files(tokenizer: Tokenizer, longest: int) -> dict[str, dict[str, Any]]:
    """File name → its content, which is to be written as JSON.

    Both of our tokenizers are byte-level byte-pair encodings; that of bytes has no merges. `longest`: the context of the model, in tokens.
    """
    pieces = tokenizer.token_bytes()
    letters = _letters()
    vocab = {"".join(letters[b] for b in piece): i for i, piece in enumerate(pieces) if piece}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": tokenizer.eot, "content": END_OF_TEXT, "special": True}
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {
        "type": "BPE",
        "vocab": {**vocab, END_OF_TEXT: tokenizer.eot},
        "merges": [["".join(letters[b] for b in part) for part in pair] for pair in merges(pieces)],
        **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
        **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
    }
    file = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [{**end, **switches}],
        "pre_tokenizer": level,
        "decoder": level,
        "model": model,
    }
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    }
    return {"tokenizer.json": file, "tokenizer_config.json": about}


def merges(pieces: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The merges of a byte-pair encoding, in order, from the bytes of its ids: each id of several bytes is one merge.

    Its two parts are what remains of it when the merges of smaller ids are applied to its bytes. An id is the rank of its merge.
    """
    rank = {piece: i for i, piece in enumerate(pieces) if piece}
    found = []
    for piece, own in rank.items():
        parts = [bytes([b]) for b in piece]
        while len(parts) > 2:
            ranks = [rank.get(a + b, own) for a, b in pairwise(parts)]
            best = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[best] >= own:
                raise ValueError(f"the id {own} is not a merge of two smaller ones; this is not a byte-pair encoding")
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found


def _letters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself if it can be printed, otherwise one from U+0100 on.

    This is the table of GPT-2's encoder.py.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printed]
    return [chr(0x100 + others.index(b)) if b in others else chr(b) for b in range(256)]
