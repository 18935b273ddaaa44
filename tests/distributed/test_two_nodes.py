"""Two nodes: two network namespaces with a cable between them, and nothing else in common but the disk."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT
from harness import TORCHRUN, children, command, last_step, wait_until

from training.checkpoint import load_newest

ADDRESSES = ("10.77.0.1", "10.77.0.2")
TIMEOUT_S = 6


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def nodes():
    """The names of two connected namespaces."""
    names = [f"node{i}-{os.getpid()}" for i in range(2)]
    ends = [f"veth{i}-{os.getpid() % 10000}" for i in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, ADDRESSES):
            ip("-n", name, "link", "set", end, "name", "cable")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"two network namespaces cannot be made here ({getattr(error, 'stderr', None) or error})")
    finally:
        for name in names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20, check=False)


def torchrun(node, names, overrides, folder):
    """torchrun on one of two nodes, with its output in a folder of its own."""
    folder.mkdir(parents=True)
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES[0]}:29500", "--rdzv_id=test"]
    rendezvous += [f"--rdzv_conf=is_host={node == 0}"]  # by its name, which is the machine's, a node cannot tell
    words = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", *rendezvous, f"--local_addr={ADDRESSES[node]}"]
    environment = {"GLOO_SOCKET_IFNAME": "cable", "TP_SOCKET_IFNAME": "cable"}
    into = ["ip", "netns", "exec", names[node]]
    return command(*words, str(ROOT / "train.py"), *overrides, cwd=folder, env=environment, prefix=into)


@pytest.mark.timeout(300)
def test_two_nodes_train_are_interrupted_resume_and_notice_that_one_is_gone(nodes, tiny, tmp_path):
    run = tmp_path / "run"
    overrides = [*tiny, "max_steps=100000", "checkpoint.interval=10", "assignment=adamw"]
    overrides += ["log.interval_spectra=1000", "eval_interval=1000", "resume=auto", f"launcher.timeout_s={TIMEOUT_S}"]

    first, second = (torchrun(i, nodes, overrides, tmp_path / f"first{i}") for i in range(2))
    with first as one, second as two:
        wait_until(lambda: last_step(run) > 5, 180, "five steps")
        two.terminate()  # the second node is preempted; both leave, and the first has saved
        assert one.wait(30) != 0 and two.wait(30) != 0
    stopped = load_newest(run / "checkpoints").step
    assert stopped == last_step(run)
    assert f"SIGTERM: stopped at step {stopped}" in (tmp_path / "first0/output.txt").read_text()

    first, second = (torchrun(i, nodes, overrides, tmp_path / f"then{i}") for i in range(2))
    with first as one, second as two:
        wait_until(lambda: last_step(run) >= stopped + 20, 180, "twenty more steps")
        ip("-n", nodes[1], "link", "set", "cable", "down")  # no farewell reaches the first node
        for pid in (two.pid, *children(two.pid)):
            os.kill(pid, signal.SIGKILL)
        since = time.monotonic()
        assert one.wait(TIMEOUT_S + 40) == 1
        assert time.monotonic() - since < TIMEOUT_S + 30
    said = (tmp_path / "then0/output.txt").read_text()
    assert f"resumed from {run}/checkpoints/step_{stopped:08d}, step {stopped}" in said
    assert (
        f"rank 0 of 2 lost the others: a rank has ended, or did not answer for launcher.timeout_s={TIMEOUT_S} s" in said
    )
    assert load_newest(run / "checkpoints").step >= last_step(run) - 10
