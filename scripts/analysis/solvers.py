"""For the study of the step problem: several dual methods, and its optimum. No run uses this module; the step is optim/certified.py.

Each method computes a sequence of multipliers L of

    minimise ‖G + 2WL‖_*   over symmetric L = P(L),                                                    (dual of the step problem)

and each of its calls costs one matrix sign. The answer at L is the tangent part of A = sign(G + 2WL). Everything is computed in float64, by
eigendecompositions of n × n matrices, so that rounding does not blur the comparison. `python scripts/bench.py lmo` writes the table.

    least_squares   the tangent projection of G; one call. So do MCSD and SPEL (arXiv 2601.21487) and MACRO (arXiv 2605.04418)
    su              the fixed point of Su (kexue.fm 11221), over-relaxed up to 1.6 [relaxation: our measurement]
    su_anderson     the same with Anderson acceleration over the last three iterates
    dual_ascent     as published: L -= alpha (1 - k/K) H in the units of G, with alpha = 0.1 (arXiv 2606.13276)
    slow_ascent     the same with alpha = 0.01, as the blog post on modular manifolds has it, for 100 calls

Two methods of the sources have no multiplier:

    alternating     A ← sign(tangent part of A), from G on (Cesista, leloykun.github.io); each call costs one sign
    intrinsic       W sign(skew(WᵀG)) + sign((I - WWᵀ) G), on Stiefel: the best step in another metric (iMuon, arXiv 2605.09238); two signs
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from optim.certificate import StepProblem
from optim.linalg import eye_like, inner
from optim.manifolds import MANIFOLDS, polar, stacked, unstacked

History = tuple[tuple[Tensor, Tensor], ...]


class Iterate(NamedTuple):
    """A call of a method: its number k of `calls`, the multiplier L, and H and Z of StepProblem.sign_at there, (k, n, n).

    past: what the method kept of earlier calls.
    """

    problem: StepProblem
    L: Tensor
    H: Tensor
    Z: Tensor
    k: int
    calls: int
    past: History


Advance = Callable[[Iterate], tuple[Tensor, History]]
"""The next L (k, n, n), and the new history."""

MEMORY = 3  # how many earlier iterates Anderson's acceleration combines
ALPHA = {"dual_ascent": 0.1, "slow_ascent": 0.01}  # step sizes of dual ascent, by method


def _stay(at: Iterate) -> tuple[Tensor, History]:
    return at.L, at.past


def _ascend(at: Iterate, alpha: float) -> tuple[Tensor, History]:
    return at.L - alpha * (1 - at.k / at.calls) / at.problem.scale * at.H, at.past


def _su(at: Iterate) -> tuple[Tensor, History]:
    return at.L + min(1.2 + 0.2 * at.k, 1.6) * at.problem.su_step(at.H, at.Z, 30), at.past


def _anderson(at: Iterate) -> tuple[Tensor, History]:
    """The combination of the last iterates whose combined Su steps are shortest (Anderson, type II)."""
    L, f = at.L, at.problem.su_step(at.H, at.Z, 30)
    new, older = L + f, at.past[-MEMORY:]
    if older:
        dF = torch.stack([(f - g).flatten(1) for _, g in older], dim=1)  # (k, memory, n²)
        normal = dF @ dF.mT
        normal = normal + (1e-10 * inner(normal, eye_like(normal)) + torch.finfo(normal.dtype).tiny) * eye_like(normal)
        weights = torch.linalg.solve(normal, dF @ f.flatten(1)[:, :, None])
        for j, (L_j, f_j) in enumerate(older):
            new = new - weights[:, j, :, None] * (L + f - L_j - f_j)
    return new, (*older, (L, f))


METHODS: dict[str, Advance] = {
    "least_squares": _stay,
    "su": _su,
    "su_anderson": _anderson,
    **{name: partial(_ascend, alpha=alpha) for name, alpha in ALPHA.items()},
}


def _alternating(problem: StepProblem, calls: int) -> Tensor:
    T = problem.tangent(problem.G)
    for _ in range(calls):
        T = problem.tangent(polar(T))
    return T


def _intrinsic(problem: StepProblem, calls: int) -> Tensor:
    W, C = problem.W, problem.C
    T = W @ polar(0.5 * (C - C.mT))
    return T + polar(problem.G - W @ C) if W.size(-2) > W.size(-1) else T


DIRECT: dict[str, Callable[[StepProblem, int], Tensor]] = {"alternating": _alternating, "intrinsic": _intrinsic}
"""The methods without a multiplier: problem, calls → a tangent direction (k, m, n)."""


class Answer(NamedTuple):
    """T / max(1, ‖T‖₂) like W, in float64; feas (k,), a lower bound of its share of the optimum."""

    T: Tensor
    feas: Tensor


@torch.no_grad()
def solve(W: Tensor, G: Tensor, manifold: str, method: str = "su_anderson", calls: int = 24) -> Answer:
    """The best answer among `calls` multipliers of a method. Of dual ascent it is the last one, as published.

    Args:
        W, G: (m, n) or (k, m, n), any orientation; W on the manifold, a name of MANIFOLDS.
        method: a key of METHODS or DIRECT.

    Raises:
        ValueError: an unknown method, or one that is not for this manifold, or no calls.
    """
    if method not in (*METHODS, *DIRECT) or calls < 1:
        names = ", ".join((*METHODS, *DIRECT))
        raise ValueError(f"choose a method among {names}, and calls of 1 or more; got {method!r}, {calls}")
    if method == "intrinsic" and manifold != "stiefel":
        raise ValueError(f"intrinsic is for stiefel only; choose another method for {manifold}")
    tall_W, tall_G = (stacked(X) for X in (W, G))
    problem = StepProblem(tall_W, tall_G, MANIFOLDS[manifold])
    if method in DIRECT:
        T = DIRECT[method](problem, calls)
        T = T / torch.linalg.matrix_norm(T, 2, keepdim=True).clamp_min(1)
        return Answer(unstacked(T, W), (inner(problem.G, T) / problem.dual_value()).flatten())
    L = problem.least_squares()
    if method in ALPHA:
        L = -0.25 * problem.manifold.project(problem.C + problem.C.mT)
    best = torch.zeros_like(problem.G)
    bound = torch.full_like(problem.scale, torch.inf)
    past: History = ()
    for k in range(calls):
        value, H, Z = problem.sign_at(L)
        bound = torch.minimum(bound, value)
        T = problem.tangent((problem.G + 2 * problem.W @ L) @ Z)
        T = T / torch.linalg.matrix_norm(T, 2, keepdim=True).clamp_min(1)
        last = k == 0 or method in ALPHA
        best = T if last else torch.where(inner(problem.G, T) > inner(problem.G, best), T, best)
        L, past = METHODS[method](Iterate(problem, L, H, Z, k, calls, past))
    feas = (inner(problem.G, best) / bound).flatten()
    return Answer(unstacked(best, W), feas)


@torch.no_grad()
def optimum(W: Tensor, G: Tensor, manifold: str, iterations: int = 500) -> tuple[float, float]:
    """Bounds of the optimum of the step problem of one tall W, G (m, n): above, the least dual value found; below, a feasible value.

    L-BFGS in float64 on the dual, then over-relaxed alternating projection between ‖T‖₂ ≤ 1 and the tangent space.
    """
    problem = StepProblem(W[None].double(), G[None].double(), MANIFOLDS[manifold])
    L = problem.least_squares().clone().requires_grad_(True)
    search = torch.optim.LBFGS([L], lr=1, max_iter=iterations, history_size=50, line_search_fn="strong_wolfe")

    def dual() -> Tensor:
        value, H, _ = problem.sign_at(problem.manifold.project(0.5 * (L.detach() + L.detach().mT)))
        L.grad = H
        return value.sum()

    search.step(dual)
    upper, _, Z = problem.sign_at(L.detach())
    T = problem.tangent((problem.G + 2 * problem.W @ L.detach()) @ Z)
    lower = torch.zeros_like(upper)
    for _ in range(200):
        U, s, Vh = torch.linalg.svd(T, full_matrices=False)
        lower = torch.maximum(lower, inner(problem.G, T) / s[:, :1, None].clamp_min(1))
        T = problem.tangent((U * (s - 1.5 * (s - 1).clamp_min(0))[:, None, :]) @ Vh)
    scale = problem.scale.item()
    return upper.item() * scale, lower.item() * scale
