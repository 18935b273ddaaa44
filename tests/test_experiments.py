"""Experiments: what they run, what they refuse, and what a table says of it."""

import json
import math
import re
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SMALL

from model.residual import RESIDUAL_RULES
from scripts import experiment
from scripts.analysis import conduct
from scripts.analysis.conduct import Conductor, check_all
from scripts.analysis.tables import case
from scripts.command import UsageError
from training.config import compose
from training.validate import ConfigError

PNG = b"\x89PNG\r\n"
NAMES = experiment.experiment_names()


NEEDED = ["optimizer=AdamW,SGD,Muon,Hetero"]  # without the extra `baselines`
FEWER = {  # of many cases: every value of every axis costs a tenth of a second
    "exponents": ["init.attention_scale=1,3000", "init.mlp_residual_scale=1", "assignment=adamw,hetero"],
    "horizon": ["max_steps=250,16000"],
    "lr_transfer": ["optim.adamw.lr=0.01"],
    "solver_sweep": ["optim.muon.lr=0.02"],
}


def study(name, *arguments):
    """A study as the command line asks for it."""
    return experiment.study_of(experiment.load_experiment(name), arguments)[0]


# ---- the command ----


def test_experiments_are_listed_each_in_a_line(capsys):
    assert experiment.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES and all(len(line.split()) > 5 for line in lines)
    assert {"crossing", "exponents", "lr_transfer", "ngpt_speed", "residual_rules", "solver_sweep"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_data(name, capsys):
    lines = (ROOT / f"scripts/experiments/{name}.py").read_text().splitlines()
    assert len(lines) < 60
    fewer = NEEDED if name == "family" and not find_spec("pytorch_optimizer") else FEWER.get(name, ())
    found = study(name, *fewer)
    check_all(found)
    jobs = found.jobs(Path("out"))
    assert len({job.directory for _, job in jobs}) == len(jobs) == len(found.cases()) * len(found.seeds)
    assert experiment.main([name, "--help"]) == 0
    assert "seeds=" in (said := capsys.readouterr().out) and all(f"{axis}=" in said for axis in found.axes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["crosing"], "there is no experiment 'crosing'; did you mean crossing?"),
        (["zzz"], "choose one of blocks, collapses, crossing"),
        (["crossing", "seed=1"], "give seeds="),
        (["crossing", "assignment=", "seeds="], "assignment= is empty; give at least one value\nseeds= is empty"),
        (["ngpt_speed", "max_steps=50,foo"], "max_steps=foo: invalid literal"),
        (["crossing", "experiment=demo"], "by its name"),
        (["crossing", "resume=never"], "another output_dir="),
        (["crossing", "residaul=geonorm"], "residaul"),
        (["crossing", "residual=geonrm"], "geonorm"),
        (["crossing", "around=1"], "no axis"),
        (["crossing", "residual=geonorm", "max_steps=-1"], "max_steps is -1"),
        (["crossing", "workers=two"], "not a whole number"),
        (["crossing", "hydra.launcher.nodes=2"], "name that first"),
        (["mechanism", "remedy=nothing"], "there is no remedy 'nothing'; choose from none, qk_norm"),
        (["lr_transfer", "head=5"], "divisor"),
        (["lr_transfer", "around=16"], "a value for each of model.n_embd, model.n_layer, max_steps"),
        (["exponents", "models=0"], "models=0 must be at least 1"),
        (["horizon", "trials=0"], "trials=0 is too few"),
        (["horizon", "search_seeds="], "search_seeds= is empty"),
        (["crossing", "assignment=adamw", "residual=geonorm", "seeds=1,abc,-4"], "seed is 'abc'; give a whole number"),
        (["family", "optimizer=AdamW", "max_steps=2,foo", "seeds=1,-4"], "max_steps is 'foo'"),
        (["family", "optimizer=AdamW", "max_steps=2", "seeds=0,1"], "seeds= and search_seeds= both have 0"),
        (
            ["crossing", "results=/dev/null/x", "output_dir=/dev/null"],
            "results=/dev/null/x cannot be used, because /dev/null",
        ),
        (["why_hetero", "setting=c_fc"], "c_fc takes the best settings of hetero; add that to the values"),
    ],
)
def test_what_cannot_be_is_one_message_and_nothing_is_written(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert experiment.main(words) == 2
    out, err = capsys.readouterr()
    assert said in err and "Traceback" not in err and not out and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["family", "optim=adamw"],
            "optim=adamw cannot be given here: the axis `optimizer` decides it; give optimizer=",
        ),
        (
            ["family", "optimizer=SGD", "optim.matrices.lr=0.7"],
            "optim.matrices.lr=0.7 cannot be given here: the experiment searches it",
        ),
        (["family", "optimizer=AdamW,Muon", "optim.matrices={lr: 1}"], "the experiment searches it"),
        (["why_hetero", "setting=hetero,c_fc", "assignment.rules={attn: dgram}"], "the axis `setting` decides it"),
        (["crossing", "++assignment=hetero"], "the axis `assignment` decides it"),
        (["crossing", "assignment=hetero,adamw", "assignment.rules={mlp: adamw}"], "give assignment="),
        (["lr_transfer", "model.n_head=2"], "the experiment computes it for each case"),
        (
            ["blocks", "optim.muon.blocks=null", "assignment.name=x"],
            "give cut=\nassignment.name=x cannot be given here",
        ),
    ],
)
def test_what_the_cases_decide_cannot_be_given(words, said):
    with pytest.raises(UsageError) as refused:
        study(*words)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["crossing", "residual=geonorm", "residual.alpha=0.1", "optim=paper"],
        ["lr_transfer", "optim=paper", "optim.adamw.weight_decay=0"],
        ["ngpt_speed", "model.dropout=0", "model.block_size=64", "micro_batch_size=2"],
        ["mechanism", "optim.muon.lr=0.1", "max_steps=10"],
        ["family", "optim.adamw.betas=[0.9, 0.99]"],
    ],
)
def test_what_no_case_decides_can_be_given(words):
    assert study(*words).overrides


