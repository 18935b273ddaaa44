"""Files in the directory of a run: atomic writes, safe reads, and remedies for errors."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO, Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
"""The folder of train.py."""

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
PARAMETERS_FILE = "parameters.txt"

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)


def remedy(error: OSError) -> str:
    """What the user can do so that the file can be written. The advice never endangers other files."""
    if error.errno in FULL_DISK:
        return "free space there"
    if error.errno in _IN_THE_WAY:
        path = Path(error.filename or "something else")
        blocker = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), path)
        return f"{blocker} is in the way: move it elsewhere"
    return "make that place writable"


def run_around(path: Path) -> Path | None:
    """The run whose folder of checkpoints a path is, or is a checkpoint of; None if it is neither."""
    folders = (part for part in (path, path.parent) if part.name == "checkpoints")
    return next((part.parent for part in folders if (part.parent / CONFIG_FILE).exists()), None)


def sync(file: IO[Any]) -> None:
    """Write what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: after an error, the old file is unchanged. OSError if it fails."""
    temp = path.with_name(f".{path.name}.tmp")
    try:
        with temp.open("w", encoding="utf-8") as file:
            file.write(text)
            sync(file)
        os.replace(temp, path)
    except OSError as error:
        temp.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # the error of a full disk has no file name
        raise


def read_config(directory: Path) -> dict[str, Any]:
    """Read the configuration that a run wrote into its directory. No code in the file is executed.

    Raises:
        FileNotFoundError: there is none. OSError: it cannot be read. ValueError: it is not a configuration; the message names the file.
    """
    path = directory / CONFIG_FILE
    raw = path.read_bytes()
    try:
        config = yaml.safe_load(raw)
    except Exception as error:  # for some tags PyYAML raises other errors than YAMLError
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not YAML of plain values ({cause})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a configuration")
    return config
