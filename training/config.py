"""Composing a configuration outside of Hydra's own main: for scripts and tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def compose(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration that `python train.py <overrides>` would run, as a plain dict.

    Raises:
        hydra.errors.HydraException: an override that Hydra refuses (an unknown key or group).
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return plain(hydra_compose("config", list(overrides)))


def plain(config: Any) -> dict[str, Any]:
    """An OmegaConf configuration as plain Python, references resolved; a missing value stays the string "???".

    Raises:
        ConfigError: a reference leads nowhere.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from training.settings import with_whole_numbers
    from training.validate import ConfigError

    try:
        return with_whole_numbers(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        raise ConfigError([" ".join(str(error).split()) + "; give a value instead"]) from None
