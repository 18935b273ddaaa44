"""The paper's table for any runs, finished or not.

    python scripts/report.py outputs/sweep figures=outputs/sweep

Takes runs and directories of runs. Runs that differ in nothing but the seed share a line: mean ± standard error. With `figures=` the
validation losses and singular values are drawn into that directory.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import UsageError, as_cell, parse, run
from scripts.runs import Run, find_runs, same_settings

PUBLISHED = {
    "Unconstrained": "3.3855",
    "All-Stiefel": "3.3679",
    "All-DGram": "unstable",
    "Hetero": "3.3544",
    "Hetero-Inv": "unstable",
}
"""Validation losses of arXiv 2606.13276 (GPT-2 124M, 3.28B tokens of OpenWebText, one seed), in the paper's order."""

Value = float | str | None


@dataclass(frozen=True)
class Column:
    """One column of the table: a heading, its key in table.json, and what it says of a run; numbers get `digits` decimals."""

    heading: str
    key: str
    value: Callable[[Run], Value]
    digits: int = 4


COLUMNS = [
    Column("assignment", "assignment", lambda r: r.assignment),
    Column("attention", "attention", lambda r: r.geometry("attention")),
    Column("mlp", "mlp", lambda r: r.geometry("mlp")),
    Column("val loss, best", "val_loss_best", lambda r: r.best),
    Column("final", "val_loss_final", lambda r: r.final),
    Column("full split", "full_val_loss", lambda r: r.full),
    Column("σ max attn", "sigma_max_attention", lambda r: r.sigma_max("attention"), digits=2),
    Column("σ max mlp", "sigma_max_mlp", lambda r: r.sigma_max("mlp"), digits=2),
    Column("entropy", "least_entropy", lambda r: r.least_entropy, digits=2),
    Column("saturated", "greatest_saturation", lambda r: r.greatest_saturation, digits=2),
    Column("feas", "mean_feas", lambda r: r.mean_feas, digits=2),
    Column("status", "status", lambda r: r.status),
    Column("paper", "paper_val_loss", lambda r: PUBLISHED.get(r.assignment)),
]
"""The table of one set of settings. A new measurement is a new line here."""

LOSSES = (
    "Losses are in nats a token: best and final of the evaluations on `eval_windows` windows, and full split, that of the whole "
    "validation split after the last step."
)
"""What a table's foot says of its losses."""


def told(columns: Sequence[Column], runs: Sequence[Run]) -> list[Column]:
    """The columns in which at least one run has something to say."""
    return [column for column in columns if any(column.value(r) is not None for r in runs)]


# ---- runs that belong together ----


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in nothing but the seed, in the paper's order of assignments."""
    groups: list[list[Run]] = []
    for candidate in runs:
        for group in groups:
            if not different(group[0].config, candidate.config):
                group.append(candidate)
                break
        else:
            groups.append([candidate])
    order = list(PUBLISHED)
    return sorted(
        groups, key=lambda g: order.index(g[0].assignment) if g[0].assignment in PUBLISHED else len(PUBLISHED)
    )


def different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Dotted keys, the seed aside, in which two configurations differ and that may change a run's numbers."""
    return [key for change in same_settings(a, b) if (key := change.partition(":")[0]) != "seed"]


def settings_columns(groups: Sequence[Sequence[Run]]) -> list[Column]:
    """A column for every setting that tells the groups apart, but for the assignment, which the table names anyway."""
    first = groups[0][0].config
    keys = dict.fromkeys(key for group in groups for key in different(first, group[0].config))
    columns = []
    for key in keys:
        # Of two step rules, which share few settings, the name says enough; decay_steps follows max_steps.
        if key.startswith(("assignment.", "optim.muon.rule.")) or (
            key == "schedule.decay_steps" and "max_steps" in keys
        ):
            continue
        columns.append(Column(key, key, lambda r, key=key: _setting(r.config, key)))
    return columns


def _setting(config: Any, key: str) -> str:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return "" if config is None else str(config)


