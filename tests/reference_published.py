"""Manifold Muon one matrix at a time, as the maths says it: the oracle of the tests, never of a run.

Nothing here is batched, fused or fast. `optim/published.py` and `optim/manifold_muon.py` must agree with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optim.iterators import polar_express_coefficients


def reference_msign(X: Tensor, steps: int) -> Tensor:
    """Polar Express applied to the singular values of X (m, n), in X's dtype: U p(S/(1.01 ‖S‖)) Vᵀ."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    s = S / (S.norm() * 1.01)
    for a, b, c in polar_express_coefficients(steps):
        s = a * s + b * s**3 + c * s**5
    return U @ torch.diag(s) @ Vh


def published_sign(X: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """The matrix sign of X (m, n) with the roundings of the published code."""
    if X.size(0) > X.size(1):
        return published_sign(X.T, steps, dtype).T
    Y = X.to(dtype)
    Y = Y / (Y.norm() * 1.01)
    for a, b, c in polar_express_coefficients(steps):
        S = Y @ Y.T
        inner = c * S
        inner.diagonal().add_(b)
        outer = inner @ S
        outer.diagonal().add_(a)
        Y = outer @ Y
    return Y


def project(S: Tensor, manifold: str) -> Tensor:
    """P(S) of a symmetric (n, n) matrix."""
    diagonal = torch.diag(torch.diag(S))
    return {"stiefel": S, "dgram": S - diagonal, "oblique": diagonal, "euclidean": torch.zeros_like(S)}[manifold]


def retract(W: Tensor, manifold: str, msign_dtype: torch.dtype) -> Tensor:
    """The published retraction of a tall W (m, n)."""
    if manifold == "stiefel":
        return published_sign(W, 10, msign_dtype).to(W.dtype)
    if manifold == "dgram":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U @ Vh @ torch.diag(S)
    return W / W.norm(dim=0) if manifold == "oblique" else W


def published_direction(
    W: Tensor,
    G: Tensor,
    manifold: str,
    *,
    steps: int = 20,
    alpha: float = 0.1,
    msign_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """A (m, n) of the published dual ascent at tall W, G (m, n)."""
    Lam = -project(W.T @ G + G.T @ W, manifold) / 4
    A = torch.zeros_like(G)
    for k in range(steps):
        A = published_sign(G + 2 * W @ project((Lam + Lam.T) / 2, manifold), 10, msign_dtype).to(G.dtype)
        H = project(W.T @ A + A.T @ W, manifold)
        if H.square().mean().sqrt() < 1e-6:
            break
        Lam = Lam - alpha * (1 - k / steps) * H
    return A


def published_muon(
    W: Tensor,
    gradients: list[Tensor],
    manifold: str,
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    msign_dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """The weights after each published optimizer step with the given gradients; W and gradients (m, n), any orientation."""
    if W.size(0) < W.size(1):
        flipped = published_muon(
            W.T,
            [g.T for g in gradients],
            manifold,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            msign_dtype=msign_dtype,
        )
        return [w.T for w in flipped]
    buffer, after = torch.zeros_like(W), []
    for g in gradients:
        buffer = momentum * buffer + g
        G = g + momentum * buffer  # Nesterov
        if manifold == "euclidean":
            W = (1 - lr * weight_decay) * W - lr * published_sign(G, 10, msign_dtype).to(W.dtype)
        else:
            W = retract(W - lr * published_direction(W, G, manifold, msign_dtype=msign_dtype), manifold, msign_dtype)
        after.append(W)
    return after
