"""Checkpoints whose tensors every rank writes itself, by torch.distributed.checkpoint; all other values are in `state.pt`, as usual.

The tensors are in the folder `tensors`, one file for each rank, and a table of what is where. A tensor is named by its path in the state,
as JSON: '["optimizers", "AdamW", "state", 0, "exp_avg"]'. Any number of ranks, one without a process group included, reads the whole state.
The table is a pickle; it is read by an unpickler that knows only the few types of such a table, so that it executes no code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint import Metadata

    from training.ranks import Ranks

TENSORS = "tensors"
_TABLE = ".metadata"
_TABLE_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_TABLE_NAMES = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")}


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state without the tensors of the model and the optimizers, and those tensors by their path as JSON."""
    rest, tensors = dict(state), {}
    for key in ("model", "optimizers"):
        rest[key], found = _without_tensors(state[key], (key,))
        tensors.update(found)
    return rest, tensors


def _without_tensors(value: Any, path: tuple[Any, ...]) -> tuple[Any, dict[str, Tensor]]:
    if not isinstance(value, Mapping):
        return value, {}
    kept, tensors = {}, {}
    for key, item in value.items():
        if isinstance(item, Tensor):
            tensors[json.dumps([*path, key])] = item
        else:
            kept[key], found = _without_tensors(item, (*path, key))
            tensors.update(found)
    return kept, tensors


def join(rest: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Put the tensors into the state, in place."""
    for name, tensor in tensors.items():
        *path, last = json.loads(name)
        place = rest
        for key in path:
            place = place.setdefault(key, {})
        place[last] = tensor
    return rest


def write_shards(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, list[Any]]:
    """Write the tensors that this rank holds, whole ones and its parts of DTensors; all ranks must call.

    Returns:
        Of every file of all ranks, its size in bytes and its sha256.

    Raises:
        OSError: on every rank, if a rank could not write.
    """
    from torch.distributed.checkpoint import FileSystemWriter, save
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        save(dict(tensors), storage_writer=FileSystemWriter(folder), process_group=ranks.control)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        known = next((cause for cause in causes if isinstance(cause, OSError)), None)
        number = known.errno if known and known.errno else errno.EIO
        raise OSError(number, known.strerror if known else " ".join(str(causes[0]).split()), str(folder)) from error
    mine = [*folder.glob(f"__{ranks.rank}_*"), *([folder / _TABLE] if ranks.is_main else [])]
    parts = ranks.gather_objects({f"{TENSORS}/{path.name}": [path.stat().st_size, sha256(path)] for path in mine})
    return {name: facts for part in parts for name, facts in sorted(part.items())}


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def read_shards(folder: Path) -> dict[str, Tensor]:
    """All tensors, whole and on the CPU, by their path as JSON. No other rank is needed."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with (folder / _TABLE).open("rb") as file:
                table: Metadata = _TableUnpickler(file).load()
            return table

    table = Reader(folder).read_metadata()
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in table.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # unavailable: as it should be
        load(tensors, storage_reader=Reader(folder), no_dist=True)
    return tensors


class _TableUnpickler(pickle.Unpickler):
    """Loads a table of torch.distributed.checkpoint: its own classes, shapes, dtypes and a path; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _TABLE_MODULES or module == "torch" or (module, name) in _TABLE_NAMES:
            found = super().find_class(module, name) if "." not in name else None
            own = isinstance(found, type) and found.__module__ == module in _TABLE_MODULES
            if own or isinstance(found, torch.dtype) or (module, name) in _TABLE_NAMES:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a table of tensors")
