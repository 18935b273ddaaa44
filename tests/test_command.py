"""The command line before a run: it starts fast, its help shows all there is, and a misspelt word gets what was meant."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from data import bench as data_bench
from data import prepare
from scripts import (
    bench,
    design_iterator,
    evaluate,
    experiment,
    gpu_runs,
    probe,
    report,
    reproduce,
    sample,
    watch,
)
from scripts.command import UsageError, parse
from training.command import run_command
from training.config import CONFIGS, compose, directory_name
from training.help import help_text
from training.overrides import REFUSALS, composed, group_choices, jobs_of, problems_of_words, swept_keys
from training.validate import ConfigError

SLOW = ["torch._dynamo", "torch._inductor", "pandas", "matplotlib", "datasets", "wandb", "hydra"]
PROGRAM = f"""
import json, runpy, sys
sys.argv = ["train.py", "--cfg", "job"]
try:
    runpy.run_path("{ROOT}/train.py", run_name="__main__")
except SystemExit as ended:
    assert ended.code == 0
without_a_job = [name for name in ("torch", "numpy") if name in sys.modules]
for name in [name for name in sys.modules if name.split(".")[0] in ("hydra", "training")]:
    del sys.modules[name]
import train
print(json.dumps([without_a_job, [name for name in {SLOW} if name in sys.modules]]))
"""


def test_no_command_imports_what_it_does_not_need():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "max_steps: 200" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == [[], []]


def test_help_shows_groups_choices_and_comments():
    text = help_text("About.")
    assert text.startswith("About.\n")
    settings = yaml.safe_load((CONFIGS / "config.yaml").read_text())
    for entry in settings["defaults"]:
        for group, default in entry.items() if isinstance(entry, dict) and " " not in next(iter(entry)) else ():
            shown = re.split(r"\n {0,2}\S", text.partition(f"\n  {group} ")[2])[0]
            assert f"{default}*" in shown
            assert all(choice in text for choice in group_choices(group))
    assert "seed: 1337                  # of the weights, the batches and dropout" in text
    assert "_shared" not in text
    of_optim = help_text("About.", ["optim=paper", "--help"])
    assert "optim=manifold_muon\n" in of_optim and "lr: 0.02              # peak" in of_optim


WRONG = {
    "max_stepz=3": "max_stepz is no setting; did you mean max_steps?",
    "assigment=hetero": "assigment is no setting; did you mean assignment?",
    "assignment=hetro": "assignment has no choice hetro; did you mean hetero?",
    "launcher=slurm": "launcher has no choice slurm; choose one of local",
    "optim.muon.lrr=0.1": "optim.muon.lrr is no setting; did you mean optim.muon.lr?",
    "lr=0.1": "lr is no setting; did you mean optim.muon.lr, optim.adamw.lr or optim.matrices.lr?",
    "warmup=3": "warmup is no setting; did you mean schedule.warmup_steps?",
    "nproc=2": "nproc is no setting; did you mean launcher.nproc?",
    "learning_rate=3": "learning_rate is no setting; did you mean optim.muon.lr or optim.adamw.lr?",
    "model.d_model=64": "model.d_model is no setting; did you mean model.n_embd?",
    "optim.muon.blocks.c_attn=3": "optim.muon.blocks.c_attn is no setting; write 'optim.muon.blocks={c_attn: 3}'",
    "assignment.rules.mlp.c_fc=dgram": "assignment.rules.mlp.c_fc is no rule of this assignment; rules of your own belong to",
    "assignment.rules={mlp.c_fc: dgram}": "assignment.rules={mlp.c_fc: dgram}: rules of your own belong to assignment=custom",
    "~foobar": "foobar is no setting; python train.py --help lists the settings",
    "foo=1": "foo is no setting; python train.py --help lists the settings",
    "average=null": "average has no choice null; choose one of ema, none, window",
    "attention=1": "attention has no choice 1; choose one of gated,",
    "optim.library.settings.eps=1e-6": "optim.library.settings.eps is not in the chosen file of configs/optim; "
    "write +optim.library.settings.eps=1e-6, beside an optimizer of a library, such as optim=sgd",
    "max_steps": "max_steps has no value; write max_steps=<value>",
    "optim.modular.lr=0.1": "optim.modular.lr is no setting here; it belongs to optim=modular",
    "optim.library.lr=0.1": "optim.library.lr is no setting here; it belongs to optim=adamw and optim=lion and optim=sgd",
    "seed=1,2": "seed=1,2 gives several values; add -m for a sweep, or put a list in brackets, or put text that has a comma "
    "in two kinds of quotes: \"seed='1,2'\"",
    "--seed=3": "--seed=3 is no option here; write it without dashes: seed=3",
    "-m": "-m is no option here; leave it out, or see --help",
    "name='a": "name='a cannot be read; put a value with spaces",
    "+seed=3": "Could not append to config. An item is already at 'seed'",
}


def test_all_misspelt_words_are_named_at_once_with_what_was_meant():
    found, rest = problems_of_words([*WRONG, "eval_interval=7", "schedule=wsd"])
    assert len(found) == len(WRONG) and set(rest) == {"eval_interval=7", "schedule=wsd", "seed=1"}
    for message in WRONG.values():
        assert any(problem.startswith(message) for problem in found), message
    assert problems_of_words(["optim.muon.rule.dual_steps=3"])[0] == [
        "optim.muon.rule.dual_steps is no setting here; it belongs to optim=paper"
    ]
    assert problems_of_words(["optim=paper", "optim.muon.rule.quality=high"])[0] == [  # adamw has it, without effect
        "optim.muon.rule.quality is no setting here; it belongs to optim=manifold_muon and optim=no_decay"
    ]
    assert problems_of_words(["seed=1,2", "assignment=hetero,adamw"], sweep=True)[0] == []
    assert problems_of_words(["data=text,books"], sweeps=False)[0] == [
        "data=text,books gives several values; give one of them"
    ]
    twice = "assignment.rules={attn: stiefel, mlp: dgram, attn: dgram}"
    assert problems_of_words(["assignment=custom", twice])[0] == ["assignment.rules has attn twice; keep one"]
    assert problems_of_words(["optim.muon.blocks={c_attn: 3, c_fc: 2}"])[0] == []
    assert problems_of_words(["hydra/launcher=basic", "seed=1"])[0] == []  # Hydra has choices that configs/ does not


@pytest.mark.parametrize("word", ["transfer=null", "experiment=1", "model=[null]", "hydra/launcher=null"])
def test_a_group_without_the_name_of_a_choice_is_a_mistake(word, train_here, capsys):
    group, _, value = word.partition("=")
    said = f"{group} has no choice {value.strip('[]')}; "
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose([word])
    done = train_here(word, "max_stepz=3")
    assert done.returncode == 2 and said in done.stderr and "max_stepz is no setting" in done.stderr
    if word == "transfer=null":
        done = train_here("--cfg", "job", word)
        assert done.returncode == 2 and said + "choose one of none, nu" in done.stderr
        assert prepare.main([word]) == 2 and said in capsys.readouterr().err


def test_a_library_optimizer_takes_settings_that_its_file_does_not_name():
    with pytest.raises(ConfigError, match=r"; write \+optim\.library\.settings\.dampening=0\.1$"):
        compose(["optim=sgd", "optim.library.settings.dampening=0.1"])
    library = compose(["optim=sgd", "+optim.library.settings.dampening=0.1"]).optim.library
    assert library.settings["dampening"] == 0.1


def test_an_interval_needs_a_sweeper_that_chooses_values(train_here):
    done = train_here("-m", "optim.muon.lr=interval(0.1,1)")
    assert done.returncode == 2 and done.stderr.startswith("optim.muon.lr=interval(0.1,1) needs a sweeper")
    assert "hydra/sweeper=optuna" in done.stderr and "list the values: optim.muon.lr=0.1,1\n" in done.stderr


def test_a_sweep_has_one_name(train_here, tmp_path):
    done = train_here("-m", "seed=1,2", "sweep.name=a,b")
    assert done.returncode == 2 and done.stderr.startswith("sweep.name=a,b gives several names; a sweep has one")
    assert not list(tmp_path.iterdir())


def test_words_with_dashes_are_answered_with_the_command_that_was_meant(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--cfg", "job", "--max_steps=5", "seed=1", "--assignment=hetero"])
    assert run_command("About.") == 2
    said = "--max_steps=5 --assignment=hetero: write settings without dashes, behind the options: "
    meant = "python train.py --cfg job max_steps=5 seed=1 assignment=hetero"
    assert capsys.readouterr() == ("", f"{said}{meant}\n")


def test_wrong_values_are_named_together_with_misspelt_words():
    with pytest.raises(ConfigError) as caught:
        compose(["max_stepz=3", "device=gpu", "model=demmo"])
    assert [problem.split()[0] for problem in caught.value.problems] == ["model", "max_stepz", "device"]


def test_options_of_scripts_are_not_misspelt():
    assert parse(["a=1,b=2/seed=3", "workers=2", "seed=4"], {"workers": 1, "seeds": ""})[0] == [
        "a=1,b=2/seed=3",
        "seed=4",
    ]
    with pytest.raises(UsageError, match=r"worker= is no option; did you mean workers=\?\nsedes= .* seeds=\?"):
        parse(["worker=2", "sedes=1"], {"workers": 1, "seeds": ""})
    with pytest.raises(UsageError, match=r"target=nan is not a number; give one, such as target=3\.5"):
        parse(["target=nan"], {"target": 3.5})
    for word in ("seeds=3", "optim.muon.lr=1"):
        with pytest.raises(UsageError, match=f"--{word} is no option; write it without dashes: {word}"):
            parse([f"--{word}"], {"seeds": ""}, overrides=True)
    for word in ("optim.muon.lr=1", "device=cpu"):  # of a script that takes no settings
        with pytest.raises(UsageError, match=f"--{word} is no option; choose of seeds=, without dashes"):
            parse([f"--{word}"], {"seeds": ""})
    with pytest.raises(UsageError, match="--foo=3 is no option; choose of seeds=, workers=, without dashes"):
        parse(["--foo=3"], {"seeds": "", "workers": 1})


def test_options_are_told_from_paths_that_hold_an_equals_sign():
    others, options = parse(["outputs/sweep/seed=1", "seed=2", "prompt=a=b"], {"seed": 0, "prompt": ""})
    assert others == ["outputs/sweep/seed=1"] and options == {"seed": 2, "prompt": "a=b"}
    with pytest.raises(UsageError, match="not a number"):
        parse(["temperature=hot"], {"temperature": 1.0})


def test_true_and_false_are_the_values_of_a_switch():
    assert parse(["once=true"], {"once": False})[1] == {"once": True} and parse([], {"once": True})[1] == {"once": True}
    assert parse(["once=false"], {"once": True})[1] == {"once": False}
    with pytest.raises(UsageError, match="once=1 must be true or false, such as once=true"):
        parse(["once=1"], {"once": False})


def test_a_sweep_knows_its_jobs_and_gives_them_short_names():
    words = ["-m", "max_steps=9", "seed=1,2", "optim.muon.lr=range(1,4)", "residual=glob(*)"]
    assert swept_keys(words) == ["seed", "optim.muon.lr", "residual"]
    assert jobs_of(words) is jobs_of(["optim.muon.lr=interval(0,1)"]) is None
    jobs = jobs_of([*words[:-1], "hydra.job.chdir=false"])
    assert jobs[1] == ("seed=1,optim.muon.lr=2", ["max_steps=9", "seed=1", "optim.muon.lr=2"]) and len(jobs) == 6
    job = "max_steps=9,model.n_embd=16,optim.muon.lr=0.1,seed=1"
    assert directory_name("optim.muon.lr=0.1,seed=1", "optim.muon.lr seed") == "lr=0.1,seed=1"
    named = directory_name(job, "optim.muon.lr seed")
    assert named.startswith("lr=0.1,seed=1,") and len(named) == len("lr=0.1,seed=1,") + 8
    others = [job.replace("max_steps=9", "max_steps=8"), job.replace("seed=1", "seed=2")]
    assert len({named, *(directory_name(other, "optim.muon.lr seed") for other in others)}) == 3
    both = directory_name("optim.adamw.lr=1,optim.muon.lr=2", "optim.adamw.lr optim.muon.lr")
    assert both == "optim.adamw.lr=1,optim.muon.lr=2"
    rules = "assignment.rules={attn: stiefel, mlp: dgram},seed=1"
    assert directory_name(rules, "assignment.rules seed").startswith("rules={attn: stiefel"[:6])


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (sample.main, ["run", "temperature=inf"], "temperature=inf must be 0, or from 1e-6 to 1e6"),
        (sample.main, ["run", "seed=-1"], "seed=-1 must be at least 0 and below 2^63"),
        (sample.main, ["run", f"seed={10**23}"], "and below 2^63"),
        (probe.main, ["run", "figures=/dev/null"], "figures=/dev/null cannot be used, because /dev/null is a file"),
        (reproduce.main, ["results=/dev/null/x"], "results=/dev/null/x cannot be used, because /dev/null is a file"),
        (
            evaluate.main,
            ["run", "limit=5", "task_folder=x"],
            "limit= is for tasks; name some with tasks=\ntask_folder=",
        ),
        (report.main, ["run", "live=maybe"], "live=maybe must be true or false"),
        (bench.main, ["optimizer", "foo=3"], "foo=3 is no option; choose of layers="),
        (bench.main, ["profile", "traces=/dev/null"], "traces=/dev/null cannot be used"),
        (bench.main, ["counts", "layers=2"], "layers=2 has no effect: counts takes results=, file=; leave it out"),
        (
            bench.main,
            ["optimizer", "assignments=adamw"],
            "optimizer takes layers=, width=, repeats=, limit_s=, results=",
        ),
        (bench.main, ["ceilings", "repeats=-1"], "repeats=-1 is below 0"),
        (bench.main, ["memory", "measured=2,a"], "a is no number of ranks"),
        (bench.main, ["memory", "measured=0"], "0 is no number of ranks"),
        (bench.main, ["counts", "results=/dev/null/x"], "results=/dev/null/x cannot be used"),
        (bench.main, ["counts", "file=a/b"], "file=a/b must be a name without a folder"),
        (gpu_runs.main, ["folder=runs", "results=/dev/null"], "results=/dev/null cannot be used"),
        (
            report.main,
            ["run", "live=true", "page=x"],
            "page=x has no effect: live=true serves the page and writes no file",
        ),
        (report.main, ["run", "live=true", "figures=x"], "figures=x has no effect"),
        (report.main, ["run", "port=8000"], "port=8000 has no effect: it is for live=true"),
        (design_iterator.main, ["name=cans", "steps=9"], "steps=9 has no effect: a named list has its own steps"),
        (
            design_iterator.main,
            ["name=cans", "cushion=0.02"],
            "cushion=0.02 has no effect: a named list is not computed",
        ),
        (design_iterator.main, ["l=0.1", "r=0.1", "cushion=0.02"], "with l= and r=, no interval is taken"),
        (watch.main, ["run", "stalled_s=-5"], "stalled_s=-5.0 is no time without news"),
        (experiment.main, ["crossing", "trials=3"], "trials=3 has no effect: this experiment searches nothing"),
        (experiment.main, ["crossing", "workers=-1"], "workers=-1 is below 0"),
        (experiment.main, ["family", "further_trials=-3"], "further_trials=-3 is below 0; 0 adds no trials"),
        (experiment.main, ["lr_transfer", "extensions=-1"], "extensions=-1 is below 0; 0 extends no axis"),
        (experiment.main, ["crossing", "hydra/launcher=null"], "hydra/launcher has no choice null; give a name"),
        (data_bench.main, ["/nowhere"], "there is no file /nowhere"),
    ],
)
def test_a_mistake_is_one_message_before_anything_is_read(main, words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert said in err and "Traceback" not in err and not out and not list(tmp_path.iterdir())


def test_the_measurement_of_data_has_help(capsys):
    assert data_bench.main(["--help"]) == 0 and "python -m data.bench <file of text>" in capsys.readouterr().out


LISTS = [
    [],
    ["assignment=custom", "assignment.rules={attn: stiefel, mlp: dgram}", "seed=3"],
    ["optim=paper", "optim.muon.lr=0.1", "optim.muon.radius={mlp: 2.5}", "optim.muon.lr=1e-2"],
    ["experiment=crossing", "residual=geonorm", "residual.decay=none", "output_dir=a", "average=ema"],
    ["data=text", "data.files=[a.txt,b.txt]", "schedule.warmup_steps=0.4", "name=null", "output_dir='x ${seed}'"],
    ["+optim.library.settings.eps=1e-6", "optim=adamw", "~name", "optim.library.settings.betas=[.5,.9]"],
    ["hydra/launcher=basic", "hydra.job.name=x", "seed=1"],
    *([word, "seed=2"] for word in ("nope=1", "assignment=nope", "seed=1,2", "optim.muon.lr.x=1", "seed={a: 1}")),
    ["optim.muon.radius={mlp: 2}", "optim.muon.radius={attn: 1}"],
]


@pytest.mark.parametrize("words", LISTS)
def test_what_is_composed_quickly_is_what_hydra_composes(words):
    def outcome(compose_words):
        try:
            return OmegaConf.to_yaml(compose_words())
        except REFUSALS as error:
            return type(error), str(error)

    def by_hydra():
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra_compose("config", words)

    for _ in range(2):  # composed, then from what was kept
        assert outcome(lambda: composed(words)) == outcome(by_hydra)


def test_a_changed_file_is_composed_anew(tmp_path, monkeypatch):
    before = composed(["seed=2"]).eval_interval
    configs = shutil.copytree(CONFIGS, tmp_path / "configs")
    monkeypatch.setattr("training.overrides.CONFIGS", configs)
    assert composed(["seed=2"]).eval_interval == before
    file = configs / "config.yaml"
    file.write_text(file.read_text() + "\nanother: 1\n")
    assert composed(["seed=2"]).another == 1
