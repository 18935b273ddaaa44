"""Train AdamW and the five assignments for a given time, all to the same number of steps, in one process.

    python scripts/gpu_runs.py folder=outputs/gpu_check_work/runs results=results/gpu seconds=500 data=books

The runs are those of `experiment=one_gpu` and follow its schedule as far as the time allows. The model is compiled once for all of them.
First every run is trained for a few steps. Their time tells how many more steps fit into the remaining seconds, and every run is trained to
that number. The same command again continues the runs in the same way. It writes a table and pictures to `results`.

micro_batch_size= is the number of windows of a forward pass; tiny=true takes a small model. Every other word is an override of train.py.
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

from scripts.analysis.figures import draw
from scripts.analysis.runs import find_runs
from scripts.analysis.tables import footer, grouped, make_table, report_columns, rows_of, write_tables
from scripts.command import UsageError, command_line, parse, run
from scripts.reproduce import ASSIGNMENTS
from train import train
from training.checks import check
from training.config import compose
from training.data import open_data
from training.log import read_records
from training.settings import Settings

RUNS = ("adamw", *ASSIGNMENTS)
SETTINGS = [
    *("experiment=one_gpu", "eval_interval=50", "eval_windows=128", "probe.interval=50", "log.interval_spectra=250"),
    *("checkpoint.interval=1000000", "checkpoint.keep=1", "full_eval=false"),
]
TINY_SETTINGS = [
    *("experiment=demo", "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16"),
    *("global_batch_tokens=128", "micro_batch_size=4", "eval_interval=4", "eval_windows=4", "log.interval=1"),
    *("probe.interval=4", "log.interval_spectra=4", "schedule.warmup_steps=2", "full_eval=false"),
]

# Share of the remaining time that is planned for steps: evaluations and probes between the steps take time too.
_PLANNED = 0.8


@dataclass
class TimedRuns:
    """The runs, each in a directory of `folder` named after its assignment.

    first: the steps that every run makes before the rest is planned. most: the steps of the whole schedule. end: the time.monotonic() at
    which the time is over. failed: runs that ended with an error, which the others do not wait for.
    """

    folder: Path
    overrides: list[str]
    first: int
    most: int
    end: float
    costs: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # seconds of a step, most seconds outside the steps
    compiled: bool = False  # whether this process has trained one of them
    failed: list[str] = field(default_factory=list)

    def config(self, name: str, steps: int) -> Settings:
        """The configuration of a run of `steps` steps."""
        fixed = [f"assignment={name}", f"max_steps={steps}", f"schedule.decay_steps={self.most}"]
        return compose([*self.overrides, *fixed, "logger.mode=disabled", "resume=auto"])

    def reached(self, name: str) -> int:
        """The step of a run's newest checkpoint."""
        found = (self.folder / name / "checkpoints").glob("step_*")
        return max((int(p.name[5:]) for p in found if p.name[5:].isdigit()), default=0)

    def train_to(self, steps: int) -> None:
        """Train every run that has made fewer than `steps` steps up to that number."""
        for name in RUNS:
            before = self.reached(name)
            if before >= steps or name in self.failed:
                continue
            print(f"\n{name}: {before} → {steps}", flush=True)
            cfg, start = self.config(name, steps), time.monotonic()
            try:
                train(cfg, self.folder / name)
            except Exception:
                traceback.print_exc()
                self.failed.append(name)
                continue
            self.note(name, cfg, steps - before, time.monotonic() - start)
            gc.collect()  # frees this model before the next one is made

    def note(self, name: str, cfg: Settings, steps: int, seconds: float) -> None:
        """Note the cost of a run: the seconds of a step by its last record, and the seconds outside the steps."""
        last = list(read_records(self.folder / name, "train"))[-1]
        a_step = cfg.global_batch_tokens / last["tokens_per_s"]
        _, before = self.costs.get(name, (0.0, 0.0))
        self.costs[name], self.compiled = (a_step, max(before, seconds - a_step * steps)), True
        (self.folder / "costs.json").write_text(json.dumps(self.costs, indent=2) + "\n")

    def affordable(self) -> int:
        """The number of steps that all runs can reach in the remaining time; at least the number that all have reached."""
        runs = [name for name in RUNS if name not in self.failed]
        if not runs:
            return 0
        here = min(map(self.reached, runs))
        a_step = sum(self.costs[name][0] for name in runs)
        rest = [self.costs[name][1] for name in runs]  # the first run compiles
        beside = statistics.median(rest) * len(runs) if self.compiled else sum(rest)
        left = _PLANNED * (self.end - time.monotonic()) - beside
        return min(self.most, here + max(0, int(left / a_step)))

    def run(self) -> None:
        """Train all runs to the same number of steps, as many as the time allows."""
        plan, costs = self.folder / "plan.json", self.folder / "costs.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        target = json.loads(plan.read_text())["steps"] if plan.exists() else self.first
        if costs.exists():
            self.costs = {name: tuple(pair) for name, pair in json.loads(costs.read_text()).items()}
        self.train_to(target)  # the first steps, or the rest of an interrupted command
        further = self.affordable()
        if further > target:
            plan.write_text(json.dumps({"steps": further}) + "\n")
            self.train_to(further)


def write_runs(timed: TimedRuns, results: Path, arguments: Sequence[str]) -> str:
    """Write the table of all runs and its pictures; returns the table for a terminal."""
    groups = grouped(find_runs([timed.folder]))
    runs, columns = [r for group in groups for r in group], report_columns(groups)
    table, command = make_table(groups, columns), command_line("gpu_runs.py", *arguments)
    remark = (
        f"The runs made {min(r.step for r in runs):,} of the schedule's {timed.most:,} steps. The last column is the paper's loss after "
        "50,000 steps on other text: no number here can be compared with it."
    )
    data = {"command": command, "environment": runs[0].environment, "rows": rows_of(runs, columns)}
    write_tables(results, [table], footer(command, runs, remark), data)
    draw(groups, results)
    return table.text()


def work(arguments: list[str]) -> int:
    """Train; then print and write the table, also if the training was stopped."""
    options = {"folder": "", "results": "", "tiny": False, "seconds": 500, "micro_batch_size": 0}
    overrides, o = parse(arguments, options)
    if not (o["folder"] and o["results"]):
        raise UsageError("give folder= for the runs and results= for the table; see --help")
    first, most = (4, 12) if o["tiny"] else (40, 2500)
    micro = [f"micro_batch_size={o['micro_batch_size']}"] if o["micro_batch_size"] else []
    settings = [*(TINY_SETTINGS if o["tiny"] else SETTINGS), *micro, *overrides]
    timed = TimedRuns(Path(o["folder"]), settings, first, most, time.monotonic() + o["seconds"])
    for name in RUNS:
        check(timed.config(name, first))
    open_data(timed.config(RUNS[0], first))
    try:
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
