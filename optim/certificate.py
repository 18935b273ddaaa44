"""How good a step was, and what it was made of: measured afterwards, in float64, whatever made the step and at whatever precision.
In training, this is done for watched steps only.

For tall W (m × n) on a manifold with Gram projector P, momentum G and a direction T, the step problem is

    maximise ⟨G, T⟩   subject to   ‖T‖₂ ≤ 1,   P(WᵀT + TᵀW) = 0.

A retraction deletes the normal part of T to first order, so only its tangent part counts; divided by its spectral norm (if that is
above 1) it is feasible. For every symmetric L = P(L) the dual value ‖G + 2WL‖_* is at least the optimum. So

    feas = ⟨G, tangent part⟩ / max(1, its norm) / least dual value found   ≤   what share of the optimum the step achieved.

What a manifold costs is seen in G itself. The step cannot follow the normal part of G, whose share of ‖G‖_F² is `normal_share`. The
columns w_j of W ask for other lengths by ⟨w_j, g_j⟩: the part of G along them has the share Σ_j (⟨w_j, g_j⟩ / ‖w_j‖)² / ‖G‖_F², the
`length_share`. That part is normal to Stiefel and Oblique, and tangent to DGram, which differs from Stiefel in nothing else. In it lies
what one factor for the whole of W would follow, the `size_share` (⟨W, G⟩ / ‖W‖_F / ‖G‖_F)². Of a random G, each share is near the
dimension of its space / (m n): n (n + 1)/2 normal ones for Stiefel, n (n - 1)/2 for DGram, n lengths, 1 size. [ours]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .linalg import column_norms, diagonal, effective_rank, frobenius, inner, ratio, su_step, symmetric_sum
from .manifolds import MANIFOLDS, Manifold, stacked

DUAL_STEPS, CONJUGATE_GRADIENTS = 4, 12
"""Su steps toward the least dual value, each of one eigendecomposition in n × n, and the iterations of each. The value is then .1 to 2%
above the optimum on recorded problems, up to an eighth on random ones of low rank."""


class Certificate(NamedTuple):
    """Of k steps, (k,) float64 each.

    tangency: ‖normal part of T‖_F / ‖T‖_F, 0 for a tangent T. norm: ‖tangent part‖₂. feas: at least this share of the optimum was
    achieved; 1 where G is zero, NaN where it is not finite. bound: the dual value, in the units of ⟨G, T⟩.
    normal_share, length_share, size_share: of ‖G‖_F², see above. momentum_top: σ_max² / Σσ² of G, the share of its largest singular
    direction. On oblique_gain, whose step problem has another momentum than G (`Manifold.problem`), bound, normal_share, momentum_top and
    momentum_rank are of that one. momentum_rank, step_rank: effective rank of G, and of the tangent part of T: from 1 to n; exp of the
    entropy of the singular values, as shares of their sum (Roy, Vetterli, EUSIPCO 2007). Those of G are 0 where G is zero, NaN where it is
    not finite.
    """

    tangency: Tensor
    norm: Tensor
    feas: Tensor
    bound: Tensor
    normal_share: Tensor
    length_share: Tensor
    size_share: Tensor
    momentum_top: Tensor
    momentum_rank: Tensor
    step_rank: Tensor


class StepProblem:
    """The step problem at tall W, G (k, m, n) in float64, G at ‖G‖_F = 1, and its dual in n × n: C = WᵀG, D = WᵀW, S = XᵀX."""

    def __init__(self, W: Tensor, G: Tensor, manifold: Manifold) -> None:
        W, G = W.double(), G.double()
        largest = G.abs().amax(dim=(-2, -1), keepdim=True)
        G = ratio(G, largest)
        self.scale = largest * frobenius(G)  # (k, 1, 1): ‖G‖_F in the caller's units
        self.W, self.G, self.manifold = W, ratio(G, frobenius(G)), manifold
        self.GG, self.C, self.D = self.G.mT @ self.G, W.mT @ self.G, W.mT @ W
        self.d = diagonal(self.D)

    def tangent(self, T: Tensor) -> Tensor:
        """The tangent part T - W K (k, m, n)."""
        return self.manifold.tangent(self.W, T)

    def least_squares(self) -> Tensor:
        """The L (k, n, n) for which G + 2WL is the tangent projection of G."""
        return -0.5 * self.manifold.normal(self.manifold.project(symmetric_sum(self.C)), self.d)

    def sign_at(self, L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """‖X‖_* (k, 1, 1) of X = G + 2WL; H = P(WᵀA + AᵀW) for A = sign(X), and Z = (XᵀX)^(-1/2), (k, n, n)."""
        DL = self.D @ L
        S = self.GG + 2 * symmetric_sum(L @ (self.C + DL))
        values, vectors = torch.linalg.eigh(S)
        sigma = values.clamp_min(0).sqrt()
        floor = 1e-7 * sigma.amax(-1, keepdim=True)  # what float64 resolves of a squared singular value
        Z = vectors @ (ratio(torch.ones_like(sigma), sigma.maximum(floor))[..., :, None] * vectors.mT)
        H = self.manifold.project(symmetric_sum((self.C + 2 * DL) @ Z))
        return sigma.sum(-1)[:, None, None], H, Z

    def su_step(self, H: Tensor, Z: Tensor, iterations: int = CONJUGATE_GRADIENTS) -> Tensor:
        """dL (k, n, n) with P(D dL Z + Z dL D) = -H/2, see optim.linalg.su_step."""
        return su_step(self.manifold.project, lambda L: self.D @ L, H, Z, self.d, iterations)

    def dual_value(self) -> Tensor:
        """The least ‖G + 2WL‖_* (k, 1, 1) over DUAL_STEPS over-relaxed Su steps from least squares: at least the optimum."""
        L = self.least_squares()
        least, H, Z = self.sign_at(L)
        for i in range(DUAL_STEPS if self.manifold.conditioned else 0):
            L = L + min(1.2 + 0.2 * i, 1.6) * self.su_step(H, Z)
            value, H, Z = self.sign_at(L)
            least = torch.minimum(least, torch.where(value.isfinite(), value, torch.inf))
        return least


def _singular_values(gram: Tensor) -> Tensor:
    """The roots (k, n), ascending, of the eigenvalues of Gram matrices (k, n, n)."""
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()


def _length_share(W: Tensor, G: Tensor) -> Tensor:
    """The share (k, 1, 1) of ‖G‖_F² that lies along the columns of W (k, m, n); 0 where G is zero."""
    along = ratio((W * G).sum(-2, keepdim=True), column_norms(W))  # (k, 1, n)
    return ratio(frobenius(along), frobenius(G)).square()


@torch.no_grad()
def certify(W: Tensor, G: Tensor, T: Tensor, manifold: str) -> Certificate:
    """How good the direction T is as a step at W along momentum G.

    Args:
        W, G, T: (m, n) or (k, m, n), any float dtype and orientation; W on the manifold.
        manifold: a name of MANIFOLDS.

    Where W or T of a matrix is not finite, all its numbers are NaN; where G is not, those that depend on G.

    Raises:
        ValueError: an unknown manifold, or other shapes.
    """
    if manifold not in MANIFOLDS:
        raise ValueError(f"unknown manifold {manifold!r}; choose one of {', '.join(MANIFOLDS)}")
    if not W.shape == G.shape == T.shape or W.ndim not in (2, 3):
        shapes = f"W {tuple(W.shape)}, G {tuple(G.shape)} and T {tuple(T.shape)}"
        raise ValueError(f"{shapes} must be equally shaped (m, n) or (k, m, n)")
    W, G, T = (stacked(X).double() for X in (W, G, T))
    sound = (W.isfinite() & T.isfinite()).all(dim=(-2, -1), keepdim=True)
    finite = G.isfinite().all(dim=(-2, -1), keepdim=True)
    W, T, G = torch.where(sound, W, 0), torch.where(sound, T, 0), torch.where(finite, G, 0)
    problem = StepProblem(*MANIFOLDS[manifold].problem(W, G))
    tangent = problem.tangent(T)
    tangency = ratio(frobenius(T - tangent), frobenius(T))
    taken, asked = _singular_values(tangent.mT @ tangent), _singular_values(problem.GG)  # (k, n)
    norm = taken[:, -1:, None]
    bound = problem.dual_value()
    value = inner(problem.G, tangent) / norm.clamp_min(1)
    feas = torch.where(bound > 0, ratio(value, bound), 1)
    normal_share = frobenius(problem.G - problem.tangent(problem.G)).square()  # of G at ‖G‖_F = 1
    size_share = ratio(inner(W, G), frobenius(W) * frobenius(G)).square()
    of_G = {
        "feas": feas,
        "bound": bound * problem.scale,
        "normal_share": normal_share,
        "length_share": _length_share(W, G),
        "size_share": size_share,
        "momentum_top": asked[:, -1:, None].square(),
        "momentum_rank": effective_rank(asked)[:, None, None],
    }
    of_G = {name: torch.where(finite, x, torch.nan) for name, x in of_G.items()}
    found = Certificate(tangency=tangency, norm=norm, step_rank=effective_rank(taken)[:, None, None], **of_G)
    return Certificate(*(torch.where(sound, x, torch.nan).flatten() for x in found))
