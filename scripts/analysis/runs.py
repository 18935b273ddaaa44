"""Runs read from their directories: the configuration, and the part of metrics.jsonl that a table or a picture needs."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.tokenizer import get_tokenizer
from model.gpt import GPT
from optim.assignment import ADAMW, matches
from scripts.analysis.search import TRIALS
from scripts.command import UsageError
from training.average import average_of
from training.build import gpt_config
from training.checkpoint import Loaded, load_newest
from training.files import CONFIG_FILE, ENVIRONMENT_FILE, read_config, run_around
from training.job import COST_FILE
from training.log import METRICS_FILE, read_records
from training.resume import check_parts, foreign, take_weights
from training.settings import Data, Settings, settings_of

SUBLAYERS = {"attention": "attn", "mlp": "mlp"}
"""The two kinds of sublayer, and the component of a parameter's name by which each is recognised."""


@dataclass(frozen=True)
class RecordedRun:
    """A finished, unfinished or failed run.

    config: as written by the run. records: by kind, in order; those of kind "spectra" hold `sigma_max`, `sigma_min`, `sigma_median`
    and `sigma_shape`, at most 25 of them at equal shares of their ranks, instead of all singular values, and of the lengths of columns
    their mean `length_mean` and their standard deviation relative to it, `length_spread`. cost: `wall_seconds` and `peak_bytes` of the
    processes that trained it, if a script wrote them. environment: versions, device and command; of a run that was resumed with others also
    `earlier`, those before. case: its values of an experiment's axes, by axis.
    """

    directory: Path
    config: dict[str, Any]
    records: dict[str, list[dict[str, Any]]]
    cost: dict[str, Any]
    environment: dict[str, Any]
    case: Mapping[str, str] = field(default_factory=dict)

    @property
    def assignment(self) -> str:
        """The assignment's name for people, such as "All-Stiefel"."""
        return self.config["assignment"]["name"]

    def value_of(self, axis: str) -> str:
        """Its value of an experiment's axis, in words: an assignment has a name for people."""
        return self.assignment if axis == "assignment" else self.case[axis]

    @property
    def environments(self) -> list[dict[str, Any]]:
        """The versions, devices and commands of all its steps, in order: one, or several if it was resumed under others."""
        return [*self.environment.get("earlier", []), self.environment]

    @property
    def step(self) -> int:
        """The last step for which the run has a record."""
        return max((records[-1]["step"] for records in self.records.values()), default=0)

    @property
    def finished(self) -> bool:
        """Whether the run has ended, stable or not."""
        return bool(self.records.get("end"))

    @property
    def unstable_step(self) -> int | None:
        """The step at which the run became unstable; None if it did not."""
        return next(iter(self._event_steps("unstable")), None)

    @property
    def stable(self) -> bool:
        """Whether it did not become unstable, and its last validation loss is finite."""
        return self.unstable_step is None and self.final is not None and math.isfinite(self.final)

    @property
    def warned_step(self) -> int | None:
        """The step of the early warning; None if there was none."""
        return next(iter(self._event_steps("warning")), None)

    def _event_steps(self, event: str) -> list[int]:
        return [record["step"] for record in self.records.get("event", []) if record["event"] == event]

    @property
    def changes(self) -> dict[int, tuple[str, ...]]:
        """The steps at which it was resumed under other settings, and these, such as "optim.muon.lr: 0.05 → 0.01"."""
        events = [record for record in self.records.get("event", []) if record["event"] == "changed"]
        return {record["step"]: tuple(record["settings"]) for record in events}

    @property
    def status(self) -> str:
        """ "ok", "unstable at step N", "failed at step N" or "unfinished at step N"; "ok, changed at step N" under other settings from there."""
        if self.unstable_step is not None:
            return f"unstable at step {self.unstable_step}"
        if self.finished:
            return ", ".join(["ok", *(f"changed at step {step}" for step in self.changes)])
        failed = self._event_steps("failed")
        if failed and failed[-1] >= self.step:  # otherwise it was continued
            return f"failed at step {failed[-1]}"
        return f"unfinished at step {self.step}"

    def curve(self, kind: str) -> tuple[list[int], list[float]]:
        """Steps and losses (nats a token) of the records of a kind, "train" or "eval"."""
        records = self.records.get(kind, [])
        return [r["step"] for r in records], [r["loss"] for r in records]

    @property
    def best(self) -> float | None:
        """Lowest finite validation loss (nats a token); None if there is none."""
        return min((loss for loss in self.curve("eval")[1] if math.isfinite(loss)), default=None)

    @property
    def final(self) -> float | None:
        """Validation loss at the last evaluation (nats a token), finite or not; None before the first evaluation."""
        return next(reversed(self.curve("eval")[1]), None)

    @property
    def full(self) -> float | None:
        """Loss on the whole validation split at the last evaluation (nats a token); None if it was not evaluated there."""
        last = max(self.curve("eval")[0], default=0)
        return next((r["loss"] for r in reversed(self.records.get("full_eval", [])) if r["step"] >= last), None)

    @property
    def held_out(self) -> float | None:
        """Loss at the end (nats a token): on the whole validation split if it was evaluated, otherwise on the windows."""
        return self.final if self.full is None else self.full

    def spectra(self, sublayer: str) -> dict[str, list[dict[str, Any]]]:
        """The spectra records of every matrix of a sublayer ("attention" or "mlp"), by parameter name."""
        found: dict[str, list[dict[str, Any]]] = {}
        for record in self.records.get("spectra", []):
            if SUBLAYERS[sublayer] in record["name"].split("."):
                found.setdefault(record["name"], []).append(record)
        return found

    def sigma_max(self, sublayer: str) -> float | None:
        """Largest singular value of all matrices of a sublayer, by their last records; None without records."""
        return max((records[-1]["sigma_max"] for records in self.spectra(sublayer).values()), default=None)

    @property
    def mean_feas(self) -> float | None:
        """Mean certified quality of Muon's steps, over matrices and time: 1 is the optimum of the step problem; None if nothing was certified."""
        feas = [record["feas"] for record in self.records.get("certificate", [])]
        return sum(feas) / len(feas) if feas else None

    @property
    def least_entropy(self) -> float | None:
        """Least mean entropy of a layer's attention at any probe, relative to log(position)."""
        return min(self._probed("least_entropy"), default=None)

    @property
    def greatest_saturation(self) -> float | None:
        """Greatest share of a layer's attention rows with a probability above .99 at any probe."""
        return max(self._probed("greatest_saturation"), default=None)

    def last_probe(self, field: str) -> float | None:
        """The value at the dotted key of a field in the last probe in which it is finite; None if there is none."""
        found = [at(r, field) for r in self.records.get("probe", [])]
        return next((value for value in reversed(found) if value is not None and math.isfinite(value)), None)

    def steps_to(self, target: float) -> float | None:
        """The step at which the validation loss first falls to the target, interpolated between evaluations; None if it never does."""
        steps, losses = self.curve("eval")
        for i, loss in enumerate(losses):
            if loss <= target:
                if i == 0 or not math.isfinite(losses[i - 1]):
                    return float(steps[i])
                share = (losses[i - 1] - target) / (losses[i - 1] - loss)
                return steps[i - 1] + share * (steps[i] - steps[i - 1])
        return None

    def _probed(self, field: str) -> list[float]:
        return [r[field] for r in self.records.get("probe", []) if math.isfinite(r[field])]

    def chosen(self, names: Iterable[str]) -> list[str]:
        """What the assignment's rules choose for matrices of these names, such as "stiefel"; each once."""
        rules = (self.config["assignment"]["rules"] or {}).items()
        return list(dict.fromkeys(choice for name in names for pattern, choice in rules if matches(pattern, name)))

    def geometry(self, sublayer: str) -> str:
        """The manifold of a sublayer's matrices; "-" means none, and several manifolds are joined by "+"."""
        part, layers = SUBLAYERS[sublayer], range(int(at(self.config, "model.n_layer") or 0))
        matrices = {"attn": ("c_attn", "c_proj"), "mlp": ("c_fc", "c_proj")}[part]
        names = [f"transformer.h.{i}.{part}.{matrix}.weight" for i in layers for matrix in matrices]
        return "+".join("-" if choice == "euclidean" else choice for choice in self.chosen(names))

    @property
    def has_muon(self) -> bool:
        """Whether ManifoldMuon updates a matrix: the assignment gives it one, and no other optimizer has them all."""
        if at(self.config, "optim.library") or at(self.config, "optim.modular"):
            return False
        return any(choice != ADAMW for choice in (at(self.config, "assignment.rules") or {}).values())


