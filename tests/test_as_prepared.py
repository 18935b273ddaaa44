"""The data of a run that begins: they are there, and as the settings that were given say."""

from pathlib import Path

import pytest

from data.prepare import main as prepare_data
from data.shards import DataError
from scripts import gpu_runs
from scripts.reproduce import make_plan
from training.command import wrong_jobs
from training.config import compose
from training.data import require_as_prepared
from training.jobs import Job, run_all
from training.overrides import jobs_of


def test_settings_that_training_gives_must_be_those_of_the_preparation(tmp_path):
    """Else they would be recorded, and have no effect. What a file of configs/data says, such as files, is not given."""
    (tmp_path / "a.txt").write_text("some text\n\n" * 99)
    given = ["data.tokenizer=bytes", "data.separator=''", "data.val_fraction=0.1", f"data.dir={tmp_path}/prepared"]
    assert prepare_data(["data=text", f"data.files={tmp_path}/a.txt", *given]) == 0

    def begin(*words):
        cfg = compose([*words, *given[:2], given[-1]])
        require_as_prepared(cfg, cfg.data.open())

    begin("data=text")
    begin("data=text", "data.val_fraction=0.1")
    begin("data=books", "data.name=corpus")  # as in configs/experiment/horizon.yaml
    begin("data=books", "data.name=corpus", "data.val_files=null")
    with pytest.raises(
        DataError, match=r"max_tokens: None there, 5 asked, files: .* there, 'x.txt' asked.*; leave out"
    ):
        begin("data=text", "data.max_tokens=5", "data.files=x.txt")
    with pytest.raises(DataError, match=r"\(files: .* there, 'x.txt' asked\); leave out data.files to use it"):
        begin("data=books", "data.name=corpus", "data.files=x.txt")
    with pytest.raises(
        DataError, match=r"\(val_fraction: 0.1 there, 0.9 asked\); leave out data.val_fraction to use it"
    ):
        begin("data=text", "data.name=stdlib", "data.val_fraction=0.9")


@pytest.mark.parametrize("auto", ["true", "false"])
def test_runs_on_data_prepared_otherwise_are_refused_together(tmp_path, monkeypatch, auto):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("some text\n\n" * 99)
    data = ["data=text", "data.tokenizer=bytes", "data.separator=''", "data.name=mine"]
    assert prepare_data([*data, "data.files=a.txt"]) == 0
    other = [*data, "data.files=b.txt", f"data.auto_prepare={auto}"]
    [problem] = wrong_jobs(words := [*other, "seed=1,2"], jobs_of(words)).problems
    assert "was prepared with other settings" in problem
    from_checkpoint = [*data, "data.files=b.txt", "resume=outputs/x/checkpoints/step_00000004", "seed=1,2"]
    assert wrong_jobs(from_checkpoint, jobs_of(from_checkpoint)) is None
    for begin in (
        lambda: run_all([Job(tuple(other), tmp_path / "job")], workers=1),
        lambda: make_plan(other),
        lambda: gpu_runs.work([*other, "folder=runs", "results=table", "prepare=true", "tiny=true"]),
    ):
        with pytest.raises(DataError, match="was prepared with other settings"):
            begin()
    assert not any(Path(name).exists() for name in ("outputs", "job", "runs", "table"))
