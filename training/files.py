"""The files of a run's directory: written whole or not at all, read without trusting them, and what to say where that fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import yaml

CONFIG_FILE = "config.yaml"

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)


def remedy(error: OSError) -> str:
    """What a person can do about a file that could not be written, without risk to what they own."""
    if error.errno in FULL_DISK:
        return "free space there or choose another output_dir"
    if error.errno in _IN_THE_WAY:
        path = Path(error.filename or "something else")
        blocker = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), path)
        return f"{blocker} is in the way: move it elsewhere or choose another output_dir"
    return "make that place writable or choose another output_dir"


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is either whole or as it was before; OSError if that fails."""
    temp = path.with_name(f".{path.name}.tmp")
    try:
        with temp.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except OSError as error:
        temp.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # a full disk is met by a descriptor, which has no name
        raise


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration that a run wrote into its directory. Nothing in the file is executed.

    Raises:
        FileNotFoundError: there is none. OSError: it cannot be read. ValueError: it is no configuration; the message names the file.
    """
    path = directory / CONFIG_FILE
    raw = path.read_bytes()
    try:
        config = yaml.safe_load(raw)
    except Exception as error:  # what PyYAML meets in its tags, it does not all turn into a YAMLError
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not YAML of plain values ({cause})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no configuration")
    return config
