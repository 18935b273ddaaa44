"""What a prepared directory promises, how it comes about, and what happens when something breaks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import files, shards, sources, writer
from data.prepare import prepare
from data.settings import Data
from data.shards import DataError, open_dataset
from data.tokenizer import get_tokenizer
from training.config import compose

ROOT = Path(__file__).resolve().parent.parent
BOOKS = [f"Book {i}.\n\nÉtude — 文字 number {i}.\n" + "word " * i for i in range(40)]


def config(name: str, directory: Path, **changes) -> Data:
    """The settings of configs/data/<name>.yaml with its directory in the test's folder."""
    return replace(compose([f"data={name}"]).data, **{"dir": str(directory / "prepared" / name), **changes})


def text_config(tmp_path: Path, **changes) -> Data:
    """`data=text` over BOOKS in one file, bytes, small shards."""
    (tmp_path / "books.txt").write_text("\n<|endoftext|>\n".join(BOOKS))
    defaults = {"files": str(tmp_path / "books.txt"), "tokenizer": "bytes", "shard_tokens": 1000, "val_fraction": 0.1}
    return config("text", tmp_path, **{**defaults, **changes})


def documents(split: shards.Split) -> list[str]:
    ids = split.read(0, split.tokens)
    ends = np.flatnonzero(ids == 256)
    return [get_tokenizer("bytes").decode(part) for part in np.split(ids, ends + 1)[:-1]]


def without_end(texts: list[str]) -> list[str]:
    return [text.removesuffix("<|endoftext|>") for text in texts]


@pytest.fixture
def prepared(tmp_path) -> Path:
    return prepare(text_config(tmp_path), progress=False)


# --- shards ---------------------------------------------------------------------------------------------------------


def test_shards_hold_every_document_once_and_end_each(prepared):
    dataset = open_dataset(prepared)
    together = documents(dataset.train) + documents(dataset.val)
    assert sorted(without_end(together)) == sorted(BOOKS)
    assert all(text.endswith("<|endoftext|>") for text in together)
    infos = dataset.manifest.splits
    assert (infos["train"].documents, infos["val"].documents) == (36, 4)
    assert (dataset.train.tokens, dataset.val.tokens) == (infos["train"].tokens, infos["val"].tokens)
    assert [shard.tokens for shard in infos["train"].shards[:-1]] == [1000] * (len(infos["train"].shards) - 1)
    for shard in infos["train"].shards + infos["val"].shards:
        assert hashlib.sha256((prepared / shard.file).read_bytes()).hexdigest() == shard.sha256


def test_reading_crosses_shard_borders(prepared):
    split = open_dataset(prepared).train
    whole = np.concatenate([np.fromfile(prepared / shard.file, dtype="<u2") for shard in split.shards])
    assert len(split.shards) > 2
    for start, length in [(0, 0), (0, 1), (999, 2), (1000, 1), (500, 2000), (0, split.tokens), (split.tokens, 0)]:
        np.testing.assert_array_equal(split.read(start, length), whole[start : start + length])
    for start, length in [(-1, 2), (split.tokens, 1), (0, split.tokens + 1)]:
        with pytest.raises(IndexError, match="stay inside"):
            split.read(start, length)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def alter(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[10] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("opened_before", [False, True])
@pytest.mark.parametrize(("damage", "word"), [(Path.unlink, "missing"), (truncate, "truncated"), (alter, "altered")])
def test_a_damaged_shard_is_named(prepared, damage, word, opened_before):
    if opened_before:
        open_dataset(prepared)  # leaves verified.json
    damage(prepared / "train_00001.bin")
    with pytest.raises(
        DataError, match=rf"train_00001\.bin is {word}.*move .* elsewhere and run: python -m data\.prepare"
    ):
        open_dataset(prepared)
    with pytest.raises(DataError) if word != "altered" else contextlib.nullcontext():
        open_dataset(prepared, verify=False)


def test_a_shard_damaged_while_in_use_is_named(prepared):
    split = open_dataset(prepared).train
    truncate(prepared / "train_00000.bin")
    with pytest.raises(DataError, match=r"train_00000\.bin was truncated while it was used"):
        split.read(0, 1000)


def test_shards_are_hashed_once(prepared, monkeypatch):
    hashed = []
    real = shards.hash_file
    monkeypatch.setattr(shards, "hash_file", lambda path: hashed.append(path.name) or real(path))
    count = len(open_dataset(prepared).train.shards) + 1
    assert len(hashed) == count
    open_dataset(prepared)
    assert len(hashed) == count
    os.utime(prepared / "train_00002.bin", ns=(0, 0))
    open_dataset(prepared)
    assert hashed[count:] == ["train_00002.bin"]
    (prepared / "verified.json").write_text("[not json")
    open_dataset(prepared)
    assert len(hashed) == 2 * count + 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "",
        lambda text: text.replace('"vocab_size": 257', '"vocab_size": 256'),
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_manifest_is_named(prepared, damage):
    path = prepared / "manifest.json"
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(DataError, match=r"manifest\.json .*; set data\.dir to a folder that does not exist yet"):
        open_dataset(prepared)


def test_missing_data_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"python -m data\.prepare data=openwebtext$"):
        open_dataset("data/prepared/openwebtext", settings=compose(["data=openwebtext"]).data)
    with pytest.raises(DataError, match=r"python -m data\.prepare data=books data\.dir=elsewhere$"):
        open_dataset("elsewhere", settings=compose(["data=books", "data.dir=elsewhere"]).data)
    Path("elsewhere").mkdir()
    with pytest.raises(DataError, match=r"holds no manifest\.json, so it is not prepared data.* set data\.dir"):
        open_dataset("elsewhere")


