"""metrics.jsonl is the truth about a run; W&B and the progress bar show the same records.

One JSON record a line: ``{"kind": ..., "step": ..., <fields>}``. ``step`` counts the updates done when the record was
written: 0 before the first, s after s of them. Floats are written in full precision; those JSON has no word for are the
strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which ``read_records`` returns as floats (so no text field may
consist of one of these three words).

What the sinks look for, all of it optional:

========  ================================================================================================
kind      fields
========  ================================================================================================
train     ``loss``, ``lr``, ``tokens_per_s``
eval      ``loss``
spectra   ``name`` of a matrix, ``sigma``: all its singular values; one record a matrix
probe     per layer and head what ``model.probes.probe`` lists, and its summary
event     ``event``: what sort, such as "unstable" or "warning"; ``message``: one sentence for a person
========  ================================================================================================
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

METRICS_FILE = "metrics.jsonl"
WANDB_RUNS_FILE = "wandb_runs.json"

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
    drops a last line that was torn by one. With ``resume_step=s`` every record of a step later than s goes as well, so
    that one curve results; the caller resumes from s finished steps and has written all records of step s before the
    checkpoint of step s was saved. -1 drops all.
    """

    def __init__(self, directory: str | Path, sinks: Iterable[Sink] = (), resume_step: int | None = None):
        self.path = Path(directory) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _rewrite(self.path, resume_step)
        self._sinks = list(sinks)
        self._file = self.path.open("ab", buffering=0)

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Append one record of numbers, strings, None, lists, dicts, NumPy arrays and tensors of any shape.

        Raises TypeError for any other value and OSError on a full disk; metrics.jsonl then ends with the last whole
        record.
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
                f"{error.strerror}: a record could not be written; free space, then resume=auto",
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

    A torn last line (the run is being written, or was killed) is passed over; ValueError names any other line that is
    no record.
    """
    path = Path(path)
    for _, record in _lines(path / METRICS_FILE if path.is_dir() else path):
        if kind is None or record.get("kind") == kind:
            yield record


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each whole line as it stands in the file, and its record."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not a record ({error}); remove that line") from error
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError(f"{path}, line {number} has no step, so it is not a record; remove that line")
            yield line, _unspell(record) if b'"NaN"' in line or b'Infinity"' in line else record


def _rewrite(path: Path, last_step: int | None) -> None:
    """Keep the whole lines up to ``last_step``, in one atomic replacement."""
    temp = path.with_name(f".{path.name}.tmp")
    with temp.open("wb") as file:
        for line, record in _lines(path):
            if last_step is None or record["step"] <= last_step:
                file.write(line)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp, path)


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


# ---- Weights & Biases ----

# W&B sorts its panels by the part before the slash.
_WANDB_SECTION = {"eval": "val", "certificate": "muon"}


class WandbSink:
    """Shows the records in Weights & Biases. Whatever keeps W&B from starting costs one warning and nothing else.

    ``mode`` is "online", "offline" (needs no account) or "disabled". ``directory`` is that of the run; the ids of its
    W&B runs stand there in ``wandb_runs.json``. With ``resume=True`` an online run is continued under its id; offline,
    where W&B cannot append, a second one of the same group and name is begun and its config lists the earlier ids under
    ``continues``. The x-axis is our ``step``: W&B's own counter starts again when a run is resumed.
    """

    def __init__(
        self,
        *,
        mode: str,
        project: str,
        group: str | None,
        name: str,
        config: Mapping[str, Any],
        directory: str | Path,
        resume: bool = False,
    ):
        self._run: Any = None
        if mode == "disabled":
            return
        try:
            self._start(mode, project, group, name, config, Path(directory), resume)
        except Exception as error:
            _logger.warning(
                "W&B did not start (%s); training goes on without it and %s holds everything. "
                "Install wandb and run `wandb login`, or choose logger.mode=offline or logger.mode=disabled",
                " ".join(str(error).split()) or type(error).__name__,
                METRICS_FILE,
            )

    def _start(
        self,
        mode: str,
        project: str,
        group: str | None,
        name: str,
        config: Mapping[str, Any],
        directory: Path,
        resume: bool,
    ) -> None:
        import wandb  # here, because importing it takes a second and it may be absent

        directory.mkdir(parents=True, exist_ok=True)
        ids_file = directory / WANDB_RUNS_FILE
        earlier = json.loads(ids_file.read_text()) if resume and ids_file.exists() else []
        # An offline half is uploaded later under its own id; continuing it online would make two writers of one run.
        online = [run["id"] for run in earlier if run["mode"] == "online"]
        # An agent of `wandb sweep` has chosen the id, by which it finds the run's losses.
        fresh_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        run_id = online[-1] if mode == "online" and online else fresh_id
        links = [run["id"] for run in earlier if run["id"] != run_id]
        self._run = wandb.init(
            mode=mode,
            project=project,
            group=group,
            name=name,
            id=run_id,
            resume="allow" if mode == "online" else None,
            config={**config, "continues": links} if links else dict(config),
            dir=str(directory),
            reinit="create_new",
            settings=_settings(wandb, mode),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("val/loss", step_metric="step", summary="min")
        if not any(run["id"] == run_id for run in earlier):
            temp = ids_file.with_suffix(".tmp")
            temp.write_text(json.dumps([*earlier, {"id": run_id, "mode": mode}]))
            os.replace(temp, ids_file)

    def record(self, rec: dict[str, Any]) -> None:
        """Log the numbers of a record under ``<kind>/<field>``, lists as histograms (see ``flatten``)."""
        if self._run is None:
            return
        import wandb

        payload: dict[str, Any] = {"step": rec["step"]}
        for key, value in flatten(rec):
            if not isinstance(value, list):
                payload[key] = value
            elif finite := [number for number in value if math.isfinite(number)]:
                payload[key] = wandb.Histogram(finite)
        self._run.log(payload)

    def close(self) -> None:
        """Finish the W&B run, which uploads or writes what is still buffered."""
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()


def _settings(wandb: Any, mode: str) -> Any:
    """W&B's settings; all times in seconds."""
    return wandb.Settings(
        console="off",  # the console belongs to the progress bar
        silent=mode == "offline",
        init_timeout=60,
        login_timeout=30,  # an unattended terminal is not asked for a key for ever
        finish_timeout=20,  # a run that is told to stop has half a minute; the rest waits on disk for `wandb sync`
    )