def report_columns(groups: Sequence[Sequence[Run]]) -> list[Column]:
    """The table's columns with the optimizer's step rule, what tells the groups apart, and how far each run went."""
    rule = Column("step rule", "step_rule", lambda r: _setting(r.config, "optim.muon.rule.kind"))
    steps = Column("steps", "steps", lambda r: f"{r.step}/{r.config['max_steps']}")
    status = next(i for i, column in enumerate(COLUMNS) if column.key == "status")
    columns = [*COLUMNS[:3], rule, *settings_columns(groups), *COLUMNS[3:status], steps, *COLUMNS[status:]]
    return told(columns, [r for group in groups for r in group])


# ---- the table ----


@dataclass(frozen=True)
class Table:
    """Cells as text, one list a line, with their headings; `numeric` columns are aligned to the right."""

    headings: list[str]
    lines: list[list[str]]
    numeric: list[bool]

    def text(self) -> str:
        """For a terminal."""
        rows = [self.headings, *self.lines]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.headings))]
        aligned = [[self._pad(i, cell, widths[i]) for i, cell in enumerate(row)] for row in rows]
        return "\n".join(("  " + "  ".join(row)).rstrip() for row in aligned)

    def markdown(self) -> str:
        """For a README."""
        rule = ["---:" if right else "---" for right in self.numeric]
        rows = [[as_cell(text) for text in row] for row in (self.headings, *self.lines)]
        return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))

    def _pad(self, column: int, cell: str, width: int) -> str:
        return cell.rjust(width) if self.numeric[column] else cell.ljust(width)


def make_table(groups: Sequence[Sequence[Run]], columns: Sequence[Column]) -> Table:
    """One line a group; where some group has several seeds, their number is told."""
    values = [[[column.value(r) for r in group] for column in columns] for group in groups]
    lines = [[cell(v, column.digits) for v, column in zip(line, columns)] for line in values]
    numeric = [any(isinstance(v, (int, float)) for line in values for v in line[i]) for i in range(len(columns))]
    headings = [column.heading for column in columns]
    if any(len(group) > 1 for group in groups):
        headings, numeric = [*headings, "seeds"], [*numeric, True]
        lines = [[*line, str(len(group))] for line, group in zip(lines, groups)]
    return Table(headings, lines, numeric)


def cell(values: Sequence[Value], digits: int) -> str:
    """What a line says of its runs' values: mean ± standard error of numbers, each different text with its count."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if any(isinstance(value, str) for value in known):
        counts = Counter(known)
        return ", ".join(
            str(text) if len(counts) == 1 or count == 1 else f"{count} x {text}" for text, count in counts.items()
        )
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    mean = sum(known) / len(known)
    error = statistics.stdev(known) / math.sqrt(len(known)) if all(map(math.isfinite, known)) else math.nan
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def rows_of(runs: Sequence[Run], columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The table as data, one dict a run, in full precision; a number that is not finite becomes null, as JSON has none."""
    rows = []
    for r in runs:
        values = {column.key: column.value(r) for column in columns}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        rows.append({**finite, "seed": r.config["seed"], "directory": str(r.directory)})
    return rows


# ---- the command ----


def draw(groups: Sequence[Sequence[Run]], directory: Path) -> list[Path]:
    """Write val_loss.png and spectra.png into a directory, as far as the runs have something to show."""
    from scripts import figures

    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    if any(r.records.get("eval") for group in groups for r in group):
        drawn.append(figures.val_loss(groups, directory / "val_loss.png"))
    if any(r.records.get("spectra") for group in groups for r in group):
        drawn.append(figures.spectra(groups, directory / "spectra.png"))
    return drawn


def work(arguments: list[str]) -> int:
    """Print the table; draw if asked to."""
    places, options = parse(arguments, {"figures": ""})
    if not places:
        raise UsageError("name runs or directories of runs, such as outputs/sweep; see --help")
    groups = grouped(find_runs(places))
    drawn: list[Path] = []
    if options["figures"]:
        try:
            drawn = draw(groups, Path(options["figures"]))
        except OSError as error:
            raise UsageError(
                f"figures={options['figures']} cannot be written ({error}); name another directory"
            ) from error
    print(make_table(groups, report_columns(groups)).text())
    for path in drawn:
        print(f"written: {path}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(work, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
