"""Manifolds of tall matrices, described by their Gram matrix WᵀW.

A Gram-space manifold is given by a linear self-adjoint projector P on symmetric matrices: the manifold fixes P(WᵀW), so A is tangent
at W when P(WᵀA + AᵀW) = 0 and the normal space is {W K : K = P(K) symmetric}.

    euclidean   P = 0            every matrix
    stiefel     P = identity     WᵀW = I: orthonormal columns
    dgram       P = off-diagonal WᵀW diagonal: orthogonal columns of any length
    oblique     P = diagonal     diag(WᵀW) = 1: columns of unit length

Source: Gram-space Manifold Muon (Keigwin, Pai, Chen; tilderesearch.com/vignettes/gram-space) and arXiv 2606.13276. Every method takes
(..., m, n); a wide matrix is treated as its transpose, here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Polar = Callable[[Tensor], Tensor]
"""A function (..., m, n) → (..., m, n), tall, that returns the polar factor of its argument to its own accuracy."""

DGRAM_RETRACTIONS = ("sorted_svd", "column_norms")


def is_wide(W: Tensor) -> bool:
    """True when W (..., m, n) has fewer rows than columns."""
    return W.size(-2) < W.size(-1)


def tall(W: Tensor) -> Tensor:
    """W (..., m, n) as a view with at least as many rows as columns."""
    return W.mT if is_wide(W) else W


def like(tall_result: Tensor, W: Tensor) -> Tensor:
    """Undo `tall`: the result for tall(W), in the orientation of W."""
    return tall_result.mT if is_wide(W) else tall_result


def polar(X: Tensor) -> Tensor:
    """Exact polar factor U Vᵀ of every matrix of X (..., m, n), by SVD, in X's dtype (float32 at least)."""
    U, _, Vh = torch.linalg.svd(X if X.dtype == torch.float64 else X.float(), full_matrices=False)
    return U @ Vh


class Manifold:
    """Euclidean space, and the base of the others. Stateless: methods are pure functions of their tensors."""

    name = "euclidean"

    def gram_project(self, S: Tensor) -> Tensor:
        """P(S) of symmetric S (..., n, n): the part of the Gram matrix that the manifold fixes."""
        return torch.zeros_like(S)

    def target(self, gram: Tensor) -> Tensor:
        """The value (..., n, n) that P(WᵀW) has on the manifold."""
        return torch.zeros_like(gram)

    def retract(self, W: Tensor, polar: Polar = polar) -> Tensor:
        """A point of the manifold near W (..., m, n), in W's dtype. `polar` decides accuracy and cost."""
        return like(self._retract(tall(W), polar), W).to(W.dtype)

    def init(self, W: Tensor, polar: Polar = polar) -> Tensor:
        """W (..., m, n) brought onto the manifold, to start from; the retraction itself, as published."""
        return self.retract(W, polar)

    def residual(self, W: Tensor) -> Tensor:
        """Distance (...,) from the manifold: ‖P(WᵀW) - target‖_F relative to ‖WᵀW‖_F."""
        T = tall(W if W.dtype == torch.float64 else W.float())
        gram = T.mT @ T
        gap = self.gram_project(gram) - self.target(gram)
        return torch.linalg.matrix_norm(gap) / torch.linalg.matrix_norm(gram)

    def tangency(self, W: Tensor, A: Tensor) -> Tensor:
        """H = P(WᵀA + AᵀW) (..., n, n), zero exactly when A is tangent at W."""
        C = tall(W).mT @ tall(A)
        return self.gram_project(C + C.mT)

    def _retract(self, W: Tensor, polar: Polar) -> Tensor:
        return W


class Stiefel(Manifold):
    """WᵀW = I. The polar retraction is the nearest point."""

    name = "stiefel"

    def gram_project(self, S: Tensor) -> Tensor:
        return S

    def target(self, gram: Tensor) -> Tensor:
        return torch.eye(gram.size(-1), dtype=gram.dtype, device=gram.device).expand_as(gram)

    def _retract(self, W: Tensor, polar: Polar) -> Tensor:
        return polar(W)


class DGram(Manifold):
    """WᵀW diagonal.

    `retraction` chooses between
      sorted_svd    (U Vᵀ)·diag(S), as published: the singular values, in descending order, become the column norms. It moves a point
                    of the manifold unless its column norms already descend.
      column_norms  polar(W/c)·c with c the column norms of W: the identity on the manifold, and as accurate to first order. [ours]
    """

    name = "dgram"

    def __init__(self, retraction: str = "sorted_svd") -> None:
        if retraction not in DGRAM_RETRACTIONS:
            raise ValueError(f"unknown DGram retraction {retraction!r}; choose one of {', '.join(DGRAM_RETRACTIONS)}")
        self.retraction = retraction

    def gram_project(self, S: Tensor) -> Tensor:
        return S - torch.diag_embed(torch.diagonal(S, dim1=-2, dim2=-1))

    def _retract(self, W: Tensor, polar: Polar) -> Tensor:
        if self.retraction == "sorted_svd":
            # The published code takes both factors from one SVD in float32, whatever msign's dtype.
            U, S, Vh = torch.linalg.svd(W if W.dtype == torch.float64 else W.float(), full_matrices=False)
            return (U @ Vh) * S.unsqueeze(-2)
        c = torch.linalg.vector_norm(W, dim=-2, keepdim=True)
        # A zero column has no direction: it stays zero instead of turning into NaN.
        return polar(W / c.clamp_min(torch.finfo(W.dtype).tiny)) * c


class Oblique(Manifold):
    """diag(WᵀW) = 1: columns of the tall form on the unit sphere."""

    name = "oblique"

    def gram_project(self, S: Tensor) -> Tensor:
        return torch.diag_embed(torch.diagonal(S, dim1=-2, dim2=-1))

    def target(self, gram: Tensor) -> Tensor:
        return torch.eye(gram.size(-1), dtype=gram.dtype, device=gram.device).expand_as(gram)

    def _retract(self, W: Tensor, polar: Polar) -> Tensor:
        return W / torch.linalg.vector_norm(W, dim=-2, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)


MANIFOLDS: dict[str, Manifold] = {m.name: m for m in (Manifold(), Stiefel(), DGram(), Oblique())}
"""The manifolds by the name that an assignment uses; DGram here retracts as published."""
