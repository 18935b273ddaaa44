"""Starting and stopping: one process, ranks of its own, ranks of torchrun, sweeps, and jobs of a cluster."""

import importlib.util
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, run_train
from harness import TORCHRUN, finish, records, start_ranks, train_in_process

from training import launch
from training.checkpoint import load_newest
from training.command import refusal, wrong_jobs
from training.config import compose, directory_name
from training.job import plan_job, run_job
from training.overrides import jobs_of
from training.ranks import LostRanks, Ranks
from training.signals import Stopped, StopSignal
from training.validate import ConfigError

SETTINGS = compose(["device=cpu", "launcher.nproc=2", "launcher.timeout_s=60"])
HAS_SUBMITIT = importlib.util.find_spec("submitit") is not None
HAS_OPTUNA = importlib.util.find_spec("optuna") is not None


# ---- ranks ----


def refuse(problem):
    raise ConfigError([problem])


def talk():
    ranks = Ranks.init(SETTINGS)
    try:
        assert ranks.world == 3 and ranks.is_main == (ranks.rank == 0)
        assert ranks.broadcast_object({"rank": ranks.rank}) == {"rank": 0}
        assert ranks.gather_objects(ranks.rank) == [0, 1, 2]
        assert ranks.max(ranks.rank * 10) == 20
        assert ranks.all_reduce_mean(torch.tensor([1.0, ranks.rank])).tolist() == [1.0, 1.0]
        assert ranks.sum(torch.tensor(ranks.rank)).item() == 3
        assert ranks.from_main(lambda x: (x, ranks.rank), 5) == (5, 0)
        with pytest.raises(ConfigError) as caught:
            ranks.from_main(refuse, "no")
        assert caught.value.problems == ["no"]
        ranks.require_equal({"first": torch.ones(3), "second": torch.zeros(2)})
        with pytest.raises(RuntimeError, match=r"^second is not the same on ranks \d and \d"):
            ranks.require_equal({"first": torch.ones(3), "second": torch.tensor([0.0, float(ranks.rank == 2)])})
    finally:
        ranks.close()


def test_ranks_talk():
    assert finish(start_ranks(3, talk)) == [0, 0, 0]


def test_one_process_talks_to_itself():
    ranks = Ranks.init(SETTINGS)
    assert not torch.distributed.is_initialized() and ranks.is_main and ranks.world == 1
    assert ranks.max(3) == 3
    assert ranks.gather_objects("a") == ["a"] and ranks.broadcast_object("a") == "a"
    assert ranks.all_reduce_mean(torch.tensor(2.0)) == 2
    with pytest.raises(ConfigError):
        ranks.from_main(refuse, "no")
    ranks.close()


def fall_silent(how):
    ranks = Ranks.init(replace(SETTINGS, launcher=replace(SETTINGS.launcher, timeout_s=2)))
    ranks.barrier()
    if ranks.rank == 1:
        time.sleep(30)
    since = time.monotonic()
    with pytest.raises(LostRanks, match=r"rank 0 of 2 .* launcher.timeout_s=2 s") as caught:
        ranks.max(0) if how == "control" else ranks.sum(torch.zeros(5))
    assert time.monotonic() - since < 10
    print(caught.value)
    os._exit(7)


@pytest.mark.parametrize("how", ["control", "gradients"])
def test_a_rank_that_hangs_is_an_error_within_the_timeout(how):
    first, second = start_ranks(2, fall_silent, how)
    assert finish([first], timeout=20) == [7]
    second.kill()


class Lone:
    """One rank, which is sent a signal while the ranks agree."""

    is_main, signum = True, signal.SIGUSR1

    def largest(self, *numbers):
        if self.signum is not None:
            os.kill(os.getpid(), self.signum)
            self.signum = None
        return numbers

    def barrier(self):
        pass


def test_a_signal_that_comes_while_the_ranks_agree_is_not_lost():
    before, ranks = signal.getsignal(signal.SIGUSR1), Lone()
    with pytest.raises(Stopped) as caught, StopSignal() as stop:
        assert not stop.requested(ranks)
        assert stop.requested(ranks)
        stop.end(ranks, 12)
    assert caught.value.code == 138 and signal.getsignal(signal.SIGUSR1) is before
    assert caught.value.message == "SIGUSR1: stopped at step 12; continue with resume=auto"
    with StopSignal() as stop:
        assert not stop.requested(ranks)  # and it is over


