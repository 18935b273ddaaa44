"""The table of a sweep says what the records say, and reads on where it stopped."""

import json
import os
import re
import time

import pytest
import yaml

from scripts import watch
from scripts.analysis.search import TRIALS
from training.log import RunLog


def write_job(sweep, name, *records, max_steps=100, silent_s=0.0):
    directory = sweep / name
    directory.mkdir(parents=True)
    if records:
        (directory / "config.yaml").write_text(yaml.safe_dump({"max_steps": max_steps, "global_batch_tokens": 50}))
        log = RunLog(directory)
        for kind, step, fields in records:
            log.write(kind, step, **fields)
        log.close()
        then = time.time() - silent_s
        os.utime(directory / "metrics.jsonl", (then, then))
    return directory


def train(step, loss=2.5):
    return ("train", step, {"loss": loss, "lr": 1.0, "tokens_per_s": 10.0})


def rows(capsys, *arguments):
    """The printed table: job → its cells."""
    assert watch.main([*map(str, arguments), "once=true"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    return {line.split()[0]: line.split()[1:] for line in lines}


UNSTABLE = ("event", 20, {"event": "unstable", "message": "no"})
END = ("end", 100, {"best_val_loss": 2.0})
CASES = {
    "seed=1": ([], "waiting", ()),
    "seed=2": ([train(40), ("spectra", 40, {"name": "w", "sigma": [1.0]})], "running", ("40/100", "2.5000", "0:05:00")),
    "seed=3": ([train(40), END], "finished", ("100/100", "2.5000")),
    "seed=4": ([train(20), UNSTABLE, train(30)], "unstable", ("30/100", "2.5000", "0:05:50")),
    "seed=5": ([train(20), UNSTABLE, END], "unstable", ("100/100", "2.5000")),
    "seed=6": ([train(7), ("event", 7, {"event": "failed", "message": "no"})], "failed", ("7/100", "2.5000")),
    "seed=7": ([("eval", 0, {"loss": float("nan")})], "running", ("0/100", "nan")),
    "seed=8": ([train(9), ("event", 9, {"event": "failed", "message": "no"}), train(10)], "running", None),
}


def test_every_state(tmp_path, capsys):
    for name, (records, _, _) in CASES.items():
        write_job(tmp_path, f"model=demo,{name}", *records)
    write_job(tmp_path, "model=demo,seed=9", train(40), silent_s=1000)
    write_job(tmp_path / TRIALS, "model=demo,seed=0", train(40))
    (tmp_path / ".submitit").mkdir()
    found = rows(capsys, tmp_path)
    for name, (_, state, cells) in CASES.items():
        assert found[name][0] == state, name  # what all jobs share is not in their names
        assert cells is None or tuple(found[name][1:]) == cells, name
    assert found["seed=9"] == ["stalled", "40/100", "2.5000"] and found["seed=0"][0] == "running"
    assert len(found) == len(CASES) + 2
    assert rows(capsys, tmp_path, "stalled_s=2000")["seed=9"][0] == "running"


def test_a_folder_of_pictures_is_no_job(tmp_path, capsys):
    write_job(tmp_path, "a", train(10))
    for name in ("pictures", "begun"):
        (tmp_path / name).mkdir()
    (tmp_path / "pictures/a.png").write_bytes(b"")
    assert {name: cells[0] for name, cells in rows(capsys, tmp_path).items()} == {"a": "running", "begun": "waiting"}


def test_it_reads_on_and_starts_again_when_a_run_was_resumed(tmp_path):
    directory = write_job(tmp_path, "a", train(10), train(20, loss=3.0))
    job = watch.Watched(directory)
    job.update()
    assert (job.step, job.train) == (20, 3.0)
    log = RunLog(directory, keep_until=10)
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(json.dumps({"kind": "train", "step": 11, "loss": 1.0, "tokens_per_s": 1.0}).encode()[:-5])
    job.update()
    assert (job.step, job.train) == (10, 2.5)  # the rest of the line is still on its way
    log.close()
    RunLog(directory).close()
    job.update()
    assert job.step == 10


def test_a_single_run_and_mistakes(tmp_path, capsys):
    directory = write_job(tmp_path, "a", train(10))
    assert rows(capsys, directory)["a"][0] == "running"
    for arguments, said in (
        [[], "name one sweep"],
        [[tmp_path, "zzz=1"], "zzz=1 is no option; choose of once="],
        [[tmp_path / "b"], "no directory"],
        [[tmp_path, "once=1"], "once=true"],
    ):
        assert watch.main(list(map(str, arguments))) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "note.txt").write_text("x")
    assert watch.main([str(tmp_path / "files"), "once=true"]) == 2
    assert f"{tmp_path}/files holds no jobs; name" in capsys.readouterr().err
    for seconds in ("0", "-1", "1e10"):
        assert watch.main([str(tmp_path), f"interval_s={seconds}"]) == 2
        assert "give seconds, above 0" in capsys.readouterr().err


def test_sweeps_are_no_jobs(tmp_path, monkeypatch, capsys):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    write_job(tmp_path / "outputs/family", "a,seed=1")  # has not written anything yet
    assert rows(capsys, tmp_path / "outputs/family")["a,seed=1"] == ["waiting"]
    write_job(tmp_path / "outputs/reproduce/demo", "hetero", train(10))
    for words in (["once=true"], []):
        assert watch.main([str(tmp_path / "outputs"), *words]) == 2
        out, err = capsys.readouterr()
        assert not out and f"outputs holds sweeps, no jobs; name one, such as {tmp_path}/outputs/reproduce/demo" in err
    write_job(tmp_path / "others/family" / TRIALS, "a,seed=0", train(10))
    assert watch.main([str(tmp_path / "others")]) == 2
    assert capsys.readouterr().err.endswith(f"name one, such as {tmp_path}/others/family\n")
    (tmp_path / "new").mkdir()
    assert watch.main([str(tmp_path / "new")]) == 0  # the jobs of a sweep that just began appear later
    assert watch.main([str(tmp_path / "new"), "once=true"]) == 2


FOREIGN = [
    "what?",
    '{"kind": "train", "step": 12}',
    '{"kind": "train", "step": 12, "loss": "much", "tokens_per_s": 1}',
    '{"kind": "eval", "step": 12, "loss": [1]}',
    '{"kind": "event", "step": 12}',
    '{"kind": "eval", "step": 12, "loss": 1' + "0" * 400 + "}",
    "[" * 100_000,
]


def test_damaged_lines_and_files_are_counted_and_cost_nothing_else(tmp_path, capsys):
    write_job(tmp_path, "good", train(10))
    records = write_job(tmp_path, "lines", train(10)) / "metrics.jsonl"
    records.write_text(
        records.read_text() + "\n".join(FOREIGN) + "\n" + json.dumps({"kind": "eval", "step": 20, "loss": 2}) + "\n"
    )
    configs = {
        "python": "!!python/object/apply:os.mkdir [crater]",
        "nested": "[" * 5000,
        "list": "[1]",
        "text": "max_steps: many",
    }
    for name, text in configs.items():
        (write_job(tmp_path, name, train(10)) / "config.yaml").write_text(text)
    (write_job(tmp_path, "none", train(10)) / "config.yaml").unlink()
    (write_job(tmp_path, "folder") / "metrics.jsonl").mkdir()
    never = ("train", 1, {"loss": 1.0, "lr": 1.0, "tokens_per_s": 1e-300})
    write_job(tmp_path, "never", never)
    write_job(tmp_path, "nan", ("train", 1, {"loss": 1.0, "lr": 1.0, "tokens_per_s": float("nan")}))
    assert watch.main([str(tmp_path), "once=true"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"good running 10/100", said) and re.search(r"lines running 20/100 2.5000 2.0000", said)
    assert f"{len(FOREIGN)} lines are no records" in said
    for name in configs:
        assert re.search(rf"{name} running 10 2.5000", said)
    assert said.count("config.yaml") == len(configs) + 1 and "folder waiting" in said
    assert re.search(r"never running 1/100 1.0000", said) and re.search(r"nan running 1/100 1.0000", said)
    assert not (tmp_path / "crater").exists()


@pytest.mark.timeout(60)
def test_it_goes_on_until_interrupted(tmp_path, monkeypatch, capsys):
    directory, looks = write_job(tmp_path, "a", train(10)), []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt
        log = RunLog(directory)
        log.write("train", 10 + len(looks), loss=1.0, tokens_per_s=1.0)
        log.close()

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert watch.main([str(tmp_path), "interval_s=7"]) == 0
    assert looks == [7.0] * 3 and "12/100" in capsys.readouterr().out
