"""`python -m data.prepare`: what it prepares, what it refuses, and the configurations that it takes."""

from pathlib import Path

import pytest

from data import sources
from data.command import CONFIGS
from data.prepare import main
from data.shards import open_dataset

BOOKS = [f"Book {i}." for i in range(40)]


@pytest.fixture
def configs(tmp_path) -> Path:
    """A configuration of nothing but the real `data` group."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "data").symlink_to(CONFIGS / "data")
    (folder / "config.yaml").write_text("defaults:\n  - data: stdlib\n  - _self_\n")
    return folder


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONFIGS / "data").glob("[!_]*.yaml"))])
def test_every_configuration_composes_completely(configs, name):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(configs), version_base="1.3"):
        cfg = OmegaConf.to_container(compose("config", overrides=[f"data={name}"]).data, resolve=True)
    assert cfg["name"] == name
    assert cfg["source"] in sources.SOURCES
    if name in ("bin", "mix"):
        assert "???" in cfg.values()
    else:
        assert cfg["dir"] == f"data/prepared/{name}"
        assert cfg["auto_prepare"] is (name == "stdlib")
    assert (CONFIGS / "data" / f"{name}.yaml").read_text().startswith("# ")


def test_the_command_prepares_and_summarises(tmp_path, configs, capsys):
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(BOOKS))
    overrides = ["data=text", f"data.files={tmp_path}/a.txt", "data.tokenizer=bytes", "data.val_fraction=0.1"]
    assert main([*overrides, f"data.dir={tmp_path}/out"], configs) == 0
    printed = capsys.readouterr().out
    assert "36 documents" in printed
    assert open_dataset(tmp_path / "out").manifest.name == "text"


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["data=text"], 2, "data.files names no file"),
        (["data=text", "data.files=none/*.txt"], 2, "no file matches 'none/*.txt'; correct data.files"),
        (["data=text", "data.files=/"], 2, "data.files=/ is a folder; name the files in it: 'data.files=/**/*.txt'"),
        (["data=text", "data.tokenizer=char"], 2, "data.tokenizer is 'char'; choose bytes or gpt2"),
        (
            ["data=text", "data.source=web"],
            2,
            "data.source is 'web'; choose one of stdlib, text, openwebtext, hub, bin, mix",
        ),
        (["data=text", "data.shard_tokens=0"], 2, "data.shard_tokens is 0; give a whole number of at least 1"),
        (["data=stdlib", "data.max_tokens=-5"], 2, "data.max_tokens is -5"),
        (["data=nowhere"], 2, "openwebtext"),
        (["data.kolumn=x"], 2, "kolumn"),
        (["data=text,books"], 2, "data=text,books gives several values; give one of them"),
        (["-m"], 2, "-m is no option here; leave it out"),
    ],
)
def test_the_command_refuses_in_one_message(tmp_path, configs, capsys, overrides, code, message):
    cheap = [] if any("tokenizer" in override for override in overrides) else ["data.tokenizer=bytes"]
    assert main([*overrides, *cheap, f"data.dir={tmp_path}/prepared/x"], configs) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "prepared" / "x").exists()


def test_a_mixture_is_checked_part_by_part(capsys):
    assert main(["data=mix", "data.parts={a b: 1, c: 2}"]) == 2
    said = "check them with: python -m data.verify 'data/prepared/a b' && python -m data.verify data/prepared/c"
    assert said in capsys.readouterr().out


def test_a_preparation_takes_only_words_about_data(tmp_path, capsys):
    assert main(["data=stdlib", f"data.dir={tmp_path}/x", "max_steps=3"]) == 2
    said = capsys.readouterr().err
    assert "max_steps=3 has no effect on a preparation; leave it out" in said and not (tmp_path / "x").exists()


def test_data_of_a_file_elsewhere_is_prepared(tmp_path, capsys):
    """hydra.searchpath names folders in which Hydra looks for the files of its groups too."""
    (tmp_path / "my" / "data").mkdir(parents=True)
    (tmp_path / "my" / "data" / "letters.yaml").write_text("defaults: [stdlib, _self_]\nname: letters\n")
    words = [f"hydra.searchpath=[{tmp_path}/my]", "data=letters", f"data.dir={tmp_path}/x", "data.max_tokens=100000"]
    assert main(words) == 0, capsys.readouterr().err
    assert open_dataset(tmp_path / "x").manifest.name == "letters"