def test_a_shard_that_cannot_be_read_says_so(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\); make it readable"):
        shards.hash_file(tmp_path)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "", None, 3])
def test_a_name_stays_in_its_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    cfg = replace(text_config(tmp_path), name=name, dir=f"data/prepared/{name}")
    before = sorted(tmp_path.rglob("*"))
    for call in (lambda: prepare(cfg, progress=False), lambda: open_dataset(cfg.dir, settings=cfg)):
        with pytest.raises(DataError, match=r"data\.name=.* is not the name of a folder"):
            call()
    assert sorted(tmp_path.rglob("*")) == before


def forge(prepared: Path, change) -> None:
    """Change what a manifest says, and give it the checksum that fits."""
    content = json.loads((prepared / "manifest.json").read_text())
    del content["checksum"]
    change(content)
    content["checksum"] = shards.digest(content)
    (prepared / "manifest.json").write_text(json.dumps(content))


def first_shard(content) -> dict:
    return content["splits"]["train"]["shards"][0]


FORGERIES = {
    "outside": (lambda c: first_shard(c).update(file="../outside.bin"), "is not a file name"),
    "absolute": (lambda c: first_shard(c).update(file="/etc/passwd"), "is not a file name"),
    "no name": (lambda c: first_shard(c).update(file=3), "is not a file name"),
    "text for a size": (lambda c: first_shard(c).update(tokens="many"), "size or the SHA-256"),
    "negative": (lambda c: first_shard(c).update(tokens=-1), "size or the SHA-256"),
    "sum": (lambda c: c["splits"]["train"].update(tokens=1), "do not agree"),
    "no validation": (lambda c: c["splits"].pop("val"), "instead of train and val"),
    "no splits": (lambda c: c.update(splits=[]), "damaged"),
    "format": (lambda c: c.update(format={}), "format"),
    "vocabulary": (lambda c: c.update(vocab_size="257"), "a vocabulary of"),
    "small vocabulary": (lambda c: c.update(vocab_size=5), r"holds token \d+, but its vocabulary is 5"),
    "one token too few": (lambda c: c.update(vocab_size=256), "holds token 256, but its vocabulary is 256"),
    "another hash": (lambda c: first_shard(c).update(sha256="0" * 64), "is altered: its SHA-256"),
    "settings": (lambda c: c.update(settings=3), "another type"),
    "counts": (lambda c: c.update(expected={"met": True}), "published counts"),
    "extra": (lambda c: c.update(more=3), "damaged"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.parametrize("opened_before", [False, True])
def test_a_forged_manifest_is_refused_with_a_message(tmp_path, prepared, forgery, opened_before):
    (prepared.parent / "outside.bin").write_bytes(b"\0" * 2000)
    if opened_before:
        open_dataset(prepared)
    change, said = FORGERIES[forgery]
    forge(prepared, change)
    with pytest.raises(DataError, match=said) as caught:
        open_dataset(prepared)
    assert str(prepared) in str(caught.value)


def test_an_honest_forgery_opens(prepared):
    """What the test above does to a manifest is not in itself refused."""
    forge(prepared, lambda content: None)
    open_dataset(prepared)


def test_the_place_where_one_stands_is_not_written_over(tmp_path, monkeypatch):
    for place in (tmp_path / "empty", tmp_path / "work" / "sub"):
        place.mkdir(parents=True)
        monkeypatch.chdir(place)
        for directory in (".", ".."):
            before = sorted(tmp_path.rglob("*"))
            with pytest.raises(DataError, match=r"data\.dir") as caught:
                prepare(text_config(tmp_path, dir=directory), progress=False)
            assert not re.search("remove|delete", str(caught.value))
            assert set(tmp_path.rglob("*")) - set(before) <= {tmp_path / "books.txt"}


def test_the_fingerprint_is_of_the_tokens(tmp_path, prepared):
    first = open_dataset(prepared).fingerprint
    same = open_dataset(prepare(text_config(tmp_path, dir=str(tmp_path / "same")), progress=False))
    assert same.fingerprint == first
    other = prepare(text_config(tmp_path, dir=str(tmp_path / "other"), split_seed=1, val_fraction=0.2), progress=False)
    assert open_dataset(other).fingerprint != first


# --- preparing ------------------------------------------------------------------------------------------------------


def test_preparing_twice_does_nothing(tmp_path, prepared):
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    assert prepare(text_config(tmp_path), progress=False) == prepared
    assert {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()} == before
    assert os.listdir(prepared.parent) == [prepared.name]


def test_other_settings_are_refused(tmp_path, prepared):
    with pytest.raises(
        DataError, match=r"other settings \(split_seed: 2357 there, 7 asked\); move .* elsewhere .* or set data\.dir"
    ):
        prepare(text_config(tmp_path, split_seed=7), progress=False)


def test_changed_files_are_refused_and_removed_ones_are_not_needed(tmp_path, prepared):
    cfg = text_config(tmp_path)
    (tmp_path / "books.txt").write_text("something else")
    with pytest.raises(DataError, match=r"files that .* was prepared from have changed \(.*books\.txt\); move"):
        prepare(cfg, progress=False)
    (tmp_path / "books.txt").unlink()
    assert prepare(cfg, progress=False) == prepared


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    cfg = text_config(tmp_path)
    Path(cfg.dir).mkdir(parents=True)
    (Path(cfg.dir) / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="holds no manifest"):
        prepare(cfg, progress=False)
    assert (Path(cfg.dir) / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("cap", [1, 700, 1500])
def test_max_tokens_caps_training_only(tmp_path, prepared, cap):
    full = open_dataset(prepared)
    capped = open_dataset(prepare(text_config(tmp_path, dir=str(tmp_path / "c"), max_tokens=cap), progress=False))
    assert capped.train.tokens == cap
    np.testing.assert_array_equal(capped.train.read(0, cap), full.train.read(0, cap))
    assert capped.manifest.splits["train"].documents == len(documents(capped.train))
    assert capped.val.tokens > 0


def nothing_left(cfg: Data) -> bool:
    return not os.listdir(Path(cfg.dir).parent)


def test_a_full_disk_leaves_nothing_and_says_how_much(tmp_path, monkeypatch):
    cfg = text_config(tmp_path)
    real = writer.ShardWriter._finish_shard

    def full_after_two(writer):
        real(writer)
        if writer.split == "train" and len(writer._shards) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(writer.ShardWriter, "_finish_shard", full_after_two)
        with pytest.raises(DataError, match=r"disk of .*prepared is too small: text needs .*data\.dir"):
            prepare(cfg, progress=False)
    assert nothing_left(cfg)


def test_a_disk_known_to_be_too_small_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.OpenWebText, "inputs", lambda cfg: pytest.fail("must not be asked"))
    usage = type("usage", (), {"free": 10_000_000_000})
    monkeypatch.setattr("data.prepare.shutil.disk_usage", lambda path: usage)
    cfg = config("openwebtext", tmp_path)
    with pytest.raises(DataError, match=r"openwebtext needs at least 18\.1 GB and 10\.0 GB are free"):
        prepare(cfg, progress=False)
    assert nothing_left(cfg)


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError("source broke"), RuntimeError("bug")])
def test_after_an_interruption_the_same_call_continues(tmp_path, monkeypatch, error):
    cfg = text_config(tmp_path)
    real, read = sources.TextFiles.chunks, []
    monkeypatch.setattr(files, "CHUNK_CHARS", 500)

    def breaking(cfg, inputs, start):
        for chunk in real(cfg, inputs, start):
            read.append(chunk.position)
            yield chunk
            if len(read) == 2:
                raise error

    monkeypatch.setattr(sources.TextFiles, "chunks", breaking)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        prepare(cfg, progress=False)
    assert os.listdir(Path(cfg.dir).parent) == [".text.partial"]
    directory = prepare(cfg, progress=False)
    assert os.listdir(directory.parent) == ["text"]
    assert len(read) == len(set(read)) > 3
    assert same_shards(directory, whole(tmp_path))