def test_a_launcher_that_is_not_installed_is_refused_with_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.command._is_installed", lambda plugin: False)
    words = ["crossing", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"]
    assert experiment.main(words) == 2 and list(tmp_path.iterdir()) == []
    assert "pip install -e '.[slurm]'" in capsys.readouterr().err


def test_a_column_of_no_axis_is_refused_with_the_axes():
    run = SimpleNamespace(case={"assignment": "hetero", "optim.muon.lr": "0.1"})
    assert case("lr", "optim.muon.lr").value(run) == "0.1"
    with pytest.raises(UsageError, match=r"a column has the axis lr; the axes are assignment, optim\.muon\.lr"):
        case("lr", "lr").value(run)


def test_an_experiment_in_a_new_file_is_found(tmp_path, monkeypatch, jobs_here, tiny_grid, capsys):
    (tmp_path / "scripts" / "experiments").mkdir(parents=True)
    file = tmp_path / "scripts" / "experiments" / "mine.py"
    file.write_text(
        "from scripts.analysis.study import Experiment\n"
        "from scripts.analysis.tables import FINAL, case\n"
        "EXPERIMENT = Experiment('Mine?', axes={'grad_clip': '0.5,1'}, columns=lambda study: [case('clip', 'grad_clip'), FINAL])\n"
    )
    monkeypatch.setattr(experiment, "__file__", str(tmp_path / "scripts" / "experiment.py"))
    monkeypatch.setattr("scripts.experiments.__path__", [str(file.parent)])
    assert experiment.experiment_names() == ["mine"]
    places = [f"output_dir={tmp_path}/runs", f"results={tmp_path}/results"]
    assert experiment.main(["mine", *tiny_grid, *SMALL, "max_steps=2", *places]) == 0
    assert "| clip | final |" in (tmp_path / "results/table.md").read_text()


# ---- cases ----


def test_cases_are_every_combination_and_seeds_come_last():
    found = study("crossing", "assignment=hetero,adamw", "residual=geonorm,ngpt", "seeds=3,4")
    assert [tuple(case.values()) for case in found.cases()] == [
        *(("hetero", "geonorm"), ("hetero", "ngpt"), ("adamw", "geonorm"), ("adamw", "ngpt")),
    ]
    names = [job.directory.name for _, job in found.jobs(Path("out"))]
    assert names[0] == "assignment=hetero,residual=geonorm,seed=3" and names[4].endswith("geonorm,seed=4")
    assert len(study("crossing").jobs(Path("out"))) == 36
    assert [case["residual"] for case in study("residual_rules").cases()] == list(RESIDUAL_RULES)


def test_axes_around_a_point_are_varied_one_at_a_time():
    found = study("lr_transfer", "optim.adamw.lr=0.01")
    cases = {tuple(case.values()): dict(case) for case in found.cases()}
    assert len(cases) == 3 * (3 + 2 + 3)
    jobs = {tuple(case.values()): job for case, job in found.jobs(Path("out"))}
    gpt, plain, cfg = (compose(jobs[arm, "128", "4", "200", "0.01"].overrides) for arm in ("gpt", "ngpt", "nugpt"))
    assert (cfg.model.n_embd, cfg.model.n_head, cfg.max_steps) == (128, 8, 200)
    assert cfg.transfer.base.n_embd == 64 and cfg.transfer.base_steps == 200
    assert replace(plain, transfer=cfg.transfer) == cfg
    assert (gpt.optim.adamw.weight_decay, gpt.grad_clip, gpt.schedule.warmup_steps) == (0.1, 1.0, 0.1)
    assert replace(gpt.model, unit_weights=True) == plain.model and gpt.assignment == plain.assignment
    away = study(
        "lr_transfer", "model.n_embd=128,256", "model.n_layer=8", "max_steps=600", "optim.adamw.lr=1", "arm=gpt"
    )
    sizes = [tuple(case.values())[1:4] for case in away.cases()]
    assert set(sizes) == {("128", "4", "200"), ("256", "4", "200"), ("64", "8", "200"), ("64", "4", "600")}


@pytest.mark.parametrize("name", NAMES)
def test_an_override_reaches_every_job(name):
    for setting, mode in (([], "disabled"), (["logger.mode=offline"], "offline")):
        jobs = study(name, *setting).jobs(Path("out"))
        assert {compose(job.overrides).logger.mode for _, job in (jobs[0], jobs[-1])} == {mode}
        assert {[word for word in job.overrides if word.startswith("logger.mode=")][-1] for _, job in jobs} == {
            f"logger.mode={mode}"
        }


# ---- the search ----


def test_the_first_trial_has_the_values_of_start(tmp_path, capsys):
    def first(arm, *words):
        found = experiment.study_of(experiment.load_experiment("horizon"), [f"arm={arm}", "max_steps=16000", *words])[0]
        return list(found.new_searches(found.cases()[0])[0].best.values())

    assert first("hetero") == ["0.05", "0.1"] and first("hetero", "start=0.0125") == ["0.0125", "0.1"]
    assert first("hetero", "start=0.1,0.1") == ["0.1", "0.1"] and first("all_stiefel", "start=0.1,0.2") == ["0.1"]
    several = experiment.study_of(experiment.load_experiment("horizon"), ["arm=hetero", "start=0.1/0.02,0.4"])[0]
    searches = several.new_searches({"arm": "hetero", "max_steps": "250"})
    assert [list(search.best.values()) for search in searches] == [["0.1", "0.1"], ["0.02", "0.4"]]
    several.found["hetero", "250"] = replace(searches[1], tried={(Fraction(-1), Fraction(0)): 2.0})
    # The next search goes on where the best of the two ended.
    [following] = several.new_searches({"arm": "hetero", "max_steps": "1000"})
    assert list(following.best.values()) == ["0.01", "0.4"]
    own = ["arm=hetero,all_stiefel", "workers=0", f"output_dir={tmp_path}/none"]
    wrong = dict.fromkeys(("0.1,x", "0", "0.1/-1"), "must be positive") | {"0.1/1,1,1": "has more values than"}
    for word, problem in wrong.items():
        assert experiment.main(["horizon", *own, f"start={word}"]) == 2
        assert f"start={word} {problem}" in capsys.readouterr().err


# ---- what is written ----

LESS = {  # of every experiment's lists, as little as draws a picture
    "blocks": ["cut=uncut,heads_whole", "seeds=1"],
    "collapses": ["model.skips=false", "mlp=none", "seeds=1"],
    "crossing": ["assignment=adamw,unconstrained", "residual=pre_norm,geonorm", "seeds=1,2", "target=100"],
    "family": ["optimizer=AdamW,Muon", "trials=1", "further_trials=0"],
    "geonorm_adamw": ["residual=geonorm", "trials=1", "seeds=1"],
    "horizon": ["arm=unconstrained,all_stiefel", "max_steps=2,4", "trials=1", "further_trials=1", "seeds=1,2"],
    "exponents": [
        *(f"init.{name}=1" for name in ("attention_scale", "mlp_residual_scale", "weight_scale")),
        *("init.attention_residual_scale=0.25,16", "assignment=adamw", "residual=pre_norm,post_norm,geonorm"),
        *("scan=2", "models=1", "assignments=hetero"),  # and little of what is measured without training
    ],
    "instability_one_gpu": [],
    "instability_small": ["optim.muon.lr=0.1", "optim=paper", "assignment=all_dgram,hetero"],
    "lr_transfer": [
        "arm=gpt,nugpt",
        "model.n_embd=16,32",
        "model.n_layer=1",
        "optim.adamw.lr=0.01,0.04",
        "around=16,1,4",
        "head=8",
        "seeds=1",
        "extensions=0",
    ],
    "mechanism": ["remedy=none,norm_cap", "assignment=all_dgram"],
    "ngpt_speed": ["around=nGPT,4", "trials=1", "further_trials=0", "seeds=1", "tokens=64"],
    "residual_rules": ["residual=ngpt"],
    "residual_tuned": ["optimizer=muon", "residual=geonorm_with_norms", "trials=1", "further_trials=0", "seeds=1"],
    "sphere_p": [
        "optimizer=muon",
        "residual=geodesic,learned",
        "trials=1",
        "further_trials=0",
        "seeds=1",
        "start=0.05,6/0.05,6",
    ],
    "solver_sweep": ["optim.muon.lr=0.02,0.05", "assignment=hetero", "seeds=1"],
    "stream_dtype": [],
    "why_hetero": ["setting=hetero,nothing,c_fc,mlp_c_proj", "trials=1", "seeds=1", "log.interval_spectra=2"],
}
TOLD = {  # what its table says
    "blocks": ["| Unconstrained | heads_whole |", "move c_attn equally far"],
    "collapses": ["| false | none | 1 |", "digits, start", "outside the embeddings' span"],
    "crossing": ["| 2 |", "steps to 100", "| Unconstrained | geonorm |"],
    "family": ["| 4 | Muon |", "minus AdamW", "state, bytes a parameter"],
    "geonorm_adamw": ["| adamw | geonorm |", "minus pre_norm", "minus geonorm", "turn, start"],
    "horizon": ["| 4 | all_stiefel |", "(edge)", "minus Unconstrained", "paired by seed"],
    "exponents": [
        *("| hetero |", "closed form", "paper's map", "Rank correlation of the final loss of 5 trained models"),
        *("| all | 5 | &#124;λ_a&#124; |", "lowest loss", "| adamw | post_norm |"),
    ],
    "instability_small": ["| paper | 0.1 | all_dgram |", "those of the last probe"],
    "lr_transfer": ["| νGPT | width | 32 |", "| +0.00 |", "Per doubling:"],
    "mechanism": ["| all_dgram | norm_cap |", "attention was restored by norm_cap"],
    "ngpt_speed": ["| 16 | nGPT |", "times fewer", "read at 4x", "paired by seed"],
    "residual_rules": ["| AdamW | ngpt |"],
    "residual_tuned": ["| muon | geonorm_with_norms |", "residual_scale 1", "minus pre_norm", "turn, end"],
    "sphere_p": ["| muon | learned |", "minus geodesic"],
    "solver_sweep": ["| Hetero | manifold_muon |", "Best against best", "ours − published"],
    "stream_dtype": ["| float32 | bfloat16 |", "changes the final loss by"],
    "why_hetero": [
        "| hetero | mlp.c_fc | dgram |",
        "From nothing to hetero",
        "of the two gains alone",
        "minus all_stiefel",
    ],
}


def test_every_experiment_is_run():
    assert {*TOLD, "instability_one_gpu", "speedrun_track3"} == {*NAMES}  # tests/test_docs.py runs these two


def trials_and_best_settings(data):
    """Equally many trials for each case, each after those of fewer steps, and runs at the best."""
    tried = {}
    for trial in data["trials"]:
        tried.setdefault((trial["arm"], trial["max_steps"]), []).append((trial["val_loss"], trial["optim.matrices.lr"]))
    assert len(tried) == 4 and {len(found) for found in tried.values()} == {2}  # the best of one is at an edge
    assert len(data["rows"]) == 8
    for row in data["rows"]:
        assert row["optim.matrices.lr"] == min(tried[row["arm"], row["max_steps"]])[1]
    assert tried["all_stiefel", "4"][0][1] == min(tried["all_stiefel", "2"])[1]


def planes_and_trained_networks(data):
    """The exponents over each plane, and beside the losses of the trained networks."""
    assert len(data["scan"]) == 3
    assert all(len(plane[f"angle_{way}"]) == 2 for plane in data["scan"] for way in ("synthetic", "closed", "paper"))
    assert all(math.isfinite(cell["loss"]) for cell in data["trained"])
    written = [(cell["init.attention_residual_scale"], cell["scaled"]) for cell in data["trained"]]
    assert sorted(written) == [("0.25", True), *[("1", False)] * 3, ("16", True)]
    assert set(data["rank_correlation"]) == {"|λ_a|", "|λ_g|", "sum"}


KNOWN = {"horizon": trials_and_best_settings, "exponents": planes_and_trained_networks}  # what its table.json must hold


@pytest.mark.parametrize("name", TOLD)
def test_an_experiment_writes_its_table_and_pictures_and_keeps_what_is_done(
    name, jobs_here, tiny_grid, tmp_path, capsys
):
    sized = [] if name == "lr_transfer" else [*SMALL[:3], "probe.interval=2"]
    places = [f"output_dir={tmp_path}/runs", f"results={tmp_path}/results"]
    warmup = [] if name in ("lr_transfer", "ngpt_speed") else [SMALL[3]]  # their arms decide it
    words = [*sized, *warmup, "max_steps=4", *LESS[name], *tiny_grid]
    assert experiment.main([name, *words, *places]) == 0
    table, data = (tmp_path / "results/table.md").read_text(), json.loads((tmp_path / "results/table.json").read_text())
    assert all(word in table for word in TOLD[name]), table
    assert f"python scripts/experiment.py {name}" in table and data["command"] in table.replace("`", "")
    runs = [run for run in (tmp_path / "runs").iterdir() if run.name != "trials"]
    assert len(data["rows"]) == len(runs) and all(row["val_loss_final"] > 1 for row in data["rows"])
    KNOWN.get(name, lambda data: None)(data)
    pictures = {p.name for p in (tmp_path / "results").glob("*.png")}
    assert pictures == set(experiment.load_experiment(name).figures)
    assert all((tmp_path / "results" / p).read_bytes().startswith(PNG) for p in pictures)
    before = {path: path.read_bytes() for path in tmp_path.glob("runs/*/metrics.jsonl")}
    capsys.readouterr()
    if name in ("crossing", "horizon"):
        assert experiment.main([name, *words, *places, "workers=0"]) == 0
    else:  # without measuring and drawing again
        again = study(name, *words)
        again.experiment = replace(again.experiment, measure=lambda study: {})
        assert Conductor(again, tmp_path / "runs", workers=0).run() == {}
    rounds = re.findall(r"(\d+) runs, (\d+) done before", capsys.readouterr().out)
    assert sum(int(done) for _, done in rounds) >= len(runs) and all(count == done for count, done in rounds)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("runs/*/metrics.jsonl")}


