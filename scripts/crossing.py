"""Weight manifolds against residual rules: assignments x rules x seeds at one budget, a table and a heat map.

    python scripts/crossing.py                                                       the grid of configs/experiment/crossing.yaml
    python scripts/crossing.py residual=all assignment=hetero results=results/residual_rules      every rule, one assignment
    python scripts/crossing.py assignment=hetero,all_stiefel residual=pre_norm,geonorm seed=1 max_steps=1000

Options: assignment=, residual= (or all), seed=: lists with commas; target=0: the loss whose step is told (0: one that every stable cell
reaches); workers=2; output_dir=; results=. Anything else is an override of train.py for every run. All cells share one learning rate, so
this compares rules as they come, not each at its best. Stop it and start it again: finished runs are kept.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.residual import RESIDUAL_RULES
from scripts.command import UsageError, as_code, parse, run
from scripts.grid import Job, exit_code, run_grid
from scripts.report import Column, Table, make_table
from scripts.runs import Run, read_run
from training.checks import check
from training.config import CONFIGS, compose

ROOT = Path(__file__).resolve().parent.parent
Cell = tuple[str, str]
"""An assignment and a residual rule."""


def grid() -> dict[str, str]:
    """The lists of the experiment, as a plain sweep takes them."""
    return yaml.safe_load((CONFIGS / "experiment" / "crossing.yaml").read_text())["hydra"]["sweeper"]["params"]


def jobs_of(options: dict[str, Any], overrides: Sequence[str]) -> dict[Cell, list[Job]]:
    """The runs of every cell, one a seed. Raises ConfigError before anything is written."""
    rules = list(RESIDUAL_RULES) if options["residual"] == "all" else options["residual"].split(",")
    cells: dict[Cell, list[Job]] = {}
    for assignment in options["assignment"].split(","):
        for rule in rules:
            for seed in options["seed"].split(","):
                chosen = (f"assignment={assignment}", f"residual={rule}", f"seed={seed}")
                directory = Path(options["output_dir"]) / ",".join((assignment, rule, f"seed={seed}"))
                job = Job(("experiment=crossing", *chosen, *overrides), directory)
                cells.setdefault((assignment, rule), []).append(job)
            check(compose(cells[assignment, rule][0].overrides))
    return cells


# ---- what a cell amounts to ----


def steps_to(run: Run, target: float) -> float | None:
    """The step at which the validation loss first falls to the target, between evaluations by a straight line; None if never."""
    steps, losses = run.curve("eval")
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return float(steps[0])
            share = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None


def stable(runs: Sequence[Run]) -> bool:
    """Whether no run of a cell became unstable or ended at a loss that is not finite."""
    return all(r.unstable_step is None and r.final is not None and math.isfinite(r.final) for r in runs)


def common_target(cells: dict[Cell, list[Run]]) -> float:
    """The lowest loss that every run of every stable cell reaches, rounded up to two decimals; infinite if no cell is stable."""
    reached = [r.best for runs in cells.values() if stable(runs) for r in runs]
    return math.ceil(max(reached, default=math.inf) * 100) / 100 if reached else math.inf


def table_of(cells: dict[Cell, list[Run]], target: float) -> Table:
    """One line a cell, in the order of the grid; mean ± standard error over seeds."""
    columns = [
        Column("assignment", "assignment", lambda r: r.assignment),
        Column("residual", "residual", lambda r: r.config["residual"]["rule"]),
        Column("val loss, best", "val_loss_best", lambda r: r.best),
        Column("final", "val_loss_final", lambda r: r.final),
        Column(f"steps to {target:.2f}", "steps_to_target", lambda r: steps_to(r, target), digits=0),
        Column("status", "status", lambda r: r.status),
    ]
    return make_table(list(cells.values()), columns)


def rows_of(cells: dict[Cell, list[Run]], target: float) -> list[dict[str, Any]]:
    """The same as data, one dict a run."""
    return [
        {"assignment": assignment, "residual": rule, "seed": r.config["seed"], "val_loss_best": r.best}
        | {"val_loss_final": r.final if r.final is not None and math.isfinite(r.final) else None}
        | {"steps_to_target": steps_to(r, target), "unstable_step": r.unstable_step}
        for (assignment, rule), runs in cells.items()
        for r in runs
    ]


def draw(cells: dict[Cell, list[Run]], path: Path) -> None:
    """A heat map of the mean final validation loss: assignments across, rules down; the error below each number, a cross for unstable."""
    import matplotlib
    from matplotlib.figure import Figure

    from scripts.figures import STYLE, save

    assignments, rules = (list(dict.fromkeys(cell[i] for cell in cells)) for i in (0, 1))
    means = {cell: sum(r.final for r in runs) / len(runs) for cell, runs in cells.items() if stable(runs)}
    grid = [[means.get((a, rule), math.nan) for a in assignments] for rule in rules]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(
            figsize=(2.2 + 1.25 * max(2, len(assignments)), 1.1 + 0.62 * len(rules)), dpi=130, layout="constrained"
        )
        axes = figure.subplots()
        shade = axes.imshow(grid, cmap="viridis_r", aspect="auto")
        names = [
            next(r.assignment for (a, _), runs in cells.items() for r in runs if a == name) for name in assignments
        ]
        axes.set_xticks(range(len(assignments)), names)
        axes.set_yticks(range(len(rules)), rules)
        axes.tick_params(length=0)
        for y, rule in enumerate(rules):
            for x, assignment in enumerate(assignments):
                runs, mean = cells.get((assignment, rule), []), means.get((assignment, rule))
                text = _cell_text(runs)
                bright = mean is not None and shade.norm(mean) > 0.5
                axes.text(x, y, text, ha="center", va="center", color="white" if bright else "black", fontsize=8)
        axes.set_title("final validation loss: light is good", loc="left", fontsize=9)
        figure.colorbar(shade, label="nats a token")
        save(figure, path)


def _cell_text(runs: Sequence[Run]) -> str:
    if not runs:
        return "not run"
    if not stable(runs):
        return f"✗ {sum(not stable([r]) for r in runs)} of {len(runs)}\nunstable"
    losses = [r.final for r in runs]
    mean = sum(losses) / len(losses)
    if len(losses) == 1:
        return f"{mean:.3f}"
    error = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1) / len(losses))
    return f"{mean:.3f}\n± {error:.3f}"


# ---- the command ----


def write_results(cells: dict[Cell, list[Run]], target: float, command: str, results: Path) -> str:
    """Write table.md, table.json and heat_map.png; returns the table for a terminal."""
    table, first = table_of(cells, target), next(iter(cells.values()))[0]
    cfg, env = first.config, first.environment
    footer = (
        f"Written by {as_code(command)}: {cfg['model']['n_layer']} layers of width {cfg['model']['n_embd']}, {cfg['max_steps']:,} steps of "
        f"{cfg['global_batch_tokens']:,} tokens of {as_code(cfg['data']['name'])}; peak learning rates {cfg['optim']['muon']['lr']:g} (Muon, step "
        f"rule `{cfg['optim']['muon']['rule']['kind']}`) and {cfg['optim']['adamw']['lr']:g} (AdamW), the same in every cell; losses in nats "
        f"a token, mean ± standard error over seeds. {env.get('device')}, Python {env.get('python')}, torch {env.get('torch')}."
    )
    results.mkdir(parents=True, exist_ok=True)
    (results / "table.md").write_text(f"{table.markdown()}\n\n{footer}\n")
    data = {"command": command, "target": target, "rows": rows_of(cells, target), "environment": env}
    (results / "table.json").write_text(json.dumps(data, indent=2, default=str) + "\n")
    draw(cells, results / "heat_map.png")
    return f"{table.text()}\n\n  written to {results}: table.md, table.json, heat_map.png"


def work(arguments: list[str]) -> int:
    """The command; see the module's docstring."""
    own = {"target": 0.0, "workers": 2, "output_dir": "outputs/crossing", "results": str(ROOT / "results" / "crossing")}
    overrides, options = parse(arguments, {**{key: str(value) for key, value in grid().items()}, **own})
    jobs = jobs_of(options, overrides)
    failures = run_grid([job for members in jobs.values() for job in members], options["workers"])
    cells = {cell: [read_run(job.directory) for job in members if job.ended] for cell, members in jobs.items()}
    cells = {cell: runs for cell, runs in cells.items() if runs}
    if not cells:
        raise UsageError("no run came to its end, so there is no table; the lines above say why")
    command = shlex.join(["python", "scripts/crossing.py", *arguments])
    print("\n" + write_results(cells, options["target"] or common_target(cells), command, Path(options["results"])))
    return exit_code(failures)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(work, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
