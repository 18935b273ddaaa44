"""The paper's table by real training: the five assignments one after the other, then the table and the pictures.

    python scripts/reproduce.py scale=demo                 minutes on two cores, no network
    python scripts/reproduce.py scale=demo optim=paper     the same under the published step rule, beside it
    python scripts/reproduce.py scale=paper                the published recipe (prepare the data first)
    python scripts/reproduce.py scale=demo seed=2 results=outputs/seed2 output_dir=outputs/seed2/runs

`scale` is a recipe of configs/experiment; any override of train.py may follow and concerns all five runs. Options of this command:

    output_dir=   where the runs are written (outputs/reproduce/<name>), each in a directory named after its assignment
    results=      where table.md, table.json, val_loss.png and spectra.png are written (results/<name>)

<name> is the scale, and with optim= the scale and that: demo, demo_paper. The same command again goes on where it stopped: finished runs
are kept, an interrupted one continues from its last checkpoint. The demonstration does not start W&B unless it is told to, by
logger.mode=offline or logger.mode=online.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import UsageError, as_code, parse, run
from scripts.report import COLUMNS, LOSSES, draw, make_table, rows_of, told
from scripts.runs import COST_FILE, Run, read_run, refuse_other_settings
from train import check, open_data, train
from training.config import compose
from training.files import CONFIG_FILE
from training.lock import DirectoryLock, InUse
from training.log import METRICS_FILE, RunLog, read_records
from training.run import end_of
from training.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
ASSIGNMENTS = ("unconstrained", "all_stiefel", "all_dgram", "hetero", "hetero_inv")
SCALE_SETTINGS = {"demo": ["logger.mode=disabled"]}
OWN_KEYS = {  # keys of train.py that this command decides, and what to do instead
    "experiment": "choose the recipe with scale=",
    "assignment": "all five are run; for one alone use python train.py",
    "resume": "runs are resumed without asking; for fresh ones give another output_dir=",
}


@dataclass(frozen=True)
class Plan:
    """What is to be done: `overrides` as typed; `runs` maps an assignment to its configuration and directory.

    name: of the table, by scale and step rule; None if the overrides make it another table.
    """

    scale: str
    overrides: list[str]
    name: str | None
    results: Path
    runs: dict[str, tuple[Settings, Path]]

    @property
    def command(self) -> str:
        """The command line that does the same."""
        return shlex.join(["python", "scripts/reproduce.py", f"scale={self.scale}", *self.overrides])


def make_plan(arguments: Sequence[str]) -> Plan:
    """Compose and check all five configurations.

    Raises:
        UsageError, ConfigError, DataError, HydraException: before anything is written.
    """
    overrides, options = parse(arguments, {"scale": "demo", "results": "", "output_dir": ""})
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in OWN_KEYS:
            raise UsageError(f"{override} cannot be given here: {OWN_KEYS[key]}")
    scale = options["scale"]
    optims, others = name_parts(overrides)
    name = "_".join([scale, *optims])
    directory = Path(options["output_dir"] or f"outputs/reproduce/{name}")
    runs = {}
    for assignment in ASSIGNMENTS:
        settings = [f"experiment={scale}", f"assignment={assignment}", *SCALE_SETTINGS.get(scale, []), *overrides]
        runs[assignment] = (compose([*settings, "resume=auto"]), directory / assignment)
    for cfg, where in runs.values():
        check(cfg)
        refuse_other_settings(cfg.plain(), where)
    first, _ = next(iter(runs.values()))
    open_data(first)
    return Plan(scale, overrides, None if others else name, Path(options["results"] or ROOT / "results" / name), runs)


def name_parts(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The step rules that overrides choose, which are part of a table's name, and what else they change of its numbers."""
    settings = [override for override in overrides if not override.startswith("logger.")]
    optims = [override.removeprefix("optim=") for override in settings if override.startswith("optim=")]
    return optims, [override for override in settings if not override.startswith("optim=")]


# ---- training ----


def train_all(plan: Plan) -> dict[str, str]:
    """Run what has not ended yet; returns the reason for each assignment whose training stopped by an error."""
    failures = {}
    for assignment, (cfg, directory) in plan.runs.items():
        if end_of(directory) is not None:
            print(f"{assignment}: done before; give another output_dir= to run it again")
            continue
        print(f"\n{assignment}", flush=True)
        started = time.perf_counter()
        try:
            train(cfg, directory)
        except InUse:
            raise
        except Exception as error:  # whatever it is, the other runs are worth having, and the table tells
            failures[assignment] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            with contextlib.suppress(OSError, InUse):  # a full disk may be what went wrong
                _record_failure(cfg, directory, failures[assignment])
        finally:
            with contextlib.suppress(OSError, InUse):
                _add_cost(directory, time.perf_counter() - started)
    return failures


def _record_failure(cfg: Settings, directory: Path, message: str) -> None:
    """Write the failure where a run's events stand, so that every later table knows of it."""
    with DirectoryLock(directory):
        if not (directory / CONFIG_FILE).exists():
            (directory / CONFIG_FILE).write_text(yaml.safe_dump(cfg.plain(), sort_keys=False))
        exists = (directory / METRICS_FILE).exists()
        last = max((record["step"] for record in read_records(directory)), default=0) if exists else 0
        log = RunLog(directory)
        log.write("event", last, event="failed", message=message)
        log.close()


