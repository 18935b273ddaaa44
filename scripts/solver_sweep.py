"""Our step against the published one: a learning-rate sweep, and the best of each side by side.

    python scripts/solver_sweep.py                     the whole grid: 4 assignments x 2 settings x 5 rates x 2 seeds
    python scripts/solver_sweep.py seeds=1,2,3 workers=1 max_steps=600

A correct solver moves one to four times further at the same learning rate, so only best can be compared with best. Options: workers=2,
seeds=1,2, rates=0.01,0.02,0.05,0.1,0.2, output_dir=, results=; anything else is an override of train.py for every run. Stop it and start
it again: finished runs are kept.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import as_code, parse, run
from scripts.grid import Job, exit_code, run_grid
from scripts.runs import Run, read_run
from training.checks import check
from training.config import compose

ROOT = Path(__file__).resolve().parent.parent
ASSIGNMENTS = ("all_stiefel", "all_dgram", "hetero", "hetero_inv")
SETTINGS = ("paper", "manifold_muon")


def jobs_of(options: dict[str, Any], overrides: Sequence[str]) -> dict[tuple[str, str, str, str], Job]:
    """(assignment, setting, rate, seed) → job. Raises ConfigError before anything is written."""
    jobs = {}
    for assignment in ASSIGNMENTS:
        for setting in SETTINGS:
            for rate in options["rates"].split(","):
                for seed in options["seeds"].split(","):
                    chosen = [f"assignment={assignment}", f"optim={setting}", f"optim.muon.lr={rate}", f"seed={seed}"]
                    name = f"{assignment},{setting},lr={rate},seed={seed}"
                    directory = Path(options["output_dir"]) / name
                    jobs[assignment, setting, rate, seed] = Job(
                        ("experiment=solver_sweep", *chosen, *overrides), directory
                    )
    check(compose(next(iter(jobs.values())).overrides))
    return jobs


def mean_and_error(losses: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of one number is NaN."""
    error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
    return statistics.fmean(losses), error


def collect(jobs: dict[tuple[str, str, str, str], Job]) -> list[dict[str, Any]]:
    """One row per (assignment, setting, rate): losses over seeds, and which runs were unstable or failed."""
    cells: dict[tuple[str, str, str], list[Run]] = {}
    for (assignment, setting, rate, _), job in jobs.items():
        if job.ended:
            cells.setdefault((assignment, setting, rate), []).append(read_run(job.directory))
    rows = []
    for (assignment, setting, rate), runs in cells.items():
        losses = [r.final for r in runs]
        mean, error = mean_and_error(losses)
        unstable = sum(r.unstable_step is not None for r in runs)
        name = runs[0].assignment
        rows.append(
            {
                "assignment": name,
                "key": assignment,
                "setting": setting,
                "rate": float(rate),
                "mean": mean,
                "error": error,
            }
            | {"seeds": len(runs), "unstable": unstable, "losses": losses}
        )
    return rows


def tables(rows: list[dict[str, Any]], command: str, environment: dict[str, str]) -> str:
    """Markdown: every rate, then best against best."""
    rates = sorted({row["rate"] for row in rows})
    lines = [
        "| assignment | optim | " + " | ".join(f"lr {rate:g}" for rate in rates) + " |",
        "|---" * (2 + len(rates)) + "|",
    ]
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for assignment in dict.fromkeys(row["assignment"] for row in rows):
        for setting in SETTINGS:
            mine = {row["rate"]: row for row in rows if (row["assignment"], row["setting"]) == (assignment, setting)}
            stable = [row for row in mine.values() if not row["unstable"]]
            if stable:
                best[assignment, setting] = min(stable, key=lambda row: row["mean"])
            lines.append(f"| {assignment} | {setting} | " + " | ".join(cell(mine.get(rate)) for rate in rates) + " |")
    lines += ["", "Best against best (final validation loss in nats a byte, mean ± standard error over seeds):", ""]
    lines += ["| assignment | published | at lr | ours | at lr | ours − published |", "|---|---|---|---|---|---|"]
    for assignment in dict.fromkeys(row["assignment"] for row in rows):
        pair = [best.get((assignment, setting)) for setting in SETTINGS]
        if all(pair):
            theirs, ours = pair
            error = (theirs["error"] ** 2 + ours["error"] ** 2) ** 0.5
            lines.append(
                f"| {assignment} | {cell(theirs)} | {theirs['rate']:g} | {cell(ours)} | {ours['rate']:g} "
                f"| {ours['mean'] - theirs['mean']:+.3f} ± {error:.3f} |"
            )
    versions = ", ".join(f"{key} {value}" for key, value in environment.items() if key in ("torch", "python", "device"))
    return "\n".join([*lines, "", f"Written by {as_code(command)} ({versions}).", ""])


def cell(row: dict[str, Any] | None) -> str:
    """A table's entry: mean ± error, and how many seeds were unstable."""
    if row is None:
        return "not run"
    mark = f" ({row['unstable']} of {row['seeds']} unstable)" if row["unstable"] else ""
    return f"{row['mean']:.3f} ± {row['error']:.3f}{mark}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Final loss against the learning rate, one panel an assignment, the two settings against each other."""
    from matplotlib.figure import Figure

    from scripts.figures import save

    names = list(dict.fromkeys(row["assignment"] for row in rows))
    figure = Figure(figsize=(11, 3.2), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True)
    for axis, name in zip(axes, names):
        for setting, colour, label in (("paper", "#D55E00", "published"), ("manifold_muon", "#0072B2", "ours")):
            mine = sorted(
                (r for r in rows if (r["assignment"], r["setting"]) == (name, setting)), key=lambda r: r["rate"]
            )
            values = [[r[key] for r in mine] for key in ("rate", "mean", "error")]
            axis.errorbar(*values[:2], yerr=values[2], color=colour, marker="o", markersize=4, capsize=2, label=label)
        axis.set_xscale("log")
        axis.set_title(name)
        axis.set_xlabel("learning rate of the matrices")
    axes[0].set_ylabel("validation loss (nats a byte)")
    axes[0].legend(frameon=False)
    save(figure, path)


def work(arguments: list[str]) -> int:
    """The command; see the module's docstring."""
    defaults = {"workers": 2, "seeds": "1,2", "rates": "0.01,0.02,0.05,0.1,0.2", "output_dir": "outputs/solver_sweep"}
    overrides, options = parse(arguments, {**defaults, "results": str(ROOT / "results" / "solver_sweep")})
    jobs = jobs_of(options, overrides)
    failures = run_grid(list(jobs.values()), options["workers"])
    rows, results = collect(jobs), Path(options["results"])
    if rows:
        results.mkdir(parents=True, exist_ok=True)
        environment = read_run(next(job.directory for job in jobs.values() if job.ended)).environment
        text = tables(rows, shlex.join(["python", "scripts/solver_sweep.py", *arguments]), environment)
        (results / "table.md").write_text(text)
        (results / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
        draw(rows, results / "loss_by_rate.png")
        print(text)
    return exit_code(failures)


if __name__ == "__main__":
    sys.exit(run(work, None, __doc__))
