"""The records of a run in metrics.jsonl. Sinks, such as W&B and the progress bar, show the same records.

Each line is one JSON record: ``{"kind": ..., "step": ..., <fields>}``. ``step`` is the number of updates before the record was
written. Floats have full precision. JSON has no NaN and no infinity: they are written as the strings ``"NaN"``, ``"Infinity"`` and
``"-Infinity"``, which ``read_records`` turns into floats again (so a text field must not be one of these three words).

The main fields:

===========  ================================================================================================
kind         fields
===========  ================================================================================================
train        ``loss``, ``lr``, ``tokens_per_s``, ``time``: phase → seconds since the last such record
eval         ``loss``, ``average_loss``: of the average of the weights, if there is one
full_eval    ``loss``, ``tokens``: of the whole validation split, once, at the end
spectra      ``name`` of a matrix, ``sigma``: all its singular values; one record a matrix
certificate  ``name`` of a matrix, and how close its last step was to the best one; one record a matrix
update       ``name`` of a parameter, and what ``training.coordinate`` measured of the last step; one record a parameter
probe        the record of ``model.probes.probe``
scales       ``name`` of a learned scale, and its ``model.scale.scale_statistics``; one record a scale, with every probe
event        ``event``: its type, such as "unstable", "warning", "off_manifold" or "uphill"; ``message``: one sentence
init_from    ``source``, ``loss_before``, ``loss``, ``moved``, ``length``: see ``training.init_from``
end          ``unstable_step``, ``reason``; ``train_seconds`` and others: see ``training.directory.end_summary``
===========  ================================================================================================
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from training.files import sync

METRICS_FILE = "metrics.jsonl"
DAMAGED_FILE = "metrics.jsonl.damaged"

_WORD_OF_FLOAT = {math.inf: "Infinity", -math.inf: "-Infinity"}
_FLOAT_OF_WORD = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

_logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Receives every record when it is written."""

    def record(self, rec: dict[str, Any]) -> None:
        """Receive one record of plain Python values; NaN and infinities are floats."""

    def close(self) -> None:
        """Finish. Called once, also after an error in the run."""


class RunLog:
    """Appends records to ``directory/metrics.jsonl`` and passes each to the sinks.

    When ``write`` returns, the operating system has the record, so it is not lost if the process is killed. Opening the log removes an
    incomplete last line and moves damaged lines to ``metrics.jsonl.damaged``. With ``keep_until=s``, it also removes the records of
    steps after s: the run is resumed from the checkpoint of step s, and all records of step s were written before that checkpoint. Only
    ``end`` comes after; it is removed too.
    With ``fresh`` the run starts at step 0, and the log is empty: records of an earlier start are moved to ``metrics.jsonl.<n>.old``.
    """

    def __init__(
        self, directory: str | Path, sinks: Iterable[Sink] = (), *, keep_until: int | None = None, fresh: bool = False
    ) -> None:
        self.path = Path(directory) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            _set_aside(self.path)
        elif self.path.exists():
            _rewrite(self.path, keep_until)
        self._sinks = list(sinks)
        self._file = self.path.open("ab", buffering=0)

    def write(self, kind: str, step: int, /, **fields: Any) -> None:
        """Append one record of numbers, strings, None, lists, dicts, NumPy arrays and tensors of any shape.

        Raises:
            TypeError: a field has another type. OSError: the disk is full; metrics.jsonl then ends with the last complete record, and
                the run can be resumed.
        """
        record = {"kind": kind, "step": int(step), **{name: _plain(value, name) for name, value in fields.items()}}
        try:
            text = json.dumps(record, allow_nan=False)
        except ValueError:
            text = json.dumps(_spell(record), allow_nan=False)
        self._append(text.encode() + b"\n")
        for sink in list(self._sinks):
            self._guarded(sink, sink.record, record)

    def sync(self) -> None:
        """Sync the records to the disk. Called before a checkpoint is saved."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, then the sinks; a second call does nothing."""
        self._file.close()
        while self._sinks:
            sink = self._sinks.pop()
            self._guarded(sink, sink.close)

    def _append(self, line: bytes) -> None:
        start = self._file.tell()
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(start)
            raise OSError(error.errno, f"{error.strerror}: a record could not be written", str(self.path)) from error

    def _guarded(self, sink: Sink, call: Any, *args: Any) -> None:
        """Call a sink. If it fails, it is removed with a warning, and the run continues."""
        try:
            call(*args)
        except Exception as error:
            name = type(sink).__name__
            _logger.warning(
                "%s failed and is switched off (%s); training continues, and %s has all records",
                name,
                error,
                METRICS_FILE,
            )
            if sink in self._sinks:
                self._sinks.remove(sink)
                self._guarded(sink, sink.close)


