"""An experiment as data, and the study that is made of it: its cases, their jobs, and the table and pictures of the runs that ended."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scripts.analysis.figures import sign
from scripts.analysis.optima import EXTEND_OPTIONS, further_cases
from scripts.analysis.runs import RecordedRun, at, final_losses, read_run
from scripts.analysis.search import SEARCH_OPTIONS, TRIALS, Found, Search
from scripts.analysis.statistics import Estimate
from scripts.analysis.tables import ENDS, Column, Table, footer, make_table, rows_of, write_tables
from scripts.command import UsageError, key_of, refuse
from training.checks import check
from training.config import CONFIGS, compose, compose_plain, directory_name
from training.engine import Job, run_all
from training.run import environment
from training.validate import ConfigError

Case = Mapping[str, str]
"""One value for each axis."""


@dataclass(frozen=True)
class Experiment:
    """The content of a file of scripts/experiments.

    hypothesis: the question of the experiment, in a sentence or two. The list of experiments shows the first line.
    base: overrides of train.py for every run, such as ("experiment=crossing",).
    axes: key of train.py → its values, with commas; every combination is a case. Or the name of an axis → name of a value → overrides.
    around: axes that are varied one at a time, and the value of each while another one is varied. together: groups of these axes, of
        which every combination is run while the other axes have their values of `around`.
    search: the settings that are searched in each case before it is run with its seeds; None if there are none.
    extended: an axis of numbers that gets a further value wherever the loss of a seed is lowest at an end; None if there is none.
    seeds: with commas; every case is run with each seed.
    options: further options of the command and their defaults. workers: how many runs at a time.
    derived: further overrides for a case.
    measure: computes further numbers before the table is made; they become `study.facts` and are written to table.json.
    columns: of the table, which has a line for each case. tables: other tables instead of that one.
    figures: file name → function that draws it. remark: sentences below the table.
    untrained: whether the experiment has a table even if no run has ended.
    """

    hypothesis: str
    base: tuple[str, ...] = ()
    axes: Mapping[str, str | Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    around: Mapping[str, str] = field(default_factory=dict)
    together: Sequence[Sequence[str]] = ()
    search: Search | None = None
    extended: str | None = None
    seeds: str = "1"
    options: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 2
    derived: Callable[[Study, Case], Sequence[str]] = lambda study, case: ()
    measure: Callable[[Study], dict[str, Any]] = lambda study: {}
    columns: Callable[[Study], Sequence[Column]] = lambda study: ()
    tables: Callable[[Study], list[Table]] = lambda study: [make_table(study.groups, study.experiment.columns(study))]
    figures: Mapping[str, Callable[[Study, Path], Any]] = field(default_factory=dict)
    remark: Callable[[Study], str] = lambda study: ""
    untrained: bool = False

    def values(self, axis: str) -> str:
        """The values of an axis, with commas."""
        values = self.axes[axis]
        return values if isinstance(values, str) else ",".join(values)

    @property
    def all_options(self) -> dict[str, Any]:
        """The further options of the command, with those of the search and of the extension."""
        searched, extended = SEARCH_OPTIONS if self.search else {}, EXTEND_OPTIONS if self.extended else {}
        return {**searched, **extended, **self.options}


@dataclass
class Study:
    """An experiment with the axes, seeds, options and overrides of the command line.

    groups: the runs that ended, by case. found: the search of each case, by the values of the case. further: the cases of the extension.
    """

    experiment: Experiment
    axes: dict[str, list[str]]
    around: dict[str, str]
    seeds: list[str]
    options: dict[str, Any]
    overrides: list[str]
    groups: list[list[RecordedRun]] = field(default_factory=list)
    found: dict[tuple[str, ...], Found] = field(default_factory=dict)
    further: list[dict[str, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def runs(self) -> list[RecordedRun]:
        """All runs that ended, case by case."""
        return [r for group in self.groups for r in group]

    def grouped(self, *axes: str) -> dict[tuple[str, ...], list[RecordedRun]]:
        """The runs by their values of some axes, in order."""
        found: dict[tuple[str, ...], list[RecordedRun]] = {}
        for r in self.runs:
            found.setdefault(tuple(r.case[axis] for axis in axes), []).append(r)
        return found

    def along(self, axis: str, **wanted: str) -> dict[str, list[RecordedRun]]:
        """The runs by their values of an axis. The other axes of `around` have their values of `around`, further axes the wanted values."""
        wanted = {key: value for key, value in {**self.around, **wanted}.items() if key != axis}
        fit = [r for r in self.runs if wanted.items() <= dict(r.case).items()]
        values = dict.fromkeys([*self.axes[axis], *(r.case[axis] for r in fit)])
        found = {value: [r for r in fit if r.case[axis] == value] for value in values}
        return {value: runs for value, runs in found.items() if runs}

    def cases(self) -> list[dict[str, str]]:
        """The combinations of the axes' values in which at most one axis of `around`, or one group, is varied; then the further ones."""
        together = self.experiment.together
        alone = [(axis,) for axis in self.around if not any(axis in group for group in together)]
        groups = [*together, *alone] or [()]
        values = [dict.fromkeys([*own, self.around.get(axis, own[0])]) for axis, own in self.axes.items()]
        every = (dict(zip(self.axes, combination)) for combination in itertools.product(*values))
        return [*(case for case in every if any(self._varies(case, group) for group in groups)), *self.further]

    def _varies(self, case: Case, group: Sequence[str]) -> bool:
        """Whether the axes of `around` that are not in a group have their values of `around`, and all others have one of their own."""
        free = {axis: axis in group or axis not in self.around for axis in case}
        return all(v in self.axes[axis] if free[axis] else v == self.around[axis] for axis, v in case.items())

    def settings(self, case: Case) -> list[str]:
        """The overrides of a case.

        Raises:
            UsageError: an axis with named values has no such value, or the experiment cannot compute with a value.
        """
        found = [word for axis, value in case.items() for word in self._of_axis(axis, value)]
        return [*found, *self._derived(case)]

    def _derived(self, case: Case) -> Sequence[str]:
        """The overrides that the experiment computes for a case."""
        try:
            return self.experiment.derived(self, case)
        except ValueError as error:  # such as int("abc")
            values = ", ".join(f"{axis}={value}" for axis, value in case.items())
            raise UsageError(
                f"{values}: {error}; give numbers where the values of the experiment are numbers"
            ) from error

    def _of_axis(self, axis: str, value: str) -> Sequence[str]:
        named = self.experiment.axes[axis]
        if isinstance(named, str):
            return [f"{axis}={value}"]
        if value not in named:
            raise UsageError(f"there is no {axis} '{value}'; choose from {', '.join(named)}")
        return named[value]

    def refuse_decided(self) -> None:
        """Refuse overrides of what the cases decide: an override comes last, so all cases would have it, whatever the table calls them.

        Raises:
            UsageError: there is one. The message lists all. Or an axis with named values has no such value.
        """
        decided, problems = self._decided(), []
        for override in self.overrides:
            key = key_of(override)
            nearest = sorted(decided, key=lambda known: known != key)
            if known := next((k for k in nearest if self._decides(k, key)), None):
                problems.append(f"{override} cannot be given here: {decided[known]}")
        refuse(problems)

    def _decided(self) -> dict[str, str]:
        """Key of train.py that the cases decide → what to do instead. A derived key is decided if it has several values."""
        found: dict[str, str] = {}
        derived: dict[str, set[str]] = {}
        cases, search = self.cases(), self.experiment.search
        for case in cases:
            for axis, value in case.items():
                why = f"the axis `{axis}` decides it; give {axis}="
                found |= {key_of(word): why for word in self._of_axis(axis, value)}
            for word in self._derived(case):
                derived.setdefault(key_of(word), set()).add(word)
            if search and (searched := self._searched(case)) in cases:
                found |= {axis.key: "the experiment searches it" for axis in search.axes(self, searched)}
        return {key: "the experiment computes it for each case" for key, own in derived.items() if len(own) > 1} | found

    def _decides(self, decided: str, key: str) -> bool:
        """Whether an override of a key changes what a decided key stands for.

        The choice of a group does not change a decided setting in it, as Hydra reads choices first. A setting in a decided group is
        decided if its choices differ in it.
        """
        if key == decided or (decided.startswith(f"{key}.") and not (CONFIGS / key).is_dir()):
            return True
        if not key.startswith(f"{decided}."):
            return False
        choices = {tuple(w for w in self.settings(case) if key_of(w) == decided) for case in self.cases()}
        values = [at(compose_plain([*self.experiment.base, *words]), key) for words in choices]
        return len({repr(value) for value in values if value is not None}) > 1

    def job(self, parent: Path, case: Case, seed: str, settings: Sequence[str], searched: Case) -> Job:
        """The run of a case with a seed. searched: key → value of the settings that were searched."""
        own = [*settings, *(f"{key}={value}" for key, value in searched.items()), f"seed={seed}"]
        name = directory_name(",".join(f"{key}={value}" for key, value in {**case, **searched, "seed": seed}.items()))
        return Job((*self.experiment.base, "logger.mode=disabled", *own, *self.overrides), parent / name)

    def jobs(self, parent: Path, cases: Sequence[Case] | None = None) -> list[tuple[dict[str, str], Job]]:
        """Each case (of those given, or of all) and its job, seed after seed, so that an interrupted experiment has complete seeds.

        The settings that are searched have their best values; before the search, those at which it starts. A case whose search
        found nothing has no job. Nothing is written or checked.

        Raises:
            UsageError: an axis with named values has no such value.
        """
        ready = []
        for case in self.cases() if cases is None else cases:
            searched = self._searched(case)
            search = self.found.get(tuple(searched.values()))
            if search is None:
                ready.append((case, self.settings(case), self._new_search(searched).best))
            elif search.tried:
                ready.append((case, self.settings(case), search.best))
        return [
            ({**case, **best}, self.job(parent, case, seed, own, best))
            for seed in self.seeds
            for case, own, best in ready
        ]

    def run(self, parent: Path, workers: int, launcher: Sequence[str]) -> dict[Path, str]:
        """Check all, run what has not ended, read the runs, and measure. Returns directory → reason, for the runs that failed.

        Raises:
            UsageError, ConfigError: something is wrong, and nothing was run; or no run has ended, and the experiment has no table without runs.
        """
        self.check_all()
        failures: dict[Path, str] = {}
        groups: dict[tuple[str, ...], list[RecordedRun]] = {}
        for cases in self._stages():
            if self.experiment.search:
                failures |= self._search(cases, parent, workers, launcher)
            failures |= self._train(cases, groups, parent, workers, launcher)
        for _ in range(self.options.get("extensions", 0) if self.experiment.extended else 0):
            runs = [r for group in groups.values() for r in group]
            more = [c for c in further_cases(runs, self.experiment.extended or "", self.axes) if c not in self.further]
            if not more:
                break
            self.further += more
            failures |= self._train(more, groups, parent, workers, launcher)
        order = {tuple(case.values()): i for i, case in enumerate(self.cases())}
        self.groups = [groups[key] for key in sorted(groups, key=order.__getitem__)]
        if not self.groups and not self.experiment.untrained and workers == 0 and not launcher:
            raise UsageError(f"workers=0 trains nothing, and no run in {parent} came to its end, so there is no table")
        if not self.groups and not self.experiment.untrained:
            raise UsageError("no run came to its end, so there is no table; the lines above tell the reason")
        self.facts = self.experiment.measure(self)
        return failures

    def check_all(self) -> None:
        """Check each case, with the values at which its search starts, and each seed.

        Raises:
            UsageError, ConfigError: something is wrong. The ConfigError lists problems until one comes again.
        """
        cases, seeds, problems = self.cases(), self.seeds, dict[str, None]()
        if self.experiment.search:
            self._check_search()
            seeds = [*seeds, str(self.options["search_seed"])]
        wanted = [*((case, seeds[0]) for case in cases), *((cases[0], seed) for seed in seeds[1:])]
        for case, seed in wanted:  # a seed changes nothing else
            start = self._new_search(self._searched(case)).best
            try:
                check(compose(self.job(Path(), case, seed, self.settings(case), start).overrides))
            except ConfigError as error:
                if problems.keys() >= {*error.problems}:
                    break  # it is wrong in every case, and each takes a second
                problems |= dict.fromkeys(error.problems)
        if problems:
            raise ConfigError(problems)

    def _check_search(self) -> None:
        trials, seed, cases = self.options["trials"], str(self.options["search_seed"]), self.cases()
        if trials < 1:
            raise UsageError(f"trials={trials} is too few; give at least 1")
        if seed in self.seeds:
            raise UsageError(f"seeds= has the seed of the trials, {seed}; leave it out, or give another search_seed=")
        for case in cases:
            if (searched := self._searched(case)) not in cases:
                raise UsageError(
                    f"{', '.join(case.values())} takes the best settings of {', '.join(searched.values())}; add that to the values"
                )

    def _train(
        self,
        cases: Sequence[Case],
        groups: dict[tuple[str, ...], list[RecordedRun]],
        parent: Path,
        workers: int,
        launcher: Sequence[str],
    ) -> dict[Path, str]:
        """Run some cases with every seed, and put those that ended into the groups. Returns directory → reason, for those that failed."""
        jobs = self.jobs(parent, cases)
        failures = run_all([job for _, job in jobs], workers, launcher)
        for case, job in jobs:
            if job.ended:
                key = tuple(case[axis] for axis in self.axes)
                groups.setdefault(key, []).append(replace(read_run(job.directory), case=case))
        return failures

    def _stages(self) -> list[list[dict[str, str]]]:
        """The cases in the order in which they are run: all together, or by the value of the axis along which a search goes."""
        along = self.experiment.search.along if self.experiment.search else None
        if along is None:
            return [self.cases()]
        return [[case for case in self.cases() if case[along] == value] for value in self.axes[along]]

    def _search(self, cases: Sequence[Case], parent: Path, workers: int, launcher: Sequence[str]) -> dict[Path, str]:
        """Run the trials of some cases, a trial of each at a time. Returns directory → reason, for those that failed; such a search ends."""
        failures: dict[Path, str] = {}
        going = {}
        for case in cases:
            key, searched = tuple(case.values()), self._searched(case)
            if case == searched:
                self.found[key] = self._new_search(case)
                going[key] = case, self.settings(case)
        trials, further = self.options["trials"], self.options["further_trials"]
        while going := {key: case for key, case in going.items() if self.found[key].goes_on(trials, further)}:
            points = {key: self.found[key].next_point() for key in going}
            jobs = {}
            for key, (case, own) in going.items():
                searched = self.found[key].values(points[key])
                judged = [*own, "full_eval=false"]  # a trial is judged by the windows
                jobs[key] = self.job(parent / TRIALS, case, str(self.options["search_seed"]), judged, searched)
            failures |= run_all(list(jobs.values()), workers, launcher)
            for key, job in jobs.items():
                if not job.ended:
                    del going[key]
                    continue
                r = read_run(job.directory)
                self.found[key].tried[points[key]] = r.final if r.stable and r.final is not None else math.inf
        return failures

    def _searched(self, case: Case) -> Case:
        """The case in whose search the settings of a case are found."""
        return self.experiment.search.of(case) if self.experiment.search else case

    def _new_search(self, case: Case) -> Found:
        """The search of a case before its first trial."""
        search, before = self.experiment.search, self.found.get(self._previous(case))
        return Found(search.axes(self, case) if search else [], before.point if before and before.tried else None)

    def _previous(self, case: Case) -> tuple[str, ...]:
        """The values of the case before this one along the axis of the search; empty if there is none."""
        along = self.experiment.search.along if self.experiment.search else None
        if along is None or (i := self.axes[along].index(case[along])) == 0:
            return ()
        return tuple({**case, along: self.axes[along][i - 1]}.values())

    def write(self, results: Path, command: str) -> str:
        """Write table.md, table.json and the pictures; returns the tables for a terminal."""
        tables, columns = self.experiment.tables(self), self.experiment.columns(self)
        remark, about_losses = self.experiment.remark(self), ""
        if self.runs:
            minutes = sum(e["train_seconds"] for r in self.runs for e in r.records.get("end", [])) / 60
            about_losses = (
                f"Losses are in nats a token, mean ± standard error over seeds; {minutes:.0f} minutes of training."
            )
        foot = footer(command, self.runs, about_losses, remark)
        env = dict(self.runs[0].environment if self.runs else environment())
        env.pop("command", None)  # of one run, with the paths of its machine
        rows = rows_of(self.runs, columns or ENDS)
        data = {"command": command, "environment": env, **self.facts, "rows": rows}
        if self.found:
            data["trials"] = [line for key, search in self.found.items() for line in self._trials(key, search)]
        write_tables(results, tables, foot, data)
        drawn = [name for name, draw in self.experiment.figures.items() if draw(self, results / name)]
        for name in drawn:
            sign(results / name, self.runs)
        parts = [*(table.text() for table in tables), remark]
        written = ", ".join(["table.md", "table.json", *drawn])
        return "\n\n".join(filter(None, parts)) + f"\n\n  written to {results}: {written}"

    def _trials(self, key: Sequence[str], found: Found) -> list[dict[str, Any]]:
        """The trials of a case as data, in their order."""
        return [{**dict(zip(self.axes, key)), **found.values(p), "val_loss": loss} for p, loss in found.tried.items()]


