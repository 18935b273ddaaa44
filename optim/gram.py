"""Arithmetic in n × n for the tangent-constrained spectral step.

Every matrix the step needs is T = G F + W M with small F and M, so that products of tall matrices are known from three of them,
GᵀG, C = WᵀG and D = WᵀW:

    WᵀT = C F + D M,      TᵀT = Fᵀ GᵀG F + Fᵀ Cᵀ M + Mᵀ C F + Mᵀ D M,      ⟨G, T⟩ = ⟨GᵀG, F⟩ + ⟨C, M⟩.

On the manifold D is known: I on Stiefel, diagonal on DGram. The tall shape is touched to make the others and once more to take the
step. Matrices of equal n form one batch (k, n, n), whatever their m. On Oblique D is full, but there the multiplier L is diagonal, so
that D L is elementwise everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from optim.manifolds import MANIFOLDS
from optim.msign import polar_express_coefficients

Coefficients = Sequence[tuple[float, float, float]]


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Products inside are IEEE float32: autocast off, and TF32, whose Gram iteration diverges, off."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


# --- the problem -----------------------------------------------------------------------------------------------------------


class Gram(NamedTuple):
    """One batch of step problems, G scaled to Frobenius norm 1 and cleared where it is not finite.

    GG = GᵀG, C = WᵀG, D = WᵀW for W on its manifold: (k, n, n) float32. d: (k, n), the diagonal of D. scale: (k, 1, 1), ‖G‖_F in the
    units of the caller (1 where G is zero or broken). moving, finite: (k, 1, 1) bool: G is neither zero nor broken; G is not broken.
    """

    GG: Tensor
    C: Tensor
    D: Tensor
    d: Tensor
    scale: Tensor
    moving: Tensor
    finite: Tensor


def gram(W: Tensor, G: Tensor, manifold: str) -> tuple[Gram, Tensor]:
    """The n × n data of tall W, G (k, m, n) float32, and G / ‖G‖_F (k, m, n), zero where G is zero or not finite."""
    # By the largest entry first: squares of a gradient of size 1e-25 or 1e25 leave the range of float32.
    largest = G.abs().amax(dim=(-2, -1), keepdim=True)
    finite = torch.isfinite(largest)
    moving = finite & (largest > 0)
    G = torch.where(finite, G, 0) / torch.where(moving, largest, 1)
    norm = torch.where(moving, torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True), 1)
    G = G / norm
    D = weight_gram(W, manifold)
    return Gram(G.mT @ G, W.mT @ G, D, diagonal(D), norm * torch.where(moving, largest, 1), moving, finite), G


def weight_gram(W: Tensor, manifold: str) -> Tensor:
    """D = WᵀW (k, n, n) of W (k, m, n) on its manifold, where a product is needed on Oblique alone; euclidean steps do not read it."""
    if manifold == "oblique":
        return W.mT @ W
    if manifold == "dgram":
        return squared_lengths(W)
    return torch.eye(W.size(-1), dtype=W.dtype, device=W.device).expand(W.size(0), -1, -1)


def squared_lengths(W: Tensor) -> Tensor:
    """The diagonal part of WᵀW (k, n, n) for W (k, m, n), without a product."""
    return torch.diag_embed(W.square().sum(-2))


def diagonal(S: Tensor) -> Tensor:
    """Diagonal (k, n) of S (k, n, n), a view."""
    return torch.diagonal(S, dim1=-2, dim2=-1)


def trace(S: Tensor) -> Tensor:
    """tr S as (k, 1, 1)."""
    return diagonal(S).sum(-1)[:, None, None]


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """⟨X, Y⟩ as (k, 1, 1)."""
    return (X * Y).sum(dim=(-2, -1), keepdim=True)


def frobenius(X: Tensor) -> Tensor:
    """‖X‖_F as (k, 1, 1)."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)


def plus_transpose(X: Tensor) -> Tensor:
    """X + Xᵀ."""
    return X + X.mT


def ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 where y is 0."""
    return torch.where(y != 0, x / torch.where(y != 0, y, 1), 0)


def identity_like(S: Tensor) -> Tensor:
    """I (n, n) of S's dtype and device."""
    return torch.eye(S.size(-1), dtype=S.dtype, device=S.device)


class Constraint(NamedTuple):
    """What the step needs to know of a manifold with Gram projector P; L, K, H are symmetric and in P's range.

    project: S → P(S).   metric: L → D L.   normal: H → the K with P(D K + K D) = H, so that T = A - W K is the tangent part of A
    when H = P(WᵀA + AᵀW).
    """

    project: Callable[[Tensor], Tensor]
    metric: Callable[[Gram, Tensor], Tensor]
    normal: Callable[[Gram, Tensor], Tensor]


CONSTRAINTS: dict[str, Constraint] = {
    "euclidean": Constraint(
        MANIFOLDS["euclidean"].gram_project,
        lambda problem, L: L,
        lambda problem, H: H,
    ),
    "stiefel": Constraint(
        MANIFOLDS["stiefel"].gram_project,
        lambda problem, L: L,
        lambda problem, H: H / 2,
    ),
    "dgram": Constraint(
        MANIFOLDS["dgram"].gram_project,
        lambda problem, L: problem.d[:, :, None] * L,
        lambda problem, H: ratio(H, problem.d[:, :, None] + problem.d[:, None, :]),
    ),
    "oblique": Constraint(
        MANIFOLDS["oblique"].gram_project,
        lambda problem, L: problem.D * diagonal(L)[:, None, :],
        lambda problem, H: ratio(H, 2 * problem.d[:, :, None]),
    ),
}
"""The constraints by manifold name. `euclidean` has P = 0: its L, H and K vanish."""


