"""Every command and example of README.md and docs/ runs, with a tiny model and two ranks where it names eight; every link leads somewhere.

The grids of experiments are checked here, and run by tests/test_experiments.py.
"""

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
import zlib

import datasets
import numpy as np
import pytest
from conftest import ROOT
from documents import (
    ALL,
    CONTRIBUTING,
    DOCUMENTS,
    FRONT,
    LESS,
    TINY_MODEL,
    TINY_RUN,
    anchors,
    blocks,
    commands,
    in_process,
    links,
    outside_code,
    without_workers,
)

from data import prepare as preparing
from data.settings import InputFile
from data.sources import OpenWebText
from scripts.experiment import experiment_names, load_experiment, study_of
from training.checks import check
from training.config import compose
from training.log import read_records

BLOCKS = [block for file in DOCUMENTS for block in blocks(file)]
PLAIN = [block for block in BLOCKS if block.language == "bash" and not block.needs]
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = {}
"""What a block needs → the commands of all such blocks, each once."""
for block in BLOCKS:
    if block.needs:
        known = SHELL.setdefault(block.needs, [])
        known += [words for words in commands(block.code) if words not in known]


@pytest.fixture(scope="module")
def little_stdlib(tmp_path_factory):
    """Overrides naming the default data, cut short."""
    overrides = ["data.max_tokens=20000", f"data.dir={tmp_path_factory.mktemp('data')}/stdlib"]
    assert preparing.main(overrides) == 0
    return overrides


