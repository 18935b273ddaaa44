"""The files in recipes/: their syntax, what they start on 1, 8 and 16 GPUs, and that train.py takes it."""

import os
import signal
import stat
import subprocess
import time

import pytest
import yaml
from conftest import ROOT

from training.checks import check
from training.config import compose

RECIPES = ROOT / "recipes"
SKY = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
STUBS = {
    "torchrun": 'printf "%s\\n" "$@" > "$OUT/torchrun.$NODE"',
    "scontrol": 'if [ "$1" = show ]; then printf "first\\nsecond\\n"; else echo "$@" > "$OUT/scontrol"; fi',
    # srun starts its command on every node, and passes a signal on.
    "srun": 'shift; for node in $(seq 0 $((NODES - 1))); do SLURM_NODEID=$node "$@"; done; trap "exit 143" TERM; '
    'if [ -n "${LONG:-}" ]; then touch $OUT/waits; while :; do sleep 0.02; done; fi',
}


@pytest.fixture
def stubbed(tmp_path):
    """An environment in which the programs of a cluster write down what they were asked."""
    (tmp_path / "bin").mkdir()
    for name, code in STUBS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{code}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    kept = {k: v for k, v in os.environ.items() if k not in ("GPUS", "NODES", "NODE", "HEAD", "PORT", "NAME")}
    return {**kept, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TORCHRUN": "torchrun", "OUT": str(tmp_path)}


def started(folder, nodes):
    """The settings of torchrun, the same on every node but its number; those of train.py; and the number of ranks."""
    found = []
    for node in range(nodes):
        words = (folder / f"torchrun.{node}").read_text().splitlines()
        program = words.index("train.py")
        options = dict(word.lstrip("-").split("=", 1) for word in words[:program])
        assert options.pop("node_rank") == str(node)
        found.append((options, words[program + 1 :]))
    assert all(other == found[0] for other in found)
    options, overrides = found[0]
    return options, overrides, int(options["nnodes"]) * int(options["nproc_per_node"])


def test_shells_can_read_them():
    scripts = [(RECIPES / name).read_text() for name in ("torchrun.sh", "slurm.sbatch")] + [SKY["setup"], SKY["run"]]
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert os.access(RECIPES / "torchrun.sh", os.X_OK)


@pytest.mark.parametrize(
    ("gpus", "nodes", "options"),
    [(1, 1, ["experiment=one_gpu"]), (8, 1, ["experiment=paper"]), (8, 2, ["experiment=paper", "launcher.shard=fsdp"])],
)
def test_what_they_start(gpus, nodes, options, stubbed, tmp_path):
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "x"}
    slurm |= {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_GPUS_ON_NODE": str(gpus)}
    subprocess.run(["bash", RECIPES / "slurm.sbatch", *options], env={**stubbed, **slurm}, check=True)
    settings, overrides, world = started(tmp_path, nodes)
    assert world == gpus * nodes and settings["master_addr"] == "first" and settings["master_port"] == "23456"
    assert overrides == ["output_dir=outputs/slurm-123456", "resume=auto", "device=cuda", *options]
    check(compose([*overrides, "device=cpu"]), world)  # an option that is given later is the one that counts
    assert not (tmp_path / "scontrol").exists()

    sky = {**SKY["envs"], "OPTIONS": " ".join(options), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n"}
    sky |= {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NUM_GPUS_PER_NODE": str(gpus)}
    for node in range(nodes):
        there = {**stubbed, **sky, "SKYPILOT_NODE_RANK": str(node)}
        subprocess.run(["bash", "-c", SKY["run"]], env=there, cwd=ROOT, check=True)
    settings, overrides, world = started(tmp_path, nodes)
    assert world == gpus * nodes and settings["master_addr"] == "10.0.0.1"
    assert overrides == [f"output_dir=outputs/{SKY['envs']['NAME']}", "resume=auto", "device=cuda", *options]


@pytest.mark.parametrize("word", ["GPUS=0", "GPUS=a", "NODES=-1"])
def test_an_impossible_number_of_ranks_starts_nothing(word, stubbed, tmp_path):
    name, _, value = word.partition("=")
    done = subprocess.run([RECIPES / "torchrun.sh"], env={**stubbed, name: value}, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.glob("torchrun*"))
    assert done.stderr == f"{word} is not a whole number above 0; give one, such as {name}=1\n"


def test_the_defaults_of_skypilot_are_sound():
    check(compose(SKY["envs"]["OPTIONS"].split()), 8)
    compose(SKY["envs"]["PREPARE"].split())
    assert SKY["num_nodes"] == 1 and SKY["resources"]["accelerators"].endswith(":8")


def test_a_slurm_job_that_runs_out_of_time_returns_to_the_queue(stubbed, tmp_path):
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "1"}
    job = subprocess.Popen(["bash", RECIPES / "slurm.sbatch"], env={**stubbed, **slurm, "LONG": "1"})
    until = time.monotonic() + 60
    while not (tmp_path / "waits").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0 and (tmp_path / "scontrol").read_text() == "requeue 7\n"
