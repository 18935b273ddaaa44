"""The Markdown files: their code blocks, headings and links; and how a test runs a command that stands in one of them."""

import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pytest
from conftest import ROOT

from data import prepare as preparing
from scripts.analysis import conduct
from training.jobs import run_here

FRONT, EXPERIMENTS, FORMULAS = ROOT / "README.md", ROOT / "docs" / "experiments.md", ROOT / "docs" / "formulas.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCUMENTS = [FRONT, *sorted((ROOT / "docs").glob("*.md"))]
ALL = [*DOCUMENTS, CONTRIBUTING, ROOT / "results" / "README.md"]

TINY_MODEL = ["model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16"]
TINY_RUN = [
    *TINY_MODEL[1:],
    *("max_steps=2", "global_batch_tokens=64", "micro_batch_size=2", "eval_interval=1", "eval_windows=2"),
    *("schedule.warmup_steps=1", "log.interval=1", "log.interval_spectra=1", "checkpoint.interval=1"),
    *("logger.mode=disabled", "device=cpu", "full_eval=false"),
]


@dataclass(frozen=True)
class Block:
    """A block of code: the file and heading that it stands under, what it needs beyond a small machine, its language, its text."""

    file: str
    heading: str
    needs: str
    language: str
    code: str

    def __str__(self):
        return f"{self.file}, {self.heading}"


def blocks(file):
    """The blocks of a file that name a language, in order."""
    found, heading = [], ""
    for title, needs, language, code in re.findall(
        r"^#+ ([^\n]+)$|(?:^<!-- needs ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$",
        file.read_text(),
        re.DOTALL | re.MULTILINE,
    ):
        heading = title or heading
        if language:
            found.append(Block(file.name, heading, needs, language, code))
    return found


def outside_code(file):
    """The text of a file without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(file):
    """The anchors that GitHub makes of a file's headings."""
    titles = re.findall(r"^#+ (.+)$", outside_code(file), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(file):
    """The links and pictures of a file that lead into this repository, as (path, anchor)."""
    targets = re.findall(r"\]\(([^)\s]+)\)", outside_code(file))
    return [target.partition("#")[::2] for target in targets if not re.match(r"https?:", target)]


def commands(code):
    """The command lines of a block, split as a shell would."""
    return [words for line in code.splitlines() if (words := shlex.split(line, comments=True))]


def in_process(words, overrides, monkeypatch):
    """Run one command in this process, in the current directory; what stands behind it wins."""
    if words[0] == "make":
        options = ["make", "-n", "-o", ".venv/installed.lock", *words[1:]]
        said = subprocess.run(options, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert {"reproduce": "scripts/reproduce.py scale=demo", "test": "pytest"}[words[1]] in said
        return
    assert words[0] == "python"
    if words[1] == "-m":
        assert words[2] == "data.prepare" and preparing.main([*words[3:], *overrides]) == 0
    elif words[1] == "train.py":
        monkeypatch.setattr(sys, "argv", ["train.py", *words[2:], *TINY_RUN, *overrides])
        with pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    else:
        script = importlib.import_module(Path(words[1]).with_suffix("").as_posix().replace("/", "."))
        main = getattr(script, "main", None) or script.work
        assert main([*words[2:], *overrides]) == 0


LESS = {  # of the lists of experiments that only a page runs, as little as draws a picture
    "instability_one_gpu": ["optim=paper", "optim.muon.lr=0.1", "assignment=all_dgram,hetero"],
    "momentum": ["assignment=all_stiefel", "optim.muon.momentum=0.8"],
}


def without_workers(monkeypatch):
    """Run the jobs of an experiment one after the other in this process: to start workers takes longer than the runs."""

    def run_all(jobs, workers, launcher):
        outcomes = [run_here(job) for job in jobs]
        return {outcome.job.directory: outcome.failure for outcome in outcomes if outcome.failure}

    monkeypatch.setattr(conduct, "run_all", run_all)


# ---- results ----


def text(file):
    """A file in one line."""
    return " ".join(file.read_text().split())


def result(name):
    """The data of a file of results/."""
    return json.loads((ROOT / "results" / name).read_text())


def by_setting(name, key):
    """Setting → the values of a key of the rows, by seed."""
    found = {}
    for r in result(name)["rows"]:
        found.setdefault(r["setting"], {})[r["seed"]] = r[key]
    return found


def mean_of(*settings):
    """The mean loss of all runs of some settings of why_hetero."""
    losses = by_setting("why_hetero/table.json", "val_loss")
    return fmean(loss for setting in settings for loss in losses[setting].values())


def mean_loss(file, **wanted):
    """The mean final loss of the rows of a file of results/ that have these values."""
    return fmean(r["val_loss_final"] for r in result(file)["rows"] if all(r[key] == wanted[key] for key in wanted))
