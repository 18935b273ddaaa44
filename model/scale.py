"""Learned scales of normalised models."""

from __future__ import annotations

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
