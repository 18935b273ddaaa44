"""The crossing and the learning-rate transfer: what they run, what a cell amounts to, where an optimum lies, and what is written."""

import contextlib
import importlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "distributed"))
from harness import children, command, last_step, records, wait_until

from scripts import bench, bench_residual, crossing, exponents, failure, lr_transfer, solver_sweep
from scripts.command import UsageError
from scripts.grid import Job, run_grid
from scripts.runs import Run
from train import train
from training.config import compose

PNG = b"\x89PNG\r\n"


@pytest.fixture
def in_this_process(monkeypatch):
    """Run the jobs one after the other here; starting workers would take longer than the runs."""

    def run_grid(jobs, workers):
        for job in jobs:
            if not job.ended:
                train(compose([*job.overrides, "resume=auto"]), job.directory)
        return {}

    for module in (crossing, lr_transfer):
        monkeypatch.setattr(module, "run_grid", run_grid)


@pytest.fixture(scope="module")
def tiny_grid(tiny_data):
    return [
        *tiny_data,
        *("model.block_size=16", "global_batch_tokens=64", "micro_batch_size=4", "eval_interval=2", "eval_windows=4"),
        *("log.interval=1", "checkpoint.interval=2", "device=cpu"),
    ]


def fake(assignment="Hetero", seed=1, losses=((0, 5.0), (10, 3.0), (20, 2.0)), unstable=None):
    records = {"eval": [{"step": s, "loss": x} for s, x in losses], "end": [{"step": losses[-1][0]}]}
    if unstable is not None:
        records["event"] = [{"step": unstable, "event": "unstable"}]
    config = {"assignment": {"name": assignment}, "residual": {"rule": "geonorm"}, "seed": seed}
    return Run(Path("nowhere"), config, records, {}, {})


def test_without_workers_nothing_is_run(tmp_path, capsys):
    assert run_grid([Job(("max_steps=0",), tmp_path / "run")], workers=0) == {}
    assert not (tmp_path / "run").exists() and "1 runs, 0 done before" in capsys.readouterr().out


def test_a_finished_run_with_other_settings_is_not_taken_for_this_one(tiny_data, tiny_grid, tmp_path, capsys):
    job = Job(
        (*tiny_grid, "model.n_embd=16", "model.n_head=2", "max_steps=2", "schedule.warmup_steps=1"), tmp_path / "run"
    )
    train(compose(job.overrides), job.directory)
    assert run_grid([job], workers=2) == {} and "1 runs, 1 done before" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"holds a run with other settings(.|\n)*max_steps: 2 → 3"):
        run_grid([Job((*job.overrides, "max_steps=3"), job.directory)], workers=2)


GRIDS = {
    "crossing": (crossing, ["assignment=hetero", "residual=geonorm", "seed=1"]),
    "lr_transfer": (lr_transfer, ["widths=16", "depths=1", "steps=2", "rates=0.01", "base=16,1,2", "head=8"]),
    "solver_sweep": (solver_sweep, ["rates=0.02", "seeds=1"]),
    "instability": (failure, ["rates=0.1", "optims=paper", "assignments=hetero"]),
    "mechanism": (failure, ["remedies=none", "assignments=hetero"]),
    "exponents": (exponents, ["train=2", "seeds=1", "assignments=adamw"]),
}


@pytest.mark.parametrize("name", GRIDS)
def test_an_option_of_the_logger_reaches_every_job_of_a_grid(name, tiny_data, tiny_grid, tmp_path, monkeypatch):
    module, options = GRIDS[name]
    seen = []
    monkeypatch.setattr(module, "run_grid", lambda jobs, workers: seen.extend(jobs) or {})
    shape = ["model.n_embd=16", "model.n_head=2", "model.n_layer=1"] if name != "lr_transfer" else []
    command = [*tiny_grid, *shape, *options, f"output_dir={tmp_path}/runs", f"results={tmp_path}/results"]
    for setting, mode in (([], "disabled"), (["logger.mode=offline"], "offline")):
        seen.clear()
        with contextlib.suppress(UsageError):  # no run came to its end
            importlib.import_module(f"scripts.{name}").work([*command, *setting])
        assert seen and {compose(job.overrides).logger.mode for job in seen} == {mode}


