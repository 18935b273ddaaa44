"""A preparation that is killed by SIGKILL, at any moment, continues to the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_data import same_shards, text_config, whole
from test_tokenizer import has_gpt2

from data import files, sources, writer
from data.prepare import prepare
from data.settings import Data


def killed_at(cfg: Data, calls: int) -> None:
    """Prepare, and die by SIGKILL at the given call of something that changes a file."""
    left = [calls]

    def counted(function):
        def call(*arguments, **options):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for place, name in (
        (os, "fsync"),
        (Path, "replace"),
        (Path, "rename"),
        (Path, "unlink"),
        (writer.ShardWriter, "write"),
        (writer.ShardWriter, "_open"),
        (writer.ShardWriter, "finish"),
        (writer.json, "dump"),
    ):
        setattr(place, name, counted(getattr(place, name)))
    files.CHUNK_CHARS, writer.COMMIT_TOKENS = 300, 200
    prepare(cfg, progress=False)


def kill_and_continue(cfg: Data, calls: list[int]) -> int:
    """Start a preparation again and again, each killed at the given call; returns how many were killed before the end."""
    killed = 0
    for number in calls:
        process = multiprocessing.get_context("fork").Process(target=killed_at, args=(cfg, number))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
    prepare(cfg, progress=False)
    return killed


def test_a_preparation_killed_at_every_kind_of_moment_continues_to_the_same_bytes(tmp_path):
    """One preparation that is killed over and over, and fresh ones that are killed once each."""
    expected = whole(tmp_path)
    cfg = text_config(tmp_path, dir=str(tmp_path / "over" / "text"))
    assert kill_and_continue(cfg, list(range(9, 40, 3))) >= 5
    assert same_shards(Path(cfg.dir), expected)
    for calls in (1, 5, 24, 60, 75, 77):
        cfg = text_config(tmp_path, dir=str(tmp_path / f"once_{calls}" / "text"))
        assert kill_and_continue(cfg, [calls]) == 1
        assert same_shards(Path(cfg.dir), expected)
        assert os.listdir(Path(cfg.dir).parent) == ["text"]


@pytest.mark.campaign
def test_a_preparation_killed_at_every_moment_continues_to_the_same_bytes(tmp_path):
    expected, calls, killed = whole(tmp_path), 0, 1
    while killed:
        calls += 1
        cfg = text_config(tmp_path, dir=str(tmp_path / str(calls) / "text"))
        killed = kill_and_continue(cfg, [calls])
        assert same_shards(Path(cfg.dir), expected)
    assert calls > 50


@pytest.mark.parametrize("changed", [False, True])
def test_a_preparation_of_changed_text_starts_again(tmp_path, monkeypatch, changed):
    cfg = text_config(tmp_path)
    process = multiprocessing.get_context("fork").Process(target=killed_at, args=(cfg, 40))
    process.start()
    process.join()
    assert (Path(cfg.dir).parent / ".text.partial" / "progress.json").exists()
    if changed:
        os.utime(tmp_path / "books.txt", ns=(0, 0))
    starts, real = [], sources.TextFiles.chunks
    monkeypatch.setattr(sources.TextFiles, "chunks", lambda cfg, f, at: starts.append(at) or real(cfg, f, at))
    prepare(cfg, progress=False)
    assert (starts == [(0, 0)]) is changed
    assert same_shards(Path(cfg.dir), whole(tmp_path))


LITTLE_COMMITS = (
    "from data import prepare, writer; import sys; writer.COMMIT_TOKENS = 100_000; sys.exit(prepare.main(sys.argv[1:]))"
)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_the_command_killed_at_random_times_with_its_workers_continues_to_the_same_bytes(tmp_path):
    """At least ten kills, by the clock, of the command as a user starts it; no process is left."""
    random.seed(int(os.environ.get("KILL_SEED", "0")))
    folder = Path(json.__file__).parent.parent
    library = sorted([*folder.glob("*.py"), *folder.glob("[a-c]*/*.py")])
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(path.read_text(errors="replace") for path in library))
    with open(tmp_path / "b.jsonl", "w") as file:
        for path in library:
            file.writelines(
                json.dumps({"text": part}) + "\n" for part in path.read_text(errors="replace").split("\n\n")
            )
    overrides = ["data=text", f"data.files={tmp_path}/*.*", "data.shard_tokens=700_000", "data.val_fraction=0.05"]
    overrides += [f"data.tokenizer={'gpt2' if has_gpt2() else 'bytes'}"]

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-c", LITTLE_COMMITS, *overrides, f"data.dir={tmp_path}/{name}/x"]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    killed, progress = 0, tmp_path / "killed" / ".x.partial" / "progress.json"
    seen = set()
    while True:
        process = start("killed")
        before = progress.read_bytes() if progress.exists() else b""
        while process.poll() is None and (progress.read_bytes() if progress.exists() else b"") == before:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.15))
        if process.poll() is not None:
            assert process.returncode == 0
            break
        process.kill()
        process.wait()
        killed += 1
        seen.add(json.loads(progress.read_bytes())["index"] if progress.exists() else 0)
    print(f"killed {killed} times, after {sorted(seen)} documents")
    assert killed >= 10
    assert same_shards(tmp_path / "killed" / "x", tmp_path / "whole" / "x")
