"""The commands that a person types: the table is what the runs wrote, whatever happened to them."""

import json
import platform
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import ROOT

from model.gpt import GPT
from scripts import export, report, reproduce, sample
from scripts.analysis import tables
from scripts.analysis.runs import load_model, read_run
from scripts.command import UsageError
from training.build import gpt_config
from training.config import compose
from training.log import RunLog, read_records

ASSIGNMENTS = ["unconstrained", "all_stiefel", "all_dgram", "hetero", "hetero_inv"]
NAMES = ["Unconstrained", "All-Stiefel", "All-DGram", "Hetero", "Hetero-Inv"]
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def tiny_runs(tiny_data):
    """Overrides of five runs that take about a second together."""
    return [
        *tiny_data,
        *("model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "max_steps=4"),
        *("global_batch_tokens=64", "micro_batch_size=4", "eval_interval=2", "eval_windows=4"),
        *("schedule.warmup_steps=1", "log.interval=1", "log.interval_spectra=2", "checkpoint.interval=2", "device=cpu"),
    ]


@pytest.fixture(scope="module")
def finished(tiny_runs, tmp_path_factory):
    """A directory in which the command has been run, and its arguments."""
    where = tmp_path_factory.mktemp("reproduce")
    arguments = ["scale=demo", *tiny_runs, f"results={where}/results", f"output_dir={where}/runs"]
    readme = (ROOT / "README.md").read_bytes()
    assert reproduce.main(arguments) == 0
    assert (ROOT / "README.md").read_bytes() == readme, "only accepting may renew the README"
    return where, arguments


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the pictures, which take longer than the runs."""
    monkeypatch.setattr(reproduce, "draw", lambda groups, directory: [])


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it to do harm to; the arguments name the copy."""
    where, arguments = finished
    shutil.copytree(where, tmp_path / "copy")
    return tmp_path / "copy", [a.replace(str(where), str(tmp_path / "copy")) for a in arguments]


def rows(where):
    return {row["assignment"]: row for row in json.loads((where / "results/table.json").read_text())["rows"]}


def without_last_half(run):
    """As if the run had been killed between step 2 and its end."""
    shutil.rmtree(run / "checkpoints/step_00000004")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["kind"] != "end"))


# ---- reproduce ----


def test_the_table_is_what_the_runs_wrote(finished):
    where, _ = finished
    table = rows(where)
    assert list(table) == NAMES
    geometries = [("-", "-"), ("stiefel", "stiefel"), ("dgram", "dgram"), ("stiefel", "dgram"), ("dgram", "stiefel")]
    assert [(r["attention"], r["mlp"]) for r in table.values()] == geometries
    assert [r["paper_val_loss"] for r in table.values()] == ["3.3855", "3.3679", "unstable", "3.3544", "unstable"]
    for assignment, row in zip(ASSIGNMENTS, table.values()):
        run = where / "runs" / assignment
        losses = [r["loss"] for r in read_records(run, "eval")]
        assert len(losses) == 3 and row["val_loss_best"] == min(losses) and row["val_loss_final"] == losses[-1]
        [full] = read_records(run, "full_eval")
        assert row["full_val_loss"] == full["loss"]
        for key, part in (("sigma_max_attention", ".attn."), ("sigma_max_mlp", ".mlp.")):
            last = [r for r in read_records(run, "spectra") if part in r["name"] and r["step"] == 4]
            assert row[key] == max(max(r["sigma"]) for r in last)
        assert row["status"] == "ok"
    assert table["All-Stiefel"]["sigma_max_mlp"] == pytest.approx(1, abs=0.02)


def test_the_table_says_what_wrote_it(finished):
    where, _ = finished
    text = (where / "results/table.md").read_text()
    lines = text.splitlines()
    assert [re.split(r" *\| *", line)[1] for line in lines[2:7]] == NAMES
    best = rows(where)["Hetero"]["val_loss_best"]
    assert f"{best:.4f}" in lines[5] and "3.3544" in lines[5]
    for said in (
        "reproduce.py scale=demo",
        "max_steps=4",
        "1 layers of width 16",
        "5 runs",
        "GiB peak memory",
        "cores",
        "full split, that of the whole validation split",
        "Weight decay 0.1 acts on unconstrained matrices and DGram's column norms",
    ):
        assert said in text
    assert platform.python_version() in text and torch.__version__ in text
    data = json.loads((where / "results/table.json").read_text())
    assert 50e6 < data["cost"]["peak_bytes"] < 64e9 and 0 < data["cost"]["wall_seconds"] < 600
    assert data["settings"]["max_steps"] == 4 and data["environment"]["torch"] == torch.__version__


def test_the_pictures_are_small(finished):
    where, _ = finished
    for name in ("val_loss.png", "spectra.png", "layers.png"):
        data = (where / "results" / name).read_bytes()
        assert data.startswith(PNG) and 5_000 < len(data) < 150_000


