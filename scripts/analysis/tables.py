"""Tables of runs: columns, groups of runs, and the writer of table.md and table.json."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.analysis.runs import RecordedRun, at, text_at
from scripts.analysis.statistics import Estimate
from scripts.command import UsageError, as_cell, as_code
from training.files import write_whole
from training.job import other_settings
from training.machine import environment

PUBLISHED = {
    "Unconstrained": "3.3855",
    "All-Stiefel": "3.3679",
    "All-DGram": "unstable",
    "Hetero": "3.3544",
    "Hetero-Inv": "unstable",
}
"""Validation losses of arXiv 2606.13276 (GPT-2 124M, 3.28B tokens of OpenWebText, one seed), in the paper's order."""
PAPER_TOKENS = 3.2e9
"""At least so many tokens is a run at the paper's scale."""
PAPER_SHAPE = {"model.n_layer": "12", "model.n_embd": "768", "data.name": "openwebtext"}
"""The paper's model and data."""

Value = float | str | None
Groups = Sequence[Sequence[RecordedRun]]


@dataclass(frozen=True)
class Column:
    """One column of a table: heading, key in table.json, and the value for a run. Numbers are shown with `digits` decimals."""

    heading: str
    key: str
    value: Callable[[RecordedRun], Value]
    digits: int = 4


BEST = Column("val loss, best", "val_loss_best", lambda r: r.best)
FINAL = Column("final", "val_loss_final", lambda r: r.final)
HELD_OUT = Column("val loss", "val_loss", lambda r: r.held_out)
STATUS = Column("status", "status", lambda r: r.status)
ASSIGNMENT = Column("assignment", "assignment", lambda r: r.assignment)
SIGMA_ATTENTION = Column("σ max attn", "sigma_max_attention", lambda r: r.sigma_max("attention"), digits=2)
LAST_ENTROPY = Column("entropy", "least_entropy", lambda r: r.last_probe("least_entropy"), digits=2)
ENDS = [BEST, FINAL, HELD_OUT, STATUS]
"""What the data of an experiment with tables of its own say of each run."""
COLUMNS = [
    ASSIGNMENT,
    Column("attention", "attention", lambda r: r.geometry("attention")),
    Column("mlp", "mlp", lambda r: r.geometry("mlp")),
    BEST,
    FINAL,
    Column("full split", "full_val_loss", lambda r: r.full),
    SIGMA_ATTENTION,
    Column("σ max mlp", "sigma_max_mlp", lambda r: r.sigma_max("mlp"), digits=2),
    Column("entropy", "least_entropy", lambda r: r.least_entropy, digits=2),
    Column("saturated", "greatest_saturation", lambda r: r.greatest_saturation, digits=2),
    Column("feas", "mean_feas", lambda r: r.mean_feas, digits=2),
    STATUS,
    Column("paper", "paper_val_loss", lambda r: PUBLISHED.get(r.assignment)),
]
"""The columns of the paper's table. A new measurement needs one more line here."""

ATTENTION_COLUMNS = [
    BEST,
    FINAL,
    Column("logit", "largest_logit", lambda r: r.last_probe("largest_logit"), digits=0),
    LAST_ENTROPY,
    Column("saturated", "greatest_saturation", lambda r: r.last_probe("greatest_saturation"), digits=2),
    SIGMA_ATTENTION,
    Column("warned at", "warned", lambda r: "–" if r.warned_step is None else f"step {r.warned_step}"),
    STATUS,
]
"""The state of attention at the end of a run. `ATTENTION_REMARK` belongs below such a table."""
ATTENTION_REMARK = (
    "Logit, entropy (least layer, relative to log(position)) and saturated rows are those of the last probe in which they are "
    "finite."
)

TURN_COLUMNS = [
    Column(
        "turn, start", "turn_start", lambda r: next((at(p, "stream.path") for p in r.records.get("probe", [])), None), 2
    ),
    Column("turn, end", "turn_end", lambda r: r.last_probe("stream.path"), 2),
]
"""All turns of the stream together, in radians (`model.turns`), at the first and at the last probe."""