# ---- one job ----


def stop_one(cfg, directory):
    """A rank that is stopped, while the other is busy."""
    if os.environ["RANK"] == "1":
        raise Stopped(signal.SIGUSR2)
    time.sleep(60)


def test_the_parent_of_ranks_learns_of_their_end_and_passes_it_on():
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda signum, _: heard.append(signum))
    try:
        with pytest.raises(Stopped) as caught:
            launch.launch(stop_one, SETTINGS, None)
        assert caught.value.code == 140
        assert heard == [signal.SIGUSR2]  # so that submitit, which listens to it, requeues the job
        signal.raise_signal(signal.SIGUSR2)
        assert len(heard) == 2  # and it goes on listening
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (143, Stopped, "143"),
        (-signal.SIGINT, Stopped, "130"),
        (2, launch.RankFailed, "what it said"),
        (1, launch.RankFailed, "rank 3 failed with exit code 1"),
        (-signal.SIGKILL, launch.RankFailed, "rank 3 was killed by SIGKILL.*whether memory ran out"),
    ],
)
def test_what_the_end_of_a_rank_means(code, kind, message):
    with pytest.raises(kind, match=message):
        raise launch._ending(3, code, "what it said")


@pytest.mark.campaign  # tests/test_docs.py compares both with the commands of the README
def test_ranks_of_torchrun_and_of_the_command_line_are_the_same_run(tiny, tmp_path):
    common = [*tiny[:-1], "assignment=adamw", "max_steps=6"]
    program, pipes = str(ROOT / "train.py"), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    own = [sys.executable, program, *common, "launcher.nproc=2", "output_dir=own"]
    theirs = [*TORCHRUN, "--standalone", "--nproc_per_node=2", program, *common, "output_dir=torchrun"]
    started = [subprocess.Popen(words, cwd=tmp_path, **pipes) for words in (own, theirs)]  # each often waits
    alone = compose([*common, f"output_dir={tmp_path}/alone"])
    assert finish(start_ranks(1, train_in_process, alone)) == [0]
    for process in started:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert out.count("best validation loss") == 1
        assert out.splitlines()[-1].startswith("best validation loss")
    assert {p.name for p in tmp_path.iterdir()} == {"own", "torchrun", "alone"}
    assert records(tmp_path / "own") == records(tmp_path / "torchrun")
    for one, two in zip(records(tmp_path / "alone"), records(tmp_path / "own"), strict=True):
        assert (one["kind"], one["step"]) == (two["kind"], two["step"])
        if "loss" in one:
            assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


