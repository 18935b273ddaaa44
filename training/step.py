"""The parts of a training step that do not depend on models and manifolds: batches, gradients, clipping, evaluation, finite checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.ranks import Ranks


def micro_batch_size(windows: int, wanted: int) -> int:
    """Windows of a micro-batch, for a rank that has `windows` windows in an update; at most `wanted`.

    The largest divisor of `windows` up to `wanted`, if it is at least half of min(windows, wanted): then all micro-batches have one shape.
    Otherwise min(windows, wanted), and the last micro-batch is smaller.

    >>> micro_batch_size(8, 64), micro_batch_size(12, 5), micro_batch_size(7, 4)
    (8, 4, 4)
    """
    most = min(windows, wanted)
    even = next(size for size in range(most, 0, -1) if windows % size == 0)
    return even if 2 * even >= most else most


def host_tokens(windows: np.ndarray, device: torch.device) -> Tensor:
    """Windows (N, T+1) uint16 as int64 on the host; for a GPU in pinned memory, from which it copies while the host goes on."""
    tokens = torch.from_numpy(windows.astype("int64"))
    return tokens.pin_memory() if device.type == "cuda" else tokens


def micro_batches(windows: np.ndarray | Tensor, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (size, T) int64 on the device, from windows (N, T+1); the last micro-batch may be smaller.

    The windows are uint16, or what `host_tokens` has made of them, which saves that work here.
    """
    for start in range(0, len(windows), size):
        part = windows[start : start + size]
        tokens = part if isinstance(part, Tensor) else host_tokens(part, device)
        tokens = tokens.to(device, non_blocking=True)
        yield tokens[:, :-1], tokens[:, 1:]


def accumulate(
    model: nn.Module,
    windows: np.ndarray | Tensor,
    size: int,
    device: torch.device,
    autocast: AbstractContextManager,
    interrupted: Callable[[], bool] = lambda: False,
) -> Tensor | None:
    """Accumulate the gradient of the mean loss over all windows (N, T+1), `size` windows at a time; returns that mean (0-d).

    For the type of the windows see `micro_batches`. `interrupted` is asked between two micro-batches. If it is true, the gradient is
    incomplete, and None is returned.
    """
    total, seen = torch.zeros((), device=device), 0
    replica = getattr(model, "_orig_mod", model)  # the module before torch.compile
    for x, y in micro_batches(windows, size, device):
        if seen and interrupted():
            return None
        seen += len(x)
        waits = seen < len(windows)  # ranks exchange gradients only in the last micro-batch
        with replica.no_sync() if waits and isinstance(replica, DistributedDataParallel) else nullcontext():
            with autocast:
                _, loss = model(x, y)
            share = loss * (len(x) / len(windows))
            share.backward()
        total += share.detach()
    return total


def clip(
    gradients: Sequence[Tensor | None],
    largest: float | None,
    whole_norms: Callable[[Tensor], Tensor] = lambda norms: norms,
) -> tuple[Tensor, Tensor]:
    """Scale the gradients, in place, to a global norm of at most `largest`; None: no clipping.

    `whole_norms` turns the norms of this rank's parts into those of the whole gradients; see training/placement.py.

    Returns:
        The global norm before (0-d) and the norm of each gradient (N,), on the device. The arithmetic is that of
        torch.nn.utils.clip_grad_norm_.
    """
    every: Any = gradients  # after a backward pass, none is None
    norms = whole_norms(torch.stack(torch._foreach_norm(every)))
    total = torch.linalg.vector_norm(norms)
    if largest is not None:
        torch._foreach_mul_(every, (largest / (total + 1e-6)).clamp_max(1.0))
    return total, norms


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    plain: nn.Module,
    windows: np.ndarray,
    size: int,
    ranks: Ranks,
    autocast: AbstractContextManager,
) -> float:
    """Mean loss over the windows (N, T+1), in nats a token: bitwise the same on every rank, and for any number of ranks.

    The ranks take turns with whole micro-batches, and the sum over all of them has a fixed order. In the last turn a rank without a
    micro-batch repeats the last one, because a sharded model is computed by all ranks together. `plain` is `model` before torch.compile; it
    computes a smaller last micro-batch, because another shape would need another compiled program.
    """
    model.eval()
    sums = torch.zeros(-(-len(windows) // size), dtype=torch.float64, device=ranks.device)
    for first in range(0, len(sums), ranks.world):
        i = min(first + ranks.rank, len(sums) - 1)
        for x, y in micro_batches(windows[i * size : (i + 1) * size], size, ranks.device):
            with autocast:
                _, loss = (model if len(x) == size else plain)(x, y)
            if i == first + ranks.rank:
                sums[i] = loss.double() * len(x)
    model.train()
    return ranks.sum(sums).sum().item() / len(windows)


class FiniteGuard:
    """Finds updates with a loss or gradient that is not finite, which are skipped, and what was not finite; without a host sync.

    count: skipped updates so far, those before a resume included.
    """

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names = names
        self._before: tuple[int, str, int | None] | None = None  # the first failure, if it was before a resume
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._loss_here = torch.zeros((), device=device)
        self._norms = torch.zeros(len(names), device=device)

    def check(self, step: int, loss_here: Tensor, loss: Tensor, norms: Tensor) -> Tensor:
        """Whether the update `step` must be skipped (0-d bool), from the loss of this rank, the mean loss, and the gradient norms (N,)."""
        bad = ~(loss.isfinite() & norms.isfinite().all())
        first = bad & (self._count == 0)
        self._count += bad
        self._step = torch.where(first, step, self._step)
        self._loss_here = torch.where(first, loss_here, self._loss_here)
        self._norms = torch.where(first, norms, self._norms)
        return bad

    @property
    def count(self) -> int:
        """Number of skipped updates; waits for the device."""
        return int(self._count)

    def first(self, ranks: Ranks) -> tuple[int, str, int | None]:
        """Step of the first skipped update, what was not finite, and on which rank; None for a gradient, which is a mean over the ranks.

        All ranks must call.
        """
        if self._before is not None:
            return self._before
        here = self._loss_here.item()
        broken = [rank for rank, fine in enumerate(ranks.gather_objects(math.isfinite(here))) if not fine]
        if broken:
            return int(self._step), "the loss", broken[0]
        bad = (~self._norms.isfinite()).tolist()
        what = next((f"the gradient of {name}" for name, flag in zip(self.names, bad) if flag), "the loss")
        return int(self._step), what, None

    def state_dict(self, ranks: Ranks) -> dict[str, Any]:
        """The number of skipped updates, and the result of `first`. All ranks must call."""
        return {"count": self.count, "first": list(self.first(ranks)) if self.count else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; the ranks and parameters may have been different."""
        self._count.fill_(state["count"])
        if state["first"] is not None:
            step, what, rank = state["first"]
            self._before = (int(step), str(what), None if rank is None else int(rank))
