"""All measurements that need a GPU, in stages of under ten minutes. `scripts/gpu_check.sh [a] [b] [c] [d]` runs them, all by default:
scripts/gpu_check.sh a b c d data=text data.name=mine 'data.files=mine/train*.txt.gz' 'data.val_files=mine/val*.txt.gz'

    a    environment, ceilings of the device, tests/cuda, the optimizer step
    b    programs compiled beforehand; training steps by assignment under both step rules, every residual rule, probes and spectra, the
         longest operations
    c    programs compiled beforehand; AdamW and the five assignments at 124M: the same number of steps, as many as time allows, with
         spectra and probes
    d    the same runs, continued

    scripts/gpu_check.sh b a steps=programs,residual,optimizer      these steps alone, if there is little time
    scripts/gpu_check.sh tiny=true                                  all stages with small models, on a CPU, in some minutes

Without a GPU, and without tiny=true, the stages are refused. Before the first stage, the data of c and d is prepared, so that a mistake
in its settings is found at once. A stage that is started again skips its finished steps and continues with the others. Options
(key=value; paths are relative to the repository, or absolute):

    seconds=            time of a stage (560); a step that takes longer is stopped, and runs are saved before
    steps=              names of steps, as the stages print them; the others are left out (all)
    work=               folder for everything that is written (outputs/gpu_check_work)
    out=                folder for summary.txt and one archive for each stage ($OUT, or outputs/gpu_check)
    results=            folder for the tables, in the format of results/ (results/<device>)
    micro_batch_size=   windows of a forward pass (64)
    tiny=true           small models and few steps
    data=, data.key=    the data of c and d, as in train.py (data=stdlib: every machine has it, but its 9 million tokens, single bytes, are
                        read several times; for losses that mean something, give more text)
"""

# ruff: noqa: E402

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_STARTED = time.monotonic()  # the clock of `timeout` runs while torch is imported

import torch

from data.shards import DataError
from scripts import gpu_runs
from scripts.command import ROOT, UsageError, parse, run
from scripts.timing import device_folder
from training.machine import environment

STAGES = ("a", "b", "c", "d")

# Seconds that are kept for stopping the last step of a stage, so that a run can save.
_TO_END = 25
# Of the seconds that a benchmark or training has, those that it keeps to make its models, to end what it compiles and to write; and the
# fewest with which it is started.
_BESIDE, _FEWEST = 60, 90
# Each process of tests/cuda compiles in so many processes; without this, in as many as the machine has cores, up to 32.
_FEW_COMPILERS = {"TORCHINDUCTOR_COMPILE_THREADS": "3"}
# How many lines of a step's output the summary shows.
_TAIL = 30


@dataclass(frozen=True)
class Step:
    """One command of a stage.

    most: the most seconds that it may take (0: the rest of the stage). fewest: with fewer seconds it is not started. limit: the option that
    tells the command its seconds, less `beside` ("": it has no such option). environment: variables that the command has besides those of
    this process.
    """

    name: str
    command: list[str]
    most: int = 0
    fewest: int = 1
    limit: str = ""
    beside: int = 0
    environment: dict[str, str] = field(default_factory=dict)

    def within(self, seconds: float) -> list[str]:
        """The command, which is to end within so many seconds."""
        return [*self.command, *([f"{self.limit}={seconds - self.beside:.0f}"] if self.limit else [])]


@dataclass(frozen=True)
class Options:
    """The options of the command line; `data` are overrides of train.py."""

    seconds: int
    work: Path
    out: Path
    results: Path
    micro: int
    tiny: bool
    only: list[str]
    data: list[str]


