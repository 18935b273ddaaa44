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

from data import files, hub, parallel
from data.prepare import main, prepare
from data.settings import Data, evenly_spaced
from data.shards import DataError, open_dataset
from data.tokenizer import get_tokenizer
from training.config import compose

DOCUMENTS = [f"Document {i}.\n\nÉtude — 文字\n" + "word " * (i % 5) for i in range(40)]
PLAIN = "\n<|endoftext|>\n".join(DOCUMENTS).encode()
LINES = "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(DOCUMENTS)).encode()


def config(name: str, **changes) -> Data:
    return replace(compose([f"data={name}"]).data, **changes)


def documents(cfg: Data, start=(0, 0)) -> list[tuple[str, str]]:
    """The documents of a source after a position, as (split, text)."""
    found, inputs = [], cfg.inputs()
    for chunk in cfg.chunks(inputs, start):
        texts = chunk.texts if isinstance(chunk.texts, list) else chunk.texts.read()
        val = cfg.is_validation(len(found), len(texts), inputs)
        found += [(chunk.splits or ("val" if v else "train"), text) for v, text in zip(val, texts)]
    return found


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
    found = documents(config("text", files=str(path), val_fraction=0.1))
    assert [text for _, text in found] == DOCUMENTS
    assert [split for split, _ in found].count("val") == 4


def test_parquet_gives_the_same_documents(tmp_path):
    parquet(tmp_path / "a.parquet", DOCUMENTS)
    assert [text for _, text in documents(config("text", files=str(tmp_path / "*.parquet")))] == DOCUMENTS


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
    found = documents(config("text", files=str(tmp_path / "a.txt"), separator=separator))
    assert [text for _, text in found] == expected


@pytest.mark.parametrize("content", ["x" * 1000, "line of ten\n" * 100])
def test_a_text_without_separators_is_read_in_bounded_pieces(tmp_path, monkeypatch, content):
    monkeypatch.setattr(files, "MAX_DOCUMENT_CHARS", 64)
    (tmp_path / "a.txt").write_text(content)
    found = [text for _, text in documents(config("text", files=str(tmp_path / "a.txt"), separator=None))]
    assert "".join(found) == content
    assert max(map(len, found)) < 2 * 64
    assert len(found) < 1000 / 32


