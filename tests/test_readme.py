"""Every command and example of the README runs, with a tiny model and two ranks where it names eight, and what it claims is in results/."""

import gzip
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import zlib

import datasets
import pytest
import torch
from conftest import ROOT

import train
from data import prepare as preparing
from data.prepare import prepare
from model.gpt import GPT, GPTConfig
from optim.certificate import certify
from optim.certified import direction
from optim.manifolds import MANIFOLDS
from optim.msign import msign
from scripts import crossing, exponents, failure, lr_transfer, solver_sweep
from training.build import build_optimizers, gpt_config
from training.config import compose
from training.log import read_records

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?:<!-- needs ([^\n]*) -->\n)?```(bash|python)\n(.*?)```", README, re.DOTALL)
SHELL = {needs: code for needs, language, code in BLOCKS if language == "bash" and needs}
PLAIN = [code for needs, language, code in BLOCKS if language == "bash" and not needs]
PYTHON = [code for _, language, code in BLOCKS if language == "python"]

TINY_MODEL = ["model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16"]
TINY_RUN = [
    *TINY_MODEL[1:],
    *("max_steps=2", "global_batch_tokens=64", "micro_batch_size=2", "eval_interval=1", "eval_windows=2"),
    *("schedule.warmup_steps=1", "log.interval=1", "log.interval_spectra=1", "checkpoint.interval=1"),
    *("logger.mode=disabled", "device=cpu", "full_eval=false"),
]


