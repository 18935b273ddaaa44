"""The tangent-constrained spectral step, solved and certified.

For tall W (m × n) on a manifold with Gram projector P, and momentum G,

    maximise ⟨G, A⟩   subject to   ‖A‖₂ ≤ 1,   P(WᵀA + AᵀW) = 0.                                                    (1)

Dual.  For symmetric L = P(L) and any feasible A, ⟨G, A⟩ = ⟨G + 2WL, A⟩ ≤ ‖X‖_*  with  X = G + 2WL, and A = msign(X) = X Z with
Z = (XᵀX)^(-1/2) attains it. So every L bounds the optimum from above by tr(XᵀX)^(1/2), and a minimiser L gives the optimal A: the
one whose tangency residual H = P(WᵀA + AᵀW) vanishes.

Su's step.  (kexue.fm 11221, in products.)  With Z held fixed, the L' that makes (G + 2WL')Z tangent is L + dL with
P(D dL Z + Z dL D) = -H/2: a Lyapunov equation, solved by a few conjugate gradients. Over-relaxed by up to 1.6 it converges best.
[relaxation: our measurement]

Answer.  Off the minimiser A is not tangent. A retraction deletes its normal part W K, so the step really taken is T = A - W K. T has
singular values above 1, in directions of small singular values of X, where the objective hardly sees them. `cap` lowers those to 1 and
projects again: an over-relaxed alternating projection onto {‖T‖₂ ≤ 1} and the tangent space. [ours]

Certificate.  eff = ⟨G, T⟩ / bound with the best dual value in the denominator, and feas = eff / max(1, ‖T‖₂) ≤ 1: T / ‖T‖₂ is
feasible, and its distance from the optimum is at most 1 - feas.

Everything runs in n × n (optim/gram.py); the square Stiefel case has the closed form A = W msign(skew(WᵀG)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from optim.gram import (
    CONSTRAINTS,
    Constraint,
    Gram,
    cap_factor,
    float32_products,
    frobenius,
    gram,
    identity_like,
    inner,
    inverse_sqrt,
    plus_transpose,
    probe_vector,
    ratio,
    spectral_norm,
    trace,
)
from optim.manifolds import MANIFOLDS, like, tall
from optim.msign import polar_express_coefficients

History = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Solver:
    """How (1) is to be solved.

    name: a key of SOLVERS.  calls: inverse square roots (matrix signs) spent; `least_squares` needs one.  cap: rounds of `cap`.
    root_steps, ridge: Polar Express steps of an inverse square root, and the ridge relative to ‖XᵀX‖_F that keeps float32 exact
    enough (1e-7 once gave NaN in training).  relaxation, conjugate_gradients: of Su's step.  memory: of Anderson's acceleration.
    alpha: first step size of dual ascent.  cap_relaxation: of `cap`.  lanczos: iterations of the estimate of ‖T‖₂.
    """

    name: str = "su"
    calls: int = 3
    cap: int = 1
    root_steps: int = 7
    ridge: float = 1e-6
    relaxation: float = 1.6
    conjugate_gradients: int = 16
    memory: int = 3
    alpha: float = 0.1
    cap_relaxation: float = 1.5
    lanczos: int = 24

    def __post_init__(self) -> None:
        if self.name not in SOLVERS:
            raise ValueError(f"unknown solver {self.name!r}; choose one of {', '.join(SOLVERS)}")
        if self.calls < 1 or self.cap < 0:
            raise ValueError(
                f"solver {self.name!r} got calls={self.calls}, cap={self.cap}; set calls >= 1 and cap >= 0"
            )
        if self.name == "least_squares" and self.calls != 1:
            raise ValueError(
                f"least_squares is one matrix sign, not calls={self.calls}; set calls=1, or take su for more"
            )


class Iterate(NamedTuple):
    """What one matrix sign tells at L: S = XᵀX, Z = S^(-1/2), N = WᵀA, H = P(N + Nᵀ), all (k, n, n); bound ≥ tr S^(1/2), (k, 1, 1)."""

    L: Tensor
    S: Tensor
    Z: Tensor
    N: Tensor
    H: Tensor
    bound: Tensor


class Answer(NamedTuple):
    """A tangent T = G F + W M: N = WᵀT, B = TᵀT (k, n, n); value ⟨G, T⟩, norm ‖T‖₂, frac of the A it came from (k, 1, 1).

    ok: (k, 1, 1) bool: T came from a sound matrix sign, not from the guard's substitute.
    """

    F: Tensor
    M: Tensor
    N: Tensor
    B: Tensor
    value: Tensor
    norm: Tensor
    frac: Tensor
    ok: Tensor


class Certificate(NamedTuple):
    """How good the answer is, per matrix: (k,) each, on the device.

    frac: ‖normal part‖_F / ‖A‖_F of the matrix sign the answer came from. eff, feas: lower bounds of ⟨G, T⟩ / optimum and of the
    same for the feasible T / max(1, ‖T‖₂); both 1 for zero G. norm: ‖T‖₂ (Lanczos, from below). bound: the dual value in
    the units of ⟨G, A⟩. ok: False where the guard replaced the answer. finite: False where G was not finite.
    """

    frac: Tensor
    eff: Tensor
    feas: Tensor
    norm: Tensor
    bound: Tensor
    ok: Tensor
    finite: Tensor


class Step(NamedTuple):
    """direction: the feasible tangent T / max(1, ‖T‖₂), in the shape and dtype of W; zero for a zero or broken G. certificate."""

    direction: Tensor
    certificate: Certificate


# --- multipliers -----------------------------------------------------------------------------------------------------------


def least_squares_multiplier(problem: Gram, constraint: Constraint) -> Tensor:
    """The L for which G + 2WL is the tangent projection of G: L_ij = -(C + Cᵀ)_ij / (2 (d_i + d_j)) on P's range."""
    return -0.5 * constraint.normal(problem, constraint.project(plus_transpose(problem.C)))


