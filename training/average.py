"""The average of the weights over the last updates, which is evaluated beside the weights and changes nothing of the training.

A refused update does not count. Nothing here waits for the device. On several ranks the weights are equal, and so are their averages.
The average of points on a manifold is not on it: the average of orthogonal matrices has smaller singular values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training.settings import EmaAverage, NoAverage, WindowAverage


class Average:
    """The base: an average of named weights, made of `copies` copies of them; see the classes below."""

    copies = 1

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.names, self.params = list(params), list(params.values())
        device = self.params[0].device
        self.means = [[p.detach().clone() for p in self.params] for _ in range(self.copies)]
        self.counts = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(self.copies)]  # of updates
        self.position = 0

    def update(self, skip: Tensor) -> None:
        """Take in the weights after an update; `skip` (0-d bool, on the device): it was refused."""
        raise NotImplementedError

    def mean(self) -> list[Tensor]:
        """The average of every weight; before the first update, the weights at the start."""
        raise NotImplementedError

    def take(self) -> None:
        """Put the average in the place of the weights, for good."""
        _copy(self.params, self.mean())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the model has the average in the place of its weights; afterwards they are bitwise as before."""
        own = [p.data for p in self.params]
        try:
            for p, mean in zip(self.params, self.mean()):
                p.data = mean
            yield
        finally:
            for p, data in zip(self.params, own):
                p.data = data

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and numbers; weights by name."""
        means = [dict(zip(self.names, mean)) for mean in self.means]
        return {"kind": type(self).__name__, "means": means, "counts": self.counts, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> list[str]:
        """Load what `state_dict` returned; returns a line if it does not fit and the average starts from scratch."""
        if state is None or state["kind"] != type(self).__name__ or not self._fits(state["means"]):
            for mean in self.means:
                _copy(mean, self.params)
            return ["average of the weights: starts from scratch"]
        for mean, saved in zip(self.means, state["means"]):
            _copy(mean, [saved[name] for name in self.names])
        _copy(self.counts, state["counts"])
        self.position = state["position"]
        return []

    def _fits(self, saved: Sequence[Mapping[str, Tensor]]) -> bool:
        return all(n in part and part[n].shape == p.shape for part in saved for n, p in zip(self.names, self.params))

    def _take_in(self, i: int, weight: Tensor, skip: Tensor) -> None:
        """Move the i-th mean toward the weights by the share `weight` (0-d); not at all if the update was refused."""
        share = torch.where(skip, 0.0, weight).float()
        for mean, p in zip(self.means[i], self.params):
            mean.lerp_(p.detach(), share)


class Ema(Average):
    """The exponential average: the weights after update i of n count in proportion to decay^(n - i), those at the start not at all."""

    def __init__(self, params: Mapping[str, Tensor], settings: EmaAverage) -> None:
        super().__init__(params)
        self.decay = settings.decay

    def update(self, skip: Tensor) -> None:
        count = self.counts[0]
        count += ~skip
        self._take_in(0, (1 - self.decay) / (1 - self.decay**count), skip)

    def mean(self) -> list[Tensor]:
        return self.means[0]


class Window(Average):
    """The mean over at least `length`, and fewer than twice as many, of the last updates.

    It is the mean of the last whole block and of the block that has begun; so two copies of the weights are kept, not `length`. A block is
    `length` updates; refused ones take a place in it and no part in the mean.
    """

    copies = 2

    def __init__(self, params: Mapping[str, Tensor], settings: WindowAverage) -> None:
        super().__init__(params)
        self.length = settings.length

    def update(self, skip: Tensor) -> None:
        self.position += 1
        self.counts[1] += ~skip
        self._take_in(1, 1 / self.counts[1].clamp_min(1), skip)
        if self.position >= self.length:  # the block is whole, and the next one begins
            self.means.reverse()
            self.counts.reverse()
            self.counts[1].zero_()
            self.position = 0

    def mean(self) -> list[Tensor]:
        before, now = self.counts
        total = before + now
        share = torch.where(total > 0, now / total.clamp_min(1), 1.0).float()
        return [a.lerp(b, share) for a, b in zip(*self.means)]


def average_of(settings: NoAverage | EmaAverage | WindowAverage, model: nn.Module) -> Average | None:
    """The average of a model's weights that a configuration asks for; None if it asks for none."""
    params = dict(model.named_parameters())
    if isinstance(settings, EmaAverage):
        return Ema(params, settings)
    return Window(params, settings) if isinstance(settings, WindowAverage) else None


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources):
        target.copy_(source)
