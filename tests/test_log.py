"""metrics.jsonl holds every record through crashes and resumes; the sinks show it and cannot stop a run."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import struct
from pathlib import Path

import numpy
import pytest
import torch

from training.log import DAMAGED_FILE, METRICS_FILE, RunLog, read_records
from training.progress import ProgressSink


class Memory:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.records: list[dict] = []
        self.closed = 0

    def record(self, rec):
        self.records.append(rec)

    def close(self):
        self.closed += 1


def write_run(directory: Path, steps: int) -> Path:
    log = RunLog(directory)
    log.write("eval", 0, loss=10.0)
    for step in range(1, steps + 1):
        log.write("train", step, loss=1.0 / step)
        if step % 5 == 0:
            log.write("eval", step, loss=2.0 / step)
    log.close()
    return directory / METRICS_FILE


def same(a, b) -> bool:
    """Equal, NaN included, bit for bit."""
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# ---- the file ----


def test_a_reader_gets_back_what_was_written(tmp_path):
    fields = {
        "loss": 0.1 + 0.2,
        "tiny": 5e-324,
        "lost": math.nan,
        "worse": [math.inf, -math.inf, 1.0, {"deep": math.nan}],
        "count": 2**60,
        "what": 'a "quoted" line\nand Σ',
        "none": None,
        "flag": True,
    }
    memory = Memory()
    log = RunLog(tmp_path, [memory])
    log.write("train", 3, **fields)
    expected = {"kind": "train", "step": 3, **fields}
    assert same(next(read_records(log.path)), expected), "a record can be read as soon as write returns"
    assert same(memory.records[0], expected), "the sinks see what a reader sees"

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = log.path.read_text()
    assert text.count("\n") == 1
    json.loads(text, parse_constant=refuse)


def test_a_field_may_have_any_name(tmp_path):
    log = RunLog(tmp_path)
    log.write("probe", 1, self=0.5)
    assert next(read_records(log.path))["self"] == 0.5


def test_arrays_and_tensors_become_plain_numbers(tmp_path):
    log = RunLog(tmp_path)
    log.write(
        "spectra",
        numpy.int64(7),
        double=numpy.float64(0.1),
        single=torch.tensor(0.1),
        half=torch.tensor([1.5, math.nan], dtype=torch.bfloat16),
        matrix=numpy.arange(4.0).reshape(2, 2),
        count=torch.tensor(3),
        nested={"flag": numpy.bool_(True), "pair": (1, torch.tensor(2.0))},
    )
    expected = {
        "kind": "spectra",
        "step": 7,
        "double": 0.1,
        "single": float(numpy.float32(0.1)),
        "half": [1.5, math.nan],
        "matrix": [[0.0, 1.0], [2.0, 3.0]],
        "count": 3,
        "nested": {"flag": True, "pair": [1, 2.0]},
    }
    assert same(next(read_records(tmp_path)), expected)
    with pytest.raises(TypeError, match=r"nested.what is a set.*log numbers"):
        log.write("train", 8, nested={"what": {1}})
    assert len(list(read_records(tmp_path))) == 1, "a refused record leaves nothing behind"


def test_records_are_read_by_kind(tmp_path):
    path = write_run(tmp_path, 10)
    assert [record["step"] for record in read_records(path, "eval")] == [0, 5, 10]
    assert [record["loss"] for record in read_records(tmp_path, "train")] == [1.0 / step for step in range(1, 11)]
    assert len(list(read_records(path))) == 13


def test_torn_anywhere_the_file_keeps_its_whole_records(tmp_path):
    path = write_run(tmp_path, 5)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        complete = whole[:length].count(b"\n")
        assert len(list(read_records(path))) == complete, "a reader passes a torn line over"
        log = RunLog(tmp_path)
        log.write("event", 9)
        log.close()
        assert path.read_bytes() == b"".join(lines[:complete]) + b'{"kind": "event", "step": 9}\n'


def test_zeros_that_a_power_failure_left_are_dropped(tmp_path):
    path = write_run(tmp_path, 5)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 4096)
    RunLog(tmp_path).close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        b'{"kind": "tra\n',
        b"3\n",
        b'{"kind": "train"}\n',
        b'{"step": 3}\n',
        b'{"kind": "train", "step": -1}\n',
        b"\xff\n",
        b"\0" * 99 + b"\n",
        b"[" * 100_000 + b"\n",
        b'{"kind": "train", "step": 1, "NaN": "NaN", "deep": ' + b"[" * 700 + b"]" * 700 + b"}\n",
    ],
    ids=lambda damage: repr(damage[:20]),
)
def test_damage_in_the_middle_is_named_and_kept_and_the_run_goes_on(tmp_path, damage, caplog):
    path = write_run(tmp_path, 5)
    whole = list(read_records(path))
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:2], damage, *lines[2:]])
    path.write_bytes(damaged)
    assert list(read_records(path)) == whole
    assert "line 3 is not a record" in caplog.text and str(path) in caplog.text
    assert path.read_bytes() == damaged, "a reader changes nothing"
    caplog.clear()
    RunLog(tmp_path, keep_until=2).close()
    assert "line 3 is not a record" in caplog.text and DAMAGED_FILE in caplog.text
    assert (tmp_path / DAMAGED_FILE).read_bytes() == damage
    caplog.clear()
    assert list(read_records(path)) == [r for r in whole if r["step"] <= 2] and not caplog.records


def test_an_earlier_start_is_moved_aside_never_erased(tmp_path, caplog):
    first = write_run(tmp_path, 5).read_bytes()
    for start in (1, 2):
        log = RunLog(tmp_path, fresh=True)
        assert list(read_records(tmp_path)) == [] and f"kept in {METRICS_FILE}.{start}.old" in caplog.text
        log.write("train", start, loss=1.0)
        log.close()
    assert (tmp_path / f"{METRICS_FILE}.1.old").read_bytes() == first
    assert [r["step"] for r in read_records(tmp_path / f"{METRICS_FILE}.2.old")] == [1]
    (tmp_path / METRICS_FILE).write_bytes(b"")
    RunLog(tmp_path, fresh=True).close()
    assert sorted(os.listdir(tmp_path)) == [METRICS_FILE, f"{METRICS_FILE}.1.old", f"{METRICS_FILE}.2.old"]


@pytest.mark.parametrize("keep_until", [-1, 0, 4, 5, 12, 20, 99])
def test_resuming_leaves_one_curve(tmp_path, keep_until):
    """A run killed after step 20 and resumed from an earlier checkpoint reads like one that was never interrupted."""
    straight, moved = write_run(tmp_path / "straight", 25).read_bytes(), [f"{METRICS_FILE}.1.old"] * (keep_until < 0)
    path = write_run(tmp_path / "resumed", 20)
    path.write_bytes(path.read_bytes() + b'{"kind": "train", "st')
    log = RunLog(tmp_path / "resumed", keep_until=keep_until, fresh=keep_until < 0)
    assert all(record["step"] <= keep_until for record in read_records(path))
    if keep_until < 0:
        log.write("eval", 0, loss=10.0)
    for step in range(max(min(keep_until, 20), 0) + 1, 26):
        log.write("train", step, loss=1.0 / step)
        if step % 5 == 0:
            log.write("eval", step, loss=2.0 / step)
    log.close()
    assert path.read_bytes() == straight
    assert sorted(os.listdir(path.parent)) == [METRICS_FILE, *moved]


def test_a_truncation_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = write_run(tmp_path, 20)
    whole = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, name, killed)
            RunLog(tmp_path, keep_until=3)
        assert path.read_bytes() == whole


def test_a_full_disk_leaves_whole_records_and_says_what_to_do(tmp_path):
    log = RunLog(tmp_path)
    log.write("train", 1, loss=1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: a record could not be written.*metrics\.jsonl"):
            log.write("spectra", 1, sigma=[1.0] * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.write("train", 2, loss=2.0)
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2]


# ---- sinks ----


def test_a_failing_sink_costs_one_warning_and_nothing_else(tmp_path, caplog):
    class Failing(Memory):
        def record(self, rec):
            raise RuntimeError("no network")

    failing, memory = Failing(), Memory()
    log = RunLog(tmp_path, [failing, memory])
    for step in range(3):
        log.write("train", step, loss=1.0)
    log.close()
    log.close()
    assert len(caplog.records) == 1 and "no network" in caplog.text and "training continues" in caplog.text
    assert len(memory.records) == len(list(read_records(tmp_path))) == 3
    assert (failing.closed, memory.closed) == (1, 1)


# ---- progress ----


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


NEVER = 10**9


def drive(sink: ProgressSink, clock: Clock, steps: int) -> None:
    """A run of one step a second, evaluated as the sink was told, in no time."""
    for step in range(1, steps + 1):
        clock.now += 1.0
        sink.record({"kind": "train", "step": step, "loss": 100.0 / step, "tokens_per_s": 41234.0})
        sink.record({"kind": "spectra", "step": step, "name": "w", "sigma": [1.0]})
        if step % sink.eval_interval == 0 or step == sink.total_steps:
            sink.record({"kind": "eval", "step": step, "loss": 200.0 / step})


def test_elsewhere_than_on_a_terminal_a_line_at_evaluations_and_rarely_between():
    clock, stream = Clock(), io.StringIO()
    drive(ProgressSink("hetero", 100, eval_interval=25, stream=stream, clock=clock), clock, 100)
    lines = stream.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [10, 20, 25, 35, 45, 50, 60, 70, 75, 85, 95, 100]
    assert lines[3].split() == ["hetero", "35/100", "train", "2.86", "val", "8.00", "41k", "tokens/s", "1:05", "left"]
    assert lines[-1].endswith("0:00 left")
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("interval_s", [0.0, 10.0])
def test_a_step_has_one_line_and_that_of_an_evaluated_step_has_its_loss(interval_s):
    clock, stream = Clock(), io.StringIO()
    drive(ProgressSink("run", 60, eval_interval=25, stream=stream, clock=clock, interval_s=interval_s), clock, 60)
    lines = [line.split() for line in stream.getvalue().splitlines()]
    steps = [int(line[1].split("/")[0]) for line in lines]
    assert len(set(steps)) == len(steps) and {25, 50, 60} <= set(steps)
    for step in (25, 50, 60):  # the loss of that step's evaluation, not of the one before
        assert lines[steps.index(step)][5] == f"{200 / step:.2f}"


def test_the_evaluation_of_the_whole_split_is_told():
    stream = io.StringIO()
    sink = ProgressSink("run", 10, eval_interval=5, stream=stream)
    sink.record({"kind": "full_eval", "step": 10, "loss": 2.18765, "tokens": 100})
    assert stream.getvalue().split(maxsplit=1)[1] == "step 10: loss on the whole validation split 2.1877\n"


def test_a_resumed_run_tells_the_time_left_from_its_own_pace():
    clock, stream = Clock(), io.StringIO()
    sink = ProgressSink("run", 1000, eval_interval=NEVER, first_step=500, stream=stream, clock=clock, interval_s=0.0)
    for step in range(501, 511):
        clock.now += 2.0
        sink.record({"kind": "train", "step": step, "loss": 1.0})
    assert "left" not in stream.getvalue().splitlines()[0]
    assert stream.getvalue().splitlines()[-1].endswith("16:20 left")


def test_each_sort_of_event_is_told_once():
    clock, stream = Clock(), io.StringIO()
    sink = ProgressSink("run", 10, eval_interval=NEVER, stream=stream, clock=clock)
    for step in range(1, 5):
        sink.record({"kind": "event", "step": step, "event": "nonfinite", "message": f"loss is nan [{step}]"})
    sink.record({"kind": "event", "step": 5, "event": "unstable", "message": "validation loss rose"})
    assert [line.split(maxsplit=1)[1] for line in stream.getvalue().splitlines()] == [
        "step 1: loss is nan [1]",
        "step 5: validation loss rose",
    ]


@pytest.mark.parametrize("step", [None, 3])
def test_the_end_says_that_the_run_became_unstable(step):
    stream = io.StringIO()
    sink = ProgressSink("run", 10, eval_interval=5, stream=stream)
    sink.record({"kind": "end", "step": 10, "unstable_step": step, "reason": step and "validation loss rose"})
    told = "" if step is None else "run           unstable at step 3: validation loss rose\n"
    assert stream.getvalue() == told


def test_on_a_terminal_a_bar_shows_the_same(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    clock, stream = Clock(), Terminal()
    sink = ProgressSink("hetero", 100, eval_interval=25, stream=stream, clock=clock)
    drive(sink, clock, 50)
    sink.record({"kind": "event", "step": 50, "event": "unstable", "message": "loss [bold] rose"})
    sink.record({"kind": "eval", "step": 50, "loss": math.nan})
    sink.close()
    shown = stream.getvalue()
    assert "step 50: loss [bold] rose" in shown
    last = shown.removesuffix("\x1b[?25h").rstrip().splitlines()[-1]
    for part in ("hetero", "50/100", "train 2.00", "val nan", "41k tokens/s", "0:50 left", "━"):
        assert part in last


def test_the_end_of_a_run_that_goes_on_is_removed(tmp_path):
    """`end` is written after the last checkpoint, from which a longer run is continued."""
    path = write_run(tmp_path, 5)
    log = RunLog(tmp_path)
    log.write("end", 5)
    log.close()
    RunLog(tmp_path, keep_until=5).close()
    assert [r["kind"] for r in read_records(path) if r["step"] == 5] == ["train", "eval"]