def final_losses(runs: Iterable[RecordedRun]) -> list[float]:
    """The final validation losses (nats a token) of the runs that were evaluated."""
    return [r.final for r in runs if r.final is not None]


def held_out_by_seed(runs: Iterable[RecordedRun]) -> dict[int, float]:
    """Seed → loss at the end (nats a token), see `RecordedRun.held_out`, of the runs that were evaluated."""
    return {r.config["seed"]: r.held_out for r in runs if r.held_out is not None}


def read_run(directory: Path) -> RecordedRun:
    """Read the run in a directory.

    Raises:
        UsageError: the directory holds no run, or one of its files cannot be read.
    """
    records: dict[str, list[dict[str, Any]]] = {}
    incomplete = 0
    try:
        config = read_config(directory)
        if lacking := [key for key, sound in _KEYS.items() if not sound(at(config, key))]:
            raise ValueError(f"{CONFIG_FILE} has no proper {', '.join(lacking)}")
        for record in read_records(directory):
            if not _FIELDS.get(record["kind"], lambda _: True)(record):
                incomplete += 1
                continue
            records.setdefault(record["kind"], []).append(_without_bulk(record))
        cost, environment = (_read_json(directory / name) for name in (COST_FILE, ENVIRONMENT_FILE))
        earlier = environment.get("earlier", [])
        if not (isinstance(earlier, list) and all(isinstance(part, dict) for part in earlier)):
            raise ValueError(f"{ENVIRONMENT_FILE} has no proper earlier")
    except FileNotFoundError as error:
        raise UsageError(f"{directory} holds no run (there is no {error.filename}); name a run's directory") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"the run in {directory} cannot be read ({error}); repair that file or leave the run out"
        ) from error
    if incomplete:
        print(f"{directory}: {incomplete} records lack a field of their kind; they were left out", file=sys.stderr)
    return RecordedRun(directory, config, records, cost, environment)


