"""Conduct a study: check it, search, train, extend, and write what came out."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scripts.analysis.figures import sign
from scripts.analysis.optima import further_cases
from scripts.analysis.runs import RecordedRun, read_run
from scripts.analysis.search import TRIALS, Found, best_of_searches
from scripts.analysis.study import Case, Study
from scripts.analysis.tables import ENDS, footer, rows_of, write_tables
from scripts.command import UsageError
from training.checks import check
from training.config import compose
from training.jobs import Job, run_all
from training.machine import environment
from training.validate import ConfigError

_NAMED = 5  # runs that have not ended, below a table


@dataclass
class Conductor:
    """Runs the jobs of a study, and fills the study.

    parent: the directory of the runs. workers: how many runs at a time; with 0, the runs that have ended are read. launcher: the overrides that
    choose one of Hydra's launchers. groups: the runs that ended, by the values of their case. failures: directory → reason.
    """

    study: Study
    parent: Path
    workers: int
    launcher: Sequence[str] = ()
    groups: dict[tuple[str, ...], list[RecordedRun]] = field(default_factory=dict)
    failures: dict[Path, str] = field(default_factory=dict)

    def run(self) -> dict[Path, str]:
        """Check all, run what has not ended, read the runs, and measure. Returns the failures.

        Raises:
            UsageError, ConfigError: something is wrong, and nothing was run; or no run has ended, and the experiment has no table without runs.
        """
        study = self.study
        check_all(study, here=not self.launcher)
        for cases in study.stages():
            if study.experiment.search:
                self._search(cases)
            self._train(cases)
        self._extend()
        order = {tuple(case.values()): i for i, case in enumerate(study.cases())}
        study.groups = [self.groups[key] for key in sorted(self.groups, key=order.__getitem__)]
        ended = {(key, str(r.config["seed"])) for key, runs in self.groups.items() for r in runs}
        wanted = [(key, seed) for key in order for seed in study.seeds]
        study.missing = [
            ", ".join([*map("=".join, zip(study.axes, key)), f"seed={seed}"])
            for key, seed in wanted
            if (key, seed) not in ended
        ]
        if not study.groups and not study.experiment.untrained:
            raise UsageError(self._without_runs())
        if not study.groups and self.workers == 0:
            study.missing = []  # no run was asked for
        study.facts = study.experiment.measure(study)
        return self.failures

    def _without_runs(self) -> str:
        if self.workers == 0:
            return f"workers=0 trains nothing, and no run in {self.parent} came to its end, so there is no table"
        return "no run came to its end, so there is no table; the lines above tell the reason"

    def _start(self, jobs: Sequence[Job]) -> None:
        self.failures |= run_all(list(jobs), self.workers, self.launcher)

    def _train(self, cases: Sequence[Case]) -> None:
        """Run some cases with every seed, and put those that ended into the groups."""
        jobs = self.study.jobs(self.parent, cases)
        self._start([job for _, job in jobs])
        for case, job in jobs:
            if job.ended:
                key = tuple(case[axis] for axis in self.study.axes)
                self.groups.setdefault(key, []).append(replace(read_run(job.directory), case=case))

    def _extend(self) -> None:
        """Give the extended axis further values, again and again, until no best value is at an end."""
        study = self.study
        for _ in range(study.options["extensions"] if study.experiment.extended else 0):
            runs = [r for group in self.groups.values() for r in group]
            found = further_cases(runs, study.experiment.extended or "", study.axes)
            more = [case for case in found if case not in study.cases()]
            if not more:
                break
            study.further += more
            self._train(more)

    def _search(self, cases: Sequence[Case]) -> None:
        """Run the trials of some cases, a trial of each at a time. A search of which a trial fails ends."""
        study = self.study
        searches = {
            tuple(case.values()): (case, study.new_searches(case)) for case in cases if study.searched(case) == case
        }
        count, further = study.options["trials"], study.options["further_trials"]
        going = [(case, search) for case, several in searches.values() for search in several]
        seconds: dict[Path, float] = {}  # of a trial's training
        while going := [(case, search) for case, search in going if search.goes_on(count, further)]:
            points = [search.next_point() for _, search in going]
            trials = [self._trial(case, search.values(point)) for (case, search), point in zip(going, points)]
            # Two searches of a case may come to the same values.
            self._start(list(dict.fromkeys(job for jobs in trials for job in jobs)))
            ended = [all(job.ended for job in jobs) for jobs in trials]
            for (_, search), point, jobs in itertools.compress(zip(going, points, trials), ended):
                runs = [read_run(job.directory) for job in jobs]
                losses = [r.final if r.stable and r.final is not None else math.inf for r in runs]
                search.tried[point] = statistics.fmean(losses)
                seconds |= {r.directory: train_seconds([r]) for r in runs}
            going = list(itertools.compress(going, ended))
        study.found |= {key: best_of_searches(several) for key, (_, several) in searches.items()}
        study.trial_seconds += sum(seconds.values())

    def _trial(self, case: Case, searched: Case) -> list[Job]:
        """The runs of a trial, one for each seed of the search."""
        settings = [*self.study.settings(case), "full_eval=false"]  # a trial is judged by the windows
        parent = self.parent / TRIALS
        return [self.study.job(parent, case, seed, settings, searched) for seed in self.study.search_seeds]


# ---- before the first run ----


def check_all(study: Study, here: bool = True) -> None:
    """Check each case, with the values at which its search starts, and each seed.

    here: whether the runs use this machine; if not, only the values are checked.

    Raises:
        UsageError, ConfigError: something is wrong. Cases after the first that has no new problem are not checked.
    """
    study.experiment.check(study)
    cases, seeds, problems = study.cases(), study.seeds, dict[str, None]()
    if study.experiment.search:
        _check_search(study)
        seeds = [*seeds, *study.search_seeds]
    wanted = [*((case, seeds[0]) for case in cases), *((cases[0], seed) for seed in seeds[1:])]
    for case, seed in wanted:  # a seed changes nothing else
        try:
            for search in study.new_searches(study.searched(case)):
                cfg = compose(study.job(Path(), case, seed, study.settings(case), search.best).overrides)
                if here:
                    check(cfg)
        except ConfigError as error:
            if problems.keys() >= {*error.problems}:
                break  # it is wrong in every case, and each takes a second
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(problems)


def _check_search(study: Study) -> None:
    trials, cases = study.options["trials"], study.cases()
    if trials < 1:
        raise UsageError(f"trials={trials} is too few; give at least 1")
    if not study.search_seeds:
        raise UsageError("search_seeds= is empty; give at least one seed, such as search_seeds=0")
    if both := sorted({*study.seeds} & {*study.search_seeds}):
        raise UsageError(
            f"seeds= and search_seeds= both have {', '.join(both)}; leave it out of one of them, so that no run was searched with its own seed"
        )
    for case in cases:
        if (searched := study.searched(case)) not in cases:
            raise UsageError(
                f"{', '.join(case.values())} takes the best settings of {', '.join(searched.values())}; add that to the values"
            )
    keys = max((study.new_searches(study.searched(case))[0].axes for case in cases), key=len)
    if max(map(len, study.starts)) > len(keys):
        raise UsageError(
            f"start={study.options['start']} has more values than settings are searched: {', '.join(axis.key for axis in keys)}"
        )


# ---- after the last run ----


def write(study: Study, results: Path, command: str) -> str:
    """Write table.md, table.json and the pictures; returns the tables for a terminal. A picture that is not drawn this time is removed."""
    experiment = study.experiment
    tables, columns, remark = experiment.tables(study), experiment.columns(study), experiment.remark(study)
    about_losses, missing = "", _missing(study)
    if study.runs:
        trials = f", and {study.trial_seconds / 60:.0f} min of trials" if study.found else ""
        spent = f"{train_seconds(study.runs) / 60:.0f} min of training{trials}"
        about_losses = f"Losses are in nats a token, mean ± standard error over seeds; {spent}."
    foot = footer(command, study.runs, about_losses, missing, remark)
    env = dict(study.runs[0].environment if study.runs else environment())
    env.pop("command", None)  # of one run, with the paths of its machine
    rows = rows_of(study.runs, columns or ENDS)
    data = {"command": command, "environment": env, "overrides": study.overrides, **study.facts, "rows": rows}
    if study.found:
        data["trials"] = [line for key, search in study.found.items() for line in _trials(study, key, search)]
    write_tables(results, tables, foot, data)
    drawn = [name for name, draw in experiment.figures.items() if draw(study, results / name)]
    for name in experiment.figures:
        if name in drawn:
            sign(results / name, study.runs)
        else:
            (results / name).unlink(missing_ok=True)  # it would show other runs than the table
    parts = [*(table.text() for table in tables), missing, remark]
    written = ", ".join(["table.md", "table.json", *drawn])
    return "\n\n".join(filter(None, parts)) + f"\n\n  written to {results}: {written}"


def _missing(study: Study) -> str:
    """The sentence about the runs that are not in the tables; empty if all are."""
    few = study.missing[:_NAMED] + ["and others"] * (len(study.missing) > _NAMED)
    total = len(study.runs) + len(study.missing)
    return f"{len(study.missing)} of {total} runs have not ended and are left out: {'; '.join(few)}." if few else ""


def train_seconds(runs: Iterable[RecordedRun]) -> float:
    """The seconds of training of some runs that ended."""
    return sum(end["train_seconds"] for r in runs for end in r.records.get("end", []))


def _trials(study: Study, key: Sequence[str], search: Found) -> list[dict[str, Any]]:
    """The trials of a case as data, in their order."""
    case = dict(zip(study.axes, key))
    return [{**case, **values, "val_loss": loss} for values, loss in search.trials]
