"""Text by glob in every format, and the Hub's datasets through a stand-in for `datasets.load_dataset`."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import logging
import lzma
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import sources
from data.prepare import main, prepare
from data.settings import Data
from data.shards import DataError, open_dataset
from data.tokenizer import get_tokenizer
from training.config import compose

DOCUMENTS = [f"Document {i}.\n\nÉtude — 文字\n" + "word " * (i % 5) for i in range(40)]
PLAIN = "\n<|endoftext|>\n".join(DOCUMENTS).encode()
LINES = "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(DOCUMENTS)).encode()


def config(name: str, **changes) -> Data:
    return replace(compose([f"data={name}"]).data, **changes)


def zst(path: Path, raw: bytes) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(raw)


def parquet(path: Path, texts: list) -> None:
    pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), path, row_group_size=7)


WRITERS = {
    "": lambda path, raw: path.write_bytes(raw),
    ".gz": lambda path, raw: path.write_bytes(gzip.compress(raw)),
    ".xz": lambda path, raw: path.write_bytes(lzma.compress(raw)),
    ".bz2": lambda path, raw: path.write_bytes(bz2.compress(raw)),
    ".zst": zst,
}


@pytest.mark.parametrize("compression", list(WRITERS))
@pytest.mark.parametrize(("kind", "raw"), [(".txt", PLAIN), (".jsonl", LINES)])
def test_every_format_gives_the_same_documents(tmp_path, kind, raw, compression):
    path = tmp_path / f"a.b{kind}{compression}"
    WRITERS[compression](path, raw)
    found = list(config("text", files=str(path), val_fraction=0.1).documents())
    assert [text for _, text in found] == DOCUMENTS
    assert [split for split, _ in found].count("val") == 4


def test_parquet_gives_the_same_documents(tmp_path):
    parquet(tmp_path / "a.parquet", DOCUMENTS)
    assert [text for _, text in config("text", files=str(tmp_path / "*.parquet")).documents()] == DOCUMENTS


@pytest.mark.parametrize(
    ("separator", "content", "expected"),
    [
        ("<|endoftext|>", "a\n<|endoftext|>\nb\n\n<|endoftext|>\n", ["a", "b\n"]),
        ("<|endoftext|>", "<|endoftext|>\n<|endoftext|>\na <|endoftext|>\n", ["a <|endoftext|>\n"]),
        ("<|endoftext|>", "a\r\n<|endoftext|>\r\nb", ["a", "b"]),
        ("", "one\ntwo\n\n\nthree\n", ["one\ntwo", "three\n"]),
        (None, "a\n<|endoftext|>\nb", ["a\n<|endoftext|>\nb"]),
        (None, "\ufeffa", ["a"]),
        (None, "", []),
    ],
)
def test_separators(tmp_path, separator, content, expected):
    (tmp_path / "a.txt").write_bytes(content.encode())
    found = config("text", files=str(tmp_path / "a.txt"), separator=separator).documents()
    assert [text for _, text in found] == expected


@pytest.mark.parametrize("content", ["x" * 1000, "line of ten\n" * 100])
def test_a_text_without_separators_is_read_in_bounded_pieces(tmp_path, monkeypatch, content):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARS", 64)
    (tmp_path / "a.txt").write_text(content)
    found = [text for _, text in config("text", files=str(tmp_path / "a.txt"), separator=None).documents()]
    assert "".join(found) == content
    assert max(map(len, found)) < 2 * 64
    assert len(found) < 1000 / 32


def test_files_are_taken_in_sorted_order_and_globs_reach_into_folders(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "deep/er/a.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    found = config("text", files=[str(tmp_path / "**/*.txt"), str(tmp_path / "a.txt")]).documents()
    assert [text for _, text in found] == ["a.txt", "b.txt", "deep/er/a.txt"]


def test_val_files_are_the_validation(tmp_path):
    (tmp_path / "train.txt").write_text("train")
    (tmp_path / "val.txt").write_text("val")
    cfg = config("text", files=str(tmp_path / "train.txt"), val_files=str(tmp_path / "val.txt"))
    assert sorted(cfg.documents()) == [("train", "train"), ("val", "val")]
    with pytest.raises(DataError, match=r"val\.txt is in data\.files and in data\.val_files; take it out"):
        list(replace(cfg, files=str(tmp_path / "*.txt")).documents())


@pytest.mark.parametrize("fraction", [0.0005, 0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 2357, -1])
def test_the_share_of_validation_is_exact_and_spread(fraction, seed):
    found = [split == "val" for split, _ in sources._spread(map(str, range(10_000)), fraction, seed)]
    assert abs(sum(found) - 10_000 * fraction) <= 1
    gaps = np.diff(np.flatnonzero(found))
    assert gaps.max() - gaps.min() <= 1


def test_the_seed_moves_the_validation():
    picked = {tuple(split for split, _ in sources._spread("x" * 100, 0.05, seed)) for seed in range(20)}
    assert len(picked) > 5


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 .*; convert it"),
        ("a.txt.gz", gzip.compress(PLAIN)[:-20], r"a\.txt\.gz cannot be read to its end .*get it again"),
        ("a.txt.xz", lzma.compress(PLAIN)[:-20], r"a\.txt\.xz cannot be read to its end"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz cannot be read"),
        ("a.txt.zst", b"not zstd", r"a\.txt\.zst cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n{"text": oops\n', r"a\.jsonl cannot be read as json .*; correct the file"),
        ("a.jsonl", b'{"body": "a"}\n', r"no text in the column 'text' \(columns: body\); set data\.column"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', r"row 1 of .*a\.jsonl holds no text"),
        ("a.parquet", b"not parquet", r"a\.parquet cannot be read as parquet .*; correct the file"),
        ("a.docx", b"", r"a\.docx is not known from its name; rename it or choose other files"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, message):
    cfg = config("text", files=write(tmp_path / name, content), dir=str(tmp_path / "out" / "x"), tokenizer="bytes")
    with pytest.raises(DataError, match=message):
        prepare(cfg, progress=False)
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("changes", [{"val_fraction": 0}, {"val_fraction": 1.5}])
def test_an_impossible_share_is_refused(tmp_path, changes):
    cfg = config("text", files=write(tmp_path / "a.txt", PLAIN), **changes)
    with pytest.raises(DataError, match=r"val_fraction=.*set it between 0 and 1"):
        list(cfg.documents())


def test_an_empty_split_names_the_remedy_and_the_remedy_works(tmp_path):
    files, directory = write(tmp_path / "a.txt", b"one document\n\n" * 200), str(tmp_path / "out" / "x")
    cfg = config("text", files=files, dir=directory, tokenizer="bytes")
    with pytest.raises(DataError, match=r"none of the 1 documents fell into the split 'val'; .*data\.separator=''"):
        prepare(cfg, progress=False)
    manifest = open_dataset(prepare(replace(cfg, separator=""), progress=False)).manifest
    assert (manifest.splits["train"].documents, manifest.splits["val"].documents) == (198, 2)


# --- the Hub ----------------------------------------------------------------------------------------------------------


def texts(directory: Path, split: str) -> list[str]:
    part = getattr(open_dataset(directory), split)
    return get_tokenizer("bytes").decode(part.read(0, part.tokens)).split("<|endoftext|>")[:-1]


@pytest.fixture
def hub(monkeypatch):
    """Stands in for `datasets.load_dataset`; the test sets what it answers and reads what it was asked."""

    class Hub:
        asked: list  # (repository, options)

        def __init__(self):
            self.asked = []
            self.answer = None

        def __call__(self, repository, **options):
            self.asked.append((repository, options))
            return self.answer(**options)

    stand_in = Hub()
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in


def rows(count: int = 4000) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [f"Row {i} é" for i in range(count)]})


def owt(tmp_path: Path, **changes) -> dict:
    return config("openwebtext", dir=str(tmp_path / "out" / "owt"), tokenizer="bytes", **changes)


def test_openwebtext_is_nanogpts_split(tmp_path, hub):
    hub.answer = lambda **options: rows()
    directory = prepare(owt(tmp_path), progress=False)
    reference = rows().train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    assert texts(directory, "train") == reference["train"]["text"]
    assert texts(directory, "val") == reference["test"]["text"]
    assert [repository for repository, _ in hub.asked] == ["Skylion007/openwebtext"]
    assert open_dataset(directory).manifest.expected == {}  # the published counts are of another tokenizer


def test_openwebtext_falls_back_to_the_parquet_revision(tmp_path, hub):
    def answer(revision, **options):
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported")
        return rows()

    hub.answer = answer
    assert len(texts(prepare(owt(tmp_path), progress=False), "val")) == 2
    assert [options["revision"] for _, options in hub.asked] == [None, "refs/convert/parquet"]


@pytest.mark.parametrize("met", [True, False])
def test_published_counts_are_compared_and_reported(tmp_path, hub, monkeypatch, caplog, capsys, met):
    hub.answer = lambda **options: rows()
    lengths = [len(text.encode()) + 1 for text in rows().train_test_split(0.0005, seed=2357)["test"]["text"]]
    total = sum(len(text.encode()) + 1 for text in rows()["text"])
    expected = {"tokenizer": "bytes", "documents": 4000 + (not met), "val_tokens": sum(lengths)}
    expected["train_tokens"] = total - sum(lengths)
    overrides = [f"data.expected.{key}={value}" for key, value in expected.items()]
    with caplog.at_level(logging.WARNING):
        assert main(["data=openwebtext", "data.tokenizer=bytes", f"data.dir={tmp_path}/owt", *overrides]) == 0
    assert open_dataset(tmp_path / "owt").manifest.expected["met"] is met
    assert f"expected {expected['documents']:,} documents" in (printed := capsys.readouterr().out)
    assert (": equal" if met else "NOT equal") in printed
    messages = [record.getMessage() for record in caplog.records if record.name == "data.prepare"]
    assert messages == ([] if met else ["openwebtext: 4,000 documents prepared, 4,001 expected"])


@pytest.mark.parametrize("name", ["openwebtext", "fineweb"])
def test_an_unreachable_hub_is_explained(tmp_path, hub, name):
    def answer(**options):
        raise ConnectionError("Couldn't reach the Hub")

    hub.answer = answer
    cfg = config(name, dir=str(tmp_path / "out" / name), tokenizer="bytes")
    with pytest.raises(DataError, match=r"cannot be loaded .*Couldn't reach the Hub.*HF_HOME.*data=text"):
        prepare(cfg, progress=False)
    assert not any((tmp_path / "out").iterdir())


def test_a_full_cache_of_the_hub_is_explained(tmp_path, hub):
    def answer(**options):
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.answer = answer
    with pytest.raises(DataError, match=r"Hugging Face cache .* is full; set HF_HOME"):
        prepare(owt(tmp_path), progress=False)


def test_fineweb_is_streamed_up_to_its_cap(tmp_path, hub):
    taken = []

    def endless(**options):
        assert options == {"name": "sample-10BT", "split": "train", "streaming": True}
        for i in range(10**9):
            taken.append(i)
            yield {"text": f"Row {i} " + "x" * 1000, "score": 3.0}

    hub.answer = endless
    changes = {"tokenizer": "bytes", "max_tokens": 2_000_000, "val_fraction": 0.01}
    directory = prepare(config("fineweb", dir=str(tmp_path / "out" / "fw"), **changes), progress=False)
    dataset = open_dataset(directory)
    assert dataset.train.tokens == 2_000_000
    assert abs(len(texts(directory, "val")) / len(taken) - 0.01) < 0.005
    assert len(taken) < 10_000


def test_a_stream_that_breaks_leaves_nothing(tmp_path, hub):
    def breaking(**options):
        yield {"text": "x" * 100}
        raise ConnectionResetError("peer is gone")

    hub.answer = breaking
    cfg = config("fineweb", dir=str(tmp_path / "out" / "fw"), tokenizer="bytes")
    with pytest.raises(DataError, match="peer is gone"):
        prepare(cfg, progress=False)
    assert not any((tmp_path / "out").iterdir())