def options_of(arguments: Sequence[str]) -> tuple[list[str], Options]:
    """Read the command line: the words that are no options, and the options.

    Raises:
        UsageError: a value is impossible.
    """
    defaults = {"seconds": 560, "work": "outputs/gpu_check_work", "out": os.environ.get("OUT") or "outputs/gpu_check"}
    others = {"results": "", "micro_batch_size": 64, "tiny": False, "steps": ""}
    words, given = parse(arguments, defaults | others, overrides=True)
    if min(given["seconds"], given["micro_batch_size"]) < 1:
        raise UsageError("seconds= and micro_batch_size= must be positive whole numbers; the defaults are 560 and 64")
    data = [word for word in words if word.startswith(("data=", "data."))]
    results = Path(given["results"] or f"results/{device_folder()}")
    where = (Path(given["work"]), Path(given["out"]), results)
    rest, only = [word for word in words if word not in data], given["steps"].split(",") if given["steps"] else []
    options = Options(given["seconds"], *where, given["micro_batch_size"], given["tiny"], only, data)
    known = [step.name for stage in STAGES for step in steps_of(stage, options)]
    if unknown := [name for name in only if name not in known]:
        raise UsageError(f"there is no step {', '.join(unknown)}; the steps are {', '.join(dict.fromkeys(known))}")
    return rest, options


# ---- what is done ----


def steps_of(stage: str, o: Options) -> list[Step]:
    """The commands of a stage. What has a bar comes first, in case the time is short."""
    python, results = sys.executable, f"results={o.results}"

    def bench(
        name: str,
        *words: str,
        most: int,
        fewest: int = _FEWEST,
        limit: str = "limit_s",
        tiny: Sequence[str] = (),
        file: str = "",
    ) -> Step:
        chosen = [*words, *(tiny if o.tiny else ()), *([f"file={file}"] if file else ())]
        command = [python, "scripts/bench.py", name, results, *chosen]
        return Step(file or name, command, most, fewest, limit, _BESIDE)

    small = ["model=demo", "tokens=256", "micro_batch_size=1", "repeats=1"]
    micro = f"micro_batch_size={o.micro}"
    programs = [python, "scripts/gpu_programs.py", "tiny=true" if o.tiny else micro]
    if stage == "a":
        return [
            Step("environment", [python, "scripts/gpu_check.py", "environment"], 120),
            bench("ceilings", "repeats=10", most=100, limit="", tiny=["repeats=1"]),
            Step("tests", tests_command(o.work / "a" / "tests.jsonl"), 250, environment=_FEW_COMPILERS),
            Step("tests_of_time", tests_command(o.work / "a" / "tests.jsonl", alone=True), 60),
            bench("optimizer", "repeats=5", most=170, tiny=["layers=1", "width=24", "repeats=1"]),
        ]
    if stage == "b":
        few = [*small, "assignments=adamw,hetero"]
        every = [micro, f"assignments={','.join(gpu_runs.RUNS)}"]
        ruled = ",".join(name for name in gpu_runs.RUNS if name != "adamw")
        published = [micro, f"assignments={ruled}", "optims=paper"]
        options = [micro, "assignments=adamw,hetero", f"variants={','.join(variants())}"]
        profile = [micro, "assignments=adamw,hetero", f"traces={o.work / 'b'}"]
        return [
            Step("programs", programs, 180),
            bench("train", *every, most=210, tiny=few),
            bench("residual", "repeats=11", most=170, tiny=["layers=1", "width=96", "repeats=1"]),
            bench("probes", micro, "repeats=3", most=100, fewest=50, limit="", tiny=small),
            bench("train", *options, most=150, tiny=[*small, "variants="], file="bench_train_options"),
            bench("train", *published, most=120, tiny=[*small, "assignments=hetero"], file="bench_train_published"),
            bench("profile", *profile, most=110, limit="", tiny=small),
        ]
    fewest, beside = (1, 0) if o.tiny else (_FEWEST, _BESIDE)
    runs = Step("runs", [python, "scripts/gpu_runs.py", *runs_words(o)], 0, fewest, "seconds", beside)
    return [Step("programs", [*programs, "training=true"], 180), runs] if stage == "c" else [runs]


def variants() -> list[str]:
    """What is measured beside the usual step. The stream in 16 bits is not, where the compiler leaves out its rounding: before torch 2.13."""
    rounded = torch.__version__ >= "2.13"
    return ["capture=true", *(["model.stream_dtype=bfloat16"] if rounded else [])]


