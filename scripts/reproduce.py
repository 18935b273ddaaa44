"""Train the five assignments of the paper one after the other, then write the paper's table and the pictures.

    python scripts/reproduce.py scale=demo                 minutes on two cores, no network
    python scripts/reproduce.py scale=demo optim=paper     the same under the published step rule
    python scripts/reproduce.py scale=paper                the published recipe (prepare the data first)
    python scripts/reproduce.py scale=demo --accept        the same, and the table replaces the committed one
    python scripts/reproduce.py scale=demo seeds=1,2 output_dir=outputs/seeds

`scale` is a recipe of configs/experiment. Any override of train.py may follow; it applies to all five runs. Options of this command:

    seeds=        a list with commas (the recipe's seed); the runs of an assignment share a line: mean ± standard error
    output_dir=   where the runs are written (outputs/reproduce/<name>), each in a directory named after its assignment
    results=      where table.md, table.json, val_loss.png, spectra.png and layers.png are written (beside the runs)
    --accept      afterwards copy them into results/<name>, and replace the table in README.md or docs/

<name> is the scale, or with optim= the scale and the step rule: demo, demo_paper. If results/<name> holds a table, the new losses are printed
beside its losses. The same command again continues: finished runs are kept, and an interrupted run continues from its last checkpoint. The
demonstration starts W&B only with logger.mode=offline or logger.mode=online.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.parallel import available_cores
from scripts.analysis.figures import draw
from scripts.analysis.runs import RecordedRun, at, read_run
from scripts.analysis.tables import (
    COLUMNS,
    Table,
    columns_with_values,
    footer,
    grouped,
    make_table,
    rows_of,
    write_tables,
)
from scripts.command import ROOT, UsageError, command_line, entries, parse, refuse, refuse_keys, run
from training.checks import check
from training.config import compose
from training.data import require_data
from training.files import write_whole
from training.job import finished
from training.jobs import Job, run_here
from training.log import METRICS_FILE
from training.validate import problems_of_directory

ASSIGNMENTS = ("unconstrained", "all_stiefel", "all_dgram", "hetero", "hetero_inv")
SCALE_SETTINGS = {"demo": ["logger.mode=disabled"]}
REPRODUCE_KEYS = {  # keys of train.py that this command decides, and what to do instead
    "experiment": "choose the recipe with scale=",
    "assignment": "all five are run; for one alone use python train.py",
    "seed": "give seeds=",
    "resume": "runs are resumed without asking; for fresh ones give another output_dir=",
}


@dataclass(frozen=True)
class Plan:
    """What the command line asks for: `overrides` and `seeds` as typed; `jobs` by assignment, and by seed if there are several.

    name: of the table, made of scale and step rule; None if the overrides make another table. accept: whether it replaces the committed one.
    """

    scale: str
    overrides: list[str]
    name: str | None
    results: Path
    jobs: dict[str, Job]
    accept: bool = False
    seeds: str = ""

    @property
    def command(self) -> str:
        """The command line that does the same."""
        seeds = [f"seeds={self.seeds}"] if self.seeds else []
        return command_line("reproduce.py", f"scale={self.scale}", *seeds, *self.overrides)

    @property
    def committed(self) -> Path | None:
        """The folder of the committed table of this name, whether it exists or not; None without a name."""
        return None if self.name is None else ROOT / "results" / self.name


def make_plan(arguments: Sequence[str]) -> Plan:
    """Compose and check all five configurations. Nothing is written.

    Raises:
        UsageError, ConfigError, DataError: the command line or a configuration is wrong.
    """
    words, options = parse(arguments, {"scale": "demo", "seeds": "", "results": "", "output_dir": ""}, overrides=True)
    overrides = [word for word in words if word != "--accept"]
    refuse_keys(overrides, REPRODUCE_KEYS)
    scale = options["scale"]
    optims, others = name_parts(overrides)
    others += [f"seeds={options['seeds']}"] if options["seeds"] else []
    name = "_".join([scale, *optims])
    if "--accept" in words and others:
        raise UsageError(
            f"--accept is for a table with nothing but a scale and a step rule; leave out {', '.join(others)}"
        )
    directory = Path(options["output_dir"] or f"outputs/reproduce/{name}")
    results = Path(options["results"] or directory)
    refuse([*problems_of_directory(directory), *problems_of_directory(results, "results")])
    jobs, configurations = {}, []
    seeds = entries(options["seeds"])
    for seed, assignment in itertools.product(seeds or [""], ASSIGNMENTS):
        settings = [f"experiment={scale}", f"assignment={assignment}", *SCALE_SETTINGS.get(scale, []), *overrides]
        settings += [f"seed={seed}"] if seed else []
        label = f"{assignment},seed={seed}" if len(seeds) > 1 else assignment
        jobs[label] = Job(tuple(settings), directory / label)
        configurations.append(compose(settings))
    for cfg, job in zip(configurations, jobs.values()):
        check(cfg)
        finished(cfg, job.directory, "give another output_dir=")
    begun = any((job.directory / METRICS_FILE).exists() for job in jobs.values())
    require_data(configurations[0], begins=not begun)
    return Plan(scale, overrides, None if others else name, results, jobs, "--accept" in words, options["seeds"])


def name_parts(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Two lists: the step rules that the overrides choose, for the table's name; and the overrides that change its numbers otherwise."""
    settings = [override for override in overrides if not override.startswith("logger.")]
    optims = [override.removeprefix("optim=") for override in settings if override.startswith("optim=")]
    return optims, [override for override in settings if not override.startswith("optim=")]


