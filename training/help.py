"""The text of `python train.py --help`: the groups, their choices, and the settings with their comments, from the files of configs/."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import yaml

from training.config import CONFIGS
from training.overrides import group_choices

_WIDTH = 120


def help_text(about: str, words: Sequence[str] = ()) -> str:
    """The help for a command line.

    Args:
        about: the first paragraphs.
        words: the command line; the files of the groups that it names are shown instead of the overview.
    """
    named = {name: None for word in words if (name := word.partition("=")[0]) in _groups()}
    shown = [_group(name) for name in named] if named else [_overview()]
    return "\n\n".join([about.strip(), *shown])


def _overview() -> str:
    groups = "\n".join(_choices(group, default) for group, default in _groups().items())
    _, _, settings = (CONFIGS / "config.yaml").read_text().partition("\n\n")
    return f"""Groups, as in assignment=hetero; * is the default. The settings of a group and their comments: python train.py --help optim

{groups}

Settings, as in max_steps=500 or log.interval=1. ??? is given by the experiment. The whole configuration of a command: --cfg job

{textwrap.indent(settings.partition("hydra:")[0].rstrip(), "  ")}

Options: -m (a sweep: seed=1,2 are two jobs), --cfg job, --help, --hydra-help (those of Hydra)"""


def _groups() -> dict[str, str]:
    """The groups and their default choices, in the order of config.yaml."""
    defaults = yaml.safe_load((CONFIGS / "config.yaml").read_text())["defaults"]
    entries = [entry for entry in defaults if isinstance(entry, dict)]
    return {name: choice for entry in entries for name, choice in entry.items() if " " not in name}


def _choices(group: str, default: str) -> str:
    names = ", ".join(f"{name}*" if name == default else name for name in group_choices(group))
    return textwrap.fill(names, _WIDTH, initial_indent=f"  {group:<12}", subsequent_indent=" " * 14)


def _group(name: str) -> str:
    """The files of a group, with those that others share first."""
    files = sorted((CONFIGS / name).glob("*.yaml"), key=lambda file: (not file.stem.startswith("_"), file.stem))
    shown = {file: f"{name}/{file.name}" if file.stem.startswith("_") else f"{name}={file.stem}" for file in files}
    return "\n".join(f"{title}\n{textwrap.indent(file.read_text(), '  ')}" for file, title in shown.items())
