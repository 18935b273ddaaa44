"""The command line that prepares a dataset, for the messages that recommend it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def prepare_command(settings: Mapping[str, Any], configs: Path = CONFIGS) -> str:
    """The `python -m data.prepare` that leads to these settings, the plain `data` group of a configuration.

    Names the file in configs/data that the dataset is called after, or else its source, and what differs from that.
    """
    groups = [group for group in (settings.get("name"), settings.get("source")) if isinstance(group, str)]
    group = next(
        (g for g in groups if (configs / "data" / f"{Path(g).name}.yaml").exists()), groups[-1] if groups else ""
    )
    usual = _defaults(configs / "data" / f"{Path(group).name}.yaml", settings.get("name"))
    changed = {} if settings.get("name") == group else {"name": settings.get("name")}
    changed |= {
        key: value
        for key, value in settings.items()
        if key not in ("name", "auto_prepare") and usual.get(key, ...) != value
    }
    words = [f"data={group}", *(f"data.{key}={_word(value)}" for key, value in changed.items())]
    if settings.get("source") == "text" and not settings.get("files"):
        words = [w for w in words if not w.startswith("data.files=")] + ["data.files=your/folder/*.txt"]
    return shlex.join(["python", "-m", "data.prepare", *words])


def _defaults(file: Path, name: Any) -> dict[str, Any]:
    """What a file of configs/data says, with the files it begins from, under the given name; empty if it cannot be resolved alone."""
    try:
        content = OmegaConf.load(file)
        bases = [base for base in content.pop("defaults", []) if base != "_self_"]
        merged = OmegaConf.merge(*(OmegaConf.load(file.with_name(f"{base}.yaml")) for base in bases), content)
        merged["name"] = name
        return OmegaConf.to_container(merged, resolve=True)
    except (OSError, OmegaConfBaseException):
        return {}


def _word(value: Any) -> str:
    """A value as Hydra reads it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_word(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_word, value)) + "]"
    if not isinstance(value, str) or (re.fullmatch(r"[A-Za-z_/.][\w/.*-]*", value) and not _is_keyword(value)):
        return str(value)
    return '"' + value.replace('"', r"\"") + '"'


def _is_keyword(text: str) -> bool:
    return text.lower() in ("null", "true", "false", "nan", "inf")