def published_multiplier(problem: Gram, constraint: Constraint) -> Tensor:
    """The start of the published dual ascent, -(1/4) P(WᵀG + GᵀW) (arXiv 2606.13276)."""
    return -0.25 * constraint.project(plus_transpose(problem.C))


def su_step(problem: Gram, constraint: Constraint, it: Iterate, solver: Solver) -> Tensor:
    """dL with P(D dL Z + Z dL D) = -H/2, by conjugate gradients preconditioned with d_i z_jj + z_ii d_j; one product an iteration."""
    z = torch.diagonal(it.Z, dim1=-2, dim2=-1)
    scale = plus_transpose(problem.d[:, :, None] * z[:, None, :])
    r = -0.5 * it.H
    dL = torch.zeros_like(r)
    p = q = ratio(r, scale)
    rq = inner(r, q)
    for _ in range(solver.conjugate_gradients):
        Ap = constraint.project(plus_transpose(constraint.metric(problem, p) @ it.Z))
        step = ratio(rq, inner(p, Ap))
        dL = dL + step * p
        r = r - step * Ap
        q = ratio(r, scale)
        previous, rq = rq, inner(r, q)
        p = q + ratio(rq, previous) * p
    return dL


def _stay(
    problem: Gram, constraint: Constraint, it: Iterate, history: History, k: int, solver: Solver
) -> tuple[Tensor, History]:
    """`least_squares`: the multiplier is where it should be."""
    return it.L, history


def _ascend(
    problem: Gram, constraint: Constraint, it: Iterate, history: History, k: int, solver: Solver
) -> tuple[Tensor, History]:
    """`dual_ascent`, as published: L -= alpha (1 - k/K) H, in the units of the caller's G, whatever they are."""
    return it.L - solver.alpha * (1 - k / solver.calls) / problem.scale * it.H, history


def _su(
    problem: Gram, constraint: Constraint, it: Iterate, history: History, k: int, solver: Solver
) -> tuple[Tensor, History]:
    """`su`: the over-relaxed fixed point; the first steps, far from the answer, are relaxed less. [schedule: our measurement]"""
    relaxation = min(1.2 + 0.2 * k, solver.relaxation)
    return it.L + relaxation * su_step(problem, constraint, it, solver), history


def _su_anderson(
    problem: Gram, constraint: Constraint, it: Iterate, history: History, k: int, solver: Solver
) -> tuple[Tensor, History]:
    """`su_anderson`: the combination of the last iterates whose combined Su steps are shortest (Anderson, type II)."""
    f = su_step(problem, constraint, it, solver)
    history = (*history, (it.L, f))[-(solver.memory + 1) :]
    L, older = it.L + f, history[:-1]
    if not older:
        return L, history
    dF = torch.stack([(f - g).flatten(1) for _, g in older], dim=1)  # (k, memory, n²)
    normal = dF @ dF.mT
    normal = normal + (1e-6 * trace(normal) + torch.finfo(normal.dtype).tiny) * identity_like(normal)
    weights = torch.linalg.solve_ex(normal, dF @ f.flatten(1)[:, :, None]).result  # no host sync, unlike solve
    for j, (L_j, f_j) in enumerate(older):
        L = L - weights[:, j, :, None] * (it.L + f - L_j - f_j)
    return L, history