def text_at(config: dict[str, Any], key: str) -> str:
    """The value at a dotted key of a run's configuration, as text; empty if there is no such key."""
    value = at(config, key)
    return "" if value is None else str(value)


def at(config: Any, key: str) -> Any:
    """The value at a dotted key of a configuration or of a record; None if there is no such key."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)


def _is_numbers(value: Any) -> bool:
    """Whether it is a number, or a list of some."""
    return all(map(_is_number, value)) and value != [] if isinstance(value, list) else _is_number(value)


def _has_sigma(record: dict[str, Any]) -> bool:
    sigma = record.get("sigma")
    return isinstance(record.get("name"), str) and isinstance(sigma, list) and _is_numbers(sigma)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _has_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for item in value.items() for text in item)


# What a table needs of a configuration and of a record. Records of other kinds are not checked.
_KEYS: dict[str, Callable[[Any], bool]] = {
    "assignment.name": lambda value: isinstance(value, str),
    "assignment.rules": lambda value: value is None or _has_texts(value),
    "max_steps": _is_number,
    "seed": _is_number,
}
_FIELDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "train": lambda r: _is_number(r.get("loss")),
    "eval": lambda r: _is_number(r.get("loss")),
    "full_eval": lambda r: _is_number(r.get("loss")),
    "spectra": _has_sigma,
    "certificate": lambda r: _is_number(r.get("feas")),
    "probe": lambda r: _is_number(r.get("least_entropy")) and _is_number(r.get("greatest_saturation")),
    "scales": lambda r: (
        isinstance(r.get("name"), str) and all(_is_numbers(r.get(key)) for key in ("mean", "deviation"))
    ),
    "event": lambda r: isinstance(r.get("event"), str) and (r["event"] != "changed" or _are_texts(r.get("settings"))),
}


_SHAPE = 25  # singular values that are kept of a spectrum


def _without_bulk(record: dict[str, Any]) -> dict[str, Any]:
    """The record; of a spectrum only a few of the singular values, because a long run's file holds millions of numbers."""
    if record["kind"] != "spectra":
        return record
    bulk = ("sigma", "gram_diagonal")
    slim = {key: value for key, value in record.items() if key not in bulk}
    sigma = sorted(record["sigma"], reverse=True)
    last, count = len(sigma) - 1, min(len(sigma), _SHAPE)
    shape = [sigma[round(i * last / max(1, count - 1))] for i in range(count)]
    return {
        **slim,
        "sigma_max": max(record["sigma"]),
        "sigma_min": min(record["sigma"]),
        "sigma_median": sigma[last // 2],
        "sigma_shape": shape,
        **_lengths(record.get("gram_diagonal")),
    }


def _lengths(squares: Any) -> dict[str, float]:
    """Mean and relative standard deviation of the lengths of columns; empty without their squares."""
    if not (isinstance(squares, list) and squares and all(_is_number(x) and x >= 0 for x in squares)):
        return {}
    lengths = [math.sqrt(x) for x in squares]
    mean = statistics.fmean(lengths)
    return {"length_mean": mean, "length_spread": statistics.pstdev(lengths) / mean if mean else 0.0}


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text()) if path.exists() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}")
    return content