def test_a_worker_that_is_killed_is_one_failed_job(tiny_grid, tmp_path, capsys):
    small = (*tiny_grid, "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "schedule.warmup_steps=1")
    long, short = (Job((*small, f"max_steps={n}", "logger.mode=disabled"), tmp_path / str(n)) for n in (100_000, 4))
    bad, before = Job(("max_steps=-1",), tmp_path / "bad"), children(os.getpid())

    def kill_one():
        wait_until(lambda: last_step(long.directory) > 2, 120, "two steps")
        os.kill(worker_of(os.getpid(), long), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    failures = run_grid([long, short, bad], workers=2)
    killer.join()
    assert set(failures) == {long.directory, bad.directory} and short.ended
    assert re.search("killed by SIGKILL .*the same command goes on with it", failures[long.directory])
    assert "max_steps is -1" in failures[bad.directory]
    assert "3/3" in capsys.readouterr().out and children(os.getpid()) == before


def worker_of(parent, job):
    """The process that runs a job: it has the job's lock."""
    pid = json.loads((job.directory / ".lock").read_text())["pid"]
    assert pid in children(parent)
    return pid


GRID = ["assignment=adamw,unconstrained", "residual=pre_norm", "seed=1,2", "target=100", "workers=2"]


@pytest.fixture(scope="module")
def crossing_command(tiny_grid):
    """The words of a grid of four runs that take some seconds each."""
    small = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "max_steps=300", "schedule.warmup_steps=1"]
    spent = ["logger.mode=disabled", "output_dir=runs", "results=results"]
    return [sys.executable, str(ROOT / "scripts/crossing.py"), *GRID, *tiny_grid, *small, *spent]


@pytest.fixture(scope="module")
def straight(crossing_command, tmp_path_factory):
    """What the runs of the grid write when nobody interrupts them."""
    where = tmp_path_factory.mktemp("straight")
    subprocess.run(crossing_command, cwd=where, check=True, capture_output=True)
    return {p.name: records(p) for p in (where / "runs").iterdir()}


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("attempt", range(3))
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGKILL", "SIGTERM of a worker", "SIGKILL of a worker"])
def test_interrupted_grids_end_and_go_on(crossing_command, straight, tmp_path, how, attempt):
    chance, runs = random.Random(f"{how} {attempt}"), tmp_path / "runs"
    with command(*crossing_command, cwd=tmp_path) as process:
        after = chance.randint(1, 200) if attempt else 0  # steps; 0: while the workers start
        begun = lambda: len(children(process.pid)) >= 2 and max(map(last_step, runs.glob("*")), default=0) >= after  # noqa: E731
        wait_until(begun, 200, "workers")
        time.sleep(chance.uniform(0, 3))
        workers, since = children(process.pid), time.monotonic()
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(workers[0] if "worker" in how else process.pid, signal.Signals[how.split()[0]])
        if "worker" not in how:
            assert process.wait(30) == {"Ctrl-C": 130, "SIGTERM": 143, "SIGKILL": -9}[how]
            wait_until(lambda: not any(map(alive, workers)), 30 - (time.monotonic() - since), "the end of the workers")
        else:
            assert process.wait(250) == 1
    text = (tmp_path / "output.txt").read_text()
    assert "Traceback" not in text and text.count(f"by {how.split()[0]}") == (2 if "worker" in how else 0), text
    assert subprocess.run(crossing_command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    assert {p.name: records(p) for p in runs.iterdir()} == straight


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# ---- crossing ----


def test_steps_to_a_target_loss():
    assert crossing.steps_to(fake(), 4.0) == pytest.approx(5)
    assert crossing.steps_to(fake(), 2.5) == pytest.approx(15)
    assert crossing.steps_to(fake(), 5.5) == 0 and crossing.steps_to(fake(), 1.0) is None


def test_the_target_is_one_that_every_stable_cell_reaches():
    cells = {
        ("a", "x"): [fake(), fake(losses=((0, 5.0), (10, 2.111)))],
        ("b", "x"): [fake(losses=((0, 5.0), (10, 4.9)), unstable=10)],
        ("c", "x"): [fake(losses=((0, 5.0), (10, math.nan)))],
    }
    target = crossing.common_target(cells)
    assert target == pytest.approx(2.12)
    assert all(crossing.steps_to(r, target) is not None for r in cells["a", "x"])
    assert [crossing.stable(runs) for runs in cells.values()] == [True, False, False]
    assert crossing.common_target({("b", "x"): cells["b", "x"]}) == math.inf


def test_the_default_grid_is_the_experiments():
    options = {**crossing.grid(), "output_dir": "out"}
    options["seed"] = str(options["seed"])
    jobs = crossing.jobs_of(options, [])
    assert len(jobs) == 4 * 3 and all(len(members) == 3 for members in jobs.values())
    assert len({job.directory for members in jobs.values() for job in members}) == 36


def test_crossing_writes_table_and_heat_map_and_keeps_what_is_done(tiny_grid, tmp_path, in_this_process, capsys):
    arguments = [
        *("assignment=adamw,unconstrained", "residual=pre_norm,geonorm", "seed=1,2", "target=100"),
        *("model.n_layer=1", "model.n_embd=16", "model.n_head=2", "max_steps=4", "schedule.warmup_steps=1"),
        *(*tiny_grid, f"output_dir={tmp_path}/runs", f"results={tmp_path}/results"),
    ]
    assert crossing.main(arguments) == 0
    table = (tmp_path / "results/table.md").read_text()
    assert table.count("| 2 |") == 4 and table.count(" ± ") >= 8 and "steps to 100.00" in table
    rows = json.loads((tmp_path / "results/table.json").read_text())["rows"]
    assert len(rows) == 8 and {r["steps_to_target"] for r in rows} == {0.0}
    assert (tmp_path / "results/heat_map.png").read_bytes().startswith(PNG)
    before = {path: path.read_bytes() for path in tmp_path.glob("runs/*/metrics.jsonl")}
    assert crossing.main(arguments) == 0
    assert len(before) == 8 and before == {path: path.read_bytes() for path in tmp_path.glob("runs/*/metrics.jsonl")}
    assert crossing.main(["residual=geonrm", "assignment=adamw", *tiny_grid]) == 2


# ---- learning-rate transfer ----


def test_optimum_of_a_parabola_is_exact():
    curve = {r: [3 + math.log(r / 0.013) ** 2] for r in (0.004, 0.01, 0.02, 0.05)}
    rate, loss, at_end = lr_transfer.optimum(curve)
    assert rate == pytest.approx(0.013) and loss == pytest.approx(3) and not at_end
    assert lr_transfer.optimum({0.1: [2.0], 0.2: [1.0]}) == (0.2, 1.0, True)
    assert lr_transfer.optimum({0.1: [2.0], 0.2: [1.0], 0.3: [math.inf]}) == (0.2, 1.0, True)


def test_sweeps_vary_one_thing_and_share_the_base():
    options = {**lr_transfer.OPTIONS, "rates": "0.01", "output_dir": "out"}
    base, sweeps = lr_transfer.sweeps_of(options)
    jobs = lr_transfer.jobs_of(base, sweeps, options, [])
    assert len(jobs) == 2 * (3 + 2 + 2)
    cfg = compose(jobs["nu", lr_transfer.Size(256, 4, 300), 0.01, 1].overrides)
    assert (cfg.model.n_embd, cfg.model.n_head, cfg.max_steps) == (256, 8, 300)
    assert cfg.transfer.base.n_embd == 128 and cfg.transfer.base_steps == 300
    plain = compose(jobs["none", lr_transfer.Size(256, 4, 300), 0.01, 1].overrides)
    assert replace(plain, transfer=cfg.transfer) == cfg


def test_transfer_writes_table_and_picture(tiny_grid, tmp_path, in_this_process):
    arguments = [
        *("widths=16,32", "depths=1", "steps=3", "base=16,1,3", "head=8", "rates=0.01,0.02,0.04"),
        *(*tiny_grid, f"output_dir={tmp_path}/runs", f"results={tmp_path}/results"),
    ]
    assert lr_transfer.main(arguments) == 0
    table = (tmp_path / "results/table.md").read_text()
    assert table.count("| nGPT |") == table.count("| νGPT |") == 4 and table.count("+0.00") >= 6
    assert len(json.loads((tmp_path / "results/table.json").read_text())) == 4
    assert (tmp_path / "results/loss_by_rate.png").read_bytes().startswith(PNG)
    assert lr_transfer.main([*arguments, "head=5"]) == 2 and lr_transfer.main([*arguments, "base=16"]) == 2


# ---- bench ----


def test_bench_measures_every_rule():
    sizes = {"layers": 1, "width": 16, "heads": 2, "block": 8, "vocab": 32, "micro": 1, "tokens": 16}
    rows = {row["rule"]: row for row in bench_residual.measure(sizes, repeats=1)}
    assert set(rows) == set(bench_residual.contestants())
    assert rows["pre_norm"]["time ratio"] == rows["pre_norm"]["memory ratio"] == 1.0
    assert rows["sandwich_norm"]["memory ratio"] > 1.0 and all(row["fastest s"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("residual", ["layers=1", "micro_batch_size=1", "repeats=1"], ["geonorm", "nGPT", "time ratio"]),
        ("probes", ["model=demo", "tokens=256", "micro_batch_size=1", "repeats=1"], ["share of training"]),
        ("train", ["model=demo", "tokens=256", "assignments=hetero", "repeats=1"], ["hetero", "optimizer share"]),
        ("ceilings", ["repeats=1"], ["copy, bytes read and written", "svdvals", "cuDNN, forward"]),
        (
            "profile",
            ["model=demo", "tokens=256", "micro_batch_size=1", "assignments=adamw"],
            ["aten::mm", "calls a step"],
        ),
        ("scaling", [], ["gpt2_774m", "received MiB a rank"]),
    ],
)
def test_bench_writes_what_it_prints(name, options, told, tmp_path, monkeypatch, capsys):
    small = {"width": 16, "heads": 2, "block": 8, "vocab": 32, "tokens": 16}
    monkeypatch.setattr(bench_residual, "CPU_SIZES", bench_residual.CPU_SIZES | small)
    assert bench.main([name, *options, f"results={tmp_path}"]) == 0
    table, data = (tmp_path / f"bench_{name}.md").read_text(), json.loads((tmp_path / f"bench_{name}.json").read_text())
    printed = capsys.readouterr().out
    assert all(word in table and word in printed for word in told)
    assert data["rows"] and data["command"].startswith(f"python scripts/bench.py {name}") and data["device"] in table


def test_bench_names_its_benchmarks(capsys):
    assert bench.main([]) == bench.main(["speed"]) == 2
    assert (
        "name one benchmark: ceilings, optimizer, lmo, train, profile, residual, probes, scaling"
        in capsys.readouterr().err
    )


def test_scripts_say_how_they_are_used(capsys):
    for module in (crossing, lr_transfer):
        assert module.main(["--help"]) == 0
        name = Path(module.__file__).relative_to(ROOT)
        assert f"python {name}" in capsys.readouterr().out


def test_bench_lmo_measures_the_step_and_every_method(tmp_path, capsys):
    torch.manual_seed(0)
    W = torch.linalg.qr(torch.randn(12, 6))[0]
    np.savez(
        tmp_path / "p.npz", **{"stiefel_x/W": W.numpy(), "stiefel_x/G": torch.randn(12, 6), "stiefel_x/optimum": 1}
    )
    assert bench.main(["lmo", f"problems={tmp_path}/p.npz", f"results={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "bench_lmo.json").read_text())["rows"]
    assert {"step, default, float32", "step, high, float16", "su", "dual_ascent"} <= {row["solver"] for row in rows}
    assert all(0.5 < row["certified feas"] < 1.01 for row in rows if row["solver"].startswith("step"))
    assert bench.main(["lmo", "problems=none.npz"]) == 2 and "no problems in none.npz" in capsys.readouterr().err