def _add_cost(directory: Path, seconds: float) -> None:
    """Add this process's time to what the run has cost so far, and note the largest memory (bytes) any process needed."""
    if not directory.exists():
        return  # it ended before it began
    path = directory / COST_FILE
    before = json.loads(path.read_text()) if path.exists() else {"wall_seconds": 0.0, "peak_bytes": 0}
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    cost = {
        "wall_seconds": before["wall_seconds"] + seconds,
        "peak_bytes": max(before["peak_bytes"], peak),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
    }
    with DirectoryLock(directory):
        path.write_text(json.dumps(cost) + "\n")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- what is written ----


def write_results(plan: Plan) -> str:
    """Write the table and the pictures into `plan.results`; returns the table for a terminal.

    A plain command, with nothing but a scale and a step rule, also renews its table between the markers of the README.
    """
    runs = [read_run(directory) for _, directory in plan.runs.values() if (directory / METRICS_FILE).exists()]
    if not runs:
        raise UsageError("no run has written anything, so there is no table; the errors above say why")
    groups = [[r] for r in runs]
    table = make_table(groups, told(COLUMNS, runs))
    plan.results.mkdir(parents=True, exist_ok=True)
    written = [plan.results / "table.md", plan.results / "table.json"]
    markdown = f"{table.markdown()}\n\n{footer(plan, runs)}\n"
    written[0].write_text(markdown)
    data = {
        "command": plan.command,
        "published": "arXiv 2606.13276",
        "rows": rows_of(runs, COLUMNS),
        "cost": _total_cost(runs),
        "environment": runs[0].environment,
        "settings": {**runs[0].config, "assignment": None},
    }
    written[1].write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
    written += draw(groups, plan.results)
    if plan.name is not None and plan.results == ROOT / "results" / plan.name:
        update_readme(ROOT / "README.md", plan.name, markdown)
    names = ", ".join(path.name for path in written)
    return f"{table.text()}\n\n  written to {plan.results}: {names}   ({_cost_line(runs)})"


def _total_cost(runs: Sequence[Run]) -> dict[str, Any]:
    costs = [r.cost for r in runs if r.cost]
    return {
        "runs": len(runs),
        "wall_seconds": sum(c["wall_seconds"] for c in costs),
        "peak_bytes": max((c["peak_bytes"] for c in costs), default=0),
        "peak_device_bytes": max(
            (e["peak_device_bytes"] or 0 for r in runs for e in r.records.get("end", [])), default=0
        ),
        "cores": max((c["cores"] for c in costs), default=_cores()),
        "threads": max((c["threads"] for c in costs), default=torch.get_num_threads()),
    }


def _cost_line(runs: Sequence[Run]) -> str:
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


def footer(plan: Plan, runs: Sequence[Run]) -> str:
    """Which script and settings wrote the table, on what, and at what cost."""
    cfg, env = runs[0].config, runs[0].environment
    model, muon = cfg["model"], cfg["optim"]["muon"]
    other_scale = "" if plan.scale == "paper" else "; this is another scale: compare the order, not the numbers"
    lines = [
        f"Written by {as_code(plan.command)}: {model['n_layer']} layers of width {model['n_embd']}, context {model['block_size']}; "
        f"{cfg['max_steps']:,} steps of {cfg['global_batch_tokens']:,} tokens; data {as_code(cfg['data']['name'])} "
        f"({cfg['data']['tokenizer']} tokens); step rule `{muon['rule']['kind']}`, peak learning rates {muon['lr']:g} (Muon) and "
        f"{cfg['optim']['adamw']['lr']:g} (AdamW); seed {cfg['seed']}.",
        f"{_cost_line(runs)}; {env.get('device', platform.machine())}, Python {env.get('python')}, torch {env.get('torch')}, "
        f"{env.get('platform')}.",
        f"{LOSSES} σ max is the largest singular value at the end; entropy is the least of a layer's attention "
        "over training, relative to log(position), and saturated the greatest share of its rows with a probability above .99. The last column is the paper's loss "
        f"(arXiv 2606.13276: GPT-2 124M, 3.28B tokens of OpenWebText, one seed){other_scale}. Weight decay {decay_of(cfg)}.",
    ]
    return "\n".join(lines)


def decay_of(cfg: dict[str, Any]) -> str:
    """What Muon's weight decay acts on, in words: here the step rules differ."""
    muon = cfg["optim"]["muon"]
    free_norms = muon["rule"].get("decay_manifolds", True)  # the certified step always lets it
    on = (
        "unconstrained matrices and DGram's column norms"
        if free_norms
        else "unconstrained matrices only, as in the paper"
    )
    return f"{muon['weight_decay']:g} acts on {on}"


def update_readme(path: Path, name: str, table: str) -> bool:
    """Replace what stands between `<!-- table:<name> -->` and `<!-- /table -->`; False if there is no such place."""
    if not path.exists():
        return False
    text = path.read_text()
    before, begin, rest = text.partition(f"<!-- table:{name} -->\n")
    _, end, after = rest.partition("<!-- /table -->")
    if not end:
        return False
    path.write_text(f"{before}{begin}{table}{end}{after}")
    return True


# ---- the command ----


def work(arguments: list[str]) -> int:
    """Train, then print and write the table; exit code 1 if a run stopped by an error."""
    plan = make_plan(arguments)
    try:
        failures = train_all(plan)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    try:
        print("\n" + write_results(plan))
    except OSError as error:
        raise UsageError(
            f"{plan.results} cannot be written ({error}); the runs are kept: give another results="
        ) from error
    for assignment, reason in failures.items():
        print(f"{assignment} stopped by an error: {reason}", file=sys.stderr)
    return 1 if failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(work, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
