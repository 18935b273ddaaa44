"""Every example of the README runs: commands with a tiny model, Python as it stands; what needs a GPU is composed and checked."""

import re
import runpy
import shlex
import sys

import pytest
import torch
from conftest import ROOT

import train
from data.prepare import prepare
from model.gpt import GPT
from optim.manifolds import MANIFOLDS
from scripts import export, probe, report, sample
from training.config import compose

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(<!-- needs [^\n]*-->\n)?```(bash|python)\n(.*?)```", README, re.DOTALL)
SHELL = [(code, bool(needs)) for needs, language, code in BLOCKS if language == "bash"]
PYTHON = [code for _, language, code in BLOCKS if language == "python"]

TINY_MODEL = ["model.n_head=2", "model.n_embd=16", "model.block_size=16"]
TINY_RUN = [
    *TINY_MODEL,
    *("max_steps=2", "global_batch_tokens=64", "micro_batch_size=2", "eval_interval=1", "eval_windows=2"),
    *("schedule.warmup_steps=1", "log.interval=1", "log.interval_spectra=1", "checkpoint.interval=1"),
    *("logger.mode=disabled", "device=cpu"),
]


def commands(block):
    """The command lines of a block, split as a shell would."""
    return [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def little_stdlib(tmp_path_factory):
    """Overrides naming the default data, cut short."""
    overrides = ["data.max_tokens=20000", f"data.dir={tmp_path_factory.mktemp('data')}/stdlib"]
    prepare(compose(overrides)["data"], progress=False)
    return overrides


def execute(words, overrides, monkeypatch):
    """Run one command of the README in this process, in the current directory."""
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
        return
    assert words[0] == "python"
    program, arguments = words[1], words[2:]
    if program == "train.py":
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *TINY_RUN, *overrides])
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        return
    script = {"sample": sample, "export": export, "report": report, "probe": probe}[
        program.removeprefix("scripts/")[:-3]
    ]
    assert script.main(arguments) == 0


@pytest.mark.parametrize("block", [code for code, needs in SHELL if not needs])
def test_commands_run(block, little_stdlib, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in commands(block):
        execute(words, little_stdlib, monkeypatch)
    printed = capsys.readouterr().out
    for said, expected in (
        ("train.py", "best validation loss"),
        ("report.py", "val loss, best"),
        ("export.py", "gpt.pt ("),
    ):
        assert (said in block) <= (expected in printed)
    if "figures=" in block:
        assert list(tmp_path.glob("outputs/*/*.png"))


@pytest.mark.parametrize("block", [code for code, needs in SHELL if needs])
def test_commands_for_other_machines_compose(block):
    own = (
        "scale=",
        "results=",
        "hydra/",
        "--",
        "-m",
        "seed=1,2",
        "widths=",
        "seeds=",
        "scan=",
        "train=",
    )  # no keys of a run
    for words in commands(block):
        assert words[0] in ("python", "torchrun")
        program = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "data.prepare")
        overrides = [word.replace("scale=", "experiment=") for word in words[program + 1 :]]
        overrides = [re.sub(r"^(assignment=\w+),.*", r"\1", word) for word in overrides]  # of a sweep, its first job
        cfg = compose([word for word in overrides if not word.startswith(own)])
        if "data.prepare" not in words:
            train.check(cfg, cfg["launcher"]["nproc"])


def test_python_runs_as_it_stands(capsys):
    space = {"__name__": "readme"}
    try:
        for code in PYTHON:
            exec(compile(code, "README.md", "exec"), space)
        check_worked_manifold(space)
    finally:
        MANIFOLDS.pop("frobenius", None)
    assert "transformer.h.0-3.attn.c_attn.weight" in capsys.readouterr().out


def check_worked_manifold(space):
    """The README's manifold is one: P projects, the retraction lands and stays, a training step ends on it."""
    M, W = MANIFOLDS["frobenius"], torch.randn(2, 5, 3, dtype=torch.float64)
    S = W.mT @ W
    assert torch.allclose(M.gram_project(M.gram_project(S)), M.gram_project(S))
    R = M.retract(W)
    assert M.residual(R).max() < 1e-12 and torch.allclose(M.retract(R), R)
    assert torch.allclose(R.square().sum((-2, -1)), torch.full((2,), 3.0, dtype=torch.float64))
    model, optimizers = space["model"], space["optimizers"]
    assert isinstance(model, GPT)
    before = model.transformer.h[0].mlp.c_fc.weight.clone()
    x = torch.randint(0, 257, (2, 17))
    model(x[:, :-1], x[:, 1:])[1].backward()
    optimizers.step()
    after = model.transformer.h[0].mlp.c_fc.weight
    assert not torch.equal(before, after) and M.residual(after) < 1e-6


def test_every_file_the_readme_names_exists():
    named = set(re.findall(r"\]\(([^)#:]+)\)", README)) | set(re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", README))
    assert {"optim/manifolds.py", "configs/assignment/", "results/demo/val_loss.png"} <= named
    written_by_runs = ("data/prepared/", "checkpoints/")
    assert [name for name in sorted(named) if not (ROOT / name).exists() and name not in written_by_runs] == []


def test_the_readme_says_nothing_of_the_layout_that_is_not_so():
    layout = README.split("## How the repository is laid out")[1].split("```")[1]
    rooms = re.findall(r"^(\S+)", layout, re.MULTILINE)
    assert len(rooms) >= 8 and all((ROOT / room).exists() for room in rooms)
