"""The state a run needs to go on as if it had not stopped, and the rules for going on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optim.assignment import folded
from training.checkpoint import STATE_FILE, CheckpointError, Loaded, check_same, load, load_newest
from training.files import read_config
from training.log import METRICS_FILE, read_records
from training.ranks import LostRanks, Ranks
from training.run import environment
from training.settings import Settings
from training.stability import Stability
from training.step import FiniteGuard

# Settings that may differ between the two halves of a run without changing its numbers.
HARMLESS = (
    "max_steps",  # what it decides, the schedule, is compared by itself
    "resume",
    "allow_changes",
    "output_dir",
    "logger",
    "checkpoint",
    "log",
    "probe",
    "full_eval",
    "name",
    "data.dir",
    "data.auto_prepare",
    "launcher",
    "sweep",
)


# What a run's state holds, by type; "guard" is absent from the oldest, which have the number of updates left out in its place.
_PARTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("config", "model", "optimizers", "stability", "environment"), (dict,)),
    "data": (str,),
    "rng": (list,),
    "step": (int,),
    "seconds": (float, int),
}


def state_of(
    cfg: Settings,
    data: str,
    model: nn.Module,
    optimizers: Any,
    stability: Stability,
    guard: dict[str, Any],
    step: int,
    seconds: float,
    rng: list[dict[str, Any]],
) -> dict[str, Any]:
    """Everything a run needs to go on as if it had not stopped.

    `guard` is FiniteGuard's state, `rng` every rank's `rng_state()`. All ranks must call.
    """
    return {
        "config": cfg.plain(),
        "data": data,
        "model": model.state_dict(),
        "optimizers": optimizers.state_dict(),
        "stability": stability.state_dict(),
        "guard": guard,
        "rng": rng,
        "step": step,
        "seconds": seconds,
        "environment": environment(),
    }


def rng_state() -> dict[str, Any]:
    """Where this rank's random numbers are: on the CPU and, if there is one, on its CUDA device."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


# ---- which checkpoint ----


def find_checkpoint(cfg: Settings, directory: Path, data: str) -> Loaded | None:
    """The checkpoint to go on from, if `resume` asks for one and there is one; it must be of this model and data.

    Raises:
        CheckpointError: it is not; or going on would drop records that belong to another run or to checkpoints that are gone.
    """
    if cfg.resume == "never":
        return None
    own = directory / "checkpoints"
    loaded = load_newest(own) if cfg.resume == "auto" else load(cfg.resume)
    if loaded is None:
        _require_no_lost_checkpoints(cfg, directory)
        return None
    check_parts(loaded)
    if loaded.path.resolve().parent != own.resolve() and (directory / METRICS_FILE).exists():
        raise CheckpointError(
            f"{directory} already holds the records of another run than {loaded.path}; choose another output_dir, or go on "
            "with the run there by resume=auto"
        )
    changed = [] if cfg.allow_changes else check_same(loaded.state["config"], cfg.plain(), ignore=HARMLESS)
    if loaded.state["data"] != data:
        changed.append(f"data: the shards in {cfg.data.dir} are not those the run was trained on")
    if changed:
        raise CheckpointError(
            f"{loaded.path} belongs to another run, so it is not continued; go back to its settings, or start anew with "
            "resume=never and another output_dir:" + "".join(f"\n  - {c}" for c in changed)
        )
    return loaded


def check_parts(loaded: Loaded) -> None:
    """Raise CheckpointError unless the state is one that `state_of` returned, as far as its parts tell."""
    wrong = [name for name, kinds in _PARTS.items() if not isinstance(loaded.state.get(name), kinds)]
    if not wrong and loaded.state["step"] != loaded.step:
        wrong = ["step"]
    if wrong:
        raise CheckpointError(
            f"{loaded.path / STATE_FILE} is not the state of a run: {', '.join(wrong)} missing or of another kind; "
            "use a checkpoint that this program saved"
        )


def _require_no_lost_checkpoints(cfg: Settings, directory: Path) -> None:
    """Raise where records tell of checkpoints that are gone.

    A run that was stopped before its first checkpoint starts anew; RunLog keeps its records under another name.
    """
    if not (directory / METRICS_FILE).exists():
        return
    try:
        first = int(read_config(directory)["checkpoint"]["interval"])
    except (OSError, ValueError, LookupError, TypeError):
        first = cfg.checkpoint.interval or cfg.max_steps
    last, ended = 0, False
    for record in read_records(directory):
        last, ended = max(last, record["step"]), ended or record["kind"] == "end"
    if ended or last > first:
        raise CheckpointError(
            f"{directory} holds the records of a run up to step {last}, but no checkpoint to go on from; nothing was changed. "
            f"Put its checkpoints back into {directory / 'checkpoints'}, or choose another output_dir; to start anew in this one, "
            f"move its {METRICS_FILE} elsewhere first"
        )


