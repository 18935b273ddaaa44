"""The published Manifold Muon step (arXiv 2606.13276 and its code), batched: the step rule of `optim=paper`.

    Lam = -(1/4) P(WᵀG + GᵀW)
    repeat K times, k = 0..K-1:   A = msign(G + 2 W P(sym Lam));   H = P(WᵀA + AᵀW);   Lam -= alpha (1 - k/K) H
    W   = retract(W - eta A)

K, alpha and the number of Polar Express steps are those of the paper's code; its text does not give them. Where the root mean square of H
falls below 1e-6, which in bfloat16 it never does, the published loop ends with this A; here the matrix keeps it.

Rounding to bfloat16 decides much of A. So sums and products are made in the order of the published code. On a CPU with one thread, what was
recorded from that code with its settings comes out bitwise (tests/test_published.py). What differs stands at the head of
configs/optim/paper.yaml.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from .iterators import SAFETY, Iteration, polar_express_coefficients
from .linalg import diagonal, frobenius, ratio
from .manifolds import MANIFOLDS, Manifold, Polar, stacked, unstacked
from .msign import iterate
from .stack import Moved, Stack

SETTLED = 1e-6  # root mean square of H below which the published dual ascent ends


def published_sign(X: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Polar factor of every matrix of X (..., m, n) by Polar Express in `dtype`, with the roundings of the published code; zero for zero X.

    Each step is Y ← (aI + (bI + cS) S) Y with S = YYᵀ. `optim.msign.iterate` makes the same step with fewer roundings: in bfloat16 its
    error is one half to two thirds of this one's (tests/test_msign.py). The recorded numbers of the published code are those without the
    1e-7 that some versions of the algorithm add to the norm.
    """
    upright = X.size(-2) > X.size(-1)
    Y = X.to(dtype)
    Y = Y.mT if upright else Y
    Y = ratio(Y, torch.linalg.vector_norm(Y, dim=(-2, -1), keepdim=True) * SAFETY)
    for a, b, c in polar_express_coefficients(steps):
        S = Y @ Y.mT
        P = c * S
        diagonal(P).add_(b)
        P = P @ S
        diagonal(P).add_(a)
        Y = P @ Y
    return Y.mT if upright else Y


def dual_ascent(W: Tensor, G: Tensor, manifold: Manifold, steps: int, alpha: float, sign: Polar) -> Tensor:
    """The published approximate answer of  max ⟨G, A⟩, ‖A‖₂ ≤ 1, P(WᵀA + AᵀW) = 0.

    Args:
        W, G: (k, m, n) tall, float32: points of the manifold and their momentum.
        steps, alpha: K dual steps of size alpha (1 - k/K); the paper's code takes 20 and 0.1.
        sign: the matrix sign; the paper's code takes ten Polar Express steps in bfloat16.

    Returns:
        A (k, m, n) float32.
    """
    C = W.mT @ G
    Lam = -0.25 * manifold.project(C + C.mT)
    A = G
    settled = torch.zeros(len(W), 1, 1, dtype=torch.bool, device=W.device)
    for k in range(steps):
        # Lam stays symmetric and in the range of P, so that sym and P of the published line leave it as it is.
        A = torch.where(settled, A, sign(torch.baddbmm(G, W, Lam, alpha=2)).float())
        H = manifold.tangency(W, A)
        settled = frobenius(H) / W.size(-1) < SETTLED
        Lam = Lam - alpha * (1 - k / steps) * H
    return A


def sorted_svd(W: Tensor) -> Tensor:
    """The published retraction of DGram: (U Vᵀ)·diag(S) for W = U S Vᵀ (k, m, n) tall, S descending.

    The singular values become the lengths of the columns. It moves a point of the manifold unless its lengths already descend.
    """
    if W.is_cuda:
        return sorted_by_eigenvalues(W)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U @ Vh @ torch.diag_embed(S)


def sorted_by_eigenvalues(W: Tensor) -> Tensor:
    """The same from the eigenvalues of WᵀW in float64, since a GPU takes tenths of a second for an SVD.

    Equal to that of an SVD in float64, to 1e-5 for condition numbers up to 1e5.
    """
    values, V = torch.linalg.eigh(W.double().mT @ W.double())  # (k, n), ascending
    S = values.clamp_min(0).sqrt()
    inverse = (1 / S).where(S.gt(1e-7 * S[:, -1:]), 0)
    UV = W.double() @ (V @ (inverse[:, :, None] * V.mT))  # (k, m, n) = U Vᵀ
    return (UV * S.flip(-1)[:, None, :]).to(W.dtype)


RETRACTIONS = ("sorted_svd", "manifold")