class NoLog:
    """The log of the other ranks, which write nothing."""

    def write(self, kind: str, step: int, /, **fields: Any) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_records(path: str | Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a run, of one kind or of all; ``path`` is a metrics.jsonl or its directory.

    An incomplete last line (the run is writing, or was killed) is skipped. So is every line that is not a record, with a warning.
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    damaged = []
    for number, _, record in _lines(path):
        if record is None:
            damaged.append(number)
        elif kind is None or record["kind"] == kind:
            yield record
    if damaged:
        _logger.warning("%s: %s, and skipped", path, _named(damaged))


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record of one line of metrics.jsonl; None if the line is not a record."""
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            return None
        step = record.get("step")
        if not isinstance(step, int) or not 0 <= step < 1 << 63:
            return None
        return _unspell(record) if b'"NaN"' in line or b'Infinity"' in line else record
    except (ValueError, RecursionError):
        return None


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """For each complete line: its number, its bytes, and its record (None if it is damaged)."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield number, line, parse_record(line)


def _named(lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:5])) + (f" and {len(lines) - 5} more" if len(lines) > 5 else "")
    return f"line {shown} is not a record" if len(lines) == 1 else f"lines {shown} are not records"


def _rewrite(path: Path, last_step: int | None) -> None:
    """Keep the records up to ``last_step`` but ``end``, atomically; None keeps all. Damaged lines are moved to another file."""
    temp, aside = path.with_name(f".{path.name}.tmp"), path.with_name(DAMAGED_FILE)
    damaged: list[tuple[int, bytes]] = []
    try:
        with temp.open("wb") as file:
            for number, line, record in _lines(path):
                if record is None:
                    damaged.append((number, line))
                elif last_step is None or (record["step"] <= last_step and record["kind"] != "end"):
                    file.write(line)
            sync(file)
        if damaged:
            with aside.open("ab") as file:
                file.writelines(line for _, line in damaged)
                sync(file)
        os.replace(temp, path)
    except OSError as error:
        temp.unlink(missing_ok=True)
        error.filename = error.filename or str(path)
        raise
    if damaged:
        _logger.warning(
            "%s: %s; moved to %s, and the run continues", path, _named([number for number, _ in damaged]), aside.name
        )


def _set_aside(path: Path) -> None:
    """Rename the file with the records of an earlier start."""
    if not path.exists() or not path.stat().st_size:
        return
    aside = next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.{n}.old")).exists())
    os.rename(path, aside)
    _logger.warning("%s: the records of an earlier start are kept in %s", path, aside.name)


def _plain(value: Any, where: str) -> Any:
    """``value`` in Python's own types; NumPy scalars, NumPy arrays and torch tensors all have ``tolist``."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold; log numbers, strings, lists, dicts or tensors"
    )


def _spell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return _WORD_OF_FLOAT.get(value, "NaN")
    return _map(_spell, value)


def _unspell(value: Any) -> Any:
    if isinstance(value, str):
        return _FLOAT_OF_WORD.get(value, value)
    return _map(_unspell, value)


def _map(function: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, list):
        return [function(item) for item in value]
    return value