def train_all(plan: Plan) -> dict[str, str]:
    """Train the runs that have not ended. Returns assignment → reason, for those that an error stopped."""
    failures = {}
    for assignment, job in plan.jobs.items():
        if job.ended:
            print(f"{assignment}: done before; give another output_dir= to run it again")
            continue
        print(f"\n{assignment}", flush=True)
        outcome = run_here(job)
        if outcome.failure is not None:
            failures[assignment] = outcome.failure
    return failures


# ---- what is written ----


def write_reproduction(plan: Plan) -> tuple[str, list[str]]:
    """Write the table and the pictures into `plan.results`; returns the text for a terminal, and the names of the pictures.

    Raises:
        UsageError: no run has written anything. OSError: a file cannot be written.
    """
    directories = [job.directory for job in plan.jobs.values()]
    runs = [read_run(directory) for directory in directories if (directory / METRICS_FILE).exists()]
    if not runs:
        raise UsageError("no run has written anything, so there is no table; the errors above say why")
    groups = grouped(runs)
    table = make_table(groups, columns_with_values(COLUMNS, runs))
    data = {
        "command": plan.command,
        "published": "arXiv 2606.13276",
        "rows": rows_of(runs, COLUMNS),
        "cost": _total_cost(runs),
        "environment": runs[0].environment,
        "settings": {**runs[0].config, "assignment": None},
    }
    write_tables(plan.results, [table], footer(plan.command, runs, f"{_cost_line(runs)}.", remark(plan, runs)), data)
    pictures = [path.name for path in draw(groups, plan.results)]
    names = ", ".join(["table.md", "table.json", *pictures])
    before = [comparison(runs, plan.committed)] if plan.committed and (plan.committed / "table.json").exists() else []
    parts = [table.text(), *(other.text() for other in before)]
    written = f"  written to {plan.results}: {names}   ({_cost_line(runs)})"
    page = command_line("report.py", os.path.commonpath([r.directory for r in runs]))
    return "\n\n".join([*parts, f"{written}\n  everything on one page: {page}"]), pictures


def comparison(runs: Sequence[RecordedRun], committed: Path) -> Table:
    """A table of final losses, those of a committed table, and the differences."""
    rows = {row["assignment"]: row for row in json.loads((committed / "table.json").read_text())["rows"]}
    lines = []
    for r in runs:
        old = rows.get(r.assignment, {}).get("val_loss_final")
        known = old is not None and r.final is not None
        shown = ["" if loss is None else f"{loss:.4f}" for loss in (r.final, old)]
        lines.append([r.assignment, *shown, f"{r.final - old:+.4f}" if known else ""])
    place = committed.relative_to(ROOT) if committed.is_relative_to(ROOT) else committed
    return Table(
        ["assignment", "final", "committed", "difference"], lines, [False, True, True, True], f"  beside {place}:"
    )


def _total_cost(runs: Sequence[RecordedRun]) -> dict[str, Any]:
    costs = [r.cost for r in runs if r.cost]
    return {
        "runs": len(runs),
        "wall_seconds": sum(c["wall_seconds"] for c in costs),
        "peak_bytes": max((c["peak_bytes"] for c in costs), default=0),
        "peak_device_bytes": max(
            (e["peak_device_bytes"] or 0 for r in runs for e in r.records.get("end", [])), default=0
        ),
        "cores": max((c["cores"] for c in costs), default=available_cores()),
        "threads": max((c["threads"] for c in costs), default=torch.get_num_threads()),
    }


