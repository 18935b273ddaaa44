"""Train AdamW and the five assignments for a given time, all to the same number of steps, in one process.

    python scripts/gpu_runs.py folder=outputs/gpu_check_work/runs results=results/gpu seconds=500 data=books

The runs are those of `experiment=one_gpu` and follow its schedule as far as the time allows. The model is compiled once for all of them.
First every run is trained for a few steps. Their time tells how many more steps fit into the remaining seconds, and every run is trained to
that number; then again, while time is left. The same command again continues the runs in the same way. It writes a table and pictures to
`results`. The data is prepared if it is missing.

steps= is the length of the whole schedule (2,500), micro_batch_size= the number of windows of a forward pass. tiny=true takes a small model;
prepare=true only checks the settings and prepares the data. Every other word is an override of train.py.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data.prepare import prepare
from data.settings import Source
from scripts.analysis.figures import draw
from scripts.analysis.runs import RecordedRun, find_runs
from scripts.analysis.tables import (
    Column,
    columns_with_values,
    footer,
    grouped,
    make_table,
    report_columns,
    rows_of,
    write_tables,
)
from scripts.command import UsageError, command_line, parse, refuse, run
from scripts.reproduce import ASSIGNMENTS
from scripts.timing import stoppable
from train import train
from training.checks import check
from training.config import compose
from training.data import holds_files, require_data
from training.log import read_records
from training.settings import Settings
from training.validate import problems_of_directory

RUNS = tuple(dict.fromkeys(("adamw", "hetero", *ASSIGNMENTS)))  # those with a bar come first, if time is short
# Without certificates: training waits for each, several eigendecompositions of every matrix in float64.
SETTINGS = [
    *("experiment=one_gpu", "eval_interval=50", "eval_windows=128", "probe.interval=50", "log.interval_spectra=250"),
    *("log.interval_certificate=null", "checkpoint.interval=1000000", "checkpoint.keep=1", "full_eval=false"),
]
TINY_SETTINGS = [
    *(
        "experiment=demo",
        "model.vocab_size=auto",
        "model.n_layer=1",
        "model.n_head=2",
        "model.n_embd=16",
        "model.block_size=16",
    ),
    *("global_batch_tokens=128", "micro_batch_size=4", "eval_interval=4", "eval_windows=4", "log.interval=1"),
    *("probe.interval=4", "log.interval_spectra=4", "schedule.warmup_steps=2", "full_eval=false"),
]

# Share of the remaining time that is planned for steps: evaluations and probes between the steps take time too.
_PLANNED = 0.8


@dataclass
class TimedRuns:
    """The runs, each in a directory of `folder` named after its assignment.

    first: the steps that every run makes before the rest is planned. most: the steps of the whole schedule. end: the time.monotonic() at
    which the time is over. costs: run → seconds of a step (`step`), and the seconds that a call of `train` takes beside its steps: if this
    process has not trained the run before and compiles its update (`new`), and otherwise (`known`). failed: runs that ended with an error,
    which the others do not wait for.
    """

    folder: Path
    overrides: list[str]
    first: int
    most: int
    end: float
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)  # by this process
    failed: list[str] = field(default_factory=list)

    def config(self, name: str, steps: int) -> Settings:
        """The configuration of a run of `steps` steps."""
        fixed = [f"assignment={name}", f"max_steps={steps}", f"schedule.decay_steps={self.most}"]
        return compose([*self.overrides, *fixed, "logger.mode=disabled", "resume=auto"])

    def reached(self, name: str) -> int:
        """The step of a run's newest checkpoint."""
        found = (self.folder / name / "checkpoints").glob("step_*")
        return max((int(p.name[5:]) for p in found if p.name[5:].isdigit()), default=0)

    def expected(self, name: str, steps: int) -> float:
        """The seconds that so many steps of a run take, as far as that is known: if it is new, as of the slowest of the others."""
        known = [self.costs[name]] if name in self.costs else list(self.costs.values())
        beside = "known" if name in self.trained else "new"
        return max((cost.get(beside, cost["known"]) + steps * cost["step"] for cost in known), default=0.0)

    def train_to(self, steps: int) -> bool:
        """Train every run that has made fewer than `steps` steps up to that number; false if the time ends before."""
        for name in RUNS:
            before = self.reached(name)
            if before >= steps or name in self.failed:
                continue
            if time.monotonic() + self.expected(name, steps - before) > self.end:
                print(f"\n{name}: stays at {before}, since the time is too short for {steps}", flush=True)
                return False
            print(f"\n{name}: {before} → {steps}", flush=True)
            cfg, start = self.config(name, steps), time.monotonic()
            try:
                train(cfg, self.folder / name)
                self.note(name, cfg, before, time.monotonic() - start)
            except Exception:
                traceback.print_exc()
                self.failed.append(name)
            gc.collect()  # frees this model before the next one is made
        return True

    def note(self, name: str, cfg: Settings, before: int, seconds: float) -> None:
        """Note what a call of `train` cost that began at the step `before`: the steps of its records include the compilation of the update.

        Raises:
            ValueError: the run has ended before its last step.
        """
        records = [r for r in read_records(self.folder / name, "train") if r["step"] > before]
        if not records or records[-1]["step"] < cfg.max_steps:
            raise ValueError(f"{name} ended before step {cfg.max_steps}; its records say why")
        ends = [before, *(r["step"] for r in records)]
        spans = [cfg.global_batch_tokens / r["tokens_per_s"] for r in records]  # seconds of a step
        in_steps = sum((b - a) * span for a, b, span in zip(ends, ends[1:], spans))
        cost = {"step": statistics.median(spans), "known": seconds - in_steps}
        if name not in self.trained:
            cost["new"] = seconds - cost["step"] * (cfg.max_steps - before)
        self.trained.add(name)
        self.costs[name] = self.costs.get(name, {}) | cost
        (self.folder / "costs.json").write_text(json.dumps(self.costs, indent=2) + "\n")

    def next_goal(self) -> int:
        """The number of steps to which all runs are trained next; 0 if the time allows no more, or all are done."""
        runs = [name for name in RUNS if name not in self.failed]
        here, few = min(map(self.reached, runs), default=self.most), max(1, self.first // 4)
        left = self.end - time.monotonic()
        if here >= self.most or left <= 0:
            return 0
        if any(name not in self.costs for name in runs):  # a signal came between its save and its note
            return min(self.most, here + few)
        known = statistics.median(self.costs[name]["known"] for name in runs)  # the first run also compiles the model
        beside = sum(known if name in self.trained else self.costs[name]["new"] for name in runs)
        more = int((_PLANNED * left - beside) / sum(self.costs[name]["step"] for name in runs))
        return min(self.most, here + more) if more >= few else 0

    def run(self) -> None:
        """Train all runs to the same number of steps, as many as the time allows."""
        plan, costs = self.folder / "plan.json", self.folder / "costs.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if costs.exists():
            self.costs = json.loads(costs.read_text())
        goal = json.loads(plan.read_text())["steps"] if plan.exists() else self.first
        while goal:
            ended = self.train_to(goal)  # at first: the first steps, or the rest of an interrupted command
            if goal := self.next_goal() if ended else 0:
                plan.write_text(json.dumps({"steps": goal}) + "\n")


def of_speed(heading: str, key: str, digits: int, unit: float = 1.0) -> Column:
    """A column of a field of the training records: its median over the run, in a unit."""

    def value(run: RecordedRun) -> float | None:
        found = [r[key] for r in run.records.get("train", []) if r.get(key) is not None]
        return statistics.median(found) / unit if found else None

    return Column(heading, key, value, digits)


def start_seconds(run: RecordedRun) -> float | None:
    """The seconds until the first training record, in which the programs are compiled."""
    first = next(iter(run.records.get("train", [])), None)
    return first["step"] * run.config["global_batch_tokens"] / first["tokens_per_s"] if first else None


def farthest(run: RecordedRun) -> float | None:
    """The largest distance of a matrix from its manifold at the last spectra; None where no matrix has a Gram condition."""
    spectra = run.records.get("spectra", [])
    found = [r.get("distance") or 0.0 for r in spectra if r["step"] == spectra[-1]["step"]]
    return max(found, default=0.0) or None


SPEED = [
    Column("distance", "distance", farthest, 7),
    Column("start s", "start_seconds", start_seconds, 0),
    of_speed("tokens/s", "tokens_per_s", 0),
    of_speed("MFU", "mfu", 3),
    of_speed("peak GiB", "peak_device_bytes", 1, 2**30),
]


def write_runs(timed: TimedRuns, results: Path, arguments: Sequence[str]) -> str:
    """Write the table of all runs and its pictures; returns the table for a terminal."""
    groups = grouped(find_runs([timed.folder]))
    runs = [r for group in groups for r in group]
    columns = [*report_columns(groups), *columns_with_values(SPEED, runs)]
    table, command = make_table(groups, columns), command_line("gpu_runs.py", *arguments)
    steps = sorted({min(r.step for r in runs), max(r.step for r in runs)})
    remark = (
        f"The runs made {' to '.join(f'{n:,}' for n in steps)} of the schedule's {timed.most:,} steps. Losses after fewer steps than the paper's, or on "
        "other text, cannot be compared with its losses. `distance` is that of the matrix "
        "farthest from its manifold at the end; `start s` is the time until the first training record, in which programs are compiled."
    )
    data = {"command": command, "environment": runs[0].environment, "rows": rows_of(runs, columns)}
    write_tables(results, [table], footer(command, runs, remark), data)
    draw(groups, results)
    return table.text()


def work(arguments: list[str]) -> int:
    """Train; then print and write the table, also if the training was stopped."""
    options: dict[str, Any] = {"folder": "", "results": "", "seconds": 500, "micro_batch_size": 0}
    options |= {"tiny": False, "prepare": False, "steps": 0}
    overrides, o = parse(arguments, options, overrides=True)
    if min(o["steps"], o["seconds"]) < 0:
        raise UsageError("steps= and seconds= must not be below 0; steps=0 is the usual schedule")
    if not (o["folder"] and o["results"]):
        raise UsageError("give folder= for the runs and results= for the table; see --help")
    refuse([problem for key in ("folder", "results") for problem in problems_of_directory(Path(o[key]), key)])
    first, most = (4, 12) if o["tiny"] else (40, 2500)
    most = o["steps"] or most
    micro = [f"micro_batch_size={o['micro_batch_size']}"] if o["micro_batch_size"] else []
    settings = [*(TINY_SETTINGS if o["tiny"] else SETTINGS), *micro, *overrides]
    timed = TimedRuns(Path(o["folder"]), settings, min(first, most), most, time.monotonic() + o["seconds"])
    for name in RUNS:
        check(timed.config(name, first))
    cfg = timed.config(RUNS[0], first)
    if isinstance(cfg.data, Source) and not holds_files(cfg.data.dir):
        prepare(cfg.data)
    require_data(cfg, begins=not any(timed.folder.glob("*/metrics.jsonl")))
    if o["prepare"]:
        return 0
    try:
        with stoppable():
            timed.run()
    finally:
        if any(timed.folder.glob("*/metrics.jsonl")):
            print("\n" + write_runs(timed, Path(o["results"]), arguments), flush=True)
    if timed.failed:
        print(f"failed, see above: {', '.join(timed.failed)}", flush=True)
    return 1 if timed.failed else 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