class Multiplier(NamedTuple):
    """A dual method: where L starts, and how it advances, at how many products. keep: the best iterate is the answer, not the last."""

    start: Callable[[Gram, Constraint], Tensor]
    advance: Callable[[Gram, Constraint, Iterate, History, int, Solver], tuple[Tensor, History]]
    products: Callable[[Solver], int]
    keep: bool = True


SOLVERS: dict[str, Multiplier] = {
    "least_squares": Multiplier(least_squares_multiplier, _stay, lambda solver: 0),
    "su": Multiplier(least_squares_multiplier, _su, lambda solver: solver.conjugate_gradients),
    "su_anderson": Multiplier(least_squares_multiplier, _su_anderson, lambda solver: solver.conjugate_gradients),
    "dual_ascent": Multiplier(published_multiplier, _ascend, lambda solver: 0, keep=False),
}
"""The dual methods by the name that a configuration uses."""


# --- answers ---------------------------------------------------------------------------------------------------------------


def evaluate(problem: Gram, constraint: Constraint, L: Tensor, solver: Solver) -> Iterate:
    """One matrix sign at the multiplier L."""
    DL = constraint.metric(problem, L)
    S = problem.GG + 2 * plus_transpose(L @ (problem.C + DL))  # XᵀX, since Lᵀ = L
    Z = inverse_sqrt(S, solver.ridge, solver.root_steps)
    N = (problem.C + 2 * DL) @ Z
    # σ ≤ (zσ² + 1/z)/2 for every z > 0: a bound of tr S^(1/2) that ridge and unconverged singular values do not break.
    bound = inner(S, Z) + 0.5 * solver.ridge * frobenius(S) * trace(Z)
    return Iterate(L, S, Z, N, constraint.project(plus_transpose(N)), bound)


def tangent(
    problem: Gram, constraint: Constraint, F: Tensor, M: Tensor, N: Tensor, B: Tensor, solver: Solver
) -> Answer:
    """The tangent part T = A - W K of A = G F + W M with WᵀA = N, AᵀA = B, and its value and norm. One product."""
    K = constraint.normal(problem, constraint.project(plus_transpose(N)))
    DK = constraint.metric(problem, K)
    T_B = B - plus_transpose(K @ (N - 0.5 * DK))
    value = inner(problem.GG, F) + inner(problem.C, M - K)
    frac = ratio(inner(K, DK).clamp_min(0), trace(B)).sqrt()
    norm = spectral_norm(T_B, solver.lanczos)
    ok = sound(trace(B) / B.size(-1), value, norm) & consistent(problem, F, M - K, T_B)
    return Answer(F, M - K, N - DK, T_B, value, norm, frac, ok)


def sound(size: Tensor, value: Tensor, norm: Tensor) -> Tensor:
    """The guard, (k, 1, 1) bool: everything finite, and size = ‖A‖_F² / n at most 1.02, as ‖A‖₂ ≤ 1 demands."""
    return torch.isfinite(value) & torch.isfinite(norm) & (size <= 1.02)


def consistent(problem: Gram, F: Tensor, M: Tensor, B: Tensor) -> Tensor:
    """Whether B is TᵀT for T = G F + W M, asked by one vector: a Gram matrix that was carried along may have left its T."""
    v = probe_vector(B)
    f, m = F @ v, M @ v
    length = inner(f, problem.GG @ f) + 2 * inner(m, problem.C @ f) + inner(m, problem.D @ m)  # ‖T v‖²
    return (length - inner(v, B @ v)).abs() <= 0.02


def matrix_sign_answer(problem: Gram, constraint: Constraint, it: Iterate, solver: Solver) -> Answer:
    """The answer of one iterate: the tangent part of A = X Z = G Z + W (2LZ)."""
    return tangent(problem, constraint, it.Z, 2 * it.L @ it.Z, it.N, it.Z @ (it.S @ it.Z), solver)


def projected_gradient(problem: Gram, constraint: Constraint) -> Answer:
    """T = Proj(G) / ‖Proj(G)‖_F: feasible, tangent, a descent direction, and exact in float32: what the guard falls back to."""
    L = least_squares_multiplier(problem, constraint)
    DL = constraint.metric(problem, L)
    B = problem.GG + 2 * plus_transpose(L @ (problem.C + DL))
    size = trace(B).clamp_min(0).sqrt()
    c = ratio(torch.ones_like(size), size)
    F, M, N = c * identity_like(B).expand_as(B), 2 * c * L, c * (problem.C + 2 * DL)
    value = inner(problem.GG, F) + inner(problem.C, M)
    return Answer(
        F, M, N, c * c * B, value, (size > 0).to(size), torch.zeros_like(c), torch.zeros_like(c, dtype=torch.bool)
    )


