"""A race of two models: how many steps does the fast one need for the final loss of the slow one, and how does each read longer contexts?

With a schedule that ends, a run is behind until its learning rate has fallen. So a step at which the curve of a long run crosses a loss
says little. Here the fast model is trained at several lengths, each with a finished schedule and its own best rate, and the number of steps is
interpolated between these lengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.loader import validation_windows
from data.tokenizer import get_tokenizer
from scripts.analysis.figures import DASHES, OTHER_COLOURS, picture
from scripts.analysis.runs import RecordedRun, load_model
from scripts.analysis.statistics import Estimate
from scripts.analysis.study import Study, loss_cell
from scripts.analysis.tables import Table, cell
from scripts.evaluate import measure
from training.data import open_data, separator_of

MULTIPLES = (1, 2, 4)
"""Lengths of the windows on which a trained model is measured, in contexts of its training."""
_EVALUATED = 16  # tokens of that measurement, in training steps


@dataclass(frozen=True)
class Race:
    """Two values of the axis `arm`: `slow` sets the loss, `fast` has to reach it. `context` is the axis of the contexts of training.

    The axis `max_steps` holds the lengths of the runs. The slow model is needed at its longest only.
    """

    slow: str
    fast: str
    context: str

    def lengths(self, study: Study, context: str, arm: str) -> dict[int, list[RecordedRun]]:
        """Steps → the runs of an arm at a context, in order."""
        runs = study.grouped(self.context, "arm", "max_steps")
        found = {int(steps): r for (at, name, steps), r in runs.items() if (at, name) == (context, arm)}
        return dict(sorted(found.items()))

    def longest(self, study: Study, *arms: str) -> list[tuple[str, list[RecordedRun]]]:
        """The longest runs of some arms at every context, with a title."""
        found = []
        for context in study.axes[self.context]:
            for arm in arms:
                if lengths := self.lengths(study, context, arm):
                    found.append((f"{arm}, context {context}", lengths[max(lengths)]))
        return found


def steps_needed(losses: Mapping[int, float], target: float) -> tuple[float, str]:
    """The steps after which a finished run would have the target loss, from steps → final loss; and "", "<" or ">".

    Between two lengths, the loss is linear in the logarithm of the steps. "<": the shortest run is already better, and its length is
    returned. ">": no run is as good, and the largest length is returned.
    """
    lengths = sorted(losses)
    for before, steps in zip([None, *lengths], lengths):
        if losses[steps] <= target:
            if before is None:
                return float(steps), "" if losses[steps] == target else "<"
            if math.isinf(losses[before]):
                return float(steps), "<"
            share = (losses[before] - target) / (losses[before] - losses[steps])
            return before * (steps / before) ** share, ""
    return float(lengths[-1]), ">"


def speed_table(study: Study, race: Race) -> Table:
    """Final losses, steps to the slow model's final loss, and the speed-up in steps and in time: a line for each context.

    A seed counts for the speed-up if the slow model was stable and the fast one has it at every length. The costs of a step are the
    study's fact "costs", by arm and context.
    """
    lines, lengths = [], [int(steps) for steps in study.axes["max_steps"]]
    for context in study.axes[race.context]:
        slow, fast = (race.lengths(study, context, arm) for arm in (race.slow, race.fast))
        if not slow or not fast:
            continue
        last = max(slow)
        target, reached = _by_seed(slow[last]), {steps: _by_seed(runs) for steps, runs in fast.items()}
        seeds = [
            seed
            for seed, loss in target.items()
            if math.isfinite(loss) and all(seed in found for found in reached.values())
        ]
        needed = [
            steps_needed({steps: found[seed] for steps, found in reached.items()}, target[seed]) for seed in seeds
        ]
        gain = [(last / steps, {"<": ">", ">": "<"}.get(mark, "")) for steps, mark in needed]
        ms = [study.facts["costs"][f"{arm}, {context}"]["ms_per_step"] for arm in (race.slow, race.fast)]
        lines.append(
            [
                context,
                loss_cell(slow[last]),
                *(loss_cell(fast[n]) if n in fast else "" for n in lengths),
                str(len(seeds)),
                _bounded(needed, 0),
                _bounded(gain, 2),
                *(f"{value:.1f}" for value in ms),
                _bounded([(factor * ms[0] / ms[1], mark) for factor, mark in gain], 2),
            ]
        )
    headings = ["context", f"{race.slow}'s loss", *(f"{race.fast}, {n} steps" for n in lengths), "seeds"]
    headings += [f"steps for {race.slow}'s loss", "times fewer", f"ms a step, {race.slow}", race.fast, "times faster"]
    caption = (
        f"Steps that {race.fast} needs for {race.slow}'s final loss; > and < mark bounds, where it lies beyond the lengths of the "
        "runs:"
    )
    return Table(headings, lines, [True] * len(headings), caption)


def _by_seed(runs: Sequence[RecordedRun]) -> dict[int, float]:
    return {r.config["seed"]: r.held_out if r.stable and r.held_out is not None else math.inf for r in runs}


def _bounded(values: Sequence[tuple[float, str]], digits: int) -> str:
    """Mean ± standard error of numbers; if some are bounds, the different ones, one after the other."""
    if not any(mark for _, mark in values):
        return Estimate.of([value for value, _ in values]).text(digits) if values else ""
    return ", ".join(dict.fromkeys(f"{mark}{value:.{digits}f}" for value, mark in values))


def steps_picture(study: Study, race: Race, path: Path) -> Path:
    """Draw the final loss over the steps of finished runs: a panel for each context. A dashed line is the slow model's final loss."""
    with picture(path, 0.6 + 2.9 * len(study.axes[race.context]), 3.4) as figure:
        panels = figure.subplots(1, len(study.axes[race.context]), sharex=True, squeeze=False)[0]
        for axes, context in zip(panels, study.axes[race.context]):
            for arm, colour in ((race.slow, OTHER_COLOURS[4]), (race.fast, OTHER_COLOURS[1])):
                found = {
                    n: Estimate.of(list(_by_seed(r).values())) for n, r in race.lengths(study, context, arm).items()
                }
                means, errors = [e.mean for e in found.values()], [e.error for e in found.values()]
                axes.errorbar(list(found), means, errors, color=colour, marker="o", capsize=3, label=arm)
                if arm == race.slow and means:
                    axes.axhline(means[-1], **DASHES)
            axes.set_xscale("log", base=2)
            axes.set_title(f"context {context}", loc="left")
            axes.set_xlabel("steps, with a finished schedule")
            axes.legend(frameon=False)
        panels[0].set_ylabel("validation loss (nats a token)")
    return path


