"""`python -m data.prepare`: what it prepares, what it refuses, the configurations that it takes, and the command that messages recommend."""

import shlex
from dataclasses import replace

import pytest

from data import sources
from data.command import CONFIGS, prepare_command
from data.prepare import main, prepare
from data.shards import DataError, open_dataset
from training.config import compose

BOOKS = [f"Book {i}." for i in range(40)]


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONFIGS / "data").glob("[!_]*.yaml"))])
def test_every_configuration_composes_completely(tmp_path, name):
    """Beside nothing but the `data` group: a file refers to no setting of other groups."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    (tmp_path / "data").symlink_to(CONFIGS / "data")
    (tmp_path / "config.yaml").write_text("defaults:\n  - data: stdlib\n  - _self_\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = OmegaConf.to_container(compose("config", overrides=[f"data={name}"]).data, resolve=True)
    assert cfg["name"] == name
    assert cfg["source"] in sources.SOURCES
    if name in ("bin", "mix"):
        assert "???" in cfg.values()
    else:
        assert cfg["dir"] == f"data/prepared/{name}"
        assert cfg["auto_prepare"] is (name == "stdlib")
    assert (CONFIGS / "data" / f"{name}.yaml").read_text().startswith("# ")


def test_the_command_prepares_and_summarises(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(BOOKS))
    overrides = ["data=text", f"data.files={tmp_path}/a.txt", "data.tokenizer=bytes", "data.val_fraction=0.1"]
    assert main([*overrides, f"data.dir={tmp_path}/out"]) == 0
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
def test_the_command_refuses_in_one_message(tmp_path, capsys, overrides, code, message):
    cheap = [] if any("tokenizer" in override for override in overrides) else ["data.tokenizer=bytes"]
    assert main([*overrides, *cheap, f"data.dir={tmp_path}/prepared/x"]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "prepared" / "x").exists()


def test_a_mixture_is_checked_part_by_part(capsys):
    assert main(["data=mix", "data.parts={}"]) == 2 and "data.parts names no folder" in capsys.readouterr().err
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


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=openwebtext"],
        ["data=books", "data.tokenizer=bytes"],
        ["data=books", "data.name=more_books", "data.val_files=b.txt"],
        ["data=text", "data.name=mine", "data.files=corpus/**/*.txt", "data.val_files=[b.txt]"],
        [
            "data=text",
            "data.name='1e3'",
            "data.files=['a b.txt','c,d*.txt']",
            "data.separator=''",
            "data.column='null'",
        ],
        ["data=text", "data.name=stdlib", "data.files=x.txt"],
        ["data=text", "data.name='a|b $x'", "data.files=x.txt", "data.separator=null", "data.dir=/nowhere"],
        ["data=fineweb", "data.max_tokens=1000", "data.val_fraction=0.00001"],
        ["data=hub", "data.name=wiki", "data.repository=wikimedia/wikipedia", "data.revisions=[abc,null]"],
        ["data=stdlib", "data.dir=somewhere/else", "data.auto_prepare=false"],
    ],
    ids=lambda overrides: overrides[1] if len(overrides) > 1 else overrides[0],
)
def test_a_recommended_command_prepares_what_was_asked_for(overrides):
    """Pasted into a shell, the command composes the very settings."""
    asked = compose(overrides).data
    words = shlex.split(prepare_command(asked))
    assert words[:3] == ["python", "-m", "data.prepare"]
    assert replace(compose(words[3:]).data, auto_prepare=asked.auto_prepare) == asked


@pytest.mark.parametrize(
    ("source", "asked"), [("text", "'data.files=your/folder/*.txt'"), ("hub", "data.repository=owner/name")]
)
def test_what_training_does_not_need_is_asked_for_when_the_data_is_missing(tmp_path, source, asked):
    """As the first lines of configs/data/text.yaml and hub.yaml show: the second command names no files."""
    cfg = compose([f"data={source}", "data.name=mine"]).data
    with pytest.raises(DataError, match="no prepared data in data/prepared/mine") as caught:
        cfg.open()
    assert str(caught.value).endswith(f": python -m data.prepare data={source} data.name=mine {asked}")
    with pytest.raises(DataError, match=r"data\.\w+ names no (file|dataset); set it"):
        prepare(replace(cfg, dir=str(tmp_path / "out")), progress=False)
