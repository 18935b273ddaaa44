"""Compose a configuration without the command line: for scripts and tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.settings import Settings

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def compose(overrides: Sequence[str] = ()) -> Settings:
    """The configuration that `python train.py <overrides>` would run.

    Raises:
        hydra.errors.HydraException: an override that Hydra refuses (an unknown key or group). ConfigError: a value is wrong.
    """
    from training.checks import read

    return read(compose_plain(overrides))


def compose_plain(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The same as plain dicts, without any check of the values."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return resolved(hydra_compose("config", list(overrides)))


def resolved(config: Any) -> dict[str, Any]:
    """An OmegaConf configuration as plain Python values, with references resolved; a missing value is the string "???".

    Raises:
        ConfigError: a reference cannot be resolved.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from training.validate import ConfigError

    try:
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]  # a dict, as the root is one
    except OmegaConfBaseException as error:
        raise ConfigError([" ".join(str(error).split()) + "; give a value instead"]) from None