def test_a_second_call_trains_nothing(copied, no_pictures, capsys):
    where, arguments = copied
    before = {path: path.read_bytes() for path in where.glob("runs/*/*.json*")}
    table = (where / "results/table.md").read_text()
    assert reproduce.main(arguments) == 0
    assert {path: path.read_bytes() for path in where.glob("runs/*/*.json*")} == before
    assert (where / "results/table.md").read_text() == table
    assert capsys.readouterr().out.count("done before") == 5


def test_an_interrupted_run_ends_like_the_others(copied, no_pictures):
    where, arguments = copied
    before = rows(where)
    seconds = json.loads((where / "results/table.json").read_text())["cost"]["wall_seconds"]
    without_last_half(where / "runs/hetero")
    shutil.rmtree(where / "runs/all_dgram/checkpoints")  # killed before its first checkpoint
    without_end = where / "runs/all_dgram/metrics.jsonl"
    without_end.write_text(without_end.read_text().splitlines(keepends=True)[0])
    assert reproduce.main(arguments) == 0
    after = rows(where)
    assert all({**after[n], "directory": ""} == {**before[n], "directory": ""} for n in NAMES)
    assert [r["step"] for r in read_records(where / "runs/all_dgram", "eval")] == [0, 2, 4]
    assert json.loads((where / "results/table.json").read_text())["cost"]["wall_seconds"] > seconds


def test_an_unstable_run_is_a_row(tiny_runs, tmp_path, no_pictures, capsys):
    wild = ["optim.adamw.lr=30", "grad_clip=null", f"results={tmp_path}/results", f"output_dir={tmp_path}/runs"]
    assert reproduce.main([*tiny_runs, *wild]) == 0
    table = rows(tmp_path)
    for name in NAMES:
        assert re.fullmatch(r"unstable at step [24]", table[name]["status"])
        assert table[name]["val_loss_best"] < 7
    assert "unstable at step" in (tmp_path / "results/table.md").read_text()
    assert capsys.readouterr().out.count("unstable at step") == 5


