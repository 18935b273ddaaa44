"""What `scripts/reproduce.py --accept` takes over, and when it takes over nothing. tests/test_reproduce.py has the rest of the command."""

from dataclasses import replace
from pathlib import Path

from scripts import reproduce


def test_accepting_takes_over_the_pictures_of_the_table_and_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    mine, committed = tmp_path / "mine", tmp_path / "results/demo"
    for folder, names in ((mine, ["val_loss.png", "scales.png", "spectra.png"]), (committed, ["layers.png"])):
        folder.mkdir(parents=True)
        for name in ("table.md", "table.json", *names):
            (folder / name).write_text(f"{name} of {folder.name}")
    plan = reproduce.Plan("demo", [], "demo", mine, {}, True)
    wanted = {"table.md", "table.json", "val_loss.png", "scales.png"}  # spectra.png is of an earlier command
    for results in (mine, Path("results/demo")):  # which is the committed folder itself
        reproduce.accept(replace(plan, results=results), committed, ["val_loss.png", "scales.png"])
        assert {path.name for path in committed.iterdir()} == wanted
        assert all(path.read_text() == f"{path.name} of mine" for path in committed.iterdir())


def test_a_failed_run_is_said_to_prevent_accepting(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    plan = reproduce.Plan("demo", [], "demo", tmp_path / "mine", {}, True)
    monkeypatch.setattr(reproduce, "make_plan", lambda _: plan)
    monkeypatch.setattr(reproduce, "train_all", lambda _: {"hetero": "out of memory"})
    monkeypatch.setattr(reproduce, "write_reproduction", lambda _: ("the table", []))
    assert reproduce.main(["--accept"]) == 1 and list(tmp_path.iterdir()) == []
    assert "not accepted: a run failed" in capsys.readouterr().out
