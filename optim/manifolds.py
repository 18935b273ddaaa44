"""Manifolds of tall matrices, described by their Gram matrix WᵀW: one class a manifold, which owns all its geometry.

A Gram-space manifold is given by a linear self-adjoint projector P on symmetric matrices and the value that it fixes, P(WᵀW) = target.
A is tangent at W when P(WᵀA + AᵀW) = 0, and the normal space is {W K : K = P(K) symmetric}.

    euclidean   P = 0            every matrix
    stiefel     P = identity     WᵀW = I: orthonormal columns
    dgram       P = off-diagonal WᵀW diagonal: orthogonal columns of any length
    oblique     P = diagonal     diag(WᵀW) = 1: columns of unit length
    hyperball   P = mean of diag ‖W‖_F² = n: the length that n unit columns have together

Other sets of matrices have no such projector. Their step problem is that of a Gram-space manifold at another point (`Manifold.problem`), and
they say where a step leads (`Manifold.move`):

    spectral_ball    ‖W‖₂ ≤ 1      Muon's direction, then the nearest point of the ball
    spectral_sphere  ‖W‖₂ = 1      orthogonal to u vᵀ, the largest singular pair; then W/‖W‖₂
    oblique_gain     every matrix  unit columns as in oblique, times a gain each that moves by itself

Source: Gram-space Manifold Muon (Keigwin, Pai, Chen; tilderesearch.com/vignettes/gram-space) and arXiv 2606.13276.

Everything takes (..., m, n), but for `move`, which takes tall (k, m, n). `retract`, `distance`, `tangency` and `tangent` take any
orientation: a wide matrix is treated as its transpose. Both step rules know a manifold by this class alone. To add one, write its class and put an object of it into MANIFOLDS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from .iterators import SAFETY, Iteration, polar_express_coefficients
from .linalg import (
    Products,
    at_least_float32,
    column_norms,
    diagonal,
    exact_sums,
    eye_like,
    frobenius,
    gram_stage,
    ratio,
    sign_coefficients,
    top_pair,
    without_diagonal,
)
from .msign import iterate, msign

Polar = Callable[[Tensor], Tensor]
"""A function (..., m, n) → (..., m, n), tall, that returns the polar factor of its argument to its own accuracy."""


def is_wide(W: Tensor) -> bool:
    """True when W (..., m, n) has fewer rows than columns."""
    return W.size(-2) < W.size(-1)


def tall(W: Tensor) -> Tensor:
    """W (..., m, n) as a view with at least as many rows as columns."""
    return W.mT if is_wide(W) else W


def like(tall_result: Tensor, W: Tensor) -> Tensor:
    """Undo `tall`: the result for tall(W), in the orientation of W."""
    return tall_result.mT if is_wide(W) else tall_result


def stacked(W: Tensor) -> Tensor:
    """W (..., m, n), of any orientation, as a stack of tall matrices (k, m, n)."""
    return tall(W).reshape(-1, *tall(W).shape[-2:])


def unstacked(stack: Tensor, W: Tensor) -> Tensor:
    """Undo `stacked`: the result for stacked(W), in the shape of W."""
    return like(stack.reshape(tall(W).shape), W)


def polar(X: Tensor) -> Tensor:
    """Polar factor U Vᵀ of every matrix of X (..., m, n), in X's dtype, float32 at least.

    By SVD on a CPU. An SVD takes tenths of a second on a GPU: there 16 Polar Express steps in float32, which leave singular values below
    1e-6·‖X‖_F short of 1.
    """
    X = at_least_float32(X)
    if X.is_cuda:
        return msign(X, 16, X.dtype, lower=1e-6)
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def spectral_norm(W: Tensor) -> Tensor:
    """‖W‖₂ (..., 1, 1) of W (..., m, n), in W's dtype, float32 at least.

    By SVD on a CPU; on a GPU, where that takes tenths of a second and makes the host wait, by `top_pair`.
    """
    W = at_least_float32(W)
    return top_pair(tall(W))[1] if W.is_cuda else torch.linalg.matrix_norm(W, 2, keepdim=True)


@dataclass(frozen=True)
class Effort:
    """What the certified step (optim/certified.py) spends on a manifold, and how. Measured on recorded problems: `bench.py lmo`.

    su: Su steps that improve the multiplier before the sign; preconditioned as if the columns of W were orthogonal.
    su_steps, su_lower: quintics and lower end of the smoothed inverse root inside a Su step.
    conjugate_gradients, relaxation: how exactly a Su step is solved, and how much of it is taken.
    stages, lower: of the matrix sign, see optim.linalg.matrix_sign.
    iterator: of the sign of an unconstrained matrix, in place of `stages` and `lower`.
    caps, cap_degree: rounds that lower singular values above 1, at least one, and their degree in TᵀT.
    cap_relaxation: a round makes about σ + cap_relaxation·(1 - σ) of a singular value σ above 1.
    """

    su: int = 0
    su_steps: int = 3
    su_lower: float = 0.03
    conjugate_gradients: int = 0
    relaxation: float = 1.0
    stages: tuple[int, ...] = (2, 3)
    lower: float = 3e-3
    iterator: Iteration | None = None
    caps: int = 1
    cap_degree: int = 2
    cap_relaxation: float = 1.4


class Manifold:
    """What both step rules ask of a manifold. Stateless: methods are pure functions of their tensors.

    A subclass gives `project`, `normal` and `_retract`.
    """

    name: ClassVar[str]
    orthogonal: ClassVar[bool] = False  # WᵀW is diagonal at every point
    unit_columns: ClassVar[bool] = False  # diag(WᵀW) = 1 at every point
    gram_space: ClassVar[bool] = True  # its points fulfil P(WᵀW) = target; else `move` says where a step leads
    conditioned: ClassVar[bool] = True  # directions fulfil a condition: they are tangent
    sized: ClassVar[bool] = True  # its matrices have a fixed size, which a radius R scales: W / R is on the manifold
    free_lengths: ClassVar[bool] = False  # lengths of columns are free: weight decay and a cap act on them
    moves_zero: ClassVar[bool] = True  # a step moves a zero matrix
    decays: ClassVar[bool] = False  # weight decay moves its matrices, by the certified step
    efforts: ClassVar[Mapping[str, Effort]] = {"default": Effort(), "high": Effort(caps=2, cap_degree=4)}

    def project(self, S: Tensor) -> Tensor:
        """P(S) of symmetric S (..., n, n): the part of the Gram matrix that the manifold fixes."""
        raise NotImplementedError

    def normal(self, H: Tensor, d: Tensor) -> Tensor:
        """The K = P(K) (..., n, n) with P(DK + KD) = H, for H = P(H), D = WᵀW and d (..., n) its diagonal.

        With H = P(WᵀA + AᵀW) the normal part of A is W K, for W on the manifold.
        """
        raise NotImplementedError

    def target(self, S: Tensor) -> Tensor:
        """The value of P(WᵀW) on the manifold (n, n), for S (..., n, n): P(I), unless a subclass says otherwise.

        Its diagonal is 1: `defect` takes it for the Gram matrix of unit columns. A manifold of another size is this one with a radius.
        """
        return self.project(eye_like(S))

    def defect(self, S: Tensor) -> Tensor:
        """P(S) - target (..., n, n) of a Gram matrix S: zero on the manifold.

        Near the manifold V (I + defect)^(-1/2) is a retraction of V: the retraction by a small factor. On a manifold with free lengths
        it is applied to V with its columns at unit length, which then get their lengths back.
        """
        return self.project(S) - self.target(S)

    def retract(self, W: Tensor, polar: Polar = polar) -> Tensor:
        """A point of the manifold near W (..., m, n), in W's dtype: exact as far as `polar` is, however far W is from the manifold.

        A zero matrix has no nearest point. On Stiefel it becomes the first columns of I; elsewhere it stays zero, and the first step or
        the second leads onto the manifold.
        """
        return like(self._retract(tall(W), polar), W).to(W.dtype)

    def distance(self, W: Tensor) -> Tensor:
        """Distance (...,) from the manifold: ‖P(WᵀW) - target‖_F relative to ‖WᵀW‖_F; of zero W, ‖target‖_F."""
        T = tall(at_least_float32(W))
        with exact_sums(T.device):
            gram = T.mT @ T
        distance, size = torch.linalg.matrix_norm(self.defect(gram)), torch.linalg.matrix_norm(gram)
        return torch.where(size > 0, ratio(distance, size), distance)

    def tangency(self, W: Tensor, A: Tensor) -> Tensor:
        """H = P(WᵀA + AᵀW) (..., n, n), zero exactly when A is tangent at W. P and W are those of `problem`."""
        point, _, manifold = self.problem(tall(W), tall(A))
        C = point.mT @ tall(A)
        return manifold.project(C + C.mT)

    def tangent(self, W: Tensor, A: Tensor) -> Tensor:
        """The tangent part A - W K of A (..., m, n) at W, in the orientation of W. K and W are those of `problem`."""
        point, _, manifold = self.problem(tall(W), tall(A))
        d = column_norms(point).squeeze(-2).square()
        return A - like(point @ manifold.normal(manifold.tangency(point, tall(A)), d), W)

    def problem(self, W: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Manifold]:
        """The point W', the momentum G' (..., m, n) and the Gram-space manifold whose step problem gives the direction at tall W, G."""
        return W, G, self

    def move(self, W: Tensor, G: Tensor, T: Tensor, eta: Tensor, shrink: Tensor) -> Tensor:
        """Where a step leads from tall W (k, m, n) along the direction T, if `gram_space` is false. Here W·shrink - eta·T.

        G is the momentum, eta the length of the step (0-d), shrink the 0-d factor of weight decay.
        """
        return torch.addcmul(W * shrink, T, -eta)  # one operation: eta·T is not rounded by itself

    def closed_form(self, W: Tensor) -> bool:
        """Whether the step at tall W (k, m, n) has the closed form W·sign(skew(WᵀG))."""
        return False

    def _retract(self, W: Tensor, polar: Polar) -> Tensor:
        """`retract` of a tall W."""
        raise NotImplementedError


class Euclidean(Manifold):
    """Every matrix: the step is Muon's."""

    name = "euclidean"
    gram_space = conditioned = sized = False
    decays = True

    def project(self, S: Tensor) -> Tensor:
        return torch.zeros_like(S)

    def normal(self, H: Tensor, d: Tensor) -> Tensor:
        return H  # which is 0

    def _retract(self, W: Tensor, polar: Polar) -> Tensor:
        return W