def test_a_mistake_that_only_ranks_can_see_is_said_once(tiny, tmp_path):
    done = run_train(*tiny, "launcher.nproc=2", "data.dir=nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("python -m data.prepare data=text") == 1
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


# ---- sweeps ----


@pytest.mark.parametrize("others_are_installed", [True, False])
def test_a_plugin_that_is_not_installed_is_named(tmp_path, monkeypatch, others_are_installed):
    for name in [n for n in sys.modules if n.split(".")[0] == "hydra_plugins"]:
        monkeypatch.delitem(sys.modules, name)
    if others_are_installed:
        (tmp_path / "hydra_plugins" / "something_else").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    assert (importlib.util.find_spec("hydra_plugins") is not None) == others_are_installed
    assert "pip install -e '.[slurm]'" in refusal(["-m", "hydra/launcher=submitit_slurm"])
    assert "pip install -e '.[hpo]'" in refusal(["-m", "hydra/sweeper=optuna"])
    assert refusal(["-m", "seed=1,2"]) is None


def test_a_sweep_does_not_ignore_the_directory_of_a_run():
    assert "use sweep.name" in refusal(["-m", "seed=1,2", "output_dir=outputs/mine"])
    assert refusal(["seed=1", "output_dir=outputs/mine"]) is None


def test_endings_cross_between_processes():
    for error in (Stopped(signal.SIGTERM, "stopped at step 7"), launch.RankFailed("rank 1 failed", 2)):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and vars(copy) == vars(error) and str(copy) == str(error)
    assert copy.exit_code == 2


def test_a_sweep_under_torchrun_is_refused(tmp_path, monkeypatch, train_here):
    assert refusal(["-m", "seed=1,2"]) is None
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    done = train_here("-m", "seed=1,2", "assignment.rules={attn: stiefel}")
    assert done.returncode == 2
    assert "python train.py -m launcher.nproc=2 seed=1,2 'assignment.rules={attn: stiefel}'" in done.stderr
    assert not any(tmp_path.iterdir())


def test_directory_names():
    assert directory_name("assignment=hetero,seed=1") == "assignment=hetero,seed=1"
    assert directory_name("") == "defaults"
    odd = [
        "a=/x/y",
        "a=_x_y",
        "a={b: c}",
        "a=" + "x" * 300,
        "a=" + "x" * 301,
        ",".join(f"key{i}={i}" for i in range(99)),
    ]
    names = [directory_name(name) for name in odd]
    assert len(set(names)) == len(odd)
    assert all("/" not in name and len(name.encode()) <= 255 for name in names)


def test_a_sweep_with_a_wrong_job_is_refused_before_the_first_job(tiny, tmp_path, train_here):
    words = ["-m", *tiny[:-1], "assignment=adamw", "sweep.name=mine", "eval_windows=-2"]
    done = train_here(*words, "max_steps=5,-1", "seed=1,2", "assignment=adamw,heteroo")
    assert done.returncode == 2 and "assignment has no choice heteroo; did you mean hetero?" in done.stderr
    done = train_here(*words, "max_steps=5,-1", "seed=1,2", "optim.adamw.lr=0.1,0.2")
    assert done.returncode == 2 and done.stderr.splitlines()[1:] == [
        "  - eval_windows is -2; give a whole number of at least 1",
        "  - max_steps is -1; give a whole number of at least 1 "
        "(in 4 of 8 jobs; the first is max_steps=-1,seed=1,optim.adamw.lr=0.1)",
    ]
    assert not (tmp_path / "outputs").exists()


def test_jobs_of_a_cluster_are_checked_without_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["device=cuda,cpu", "max_steps=9"]
    [problem] = wrong_jobs(words, jobs_of(words)).problems
    assert problem.startswith("device=cuda, but") and problem.endswith("(in device=cuda)")
    words.append("hydra/launcher=submitit_slurm")
    assert wrong_jobs(words, jobs_of(words)) is None


def test_a_sweep_without_its_data_is_refused_before_it_begins(tmp_path, monkeypatch):
    """A sweep that is there may be finished: it is continued job by job."""
    monkeypatch.chdir(tmp_path)
    words = ["sweep.name=lost", "data=text", "data.name=lost", "seed=1,2"]
    [problem] = wrong_jobs(words, jobs_of(words)).problems
    assert "there is no prepared data" in problem and "python -m data.prepare data=text" in problem
    assert wrong_jobs([*words, "hydra/launcher=basic"], jobs_of(words)) is None and list(tmp_path.iterdir()) == []
    (tmp_path / "outputs/lost").mkdir(parents=True)
    assert wrong_jobs(words, jobs_of(words)) is None
    assert wrong_jobs([*words, "hydra.sweep.dir=elsewhere"], jobs_of(words)) is not None


def test_a_sweep_skips_what_is_finished_resumes_what_is_not_and_outlives_what_fails(tiny, tmp_path, train_here):
    missing = tmp_path / "none.safetensors"
    words = ["-m", *tiny[:-1], "assignment=adamw", f"init_from={missing},null", "max_steps=10", "sweep.name=mine"]
    first = train_here(*words)
    assert first.returncode == 1 and len(re.findall(f"failed: .*{missing}", first.stderr)) == 2
    assert "nothing was written" not in first.stderr
    jobs = {yaml.safe_load(p.read_text())["init_from"]: p.parent for p in tmp_path.glob("outputs/mine/*/config.yaml")}
    assert set(jobs) == {str(missing), None} and not list(tmp_path.rglob(".hydra"))
    written = json.loads((jobs[None] / "environment.json").read_text())
    assert written["command"] == shlex.join(["python", "train.py", *words])
    best, job = first.stdout.splitlines()[-1], jobs[None]
    assert best.startswith("best validation loss")
    assert [r["event"] for r in records(jobs[str(missing)])] == ["failed"]

    before = records(job)
    shutil.rmtree(job / "checkpoints" / "step_00000010")
    lines = (job / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (job / "metrics.jsonl").write_bytes(b"".join(lines[:-1]))  # as if it had been killed just before the end
    second = train_here(*words)
    assert second.returncode == 1 and "step_00000005, step 5" in second.stdout
    assert records(job) == before and load_newest(job / "checkpoints").step == 10
    assert second.stdout.splitlines()[-1] == best

    written = (job / "metrics.jsonl").stat().st_mtime_ns
    third = train_here(*words)
    assert third.returncode == 1 and "is finished" in third.stdout and third.stdout.splitlines()[-1] == best
    assert (job / "metrics.jsonl").stat().st_mtime_ns == written


def test_jobs_that_differ_in_where_they_run_have_directories_of_their_own(tiny, tmp_path, train_here):
    """Settings that are left out of the names of directories otherwise."""
    few = ["max_steps=1", "log.interval_spectra=null", "probe.interval=null", "log.interval_certificate=null"]
    done = train_here(*tiny[:-1], "assignment=adamw", *few, "launcher.timeout_s=60,61", "sweep.name=mine", "-m")
    assert done.returncode == 0 and "is finished" not in done.stdout
    found = tmp_path.glob("outputs/mine/timeout_s=*/config.yaml")
    assert {yaml.safe_load(path.read_text())["launcher"]["timeout_s"] for path in found} == {60, 61}


def test_a_failure_that_cannot_be_noted_does_not_hide_the_reason(tmp_path):
    def configure():
        raise ConfigError(["seed is wrong"])

    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="seed is wrong"):
        run_job(train_in_process, configure, tmp_path / "file" / "run")


def test_a_job_whose_directory_holds_another_run_is_refused(tiny, tmp_path):
    cfg = compose([*tiny, "assignment=adamw", "max_steps=5"])
    run, going_on = tmp_path / "run", replace(cfg, resume="auto")
    assert plan_job(cfg, run) == (going_on, None)
    assert finish(start_ranks(1, train_in_process, cfg)) == [0]
    planned, best = plan_job(cfg, run)
    assert planned == going_on and best == records(run)[-1]["best_val_loss"]
    with pytest.raises(ConfigError, match=r"grad_clip: 1.0 → 2.0.*choose a sweep.name"):
        plan_job(replace(cfg, grad_clip=2.0), run)
    with pytest.raises(ConfigError, match=r"init_from: None → other"):
        plan_job(replace(cfg, init_from="other"), run)
    with pytest.raises(ConfigError, match=r"sweep.resume=true"):
        plan_job(replace(cfg, sweep=replace(cfg.sweep, resume=False)), run)


# ---- clusters, searches, W&B ----


def fake_command(folder: Path, name: str, line: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{line}\n")
    (folder / name).chmod(0o755)


@pytest.mark.skipif(not HAS_SUBMITIT, reason="the extra is not installed: pip install -e '.[slurm]'")
def test_the_slurm_job_has_one_task_a_node_and_requeues(tiny, tmp_path):
    bin_, words = (
        tmp_path / "bin",
        [*tiny[:-1], "launcher.nproc=4", "hydra.launcher.nodes=2", "hydra.launcher.partition=gpu"],
    )
    bin_.mkdir()
    fake_command(bin_, "srun", "")
    fake_command(bin_, "sbatch", f'cp "$1" {tmp_path}/job.sh; kill $PPID; echo Submitted batch job 12')
    env = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}"}
    command = [sys.executable, str(ROOT / "train.py"), "-m", *words, "hydra/launcher=submitit_slurm", "seed=1,2"]
    subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=120, check=False)
    job = (tmp_path / "job.sh").read_text()
    for option in (
        *("array=0-1%2", "nodes=2", "ntasks-per-node=1", "gpus-per-node=4", "partition=gpu", "job-name=sweep"),
        *("signal=USR2@120", "time=1440", "open-mode=append"),
    ):
        assert f"#SBATCH --{option}\n" in job, job
    assert "outputs/sweep/.submitit" in job and "submitit.core._submit" in job


