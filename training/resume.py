"""Resume a run: the state that this needs, the choice of a checkpoint, whether it is of the same run, and loading it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import nn

from optim.assignment import folded
from training.average import Average
from training.checkpoint import STATE_FILE, CheckpointError, Loaded, load, load_newest
from training.fields import leaves
from training.files import read_config
from training.log import METRICS_FILE, read_records
from training.ranks import LostRanks, Ranks
from training.settings import Settings
from training.stability import Stability
from training.step import FiniteGuard

# Settings that may change when a run is resumed: they change its numbers by rounding at most.
HARMLESS = (
    "max_steps",  # schedule.decay_steps, which is max_steps unless given, is compared instead
    "resume",
    "allow_changes",
    "output_dir",
    "logger",
    "checkpoint",
    "log",
    "probe",
    "full_eval",
    "init_from",  # of the first step only
    "name",
    "data.dir",
    "data.auto_prepare",
    "launcher",
    "sweep",
    "capture",  # AdamW then corrects its bias on the device, in float32: equal but for rounding
    "profile",
)


# The parts of a run's state, which the loop saves, and their types.
_PARTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("config", "model", "optimizers", "stability", "guard", "environment"), (dict,)),
    "average": (dict, NoneType),
    "attention": (str, NoneType),
    "data": (str,),
    "rng": (list,),
    "step": (int,),
    "seconds": (float, int),
    "ended": (bool,),
}


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of this rank's random number generators: of the CPU, and of its device if that is on CUDA."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Set the random number generators of this rank to what `rng_state` returned; CUDA's, if it has one, of the current device."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


# ---- which checkpoint ----


def branch_of(directory: Path) -> str | None:
    """The checkpoint of another run with which the run in this directory began, as it was given; None if there is none."""
    try:
        resume = str(read_config(directory)["resume"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    own = Path(resume).resolve().parent == (directory / "checkpoints").resolve()
    return None if own or resume in ("never", "auto") else resume


def goes_on(cfg: Settings, directory: Path) -> bool:
    """Whether `resume` goes on with the checkpoints of this directory: it is auto, or the checkpoint with which this branch began, however
    its path is written."""
    begun_at = branch_of(directory)
    return cfg.resume == "auto" or (begun_at is not None and Path(cfg.resume).resolve() == Path(begun_at).resolve())


def find_checkpoint(cfg: Settings, directory: Path, data: str) -> Loaded | None:
    """The checkpoint to resume from; None if `resume` asks for none, or there is none.

    Raises:
        CheckpointError: it belongs to another model or other data; or resuming would remove records of another run, or records whose
            checkpoints are missing.
    """
    if cfg.resume == "never":
        return None
    own = directory / "checkpoints"
    begun_at = branch_of(directory)  # given again, its command continues the branch
    loaded = load_newest(own) if goes_on(cfg, directory) else load(cfg.resume)
    if loaded is None and begun_at is not None:
        loaded = load(begun_at)
    if loaded is None:
        _require_no_lost_checkpoints(cfg, directory)
        return None
    check_parts(loaded)
    at = loaded.path.resolve()
    elsewhere = at.parent != own.resolve() and (begun_at is None or Path(begun_at).resolve() != at)
    if elsewhere and (directory / METRICS_FILE).exists():
        raise CheckpointError(
            f"{directory} already holds the records of another run than {loaded.path}; choose another output_dir, or use "
            "resume=auto to continue the run there"
        )
    changed = [] if cfg.allow_changes else changes_of(loaded.state["config"], cfg)
    same_data = loaded.state["data"] == data
    if not same_data:
        changed.append(f"data: the shards in {cfg.data.dir} are not the data of the run")
    if changed:
        go_on = ", or add allow_changes=true to go on under the new settings" if same_data else ""
        raise CheckpointError(
            f"{loaded.path} was made under other settings or on other data, so it is not resumed; go back to its settings, or start a new run with "
            f"resume=never and another output_dir{go_on}:" + "".join(f"\n  - {c}" for c in changed)
        )
    return loaded


def changes_of(saved: Mapping[str, Any], cfg: Settings) -> list[str]:
    """A line for every setting that changes numbers and has another value than in the saved configuration."""
    decisive = () if cfg.transfer.rule == "none" else ("max_steps",)  # the transferred learning rates depend on it
    return differences(saved, cfg.plain(), ignore=[key for key in HARMLESS if key not in decisive])


def check_parts(loaded: Loaded) -> None:
    """Raise CheckpointError if parts of the state are missing or have the wrong type."""
    wrong = [name for name, kinds in _PARTS.items() if not isinstance(loaded.state.get(name), kinds)]
    if not wrong and loaded.state["step"] != loaded.step:
        wrong = ["step"]
    if wrong:
        raise CheckpointError(
            f"{loaded.path / STATE_FILE} is not the state of a run: {', '.join(wrong)} missing or of another type; "
            "use a checkpoint that this program saved"
        )


def _require_no_lost_checkpoints(cfg: Settings, directory: Path) -> None:
    """Raise CheckpointError if the records show that there were checkpoints.

    A run that was stopped before its first checkpoint starts at step 0; RunLog renames the file of its records.
    """
    if not (directory / METRICS_FILE).exists():
        return
    try:
        saved = read_config(directory)
        first = int(saved["checkpoint"]["interval"] or saved["max_steps"])
    except (OSError, ValueError, LookupError, TypeError):
        first = cfg.checkpoint.interval or cfg.max_steps
    last, ended = 0, False
    for record in read_records(directory):
        last, ended = max(last, record["step"]), ended or record["kind"] == "end"
    if ended or last > first:
        raise CheckpointError(
            f"{directory} holds the records of a run up to step {last}, but no checkpoint to resume from; nothing was changed. "
            f"Put its checkpoints back into {directory / 'checkpoints'}, or choose another output_dir; to start a new run in this one, "
            f"first move its {METRICS_FILE} elsewhere"
        )


def agreed_checkpoint(ranks: Ranks, cfg: Settings, directory: Path, data: str) -> Loaded | None:
    """The checkpoint that rank 0 finds; every rank reads it. All nodes must have access to the directory of the run."""
    found: list[Loaded | None] = []

    def find() -> Path | None:
        found.append(find_checkpoint(cfg, directory, data))
        return found[0].path if found[0] else None

    path = ranks.from_main(find)
    return found[0] if ranks.is_main else load(path) if path else None


# ---- comparing configurations ----


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
    """List each key whose value differs between two nested configurations, as `"optim.muon.lr: 0.1 → 0.2"`.

    `ignore` names dotted keys; a name covers everything below it (`"logger"` covers `logger.mode`). A key that one of them does not
    have is the same as None.
    """
    before, after, ignored = dict(leaves(saved)), dict(leaves(now)), tuple(ignore)
    return [
        f"{key}: {before.get(key, '(absent)')} → {after.get(key, '(absent)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(f"{key}.".startswith(f"{name}.") for name in ignored)
    ]


# ---- loading it ----


def restore(
    loaded: Loaded,
    cfg: Settings,
    model: nn.Module,
    optimizers: Any,
    stability: Stability,
    guard: FiniteGuard,
    average: Average | None = None,
    rank: int = 0,
) -> list[str]:
    """Load the state of a checkpoint into the parts of a run. All ranks must call.

    With `allow_changes`, state is loaded where its name and shape fit, and the rest stays at its start. If there are now more ranks, the
    additional ones keep their own random numbers, which only dropout uses.

    Returns:
        A line for everything that was not loaded unchanged.

    Raises:
        CheckpointError: the weights belong to another model, or the state was not saved by this program.
    """
    state = loaded.state
    with foreign(loaded):
        missed = take_weights(model, loaded, allow_changes=cfg.allow_changes)
        missed += optimizers.load_state_dict(state["optimizers"])
        stability.load_state_dict(state["stability"])
        guard.load_state_dict(state["guard"])
        missed += average.load_state_dict(state["average"]) if average else []
        if rank < len(state["rng"]):
            set_rng_state(state["rng"][rank])
        return missed


def resumption(loaded: Loaded | None, cfg: Settings, notes: list[str]) -> list[str]:
    """The lines that a resumed run prints: skipped checkpoints, the step of the one that was used, what is not done, and the changes;
    otherwise the notes."""
    if loaded is None:
        return notes
    lines = [f"skipped {path}: {reason}" for path, reason in loaded.skipped]
    lines.append(f"resumed from {loaded.path}, step {loaded.step} of {cfg.max_steps}")
    if loaded.step > cfg.max_steps:
        lines.append(f"max_steps={cfg.max_steps}: the run is beyond it already, and is not trained further")
    ended_without = loaded.state["ended"] and not loaded.state["config"]["full_eval"]
    if cfg.full_eval and loaded.step >= cfg.max_steps and ended_without:
        run = loaded.path.parent.parent
        lines.append(
            f"full_eval=true: the run had ended without it; the loss on the whole split: python scripts/evaluate.py {run}"
        )
    return [*lines, *(f"  - {note}" for note in notes)]


@torch.no_grad()
def take_weights(model: nn.Module, loaded: Loaded, allow_changes: bool = False) -> list[str]:
    """Copy the weights of a checkpoint into a model, by name; returns a line for everything that was not copied.

    Raises:
        CheckpointError: a weight is missing, unknown or of another shape; with `allow_changes`, only if no matrix fits.
    """
    with foreign(loaded):
        saved, whole = loaded.state["model"], model.state_dict()
        # A tied weight has two names in `whole`; in `own` it has only the first.
        own = {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if name in whole}
        fitting = [name for name, t in own.items() if name in saved and saved[name].shape == t.shape]
        for name in fitting:
            own[name].copy_(saved[name])
        left: dict[str, list[str]] = {}
        for name in (n for n in own if n not in fitting):
            there = _size(saved[name]) if name in saved else "not there"
            left.setdefault(f"starts from scratch ({there}, {_size(own[name])} here)", []).append(name)
        for name in (n for n in saved if n not in own):
            twin = whole.get(name)  # the second name of a tied weight; one of another shape is already listed
            if twin is None or (twin.shape == saved[name].shape and not _equal(twin, saved[name])):
                left.setdefault("in the checkpoint, but not in this model", []).append(name)
        lines = [f"{name}: {what}" for what, names in left.items() for name in folded(names)]
    if lines and not (allow_changes and any(own[name].ndim > 1 for name in fitting)):
        why = "none of its matrices fits" if allow_changes else "its weights do not fit"
        raise CheckpointError(
            f"{loaded.path / STATE_FILE} belongs to another model: {why}; use the model it was saved from, or start a new run with "
            "resume=never and another output_dir:" + "".join(f"\n  - {line}" for line in lines)
        )
    return lines


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


def _size(t: torch.Tensor) -> str:
    return " x ".join(map(str, t.shape)) or "a number"


@contextmanager
def foreign(loaded: Loaded) -> Iterator[None]:
    """A context in which an error means that the state was not saved by this program; errors of memory and ranks are unchanged."""
    try:
        yield
    except (CheckpointError, MemoryError, torch.OutOfMemoryError, LostRanks):
        raise
    except Exception as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(
            f"{loaded.path / STATE_FILE} is not the state of this run ({type(error).__name__}: {cause}); use a checkpoint that "
            "this program saved"
        ) from error