class Stiefel(Manifold):
    """WᵀW = I. The polar retraction is the nearest point."""

    name = "stiefel"
    orthogonal = unit_columns = True
    efforts: ClassVar = {
        "default": Effort(su=1, su_steps=2, su_lower=0.05, conjugate_gradients=1, relaxation=0.9, cap_relaxation=1.3),
        "high": Effort(su=2, su_steps=4, su_lower=0.02, conjugate_gradients=4, relaxation=0.9, caps=2, cap_degree=4),
    }

    def project(self, S: Tensor) -> Tensor:
        return S

    def normal(self, H: Tensor, d: Tensor) -> Tensor:
        return H / 2

    def closed_form(self, W: Tensor) -> bool:
        return W.size(-2) == W.size(-1)  # tangents of an orthogonal matrix are W times a skew matrix

    def _retract(self, W: Tensor, polar: Polar) -> Tensor:
        zero = (W == 0).all(dim=(-2, -1), keepdim=True)  # of which iterations of a polar factor make 0
        return polar(torch.where(zero, torch.eye(*W.shape[-2:], dtype=W.dtype, device=W.device), W))


class DGram(Manifold):
    """WᵀW diagonal. The retraction is polar(W/c)·c with c the lengths of the columns of W: the identity on the manifold. [ours]

    The published retraction, which sorts the lengths, is a setting of the published rule (optim/published.py).
    """

    name = "dgram"
    orthogonal = free_lengths = decays = True
    sized = False
    efforts: ClassVar = {
        "default": Effort(su=1, conjugate_gradients=5, relaxation=1.3, stages=(2, 2), lower=1e-2),
        "high": Effort(
            su=2, su_steps=4, su_lower=0.022, conjugate_gradients=8, relaxation=1.35, lower=8e-3, caps=2, cap_degree=4
        ),
    }

    def project(self, S: Tensor) -> Tensor:
        return without_diagonal(S)

    def normal(self, H: Tensor, d: Tensor) -> Tensor:
        return ratio(H, d[..., :, None] + d[..., None, :])

    def _retract(self, W: Tensor, polar: Polar) -> Tensor:
        c = column_norms(W)
        return polar(ratio(W, c)) * c  # a zero column has no direction: it stays zero


