"""A point of a manifold as the certified step sees it: its columns at unit length, and their lengths apart.

So nothing overflows where lengths differ. The legend is that of optim/certified.py.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .linalg import Products, column_norms, over, symmetric_sum
from .manifolds import Manifold


class Frame(NamedTuple):
    """W as U = W/c (k, m, n) and c (k, n, 1), with UU = UᵀU (k, n, n), or None where that is I because columns are orthogonal."""

    manifold: Manifold
    U: Tensor
    c: Tensor
    UU: Tensor | None

    @property
    def d(self) -> Tensor:
        """diag(WᵀW) as (k, n)."""
        return self.c.squeeze(-1).square()

    def times_gram(self, cL: Tensor, mm: Products) -> Tensor:
        """UᵀU cL (k, n, n)."""
        return cL if self.UU is None else mm(self.UU, cL)

    def metric(self, L: Tensor, mm: Products) -> Tensor:
        """WᵀW L (k, n, n)."""
        return self.d[:, :, None] * L if self.UU is None else self.c * mm(self.UU, self.c * L)

    def tangency(self, N: Tensor) -> Tensor:
        """H = P(WᵀA + AᵀW) (k, n, n) from N = UᵀA."""
        return self.manifold.project(symmetric_sum(self.c * N))

    def normal(self, N: Tensor) -> Tensor:
        """cK (k, n, n), where U·cK = W K is the normal part of A, from N = UᵀA."""
        return (self.c * self.manifold.normal(self.tangency(N), self.d)).to(N.dtype)


def frame_of(W: Tensor, manifold: Manifold, mm: Products) -> Frame:
    """The frame of W (k, m, n) float32 on its manifold; U and UU in the precision of the products."""
    if manifold.unit_columns:
        U, c = W, W.new_ones(W.size(0), W.size(-1), 1)
    else:
        lengths = column_norms(W)  # (k, 1, n)
        U, c = over(W, lengths), lengths.mT
    U = U.to(mm.dtype)
    return Frame(manifold, U, c, None if manifold.orthogonal else mm(U.mT, U))
