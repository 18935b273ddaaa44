"""What configs/data says about a dataset: the command that prepares it, for messages, and which settings a command line or an experiment gave."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.settings import Source

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

_EXAMPLES = {"files": "your/folder/*.txt", "repository": "owner/name"}
"""What the command shows for settings that a preparation needs and training does not."""


def prepare_command(cfg: Source) -> str:
    """The `python -m data.prepare` that leads to these settings.

    It names the file of configs/data that has the name of the dataset, or else of its source, and every setting that differs from that file.
    """
    group, defaults = _file_of(cfg)
    changed = {} if cfg.name == group else {"name": cfg.name}
    wanted = {"dir": cfg.dir, **cfg.content}
    changed |= {key: value for key, value in wanted.items() if key != "name" and defaults.get(key, ...) != value}
    changed |= {key: example for key, example in _EXAMPLES.items() if key in wanted and not wanted[key]}
    words = [f"data={group}", *(f"data.{key}={_word(value)}" for key, value in changed.items())]
    return shlex.join(["python", "-m", "data.prepare", *words])


def given_settings(cfg: Source) -> dict[str, Any]:
    """The settings that decide the tokens and have a value that no file of configs/data with this source has.

    A command line or an experiment gave them.
    """
    files = [_defaults(file, cfg.name) for file in sorted((CONFIGS / "data").glob("[!_]*.yaml"))]
    files = [settings for settings in files if settings.get("source") == cfg.source]
    return {key: value for key, value in cfg.content.items() if all(file.get(key, value) != value for file in files)}


def _file_of(cfg: Source) -> tuple[str, dict[str, Any]]:
    """The name of the file of configs/data from which the settings come, and the settings in it."""
    for group in (cfg.name, cfg.source):
        file = CONFIGS / "data" / f"{Path(group).name}.yaml"
        if file.exists() and (defaults := _defaults(file, cfg.name)).get("source", cfg.source) == cfg.source:
            return group, defaults
    return cfg.source, {}


def _defaults(file: Path, name: str) -> dict[str, Any]:
    """The settings of a file of configs/data and of its `defaults`, under the given name.

    Empty if they cannot be resolved without the rest of configs/.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged: Any = OmegaConf.to_container(OmegaConf.merge(_loaded(file), {"name": name}), resolve=True)
        return merged
    except (OSError, OmegaConfBaseException):
        return {}


def _loaded(file: Path) -> Any:
    from omegaconf import OmegaConf

    content: Any = OmegaConf.load(file)
    bases = [base for base in content.pop("defaults", []) if base != "_self_"]
    return OmegaConf.merge(*(_loaded(file.with_name(f"{base}.yaml")) for base in bases), content)


def _word(value: Any) -> str:
    """A value as the command line of Hydra expects it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_word(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_word, value)) + "]"
    if not isinstance(value, str) or (
        re.fullmatch(r"[A-Za-z_/.][\w/.*-]*", value, re.ASCII) and not _is_keyword(value)
    ):
        return str(value)
    return '"' + value.replace('"', r"\"") + '"'


def _is_keyword(text: str) -> bool:
    return text.lower() in ("null", "true", "false", "nan", "inf")