def find_runs(places: Iterable[str | Path]) -> list[RecordedRun]:
    """All runs in the given directories and below them, each once.

    Left out, with a line on stderr: jobs that failed before they had a configuration, and the trials of a search, which its experiment
    counts; name the folder of the trials to see them.

    Raises:
        UsageError: a directory does not exist or holds no run.
    """
    directories: dict[Path, Path] = {}
    for place in map(Path, places):
        if not place.is_dir():
            raise UsageError(f"there is no directory {place}; name runs or sweeps, such as outputs/sweep")
        every = sorted(file.parent for file in place.rglob(METRICS_FILE))
        found = [path for path in every if TRIALS not in path.relative_to(place).parts]
        if trials := len(every) - len(found):
            print(f"{place}: {trials} trials of a search left out; name their folder to see them", file=sys.stderr)
        failed = [path for path in found if path != place and not (path / CONFIG_FILE).exists()]
        for path in failed:
            print(f"{path} left out: it failed before it had a {CONFIG_FILE}", file=sys.stderr)
        found = [path for path in found if path not in failed]
        if not found:
            raise UsageError(f"no run in {place} or below it (no {METRICS_FILE}); name a directory that a run wrote")
        for path in found:
            directories.setdefault(path.resolve(), path)
    return [read_run(path) for path in directories.values()]


def model_of(loaded: Loaded, average: bool = False) -> GPT:
    """The model of a checkpoint, on the CPU, in eval mode; with `average`, with the average of the weights.

    Raises:
        CheckpointError: it is not the checkpoint of a run. UsageError: the run has no average.
    """
    check_parts(loaded)
    with foreign(loaded):
        settings = settings_of(loaded.state["config"])
        model = GPT(gpt_config(settings))
        if not isinstance(loaded.state["config"]["data"]["tokenizer"], str):
            raise TypeError("its data has no tokenizer")
    take_weights(model, loaded)
    if average:
        mean = average_of(settings.average, model)
        if mean is None:
            raise UsageError(f"{loaded.path} has no average of the weights; train with average=ema or average=window")
        with foreign(loaded):
            mean.load_state_dict(loaded.state["average"])
        mean.take()
    return model.eval()


def load_model(directory: str | Path, average: bool = False) -> tuple[GPT, Settings, int]:
    """The model (on the CPU, in eval mode), settings and step of a run's newest good checkpoint; `average` as in `model_of`.

    Raises:
        UsageError: there is no run, or no checkpoint yet. CheckpointError: no checkpoint is good, or the newest is not that of a run.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UsageError(f"there is no run {directory}; name a directory that training wrote, such as outputs/first")
    loaded = load_newest(directory / "checkpoints")
    if loaded is None:
        if run := run_around(directory):
            raise UsageError(f"{directory} is a part of a run; name the run itself: {run}")
        if (directory / "config.json").exists():
            raise UsageError(
                f"{directory} holds weights, not a run; train.py init_from={directory} begins a run with them and prints their loss"
            )
        raise UsageError(f"no checkpoint in {directory}/checkpoints; let the run reach checkpoint.interval, or its end")
    for path, reason in loaded.skipped:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    return model_of(loaded, average), settings_of(loaded.state["config"]), loaded.step


def require_text(data: Data) -> None:
    """Refuse the data of a run whose ids are not those of a known tokenizer, such as the 65 characters of nanoGPT's shakespeare_char.

    Raises:
        UsageError: its vocabulary (data.vocab_size) is smaller than the tokenizer's.
    """
    if data.vocabulary() < (whole := get_tokenizer(data.tokenizer).vocab_size):
        raise UsageError(
            f"the text of these tokens is not known: data.vocab_size={data.vocabulary()}, and {data.tokenizer} has {whole:,}; "
            "evaluate.py without tasks= measures the loss, and export.py to=nanogpt or to=safetensors writes the weights"
        )