def flatten(rec: Mapping[str, Any]) -> Iterator[tuple[str, float | str | list[float]]]:
    """Yield what a record shows as curves and histograms: ``("spectra/h.0.attn/sigma_max", 1.0)``.

    A ``name`` in the record becomes part of the path, dicts become paths, a non-empty list of numbers stays a list;
    other lists and None are left out. Beside a list ``sigma`` of singular values stand ``sigma_max``, ``sigma_min`` and
    ``stable_rank`` = Σσ²/σ_max².
    """
    section = _WANDB_SECTION.get(rec["kind"], rec["kind"])
    name = rec.get("name")
    prefix = f"{section}/{name}" if isinstance(name, str) else section
    yield from _flatten({key: value for key, value in rec.items() if key not in ("kind", "step", "name")}, prefix)


def _flatten(fields: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float | str | list[float]]]:
    for key, value in fields.items():
        path = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, path)
        elif isinstance(value, list):
            if not value or not all(isinstance(item, (int, float)) for item in value):
                continue
            yield path, value
            if key == "sigma":
                largest = max(value)
                yield f"{path}_max", largest
                yield f"{path}_min", min(value)
                yield f"{prefix}/stable_rank", sum((s / largest) ** 2 for s in value) if largest > 0 else 0.0
        elif value is not None:
            yield path, value
