"""Learned scales: how they are stored, which modules have them, and their statistics by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class StoredScale(nn.Module):
    """A learned vector s = weight · init/stored: s starts at `init`, and the parameter that the optimizer updates starts at `stored`.

    Adam moves every parameter by about its learning rate, so `stored` sets how fast s changes: by lr · init/stored
    a step (nGPT, arXiv 2410.01131, section 2.5).

    Args:
        size: number of entries. init: the value at the start. stored: value of the parameter at the start, above 0.
    """

    def __init__(self, size: int, init: float, stored: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), float(stored)))
        self.ratio = init / stored

    def forward(self) -> Tensor:
        """(size,) float32."""
        return self.weight * self.ratio


class Scaled(nn.Module):
    """A module that has learned scales of its own."""

    def scales(self) -> dict[str, Tensor]:
        """Name → values, of any shape, that act in the forward pass; not those that are stored."""
        raise NotImplementedError


Scales = Mapping[str, Tensor | Sequence[Tensor]]
"""Name → the values in each layer, or one tensor for a scale of the whole model."""


@torch.no_grad()
def scale_statistics(scales: Scales) -> dict[str, dict[str, float | list[float]]]:
    """Name → `mean`, `deviation`, `least` and `greatest` of the entries: a number for each layer, or one number for the whole model.

    deviation: the standard deviation over the entries of a layer (divided by their number, so it is 0 for a single entry).
    """
    found: dict[str, dict[str, float | list[float]]] = {}
    for name, values in scales.items():
        rows = values.reshape(1, -1) if isinstance(values, Tensor) else torch.stack([v.reshape(-1) for v in values])
        rows = rows.double()  # (L, n)
        numbers = {
            "mean": rows.mean(1),
            "deviation": rows.std(1, correction=0),
            "least": rows.amin(1),
            "greatest": rows.amax(1),
        }
        lists = {key: value.tolist() for key, value in numbers.items()}
        found[name] = {key: v[0] for key, v in lists.items()} if isinstance(values, Tensor) else {**lists}
    return found