def test_a_run_that_stops_by_an_error_is_a_row_and_can_be_mended(copied, monkeypatch, no_pictures, capsys):
    where, arguments = copied
    before = rows(where)
    without_last_half(where / "runs/hetero")
    shutil.rmtree(where / "runs/hetero_inv")

    def broken(cfg, directory):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("train.train", broken)
        assert reproduce.main(arguments) == 1
    table = rows(where)
    assert table["Hetero"]["status"] == "failed at step 4" and table["Hetero-Inv"]["status"] == "failed at step 0"
    assert table["Hetero-Inv"]["val_loss_best"] is None and table["All-DGram"]["status"] == "ok"
    assert "hetero stopped by an error: RuntimeError: out of memory" in capsys.readouterr().err
    assert reproduce.main(arguments) == 0
    assert {n: r["status"] for n, r in rows(where).items()} == dict.fromkeys(NAMES, "ok")
    assert rows(where)["Hetero"]["val_loss_final"] == before["Hetero"]["val_loss_final"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("scale=moon", "demo"),
        ("max_stepz=4", "max_stepz"),
        ("optim=moon", "paper"),
        ("model.n_head=3", "n_embd=16 is not divisible"),
        ("data.dir=/nowhere/at/all", "prepare"),
        ("assignment=hetero", "python train.py"),
        ("experiment=paper", "scale="),
        ("resume=never", "output_dir="),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(tiny_runs, tmp_path, capsys, bad, said):
    arguments = [*tiny_runs, f"results={tmp_path}/results", f"output_dir={tmp_path}/runs", bad]
    assert reproduce.main(arguments) == 2
    out, err = capsys.readouterr()
    assert said in err and "Traceback" not in err and not out
    assert list(tmp_path.iterdir()) == []


def test_runs_of_other_settings_are_not_overwritten(copied, capsys):
    where, arguments = copied
    before = (where / "runs/unconstrained/metrics.jsonl").read_bytes()
    assert reproduce.main([*arguments, "max_steps=6"]) == 2
    err = capsys.readouterr().err
    assert "max_steps: 4 → 6" in err and "output_dir=" in err
    assert (where / "runs/unconstrained/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "name", "directory"),
    [
        ([], "demo", "demo"),
        (["optim=paper"], "demo_paper", "demo_paper"),
        (["logger.mode=offline"], "demo", "demo"),
        (["optim=paper", "logger.mode=offline"], "demo_paper", "demo_paper"),
        (["seeds=2"], None, "demo"),
        (["optim=paper", "seeds=2"], None, "demo_paper"),
    ],
)
def test_a_table_is_named_after_scale_and_step_rule(overrides, name, directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs of the checkout are none of its business
    monkeypatch.setattr(reproduce, "require_data", lambda cfg, begins: None)
    plan = reproduce.make_plan(["scale=demo", *overrides])
    assert plan.name == name and str(plan.results) == f"outputs/reproduce/{directory}"
    assert plan.committed == (None if name is None else ROOT / "results" / name)
    for assignment, job in plan.jobs.items():
        assert str(job.directory) == f"outputs/reproduce/{directory}/{assignment}"
        cfg = compose(job.overrides)
        assert cfg.optim.muon.rule.kind == ("published" if "optim=paper" in overrides else "certified")
        assert cfg.logger.mode == ("offline" if "logger.mode=offline" in overrides else "disabled")


def test_every_seed_has_its_runs_and_one_spelling(monkeypatch):
    monkeypatch.setattr(reproduce, "require_data", lambda cfg, begins: None)
    plan = reproduce.make_plan(["scale=demo", "seeds=3,4"])
    assert next(iter(plan.jobs)) == "unconstrained,seed=3" and list(plan.jobs)[-1] == "hetero_inv,seed=4"
    assert len(plan.jobs) == 10 and "seed=4" in plan.jobs["hetero,seed=4"].overrides
    assert plan.command == "python scripts/reproduce.py scale=demo seeds=3,4"
    with pytest.raises(UsageError, match="give seeds="):
        reproduce.make_plan(["scale=demo", "seed=2"])


def plain_plan(arguments, monkeypatch, **changes):
    """The plan of these arguments as if they were no more than a scale."""
    made = reproduce.make_plan(arguments)
    monkeypatch.setattr(reproduce, "make_plan", lambda _: replace(made, name="demo_paper", **changes))


def test_accepting_writes_results_and_every_page_that_shows_the_table(
    copied, tmp_path, monkeypatch, no_pictures, capsys
):
    where, arguments = copied
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    old = {name: f"<!-- table:{name} -->\nold\n<!-- /table -->\n" for name in ("demo", "demo_paper")}
    (tmp_path / "docs").mkdir()
    pages = [tmp_path / "README.md", tmp_path / "docs/experiments.md"]
    for page in (*pages, tmp_path / "docs/other.md"):
        page.write_text("".join(old.values()) if page in pages else "no table\n")
    plain_plan(arguments, monkeypatch)
    assert reproduce.main(arguments) == 0
    assert not (tmp_path / "results").exists() and pages[0].read_text() == "".join(old.values())
    assert "difference" not in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    plain_plan(arguments, monkeypatch, accept=True)
    assert reproduce.main(arguments) == 0
    table = (where / "results/table.md").read_text()
    assert "| Hetero-Inv |" in table and (tmp_path / "results/demo_paper/table.md").read_text() == table
    assert all(page.read_text() == old["demo"] + old["demo_paper"].replace("old\n", table) for page in pages)
    assert "accepted: results/demo_paper, README.md, docs/experiments.md" in capsys.readouterr().out
    committed = tmp_path / "results/demo_paper/table.json"
    data = json.loads(committed.read_text())
    data["rows"][0]["val_loss_final"] -= 0.25
    committed.write_text(json.dumps(data))
    plain_plan(arguments, monkeypatch)
    assert reproduce.main(arguments) == 0
    said = capsys.readouterr().out
    assert "beside results/demo_paper" in said and said.count("+0.2500") == 1 and said.count("+0.0000") == 4


def test_the_foot_says_what_decays():
    for optim, said in (("manifold_muon", "and DGram's column norms"), ("paper", "only, as in the paper")):
        assert reproduce.decay_of(compose([f"optim={optim}"]).plain()).endswith(said)
    assert reproduce.decay_of(compose(["optim.matrices.weight_decay=0.5"]).plain()).startswith("0.5 acts on")
    everywhere = compose(["optim=paper", "optim.muon.rule.decay_manifolds=true"]).plain()
    assert reproduce.decay_of(everywhere).endswith("; on other manifolds it makes the step longer")


def test_a_column_that_no_run_fills_is_left_out(finished, tmp_path):
    runs = [read_run(path) for path in sorted((finished[0] / "runs").iterdir())]
    assert {c.key for c in tables.columns_with_values(tables.COLUMNS, runs)} == {c.key for c in tables.COLUMNS}
    written_run(tmp_path / "run", runs[0].config, [5.0, 4.0])
    assert "full_val_loss" not in {
        c.key for c in tables.columns_with_values(tables.COLUMNS, [read_run(tmp_path / "run")])
    }


def test_make_reproduce_passes_options_on():
    words = [
        "make",
        "--no-print-directory",
        "-n",
        "-o",
        ".venv/installed.lock",
        "reproduce",
        "OPTIONS=logger.mode=offline",
    ]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip() == ".venv/bin/python scripts/reproduce.py scale=demo logger.mode=offline"


# ---- report ----


def written_run(directory, config, losses, **changes):
    """A run's directory with the given validation losses, a configuration and no end."""
    config = json.loads(json.dumps(config))
    for key, value in changes.items():
        *path, last = key.split(".")
        place = config
        for part in path:
            place = place[part]
        place[last] = value
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    log = RunLog(directory)
    for step, loss in enumerate(losses):
        log.write("eval", step, loss=loss)
    log.close()


def test_runs_that_differ_in_the_seed_alone_share_a_line(finished, tmp_path, capsys):
    config = read_run(finished[0] / "runs/hetero").config
    for seed, final in ((1, 2.0), (2, 2.3), (3, 2.6)):
        written_run(tmp_path / f"seed={seed}", config, [5.0, final], seed=seed)
    written_run(tmp_path / "hot", config, [5.0, 4.0], **{"optim.muon.lr": 0.5})
    assert report.main([str(tmp_path), "page=none"]) == 0
    _, hot, seeds = capsys.readouterr().out.splitlines()
    assert hot.split()[-1] == "1" and "0.5" in hot and "4.0000" in hot
    # mean 2.3; the standard error of 2.0, 2.3, 2.6 is 0.3/√3
    assert seeds.split()[-1] == "3" and "2.3000 ± 0.1732" in seeds
    assert "unfinished at step 1" in seeds and "1/4" in seeds


def test_report_draws_what_there_is(finished, tmp_path, capsys):
    where, _ = finished
    assert (
        report.main(
            [str(where / "runs/hetero"), str(where / "runs"), f"figures={tmp_path}/new", f"page={tmp_path}/page.html"]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 5 + 3 + report.has_library(), "a run named twice is one run"
    assert (tmp_path / "new/val_loss.png").read_bytes().startswith(PNG)
    assert (tmp_path / "new/val_loss.png").read_bytes() == (where / "results/val_loss.png").read_bytes()


# ---- sample and export ----


def test_a_sample_is_a_function_of_its_seed(finished, capsys):
    run = str(finished[0] / "runs/hetero")
    texts = []
    for arguments in (["seed=1"], ["seed=1"], ["seed=2"], ["temperature=0", "seed=1"], ["temperature=0", "seed=2"]):
        assert sample.main([run, "prompt=line 1 = ", "tokens=30", "top_k=0", *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[3] == texts[4]
    assert all(text.startswith("line 1 = ") for text in texts)


def test_an_export_holds_the_model_under_the_names_of_nanogpt(finished, tmp_path, capsys):
    run = finished[0] / "runs/hetero"
    assert export.main([str(run), str(tmp_path / "gpt.pt")]) == 0
    assert "GPTConfig(n_layer=1" in capsys.readouterr().out
    state = torch.load(tmp_path / "gpt.pt", weights_only=True)
    layer = "transformer.h.0."
    assert set(state) == {
        *("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "lm_head.weight"),
        *(layer + n for n in ("ln_1.weight", "ln_2.weight", "attn.c_attn.weight", "attn.c_proj.weight")),
        *(layer + n for n in ("mlp.c_fc.weight", "mlp.c_proj.weight")),
    }
    model, cfg, step = load_model(run)
    fresh = GPT(gpt_config(cfg))
    fresh.load_state_dict(state)
    x = torch.arange(10)[None]
    assert step == 4 and torch.equal(fresh(x)[0], model(x)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["gpt.pt"]


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (report.main, [], "name runs"),
        (report.main, ["{tmp}/none"], "there is no directory"),
        (report.main, ["{tmp}"], "no run in"),
        (report.main, ["{runs}/hetero", "figures={runs}/hetero/config.yaml"], "cannot be written"),
        (sample.main, ["{tmp}/none"], "there is no run"),
        (sample.main, ["{tmp}"], "no checkpoint in"),
        (sample.main, ["{runs}/hetero", "tokens=many"], "not a whole number"),
        (sample.main, ["{runs}/hetero", "temperature=-1"], "must be 0, or from 1e-6"),
        (sample.main, ["{runs}/hetero", "temprature=1"], "temperature="),
        (export.main, ["{runs}/hetero"], "the file to write"),
        (export.main, ["{tmp}/none", "{tmp}/gpt.pt"], "there is no run"),
        (export.main, ["{runs}/hetero", "{tmp}/none/gpt.pt"], "existing directory"),
    ],
)
def test_bad_paths_and_values_are_one_message(finished, tmp_path, capsys, main, arguments, said):
    places = {"tmp": tmp_path, "runs": finished[0] / "runs"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert said in err and "Traceback" not in err and not out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("main", [report.main, sample.main, export.main, reproduce.main])
def test_help_is_shown(main, capsys):
    assert main(["--help"]) == 0 and "python scripts/" in capsys.readouterr().out