@dataclass(frozen=True)
class PublishedStep:
    """The published update, stack by stack; all settings as in the code of arXiv 2606.13276.

    dual_steps, alpha: see `dual_ascent`.  msign_steps, msign_dtype: the matrix sign, also inside the Stiefel retraction.
    iterator: another matrix sign in its place, everywhere; it has its own number of steps. [ours, off]
    decay_manifolds: whether weight decay also shrinks weights on a manifold, which the published code leaves out: it shortens DGram's
    columns; elsewhere the retraction makes a longer step of it. [ours, off]
    retraction: of manifolds whose columns have free lengths (DGram): "sorted_svd", as published, or "manifold", the class's own. [ours]

    Raises:
        ValueError: an impossible number, an unknown retraction, or an iterator that diverges in this dtype.
    """

    dual_steps: int
    alpha: float
    msign_steps: int
    msign_dtype: torch.dtype
    decay_manifolds: bool = False
    retraction: str = "sorted_svd"
    iterator: Iteration | None = None

    def __post_init__(self) -> None:
        for name, steps in (("dual_steps", self.dual_steps), ("msign_steps", self.msign_steps)):
            if not (isinstance(steps, int) and steps > 0):
                raise ValueError(f"{name} is {steps!r}; give a whole number of steps from 1 on")
        if not (isinstance(self.alpha, Real) and 0 < self.alpha < math.inf):
            raise ValueError(f"alpha is {self.alpha!r}; give a number above 0")
        if self.retraction not in RETRACTIONS:
            raise ValueError(f"unknown retraction {self.retraction!r}; choose one of {', '.join(RETRACTIONS)}")
        if self.iterator:
            self.iterator.require(self.msign_dtype)

    def describe(self, device: torch.device) -> str:
        """What a person should know of the rule, in one line."""
        steps = len(self.iterator.coefficients) if self.iterator else self.msign_steps
        kind = "chosen" if self.iterator else "Polar Express"
        sign = f"{steps} {kind} steps in {str(self.msign_dtype).removeprefix('torch.')}"
        return f"published step, {self.dual_steps} dual steps, {sign}, {self.retraction} retraction of DGram"

    def polar(self, X: Tensor) -> Tensor:
        """The matrix sign (k, m, n) in the rule's dtype."""
        if self.iterator:
            return iterate(X, self.iterator.coefficients, self.iterator.margin, self.msign_dtype)
        return published_sign(X, self.msign_steps, self.msign_dtype)

    def retract(self, V: Tensor, manifold: Manifold) -> Tensor:
        """The retraction of tall V (k, m, n) onto the manifold."""
        if manifold.free_lengths and self.retraction == "sorted_svd":
            return sorted_svd(V)
        return manifold.retract(V, self.polar)

    def init(self, W: Tensor, manifold: str) -> Tensor:
        """W (..., m, n), any orientation, brought onto the manifold by the same retraction."""
        return unstacked(self.retract(stacked(W), MANIFOLDS[manifold]), W).to(W.dtype)

    def __call__(self, stack: Stack) -> Moved:
        """The step of a stack. Decay is decoupled and, as published, not for manifolds with a Gram condition (but see decay_manifolds).

        Raises:
            ValueError: the stack asks for `whole` or `refine`.
        """
        refused = [name for name, given in (("whole", stack.whole), ("refine", stack.refine)) if given is not None]
        if refused:
            raise ValueError(f"the published step has no {' and no '.join(refused)}; take the certified step")
        W, A = self.update(stack.W, stack.G, MANIFOLDS[stack.manifold], stack.eta, stack.weight_decay)
        skip = stack.skip.view(-1, 1, 1)
        scale = torch.where(skip, 0, W.new_ones(len(W), 1, 1))
        no = torch.zeros_like(stack.level, dtype=torch.bool)
        return Moved(torch.where(skip, stack.W, W), A, scale, stack.level, no)

    def update(
        self, W: Tensor, G: Tensor, manifold: Manifold, eta: Tensor, weight_decay: float
    ) -> tuple[Tensor, Tensor]:
        """The new weight, and A, of tall W, G (k, m, n) float32 at the 0-d learning rate eta."""
        shrink = 1 - eta * weight_decay
        point, momentum, gram_manifold = manifold.problem(W, G)
        if manifold.conditioned:
            A = dual_ascent(point, momentum, gram_manifold, self.dual_steps, self.alpha, self.polar)
        else:
            A = self.polar(momentum).float()
        if not manifold.gram_space:
            return manifold.move(W, G, A, eta, shrink), A
        kept = W * shrink if self.decay_manifolds else W
        return self.retract(kept - eta * A, manifold), A
