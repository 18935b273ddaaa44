"""An experiment as data, and the study that a command makes of it: its cases, their jobs, and the runs that ended."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scripts.analysis.optima import EXTEND_OPTIONS
from scripts.analysis.runs import RecordedRun, final_losses
from scripts.analysis.search import SEARCH_OPTIONS, Axis, Found, Search
from scripts.analysis.statistics import Estimate
from scripts.analysis.tables import Column, Table, make_table
from scripts.command import UsageError, entries
from training.config import directory_name
from training.jobs import Job

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
    derived: further overrides for a case. check: raises UsageError if an option is impossible; called before the first run.
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
    check: Callable[[Study], Any] = lambda study: None
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
    """An experiment with the axes, seeds, options and overrides of the command line. `conduct.Conductor` runs it and fills the rest.

    groups: the runs that ended, by case. found: the search of each case, by the values of the case. further: the cases of the extension.
    missing: cases and seeds whose runs have not ended, as text. trial_seconds: the training of all trials.
    """

    experiment: Experiment
    axes: dict[str, list[str]]
    around: dict[str, str]
    seeds: list[str]
    options: dict[str, Any]
    overrides: list[str]
    groups: list[list[RecordedRun]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    found: dict[tuple[str, ...], Found] = field(default_factory=dict)
    further: list[dict[str, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    trial_seconds: float = 0.0

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

    @property
    def along_axis(self) -> str | None:
        """The axis along which the search of a case starts from the one before; None if there is none."""
        return self.experiment.search.along if self.experiment.search else None

    def stages(self) -> list[list[dict[str, str]]]:
        """The cases in the order in which they are run: all together, or by the value of the axis along which a search goes."""
        along = self.along_axis
        if along is None:
            return [self.cases()]
        return [[case for case in self.cases() if case[along] == value] for value in self.axes[along]]

    def _varies(self, case: Case, group: Sequence[str]) -> bool:
        """Whether the axes of `around` that are not in a group have their values of `around`, and all others have one of their own."""
        free = {axis: axis in group or axis not in self.around for axis in case}
        return all(v in self.axes[axis] if free[axis] else v == self.around[axis] for axis, v in case.items())

    def settings(self, case: Case) -> list[str]:
        """The overrides of a case.

        Raises:
            UsageError: an axis with named values has no such value, or the experiment cannot compute with a value.
        """
        found = [word for axis, value in case.items() for word in self.of_axis(axis, value)]
        return [*found, *self.derived(case)]

    def derived(self, case: Case) -> Sequence[str]:
        """The overrides that the experiment computes for a case."""
        try:
            return self.experiment.derived(self, case)
        except ValueError as error:  # such as int("abc")
            values = ", ".join(f"{axis}={value}" for axis, value in case.items())
            raise UsageError(
                f"{values}: {error}; give numbers where the values of the experiment are numbers"
            ) from error

    def of_axis(self, axis: str, value: str) -> Sequence[str]:
        """The overrides of a value of an axis. Raises UsageError as `settings` does."""
        named = self.experiment.axes[axis]
        if isinstance(named, str):
            return [f"{axis}={value}"]
        if value not in named:
            raise UsageError(f"there is no {axis} '{value}'; choose from {', '.join(named)}")
        return named[value]

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
            searched = self.searched(case)
            search = self.found.get(tuple(searched.values()))
            if search is None:
                ready.append((case, self.settings(case), self.new_searches(searched)[0].best))
            elif search.tried:
                ready.append((case, self.settings(case), search.best))
        return [
            ({**case, **best}, self.job(parent, case, seed, own, best))
            for seed in self.seeds
            for case, own, best in ready
        ]

    def searched(self, case: Case) -> Case:
        """The case in whose search the settings of a case are found."""
        return self.experiment.search.of(case) if self.experiment.search else case

    @property
    def search_seeds(self) -> list[str]:
        """The seeds of the trials."""
        return entries(self.options["search_seeds"])

    def new_searches(self, case: Case) -> list[Found]:
        """The searches of a case before their first trials, one from each start.

        Where a search goes before along the axis of the search, there is one, from the best point of that one.
        """
        search, before = self.experiment.search, self.found.get(self._previous(case))
        axes = search.axes(self, case) if search else []

        def started(values: Sequence[float]) -> list[Axis]:
            return [*(replace(axis, start=value) for axis, value in zip(axes, values)), *axes[len(values) :]]

        if before and before.tried:
            return [Found(started([axis.start for axis in before.axes]), before.point)]
        return [Found(started(values)) for values in self.starts]

    @property
    def starts(self) -> list[list[float]]:
        """The values of the option `start`, for each search; none for those of the experiment.

        Raises:
            UsageError: one is no positive number.
        """
        text = self.options.get("start", "")
        try:
            starts = [[float(word) for word in start.split(",") if word] for start in text.split("/")]
        except ValueError:
            starts = [[math.nan]]
        if not all(0 < value < math.inf for values in starts for value in values):
            raise UsageError(
                f"start={text} must be positive numbers with commas, such as start=0.05,0.1; with a slash between several starts"
            )
        return starts

    def _previous(self, case: Case) -> tuple[str, ...]:
        """The values of the case before this one along the axis of the search; empty if there is none."""
        along = self.along_axis
        if along is None or (i := self.axes[along].index(case[along])) == 0:
            return ()
        return tuple({**case, along: self.axes[along][i - 1]}.values())


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
