"""What `scripts/reproduce.py --accept` takes over, and when it takes over nothing. tests/test_reproduce.py has the rest of the command."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

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


def test_only_a_plain_table_is_accepted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["scale=demo", "seeds=2", "--accept"]) == 2
    assert "leave out seeds=2" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_only_the_place_of_the_scale_is_renewed_in_a_readme_whole_or_not_at_all(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- table:demo -->\nold\n<!-- /table -->\nb\n<!-- table:paper -->\nkept\n<!-- /table -->\n")
    assert reproduce.renew(page, "demo", "| new |\n")
    expected = "a\n<!-- table:demo -->\n| new |\n<!-- /table -->\nb\n<!-- table:paper -->\nkept\n<!-- /table -->\n"
    assert page.read_text() == expected
    assert not reproduce.renew(page, "one_gpu", "| new |\n") and page.read_text() == expected
    assert reproduce.renew(ROOT / "nowhere.md", "demo", "") is False

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.files.sync", full)
    with pytest.raises(OSError, match="No space left"):
        reproduce.renew(page, "demo", "| newer |\n")
    assert page.read_text() == expected