@pytest.mark.skipif(not HAS_SUBMITIT, reason="the extra is not installed: pip install -e '.[slurm]'")
def test_the_nodes_of_a_slurm_job_meet(monkeypatch):
    job = {"SLURM_JOB_ID": "23456", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]"}
    for name, value in {"SUBMITIT_EXECUTOR": "slurm", **job}.items():
        monkeypatch.setenv(name, value)
    meetings = []
    for node in ("0", "1"):
        monkeypatch.setenv("SLURM_NODEID", node)
        meetings.append(launch._slurm_rendezvous())
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert launch._slurm_nodes() == 2
    assert meetings == [("gpu07:23456", "23456.0", {"is_host": host}) for host in (True, False)]
    assert launch._slurm_rendezvous()[1] == "23456.1"


@pytest.mark.skipif(not HAS_SUBMITIT, reason="the extra is not installed: pip install -e '.[slurm]'")
@pytest.mark.timeout(300)
def test_a_submitted_job_is_preempted_requeued_and_resumes(tiny, tmp_path):
    from harness import children, command, last_step, wait_until

    words = [*tiny[:-1], "assignment=adamw", "max_steps=400", "checkpoint.interval=1000", "seed=1"]
    words += ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]
    with command(sys.executable, str(ROOT / "train.py"), "-m", *words, cwd=tmp_path) as process:
        sweep = tmp_path / "outputs/sweep"
        run = wait_until(lambda: next((p for p in sweep.glob("*/") if last_step(p) > 20), None), 180, "twenty steps")
        tasks = [p for p in children(process.pid) if "_submit" in Path(f"/proc/{p}/cmdline").read_text()]
        os.kill(tasks[-1], signal.SIGUSR2)
        assert process.wait(180) == 0
    assert load_newest(run / "checkpoints").step == 400
    log = "".join(p.read_text() for p in sweep.glob(".submitit/*/*") if p.suffix in (".out", ".err"))
    assert "SIGUSR2: stopped at step" in log and "Requeued job" in log and "resumed from" in log
    steps = [r["step"] for r in records(run) if r["kind"] == "train"]
    assert steps == list(range(1, 401))


