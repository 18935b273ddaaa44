"""Where memory, disk or somebody else's files end a command, it says so in one message."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT

import train as module
from scripts import report
from scripts.analysis.runs import read_run
from scripts.analysis.tables import COLUMNS, make_table
from scripts.command import as_cell, as_code
from train import train
from training.checks import USER_ERRORS
from training.config import compose
from training.launch import run_rank
from training.limits import MachineError, machine_limits
from training.log import RunLog, read_records

MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


# ---- memory ----


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: str(error)[:20] or "MemoryError")
def test_want_of_memory_names_size_and_remedy(tiny, monkeypatch, error):
    def hungry(*_):
        raise error

    monkeypatch.setattr(module, "accumulate", hungry)
    with pytest.raises(
        MachineError,
        match=r"1 layers of width 16, .*micro_batch_size=4 .*lower micro_batch_size .*continue with (resume=auto.*), or",
    ) as caught:
        train(compose([*tiny, "max_steps=6"]))
    assert isinstance(caught.value, USER_ERRORS) and caught.value.exit_code == 1


def test_other_errors_pass(tiny):
    for error in (RuntimeError("shapes differ"), FileNotFoundError(2, "gone", "x"), KeyError(3)):
        with pytest.raises(type(error)), machine_limits(compose(tiny)):
            raise error


def test_torch_words_its_want_of_memory_as_we_know_it(tiny):
    with pytest.raises(MachineError, match="out of memory"), machine_limits(compose(tiny)):
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("parent_reports", [True, False])
def test_a_rank_out_of_memory_says_so_itself_and_fails(tiny, monkeypatch, capsys, parent_reports):
    """Its parent says only that the rank failed with exit code 1 and that the message stands above."""

    def hungry_worker(cfg, directory):
        with machine_limits(cfg):
            raise MEMORY[1]

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        run_rank(hungry_worker, compose(tiny), None, parent_reports)
    err = capsys.readouterr().err
    assert ended.value.code == 1 and err.count("lower micro_batch_size") == 1 and "Traceback" not in err


# ---- disk ----


def limited_train(*overrides, cwd, largest_file):
    """`python train.py` that can make no file longer than `largest_file` bytes, the nearest to a full disk that needs no mount."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, preexec_fn=limit, check=False)


def test_records_that_fill_the_disk_end_the_run_with_a_message(tiny, tmp_path):
    done = limited_train(*tiny, "checkpoint.interval=1000", cwd=tmp_path, largest_file=6000)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "metrics.jsonl could not be written (File too large" in done.stderr and "resume=auto" in done.stderr
    assert list(read_records(tmp_path / "run"))[-1]["step"] >= 0
    assert (tmp_path / "run/metrics.jsonl").read_bytes().endswith(b"\n")