def test_an_error_before_the_first_document_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.TextFiles, "chunks", lambda *_: pytest.fail("broke"))
    cfg = text_config(tmp_path)
    with pytest.raises(pytest.fail.Exception):
        prepare(cfg, progress=False)
    assert nothing_left(cfg)


def whole(tmp_path: Path) -> Path:
    """The directory of an uninterrupted preparation of the same text."""
    return prepare(text_config(tmp_path, dir=str(tmp_path / "whole")), progress=False)


def same_shards(one: Path, other: Path) -> bool:
    """Whether two directories have the same files with the same bytes; the manifest holds the time, so its shards are compared."""
    names = [sorted(path.name for path in folder.iterdir() if path.name != "verified.json") for folder in (one, other)]
    assert names[0] == names[1]
    assert open_dataset(one).manifest.splits == open_dataset(other).manifest.splits
    return all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0] if n.endswith(".bin"))


def test_processes_that_prepare_at_once_wait_for_the_first(tmp_path, monkeypatch):
    cfg = text_config(tmp_path)
    context = multiprocessing.get_context("fork")
    calls, real = context.Value("i", 0), sources.TextFiles.chunks

    def counted(*arguments):
        with calls.get_lock():
            calls.value += 1
        yield from real(*arguments)

    monkeypatch.setattr(sources.TextFiles, "chunks", counted)
    processes = [context.Process(target=prepare, args=(cfg, False)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert calls.value == 1
    assert os.listdir(Path(cfg.dir).parent) == ["text"]


def test_the_lock_is_gone_with_the_preparation(prepared):
    descriptor = os.open(prepared, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


# --- the standard library -------------------------------------------------------------------------------------------


def test_stdlib_is_deterministic_and_split_by_module(tmp_path):
    first = open_dataset(prepare(config("stdlib", tmp_path), progress=False))
    again = open_dataset(prepare(config("stdlib", tmp_path, dir=str(tmp_path / "again")), progress=False))
    assert first.fingerprint == again.fingerprint
    train, val = (set(without_end(documents(split))) for split in (first.train, first.val))
    assert not (train & val) - {""}
    assert 5_000_000 < first.train.tokens < 20_000_001
    assert 0.01 < first.val.tokens / first.train.tokens < 0.1
    assert Path(json.__file__).read_text() in train | val
    assert Path(pytest.__file__).read_text() not in train | val
    assert first.manifest.made_by["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_link_in_the_stdlib_that_leads_nowhere_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").symlink_to(tmp_path / "gone.py")
    (tmp_path / "module.py").write_text("x = 1")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [text for _, text in config("stdlib", tmp_path).documents()] == ["x = 1"]


def test_a_zipped_stdlib_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    cfg = config("stdlib", tmp_path)
    with pytest.raises(DataError, match=r"not in .*python311\.zip as \.py files.*another Python.*data=text"):
        prepare(cfg, progress=False)
    assert nothing_left(cfg)


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, data.prepare, data.loader;"
        "print(sorted({'datasets', 'tiktoken', 'pyarrow', 'torch', 'hydra', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