# ---- tables of experiments ----


def loss_cell(runs: Sequence[RecordedRun]) -> str:
    """The final losses of some runs as the text of a cell: mean ± standard error of the finite ones, and how many runs were unstable."""
    if not runs:
        return "not run"
    finite = [loss for loss in final_losses(runs) if math.isfinite(loss)]
    unstable = sum(not r.stable for r in runs)
    mark = f" ({unstable} of {len(runs)} unstable)" if unstable else ""
    return (Estimate.of(finite).text(3) if finite else "") + mark


def pivot(study: Study, across: str, heading: str) -> Table:
    """Final losses: a column for each value of one axis, named by `heading` and the value; a line for each case of the other axes."""
    down = [axis for axis in study.axes if axis != across]
    cells, values = study.grouped(*down, across), study.axes[across]
    lines = [
        [*map(runs[0].value_of, down), *(loss_cell(cells.get((*key, value), [])) for value in values)]
        for key, runs in study.grouped(*down).items()
    ]
    headings = [*(axis.rpartition(".")[2] for axis in down), *(f"{heading} {value}" for value in values)]
    return Table(headings, lines, [False] * len(down) + [True] * len(values))


def best_of(study: Study, axis: str, **wanted: str) -> tuple[str, list[RecordedRun]] | None:
    """The value of an axis with the lowest mean final loss, and its runs, of which none may be unstable; None if there is no such value.

    wanted: the values of other axes, as in Study.along.
    """
    stable = {v: runs for v, runs in study.along(axis, **wanted).items() if all(r.stable for r in runs)}
    return min(stable.items(), key=lambda item: Estimate.of(final_losses(item[1])).mean, default=None)