@pytest.mark.parametrize("target", ["config.yaml", "metrics.jsonl"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_full_at_the_start_is_a_message_and_the_run_goes_on_later(tiny, tmp_path, monkeypatch, target, code):
    train(compose([*tiny, "max_steps=5"]))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    replace = os.replace

    def full(old, new):
        if os.fspath(new).endswith(target):
            raise OSError(code, os.strerror(code), os.fspath(old))
        return replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(MachineError, match=rf"{target}.* could not be written") as caught:
            train(compose([*tiny, "max_steps=10", "resume=auto", "schedule.decay_steps=5"]))
    assert ("free space" in str(caught.value)) == (code == errno.ENOSPC)
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert {p.name for p in after} == {p.name for p in before}
    assert after[tmp_path / "run/metrics.jsonl"] == before[tmp_path / "run/metrics.jsonl"]
    train(compose([*tiny, "max_steps=10", "resume=auto", "schedule.decay_steps=5"]))
    assert [r["step"] for r in read_records(tmp_path / "run", "train")] == list(range(1, 11))


# ---- names in Markdown ----

NAMES = ["a|b", "<script>alert(1)</script>", "a\nb", "`x`", "<!-- /table -->", "\\|"]


def test_names_stay_inside_their_cell():
    for name in NAMES:
        assert not re.search(r"[|<>\n]", as_cell(name)), name
        assert re.fullmatch(r"`[^`\n]*`", as_code(name)), name
    assert as_cell("val loss, best ± .1") == "val loss, best ± .1"


def written_run(directory, cfg, **records):
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(cfg))
    log = RunLog(directory)
    log.write("eval", 0, loss=3.0)
    log.close()
    return directory


def test_a_table_keeps_its_columns_whatever_runs_are_called(tmp_path):
    plain = compose(["assignment=hetero"]).plain()
    for i, name in enumerate(NAMES):
        written_run(tmp_path / str(i), {**plain, "assignment": {**plain["assignment"], "name": name}})
    groups = [[read_run(tmp_path / str(i))] for i in range(len(NAMES))]
    table = make_table(groups, COLUMNS).markdown()
    assert [line.count("|") for line in table.splitlines()] == [len(COLUMNS) + 1] * (len(NAMES) + 2)
    assert "<" not in table and "&lt;script&gt;" in table


# ---- runs of others ----

CONFIGS = {
    "nested": "[" * 5000,
    "python": "!!python/object/apply:os.system ['exit 1']",
    "tag": "!!bool perhaps",
    "list": "[1, 2]",
    "empty": "",
    "bytes": "\x00\x01",
    "another program": "learning_rate: 0.1",
    "rules": "{assignment: {name: A, rules: [1]}, max_steps: 3, seed: 1}",
    "name": "{assignment: {name: [A], rules: {}}, max_steps: 3, seed: 1}",
    "steps": "{assignment: {name: A, rules: {}}, max_steps: many, seed: 1}",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_foreign_configuration_is_a_message(tmp_path, capsys, kind):
    written_run(tmp_path / "run", compose().plain())
    (tmp_path / "run/config.yaml").write_text(CONFIGS[kind])
    assert report.main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "config.yaml" in err and str(tmp_path / "run") in err and len(err) < 1000


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000, "\udcff"], ids=["list", "torn", "nested", "bytes"])
@pytest.mark.parametrize("name", ["environment.json", "cost.json"])
def test_foreign_side_files_are_a_message(tmp_path, capsys, name, content):
    run = written_run(tmp_path / "run", compose().plain())
    (run / name).write_text(content, errors="surrogateescape")
    assert report.main([str(tmp_path)]) == 2
    assert str(run) in capsys.readouterr().err


def test_foreign_records_are_left_out_and_counted(tmp_path, capsys):
    run = written_run(tmp_path / "run", compose().plain())
    good = [
        {"kind": "eval", "step": 4, "loss": 2.5},
        {"kind": "spectra", "step": 4, "name": "h.0.attn.w", "sigma": [2.0, 1.0]},
    ]
    foreign = [
        *({"kind": kind, "step": 3} for kind in ("train", "eval", "spectra", "event", "certificate", "probe")),
        *({"kind": "eval", "step": 3, "loss": loss} for loss in ("low", None, [1], True, 10**400)),
        *({"kind": "spectra", "step": 3, "name": "w", "sigma": sigma} for sigma in ([], ["a"], 3, [[1.0]])),
        {"kind": "spectra", "step": 3, "name": 3, "sigma": [1.0]},
        {"kind": "event", "step": 3, "event": [1]},
    ]
    lines = [json.dumps(r) for r in [*foreign, *good]] + ["no record", "[" * 100_000]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
    assert report.main([str(tmp_path), f"figures={tmp_path}/figures"]) == 0
    out, err = capsys.readouterr()
    assert "2.5000" in out and f"{len(foreign)} records lack a field of their kind" in err
    assert read_run(run).best == 2.5 and read_run(run).sigma_max("attention") == 2.0


def test_side_files_do_not_make_a_run_of_their_own(tmp_path, capsys):
    run = written_run(tmp_path / "run", compose().plain())
    shutil.copy(run / "metrics.jsonl", run / "metrics.jsonl.1.old")
    shutil.copy(run / "metrics.jsonl", run / "metrics.jsonl.damaged")
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("Hetero") == 1