class Oblique(Manifold):
    """diag(WᵀW) = 1: columns of the tall form on the unit sphere."""

    name = "oblique"
    unit_columns = True
    efforts: ClassVar = {
        # The multiplier is diagonal. That of least squares is near the best for a momentum in all directions; for one in few directions, as
        # early in training, it reaches two thirds to four fifths of the best, and two Su steps reach four fifths and more.
        "default": Effort(su=2, su_steps=4, su_lower=0.02, conjugate_gradients=1),
        "high": Effort(su=3, su_steps=4, su_lower=0.02, conjugate_gradients=1, caps=2, cap_degree=4),
    }

    def project(self, S: Tensor) -> Tensor:
        return torch.diag_embed(diagonal(S))

    def normal(self, H: Tensor, d: Tensor) -> Tensor:
        return H / 2

    def _retract(self, W: Tensor, polar: Polar) -> Tensor:
        return ratio(W, column_norms(W))


class Hyperball(Manifold):
    """‖W‖_F² = n for a tall W (m, n), with any lengths and angles of its columns: the root mean square of its singular values is 1.

    Source: Hyperball (arXiv 2606.16899, and its authors' post of December 2025), which fixes ‖W‖_F and ‖step‖_F. Ours: the norm is that of
    n unit columns, not that of the start, so that runs compare with stiefel; a step has the length eta in spectral norm, not a fixed
    ‖step‖_F; and the direction is the best tangent one (theirs is Muon's own, whose normal part the scaling deletes).
    """

    name = "hyperball"
    efforts = Oblique.efforts

    def project(self, S: Tensor) -> Tensor:
        return diagonal(S).mean(-1)[..., None, None] * eye_like(S)

    def normal(self, H: Tensor, d: Tensor) -> Tensor:
        return ratio(H, 2 * d.mean(-1)[..., None, None])

    def _retract(self, W: Tensor, polar: Polar) -> Tensor:
        return ratio(W, torch.linalg.matrix_norm(W, keepdim=True)) * W.size(-1) ** 0.5