def test_with_no_workers_a_launcher_gets_no_job(tmp_path, capsys):
    places = [f"output_dir={tmp_path}/runs", f"results={tmp_path}/results", "hydra/launcher=basic"]
    assert experiment.main(["crossing", "workers=0", *places]) == 2
    assert "workers=0 trains nothing" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_cluster_may_have_what_this_machine_lacks(monkeypatch):
    def refuse(cfg):
        raise ConfigError(["there is no GPU here"])

    monkeypatch.setattr(conduct, "check", refuse)
    check_all(study("blocks"), here=False)
    with pytest.raises(ConfigError):
        check_all(study("blocks"))


def test_an_experiment_without_its_data_is_refused_before_the_first_run(tmp_path, capsys):
    words = ["data=text", "data.name=lost", f"data.dir={tmp_path}/lost"]
    assert experiment.main(["blocks", *words, f"output_dir={tmp_path}/runs", f"results={tmp_path}/results"]) == 2
    assert capsys.readouterr().err.count("there is no prepared data") == 1 and list(tmp_path.iterdir()) == []


def test_exponents_are_asked_of_assignments_that_exist(tmp_path, capsys):
    own = [f"output_dir={tmp_path}/runs", f"results={tmp_path}/results"]
    for words in (["assignments=adamw,hetro"], ["scan=-1"]):
        assert experiment.main(["exponents", *words, *own]) == 2
        assert "must be names of configs/assignment" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_table_that_cannot_be_written_leaves_the_runs_and_tells_the_remedy(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(experiment.Conductor, "run", lambda self: {})
    monkeypatch.setattr(experiment, "write", full)
    assert experiment.main(["crossing", f"output_dir={tmp_path}/runs", f"results={tmp_path}/results"]) == 2
    said = capsys.readouterr().err
    assert (
        f"{tmp_path}/results cannot be written" in said
        and "the same command with workers=0 and another results=" in said
    )


def test_any_spelling_of_skips_is_drawn(monkeypatch):
    """What train.py takes for true or false; the name of a curve depends on it after all training."""
    from scripts.experiments import collapses

    drawn = []
    monkeypatch.setattr(collapses, "collapse_curves", lambda panels, path: drawn.append(panels))
    profile = {key: [1.0] for key in collapses.PANELS}
    runs = {("4", word, "gelu"): [SimpleNamespace(directory=Path(word))] for word in ("True", "false")}
    facts = {"profiles": dict.fromkeys(("True", "false"), profile)}
    axes = {"model.n_layer": ["4"]}
    collapses.draw(SimpleNamespace(axes=axes, grouped=lambda *_: runs, facts=facts), Path("x.png"))
    assert list(drawn[0]["at initialisation, depth 4"]) == ["skips, MLP", "no skips, MLP"]


def test_where_no_run_has_ended_there_is_no_table(tmp_path, capsys):
    places = [f"output_dir={tmp_path}/runs", f"results={tmp_path}/results"]
    assert experiment.main(["crossing", "workers=0", *places]) == 2
    assert f"no run in {tmp_path}/runs came to its end" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
