"""How a gradient becomes a step on a manifold: the certified step of `optim=manifold_muon`, from top to bottom.

For tall W (m × n) on a manifold with Gram projector P, and momentum G,

    maximise ⟨G, T⟩   subject to   ‖T‖₂ ≤ 1,   P(WᵀT + TᵀW) = 0,        then   W ← retraction of W - eta·T.          (1)

Dual.  For symmetric L = P(L) every feasible T has ⟨G, T⟩ = ⟨G + 2WL, T⟩ ≤ ‖X‖_* with X = G + 2WL, and the matrix sign of X attains it.
So a good L makes sign(X) nearly tangent, and any L bounds the optimum from above: optim/certificate.py measures every step by that.

    1. multiplier   L that makes X the tangent projection of G (least squares), then a Su step toward the best L (kexue.fm 11221)
    2. sign         A = X (XᵀX)^(-1/2), smoothed: singular values below `lower` stay small
    3. tangent      T = A - W K deletes what the retraction would delete anyway
    4. cap          T has singular values above 1, where the objective hardly sees them: lower those, project again
    5. retract      V = W - eta·T / max(1, ‖T‖₂), then V (VᵀV)^(-1/2) by a small n × n factor
    6. fallback     where V is too far from the manifold for that, the next step of this matrix takes more rounds, or an exact retraction

A square Stiefel matrix has the closed form T = W·sign(skew(WᵀG)).

Legend.  W weight, c the lengths of its columns, U = W/c; G momentum at ‖G‖_F = 1; C = UᵀG; `cL` the multiplier L with row i times c_i,
so that W L = U·cL and nothing overflows where lengths differ; A matrix sign; N = UᵀA; K the normal part's factor, W K or U·cK; B = TᵀT;
T direction; V trial point; E = P(VᵀV) - target, VᵀV - I on Stiefel. Shapes: k matrices of one tall shape, (k, m, n); products by optim/linalg.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optim.linalg import (
    Products,
    cap_fit,
    column_norms,
    exact_float32,
    eye_like,
    frobenius,
    gram_stage,
    inverse_sqrt_increment,
    largest_eigenvalue,
    matrix_sign,
    over,
    products_for,
    sign_coefficients,
    skew_sign,
    su_step,
    symmetric_sum,
)
from optim.manifold_muon import Moved, Stack
from optim.manifolds import MANIFOLDS, Effort, Manifold, like, tall

LENGTHS: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda m, n: 1.0,
    "rms": lambda m, n: 0.2 * max(m, n) ** 0.5,
}
"""‖T‖₂ by name: 1, or what gives Muon's update the root mean square .2 that AdamW's has (Moonlight, arXiv 2502.16982)."""

SKEW_STEPS, SKEW_LOWER = 7, 1e-3  # of a square Stiefel matrix; feas .997 and more on recorded problems
CAP_FROM = 0.5  # the cap's polynomial is fitted on singular values in [CAP_FROM, 1]·‖T‖₂; smaller ones hardly exist
# Lanczos iterations for ‖T‖₂ in n × n, and with the tall T itself, which costs memory traffic: 1% and 3% short on recorded problems.
SMALL_NORM_STEPS, TALL_NORM_STEPS = 8, 4
TANGENT_SHARE = 4.0  # a tangent part of G below so many rounding errors of the operands is taken for none

# A round of the retraction leaves an error of 5/16·‖E‖³. From these ‖E‖ on one round, and two, would leave more than 3e-7:
SECOND_ROUND, EXACT = 0.008, 0.15
LANDS = (0.015, 0.3, torch.inf)  # ‖E‖ that a step of level 0, 1, 2 still brings onto the manifold to a few 1e-6
DISTANCE_STEPS = 4  # Lanczos iterations for ‖E‖₂; the limits above leave room for what they fall short


def reference(W: Tensor, G: Tensor, manifold: Manifold, effort: Effort) -> Tensor:
    """T / max(1, ‖T‖₂) of one tall W, G (m, n), in float64 and by singular value decompositions: what the batched step must agree with."""

    def on_singular_values(X: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        Q, s, Rt = torch.linalg.svd(X, full_matrices=False)
        return Q @ torch.diag(f(s)) @ Rt

    def quintics(steps: int, lower: float, scale: Tensor) -> Callable[[Tensor], Tensor]:
        def f(s: Tensor) -> Tensor:
            s = s / scale
            for a, b, c in sign_coefficients(steps, lower):
                s = a * s + b * s**3 + c * s**5
            return s

        return f

    W, G = W.double(), G.double() / torch.linalg.matrix_norm(G.double())
    if manifold.rotations and W.size(0) == W.size(1):
        K = 0.5 * (W.T @ G - G.T @ W)
        return W @ on_singular_values(K, quintics(SKEW_STEPS, SKEW_LOWER, torch.linalg.matrix_norm(K @ K).sqrt()))
    d = (W * W).sum(0)
    L = -0.5 * manifold.normal(manifold.tangency(W, G), d)
    for _ in range(effort.su):
        X = G + 2 * W @ L
        smooth = quintics(effort.su_steps, effort.su_lower, torch.linalg.matrix_norm(X.T @ X).sqrt())
        A = on_singular_values(X, smooth)
        Z = on_singular_values(X.T @ X, lambda e, f=smooth: f(e.sqrt()) / e.sqrt())
        H = manifold.tangency(W, A)
        dL = su_step(manifold.project, lambda p: d[:, None] * p, H[None], Z[None], d, effort.conjugate_gradients)[0]
        L = L + effort.relaxation * dL
    X = G + 2 * W @ L
    T = on_singular_values(X, quintics(sum(effort.stages), effort.lower, torch.linalg.matrix_norm(X.T @ X).sqrt()))
    T = manifold.tangent(W, T)
    for _ in range(effort.caps if manifold.constrained else 0):
        norm = torch.linalg.matrix_norm(T, 2)
        p = cap_polynomial(norm.view(1, 1, 1), effort).flatten().tolist()
        T = on_singular_values(T, lambda s, p=p, norm=norm: s * sum(x * (s / norm) ** (2 * j) for j, x in enumerate(p)))
        T = manifold.tangent(W, T)
    return T / torch.linalg.matrix_norm(T, 2).clamp_min(1)


# ---- 1. multiplier ----


class Frame(NamedTuple):
    """W as U = W/c (k, m, n) and c (k, n, 1), with D = UᵀU (k, n, n), or None where that is I because columns are orthogonal."""

    manifold: Manifold
    U: Tensor
    c: Tensor
    D: Tensor | None

    def gram_times(self, K: Tensor, mm: Products) -> Tensor:
        """UᵀU K (k, n, n)."""
        return K if self.D is None else mm(self.D, K)

    @property
    def d(self) -> Tensor:
        """diag(WᵀW) as (k, n)."""
        return self.c.squeeze(-1).square()

    def metric(self, L: Tensor) -> Tensor:
        """WᵀW L (k, n, n) where columns are orthogonal."""
        return self.d[:, :, None] * L

    def tangency(self, N: Tensor) -> Tensor:
        """H = P(WᵀA + AᵀW) (k, n, n) from N = UᵀA."""
        return self.manifold.project(symmetric_sum(self.c * N))

    def normal(self, N: Tensor) -> Tensor:
        """cK (k, n, n), where U·cK = W K is the normal part of A, from N = UᵀA."""
        return self.c * self.manifold.normal(self.tangency(N), self.d)


def frame_of(W: Tensor, manifold: Manifold, mm: Products) -> Frame:
    """The frame of W (k, m, n) on its manifold."""
    if manifold.unit_columns:
        U, c = W, W.new_ones(W.size(0), W.size(-1), 1)
    else:
        lengths = column_norms(W)
        U, c = over(W, lengths), lengths.mT
    return Frame(manifold, U, c, None if manifold.orthogonal else mm(U.mT, U))


def multiplier(frame: Frame, G: Tensor, C: Tensor, effort: Effort, mm: Products) -> tuple[Tensor, Tensor | None]:
    """cL (k, n, n), and XᵀX (k, n, n) at it if that is known in n × n."""
    cL = -0.5 * frame.normal(C)
    if not effort.su:
        return cL, None
    GG = mm(G.mT, G)  # (k, n, n)

    def gram_of_X() -> Tensor:
        return GG + 2 * symmetric_sum(mm(cL.mT, C + cL))

    S = gram_of_X()
    coefficients = sign_coefficients(effort.su_steps, effort.su_lower)
    for _ in range(effort.su):
        size = frobenius(S)
        Z = over(gram_stage(over(S, size), coefficients, mm), size.sqrt())  # (k, n, n) ≈ (XᵀX)^(-1/2)
        H = frame.tangency(mm(C + 2 * cL, Z))  # (k, n, n): UᵀA = (UᵀX) Z
        dL = su_step(frame.manifold.project, frame.metric, H, Z, frame.d, effort.conjugate_gradients, mm)
        cL = cL + effort.relaxation * frame.c * dL
        S = gram_of_X()
    return cL, S


# ---- 2. sign, 3. tangent, 4. cap ----


def cap_polynomial(norm: Tensor, effort: Effort) -> Tensor:
    """Coefficients (k, degree + 1, 1, 1) of p with s·p(s²/‖T‖²) ≈ min(s, 1), over-relaxed, for singular values s of T; norm (k, 1, 1)."""
    nodes, fit = cap_fit(effort.cap_degree, CAP_FROM, norm)
    s = norm.flatten(1) * nodes  # (k, nodes)
    factor = 1 + effort.cap_relaxation * ((1 / s).clamp_max(1) - 1)
    return (factor @ fit.mT)[:, :, None, None]


def cap_factor(B: Tensor, effort: Effort, mm: Products) -> Tensor:
    """R (k, n, n) for which T R has the singular values of T, capped at 1, from B = TᵀT. One product a degree above the first."""
    norm = largest_eigenvalue(lambda v: B @ v, B, SMALL_NORM_STEPS).sqrt().clamp_min(1)
    p = cap_polynomial(norm, effort)  # (k, degree + 1, 1, 1)
    x = B / norm**2
    R = p[:, -1] * x + p[:, -2] * eye_like(B)
    for j in range(effort.cap_degree - 2, -1, -1):
        R = mm(R, x) + p[:, j] * eye_like(B)
    return R


def tangent_sign(W: Tensor, G: Tensor, manifold: Manifold, effort: Effort, mm: Products) -> tuple[Tensor, Tensor]:
    """T (k, m, n) near the optimum of (1), tangent, and ‖X‖_F (k, 1, 1), the size of what there was to take a sign of."""
    if not manifold.constrained:
        return matrix_sign(G, effort.stages, effort.lower, mm)[0], frobenius(G)
    if manifold.rotations and W.size(-2) == W.size(-1):
        C = mm(W.mT, G)  # (k, n, n)
        skew = 0.5 * (C - C.mT)
        return mm(W, skew_sign(skew, SKEW_STEPS, SKEW_LOWER, mm)), frobenius(skew)
    frame = frame_of(W, manifold, mm)
    C = mm(frame.U.mT, G)  # (k, n, n)
    cL, S = multiplier(frame, G, C, effort, mm)
    X = mm.add(G, 1.0, frame.U, 2 * cL)  # (k, m, n) = G + 2WL
    A, gram_of_A = matrix_sign(X, effort.stages, effort.lower, mm, S)  # (k, m, n)
    B = gram_of_A()  # (k, n, n)
    N = mm(frame.U.mT, A)  # (k, n, n)
    cK = torch.zeros_like(N)
    for i in range(effort.caps):  # T = A - U·cK throughout, with N = UᵀT and B = TᵀT
        more = frame.normal(N)
        removed = frame.gram_times(more, mm)
        B = B - symmetric_sum(mm(more.mT, N - 0.5 * removed))
        R = cap_factor(B, effort, mm)
        A, cK, N = mm(A, R), mm(cK + more, R), mm(N - removed, R)
        if i < effort.caps - 1:
            B = mm(R, mm(B, R))
    return mm.add(A, 1.0, frame.U, -(cK + frame.normal(N))), frobenius(X)


def unit_direction(W: Tensor, G: Tensor, manifold: Manifold, effort: Effort, mm: Products) -> tuple[Tensor, Tensor]:
    """T / max(1, ‖T‖₂) (k, m, n) of tall W, G float32, G at any scale, and whether there is anything to step along (k, 1, 1) bool.

    There is nothing, and T is zero, where G is zero, not finite, or normal to the manifold.
    """
    # By the largest entry first: squares of a gradient of size 1e-25 or 1e25 leave the range of float32.
    largest = G.abs().amax(dim=(-2, -1), keepdim=True)
    moving = torch.isfinite(largest) & (largest > 0)
    G = torch.where(moving, G, 0) / torch.where(moving, largest, 1)
    G = over(G, frobenius(G))
    T, size = tangent_sign(W, G, manifold, effort, mm)
    moving = moving & (size > TANGENT_SHARE * torch.finfo(mm.dtype).eps)
    norm = largest_eigenvalue(lambda v: T.mT @ (T @ v), T, TALL_NORM_STEPS).sqrt()
    return torch.where(moving, T / norm.clamp_min(1), 0), moving


# ---- 5. retract ----


def retract(
    V: Tensor, manifold: Manifold, shrink: Tensor | float, norm_cap: float | None, level: int, mm: Products
) -> tuple[Tensor, Tensor]:
    """A point of the manifold near the trial point V (k, m, n), and ‖E‖₂ (k,), how far V was from it.

    Free lengths of columns become length·shrink, at most norm_cap. level: 0 one round, 1 two rounds, 2 an exact retraction first.
    """
    lengths = column_norms(V) if manifold.free_lengths else None
    if lengths is not None:
        V, lengths = over(V, lengths), lengths * shrink
        lengths = lengths if norm_cap is None else lengths.clamp_max(norm_cap)
    E = manifold.defect(mm.gram(V))  # (k, n, n)
    distance = largest_eigenvalue(lambda v: E @ (E @ v), E, DISTANCE_STEPS).sqrt().flatten()
    if level == 2:
        V = manifold.retract(torch.where(V.isfinite(), V, 0))
    for again in range(2 if level else 1):
        E = manifold.defect(mm.gram(V)) if again or level == 2 else E
        V = mm.times_near_identity(V, inverse_sqrt_increment(E, mm))
    return V if lengths is None else V * lengths, distance


# ---- the step ----


def step(
    W: Tensor,
    G: Tensor,
    eta: Tensor,
    manifold: Manifold,
    effort: Effort,
    mm: Products,
    *,
    level: int = 0,
    decay: float = 0.0,
    length: str = "spectral",
    norm_cap: float | None = None,
) -> Moved:
    """One update of tall W (k, m, n) float32 on its manifold along momentum G, at any scale. Pure, without a host sync.

    Args:
        eta: 0-d learning rate on the device: the length of the step in spectral norm, times LENGTHS[length].
        level: how far a trial point may lie from the manifold, see `retract`; Moved.level is what the next step should take.
        decay: decoupled, per unit of eta, of euclidean weights and of free lengths of columns; norm_cap: no free length grows longer.

    Returns:
        Moved. Where there is nothing to step along, or V did not land, the weight is kept bitwise.
    """
    T, moving = unit_direction(W, G, manifold, effort, mm)
    shrink = 1 - eta * decay
    size = eta * LENGTHS[length](*W.shape[-2:])
    if not manifold.constrained:
        new = W * shrink - size * T
        landed, wanted = new.isfinite().all(dim=(-2, -1)), torch.zeros_like(moving.flatten(), dtype=torch.float32)
    else:
        new, distance = retract(W - size * T, manifold, shrink, norm_cap, level, mm)
        landed = (distance <= LANDS[level]) & new.isfinite().all(dim=(-2, -1))
        wanted = (~(distance <= SECOND_ROUND)).float() + (~(distance <= EXACT)).float()  # NaN asks for the exact one
    moves = moving.flatten() & landed
    kept = moving.flatten() & ~landed
    wanted = torch.where(moving.flatten(), wanted, float(level))
    return Moved(torch.where(moves[:, None, None], new, W), T, wanted, kept | (moving.flatten() & (level == 2)))


# ---- 6. the rule, with its fallback ----


class CertifiedStep:
    """The step rule `certified` of ManifoldMuon: every stack by `step`.

    Each matrix steps at the level that its last step asked for. Level 2, which no healthy matrix needs, also multiplies in float32.

    Args:
        quality: a key of a manifold's `efforts`: "default" or "high".
        products: a name of PRECISIONS, or None for the device's own.
        length, norm_cap: see `step`; weight decay comes with the stacks.
        compiled: put `step` through torch.compile, which fuses what lies between the products; None for the device's own: on CUDA.

    Raises:
        ValueError: an unknown quality, precision or length.
    """

    levelled = True

    def __init__(
        self,
        quality: str = "default",
        products: str | None = None,
        length: str = "spectral",
        norm_cap: float | None = None,
        compiled: bool | None = None,
    ) -> None:
        for manifold in MANIFOLDS.values():
            effort_of(manifold, quality)
        products_for(torch.device("cpu"), products)
        if length not in LENGTHS:
            raise ValueError(f"unknown step length {length!r}; choose one of {', '.join(LENGTHS)}")
        self.quality, self.products, self.compiled = quality, products, compiled
        self.settings = {"length": length, "norm_cap": norm_cap}

    @cached_property
    def compiled_step(self) -> Any:
        """`step`, compiled once."""
        return torch.compile(step, fullgraph=True, dynamic=False)

    def describe(self, device: torch.device) -> str:
        """What a person should know of the rule on this device, in one line."""
        precision = products_for(device, self.products).precision
        return f"certified step, {self.quality} quality, {precision} products"

    def init(self, W: Tensor, manifold: str) -> Tensor:
        """W (..., m, n) brought onto the manifold by its exact retraction."""
        return MANIFOLDS[manifold].init(W)

    def flops(self, m: int, n: int, manifold: str) -> float:
        """Operations (two a multiply-add) of one step of one tall (m, n) matrix, at level 0."""
        return step_flops(m, n, MANIFOLDS[manifold], effort_of(MANIFOLDS[manifold], self.quality), self.products)

    def __call__(self, stacks: Sequence[Stack]) -> list[Moved]:
        """What `step` makes of each stack."""
        moved = []
        for stack in stacks:
            with torch.no_grad(), exact_float32(stack.W.device):
                parts = {level: self._at_level(stack, level) for level in dict.fromkeys(stack.levels)}
            if len(parts) == 1:
                moved.append(next(iter(parts.values())))
                continue
            merged = Moved(
                *(torch.empty_like(field) for field in (stack.W, stack.W, stack.W[:, 0, 0], stack.W[:, 0, 0] > 0))
            )
            for level, part in parts.items():
                where = [i for i, mine in enumerate(stack.levels) if mine == level]
                for whole, piece in zip(merged, part):
                    whole[where] = piece
            moved.append(merged)
        return moved

    def _at_level(self, stack: Stack, level: int) -> Moved:
        """The matrices of a stack that step at this level."""
        where = [i for i, mine in enumerate(stack.levels) if mine == level]
        W, G = (stack.W, stack.G) if len(where) == len(stack.levels) else (stack.W[where], stack.G[where])
        manifold = MANIFOLDS[stack.manifold]
        mm = products_for(W.device, "float32" if level == 2 else self.products)
        compiled = W.is_cuda if self.compiled is None else self.compiled
        call = self.compiled_step if compiled and level < 2 else step  # level 2 is rare: not worth a compilation
        effort = effort_of(manifold, self.quality)
        return call(W, G, stack.eta, manifold, effort, mm, level=level, decay=stack.weight_decay, **self.settings)


def effort_of(manifold: Manifold, quality: str) -> Effort:
    """The effort of this quality; ValueError where there is none."""
    if quality not in manifold.efforts:
        raise ValueError(
            f"unknown quality {quality!r} for {manifold.name}; choose one of {', '.join(manifold.efforts)}"
        )
    return manifold.efforts[quality]


def direction(W: Tensor, G: Tensor, manifold: str, products: str | None = None, quality: str = "default") -> Tensor:
    """The tangent direction T / max(1, ‖T‖₂) of the step at W along momentum G, in the shape and dtype of W.

    Args:
        W: (m, n) or (k, m, n), any float dtype and orientation, on the manifold.
        G: momentum, shaped like W, at any scale. Where it is zero or not finite the direction is zero.
        manifold: a name of MANIFOLDS.
        products: "float32", "float16" or "bfloat16"; None for the device's choice.
        quality: "default" or "high".

    Raises:
        ValueError: an unknown manifold, precision or quality, or W and G of different shape.
    """
    if manifold not in MANIFOLDS:
        raise ValueError(f"unknown manifold {manifold!r}; choose one of {', '.join(MANIFOLDS)}")
    if W.shape != G.shape or W.ndim not in (2, 3):
        raise ValueError(f"W {tuple(W.shape)} and G {tuple(G.shape)} must be equally shaped (m, n) or (k, m, n)")
    M = MANIFOLDS[manifold]
    flat = [like_stack(X) for X in (W, G)]
    with torch.no_grad(), exact_float32(W.device):
        T, _ = unit_direction(*flat, M, effort_of(M, quality), products_for(W.device, products))
        norm = torch.linalg.eigvalsh((T.mT @ T).double())[
            :, -1
        ].sqrt()  # the step itself is content with Lanczos' estimate
        T = T / norm.clamp_min(1).to(T.dtype)[:, None, None]
    return like(T.reshape(tall(W).shape), W).to(W.dtype)


def like_stack(X: Tensor) -> Tensor:
    """X (m, n) or (k, m, n) as a tall float32 stack (k, m, n)."""
    return tall(X).float().reshape(-1, *tall(X).shape[-2:])


def step_flops(m: int, n: int, manifold: Manifold, effort: Effort, products: str | None) -> float:
    """Operations (two a multiply-add) of one level-0 step of one tall (m, n) matrix: products of matrices alone, as they are made.

    products None is counted as 16 bits, where the retraction's Gram matrix takes two tall products instead of one.
    """
    stages = len(Products(products or "float16").stages(effort.stages))
    sign_small = 4 * sum(effort.stages) - 3 * stages
    if not manifold.constrained:
        tall_products, small = 2 * stages, sign_small
    elif manifold.rotations and m == n:
        tall_products, small = 2 + 2, 3 * SKEW_STEPS + 1
    else:
        full = 0 if manifold.orthogonal else 1  # D = UᵀU, and D K
        su = effort.su * (4 * effort.su_steps - 3 + 1 + effort.conjugate_gradients + 1) + (1 if effort.su else 0)
        tall_products = full + 1 + bool(effort.su) + 1 + 2 * stages - bool(effort.su) + 1
        tall_products += effort.caps + 1 + 2
        small = su + sign_small + 2 + effort.caps * (1 + full + effort.cap_degree - 1 + 2) + 2 * (effort.caps - 1) + 1
    if manifold.constrained and products != "float32":
        tall_products += 1
    return 2.0 * n * n * (tall_products * m + small * n)