def runs_words(o: Options) -> list[str]:
    """The words of scripts/gpu_runs.py in the stages c and d."""
    places = [f"folder={o.work / 'runs'}", f"results={o.results / 'assignments'}"]
    return [*places, "tiny=true" if o.tiny else f"micro_batch_size={o.micro}", *(o.data or ["data=stdlib"])]


def prepare_data(o: Options) -> int:
    """Check the settings of c and d and prepare their data. Returns 0.

    Raises:
        UsageError: the data cannot be prepared. ConfigError: a setting is wrong.
    """
    try:
        return gpu_runs.work([*runs_words(o), "prepare=true"])
    except DataError as error:
        remedy = "the stages c and d need text: give data=text data.name=... data.files=... data.val_files=..., or leave out data= for data=stdlib"
        raise UsageError(f"{error}\n{remedy}") from error


def tests_command(ledger: Path, alone: bool = False) -> list[str]:
    """tests/cuda: those that measure time, `alone`; or the others, several at a time where pytest-xdist is there, since most of their time
    goes to the compiler on the CPU."""
    options = [f"--ledger={ledger}", "-v", "-ra", "-p", "no:cacheprovider", "-m", "alone" if alone else "not alone"]
    if find_spec("xdist") and not alone:
        options += ["-n", str(max(1, min(6, (os.cpu_count() or 1) // 2)))]
    if find_spec("pytest_timeout"):
        options.append("--timeout=150")
    return [sys.executable, "-m", "pytest", "tests/cuda", *options]


def run_stage(stage: str, o: Options, end: float) -> int:
    """Run the steps that this command has not done, until the time.monotonic() `end`. Returns 0 if all are done now, else 1."""
    folder = o.work / stage
    folder.mkdir(parents=True, exist_ok=True)
    states = states_of(folder)
    chosen = [step for step in steps_of(stage, o) if not o.only or step.name in o.only]
    for step in chosen:
        before = states.get(step.name, {})
        if before.get("code") == 0 and before.get("command") == step.command:
            print(f"{stage} {step.name}: done before", flush=True)
            continue
        left = end - time.monotonic()
        if left < step.fewest:
            states[step.name] = {"code": None, "seconds": 0.0, "note": "not reached"}
        else:
            print(f"{stage} {step.name} ...", flush=True)
            states[step.name] = {"code": None, "seconds": 0.0, "note": "stopped"}  # if this process is ended meanwhile
            _write(folder, states)
            states[step.name] = run_step(step, folder, min(left, step.most or left))
        state = states[step.name]
        print(f"{stage} {step.name}: {state['note']}, {state['seconds']:.0f} s", flush=True)
        _write(folder, states)
        pack(o)
    return 0 if all(states[step.name]["code"] == 0 for step in chosen) else 1


def _write(folder: Path, states: dict[str, Any]) -> None:
    """Write how the steps of a stage ended."""
    (folder / "steps.json").write_text(json.dumps(states, indent=2) + "\n")


def states_of(folder: Path) -> dict[str, Any]:
    """How the steps of a stage ended, by name."""
    file = folder / "steps.json"
    with suppress(ValueError):
        return json.loads(file.read_text()) if file.exists() else {}
    return {}


def run_step(step: Step, folder: Path, most: float) -> dict[str, Any]:
    """Run a command for `most` seconds or less. Its output goes to a file. When this process ends, the command is ended too."""
    start = time.monotonic()
    with (folder / f"{step.name}.log").open("ab") as log:
        process = subprocess.Popen(
            step.within(most),
            env={**os.environ, **step.environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int = process.wait(most)
            note = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            code, note = 124, "out of time"
        finally:
            _end(process)
    return {"code": code, "seconds": time.monotonic() - start, "note": note, "command": step.command}


def _end(process: subprocess.Popen) -> None:
    """Ask a process and its children to end; kill them if they do not, also if this process is told to end meanwhile."""
    try:
        _signal(process, signal.SIGTERM, _TO_END - 10)
    finally:
        _signal(process, signal.SIGKILL, 5)


def _signal(process: subprocess.Popen, signum: int, patience: float) -> None:
    """Send a signal to a process and its children, and wait for the process so many seconds."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signum)
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience)


# ---- what is kept ----


def pack(o: Options) -> None:
    """Write into `out`: summary.txt, an archive for each stage, one of the runs' records, and one of the tables that the steps wrote."""
    o.out.mkdir(parents=True, exist_ok=True)
    (o.out / "summary.txt").write_text(summary_of(o))
    for name in (*STAGES, "runs"):
        if (folder := o.work / name).is_dir():
            _archive(o.out / f"{name}.tar.gz", [folder], "")
    written = {
        name if name.startswith("bench_") else f"bench_{name}" for stage in "ab" for name in states_of(o.work / stage)
    }
    written |= {"assignments"} if any("runs" in states_of(o.work / stage) for stage in "cd") else set()
    tables = [file for file in sorted(o.results.glob("*")) if file.stem in written]
    if tables:
        _archive(o.out / "results.tar.gz", tables, f"results/{device_folder()}")


def _archive(path: Path, files: Sequence[Path], folder: str) -> None:
    """Pack files and folders without checkpoints, into a folder. The old archive stays until the new one is complete."""
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as archive:
        for file in files:
            name = str(Path(folder, file.name))
            archive.add(file, name, filter=lambda info: None if "checkpoints" in Path(info.name).parts else info)
    partial.replace(path)


def summary_of(o: Options) -> str:
    """The text of summary.txt: device and versions, how every step ended, and the last lines of its output."""
    facts = environment()
    lines = [f"{facts['device']}, torch {facts['torch']}, Python {facts['python']}, {facts['platform']}", ""]
    for stage in STAGES:
        for name, state in states_of(o.work / stage).items():
            lines.append(f"{stage} {name}: {state['note']}, {state['seconds']:.0f} s")
    for stage in STAGES:
        for name in states_of(o.work / stage):
            log = o.work / stage / f"{name}.log"
            text = log.read_text(errors="replace").splitlines() if log.exists() else []
            lines += ["", f"==== {stage} {name} ====", *text[-_TAIL:]]
    return "\n".join(lines) + "\n"


def print_environment() -> None:
    """Print versions, devices and the output of nvidia-smi."""
    print(json.dumps({**environment(), "cuda": torch.version.cuda, "devices": torch.cuda.device_count()}, indent=2))
    if torch.cuda.is_available():
        print(torch.cuda.get_device_properties(0))
        with suppress(OSError):
            subprocess.run(["nvidia-smi"], check=False, timeout=30)


# ---- the command ----


def work(arguments: list[str]) -> int:
    """Run one stage, `data`, `pack` or `environment`.

    Raises:
        UsageError: the command line is wrong, or a stage needs a GPU and torch finds none.
    """
    words, options = options_of(arguments)
    if len(words) != 1 or words[0] not in (*STAGES, "data", "pack", "environment"):
        raise UsageError(
            f"name one of {', '.join(STAGES)}, data, pack, environment, not '{' '.join(words)}'; see --help"
        )
    [what] = words
    if what in (*STAGES, "data") and not options.tiny and not torch.cuda.is_available():
        raise UsageError(
            f"torch {torch.__version__} (for CUDA {torch.version.cuda or '-'}) finds no GPU here; install torch for the CUDA of this machine's "
            "driver, which nvidia-smi names, or try the stages with small models by tiny=true"
        )
    os.chdir(ROOT)
    if what == "environment":
        print_environment()
    elif what == "pack":
        pack(options)
        print(f"packed into {options.out}")
    elif what == "data":
        return prepare_data(options)
    else:
        signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # then the running command is ended too
        return run_stage(what, options, _STARTED + options.seconds - _TO_END)
    return 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
