"""Logs of runs for the public optimizer track, each with the code and settings that made it, and the verdict of its rule.

    python scripts/speedrun_log.py outputs/track3/seed_1 outputs/track3/seed_2 logs=logs

Name all runs that were started with these settings, with no other difference than the seed, or directories that hold them. A log holds
every source file and every setting, so that it can be run again, and the losses in the lines of the track's own logs. The stopping step is
the first at which the mean over all runs passes the rule (target - mean)·√n ≥ 0.004, which is p < .001 in a one-sided test at σ = 0.0013.
The track does not accept optimizers of libraries: their code has to be copied into the repository.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from statistics import fmean

from scripts.analysis.runs import RecordedRun, find_runs
from scripts.analysis.statistics import SIGMA, TARGET, judged
from scripts.analysis.tables import different
from scripts.command import ROOT, UsageError, parse, refuse, run
from training.files import CONFIG_FILE, ENVIRONMENT_FILE, PARAMETERS_FILE, read_config
from training.log import read_records
from training.validate import problems_of_directory

SOURCES = (
    "train.py",
    "data/*.py",
    "model/*.py",
    "optim/*.py",
    "training/*.py",
    "configs/**/*.yaml",
    "requirements.lock",
)
OF_RUN = (CONFIG_FILE, ENVIRONMENT_FILE, PARAMETERS_FILE)
"""The files of a run that its log holds."""
LINE = "=" * 100


def code() -> list[Path]:
    """The files that a run depends on."""
    return [path for pattern in SOURCES for path in sorted(ROOT.glob(pattern))]


def log_of(directory: Path) -> str:
    """The log of a run: code, settings, environment, and a line for each evaluation, with seconds of training up to it."""
    parts = [f"# ---- {path.relative_to(ROOT)} ----\n{path.read_text().rstrip()}" for path in code()]
    for name in OF_RUN:
        parts.append(f"# ---- {name} of the run ----\n{(directory / name).read_text().rstrip()}")
    return "\n".join([*parts, LINE, *_lines(directory)]) + "\n"


def _lines(directory: Path) -> list[str]:
    lines, step, seconds = [], 0, 0.0
    config = read_config(directory)
    tokens, last = int(config["global_batch_tokens"]), int(config["max_steps"])
    for record in read_records(directory):
        if record["kind"] == "train":
            seconds += (record["step"] - step) * tokens / record["tokens_per_s"]
            step = record["step"]
        elif record["kind"] == "eval":
            average = f"{1000 * seconds / step:.2f}" if step else "nan"
            lines.append(
                f"step:{record['step']}/{last} val_loss:{record['loss']:.5f} train_time:{seconds:.3f}s step_avg:{average}ms"
            )
    return lines


def verdict(runs: list[RecordedRun], target: float) -> str:
    """What the rule says about all runs of one setting."""
    stopped, step, losses, p = judged([dict(zip(*r.curve("eval"))) for r in runs], target)
    of_step = f"one-sided p={p:.1e} (σ={SIGMA}) at that step, not adjusted for the evaluations before it"
    found = f"mean {fmean(losses):.4f} of n={len(losses)} at step {step}, {of_step}"
    return f"not reached: {found}" if stopped is None else f"{target:g} is reached at step {step}: {found}"


def work(arguments: list[str]) -> int:
    """Write the logs and print the verdict."""
    places, options = parse(arguments, {"logs": "logs", "target": TARGET})
    if not places:
        raise UsageError("name the runs, such as outputs/track3/*; see --help")
    runs = find_runs(places)
    if changed := {key for r in runs[1:] for key in different(runs[0].config, r.config)}:
        raise UsageError(f"the runs differ in {', '.join(sorted(changed))}; name the runs of one setting at a time")
    folder = Path(options["logs"])
    problems = [f"{r.directory} has no evaluation yet; leave it out" for r in runs if r.final is None]
    problems += [
        f"{r.directory} has no {name}, which its log must hold; copy it from where the run was made, or leave the run out"
        for r in runs
        for name in OF_RUN
        if not (r.directory / name).is_file()
    ]
    refuse([*problems, *problems_of_directory(folder, "logs")])
    try:
        write_logs(runs, folder)
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder} cannot be written ({error}); name another folder: logs="
        ) from error
    print(verdict(runs, options["target"]))
    return 0


def write_logs(runs: list[RecordedRun], folder: Path) -> None:
    """Write the log of every run into a folder, which is made; print its path, and why it may not be the log of the run's end or code."""
    folder.mkdir(parents=True, exist_ok=True)
    for r in runs:
        newer = [path for path in code() if path.stat().st_mtime > (r.directory / CONFIG_FILE).stat().st_mtime]
        if newer:
            names = ", ".join(str(path.relative_to(ROOT)) for path in newer[:3])
            print(f"{r.directory}: {len(newer)} files are newer than the run ({names}); its log may not have its code")
        path = folder / f"{r.directory.resolve().parent.name}_{r.directory.name}.txt"
        path.write_text(log_of(r.directory))
        print(f"written: {path}")
        if (done := r.curve("eval")[0][-1]) < r.config["max_steps"]:
            print(f"{path.stem} is not finished: its last loss is of step {done} of {r.config['max_steps']}")


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
