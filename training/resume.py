"""The state a run needs to go on as if it had not stopped, and the rules for going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.checkpoint import CheckpointError, Loaded, check_same, load, load_newest
from training.ranks import Ranks
from training.run import environment
from training.stability import Stability

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


def state_of(
    cfg: dict[str, Any],
    data: str,
    model: nn.Module,
    optimizers: Any,
    stability: Stability,
    step: int,
    seconds: float,
    skipped: int,
    rng: list[dict[str, Any]],
) -> dict[str, Any]:
    """Everything a run needs to go on as if it had not stopped; `rng` holds every rank's `rng_state()`. All ranks must call."""
    return {
        "config": cfg,
        "data": data,
        "model": model.state_dict(),
        "optimizers": optimizers.state_dict(),
        "stability": stability.state_dict(),
        "rng": rng,
        "step": step,
        "seconds": seconds,
        "skipped": skipped,
        "environment": environment(),
    }


def rng_state() -> dict[str, Any]:
    """Where this rank's random numbers are: on the CPU and, if there is one, on its CUDA device."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def find_checkpoint(cfg: dict[str, Any], directory: Path, data: str) -> Loaded | None:
    """The checkpoint to go on from, if `resume` asks for one and there is one; it must be of this model and data."""
    if cfg["resume"] == "never":
        return None
    loaded = load_newest(directory / "checkpoints") if cfg["resume"] == "auto" else load(cfg["resume"])
    if loaded is None:
        return None
    changed = [] if cfg["allow_changes"] else check_same(loaded.state["config"], cfg, ignore=HARMLESS)
    if loaded.state["data"] != data:
        changed.append(f"data: the shards in {cfg['data']['dir']} are not those the run was trained on")
    if changed:
        raise CheckpointError(
            f"{loaded.path} belongs to another run, so it is not continued; go back to its settings, or start anew with "
            "resume=never and another output_dir:" + "".join(f"\n  - {c}" for c in changed)
        )
    return loaded


def agreed_checkpoint(ranks: Ranks, cfg: dict[str, Any], directory: Path, data: str) -> Loaded | None:
    """The checkpoint that rank 0 finds, read by every rank: the run's directory is one that all nodes see."""
    found: list[Loaded | None] = []

    def find() -> Path | None:
        found.append(find_checkpoint(cfg, directory, data))
        return found[0].path if found[0] else None

    path = ranks.from_main(find)
    return found[0] if ranks.is_main else load(path) if path else None


def restore(
    state: dict[str, Any], model: nn.Module, optimizers: Any, stability: Stability, rank: int = 0
) -> tuple[int, float, int]:
    """Put a checkpoint's state in place; returns the finished steps, the seconds they took, and the updates left out.

    A rank that did not exist when it was saved keeps its own random numbers; they serve dropout alone.
    """
    model.load_state_dict(state["model"])
    optimizers.load_state_dict(state["optimizers"])
    stability.load_state_dict(state["stability"])
    if rank < len(state["rng"]):
        rng = state["rng"][rank]
        torch.set_rng_state(rng["cpu"])
        if torch.cuda.is_available() and rng["cuda"] is not None:
            torch.cuda.set_rng_state(rng["cuda"])
    return state["step"], state["seconds"], state["skipped"]