_ROOT = polar_express_coefficients(6, lower=0.05, safety=1.0)
"""For the inverse root of the spectral ball, whose products are float32 and need no margin: within 2e-8 of 1 on [.05, 1]."""


class SpectralBall(Euclidean):
    """‖W‖₂ ≤ 1: no singular value above 1. The step is Muon's, then singular values above 1 become 1: projected steepest descent.

    Source: the spectral ball and its hard cap of singular values (leloykun.github.io). Ours: the cap by one matrix sign in n × n.
    """

    name = "spectral_ball"
    sized = True

    def move(self, W: Tensor, G: Tensor, T: Tensor, eta: Tensor, shrink: Tensor) -> Tensor:
        """The nearest point of the ball, to a few 1e-6; see `_cap`."""
        return self._cap(super().move(W, G, T, eta, shrink))

    def distance(self, W: Tensor) -> Tensor:
        return (spectral_norm(W)[..., 0, 0] - 1).clamp_min(0)

    def _retract(self, W: Tensor, polar: Polar) -> Tensor:
        """The nearest point, by eigenvalues of WᵀW in float64, since a GPU takes tenths of a second for an SVD."""
        values, V = torch.linalg.eigh(W.double().mT @ W.double())  # (..., n)
        factor = values.clamp_min(1).rsqrt()
        return (W.double() @ (V * factor[..., None, :]) @ V.mT).to(W.dtype)

    @staticmethod
    def _cap(V: Tensor) -> Tensor:
        """V (k, m, n) float32 with singular values σ above 1 brought to 1 and the others left where they are.

        M = VᵀV - I has the positive part P = (M + M sign(M)) / 2, and V (I + P)^(-1/2) is what is wanted: Polar Express for the singular
        values of (I + P)^(1/2), for any excess up to ‖P‖_F = 400. An inexact sign where M is near 0 matters as little as M does.
        """
        S = V.mT @ V
        M = S - eye_like(S)  # (k, n, n)
        P = 0.5 * (M + M @ iterate(M, sign_coefficients(12, 1e-4), SAFETY, M.dtype))
        P = 0.5 * (P + P.mT)
        size = 1 + frobenius(P)  # at least ‖I + P‖₂
        root = gram_stage((eye_like(P) + P) / size, _ROOT, Products("float32"))  # size^(1/2)·(I + P)^(-1/2)
        return V @ (root / size.sqrt())


