"""Checkpoints that are either complete or absent.

A checkpoint is a directory ``step_00000100/`` with two files: ``state.pt``, written by torch.save, and ``manifest.json``, with the step,
the metric, and the size and sha256 of the state. It is written under a hidden name, synced to the disk and renamed, so a directory with
a final name is always complete, even if the process is killed. Every byte is verified before it is used.

The state is one file: the caller gathers it on rank 0 (a few GB at GPT-2 sizes). A sharded model is not gathered: its tensors are in the
folder ``tensors``, written by all ranks (training/sharded_tensors.py), and the manifest has the size and sha256 of every file. Both kinds
load on any number of ranks. They are read with ``weights_only=True``, which never executes code. The checksums detect damage;
``weights_only`` protects against forged files. Only one run at a time may write into a directory; any number may read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

import torch

from training.files import remedy, sync
from training.sharded_tensors import TENSORS, join, read_shards, sha256, split, write_shards

if TYPE_CHECKING:
    from training.ranks import Ranks

STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"

# A checkpoint that is being replaced has a hidden name, under which it can be read; a ".tmp" is never read.
_CHECKPOINT_NAME = re.compile(r"(step_(?P<step>\d{8,})|\.step_(?P<hidden>\d{8,})\.replaced)")
_OURS = "use a checkpoint that this program saved"
_OLDER = "use an older checkpoint (resume=auto finds the newest good one)"
_PLAIN_TYPES = (
    dict,
    OrderedDict,
    list,
    tuple,
    str,
    bytes,
    bool,
    int,
    float,
    type(None),
    torch.Tensor,
    torch.nn.Parameter,
)


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint with its state on the CPU; ``skipped`` are the newer, damaged ones as ``(path, reason)``."""

    state: dict[str, Any]
    path: Path
    step: int
    metric: float | None = None
    skipped: list[tuple[Path, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Manifest:
    """The content of ``manifest.json``: step, metric (None if there is none), size in bytes and sha256 of ``state.pt``.

    files: of a sharded state, size and sha256 of every other file by its path in the checkpoint; None if the state is one file.
    """

    step: int
    metric: float | None
    size: int
    sha256: str
    files: dict[str, list[Any]] | None = None

    @property
    def typed(self) -> bool:
        """Whether every field has its type, since it was read from a file."""
        numbers = type(self.step) is type(self.size) is int and type(self.metric) in (float, type(None))
        files = self.files is None or (
            isinstance(self.files, dict) and all(isinstance(f, list) and len(f) == 2 for f in self.files.values())
        )
        return numbers and isinstance(self.sha256, str) and files

    @property
    def every_file(self) -> dict[str, list[Any]]:
        """Size and sha256 of every file but the manifest, by its path in the checkpoint."""
        return {STATE_FILE: [self.size, self.sha256], **(self.files or {})}

    def render(self) -> bytes:
        """The exact bytes of this manifest on disk: canonical JSON with a checksum."""
        fields = {name: value for name, value in asdict(self).items() if name != "files" or value is not None}
        checksum = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        return json.dumps({**fields, "checksum": checksum}, indent=2, sort_keys=True).encode() + b"\n"

    @classmethod
    def read(cls, path: Path) -> _Manifest:
        """Read and verify ``path``; OSError if it cannot be read, CheckpointError if any byte has changed."""
        raw = path.read_bytes()
        try:
            fields = json.loads(raw)
            del fields["checksum"]
            manifest = cls(**fields)
        except (ValueError, TypeError, KeyError, RecursionError):
            manifest = None
        if manifest is None or not manifest.typed or manifest.render() != raw:
            raise CheckpointError(f"{path} is damaged; {_OLDER}")
        return manifest


# ---- writing ----


def save(
    directory: str | Path, step: int, state: dict[str, Any], *, keep: int = 2, metric: float | None = None
) -> Path:
    """Write ``state`` to ``directory/step_<step>/`` and return that path.

    ``state`` is a nested dict of tensors (any device), numbers, strings, lists and tuples. ``metric`` belongs to this state; lower is
    better, and a non-finite one counts as None. After the save, only the newest ``keep`` checkpoints and the one with the best metric
    (the newest of equal ones) are kept. Checkpoints of a later step are removed too: the run was resumed before them.

    Raises:
        CheckpointError: the state contains a value that cannot be loaded without executing code, or it cannot be written (a full disk).
            The existing checkpoints are then unchanged.
    """
    directory = Path(directory)
    with _saving(directory, step) as temp:
        _prepare(temp, state, keep)
        return _complete(temp, step, state, keep, metric)


def save_sharded(
    directory: str | Path,
    step: int,
    state: dict[str, Any],
    ranks: Ranks,
    *,
    keep: int = 2,
    metric: float | None = None,
) -> None:
    """As `save`, with a state of which every rank has a part: the tensors under "model" and "optimizers" may be DTensors, or may be on one
    rank only. The rest is that of rank 0. All ranks must call, and have access to the directory.
    """
    directory = Path(directory)
    rest, tensors = split(state)
    with _saving(directory, step, removes=ranks.is_main) as temp:
        ranks.from_main(_prepare, temp, rest, keep)
        files = write_shards(temp / TENSORS, tensors, ranks)
        ranks.from_main(lambda: str(_complete(temp, step, rest, keep, metric, files)))


@contextlib.contextmanager
def _saving(directory: Path, step: int, removes: bool = True) -> Iterator[Path]:
    """A context with the hidden directory of a checkpoint that is written; an OSError becomes CheckpointError, and removes it."""
    temp = directory / f".step_{step:08d}.tmp"
    try:
        yield temp
    except OSError as error:
        if removes:
            _remove(temp)
        saved = next(_checkpoints(directory), None)
        elsewhere = f"; or go on in another directory: resume={saved} output_dir=<another>" if saved else ""
        raise CheckpointError(
            f"cannot save the checkpoint of step {step} in {directory}: {error.strerror or error}; {remedy(error)}, then give the same "
            f"command with resume=auto{elsewhere}; earlier checkpoints are unchanged"
        ) from error


def _prepare(temp: Path, state: dict[str, Any], keep: int) -> None:
    if keep < 1:
        raise CheckpointError(f"keep={keep} would keep no checkpoint; set it to 1 or more")
    refuse_foreign(state, "state")
    temp.parent.mkdir(parents=True, exist_ok=True)
    _clear_interrupted(temp.parent)
    temp.mkdir()


def _complete(
    temp: Path,
    step: int,
    state: dict[str, Any],
    keep: int,
    metric: float | None,
    files: dict[str, list[Any]] | None = None,
) -> Path:
    """Write the state and the manifest, give the checkpoint its name, and remove old ones; returns its path."""
    final = temp.with_name(f"step_{step:08d}")
    if files is not None:
        _sync_directory(temp / TENSORS)
    _write_files(temp, step, state, metric, files)
    _publish(temp, final)
    _retire(final.parent, step, keep)
    return final


def refuse_foreign(value: Any, where: str) -> None:
    """Raise for a value that ``torch.load(weights_only=True)`` would refuse later."""
    # Exact types: numpy.float64 is a subclass of float, but it is pickled as a NumPy object.
    if type(value) not in _PLAIN_TYPES:
        raise CheckpointError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which could not be loaded again "
            "without executing code; turn it into tensors, numbers, strings, lists or dicts"
        )
    if isinstance(value, dict):
        for key, item in value.items():
            refuse_foreign(key, f"the key {key!r} of {where}")
            refuse_foreign(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            refuse_foreign(item, f"{where}[{index}]")


class _DigestFile:
    """A file for torch.save that hashes its content. It stores an OSError in ``error`` instead of raising it.

    After a failed write, torch's zip writer would raise an unrelated RuntimeError. So the caller checks ``error`` at the end.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        length = memoryview(data).nbytes
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
            self.digest.update(data)
            self.size += length
        return length

    def flush(self) -> None:
        """Do nothing: _write_files flushes and syncs at the end."""


def _write_files(
    temp: Path, step: int, state: dict[str, Any], metric: float | None, files: dict[str, list[Any]] | None
) -> None:
    with (temp / STATE_FILE).open("wb") as file:
        sink = _DigestFile(file)
        torch.save(state, cast(IO[bytes], sink))  # torch uses only these methods
        if sink.error is not None:
            raise sink.error
        sync(file)
    comparable = float(metric) if metric is not None and math.isfinite(metric) else None
    manifest = _Manifest(int(step), comparable, sink.size, sink.digest.hexdigest(), files)
    with (temp / MANIFEST_FILE).open("wb") as file:
        file.write(manifest.render())
        sync(file)
    _sync_directory(temp)


def _publish(temp: Path, final: Path) -> None:
    """Give the finished checkpoint its final name. An old one is renamed first, because no call replaces a directory."""
    if final.exists() and not final.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))
    if final.exists():
        os.replace(final, final.with_name(f".{final.name}.replaced"))
    os.replace(temp, final)
    _sync_directory(final.parent)


def _retire(directory: Path, step: int, keep: int) -> None:
    """Remove all but the newest ``keep`` and the best. One with a damaged manifest or a wrong size counts as neither."""
    paths = list(_checkpoints(directory))
    manifests = {}
    for path in paths:
        try:
            manifests[path] = _check_size(path)
        except CheckpointError:
            continue
    past = [path for path in manifests if manifests[path].step <= step and not path.name.startswith(".")]
    measured = [(metric, i) for i, path in enumerate(past) if (metric := manifests[path].metric) is not None]
    best = past[min(measured)[1]] if measured else None
    for path in paths:
        if path not in past[:keep] and path != best:
            _discard(path)


def discard_later(directory: Path, step: int) -> None:
    """Remove the checkpoints after ``step``, from which a run no longer goes on: resume=auto must not return to them."""
    for path in list(_checkpoints(directory)):
        match = _CHECKPOINT_NAME.fullmatch(path.name)
        if match is not None and int(match["step"] or match["hidden"]) > step:
            _discard(path)


def _discard(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a directory with a final name is always complete."""
    doomed = path.with_name(f".{path.name.lstrip('.')}.removed.tmp")
    os.replace(path, doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """Remove a directory or a file; ignore it if it cannot be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _clear_interrupted(directory: Path) -> None:
    """Clean up after a save that was killed: remove its files, and give a checkpoint that it renamed its name back."""
    for temp in directory.glob(".step_*.tmp"):
        _remove(temp)
    for aside in directory.glob(".step_*.replaced"):
        final = directory / aside.name[1:].removesuffix(".replaced")
        if final.exists():
            _discard(aside)
        else:
            os.replace(aside, final)


def _sync_directory(path: Path) -> None:
    """Sync the names in ``path`` to the disk, if the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# ---- reading ----


def load(path: str | Path) -> Loaded:
    """Load one checkpoint directory after verifying every byte; tensors come to the CPU.

    Raises:
        CheckpointError: there is none at ``path``, it is damaged, or its state is not a dict of tensors and plain values.
    """
    path = Path(path)
    manifest = _verify(path)
    try:
        state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:
        # The bytes are unchanged, so torch refuses the content itself.
        raise CheckpointError(
            f"{path / STATE_FILE} holds more than tensors and plain values or comes from another torch "
            f"({type(error).__name__}), so it was not loaded and nothing in it was executed; {_OURS}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE_FILE} holds a {type(state).__name__} instead of a run's state; {_OURS}")
    if manifest.files is not None:
        try:
            state = join(state, read_shards(path / TENSORS))
        except Exception as error:
            raise CheckpointError(
                f"{path / TENSORS} cannot be read ({type(error).__name__}: {' '.join(str(error).split())}); {_OURS}"
            ) from error
    return Loaded(state, path, manifest.step, manifest.metric)


def load_newest(directory: str | Path) -> Loaded | None:
    """Load the newest checkpoint in ``directory`` that passes verification; None if there are none at all.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    skipped: list[tuple[Path, str]] = []
    for path in _checkpoints(Path(directory)):
        try:
            return replace(load(path), skipped=skipped)
        except CheckpointError as error:
            skipped.append((path, str(error)))
    if skipped:
        reasons = "".join(f"\n  {reason}" for _, reason in skipped)
        raise CheckpointError(
            f"none of the {len(skipped)} checkpoints in {directory} can be used; "
            f"restore one from a copy; to train again from the start, choose another output_dir:{reasons}"
        )
    return None


def _checkpoints(directory: Path) -> Iterator[Path]:
    """The checkpoints in ``directory``, newest first; one with a hidden name comes after its replacement."""
    found = []
    for path in directory.glob("*step_*"):
        if (match := _CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir():
            found.append((int(match["step"] or match["hidden"]), match["step"] is not None, path))
    return (path for _, _, path in sorted(found, reverse=True))


def _check_size(path: Path) -> _Manifest:
    """The verified manifest of ``path``. Checks all that can be checked without reading the state: its size, and the name."""
    try:
        manifest = _Manifest.read(path / MANIFEST_FILE)
        sizes = {name: (path / name).stat().st_size for name in manifest.every_file}
    except OSError as error:
        name, hint = Path(error.filename or path).name, _instead_of(path)
        raise CheckpointError(f"{path} is not a checkpoint ({name}: {error.strerror or error}); {hint}") from error
    for name, (size, _) in manifest.every_file.items():
        if sizes[name] != size:
            raise CheckpointError(
                f"{path / name} has {sizes[name]} bytes instead of {size}: it was truncated or altered; "
                "use an older checkpoint"
            )
    named = _CHECKPOINT_NAME.fullmatch(path.name)
    if named and int(named["step"] or named["hidden"]) != manifest.step:
        raise CheckpointError(
            f"{path} holds the checkpoint of step {manifest.step}: it was renamed or altered; "
            f"name it step_{manifest.step:08d} if there is none of that name, or use an older checkpoint"
        )
    return manifest


def _instead_of(path: Path) -> str:
    """The remedy for a path that is no whole checkpoint. For a damaged one: an older one. For any other path: the newest one near it."""
    if _CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir():
        return _OLDER
    near = (other for folder in (path, path / "checkpoints", path.parent) for other in _checkpoints(folder))
    newest = next((other for other in near if not other.name.startswith(".")), None)
    return f"did you mean {newest}?" if newest else "give a directory step_<number>, in the folder checkpoints of a run"


def _verify(path: Path) -> _Manifest:
    manifest = _check_size(path)
    for name, (_, recorded) in manifest.every_file.items():
        try:
            digest = sha256(path / name)
        except OSError as error:
            raise CheckpointError(
                f"{path / name} cannot be read ({error.strerror or error}); use an older checkpoint"
            ) from error
        if digest != recorded:
            raise CheckpointError(
                f"{path / name} was altered: its sha256 is not the recorded one; use an older checkpoint"
            )
    return manifest
