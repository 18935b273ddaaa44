"""Where the parameters of a run lie: whole on every rank (`Replicated`), or every number on one rank only (training/shard.py)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training import checkpoint
from training.machine import compiled
from training.optimizers import Optimizers
from training.ranks import Ranks
from training.settings import Settings


class Placement(Protocol):
    """What the training loop must know of it. All ranks must call every method."""

    replica: nn.Module
    """The model to train."""
    evaluated: nn.Module
    """The model to evaluate."""
    lends: bool
    """Whether whole parameters exist within `whole` only."""

    def gradients(self) -> list[Tensor]:
        """This rank's part of the gradient of each parameter, in order; to be changed in place. Call it after a backward pass."""

    def whole_norms(self, norms: Tensor) -> Tensor:
        """The norms (N,) of the whole gradients, from those of the parts that `gradients` returned; equal on all ranks."""

    def whole(self) -> AbstractContextManager[Mapping[str, Tensor]]:
        """A context in which every rank has whole parameters, and their names; modules of the model may be used alone in it."""

    def check(self) -> None:
        """Raise RuntimeError if parameters that should be bitwise equal on all ranks are not."""

    def save(self, directory: Path, step: int, state: dict[str, Any], keep: int, metric: float | None) -> None:
        """Save a checkpoint of the state of the run, see training/checkpoint.py."""


def place(model: nn.Module, optimizers: Optimizers, ranks: Ranks, cfg: Settings) -> Placement:
    """Place a model, which is whole on every rank, and the state of its optimizers as `launcher.shard` says."""
    if cfg.launcher.shard == "fsdp" and ranks.world > 1:
        from training.shard import Sharded  # FSDP takes a second to import

        return Sharded(model, optimizers, ranks, cfg)
    return Replicated(model, ranks, cfg)


def require_gradients(params: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError unless all parameters have a gradient."""
    if without := [name for name, p in params.items() if p.grad is None]:
        raise RuntimeError(
            f"no gradient reached {', '.join(without)}; use it in the forward pass, or do not create it with these settings"
        )


class Replicated:
    """Every rank has all parameters, and with several ranks DDP sums the gradients; see Placement."""

    def __init__(self, model: nn.Module, ranks: Ranks, cfg: Settings) -> None:
        self.ranks, self.params, self.lends = ranks, dict(model.named_parameters()), False
        self.replica = self.evaluated = compiled(model, cfg, ranks.device)
        if ranks.world > 1:
            # DDP is compiled together with the model, so that its communication overlaps with the backward pass. Buffers are equal on
            # all ranks without a broadcast in every step: tables of positions, and the maxima of QK-clip, which it reduces itself.
            replica = DistributedDataParallel(model, broadcast_buffers=False)
            self.replica = compiled(replica, cfg, ranks.device)

    def gradients(self) -> list[Tensor]:
        require_gradients(self.params)
        return [cast(Tensor, p.grad) for p in self.params.values()]

    def whole_norms(self, norms: Tensor) -> Tensor:
        return norms

    def whole(self) -> AbstractContextManager[Mapping[str, Tensor]]:
        return nullcontext(self.params)

    def check(self) -> None:
        self.ranks.require_equal(self.params)

    def save(self, directory: Path, step: int, state: dict[str, Any], keep: int, metric: float | None) -> None:
        self.ranks.from_main(lambda: checkpoint.save(directory, step, state, keep=keep, metric=metric))