def feasible_value(answer: Answer) -> Tensor:
    """⟨G, T⟩ / max(1, ‖T‖₂), what a feasible multiple of T achieves."""
    return answer.value / answer.norm.clamp_min(1)


def choose(first: Tensor, answer: Answer, other: Answer) -> Answer:
    """Per matrix, `answer` where first (k, 1, 1) holds, else `other`."""
    return Answer(*(torch.where(first, a, b) for a, b in zip(answer, other)))


def better(answer: Answer, candidate: Answer, bound: Tensor) -> Answer:
    """Per matrix, the candidate where it is sound, achieves more, and not more than duality allows; without a host sync."""
    value = feasible_value(candidate)
    take = candidate.ok & (value > feasible_value(answer)) & (value <= (1 + _ROUNDING) * bound)
    return choose(take, candidate, answer)


# How far rounding may push a feasible value above its dual bound.
_ROUNDING = 2e-3

# The skew matrix sign: singular values down to 1e-4 of the bound reach 1 in nine steps.
SKEW_LOWER = 1e-4
SKEW = polar_express_coefficients(9, lower=SKEW_LOWER)


def cap(problem: Gram, constraint: Constraint, answer: Answer, solver: Solver) -> Answer:
    """One round of over-relaxed alternating projection: singular values of T above 1 to 1, then the tangent space. 18 products."""
    # The further A is from tangent, the more of T is excess, and the less of it should be taken beyond the cap.
    R = cap_factor(answer.B, answer.norm, solver.cap_relaxation - answer.frac)
    F, M, N = (torch.cat((answer.F, answer.M, answer.N), dim=-2) @ R).chunk(3, dim=-2)
    capped = tangent(problem, constraint, F, M, N, R @ answer.B @ R, solver)
    return capped._replace(frac=answer.frac, ok=capped.ok & answer.ok)


def maximise(problem: Gram, manifold: str, solver: Solver, warm: Tensor | None = None) -> tuple[Answer, Tensor, Tensor]:
    """The best answer of `solver.calls` matrix signs and `solver.cap` cap rounds, the least dual value, and the last multiplier.

    Values are in units of ‖G‖_F. warm: (k, n, n), the multiplier of the step before in the same units, taken as the start where it
    is neither zero nor broken.
    """
    constraint, method = CONSTRAINTS[manifold], SOLVERS[solver.name]
    L = method.start(problem, constraint)
    if warm is not None:
        L = torch.where(torch.isfinite(frobenius(warm)) & (frobenius(warm) > 0), warm, L)
    history: History = ()
    best = projected_gradient(problem, constraint)
    bound = torch.full_like(best.value, torch.inf)
    for k in range(solver.calls):
        it = evaluate(problem, constraint, L, solver)
        # Weak duality is the guard of the bound: one below a value that was reached is rounding error.
        sane = it.bound >= feasible_value(best)
        bound = torch.minimum(bound, torch.where(sane, it.bound, torch.inf))
        last = k == solver.calls - 1
        if method.keep or last:
            answer = matrix_sign_answer(problem, constraint, it, solver)
            best = better(best, answer, bound) if method.keep else choose(answer.ok, answer, best)
        if not last:
            L, history = method.advance(problem, constraint, it, history, k, solver)
    for _ in range(solver.cap):
        answer = cap(problem, constraint, answer, solver)
        best = better(best, answer, bound)
    return best, bound, it.L


def maximise_square_stiefel(problem: Gram, solver: Solver) -> tuple[Answer, Tensor]:
    """The closed form for orthogonal W: T = W msign(K) with K = skew(WᵀG), optimal with value ‖K‖_*; and a bound of that value.

    Source: kexue.fm 11215. Tangent at W means T = W Ω with Ω skew, and the polar factor of a skew matrix is skew. Iterated on K
    itself, whose condition number is not squared: 3 products a step.
    """
    K = 0.5 * (problem.C - problem.C.mT)
    size = frobenius(K @ K).sqrt()  # at least ‖K‖₂
    X = ratio(K, size)
    for a, b, c in SKEW:
        square = X @ X  # -XᵀX
        X = torch.baddbmm(X, X, torch.baddbmm(square, square, square, beta=-b, alpha=c), beta=a)
    Omega = 0.5 * (X - X.mT)
    B = Omega.mT @ Omega
    value, norm = inner(problem.C, Omega), spectral_norm(B, solver.lanczos)
    # What the singular values that did not reach 1 may still hold: each is below lower·size.
    missing = (B.size(-1) - trace(B)).clamp_min(0)
    bound = inner(K, Omega) + SKEW_LOWER * size * missing
    ok = sound(trace(B) / B.size(-1), value, norm)
    answer = Answer(torch.zeros_like(Omega), Omega, Omega, B, value, norm, torch.zeros_like(norm), ok)
    return better(projected_gradient(problem, CONSTRAINTS["stiefel"]), answer, bound), bound