class SpectralSphere(Euclidean):
    """‖W‖₂ = 1: the largest singular value stays 1, the others move. Directions are orthogonal to u vᵀ, its singular vectors.

    The condition ⟨u vᵀ, T⟩ = 0 is hyperball's at the point u vᵀ. The step ends in W/‖W‖₂. Where singular values coincide at 1 there are
    more normal directions than u vᵀ; the scaling then deals with the rest.
    Sources: the spectral sphere (arXiv 2601.08393), MACRO (arXiv 2605.04418). Ours: the multiplier by least squares, at quality `high`
    improved by Su steps; arXiv 2601.08393 finds it by bisection.
    """

    name = "spectral_sphere"
    conditioned = sized = True
    decays = False
    efforts: ClassVar = {"default": Effort(), "high": Oblique.efforts["high"]}

    def problem(self, W: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Manifold]:
        u, _, v = top_pair(W)
        return u @ v.mT * W.size(-1) ** 0.5, G, MANIFOLDS["hyperball"]  # (k, m, n), on hyperball

    def move(self, W: Tensor, G: Tensor, T: Tensor, eta: Tensor, shrink: Tensor) -> Tensor:
        V = W - eta * T
        return ratio(V, top_pair(V)[1])

    def distance(self, W: Tensor) -> Tensor:
        return (spectral_norm(W)[..., 0, 0] - 1).abs()

    def _retract(self, W: Tensor, polar: Polar) -> Tensor:
        return ratio(W, spectral_norm(W))


class ObliqueGain(Euclidean):
    """W = U diag(c) with unit columns U and a free gain c of each: U steps on oblique, c by itself. Every matrix is a point.

    U ← columns of U - eta·T at unit length, where T is oblique's direction at U along G·diag(c);
    c ← c·shrink·exp(-eta·sign(UᵀG)_jj), with the same eta as U: a gradient of random sign does not change log c on average. A zero
        column stays zero.
    Source: Muown (arXiv 2605.10797) and AngularMuown (arXiv 2606.23637), for which c belongs to the rows of a weight and moves by Adam.
    Ours: the columns of the tall form, as in oblique, and a step of c that keeps no state, relative to c.
    """

    name = "oblique_gain"
    conditioned = True
    moves_zero = False
    efforts = Oblique.efforts

    def problem(self, W: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Manifold]:
        c = column_norms(W)  # (k, 1, n)
        return ratio(W, c), G * c, MANIFOLDS["oblique"]

    def move(self, W: Tensor, G: Tensor, T: Tensor, eta: Tensor, shrink: Tensor) -> Tensor:
        c = column_norms(W)
        V = ratio(W, c) - eta * T
        radial = (W * G).sum(-2, keepdim=True).sign()  # (k, 1, n)
        return ratio(V, column_norms(V)) * (c * shrink * torch.exp(-eta * radial))


_ALL = (Euclidean(), Stiefel(), DGram(), Oblique(), Hyperball(), SpectralBall(), SpectralSphere(), ObliqueGain())
MANIFOLDS: dict[str, Manifold] = {m.name: m for m in _ALL}
"""The manifolds by the name that an assignment uses."""


@lru_cache
def distance_of(name: str, radius: float = 1.0) -> Callable[[Tensor], Tensor]:
    """The function W (..., m, n) → its distance from the manifold of this name and radius, see `Manifold.distance`.

    Cached, so that matrices of one manifold have one function and can be grouped by it.
    """
    manifold = MANIFOLDS[name]
    return manifold.distance if radius == 1 else lambda W: manifold.distance(W / radius)