def test_files_are_taken_in_sorted_order_and_globs_reach_into_folders(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "deep/er/a.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    found = documents(config("text", files=[str(tmp_path / "**/*.txt"), str(tmp_path / "a.txt")]))
    assert [text for _, text in found] == ["a.txt", "b.txt", "deep/er/a.txt"]


def test_val_files_are_the_validation(tmp_path):
    (tmp_path / "train.txt").write_text("train")
    (tmp_path / "val.txt").write_text("val")
    cfg = config("text", files=str(tmp_path / "train.txt"), val_files=str(tmp_path / "val.txt"))
    assert sorted(documents(cfg)) == [("train", "train"), ("val", "val")]
    with pytest.raises(DataError, match=r"val\.txt is in data\.files and in data\.val_files; take it out"):
        documents(replace(cfg, files=str(tmp_path / "*.txt")))


@pytest.mark.parametrize("fraction", [0.0005, 0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 2357, -1])
def test_the_share_of_validation_is_exact_and_spread(fraction, seed):
    found = evenly_spaced(0, 10_000, fraction, seed)
    np.testing.assert_array_equal(found[777:1234], evenly_spaced(777, 457, fraction, seed))
    assert abs(sum(found) - 10_000 * fraction) <= 1
    gaps = np.diff(np.flatnonzero(found))
    assert gaps.max() - gaps.min() <= 1


def test_the_seed_moves_the_validation():
    picked = {tuple(evenly_spaced(0, 100, 0.05, seed)) for seed in range(20)}
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
        ("a.jsonl", b'{"text": "a"}\n{"text": oops\n', r"a\.jsonl cannot be read as json: line 2 .*; correct the file"),
        (
            "a.json",
            b'[{"text": "a"}]\n',
            r"a\.json cannot be read as json: line 1 is no object; write one object a line",
        ),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a\.jsonl is not UTF-8"),
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
        documents(cfg)


def test_an_empty_split_names_the_remedy_and_the_remedy_works(tmp_path):
    files, directory = write(tmp_path / "a.txt", b"one document\n\n" * 200), str(tmp_path / "out" / "x")
    cfg = config("text", files=files, dir=directory, tokenizer="bytes")
    with pytest.raises(
        DataError, match=r"none of the 1 documents fell into the split 'val'; .*data\.separator=''"
    ) as e:
        prepare(cfg, progress=False)
    assert "val_fraction" not in str(e.value)  # no share of one document would help
    nothing = config("stdlib", dir=directory, tokenizer="bytes", max_tokens=10, val_fraction=1e-12)
    with pytest.raises(DataError, match=r"^data\.max_tokens=10 is less than the first document has; raise it$"):
        prepare(nothing, progress=False)
    nothing = replace(nothing, max_tokens=200_000)
    with pytest.raises(DataError, match=r"split 'val'; raise data\.val_fraction, or raise data\.max_tokens$"):
        prepare(nothing, progress=False)  # it has no files of its own to name
    manifest = open_dataset(prepare(replace(cfg, separator=""), progress=False)).manifest
    assert (manifest.splits["train"].documents, manifest.splits["val"].documents) == (198, 2)


@pytest.mark.parametrize("limit", [1 << 26, 0])
def test_reading_continues_exactly_at_every_position(tmp_path, monkeypatch, limit):
    """Over several files and formats; with `limit` 0, row groups are read in parts."""
    monkeypatch.setattr(files, "GROUP_BYTES", limit)
    monkeypatch.setattr(files, "CHUNK_CHARS", 40)
    WRITERS[".gz"](tmp_path / "a.txt.gz", PLAIN + b"\n<|endoftext|>\n" * 3)
    (tmp_path / "b.jsonl").write_bytes(LINES)
    parquet(tmp_path / "c.parquet", [*DOCUMENTS[:20], "", *DOCUMENTS[20:]])
    (tmp_path / "d.txt").write_bytes(b"")
    cfg = config("text", files=str(tmp_path / "*"))
    whole = [text for _, text in documents(cfg)]
    assert whole == DOCUMENTS * 3
    before, read, size = 0, 0, sum(file.size for file in cfg.inputs())
    for chunk in cfg.chunks(cfg.inputs(), (0, 0)):
        before += len(chunk.texts if isinstance(chunk.texts, list) else chunk.texts.read())
        assert [text for _, text in documents(cfg, chunk.position)] == whole[before:]
        assert read <= chunk.read <= size
        read = chunk.read
    assert before == len(whole)


def test_workers_give_the_same_shards_as_this_process(tmp_path, monkeypatch):
    parquet(tmp_path / "c.parquet", DOCUMENTS)
    (tmp_path / "a.txt").write_bytes(PLAIN)
    cfg = config("text", files=str(tmp_path / "*.*"), val_fraction=0.1, tokenizer="bytes", dir=str(tmp_path / "one"))
    one = open_dataset(prepare(cfg, progress=False))
    monkeypatch.setattr(files, "CHUNK_CHARS", 100)
    two = prepare(replace(cfg, dir=str(tmp_path / "two")), progress=False, workers=2)
    assert open_dataset(two).fingerprint == one.fingerprint
    parquet(tmp_path / "d.parquet", [*DOCUMENTS, None])
    with pytest.raises(DataError, match=r"row 40 of .*d\.parquet holds no text"):
        prepare(replace(cfg, dir=str(tmp_path / "three")), progress=False, workers=2)


def test_a_worker_that_is_killed_is_explained(monkeypatch):
    worker = parallel._Worker("bytes")
    worker.process.kill()
    with pytest.raises(DataError, match=r"killed by SIGKILL .*same command again"):
        worker.encode(["x" * 100_000])
    worker.end()


# --- the Hub ----------------------------------------------------------------------------------------------------------


def texts(directory: Path, split: str) -> list[str]:
    part = getattr(open_dataset(directory), split)
    return get_tokenizer("bytes").decode(part.read(0, part.tokens)).split("<|endoftext|>")[:-1]


ROWS = [f"Row {i} é" for i in range(4000)]


@pytest.fixture
def repository(tmp_path) -> str:
    """A folder that `datasets` finds files in as in a repository of the Hub: 4,000 rows in three parquet files."""
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for i, (start, stop) in enumerate([(0, 1500), (1500, 1510), (1510, 4000)]):
        pq.write_table(
            pa.table({"text": ROWS[start:stop]}), folder / f"train-{i:05d}-of-00003.parquet", row_group_size=99
        )
    return str(folder.parent)


def owt(tmp_path: Path, repository: str, **changes) -> Data:
    changes = {"repository": repository, "revisions": (None,), **changes}
    return config("openwebtext", dir=str(tmp_path / "out" / "owt"), tokenizer="bytes", **changes)


def test_openwebtext_is_nanogpts_split(tmp_path, repository):
    directory = prepare(owt(tmp_path, repository), progress=False)
    reference = datasets.Dataset.from_dict({"text": ROWS}).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    place = {text: i for i, text in enumerate(ROWS)}
    for split, part in (("train", "train"), ("val", "test")):
        assert texts(directory, split) == sorted(reference[part]["text"], key=place.__getitem__)
    manifest = open_dataset(directory).manifest
    assert manifest.expected == {}  # the published counts are of another tokenizer
    assert [Path(file).name for file in manifest.inputs] == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]


def test_revisions_are_tried_in_turn_and_the_split_is_a_key(tmp_path, repository, monkeypatch):
    asked, real = [], datasets.load_dataset_builder

    def load(path, revision, **options):
        asked.append((path, revision, options))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported")
        return real(path)

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    cfg = owt(tmp_path, repository, revisions=(None, "refs/convert/parquet"), subset="plain")
    assert len(texts(prepare(cfg, progress=False), "val")) == 2
    assert asked == [(repository, revision, {"name": "plain"}) for revision in (None, "refs/convert/parquet")]
    with pytest.raises(DataError, match=r"no files of the split 'test' \(splits: train\); set data\.split"):
        replace(cfg, split="test").inputs()
    with pytest.raises(DataError, match=r"data\.revisions names none; set it"):
        replace(cfg, revisions=()).inputs()


@pytest.mark.parametrize("met", [True, False])
def test_published_counts_are_compared_and_reported(tmp_path, repository, caplog, capsys, met):
    held_out = datasets.Dataset.from_dict({"text": ROWS}).train_test_split(0.0005, seed=2357)["test"]["text"]
    lengths = [len(text.encode()) + 1 for text in held_out]
    total = sum(len(text.encode()) + 1 for text in ROWS)
    expected = {"tokenizer": "bytes", "documents": 4000 + (not met), "val_tokens": sum(lengths)}
    expected["train_tokens"] = total - sum(lengths)
    overrides = [f"data.expected.{key}={value}" for key, value in expected.items()]
    overrides += [f"data.repository={repository}", f"data.dir={tmp_path}/owt"]
    with caplog.at_level(logging.WARNING):
        assert main(["data=openwebtext", "data.tokenizer=bytes", *overrides]) == 0
    assert open_dataset(tmp_path / "owt").manifest.expected["met"] is met
    assert f"expected {expected['documents']:,} documents" in (printed := capsys.readouterr().out)
    assert (": equal" if met else "NOT equal") in printed
    messages = [record.getMessage() for record in caplog.records if record.name == "data.prepare"]
    assert messages == ([] if met else ["openwebtext: 4,000 documents prepared, 4,001 expected"])


@pytest.mark.parametrize("name", ["openwebtext", "fineweb", "fineweb_edu"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach the Hub"), r"cannot be loaded .*Couldn't reach the Hub.*data=text"),
        (OSError(errno.ENOSPC, "No space left on device"), r"Hugging Face cache .* is full; set HF_HOME"),
    ],
)
def test_an_unreachable_hub_is_explained(tmp_path, monkeypatch, name, error, message):
    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(DataError, match=message):
        prepare(config(name, dir=str(tmp_path / "out" / name), tokenizer="bytes"), progress=False)
    assert not any((tmp_path / "out").iterdir())


def test_fineweb_is_streamed_up_to_its_cap(tmp_path, repository, monkeypatch):
    read, real = [], files.Rows.read
    monkeypatch.setattr(files.Rows, "read", lambda rows: read.append(rows.path) or real(rows))
    changes = {
        "repository": repository,
        "subset": None,
        "tokenizer": "bytes",
        "max_tokens": 10_000,
        "val_fraction": 0.01,
    }
    directory = prepare(config("fineweb", dir=str(tmp_path / "out" / "fw"), **changes), progress=False)
    dataset = open_dataset(directory)
    assert dataset.train.tokens == 10_000
    assert len(texts(directory, "val")) == pytest.approx(0.01 * 10_000 / 11, abs=1)
    assert len(read) < 12 and len(set(read)) == 1


def test_a_stream_that_breaks_is_continued_at_the_same_commit(tmp_path, repository, monkeypatch):
    """The rows that are read twice, and questions to the Hub: none."""
    read, asked, real, listed = [], [], files.Rows.read, hub.Hub._listed

    def breaking(rows):
        if len(read) == 20 and rows not in read:
            read.append(rows)
            raise DataError("peer is gone")
        read.append(rows)
        return real(rows)

    monkeypatch.setattr(files.Rows, "read", breaking)
    monkeypatch.setattr(hub.Hub, "_listed", lambda cfg, revision: asked.append(revision) or listed(cfg, revision))
    cfg = owt(tmp_path, repository)
    with pytest.raises(DataError, match="peer is gone"):
        prepare(cfg, progress=False)
    directory = prepare(cfg, progress=False)
    assert len(asked) == 1
    assert len(read) == len(set(read)) + 1  # the one that broke
    assert sorted(texts(directory, "train") + texts(directory, "val")) == sorted(ROWS)


def test_files_at_a_url_are_read_as_local_ones(tmp_path, repository, monkeypatch):
    """fsspec's file:// stands in for hf://, which needs a network."""
    cfg = owt(tmp_path, repository)
    here = [replace(file, path=f"file://{file.path}") for file in cfg.inputs()]
    monkeypatch.setattr(hub.OpenWebText, "inputs", lambda cfg: here)
    assert [text for _, text in documents(cfg, (1, 4))] == ROWS[1504:]