# ---- longer contexts ----


def losses_beyond(study: Study, race: Race) -> list[dict[str, Any]]:
    """The loss (nats a token) of the longest run of each arm, context and seed on windows of MULTIPLES of its context.

    An unstable run has None. All lengths have the same targets: the windows of the greatest length are cut into shorter ones. With learned
    positions, only the context of training can be read.
    """
    return [
        {**run.case, "seed": run.config["seed"], "multiple": multiple, "loss": loss}
        for _, runs in race.longest(study, race.slow, race.fast)
        for run in runs
        for multiple, loss in (_beyond(run.directory) if run.stable else dict.fromkeys(MULTIPLES)).items()
    ]


def _beyond(directory: Path) -> dict[int, float]:
    model, cfg, _ = load_model(directory)
    dataset, T, longest = open_data(cfg), model.config.block_size, MULTIPLES[-1]
    model.separator = separator_of(cfg, dataset)
    pieces = get_tokenizer(cfg.data.tokenizer).token_bytes()
    windows = validation_windows(
        dataset.val, longest * T, max(1, _EVALUATED * cfg.global_batch_tokens // (longest * T))
    )
    found = {}
    for multiple in MULTIPLES if model.config.rope else MULTIPLES[:1]:
        length = multiple * T
        parts = [windows[:, start : start + length + 1] for start in range(0, longest * T, length)]
        found[multiple] = measure(model.with_context(length), np.concatenate(parts), pieces).loss
    return found


def context_table(study: Study, race: Race) -> Table:
    """The losses of the study's fact "beyond": a line for each context of training and arm, a column for each length of the windows."""
    lines = []
    for context in study.axes[race.context]:
        for arm in (race.slow, race.fast):
            rows = [row for row in study.facts["beyond"] if (row[race.context], row["arm"]) == (context, arm)]
            cells = [[row["loss"] for row in rows if row["multiple"] == multiple] for multiple in MULTIPLES]
            if rows:
                lines.append([context, arm, *(cell(found, 3) for found in cells)])
    headings = ["trained context", "model", *(f"read at {multiple}x" for multiple in MULTIPLES)]
    numeric = [True, False, *[True] * len(MULTIPLES)]
    return Table(headings, lines, numeric, "Losses on the same text, in windows longer than the context of training:")