def solve_gram(
    problem: Gram, manifold: str, square: bool, solver: Solver, warm: Tensor | None = None
) -> tuple[Answer, Tensor, Tensor]:
    """As `maximise`; by the closed form where there is one, unless `dual_ascent` is asked for."""
    if manifold == "stiefel" and square and solver.name != "dual_ascent":
        answer, bound = maximise_square_stiefel(problem, solver)
        return answer, bound, torch.zeros_like(problem.C)
    return maximise(problem, manifold, solver, warm)


def certificate(problem: Gram, answer: Answer, bound: Tensor) -> Certificate:
    """The certificate (k,) of an answer against a dual value; values come in units of ‖G‖_F and leave in the caller's."""
    eff = torch.where(problem.moving, ratio(answer.value, bound), 1)
    feas = torch.where(problem.moving, ratio(feasible_value(answer), bound), 1)
    ok = answer.ok | ~problem.moving
    fields = (answer.frac, eff, feas, answer.norm, bound * problem.scale, ok, problem.finite)
    return Certificate(*(field.flatten() for field in fields))


# --- tall matrices ---------------------------------------------------------------------------------------------------------


def solve(W: Tensor, G: Tensor, manifold: str, solver: str = "su", calls: int = 3, **settings) -> Step:
    """A feasible, certified answer of (1) for every matrix of W.

    Args:
        W: (m, n) or (k, m, n), any float dtype, on the manifold; wide matrices are answered through their transpose.
        G: momentum, like W, at any scale.
        manifold: a name of MANIFOLDS.
        solver, calls, settings: fields of Solver.

    Returns:
        Step: direction like W (float32 arithmetic inside), certificate (k,).

    Raises:
        ValueError: an unknown manifold or solver, or W and G of different shape.
    """
    check(W, G, manifold)
    config = Solver(name=solver, calls=calls, **settings)
    batched = [tall(X).float().reshape(-1, *tall(X).shape[-2:]) for X in (W, G)]
    with float32_products(W.device):
        problem, unit = gram(*batched, manifold)
        answer, bound, _ = solve_gram(problem, manifold, W.size(-2) == W.size(-1), config)
        length = torch.where(problem.moving, 1 / answer.norm.clamp_min(1), 0)
        A = torch.baddbmm(unit @ (length * answer.F), batched[0], length * answer.M)
    shape = tall(W).shape
    return Step(like(A.reshape(shape), W).to(W.dtype), certificate(problem, answer, bound))


def certify(W: Tensor, G: Tensor, A: Tensor, manifold: str, bound: Tensor) -> Certificate:
    """The certificate of any given A (k, m, n) tall float32 at W against bound (k,), e.g. the optimum or a dual value."""
    check(W, G, manifold)
    with float32_products(W.device):
        problem, unit = gram(W, G, manifold)
        # A as W's coordinates plus a rest: only ⟨G, A⟩ depends on more than N and B, and enters through F = 0, M = 0.
        zero = torch.zeros_like(problem.C)
        T = tangent(problem, CONSTRAINTS[manifold], zero, zero, W.mT @ A, A.mT @ A, Solver())
        value = T.value + inner(unit, A)
        answer = T._replace(value=value, ok=torch.isfinite(value))
    return certificate(problem, answer, bound[:, None, None] / problem.scale)


def check(W: Tensor, G: Tensor, manifold: str) -> None:
    """Refuse what cannot be a step problem."""
    if manifold not in MANIFOLDS:
        raise ValueError(f"unknown manifold {manifold!r}; choose one of {', '.join(MANIFOLDS)}")
    if W.shape != G.shape or W.ndim not in (2, 3):
        raise ValueError(
            f"W {tuple(W.shape)} and G {tuple(G.shape)} must be equally shaped (m, n) or (k, m, n) matrices"
        )
