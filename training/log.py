"""metrics.jsonl is the truth about a run; sinks, such as W&B and the progress bar, show what they can of the same records.

One JSON record a line: ``{"kind": ..., "step": ..., <fields>}``. ``step`` counts the updates done when the record was
written: 0 before the first, s after s of them. Floats are written in full precision; those JSON has no word for are the
strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which ``read_records`` returns as floats (so no text field may
consist of one of these three words).

What the sinks look for, all of it optional:

=========  ================================================================================================
kind       fields
=========  ================================================================================================
train      ``loss``, ``lr``, ``tokens_per_s``
eval       ``loss``
full_eval  ``loss``, ``tokens``: of the whole validation split, once, at the end
spectra    ``name`` of a matrix, ``sigma``: all its singular values; one record a matrix
probe      per layer and head what ``model.probes.probe`` lists, and its summary
event      ``event``: what sort, such as "unstable" or "warning"; ``message``: one sentence for a person
=========  ================================================================================================
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

METRICS_FILE = "metrics.jsonl"
DAMAGED_FILE = "metrics.jsonl.damaged"

_WORD_OF_FLOAT = {math.inf: "Infinity", -math.inf: "-Infinity"}
_FLOAT_OF_WORD = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

_logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Something that shows records as they are written."""

    def record(self, rec: dict[str, Any]) -> None:
        """Take one record; plain Python values, NaN and infinities as floats."""

    def close(self) -> None:
        """Finish; called once, also after an error in the run."""


class RunLog:
    """Appends records to ``directory/metrics.jsonl`` and hands each to the sinks.

    A record has reached the operating system when ``write`` returns, so it survives a kill of the process. Opening
    drops a last line that was torn by one, and moves damaged lines into ``metrics.jsonl.damaged``. With
    ``resume_step=s`` every record of a step later than s goes as well, so that one curve results; the caller resumes
    from s finished steps and has written all records of step s before the checkpoint of step s was saved. With -1 the
    run starts anew: records of an earlier start are moved aside to ``metrics.jsonl.<n>.old``.
    """

    def __init__(self, directory: str | Path, sinks: Iterable[Sink] = (), resume_step: int | None = None):
        self.path = Path(directory) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step == -1:
            _set_aside(self.path)
        elif self.path.exists():
            _rewrite(self.path, resume_step)
        self._sinks = list(sinks)
        self._file = self.path.open("ab", buffering=0)

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Append one record of numbers, strings, None, lists, dicts, NumPy arrays and tensors of any shape.

        Raises TypeError for any other value and OSError on a full disk; metrics.jsonl then ends with the last whole
        record, and the run can be resumed.
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
        """Bring the records to the disk itself, before a checkpoint that relies on them."""
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
            raise OSError(
                error.errno,
                f"{error.strerror}: a record could not be written",
                str(self.path),
            ) from error

    def _guarded(self, sink: Sink, call: Any, *args: Any) -> None:
        """Call a sink; one that fails is dropped with a warning, because the run is worth more than its pictures."""
        try:
            call(*args)
        except Exception as error:
            name = type(sink).__name__
            _logger.warning(
                "%s failed and is switched off (%s); training goes on, %s has it all", name, error, METRICS_FILE
            )
            if sink in self._sinks:
                self._sinks.remove(sink)
                self._guarded(sink, sink.close)


class NoLog:
    """The log of a rank that writes nothing."""

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_records(path: str | Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a run, of one kind or of all; ``path`` is a metrics.jsonl or the directory that holds it.

    A torn last line (the run is being written, or was killed) is passed over. So is any other line that is no record;
    a warning then says which.
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
        _logger.warning("%s: %s; what is read goes without", path, _named(damaged))


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record that a line of metrics.jsonl holds; None for a line that is none."""
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
    """Each whole line: its number, its bytes, and its record, None for a damaged one."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield number, line, parse_record(line)


def _named(lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:5])) + (f" and {len(lines) - 5} more" if len(lines) > 5 else "")
    return f"line {shown} is no record" if len(lines) == 1 else f"lines {shown} are no records"


def _rewrite(path: Path, last_step: int | None) -> None:
    """Keep the records up to ``last_step``, in one atomic replacement; damaged lines are kept in a file of their own."""
    temp, aside = path.with_name(f".{path.name}.tmp"), path.with_name(DAMAGED_FILE)
    damaged: list[tuple[int, bytes]] = []
    try:
        with temp.open("wb") as file:
            for number, line, record in _lines(path):
                if record is None:
                    damaged.append((number, line))
                elif last_step is None or record["step"] <= last_step:
                    file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if damaged:
            with aside.open("ab") as file:
                file.writelines(line for _, line in damaged)
                file.flush()
                os.fsync(file.fileno())
        os.replace(temp, path)
    except OSError as error:
        temp.unlink(missing_ok=True)
        error.filename = error.filename or str(path)
        raise
    if damaged:
        _logger.warning(
            "%s: %s; kept in %s, and the run goes on", path, _named([number for number, _ in damaged]), aside.name
        )


def _set_aside(path: Path) -> None:
    """Give the records of an earlier start another name; nothing is lost."""
    if not path.exists() or not path.stat().st_size:
        return
    aside = next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.{n}.old")).exists())
    os.rename(path, aside)
    _logger.warning("%s: the records of an earlier start are kept in %s", path, aside.name)


def _plain(value: Any, where: str) -> Any:
    """``value`` in Python's own types; ``tolist`` is what NumPy scalars, NumPy arrays and torch tensors share."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
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