def commands(block):
    """The command lines of a block, split as a shell would."""
    return [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def little_stdlib(tmp_path_factory):
    """Overrides naming the default data, cut short."""
    overrides = ["data.max_tokens=20000", f"data.dir={tmp_path_factory.mktemp('data')}/stdlib"]
    prepare(compose(overrides).data, progress=False)
    return overrides


def in_process(words, overrides, monkeypatch):
    """Run one command of the README in this process, in the current directory; what stands behind it wins."""
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
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    else:
        script = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        main = getattr(script, "main", None) or script.work
        assert main([*words[2:], *overrides]) == 0


@pytest.mark.parametrize("block", PLAIN)
def test_commands_run(block, little_stdlib, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in commands(block):
        training = words[:2] == ["python", "train.py"]
        in_process(words, little_stdlib if training else [], monkeypatch)
    printed = capsys.readouterr().out
    for said, expected in (
        ("train.py", "best validation loss"),
        ("report.py", "val loss, best"),
        ("export.py", "gpt.pt ("),
        ("watch.py", "finished"),
    ):
        assert (said in block) <= (expected in printed)
    if "figures=" in block:
        assert list(tmp_path.glob("outputs/*/*.png"))


def test_a_block_that_needs_something_says_what_and_is_run_below():
    assert set(SHELL) == {"several devices", "an hour", "a GPU and 9 billion tokens", "your files"}


@pytest.mark.parametrize("needs", SHELL)
def test_what_needs_another_machine_is_a_valid_configuration_as_it_stands(needs):
    own = (
        "hydra/",
        "--",
        "-m",
        "once=",
        "seed=1,2",
        "widths=",
        "seeds=",
        "scan=",
        "train=",
        "workers=",
    )  # no keys of a run
    for words in commands(SHELL[needs]):
        assert words[0] in ("python", "torchrun")
        program = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "data.prepare")
        overrides = [re.sub(r"^scale=", "experiment=", word) for word in words[program + 1 :]]
        overrides = [re.sub(r"^(assignment=\w+),.*", r"\1", word) for word in overrides]  # of a sweep, its first job
        cfg = compose([word for word in overrides if not word.startswith(own)])
        if "data.prepare" not in words:
            train.check(cfg, cfg.launcher.nproc)


# ---- several devices ----


@pytest.mark.slow
def test_commands_for_several_devices_run_on_two(tiny_data, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in commands(SHELL["several devices"]):
        words = [word.replace("=8", "=2") if "nproc" in word else word for word in words]
        where = f"output_dir={tmp_path}/{words[0]}"
        tiny = [*TINY_MODEL[:1], *TINY_RUN, *tiny_data, where]
        if "-m" in words:
            check_cluster_sweep(words[2:], tiny)
            continue
        program = [sys.executable, "-m", "torch.distributed.run"] if words[0] == "torchrun" else [sys.executable]
        script = words.index("train.py")
        command = [*program, *words[1:script], str(ROOT / "train.py"), *words[script + 1 :], *tiny]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("best validation loss") == 1
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
    key, _, choices = swept.partition("=")
    for choice in choices.split(","):
        cfg = compose([*common, f"{key}={choice}", *tiny])
        assert cfg.launcher.nproc == 2
        train.check(cfg, 2)
    if importlib.util.find_spec("submitit") is not None:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            job = hydra_compose("config", [*common, launcher], return_hydra_config=True).hydra.launcher
        assert (job.tasks_per_node, job.gpus_per_node) == (1, 2)


# ---- experiments ----

LESS = {  # of every experiment's lists, as little as draws a picture
    "crossing": ["assignment=hetero", "residual=geonorm", "seed=1"],
    "lr_transfer": ["widths=16", "depths=1", "steps=2", "rates=0.01,0.02", "base=16,1,2", "head=8"],
    "instability": ["rates=0.1", "optims=paper", "assignments=all_dgram", "seeds=1"],
    "mechanism": ["remedies=none,norm_cap", "assignments=all_dgram"],
    "exponents": ["scan=2", "train=2", "seeds=1", "assignments=adamw"],
    "solver_sweep": ["rates=0.02", "seeds=1"],
}


@pytest.fixture
def grids_in_this_process(monkeypatch):
    """Run the jobs of a grid one after the other here: to start workers takes longer than the runs."""

    def run_grid(jobs, workers):
        for job in jobs:
            train.train(compose([*job.overrides, "resume=auto"]), job.directory)
        return {}

    for module in (crossing, lr_transfer, failure, exponents, solver_sweep):
        monkeypatch.setattr(module, "run_grid", run_grid)


@pytest.mark.parametrize("words", commands(SHELL["an hour"]), ids=lambda words: words[1])
def test_an_experiment_runs_and_writes_its_results(words, tiny_data, grids_in_this_process, tmp_path, monkeypatch):
    name = words[1].removeprefix("scripts/").removesuffix(".py")
    kept = ("probe.interval=1", "seed=", "max_steps=", "model.")
    tiny = [o for o in TINY_RUN if not o.startswith(kept)] + ["max_steps=2", "model.block_size=16"] * (
        name != "lr_transfer"
    )
    shape = TINY_MODEL[:3] if name != "lr_transfer" else TINY_MODEL[3:]
    places = [f"output_dir={tmp_path}/runs", f"results={tmp_path}/results"]
    in_process(words, [*LESS[name], *tiny, *shape, *tiny_data, *places], monkeypatch)
    written = {path.suffix for path in (tmp_path / "results").iterdir()}
    assert written == {".md", ".json", ".png"}


# ---- one GPU ----


def test_commands_for_one_gpu_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = [{"text": f"page {i} says that {i} times {i} is {i * i}"} for i in range(4000)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(texts))
    fast, fewer = "model.n_layer=1", ["rates=0.1", "optims=paper", "assignments=all_dgram,hetero"]
    for words in commands(SHELL["a GPU and 9 billion tokens"]):
        if words[1] == "-m":
            in_process(words, ["data.tokenizer=bytes"], monkeypatch)
        elif words[1] == "train.py":
            in_process(words, [fast, "data.tokenizer=bytes"], monkeypatch)
        else:
            monkeypatch.setattr(failure, "run_grid", lambda jobs, workers: [in_turn(job) for job in jobs] and {})
            places = ["output_dir=outputs/of_script", "results=results"]
            in_process(
                words,
                [*TINY_RUN, fast, "data.tokenizer=bytes", *places, *(fewer * ("instability" in words[1]))],
                monkeypatch,
            )
    assert {path.name for path in tmp_path.glob("results/*")} >= {"table.md", "val_loss.png", "instability.md"}
    assert capsys.readouterr().out.count("best validation loss") == 2


def in_turn(job):
    return train.train(compose(job.overrides), job.directory)


# ---- your own text ----


def test_commands_for_your_own_text_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in ("a", "b"):
        (tmp_path / "corpus" / part).mkdir(parents=True)
        lines = (json.dumps({"text": f"line {i} of {part}: {zlib.crc32(bytes(i))}"}) for i in range(200))
        with gzip.open(tmp_path / "corpus" / part / "lines.jsonl.gz", "wt") as file:
            file.write("\n".join(lines))
    for words in commands(SHELL["your files"]):
        in_process(
            words, ["data.tokenizer=bytes", *(["model.n_layer=1"] if words[1] == "train.py" else [])], monkeypatch
        )
    printed = capsys.readouterr().out
    assert "mine in data/prepared/mine" in printed and "best validation loss" in printed
    assert compose(["data=text", "data.name=mine", "model=mini", "experiment=one_gpu"]).model.n_embd == 384


# ---- Python ----


def test_python_runs_as_it_stands(capsys):
    before = set(MANIFOLDS)
    space = {"__name__": "readme"}
    try:
        for code in PYTHON:
            exec(compile(code, "README.md", "exec"), space)
        assert "transformer.h.0-3.attn.c_attn.weight" in capsys.readouterr().out
        added = set(MANIFOLDS) - before
        assert added == {"frobenius", "stiefel_by_head"}
        for name in added:
            check_axioms(MANIFOLDS[name])
        for rule in ("manifold_muon", "paper"):
            check_training(space["rules"], rule, added)
    finally:
        for name in set(MANIFOLDS) - before:
            del MANIFOLDS[name]


def check_axioms(M):
    """P projects, the retraction lands and stays, tangent parts are tangent, directions are feasible and near the dual value."""
    g = torch.Generator().manual_seed(0)
    W, G = (torch.randn(2, 96, 64, generator=g, dtype=torch.float64) for _ in range(2))
    S = W.mT @ W
    assert torch.allclose(M.project(M.project(S)), M.project(S))
    R = M.retract(W)
    assert M.residual(R).max() < 1e-12 and torch.allclose(M.retract(R), R)
    assert M.tangency(R, M.tangent(R, G)).abs().max() < 1e-10
    certificate = certify(R, G, direction(R, G, M.name), M.name)
    assert (certificate.feas > 0.9).all() and (certificate.feas <= 1).all() and (certificate.tangency < 1e-5).all()


def check_training(rules, rule, added):
    """Three steps of a model by either step rule: certified, and every weight on its manifold."""
    torch.manual_seed(0)
    cfg = compose(["model=demo", f"optim={rule}", "assignment=custom", f"assignment.rules={rules}"])
    model = GPT(GPTConfig(**vars(cfg.model)))
    optimizers = build_optimizers(model, cfg)
    optimizers.watch(True)
    for _ in range(3):
        x = torch.randint(0, 257, (2, 17))
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizers.step()
        optimizers.zero_grad()
    found = optimizers.muon.certificates()
    for row in optimizers.rows:
        if row.manifold in added:
            residual = MANIFOLDS[row.manifold].residual(model.get_parameter(row.name).detach())
            assert residual < (
                1e-6 if rule == "manifold_muon" or row.manifold == "frobenius" else 1e-2
            )  # bfloat16 msign
            assert 0 < found[row.name]["feas"] <= 1


def test_every_file_the_readme_names_exists():
    named = set(re.findall(r"\]\(([^)#:]+)\)", README)) | set(re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", README))
    assert {"optim/manifolds.py", "configs/assignment/", "results/demo/val_loss.png"} <= named
    written_by_runs = ("data/prepared/", "checkpoints/")
    assert [name for name in sorted(named) if not (ROOT / name).exists() and name not in written_by_runs] == []


def test_the_readme_says_nothing_of_the_layout_that_is_not_so():
    layout = README.split("## How the repository is laid out")[1].split("```")[1]
    rooms = re.findall(r"^(\S+)", layout, re.MULTILINE)
    assert len(rooms) >= 8 and all((ROOT / room).exists() for room in rooms)


# ---- what it claims ----


def result(name):
    return json.loads((ROOT / "results" / name).read_text())


def test_the_tables_of_the_front_are_those_that_scripts_wrote():
    blocks = dict(re.findall(r"<!-- table:(\w+) -->\n(.*?)<!-- /table -->", README, re.DOTALL))
    assert set(blocks) == {"demo", "demo_paper"}
    for name, text in blocks.items():
        table = ROOT / "results" / name / "table.md"
        assert text == (table.read_text() if table.exists() else "")


def test_the_order_on_the_front_is_that_of_the_table():
    claimed = re.search(r"orders the assignments\s+(.*?);", README, re.DOTALL)[1]
    rows = result("demo/table.json")["rows"]
    loss = {row["assignment"]: row.get("full_val_loss") or row["val_loss_final"] for row in rows}
    assert re.split(r"\s+<\s+", claimed) == sorted(loss, key=loss.get) and len(loss) == 5
    assert "Nothing became unstable here" in README and {row["status"] for row in rows} == {"ok"}


def test_how_the_rules_differ_on_the_front_is_what_the_tables_show():
    assert "What has DGram on attention ends lower than above, what has Stiefel there ends higher" in README
    ours, published = (
        {row["assignment"]: row["full_val_loss"] for row in result(f"{name}/table.json")["rows"]}
        for name in ("demo", "demo_paper")
    )
    lower = {name for name in ours if published[name] < ours[name]}
    assert {"All-DGram", "Hetero-Inv"} <= lower and not lower & {"All-Stiefel", "Hetero"}


def test_no_run_of_the_experiments_on_failing_attention_became_unstable():
    for name in ("instability_small", "published_failure", "published_horizon", "published_width"):
        assert {row["status"] for row in result(f"{name}/instability.json")["rows"]} == {"ok"}


def mean_loss(file, **wanted):
    losses = [
        r["val_loss_final"] for r in result(file)["rows"] if all(r[key] == value for key, value in wanted.items())
    ]
    return sum(losses) / len(losses)


CLAIMS = {  # numbers with decimals in the README's prose: what they say, and where it is known from
    "0.8": lambda: GPT(gpt_config(compose())).parameter_count() / 1e6,
    "0.5": lambda: compose().stability.max_rise,
    "2.386": lambda: mean_loss("crossing/table.json", assignment="unconstrained", residual="geonorm"),
    "2.433": lambda: mean_loss("crossing/table.json", assignment="unconstrained", residual="pre_norm"),
    "2.431": lambda: mean_loss("crossing/table.json", assignment="all_dgram", residual="geonorm"),
    "2.427": lambda: mean_loss("crossing/table.json", assignment="all_dgram", residual="pre_norm"),
    "2.660": lambda: mean_loss("residual_rules/table.json", residual="geonorm"),
    "2.389": lambda: mean_loss("residual_rules/table.json", residual="pre_norm"),
    "0.87": lambda: result("exponents/exponents.json")["rank_correlation"]["|λ_a|"],
    "0.39": lambda: result("exponents/exponents.json")["rank_correlation"]["|λ_g|"],
    "0.64": lambda: result("exponents/exponents.json")["rank_correlation"]["sum"],
}


def prose():
    """The README without tables, code, links and what stands after the experiments."""
    front = README.split("## What a run writes")[0]
    front = re.sub(
        r"```[\s\S]*?```|<!-- table[\s\S]*?<!-- /table -->|^\|.*$|\]\([^)]*\)|`[^`]*`", " ", front, flags=re.MULTILINE
    )
    return re.sub(r"arXiv [\d.]+|Python [\d.]+ to [\d.]+", " ", front)


def test_every_number_of_the_prose_is_checked():
    numbers = set(re.findall(r"\d+\.\d+", prose()))
    assert numbers == set(CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_number_of_the_prose_is_what_was_measured(claim):
    digits = len(claim.partition(".")[2])
    assert f"{CLAIMS[claim]():.{digits}f}" == claim


def test_geonorm_beats_pre_norm_with_three_assignments_of_four_under_muon():
    assert "GeoNorm beats pre-norm with three of the four assignments" in README
    wins = [
        mean_loss("crossing/table.json", assignment=a, residual="geonorm")
        < mean_loss("crossing/table.json", assignment=a, residual="pre_norm")
        for a in ("unconstrained", "all_stiefel", "all_dgram", "hetero")
    ]
    assert wins == [True, True, False, True]


def test_the_rounding_of_msign_is_what_is_told():
    torch.manual_seed(0)
    W = msign(torch.linalg.qr(torch.randn(1024, 256)).Q).float()
    error = torch.linalg.matrix_norm(W.T @ W - torch.eye(256)).item() / 16
    assert error == pytest.approx(5.6e-3, rel=0.05)
    assert (
        "| 2.2e-3 | 5.6e-3 |" in README
        and "5.6e-3 here, 2.2e-3 there" in (ROOT / "configs/optim/paper.yaml").read_text()
    )
