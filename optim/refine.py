"""What is done to the direction of a step before it is taken: rows brought to equal size over time, and the cautious mask.

Both keep ‖T‖_F, so that a run with them is not a run with longer steps. Both leave the tangent space and the unit ball of the step problem;
the result is projected back onto tangents, and its spectral norm may be above 1. The certificate of such a step says what it gave up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .linalg import frobenius, over
from .manifolds import Manifold

FLOOR = 1e-8  # added to the root mean square of a row, so that a row that never moved stays still


class Refine(NamedTuple):
    """The refinements of one stack.

    gradient: (k, m, n) of this step, tall, without momentum, for the cautious mask; None: no mask.
    row_squares: (k, rows) float32, mean square of each row of the directions so far; None: rows are not normalised. beta: its decay.
    wide: whether rows of the parameter are columns of the stack.
    """

    gradient: Tensor | None
    row_squares: Tensor | None
    beta: float
    wide: bool

    def __call__(self, T: Tensor, W: Tensor, manifold: Manifold) -> tuple[Tensor, Tensor | None]:
        """The refined direction (k, m, n) float32 of T at W, and the `row_squares` that hold if it is taken.

        Rows (NorMuon, arXiv 2510.05491): T_i ← T_i / √s_i with s ← beta·s + (1 - beta)·mean of squares of row i.
        Mask (cautious optimizers, arXiv 2411.16085): entries whose sign is against the gradient's become 0; the source then divides by the
        share that is left, here ‖T‖_F is kept. [ours]
        """
        T = T.float()
        size, row_squares = frobenius(T), self.row_squares
        if row_squares is not None:
            rows = T.square().mean(-2 if self.wide else -1)  # (k, rows)
            row_squares = self.beta * row_squares + (1 - self.beta) * rows
            T = T / (row_squares.sqrt() + FLOOR).unsqueeze(-2 if self.wide else -1)
        if self.gradient is not None:
            T = torch.where(T.sign() == self.gradient.sign(), T, 0)  # a product of small numbers would be 0
        if manifold.conditioned:
            T = manifold.tangent(W, T)
        return over(T, frobenius(T)) * size, row_squares
