"""From overrides to a configuration, and to the name of the directory of a job.

What imports torch is imported only where something is composed, since help does without it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from training.files import ROOT

if TYPE_CHECKING:
    from training.settings import Settings
    from training.validate import ConfigError

CONFIGS = ROOT / "configs"

_LONGEST_PART, _LONGEST_NAME = 40, 200  # characters; file systems stop at 255 bytes


def compose(overrides: Sequence[str] = ()) -> Settings:
    """The configuration that `python train.py <overrides>` would run.

    Raises:
        ConfigError: a key, a choice or a value is wrong; the message lists all of them.
    """
    from training.checks import read

    return read(compose_plain(overrides))


def compose_plain(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The same as plain dicts, without any check of the values.

    Raises:
        ConfigError: a key or a choice is wrong; the message lists wrong values too.
    """
    from training.overrides import REFUSALS, composed

    try:
        return resolved(composed(overrides))
    except REFUSALS as error:
        raise error_of_words(overrides, error) from None


def error_of_words(words: Sequence[str], error: Exception, sweep: bool = False) -> ConfigError:
    """What to raise for words that Hydra refuses with `error`: it lists all of them, and the wrong values of the others."""
    from training.checks import read
    from training.overrides import problems_of_words
    from training.validate import ConfigError

    problems, rest = problems_of_words(words, sweep)
    if not problems:
        return ConfigError([" ".join(str(error).split())])
    try:
        read(compose_plain(rest))
    except ConfigError as wrong:
        problems += wrong.problems
    return ConfigError(problems)


def resolved(config: Any) -> dict[str, Any]:
    """An OmegaConf configuration as plain Python values, with references resolved; a missing value is the string "???".

    Raises:
        ConfigError: a reference cannot be resolved.
    """
    from omegaconf.errors import OmegaConfBaseException

    from training.validate import ConfigError

    try:
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]  # a dict, as the root is one
    except OmegaConfBaseException as error:
        raise ConfigError([" ".join(str(error).split()) + "; give a value instead"]) from None


# ---- the directory of a job ----


def directory_name(overrides: str, swept: str | None = None) -> str:
    """A job's overrides (`a=1,b=2`) as the name of one directory.

    Characters that a name cannot hold are replaced, and a long name is shortened. Then a hash is appended, so that names stay different.

    Args:
        overrides: of the job.
        swept: the keys that differ between the jobs, with spaces; None: all. The others are the same in every job, and become a hash.

    >>> directory_name("assignment=hetero,seed=1")
    'assignment=hetero,seed=1'
    >>> directory_name("assignment=hetero,optim.muon.lr=0.1", "optim.muon.lr assignment")
    'assignment=hetero,lr=0.1'
    """
    if swept:
        overrides = _shortened(overrides, swept.split())
    parts = [re.sub(r"[^\w.=+:-]+", "_", part)[:_LONGEST_PART] for part in overrides.split(",")]
    name = ",".join(parts)[:_LONGEST_NAME]
    if name == overrides and name not in ("", ".", ".."):
        return name
    return f"{name}-{_digest(overrides)}" if overrides else "defaults"


def _shortened(overrides: str, swept: Sequence[str]) -> str:
    """The overrides of swept keys, each named by the last part of its key if that is unique, and a hash of the others."""
    words = re.split(r",(?=[+~]*[\w./@]+=)", overrides)
    keys = [word.partition("=")[0].lstrip("+~") for word in words]
    last = [key.rpartition(".")[2] for key in swept]
    short = {key: part if last.count(part) == 1 else key for key, part in zip(swept, last)}
    shown = [f"{short[key]}={word.partition('=')[2]}" for key, word in zip(keys, words) if key in short]
    rest = [word for key, word in zip(keys, words) if key not in short]
    return ",".join([*shown, *([_digest(",".join(rest))] if rest and overrides else [])])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# configs/config.yaml uses this name. It is registered on import, so that it exists on a cluster's nodes too.
OmegaConf.register_new_resolver("directory_name", directory_name, replace=True)
