"""Tokens that other programs wrote: nanoGPT's and the speedruns' files, what damage is found, and mixtures."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_data import forge

from data.loader import Loader, validation_windows
from data.prepare import main as prepare_main
from data.prepare import prepare
from data.shards import DataError, open_dataset
from data.tokenizer import get_tokenizer
from data.verify import main as verify
from model.config import GPTConfig
from model.gpt import GPT
from training.config import compose
from training.data import open_data
from training.step import micro_batches
from training.validate import ConfigError

IDS = np.random.default_rng(0).integers(0, 50_257, 6000).astype("<u2")


def with_header(ids: np.ndarray, version: int = 1, count: int | None = None, magic: int = 20240520) -> bytes:
    """A file of the speedruns."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + ids.tobytes()


def nanogpt(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "train.bin").write_bytes(IDS[:5000].tobytes())
    (folder / "val.bin").write_bytes(IDS[5000:].tobytes())
    return folder


def speedrun(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(2):
        (folder / f"fineweb_train_{i + 1:06d}.bin").write_bytes(with_header(IDS[2500 * i : 2500 * (i + 1)]))
    (folder / "fineweb_val_000000.bin").write_bytes(with_header(IDS[5000:]))
    return folder


def settings(folder: Path, **changes):
    return replace(compose(["data=bin", f"data.dir={folder}"]).data, **changes)


@pytest.mark.parametrize("write", [nanogpt, speedrun])
def test_files_are_read_where_they_lie_and_not_changed(tmp_path, write):
    folder = write(tmp_path / "x")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    dataset = settings(folder).open()
    assert (dataset.train.tokens, dataset.val.tokens, dataset.vocab_size) == (5000, 1000, 50_257)
    np.testing.assert_array_equal(dataset.train.read(2400, 200), IDS[2400:2600])  # across the border of two files
    np.testing.assert_array_equal(dataset.val.read(0, 1000), IDS[5000:])
    assert (dataset.separator, dataset.separator_first) == (50_256, write is speedrun)
    assert dataset.fingerprint == settings(folder).open().fingerprint
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_the_fingerprint_sees_another_file(tmp_path):
    folder = nanogpt(tmp_path / "x")
    first = settings(folder).open().fingerprint
    other = IDS[:5000].copy()
    other[17] = 3
    (folder / "train.bin").write_bytes(other.tobytes())
    assert settings(folder).open().fingerprint != first


def damage(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


DAMAGE = {
    "odd": (nanogpt, damage("train.bin", b"abc"), r"train\.bin has 3 bytes, an odd number"),
    "empty": (nanogpt, damage("val.bin", b""), r"val\.bin is empty; get it again"),
    "token": (nanogpt, damage("val.bin", b"\xff" * 4000), r"val\.bin holds token 65535, but its vocabulary is 50257"),
    "no val": (
        nanogpt,
        lambda folder: (folder / "val.bin").unlink(),
        r"no file of .* matches val\.bin or \*_val_\*\.bin",
    ),
    "no files": (nanogpt, lambda folder: [path.unlink() for path in folder.iterdir()], r"it has no \.bin files"),
    "no folder": (
        nanogpt,
        lambda folder: folder.rename(folder.with_name("y")),
        r"there is no folder .*x; set data\.dir",
    ),
    "short header": (speedrun, damage("fineweb_val_000000.bin", with_header(IDS)[:100]), r"ends within its header"),
    "version": (speedrun, damage("fineweb_val_000000.bin", with_header(IDS, version=2)), r"version 2, and this code"),
    "truncated": (speedrun, damage("fineweb_val_000000.bin", with_header(IDS)[:-2]), r"truncated: 6,000 .*5,999 in"),
    "longer": (speedrun, damage("fineweb_val_000000.bin", with_header(IDS, count=9)), r"not what its header says: 9 "),
    "4 bytes": (speedrun, damage("fineweb_val_000000.bin", with_header(IDS, magic=20240801)), r"tokens of 4 bytes"),
    "uint32": (nanogpt, damage("train.bin", IDS.astype("<u4").tobytes()), r"like uint32, .*\.astype\(np\.uint16\)"),
    "large ids": (
        nanogpt,
        damage("val.bin", (IDS.astype("<u4") * 2).tobytes()),
        r"like uint32, .*a smaller vocabulary",
    ),
    "int64": (nanogpt, damage("val.bin", IDS.astype("<i8").tobytes()), r"like uint64, and tokens here are uint16"),
    "mixed": (speedrun, damage("fineweb_train_000002.bin", IDS.tobytes()), r"have a header and some have none"),
    "one kind": (speedrun, damage("fineweb_val_000000.bin", IDS.tobytes()), r"only one of .* has a header"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_named_with_the_cause(tmp_path, kind, capsys):
    write, spoil, message = DAMAGE[kind]
    folder = write(tmp_path / "x")
    spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        settings(folder).open()
    assert str(folder) in str(caught.value)
    assert verify([str(folder)]) == (2 if kind.startswith("no f") else 1)


def test_a_token_that_the_samples_missed_is_found_when_it_is_read(tmp_path, capsys):
    folder = nanogpt(tmp_path / "x")
    ids = np.zeros(1 << 21, "<u2")
    ids[70_000] = 60_000
    (folder / "train.bin").write_bytes(ids.tobytes())
    split = settings(folder).open().train
    split.read(0, 70_000)
    with pytest.raises(DataError, match=r"holds token 60000.*python -m data\.verify"):
        split.read(69_990, 100)
    assert verify([str(folder)]) == 1
    assert "train.bin                   2,097,152 tokens  DAMAGED: outside the vocabulary" in capsys.readouterr().out


def test_the_vocabulary_is_compared_with_the_model(tmp_path):
    overrides = ["data=bin", f"data.dir={nanogpt(tmp_path / 'x')}"]
    with pytest.raises(ConfigError, match=r"model\.vocab_size=320 is smaller than the data's vocabulary of 50257"):
        open_data(compose(overrides))
    assert open_data(compose([*overrides, "model.vocab_size=auto"])).vocab_size == 50_257
    assert compose([*overrides, "model.vocab_size=auto"]).model.vocab_size == 50_304
    assert compose(["model.vocab_size=auto"]).model.vocab_size == 384  # bytes
    assert compose([*overrides, "model.vocab_size=auto", "data.vocab_size=65"]).model.vocab_size == 128
    with pytest.raises(ConfigError, match=r"data\.tokenizer is 'char'"):
        compose(["model.vocab_size=auto", "data.tokenizer=char"])


def test_preparing_such_data_is_refused(tmp_path, capsys):
    assert prepare_main(["data=bin", f"data.dir={nanogpt(tmp_path / 'x')}"]) == 2
    assert "python -m data.verify" in capsys.readouterr().out


# --- python -m data.verify ------------------------------------------------------------------------------------------


def prepared(folder: Path, text: str = "abc") -> Path:
    (folder.parent / f"{folder.name}.txt").write_text("\n\n".join(f"{text} {i}" for i in range(400)))
    files = [f"data.files={folder.parent}/{folder.name}.txt", f"data.dir={folder}", "data.shard_tokens=1000"]
    cfg = compose(["data=text", "data.separator=''", "data.tokenizer=bytes", "data.val_fraction=0.2", *files]).data
    return prepare(cfg, progress=False)


def test_verify_checks_a_prepared_folder(tmp_path, capsys):
    folder = prepared(tmp_path / "p")
    assert verify([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert open_dataset(folder).fingerprint in printed and "everything is in order" in printed
    os.truncate(folder / "train_00000.bin", 100)
    (folder / "train_00001.bin").unlink()
    raw = bytearray((folder / "val_00000.bin").read_bytes())
    raw[0] ^= 1
    (folder / "val_00000.bin").write_bytes(raw)
    (folder / "train_00077.bin").write_bytes(b"")
    assert verify([str(folder)]) == 1
    printed = capsys.readouterr().out
    for line in (r"train_00000\.bin .*truncated: 100 bytes instead of 2,000", r"train_00001\.bin .*missing"):
        assert re.search(line, printed)
    assert "altered: its SHA-256" in printed and "not in manifest.json" in printed and "4 files are damaged" in printed


def test_verify_says_what_it_needs(tmp_path, capsys):
    assert verify([]) == verify(["a", "b"]) == verify(["a", "vocab_size=x"]) == verify([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "name one folder instead of 2" in said and "vocab_size=x is not a whole number" in said
    assert "neither a manifest.json nor files such as train.bin" in said
    assert verify([str(tmp_path), "vocabsize=65"]) == 2 and verify(["--help"]) == 0
    assert "vocabsize= is no option; the only one is vocab_size=" in capsys.readouterr().err
    assert verify([str(nanogpt(tmp_path / "x")), "vocab_size=65"]) == 1
    assert verify([str(speedrun(tmp_path / "y"))]) == 0
    assert verify([str(prepared(tmp_path / "z")), "vocab_size=65"]) == 2
    assert "vocab_size=65 is for .bin files" in capsys.readouterr().err


# --- mixtures -------------------------------------------------------------------------------------------------------


def mixture(tmp_path: Path, weights: str = "a: 3, b: 1", **changes):
    for name, text in (("a", "aaa"), ("b", "bbb")):
        prepared(tmp_path / name, text)
    overrides = ["data=mix", f"data.dir={tmp_path}", f"data.parts={{{weights}}}", "data.tokenizer=bytes"]
    return replace(compose(overrides).data, **changes)


def test_every_bad_part_of_a_mixture_is_named(tmp_path):
    cfg = mixture(tmp_path, "a: 3, b: 1, nowhere: 1, c: 1")
    prepared(tmp_path / "c")
    (tmp_path / "c/manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"data\.parts: nowhere: there is no folder .*\n.*c/manifest.json is damaged"):
        cfg.open()


@pytest.mark.parametrize("order", ["replacement", "epoch"])
def test_a_mixture_has_its_shares_on_any_number_of_ranks(tmp_path, order):
    dataset = mixture(tmp_path).open()
    loader = Loader(dataset.train, 16, seed=1, windows=8, order=order)
    parts = np.concatenate([loader.places(step)[0] for step in range(1250)])
    assert np.bincount(parts).tolist() == [7500, 2500]
    assert abs(np.bincount(parts[:400])[0] - 300) < 40
    whole = loader.batch(7)
    ranks = [Loader(dataset.train, 16, 1, 8, rank, 4, order).batch(7) for rank in range(4)]
    np.testing.assert_array_equal(np.concatenate(ranks), whole)
    for row, part in zip(whole, loader.places(7)[0]):
        assert (ord("ab"[part]) in row) and (ord("ba"[part]) not in row)
    val = validation_windows(dataset.val, 16, 40)
    assert [sum(ord(letter) in row for row in val) for letter in "ab"] == [30, 10]
    few = validation_windows(mixture(tmp_path, "a: 99, b: 1").open().val, 16, 4)  # none of them is of b
    assert len(few) == 4 and (few != ord("b")).all()


def test_the_parts_of_a_mixture_must_fit_together(tmp_path):
    cfg = mixture(tmp_path)
    assert cfg.open().fingerprint != replace(cfg, parts={"a": 1.0, "b": 1.0}).open().fingerprint
    assert cfg.open().fingerprint == replace(cfg, parts={"a": 6.0, "b": 2.0}).open().fingerprint
    nanogpt(tmp_path / "x")
    for parts in ({"a": 1.0, "x": 1.0}, {"x": 1.0, "a": 1.0}):
        assert replace(cfg, vocab_size=60_000, parts=parts).open().vocab_size == 60_000  # the larger
    with pytest.raises(DataError, match=r"do not fit together: a has bytes tokens"):
        replace(cfg, tokenizer="gpt2", parts={"x": 1.0, "a": 1.0}).open()
    speedrun(tmp_path / "y")
    with pytest.raises(DataError, match=r"y has gpt2 tokens, and the end-of-text token begins a document"):
        replace(cfg, tokenizer="gpt2", parts={"x": 1.0, "y": 1.0}).open()
    with pytest.raises(DataError, match=r"weight of .*b is less than 1/10,000"):
        Loader(replace(cfg, parts={"a": 1.0, "b": 1e-6}).open().train, 16, 1, 8)
    with pytest.raises(DataError, match=r"data\.train and data\.val name the files"):
        replace(cfg, parts={"x": 1.0}, train=()).open()
    with pytest.raises(DataError, match=r"names no folder"):
        replace(cfg, parts={}).open()
    assert replace(cfg, tokenizer="gpt2", parts={"x": 1.0}).open().vocab_size == 50_257


# --- beside nanoGPT -------------------------------------------------------------------------------------------------


def published_recipe(folder: Path, documents: list[str]) -> None:
    """train.bin and val.bin as nanoGPT's data/openwebtext/prepare.py writes them: encode_ordinary, then the end-of-text token, uint16."""
    tokenizer = get_tokenizer("bytes")
    folder.mkdir()
    for split, part in (("train", documents[:-5]), ("val", documents[-5:])):
        ids = [np.append(tokenizer.encode(text), np.uint16(tokenizer.eot)) for text in part]
        memmap = np.memmap(folder / f"{split}.bin", np.uint16, "w+", shape=(sum(map(len, ids)),))
        memmap[:] = np.concatenate(ids)
        memmap.flush()


def published_batch(file: Path, block: int, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch as nanoGPT's train.py draws it, and its offsets."""
    tokens = np.memmap(file, np.uint16, "r")
    offsets = torch.randint(len(tokens) - block, (batch,))
    x, y = (
        torch.stack([torch.from_numpy(tokens[i + shift : i + shift + block].astype(np.int64)) for i in offsets])
        for shift in (0, 1)
    )
    return x, y, offsets


def published_loss(
    p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, heads: int, layers: int
) -> torch.Tensor:
    """nanoGPT's loss from its formulas: pre-norm blocks, causal softmax attention, exact GELU, tied head."""
    T = x.size(1)
    h = p["transformer.wte.weight"][x] + p["transformer.wpe.weight"][:T]
    d = h.size(-1)
    for i in range(layers):
        of = {name.removeprefix(f"transformer.h.{i}."): value for name, value in p.items()}
        q, k, v = (F.layer_norm(h, (d,), of["ln_1.weight"]) @ of["attn.c_attn.weight"].T).split(d, -1)
        q, k, v = (u.unflatten(-1, (heads, -1)).transpose(1, 2) for u in (q, k, v))
        z = (q @ k.mT) / (d // heads) ** 0.5
        a = z.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1) @ v
        h = h + a.transpose(1, 2).flatten(-2) @ of["attn.c_proj.weight"].T
        m = F.layer_norm(h, (d,), of["ln_2.weight"]) @ of["mlp.c_fc.weight"].T
        h = h + F.gelu(m) @ of["mlp.c_proj.weight"].T
    logits = F.layer_norm(h, (d,), p["transformer.ln_f.weight"]) @ p["transformer.wte.weight"].T
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def test_nanogpts_file_trains_as_it_does_there(tmp_path):
    """Given the offsets that nanoGPT draws, the batches are equal, and the losses of twenty AdamW updates agree."""
    published_recipe(tmp_path / "x", [f"{i} times {i} is {i * i}. " * 3 for i in range(100)])
    dataset = settings(tmp_path / "x", tokenizer="bytes", vocab_size=257).open()
    block, batch = 24, 6
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block, vocab_size=384, n_layer=2, n_head=2, n_embd=32, bias=False))
    twin = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    ours, theirs = (torch.optim.AdamW(list(ps), lr=1e-2) for ps in (model.parameters(), twin.values()))
    losses = []
    for _ in range(20):
        x, y, offsets = published_batch(tmp_path / "x" / "train.bin", block, batch)
        assert offsets.max() < dataset.train.tokens - block  # the range of our own draws
        windows = np.stack([dataset.train.read(int(i), block + 1) for i in offsets])
        mine = next(micro_batches(windows, batch, torch.device("cpu")))
        assert torch.equal(mine[0], x) and torch.equal(mine[1], y)
        pair = [model(*mine)[1], published_loss(twin, x, y, 2, 2)]
        for optimizer, loss in zip((ours, theirs), pair):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([loss.item() for loss in pair])
    losses = np.array(losses)
    assert np.abs(losses[:, 0] - losses[:, 1]).max() < 1e-5
    assert losses[-1, 0] < losses[0, 0] - 1


def test_the_first_token_beyond_a_vocabulary_is_found_when_it_is_read(tmp_path):
    folder = nanogpt(tmp_path / "x")
    for largest in (99, 100):
        ids = np.zeros(1 << 21, "<u2")
        ids[70_000] = largest
        (folder / "train.bin").write_bytes(ids.tobytes())
        (folder / "val.bin").write_bytes(np.zeros(1000, "<u2").tobytes())
        split = settings(folder, vocab_size=100).open().train
        if largest < 100:
            assert split.read(70_000, 1) == [99]
        else:
            with pytest.raises(DataError, match=r"holds token 100, but its vocabulary is 100"):
                split.read(70_000, 1)


def test_verify_finds_the_first_token_beyond_the_vocabulary(tmp_path, capsys):
    folder = prepared(tmp_path / "p")
    forge(folder, lambda content: content.update(vocab_size=256))  # of bytes, 256 ends a document
    assert verify([str(folder)]) == 1 and "it holds token 256, and the vocabulary is 256" in capsys.readouterr().out