@pytest.mark.parametrize("block", PLAIN, ids=str)
def test_commands_run(block, little_stdlib, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in commands(block.code):
        training = words[:2] == ["python", "train.py"]
        in_process(words, little_stdlib if training else [], monkeypatch)
    printed = capsys.readouterr().out
    for said, expected in (
        ("train.py", "best validation loss"),
        ("report.py", "val loss, best"),
        ("export.py", " MiB)"),
        ("evaluate.py", "bits per byte"),
        ("watch.py", "finished"),
        ("probe.py", "eff. rank"),
    ):
        assert (said in block.code) <= (expected in printed)
    if "figures=" in block.code:
        assert list(tmp_path.glob("outputs/*/*.png"))


def test_a_block_that_needs_something_says_what_and_is_run_below():
    shards, files = "a GPU and the published shards", "files of other programs"
    assert set(SHELL) == {"several devices", "an hour", "a GPU and 9 billion tokens", shards, "your files", files}
    assert {block.language for block in BLOCKS} == {"bash", "python"}


def test_python_runs_as_it_stands(capsys, tmp_path, monkeypatch):
    (tmp_path / "manifold_muon").symlink_to(
        ROOT / "optim"
    )  # as `pip install .` would have it; tests/test_any_model.py installs it
    monkeypatch.syspath_prepend(tmp_path)
    for block in PYTHON:
        exec(compile(block.code, block.file, "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    assert "transformer.h.0-3.attn.c_attn.weight" in printed and "1.layers.0.self_attn.in_proj_weight" in printed


@pytest.mark.parametrize("needs", SHELL)
def test_what_needs_another_machine_is_a_valid_configuration_as_it_stands(needs):
    for words in SHELL[needs]:
        assert words[0] in ("python", "torchrun")
        program = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "data.prepare")
        options = words[program + 1 :]
        if words[program] == "scripts/experiment.py":
            study = study_of(load_experiment(options[0]), options[1:])[0]
            overrides = [*study.experiment.base, *study.settings(study.cases()[0]), *study.overrides]
        else:
            overrides = [re.sub(r"^scale=", "experiment=", word) for word in options if word[0] != "-"]
            overrides = [word for word in overrides if not word.startswith("hydra/")]
            overrides = [
                re.sub(r"^(assignment=\w+),.*", r"\1", word) for word in overrides
            ]  # of a sweep, its first job
        cfg = compose(overrides)
        if "data.prepare" not in words:
            check(cfg)


# ---- several devices ----


@pytest.mark.slow
def test_commands_for_several_devices_run_on_two(tiny_data, tmp_path):
    environment, started = {**os.environ, "PYTHONPATH": str(ROOT)}, []
    for words in SHELL["several devices"]:
        words = [word.replace("=8", "=2") if "nproc" in word else word for word in words]
        tiny = [*TINY_MODEL[:1], *TINY_RUN, *tiny_data, f"output_dir={tmp_path}/{words[0]}"]
        if "-m" in words:
            check_cluster_sweep(words[2:], tiny)
            continue
        program = [sys.executable, "-m", "torch.distributed.run"] if words[0] == "torchrun" else [sys.executable]
        script = words.index("train.py")
        command = [*program, *words[1:script], str(ROOT / "train.py"), *words[script + 1 :], *tiny]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
    for process in started:  # side by side, which takes less time
        printed, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert printed.count("best validation loss") == 1
    alone, under_torchrun = (
        [r["loss"] for r in read_records(tmp_path / name, "eval")] for name in ("python", "torchrun")
    )
    assert alone == under_torchrun and len(alone) == 3


def check_cluster_sweep(words, tiny):
    """A sweep on a cluster: its jobs are valid on its ranks, and its launcher is asked for one task of that many GPUs."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    [swept] = [word for word in words if "," in word]
    launcher = next(word for word in words if word.startswith("hydra/launcher="))
    common = [word for word in words if word not in ("-m", swept, launcher)]
    assert "launcher.nproc=2" in common
    key, _, choices = swept.partition("=")
    for choice in choices.split(","):
        check(compose([*common, f"{key}={choice}", *tiny]))
    if importlib.util.find_spec("submitit") is not None:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            job = hydra_compose("config", [*common, launcher], return_hydra_config=True).hydra.launcher
        assert (job.tasks_per_node, job.gpus_per_node) == (1, 2)


# ---- experiments ----


def test_every_experiment_is_named():
    """With valid words, see above; most are run by tests/test_experiments.py, the others below."""
    assert {words[2] for block in SHELL.values() for words in block if "experiment.py" in words[1]} == set(
        experiment_names()
    )


# ---- one GPU ----


def test_commands_for_one_gpu_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    without_workers(monkeypatch)
    texts = [{"text": f"page {i} says that {i} times {i} is {i * i}"} for i in range(4000)]
    datasets.Dataset.from_list(texts).to_parquet(tmp_path / "pages.parquet")
    pages = InputFile(str(tmp_path / "pages.parquet"), (tmp_path / "pages.parquet").stat().st_size, rows=len(texts))
    monkeypatch.setattr(OpenWebText, "inputs", lambda source: [pages])
    for words in SHELL["a GPU and 9 billion tokens"]:
        tiny = ["data.tokenizer=bytes", *(["model.n_layer=1"] if words[1] != "-m" else [])]
        if words[1].startswith("scripts/"):
            tiny += [*TINY_RUN, f"output_dir=outputs/{words[1]}", "results=results", *LESS.get(words[2], [])]
        in_process(words, tiny, monkeypatch)
    assert {path.name for path in tmp_path.glob("results/*")} >= {"table.md", "val_loss.png", "instability.png"}
    assert capsys.readouterr().out.count("best validation loss") == 2


def test_commands_for_the_optimizer_track_run(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    without_workers(monkeypatch)
    tiny = [*TINY_RUN, *tiny_data, "model.n_layer=1", "model.n_embd=32", "model.n_head=2", "model.block_size=16"]
    tiny += ["model.vocab_size=320", "device=cpu", "compile=false"]
    for words in SHELL["a GPU and the published shards"]:
        where = ["seeds=1", "assignment=hetero", "results=results"] if words[1].startswith("scripts/") else []
        in_process(words, [*tiny, *where], monkeypatch)
    assert "not reached" in (tmp_path / "results" / "table.md").read_text()


# ---- your own text ----


def test_commands_for_your_own_text_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in ("a", "b"):
        (tmp_path / "corpus" / part).mkdir(parents=True)
        lines = (json.dumps({"text": f"line {i} of {part}: {zlib.crc32(bytes(i))}"}) for i in range(200))
        with gzip.open(tmp_path / "corpus" / part / "lines.jsonl.gz", "wt") as file:
            file.write("\n".join(lines))
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"paragraph {i}, {i * i}" for i in range(1000)))
    for words in SHELL["your files"]:
        in_process(
            words, ["data.tokenizer=bytes", *(["model.n_layer=1"] if words[1] == "train.py" else [])], monkeypatch
        )
    printed = capsys.readouterr().out
    assert "mine in data/prepared/mine" in printed and printed.count("best validation loss") == 2


def test_commands_for_files_of_other_programs_run(tmp_path, monkeypatch, capsys):
    work, nanogpt = tmp_path / "work", tmp_path / "nanoGPT" / "data" / "openwebtext"
    for folder in (work, nanogpt):
        folder.mkdir(parents=True)
    monkeypatch.chdir(work)
    for split in ("train", "val"):
        (np.arange(4000) % 257).astype(np.uint16).tofile(nanogpt / f"{split}.bin")
    (work / "text.txt").write_text("\n<|endoftext|>\n".join(f"page {i}, {i * i}" for i in range(400)))
    for name in ("fineweb_edu", "books"):
        assert preparing.main(["data=text", f"data.name={name}", "data.files=text.txt", "data.tokenizer=bytes"]) == 0
    for words in SHELL["files of other programs"]:
        in_process(words, ["model.n_layer=1", "data.tokenizer=bytes"], monkeypatch)
    assert capsys.readouterr().out.count("best validation loss") == 2


# ---- what is named exists ----


@pytest.mark.parametrize("file", ALL, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(file):
    for path, anchor in links(file):
        target = (file.parent / path).resolve() if path else file
        assert target.exists() and target.is_relative_to(ROOT), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_every_document_can_be_reached_from_the_front():
    assert {(FRONT.parent / path).resolve() for path, _ in links(FRONT)} >= {*ALL} - {FRONT}


@pytest.mark.parametrize("file", [*DOCUMENTS, CONTRIBUTING], ids=lambda file: file.name)
def test_every_file_that_is_named_exists(file):
    named = set(re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.\w+)?)`", outside_code(file)))
    written_by_runs = ("data/prepared/", "checkpoints/", "profile/", "outputs/", "outputs/gpu_check")
    assert [name for name in sorted(named) if not (ROOT / name).exists() and name not in written_by_runs] == []


def test_the_map_of_the_folders_says_nothing_that_is_not_so():
    layout = FRONT.read_text().split("## Map of the folders")[1].split("```")[1]
    rooms = re.findall(r"^(\S+)", layout, re.MULTILINE) + re.findall(r"scripts/\w+/", layout)
    assert len(rooms) >= 11 and all((ROOT / room).exists() for room in rooms)
