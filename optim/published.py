"""The published Manifold Muon step (arXiv 2606.13276 and its code), batched: the step rule of `optim=paper`.

    Lam = -(1/4) P(WᵀG + GᵀW)
    repeat K times, k = 0..K-1:   A = msign(G + 2 W P(sym Lam));   H = P(WᵀA + AᵀW);   Lam -= alpha (1 - k/K) H
    W   = retract(W - eta A)

The published loop stops early when the root mean square of H is below 1e-6. In bfloat16 that never happens, and asking costs a host
sync a step, so the test is left out; everything else is as published, including what optim/lmo.py improves on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.manifold_muon import Stack
from optim.manifolds import MANIFOLDS, Manifold, Polar
from optim.msign import msign


def dual_ascent(W: Tensor, G: Tensor, manifold: Manifold, steps: int, alpha: float, msign: Polar) -> Tensor:
    """The published approximate answer of  max ⟨G, A⟩, ‖A‖₂ ≤ 1, P(WᵀA + AᵀW) = 0.

    Args:
        W, G: (k, m, n) tall, float32: points of the manifold and their momentum.
        steps, alpha: K dual steps of size alpha (1 - k/K); the paper takes 20 and 0.1.
        msign: the matrix sign; the paper takes ten Polar Express steps in bfloat16.

    Returns:
        A (k, m, n) float32.
    """
    C = W.mT @ G
    Lam = -0.25 * manifold.gram_project(C + C.mT)
    A = G
    for k in range(steps):
        # Lam stays symmetric and in the range of P, so that sym and P of the published line leave it as it is.
        A = msign(torch.baddbmm(G, W, Lam, alpha=2)).float()
        Lam = Lam - alpha * (1 - k / steps) * manifold.tangency(W, A)
    return A


@dataclass(frozen=True)
class PublishedStep:
    """The published update, stack by stack; all settings as in arXiv 2606.13276.

    dual_steps, alpha: see `dual_ascent`.  msign_steps, msign_dtype: the matrix sign, also inside the Stiefel retraction.
    decay_manifolds: whether weight decay also shrinks weights on a manifold, which the published code leaves out; it acts on DGram's
    column norms alone, the other retractions undo it. [ours, off]
    """

    dual_steps: int
    alpha: float
    msign_steps: int
    msign_dtype: torch.dtype
    decay_manifolds: bool = False

    keeps_dual: ClassVar[bool] = False
    certifies: ClassVar[bool] = False
    certificates: ClassVar[tuple[()]] = ()

    def polar(self, X: Tensor) -> Tensor:
        """The matrix sign (k, m, n) in the rule's dtype."""
        return msign(X, self.msign_steps, self.msign_dtype)

    def init(self, W: Tensor, manifold: str) -> Tensor:
        """W (..., m, n) brought onto the manifold by the published retraction."""
        return MANIFOLDS[manifold].init(W, self.polar)

    def flops(self, m: int, n: int, manifold: str) -> float:
        """Operations (two a multiply-add) of one step of one (m, n) matrix: matrix signs, the products between them, the retraction.

        The sorted-SVD retraction is counted as 14 m n² + 8 n³ (Golub and Van Loan, Matrix Computations, 8.6, R-SVD), any other as
        elementwise.
        """
        sign = self.msign_steps * (4 * m * n**2 + 2 * n**3)
        if manifold == "euclidean":
            return sign
        retraction = {"stiefel": sign, "dgram": 14 * m * n**2 + 8 * n**3}.get(manifold, 3 * m * n)
        return self.dual_steps * (sign + 4 * m * n**2) + retraction

    def __call__(self, stacks: list[Stack]) -> list[Tensor]:
        """New weights, one (k, m, n) for each stack. Decay is decoupled and, as published, for unconstrained matrices only."""
        return [self.update(s.W, s.G, s.manifold, s.eta, s.weight_decay) for s in stacks]

    def update(self, W: Tensor, G: Tensor, manifold: str, eta: Tensor, weight_decay: float) -> Tensor:
        """New weights (k, m, n) from tall W, G (k, m, n) float32 and the 0-d learning rate eta."""
        if manifold == "euclidean":
            return W * (1 - eta * weight_decay) - eta * self.polar(G).float()
        M = MANIFOLDS[manifold]
        A = dual_ascent(W, G, M, self.dual_steps, self.alpha, self.polar)
        kept = W * (1 - eta * weight_decay) if self.decay_manifolds else W
        return M.retract(kept - eta * A, self.polar)