def _cost_line(runs: Sequence[RecordedRun]) -> str:
    """ "5 runs, 4 min 12 s, 1.1 GiB, 2 cores" """
    cost = _total_cost(runs)
    minutes, seconds = divmod(round(cost["wall_seconds"]), 60)
    hours, minutes = divmod(minutes, 60)
    wall = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    parts = [
        f"{cost['runs']} runs",
        wall,
        f"{cost['peak_bytes'] / 2**30:.2f} GiB peak memory",
        f"{cost['cores']} cores",
    ]
    if cost["peak_device_bytes"]:
        parts.append(f"{cost['peak_device_bytes'] / 2**30:.1f} GiB on the device")
    return ", ".join(parts)


def remark(plan: Plan, runs: Sequence[RecordedRun]) -> str:
    """Sentences below the table: what the columns mean, and with which numbers they can be compared."""
    other_scale = "" if plan.scale == "paper" else "; this is another scale: compare the order, not the numbers"
    return (
        "Losses are in nats a token: best and final of the evaluations on `eval_windows` windows, and full split, that of the whole "
        "validation split after the last step. σ max is the largest singular value at the end; entropy is the least of a layer's "
        "attention over training, relative to log(position), and saturated the greatest share of its rows with a probability above .99. "
        "The last column is the paper's loss (arXiv 2606.13276: GPT-2 124M, 3.28B tokens of OpenWebText, one seed)"
        f"{other_scale}. Weight decay {decay_of(runs[0].config)}."
    )


def decay_of(cfg: dict[str, Any]) -> str:
    """The matrices on which Muon's weight decay acts, in words. The step rules differ in this."""
    muon = cfg["optim"]["muon"]
    on = {
        None: "unconstrained matrices and DGram's column norms",  # the certified step has no such setting
        False: "unconstrained matrices only, as in the paper",
        True: "unconstrained matrices and DGram's column norms; on other manifolds it makes the step longer",
    }[muon["rule"].get("decay_manifolds")]
    replaced = at(cfg, "optim.matrices.weight_decay")
    return f"{muon['weight_decay'] if replaced is None else replaced:g} acts on {on}"


def accept(plan: Plan, committed: Path, pictures: Sequence[str]) -> str:
    """Copy the table and its pictures into `committed`, and replace the table in the Markdown files that show it; returns one line.

    Pictures in `committed` that are not among `pictures`, the names of those that belong to the table, are removed.
    """
    committed.mkdir(parents=True, exist_ok=True)
    if plan.results.resolve() != committed.resolve():
        for name in ("table.md", "table.json", *pictures):
            shutil.copyfile(plan.results / name, committed / name)
    for path in committed.glob("*.png"):
        if path.name not in pictures:
            path.unlink()
    table = (committed / "table.md").read_text()
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    renewed = [str(page.relative_to(ROOT)) for page in pages if renew(page, committed.name, table)]
    return f"  accepted: {', '.join([f'results/{committed.name}', *renewed])}"


def renew(page: Path, name: str, table: str) -> bool:
    """Replace the text between `<!-- table:<name> -->` and `<!-- /table -->` in a Markdown file; False if there is no such place.

    Raises:
        OSError: the file cannot be written; then it is unchanged.
    """
    if not page.exists():
        return False
    text = page.read_text()
    before, begin, rest = text.partition(f"<!-- table:{name} -->\n")
    _, end, after = rest.partition("<!-- /table -->")
    if not end:
        return False
    write_whole(page, f"{before}{begin}{table}{end}{after}")
    return True


# ---- the command ----


def work(arguments: list[str]) -> int:
    """Train, then print and write the table. Exit code 1 if an error stopped a run."""
    plan = make_plan(arguments)
    try:
        failures = train_all(plan)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    try:
        text, pictures = write_reproduction(plan)
        print("\n" + text)
        if plan.accept and plan.committed:
            print("  not accepted: a run failed" if failures else accept(plan, plan.committed, pictures))
    except OSError as error:
        raise UsageError(
            f"{error.filename or plan.results} cannot be written ({error}); the runs are kept: give another results="
        ) from error
    for assignment, reason in failures.items():
        print(f"{assignment} stopped by an error: {reason}", file=sys.stderr)
    return 1 if failures else 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
