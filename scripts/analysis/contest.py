"""Contests: cases that were searched by one rule, then run with several seeds, and compared seed by seed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scripts.analysis.runs import RecordedRun, final_losses, held_out_by_seed
from scripts.analysis.statistics import Difference, Estimate
from scripts.analysis.study import Case, Study
from scripts.analysis.tables import HELD_OUT, Column, Table, make_table
from scripts.bench_train import RandomTraining
from scripts.command import UsageError, key_of
from scripts.timing import take_turns
from training.job import SAME_RESULT
from training.machine import device_name
from training.settings import settings_of

REMARK = (
    "Differences are paired by seed, with Student's 95% interval; the intervals are not adjusted for the number of differences. "
    "Trials have seeds of their own, which no run of the table has. "
    "(edge): a neighbour of the best settings was not tried."
)
"""The sentences below a table of a contest."""

_TIMED = 5  # steps of each kind

Opponent = Callable[[Case], Mapping[str, str]]
"""From a case to the axis values in which the case that it is compared with differs from it."""


def opponents(axis: str, *values: str) -> dict[str, Opponent]:
    """Value → the opponent that has this value of an axis."""

    def having(value: str) -> Opponent:
        return lambda case: {axis: value}

    return {value: having(value) for value in values}


def losses_by_seed(study: Study) -> dict[tuple[str, ...], dict[int, float]]:
    """Values of a case → seed → loss at the end. A case with an unstable run is left out."""
    runs = study.grouped(*study.axes)
    return {key: held_out_by_seed(found) for key, found in runs.items() if all(r.stable for r in found)}


def earlier_losses(study: Study) -> dict[tuple[str, ...], dict[int, float]]:
    """The same as `losses_by_seed`, from the files that the option `earlier` names: table.json of other commands of the experiment.

    Raises:
        UsageError: one of the files cannot be read, is no such table, or was made with other overrides.
    """
    found: dict[tuple[str, ...], dict[int, float]] = {}
    unstable = set()
    for table in filter(None, study.options.get("earlier", "").split(",")):
        try:
            data = json.loads(Path(table).read_text())
            for row in data["rows"]:
                key = tuple(row[axis] for axis in study.axes)
                found.setdefault(key, {})[row["seed"]] = row[HELD_OUT.key]
                if row["unstable_step"] is not None:
                    unstable.add(key)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"earlier={table} is not the table.json of another command of this experiment ({type(error).__name__}: {error})"
            ) from error
        if others := _decisive(data.get("overrides", study.overrides)) ^ _decisive(study.overrides):
            raise UsageError(
                f"earlier={table} cannot be compared: only one of the two commands has {', '.join(sorted(others))}; "
                "give both the same, or leave that table out"
            )
    return {key: losses for key, losses in found.items() if key not in unstable}


def _decisive(overrides: Sequence[str]) -> set[str]:
    """The overrides that may change a loss; `data.dir` may name another text."""
    same = tuple(f"{key}." for key in SAME_RESULT if key != "data.dir")
    return {word for word in overrides if not f"{key_of(word)}.".startswith(same)}


def known_losses(study: Study) -> dict[tuple[str, ...], dict[int, float]]:
    """The losses of the study and, of cases that it does not have itself, those of earlier tables."""
    own = study.grouped(*study.axes)
    return {key: losses for key, losses in earlier_losses(study).items() if key not in own} | losses_by_seed(study)


def differences(
    losses: Mapping[tuple[str, ...], Mapping[int, float]], axes: Sequence[str], opponent: Opponent
) -> dict[tuple[str, ...], Difference]:
    """The difference of each case from its opponent, paired by seed, by the values of the case: those of the axes, in their order.

    losses: values of a case → seed → loss. A case that is its own opponent, or has no seed in common with it, has no difference.
    """
    found = {}
    for key, mine in losses.items():
        case = dict(zip(axes, key))
        other = tuple({**case, **opponent(case)}.values())
        theirs = losses.get(other, {}) if other != key else {}
        if mine.keys() & theirs.keys():
            found[key] = Difference.of(mine, theirs)
    return found


def contest_table(study: Study, columns: Sequence[Column], against: Mapping[str, Opponent]) -> Table:
    """The columns, the best settings of each case, and its difference from each opponent, by the name of a heading.

    An opponent may be a case of an earlier table only.
    """
    table = make_table(study.groups, columns)
    apart = [differences(known_losses(study), list(study.axes), opponent) for opponent in against.values()]
    for line, runs in zip(table.lines, study.groups):
        key = tuple(runs[0].case[axis] for axis in study.axes)
        line.append(_best_settings(study, key))
        line += [found[key].text() if key in found else "" for found in apart]
    headings = [*table.headings, "best settings", *(f"minus {name}" for name in against)]
    return Table(headings, table.lines, [*table.numeric, False, *[True] * len(against)])


def _best_settings(study: Study, key: tuple[str, ...]) -> str:
    found = study.found[key]
    text = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in found.best.items())
    return text if found.bracketed else f"{text} (edge)"


def trials_by(study: Study, panel: str, curve: str) -> dict[str, dict[str, dict[str, list[tuple[float, float]]]]]:
    """The trials for `loss_of_trials`: a row for each searched setting, a panel for each value of one axis, a curve for each of another."""
    found: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {}
    for key, search in study.found.items():
        case = dict(zip(study.axes, key))
        for axis in search.axes:
            row = found.setdefault(axis.key.rpartition(".")[2].replace("_", " "), {})
            curves = row.setdefault(f"{panel.rpartition('.')[2]} {case[panel]}", {})
            tried = ((float(values[axis.key]), loss) for values, loss in search.trials)
            curves.setdefault(case[curve], []).extend(tried)
    return found


def targets(study: Study, name: str) -> dict[str, float]:
    """Steps → mean final loss on the windows of the case of this name, the first axis; a horizon at which it is unstable is left out."""
    runs = {steps: found for (case, steps), found in study.grouped(*study.axes).items() if case == name}
    return {s: Estimate.of(final_losses(found)).mean for s, found in runs.items() if all(r.stable for r in found)}


def costs(study: Study, *axes: str) -> dict[str, dict[str, float]]:
    """Milliseconds of a whole training step, and bytes of state of a parameter that its optimizer updates, by the values of some axes.

    The values are joined by ", "; without axes, they are those of the first axis. Measured now, by turns in one process, on random tokens,
    with the settings of the first run with these values. Not a number where the step fails.
    """
    trainings: dict[str, RandomTraining] = {}
    for r in study.runs:
        name = ", ".join(r.case[axis] for axis in axes or [next(iter(study.axes))])
        if name not in trainings:
            cfg = settings_of(r.config)
            trainings[name] = RandomTraining(cfg, cfg.micro_batch_size, cfg.global_batch_tokens)
    times = take_turns({name: training.step for name, training in trainings.items()}, repeats=_TIMED, warmup=2)
    found = {name: {"ms_per_step": math.nan, "state_bytes": math.nan} for name in trainings}
    for name, seconds in times.items():
        if seconds:
            found[name]["ms_per_step"] = 1000 * statistics.median(seconds)
            found[name]["state_bytes"] = next(iter(trainings[name].optimizers.state_bytes().values()))
    return found


def cost_remark() -> str:
    """The sentence below a table with the costs of a step."""
    return (
        f"{REMARK} Milliseconds a step: the median of {_TIMED} steps on random tokens, measured when this table was written, on "
        f"{device_name()}."
    )


def cost_columns(study: Study, name: str) -> list[Column]:
    """Columns of what a run costs, from the facts `targets` and `costs` of the study; the target is the loss of the case of this name."""
    target, cost = study.facts["targets"], study.facts["costs"]

    def of(r: RecordedRun, key: str) -> float:
        return cost[next(iter(r.case.values()))][key]

    def steps(r: RecordedRun) -> float | None:
        return r.steps_to(target[r.case["max_steps"]]) if r.case["max_steps"] in target else None

    def seconds(r: RecordedRun) -> float | None:
        found = steps(r)
        return None if found is None else found * of(r, "ms_per_step") / 1000

    return [
        Column(f"steps to {name}'s loss on the windows", "steps_to_target", steps, 0),
        Column("seconds", "seconds_to_target", seconds, 1),
        Column("ms a step", "ms_per_step", lambda r: of(r, "ms_per_step"), 1),
        Column("state, bytes a parameter", "state_bytes", lambda r: of(r, "state_bytes"), 1),
    ]