def case(heading: str, axis: str) -> Column:
    """A column with a run's value of an experiment's axis. Its key is the last part of the axis's name.

    Raises:
        UsageError: when a table is made, if the experiment has no such axis.
    """

    def value(r: RecordedRun) -> str:
        if axis not in r.case:
            known = ", ".join(r.case)
            raise UsageError(
                f"a column has the axis {axis}; the axes are {known}: correct it, and start the same command again"
            )
        return r.case[axis]

    return Column(heading, axis.rpartition(".")[2], value)


def columns_with_values(columns: Sequence[Column], runs: Sequence[RecordedRun]) -> list[Column]:
    """The columns that have a value for at least one run."""
    return [column for column in columns if any(column.value(r) is not None for r in runs)]


@dataclass(frozen=True)
class Table:
    """A table of text: headings, and one list of cells for each line. `numeric` columns are aligned to the right."""

    headings: list[str]
    lines: list[list[str]]
    numeric: list[bool]
    caption: str = ""

    def text(self) -> str:
        """The table for a terminal."""
        rows = [self.headings, *self.lines]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.headings))]
        aligned = [[self._pad(i, cell, widths[i]) for i, cell in enumerate(row)] for row in rows]
        return self._captioned("\n".join(("  " + "  ".join(row)).rstrip() for row in aligned))

    def markdown(self) -> str:
        """The table for a Markdown page."""
        rule = ["---:" if right else "---" for right in self.numeric]
        rows = [[as_cell(text) for text in row] for row in (self.headings, *self.lines)]
        return self._captioned("\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])))

    def _captioned(self, text: str) -> str:
        return f"{self.caption}\n\n{text}" if self.caption else text

    def _pad(self, column: int, cell: str, width: int) -> str:
        return cell.rjust(width) if self.numeric[column] else cell.ljust(width)


def make_table(groups: Groups, columns: Sequence[Column]) -> Table:
    """A table with one line for each group of runs. If a group has several runs, a column shows the number of seeds."""
    values = [[[column.value(r) for r in group] for column in columns] for group in groups]
    lines = [[cell(v, column.digits) for v, column in zip(line, columns)] for line in values]
    numeric = [any(isinstance(v, (int, float)) for line in values for v in line[i]) for i in range(len(columns))]
    headings = [column.heading for column in columns]
    if any(len(group) > 1 for group in groups):
        headings, numeric = [*headings, "seeds"], [*numeric, True]
        lines = [[*line, str(len(group))] for line, group in zip(lines, groups)]
    return Table(headings, lines, numeric)


def known_columns(table: Table) -> Table:
    """The table without columns that are empty."""
    kept = [i for i in range(len(table.headings)) if any(line[i] for line in table.lines)]
    lines = [[line[i] for i in kept] for line in table.lines]
    return Table([table.headings[i] for i in kept], lines, [table.numeric[i] for i in kept], table.caption)


def cell(values: Sequence[Value], digits: int) -> str:
    """The text of a cell for the values of its runs: mean ± standard error of numbers, or each different text with its count.

    Where only some of the runs have a number, the cell says how many.
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    numbers = [value for value in known if not isinstance(value, str)]
    if len(numbers) < len(known):
        counts = Counter(known)
        return ", ".join(
            str(text) if len(counts) == 1 or count == 1 else f"{count} x {text}" for text, count in counts.items()
        )
    some = f" ({len(numbers)} of {len(values)})" if len(numbers) < len(values) else ""
    shown = numbers if len({*numbers}) > 1 else numbers[:1]  # one number of all runs has no error
    return Estimate.of(shown).text(digits) + some


def rows_of(runs: Sequence[RecordedRun], columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The table as data: one dict for each run, in full precision, with the run's case in the experiment."""
    return [
        {**{column.key: _finite(column.value(r)) for column in columns}, **r.case}
        | {"unstable_step": r.unstable_step, "seed": r.config["seed"], "directory": str(r.directory)}
        for r in runs
    ]


# ---- runs that belong together ----


def grouped(runs: Sequence[RecordedRun]) -> list[list[RecordedRun]]:
    """Groups of runs that differ only in the seed, in the paper's order of assignments. A second run of a seed has a group of its own, and so
    has one that was resumed under other settings, unless the others were too, at the same step.
    """
    groups: list[list[RecordedRun]] = []
    for candidate in runs:
        for group in groups:
            seeds = {r.config["seed"] for r in group}
            alike = candidate.changes == group[0].changes and not different(group[0].config, candidate.config)
            if candidate.config["seed"] not in seeds and alike:
                group.append(candidate)
                break
        else:
            groups.append([candidate])
    order = list(PUBLISHED)
    return sorted(
        groups, key=lambda g: order.index(g[0].assignment) if g[0].assignment in PUBLISHED else len(PUBLISHED)
    )


def different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Dotted keys that differ between two configurations and may change a run's numbers, without the seed."""
    return [key for change in other_settings(a, b) if (key := change.partition(":")[0]) != "seed"]


def settings_columns(groups: Groups) -> list[Column]:
    """A column for every setting in which the groups differ, except the assignment and the step rule, which have columns already. The rules
    of assignments have one where two of one name differ in them.

    A setting that follows from the choice of its part, such as those that only one residual rule has, is left out, and so is decay_steps
    where it is max_steps.
    """
    configs = [group[0].config for group in groups]
    keys = dict.fromkeys(key for config in configs for key in different(configs[0], config))
    rules = {(config["assignment"]["name"], _rules_of(config)) for config in configs}
    columns = []
    if len(rules) > len({name for name, _ in rules}):
        columns.append(Column("assignment.rules", "assignment.rules", lambda r: _rules_of(r.config)))
    whole = all(at(config, "schedule.decay_steps") == config["max_steps"] for config in configs)
    for key in keys:
        if key.startswith("assignment.") or key == "optim.muon.rule.kind" or (key == "schedule.decay_steps" and whole):
            continue
        part = key.rpartition(".")[0]
        choices = [f"{part}.{word}" for word in ("rule", "kind", "name")]
        if not any(choice in keys and choice != key and _follows(configs, choice, key) for choice in choices):
            columns.append(of_setting(key, key, key))
    return columns


def _rules_of(config: dict[str, Any]) -> str:
    return ", ".join(f"{pattern}: {choice}" for pattern, choice in (at(config, "assignment.rules") or {}).items())


def _follows(configs: Sequence[dict[str, Any]], choice: str, key: str) -> bool:
    """Whether configurations with the same choice always have the same value of a key."""
    pairs = {(text_at(config, choice), text_at(config, key)) for config in configs}
    return len(pairs) == len({chosen for chosen, _ in pairs})


def of_setting(heading: str, name: str, key: str) -> Column:
    """A column of the value at a dotted key of the configurations; its key in table.json is `name`."""
    return Column(heading, name, lambda r: text_at(r.config, key))


def report_columns(groups: Groups) -> list[Column]:
    """The columns of the paper's table, the step rule, the settings in which the groups differ, and the steps of each run.

    The losses of the paper are left out unless all runs are at its scale. The measurements of a run that has not ended are left out where
    another run of its group has ended.
    """
    early = {r.directory for g in groups if any(r.finished for r in g) for r in g if not r.finished}

    def of_ended(column: Column) -> Column:
        return replace(column, value=lambda r: None if r.directory in early else column.value(r))

    rule = Column("step rule", "step_rule", lambda r: text_at(r.config, "optim.muon.rule.kind") if r.has_muon else None)
    steps = Column("steps", "steps", lambda r: f"{r.step}/{r.config['max_steps']}")
    status = COLUMNS.index(STATUS)
    measured = map(of_ended, COLUMNS[3:status])
    columns = [*COLUMNS[:3], rule, *settings_columns(groups), *measured, steps, *COLUMNS[status:]]
    runs = [r for group in groups for r in group]
    kept = columns_with_values(columns, runs)
    return kept if all(map(at_paper_scale, runs)) else [c for c in kept if c.key != "paper_val_loss"]


def at_paper_scale(run: RecordedRun) -> bool:
    """Whether the paper's losses can stand beside those of a run: its model, its data, and at least as many tokens."""
    tokens = run.config["max_steps"] * float(text_at(run.config, "global_batch_tokens") or 0)
    return tokens >= PAPER_TOKENS and all(text_at(run.config, key) == v for key, v in PAPER_SHAPE.items())


# ---- what is written ----


def footer(command: str, runs: Sequence[RecordedRun], *remarks: str) -> str:
    """The text below a table: command, settings and machine. A setting in which the runs differ is left out, as is Muon's without Muon."""
    searched = any(text_at(r.config, "optim.matrices.lr") for r in runs)  # then it stands for that of Muon
    muon = not searched and any(r.has_muon for r in runs)
    parts = [
        f"{len(runs)} runs" if runs else "",
        *_scale(runs),
        _shared(runs, "data `{}` ({} tokens)", "data.name", "data.tokenizer"),
        _shared(runs, "step rule `{}`", "optim.muon.rule.kind") if muon else "",
        _shared(runs, "peak learning rate of Muon {:g}", "optim.muon.lr") if muon else "",
        _shared(runs, "peak learning rate of AdamW {:g}", "optim.adamw.lr"),
        _shared(runs, "seed {:g}", "seed"),
    ]
    about = ", ".join(filter(None, parts))
    environments = [found for r in runs for found in r.environments] or [environment()]
    places = [*dict.fromkeys(map(_machine, environments))]
    if len(commits := {env["code"].removesuffix(" + changes") for env in environments if env.get("code")}) > 1:
        places.append(f"code of {len(commits)} commits")
    first = f"Written by {as_code(command)}{': ' if about else ''}{about}."
    return "\n".join([first, *filter(None, remarks), f"{'; '.join(places)}."])


def _machine(env: Mapping[str, Any]) -> str:
    """Device and versions of an environment.json in a few words."""
    versions = [f"Python {env.get('python')}", f"torch {env.get('torch')}"]
    return ", ".join([env.get("device", ""), *versions, env.get("platform", "")])


def about(runs: Sequence[RecordedRun]) -> str:
    """Model, steps and data of the runs in a few words, for below a picture. What the runs do not share is named without a value."""
    whole = [text or differing for text, differing in zip(_scale(runs), ("several models", "several lengths", ""))]
    data = _shared(runs, "data {} ({} tokens)", "data.name", "data.tokenizer") or "several sources of data"
    return ", ".join(filter(None, [*whole, data])) if runs else ""


def _scale(runs: Sequence[RecordedRun]) -> list[str]:
    """The model, the steps and the tokens of a step; an empty text where the runs differ."""
    return [
        _shared(runs, "{:g} layers of width {:g}, context {:g}", "model.n_layer", "model.n_embd", "model.block_size"),
        _shared(runs, "{:,.0f} steps", "max_steps"),
        _shared(runs, "{:,.0f} tokens a step", "global_batch_tokens"),
    ]


def _shared(runs: Sequence[RecordedRun], text: str, *keys: str) -> str:
    """The text with the values of the keys; empty if the runs differ in one, or have none."""
    values = [{at(r.config, key) for r in runs} for key in keys]
    if any(len(found) != 1 or found & {None, ""} for found in values):
        return ""
    return text.format(*(value for (value,) in values))


def _finite(value: Any) -> Any:
    """The data with None for every number that is not finite, because JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tables(
    directory: Path, tables: Sequence[Table], foot: str, data: Mapping[str, Any], name: str = "table"
) -> None:
    """Write <name>.md (the tables and the text below them) and <name>.json into a directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / f"{name}.md", "\n\n".join([*(table.markdown() for table in tables), foot]) + "\n")
    write_whole(directory / f"{name}.json", json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")