def agreed_checkpoint(ranks: Ranks, cfg: Settings, directory: Path, data: str) -> Loaded | None:
    """The checkpoint that rank 0 finds, read by every rank: the run's directory is one that all nodes see."""
    found: list[Loaded | None] = []

    def find() -> Path | None:
        found.append(find_checkpoint(cfg, directory, data))
        return found[0].path if found[0] else None

    path = ranks.from_main(find)
    return found[0] if ranks.is_main else load(path) if path else None


# ---- putting it in place ----


def restore(
    loaded: Loaded,
    cfg: Settings,
    model: nn.Module,
    optimizers: Any,
    stability: Stability,
    guard: FiniteGuard,
    rank: int = 0,
) -> tuple[int, float, list[str]]:
    """Put a checkpoint's state in place; all ranks must call.

    With `allow_changes` what fits by name and shape is taken, and the rest stays at its start. A rank that did not exist when it was
    saved keeps its own random numbers; they serve dropout alone.

    Returns:
        The finished steps, the seconds they took, and one line for everything that is not as it was.

    Raises:
        CheckpointError: the weights are another model's, or the state is not this program's.
    """
    state = loaded.state
    with foreign(loaded):
        changed = [f"changed: {change}" for change in check_same(state["config"], cfg.plain(), ignore=HARMLESS)]
        missed = take_weights(model, loaded, allow_changes=cfg.allow_changes)
        missed += optimizers.load_state_dict(state["optimizers"])
        stability.load_state_dict(state["stability"])
        guard.load_state_dict(state["guard"] if "guard" in state else _guard_of_old(state))
        if rank < len(state["rng"]):
            rng = state["rng"][rank]
            torch.set_rng_state(rng["cpu"])
            if torch.cuda.is_available() and rng["cuda"] is not None:
                torch.cuda.set_rng_state(rng["cuda"])
        return state["step"], float(state["seconds"]), changed + missed


def resumption(loaded: Loaded | None, cfg: Settings, notes: list[str]) -> list[str]:
    """What a person is told of a checkpoint that a run goes on from: which were skipped, its step, and what is not as it was."""
    if loaded is None:
        return []
    skipped = [f"skipped {path}: {reason}" for path, reason in loaded.skipped]
    resumed = f"resumed from {loaded.path}, step {loaded.step} of {cfg.max_steps}"
    return [*skipped, resumed, *(f"  - {note}" for note in notes)]


def _guard_of_old(state: dict[str, Any]) -> dict[str, Any]:
    first = [state["step"], "a loss or a gradient of an earlier session", 0] if state["skipped"] else None
    return {"count": state["skipped"], "first": first}


@torch.no_grad()
def take_weights(model: nn.Module, loaded: Loaded, allow_changes: bool = False) -> list[str]:
    """Copy a checkpoint's weights into a model, by name; returns what was not taken.

    Raises:
        CheckpointError: a weight is missing, left over or of another shape; with `allow_changes`, if not one matrix fits.
    """
    with foreign(loaded):
        saved, whole = loaded.state["model"], model.state_dict()
        # A tied weight has two names in `whole`; here it has the one under which the optimizer knows it.
        own = {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if name in whole}
        fitting = [name for name, t in own.items() if name in saved and saved[name].shape == t.shape]
        for name in fitting:
            own[name].copy_(saved[name])
        left: dict[str, list[str]] = {}
        for name in (n for n in own if n not in fitting):
            there = _size(saved[name]) if name in saved else "not there"
            left.setdefault(f"starts anew ({there}, {_size(own[name])} here)", []).append(name)
        for name in (n for n in saved if n not in own):
            twin = whole.get(name)  # the second name of a tied weight: of another shape, it has been named above
            if twin is None or (twin.shape == saved[name].shape and not _equal(twin, saved[name])):
                left.setdefault("in the checkpoint, but not in this model", []).append(name)
        lines = [f"{name}: {what}" for what, names in left.items() for name in folded(names)]
    if lines and not (allow_changes and any(own[name].ndim > 1 for name in fitting)):
        why = "none of its matrices fits" if allow_changes else "its weights do not fit"
        raise CheckpointError(
            f"{loaded.path / STATE_FILE} is of another model: {why}; use the model it was saved from, or start anew with "
            "resume=never and another output_dir:" + "".join(f"\n  - {line}" for line in lines)
        )
    return lines


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


def _size(t: torch.Tensor) -> str:
    return " x ".join(map(str, t.shape)) or "a number"


@contextmanager
def foreign(loaded: Loaded) -> Iterator[None]:
    """What is raised here says that a state, whose bytes are as they were written, is not one of ours; but for want of memory."""
    try:
        yield
    except (CheckpointError, MemoryError, torch.OutOfMemoryError, LostRanks):
        raise
    except Exception as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(
            f"{loaded.path / STATE_FILE} is not the state of such a run ({type(error).__name__}: {cause}); use a checkpoint that "
            "this program saved"
        ) from error