@pytest.mark.skipif(not HAS_OPTUNA, reason="the extra is not installed: pip install -e '.[hpo]'")
def test_optuna_minimises_the_validation_loss_and_goes_on_where_it_was(tiny, tmp_path):
    words = ["-m", *tiny[:-1], "assignment=adamw", "max_steps=3", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2"]
    words += ["optim.adamw.lr=tag(log, interval(1e-4, 1e-2))"]
    first = run_train(*words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    sweep = tmp_path / "outputs/sweep"
    found = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    losses = {
        yaml.safe_load((p / "config.yaml").read_text())["optim"]["adamw"]["lr"]: records(p)[-1]["best_val_loss"]
        for p in sweep.glob("*/")
    }
    assert len(losses) == 2
    assert found["best_value"] == min(losses.values()) == losses[found["best_params"]["optim.adamw.lr"]]
    second = run_train(*words, cwd=tmp_path)
    assert second.returncode == 0 and second.stdout.count("is finished") == 2


def test_the_wandb_sweep_gives_valid_runs(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    sweep = yaml.safe_load((ROOT / "scripts/wandb_sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).exists() and sweep["metric"] == {"name": "val/loss", "goal": "minimize"}
    values = {name: p.get("value", p.get("values", [p.get("min")])) for name, p in sweep["parameters"].items()}
    arguments = [f"{name}={v[0] if isinstance(v, list) else v}" for name, v in values.items()]
    words = [w for w in sweep["command"] if "=" in w]  # what the agent leaves to the program, and then its parameters
    cfg = compose([*words, *arguments])
    from training.checks import check

    check(cfg)
    assert cfg.output_dir == "outputs/wandb_sweep/abc123" and cfg.logger.mode == "online"


def test_a_timer_that_cannot_join_itself_is_not_heard_of(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    launch._ignore_timers.cache_clear()
    launch._ignore_timers()
    hook = sys.unraisablehook
    noise, news = (SimpleNamespace(exc_value=RuntimeError(text)) for text in ("cannot join current thread", "other"))
    hook(noise)
    hook(news)
    assert heard == [news]
    launch._ignore_timers()  # of a second job of the same process
    assert sys.unraisablehook is hook
    launch._ignore_timers.cache_clear()
