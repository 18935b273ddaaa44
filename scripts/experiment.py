"""Run an experiment: all its cases with every seed, then its table and pictures.

    python scripts/experiment.py                                        lists the experiments
    python scripts/experiment.py crossing                               with the values of its file
    python scripts/experiment.py crossing seeds=1,2,3 workers=2 assignment=hetero,adamw max_steps=1000
    python scripts/experiment.py crossing hydra/launcher=submitit_slurm hydra.launcher.partition=gpu        on a cluster
    python scripts/experiment.py crossing --help                        its axes and options

An experiment is a file of scripts/experiments. Options of every experiment:

    <axis>=       the values of an axis, a list with commas
    seeds=        a list with commas
    around=       for axes that are varied one at a time: the value of each while another one is varied, in their order
    trials=       for experiments that search their settings: how many trials each case has; search_seeds= is their seed, or a list;
                  further_trials=: how many more a case gets while its best settings are at an edge of what was tried;
                  start=: the values of the first trial, a list with commas in the order of the searched settings; with a slash
                  between several starts, a search from each, of which the best counts
    extensions=   for experiments that extend an axis: how often it gets further values where a best value is at an end; 0: never
    workers=      how many runs at a time; 0 trains nothing and makes the table of the runs that have ended
    output_dir=   where the runs are written (outputs/<name>)
    results=      where table.md, table.json and the pictures are written (results/<name>)

Every other word is an override of train.py for every run. Finished runs are kept, and the same command continues an interrupted
experiment. The runs use this machine, unless hydra/launcher= names another of Hydra's launchers; hydra.launcher.<option>= are its options.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.analysis.conduct import Conductor, write
from scripts.analysis.decided import refuse_decided
from scripts.analysis.optima import EXTEND_OPTIONS
from scripts.analysis.search import SEARCH_OPTIONS
from scripts.analysis.study import Experiment, Study
from scripts.command import ROOT, UsageError, command_line, entries, parse, refuse, refuse_keys, run, without_effect
from training.command import refusal
from training.overrides import hint, refuse_values_for_groups
from training.validate import problems_of_directory

EXPERIMENT_KEYS = {  # keys of train.py that an experiment decides, and what to do instead
    "seed": "give seeds=",
    "resume": "runs are resumed without asking; for fresh ones give another output_dir=",
}

ZEROS = {  # options that may not be below 0, and what 0 does
    "workers": "0 trains nothing and makes the table",
    "extensions": "0 extends no axis",
    "further_trials": "0 adds no trials",
}


def experiment_names() -> list[str]:
    """The names of all experiments, sorted."""
    return sorted(path.stem for path in Path(__file__).with_name("experiments").glob("[!_]*.py"))


def load_experiment(name: str) -> Experiment:
    """The experiment of a name.

    Raises:
        UsageError: there is no such experiment.
    """
    if name not in experiment_names():
        raise UsageError(f"there is no experiment '{name}'{hint(name, experiment_names())}")
    return importlib.import_module(f"scripts.experiments.{name}").EXPERIMENT


def help_of(name: str) -> str:
    """The text of --help: the hypothesis, and the axes and options with their defaults."""
    experiment = load_experiment(name)
    axes = {axis: experiment.values(axis) for axis in experiment.axes}
    around = {"around": ",".join(experiment.around.values())} if experiment.around else {}
    options = {**axes, "seeds": experiment.seeds, **around, **experiment.all_options, "workers": experiment.workers}
    return "\n".join([experiment.hypothesis, "", *(f"    {key}={value}" for key, value in options.items())])


def study_of(experiment: Experiment, arguments: Sequence[str]) -> tuple[Study, dict[str, Any], list[str]]:
    """Read the words after the name: the study, the command's own options, and the overrides that choose a launcher.

    Raises:
        UsageError: an option is impossible.
    """
    axes = {axis: experiment.values(axis) for axis in experiment.axes}
    own = {"workers": experiment.workers, "output_dir": "", "results": ""}
    lists = {"seeds": experiment.seeds, "around": ",".join(experiment.around.values())}
    words, options = parse(arguments, {**axes, **lists, **own, **experiment.all_options}, overrides=True)
    searches = dict.fromkeys(SEARCH_OPTIONS, "this experiment searches nothing")
    refuse(without_effect(words, searches | dict.fromkeys(EXTEND_OPTIONS, "this experiment extends no axis")))
    refuse([f"{key}={options[key]} is below 0; {zero}" for key, zero in ZEROS.items() if options.get(key, 0) < 0])
    launcher = [word for word in words if word.startswith(("hydra/launcher=", "hydra.launcher."))]
    if launcher and not launcher[0].startswith("hydra/launcher="):
        raise UsageError(
            f"{launcher[0]} is an option of a launcher; name that first, such as hydra/launcher=submitit_slurm"
        )
    overrides = [word for word in words if word not in launcher]
    has_recipe = any(word.startswith("experiment=") for word in experiment.base)
    by_name = {"experiment": "choose the experiment by its name"} if has_recipe else {}
    refuse_keys(overrides, {**EXPERIMENT_KEYS, **by_name})
    around = [value for value in options["around"].split(",") if value]  # two axes may have the same value
    if len(around) != len(experiment.around):
        raise UsageError(
            f"around={options['around']} must have a value for each of {', '.join(experiment.around) or 'no axis'}"
        )
    refuse([f"{key}= is empty; give at least one value" for key in (*axes, "seeds") if not entries(options[key])])
    study = Study(
        experiment,
        axes={axis: entries(options[axis]) for axis in axes},
        around=dict(zip(experiment.around, around)),
        seeds=entries(options["seeds"]),
        options={key: options[key] for key in experiment.all_options},
        overrides=overrides,
    )
    refuse_decided(study)
    return study, {key: options[key] for key in own}, launcher


def work(arguments: list[str]) -> int:
    """List the experiments, or run one. Exit code 1 if a run failed."""
    if not arguments:
        width = max(map(len, experiment_names()))
        for name in experiment_names():
            print(f"  {name:<{width}}  {load_experiment(name).hypothesis.splitlines()[0]}")
        return 0
    name, *rest = arguments
    study, own, launcher = study_of(load_experiment(name), rest)
    if launcher and (refused := refusal(launcher)):
        raise UsageError(refused)
    refuse_values_for_groups(launcher)
    output_dir = Path(own["output_dir"] or f"outputs/{name}")
    results = Path(own["results"] or ROOT / "results" / name)
    refuse([*problems_of_directory(output_dir), *problems_of_directory(results, "results")])
    failures = Conductor(study, output_dir, own["workers"], launcher).run()
    try:
        print("\n" + write(study, results, command_line("experiment.py", *arguments)))
    except OSError as error:
        raise UsageError(
            f"{error.filename or results} cannot be written ({error}); the runs are kept: the same command with workers=0 and another "
            "results= writes the table"
        ) from error
    for directory, reason in failures.items():
        print(f"failed: {directory}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    words = sys.argv[1:] if arguments is None else arguments
    return run(work, help_of(words[0]) if words and words[0] in experiment_names() else __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
