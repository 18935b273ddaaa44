"""What several test files share: a tiny prepared dataset, and the overrides of a run that takes a second."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest_plugins = ["ledger"]
ROOT = Path(__file__).resolve().parent.parent
CLOCK = {"tokens_per_s", "mfu", "time", "train_seconds", "peak_device_bytes"}
"""Fields of records that the clock and the device decide, and that no two runs share."""
SMALL = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "schedule.warmup_steps=1"]

# The fastest thread count for the tiny matrices of the tests, also in the processes they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The commands that tests start import the packages of this checkout, wherever they are started.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Overrides naming a prepared byte dataset of about 40 kB."""
    from data.prepare import prepare
    from training.config import compose

    folder = tmp_path_factory.mktemp("tiny_data")
    for name, start in (("train", 0), ("val", 5000)):
        lines = (
            f"line {i} says that {i} times {i} is {i * i}." for i in range(start, start + (1000 if start == 0 else 100))
        )
        (folder / f"{name}.txt").write_text("\n".join(lines))
    files = [f"data.files=[{folder}/train.txt]", f"data.val_files=[{folder}/val.txt]"]
    overrides = ["data=text", *files, f"data.dir={folder}/prepared", "data.tokenizer=bytes"]
    prepare(compose(overrides).data, progress=False)
    return overrides


@pytest.fixture(scope="session")
def tiny_grid(tiny_data):
    """Overrides of the runs of an experiment that read little."""
    return [
        *tiny_data,
        *("model.block_size=16", "global_batch_tokens=64", "micro_batch_size=4", "eval_interval=2", "eval_windows=4"),
        *("log.interval=1", "checkpoint.interval=2", "device=cpu"),
    ]


@pytest.fixture
def jobs_here(monkeypatch):
    """The jobs of an experiment run in this process: to start workers, or one of Hydra's launchers, takes longer than tiny runs."""
    from training.jobs import run_here

    monkeypatch.setattr("training.jobs.run_jobs", lambda jobs, workers: map(run_here, jobs))


@pytest.fixture
def tiny(tiny_data, tmp_path):
    """Overrides of a run of a one-layer model that takes about a second."""
    return [
        *tiny_data,
        *("model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "max_steps=20"),
        *(
            "global_batch_tokens=128",
            "micro_batch_size=4",
            "eval_interval=5",
            "eval_windows=4",
            "full_eval=false",
            "schedule.warmup_steps=2",
        ),
        *("log.interval=1", "log.interval_spectra=10", "checkpoint.interval=5", "logger.mode=disabled", "device=cpu"),
        f"output_dir={tmp_path}/run",
    ]


@pytest.fixture(scope="session")
def run(tiny_data, tmp_path_factory):
    """The directory of a finished run of two steps; no test changes it."""
    from train import train
    from training.config import compose

    directory = tmp_path_factory.mktemp("run") / "run"
    train(
        compose(
            [
                *(*tiny_data, "model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=16"),
                *("max_steps=2", "eval_windows=2", "global_batch_tokens=32", "full_eval=false", "device=cpu"),
                *("logger.mode=disabled", f"output_dir={directory}"),
            ]
        )
    )
    return directory


@pytest.fixture(scope="session")
def base(tiny_data, tmp_path_factory):
    """A run of ten steps, checkpointed and evaluated every five, and its overrides but for the directory; no test changes it."""
    from train import train
    from training.config import compose

    overrides = [
        *(*tiny_data, "model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=16"),
        *("global_batch_tokens=128", "micro_batch_size=4", "eval_interval=5", "eval_windows=4", "device=cpu"),
        *("schedule.warmup_steps=2", "log.interval=1", "log.interval_spectra=10", "checkpoint.interval=5"),
        *("assignment=hetero", "optim=paper", "max_steps=10", "schedule.decay_steps=20"),
        *("logger.mode=disabled", "checkpoint.keep=3"),
    ]
    directory = tmp_path_factory.mktemp("base") / "run"
    train(compose([*overrides, f"output_dir={directory}"]))
    return directory, overrides


@pytest.fixture
def copied(base, tmp_path):
    """A copy of that run to go on from, and its overrides with the copy's directory."""
    shutil.copytree(base[0], tmp_path / "run")
    return tmp_path / "run", [*base[1], f"output_dir={tmp_path}/run"]


@pytest.fixture
def train_here(tmp_path, monkeypatch, capsys):
    """A function of words: `python train.py <words>` in this process and in `tmp_path`, which saves the seconds that a process starts."""
    from training.command import run_command

    def run(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        try:
            code = run_command("")
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return run


def run_train(*overrides, cwd=ROOT, timeout=240):
    """`python train.py <overrides>` in its own process."""
    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)
