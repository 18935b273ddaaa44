"""What the experiments on failing attention share: their runs as a table, a picture and data."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.command import UsageError, as_code
from scripts.grid import Job, run_grid
from scripts.report import Column, make_table, rows_of
from scripts.runs import Run, read_run
from training.checks import check
from training.config import compose
from training.data import open_data

ROOT = Path(__file__).resolve().parent.parent

LAST = (  # what attention shows at the end, field by field of a probe's summary
    ("logit", "largest_logit", 0),
    ("entropy", "least_entropy", 2),
    ("saturated", "greatest_saturation", 2),
)


def columns(varied: Sequence[tuple[str, str]]) -> list[Column]:
    """The table's columns; `varied` names what differs between runs, as (heading, option), told by each run's `case`."""
    told = [Column(heading, option, lambda r, option=option: case_of(r)[option]) for heading, option in varied]
    seen = [Column(h, key, lambda r, key=key: last_probe(r, key), digits=digits) for h, key, digits in LAST]
    return [
        *told,
        Column("val loss, best", "val_loss_best", lambda r: r.best),
        Column("final", "val_loss_final", lambda r: r.final),
        *seen,
        Column("σ max attn", "sigma_max_attention", lambda r: r.sigma_max("attention"), digits=2),
        Column("warned at", "warned", lambda r: f"step {step}" if (step := warned_at(r)) is not None else "–"),
        Column("status", "status", lambda r: r.status),
    ]


def case_of(run: Run) -> dict[str, str]:
    """What this run was, option by option: its directory's name, as `directory_of` wrote it."""
    return dict(part.split("=", 1) for part in run.directory.name.split(","))


def directory_of(parent: Path, case: Mapping[str, str]) -> Path:
    """Where the run of a case is written."""
    return parent / ",".join(f"{option}={value}" for option, value in case.items())


def last_probe(run: Run, field: str) -> float | None:
    """A number of the last probe's summary."""
    return next((r[field] for r in reversed(run.records.get("probe", [])) if math.isfinite(r[field])), None)


def warned_at(run: Run) -> int | None:
    """The step of the early warning."""
    return next((e["step"] for e in run.records.get("event", []) if e["event"] == "warning"), None)


def train_cases(jobs: Sequence[Job], workers: int) -> list[Run]:
    """Check all, run what has not ended, and read what there is.

    Raises:
        ConfigError, DataError: before anything is written. UsageError: no run left anything.
    """
    for job in jobs:
        check(compose(list(job.overrides)))
    open_data(compose(list(jobs[0].overrides)))  # prepared once, not by every worker at the same time
    failures = run_grid(jobs, workers)
    for directory, reason in failures.items():
        print(f"{directory.name} stopped by an error: {reason}")
    runs = [read_run(job.directory) for job in jobs if job.ended]
    if not runs:
        raise UsageError("no run came to its end, so there is no table; the lines above say why")
    return runs


def by_case(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs whose cases differ in nothing but the seed."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(x for x in case_of(run).items() if x[0] != "seed"), []).append(run)
    return list(groups.values())


def write(
    runs: Sequence[Run],
    varied: Sequence[tuple[str, str]],
    name: str,
    results: Path,
    command: Sequence[str],
    remark: str,
) -> str:
    """Write <name>.md and <name>.json into `results`; returns the table for a terminal."""
    shown = columns(varied)
    table = make_table(by_case(runs), shown)
    results.mkdir(parents=True, exist_ok=True)
    words, seconds = shlex.join(command), sum(e["train_seconds"] for r in runs for e in r.records.get("end", []))
    env = runs[0].environment
    foot = (
        f"Written by {as_code(words)}: {len(runs)} runs of {runs[0].config['max_steps']} steps, {seconds / 60:.0f} minutes of training; "
        f"{env.get('device')}, torch {env.get('torch')}. Logit, entropy (least layer, relative to log(position)) and saturated rows "
        f"are those of the last probe. {remark}"
    )
    (results / f"{name}.md").write_text(f"{table.markdown()}\n\n{foot}\n")
    facts = {"command": words, "environment": env, "rows": rows_of(runs, shown)}
    (results / f"{name}.json").write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    return table.text()