# --- functions of symmetric matrices ---------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def root_coefficients(ridge: float, steps: int) -> Coefficients:
    """Polar Express for singular values down to √ridge: a constant to torch.compile, not a loop to trace."""
    return polar_express_coefficients(steps, lower=ridge**0.5)


def inverse_sqrt(S: Tensor, ridge: float, steps: int) -> Tensor:
    """(S + ridge·‖S‖_F·I)^(-1/2) of positive semidefinite S (k, n, n) by `steps` Polar Express iterations in float32.

    The coupled form, Y → S^(1/2) and Z → S^(-1/2) with R = Z Y → I, costs as much as updating R by itself, but its rounding errors
    grow with the square root of the condition number only (Higham, Functions of Matrices, 6.7). 4·steps - 3 products. Zero for zero S.
    """
    size = frobenius(S)  # at least the largest eigenvalue, and far less than the trace
    eye = identity_like(S)
    Y = ratio(S, size) + ridge * eye
    R, Z = Y, None
    coefficients = root_coefficients(ridge, steps)
    for step, (a, b, c) in enumerate(coefficients):
        P = torch.baddbmm(R, R, R, beta=b, alpha=c) + a * eye
        last = step == len(coefficients) - 1
        Y = None if last else Y @ P
        Z = P if Z is None else P @ Z
        R = None if last else Z @ Y
    return Z * ratio(torch.ones_like(size), size.sqrt())


# Signs of eigenvalues down to 5% of the largest; below that |E| is small, and so is the harm of a wrong sign.
SIGN = polar_express_coefficients(3, lower=0.05, safety=1.0)


def positive_part(E: Tensor, bound: Tensor) -> Tensor:
    """(E + |E|) / 2 of symmetric E (k, n, n) with eigenvalues in ±bound (k, 1, 1), to about 1% of the bound. 10 products.

    |E| = E·sign(E), the sign by three odd quintics: unlike a polynomial fit of |x| it is exact at 0, where most eigenvalues are.
    """
    X = E / bound
    for a, b, c in SIGN:
        square = X @ X
        X = torch.baddbmm(X, X, torch.baddbmm(square, square, square, beta=b, alpha=c), beta=a)
    return torch.baddbmm(E, E, X, beta=0.5, alpha=0.5)


# (1 + e)^(-1/2) - 1 as e·(c₁ + c₂ e + c₃ e²), to 5e-4 on [0, 1].
CAP = (-0.488123, 0.286155, -0.0914202)


def cap_factor(B: Tensor, norm: Tensor, relaxation: Tensor) -> Tensor:
    """R for which T R has the singular values min(σ, 1) of T, given B = TᵀT (k, n, n) and norm = ‖T‖₂ (k, 1, 1). 12 products.

    With E = B - I it is (I + E₊)^(-1/2); relaxation (k, 1, 1) multiplies its distance from I.
    """
    eye = identity_like(B)
    excess = positive_part(B - eye, (1.05 * norm**2 - 1).clamp_min(1.1))
    c1, c2, c3 = CAP
    return eye + relaxation * (excess @ torch.baddbmm(c2 * excess + c1 * eye, excess, excess, alpha=c3))


def near_identity_inverse_sqrt(R: Tensor) -> Tensor:
    """R^(-1/2) for R (k, n, n) near I, by two third-order Newton–Schulz steps: error below 1e-6 for ‖R - I‖₂ ≤ 0.4. 5 products."""
    eye = identity_like(R)

    def taylor(R: Tensor) -> Tensor:
        return torch.baddbmm(R, R, R, beta=-10 / 8, alpha=3 / 8) + 15 / 8 * eye

    P = taylor(R)
    return P @ taylor(P @ (R @ P))


def probe_vector(B: Tensor) -> Tensor:
    """A fixed quasi-random unit vector (k, n, 1) for B (k, n, n), orthogonal to no eigenspace in practice."""
    grid = torch.arange(1, B.size(-1) + 1, dtype=torch.float64, device=B.device) * 0.6180339887498949
    v = grid - grid.floor() - 0.5
    return (v / torch.linalg.vector_norm(v)).to(B.dtype).expand(B.shape[:2]).unsqueeze(-1)


def inverts(Z: Tensor, R: Tensor) -> Tensor:
    """Whether Z = R^(-1/2) to float32, (k, 1, 1) bool, asked by one vector: the iteration diverges if R was not near I."""
    v = probe_vector(R)
    return frobenius(Z @ (R @ (Z @ v)) - v) <= 1e-5


def spectral_norm(B: Tensor, iterations: int) -> Tensor:
    """√λ_max (k, 1, 1) of positive semidefinite B (k, n, n), from below, by `iterations` of Lanczos; no n³ product, no host sync.

    The largest eigenvalue of the small tridiagonal matrix is read from its 4096th power, since an eigensolver would ask the host.
    """
    k = B.size(0)
    v = probe_vector(B)
    previous, beta = torch.zeros_like(v), torch.zeros_like(v[:, :1])
    alphas, betas = [], []
    for _ in range(iterations):
        w = torch.baddbmm(beta * previous, B, v, beta=-1)
        alpha = inner(v, w)
        w = w - alpha * v
        alphas.append(alpha.view(k))
        betas.append(beta.view(k))
        beta = frobenius(w)
        previous, v = v, ratio(w, beta)
    off = torch.diag_embed(torch.stack(betas[1:], dim=-1), offset=1)
    T = torch.diag_embed(torch.stack(alphas, dim=-1)) + plus_transpose(off)
    power = T
    for _ in range(12):
        power = ratio(power, frobenius(power))
        power = power @ power
    return ratio(inner(power, T @ power), inner(power, power)).clamp_min(0).sqrt()
