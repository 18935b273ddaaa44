"""Vectors kept at unit length after every step: the weights of nGPT (arXiv 2410.01131, section 2.6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class UnitNorm:
    """Keeps the vectors of matrices at unit length; called once at construction and after every optimizer step.

    It reads nothing but the weights, so ranks that hold equal weights before hold equal ones after.

    Args:
        matrices: pairs of a parameter (m, n) and the dimension along which its vectors lie: 1 for rows, 0 for columns.
    """

    def __init__(self, matrices: Sequence[tuple[Tensor, int]]) -> None:
        self.matrices = list(matrices)
        self()

    @torch.no_grad()
    def __call__(self, skip: Tensor | None = None) -> None:
        """Scale every vector to unit length; a zero vector stays zero. Where `skip` (0-d bool, on the device) is true, nothing changes.

        Scaling a vector again changes its last bits.
        """
        for W, dim in self.matrices:
            length = torch.linalg.vector_norm(W, dim=dim, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
            W.div_(length if skip is None else torch.where(skip, 1, length))
