"""The whole update: answer and certificate in n × n, one trial point, and its retraction by a small matrix.

With T = G F + W M the trial point is V = W - eta T. Every retraction here multiplies it from the right by an n × n matrix X near I,
written as an increment, so that what is small is rounded relative to itself:

    W_new = V X = V + V (X - I)

    stiefel    X = (VᵀV)^(-1/2)                                 the polar factor, nearest point
    dgram      X = c⁻¹ (c⁻¹ VᵀV c⁻¹)^(-1/2) c'                  polar(V / c)·c' with c the column norms of V [ours]
    oblique    X = c⁻¹                                          columns to unit length

VᵀV is that of the V at hand. It could be had in n × n, as WᵀW - eta (WᵀT + TᵀW) + eta² TᵀT, one tall product cheaper; but the
float32 error of TᵀT grows with the condition number of G + 2WL, which is large while gradients have low rank, and would become the
distance of the new weight from the manifold.

On DGram the column norms are free, and under a solver that solves they grow by about half of eta a step. c' = c (1 - eta·decay),
at most norm_cap, controls them and leaves Off(WᵀW) = 0 untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from optim.gram import (
    CONSTRAINTS,
    Gram,
    diagonal,
    float32_products,
    gram,
    identity_like,
    inverts,
    near_identity_inverse_sqrt,
    plus_transpose,
    ratio,
    spectral_norm,
    squared_lengths,
)
from optim.lmo import (
    SKEW,
    SOLVERS,
    Answer,
    Certificate,
    Solver,
    certificate,
    check,
    least_squares_multiplier,
    solve_gram,
)
from optim.manifolds import MANIFOLDS, DGram
from optim.msign import msign

LENGTHS: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda m, n: 1.0,
    "rms": lambda m, n: 0.2 * max(m, n) ** 0.5,
}
"""‖A‖₂ by name: 1, or what gives Muon's update the root mean square .2 that AdamW's has (Moonlight, arXiv 2502.16982)."""


@dataclass(frozen=True)
class Update:
    """How an answer becomes a new weight.

    length: a key of LENGTHS.  decay: decoupled, per unit of eta, of euclidean weights and of DGram's column norms.
    norm_cap: no column of a DGram matrix grows longer than this; None for no cap.
    """

    length: str = "spectral"
    decay: float = 0.0
    norm_cap: float | None = None

    def __post_init__(self) -> None:
        if self.length not in LENGTHS:
            raise ValueError(f"unknown step length {self.length!r}; choose one of {', '.join(LENGTHS)}")


class Problems(NamedTuple):
    """Stacks that are solved as one batch: equal n, manifold and squareness. where: their places among the caller's stacks."""

    where: tuple[int, ...]
    manifold: str
    square: bool


def group(shapes: Sequence[tuple[int, int]], manifolds: Sequence[str]) -> list[Problems]:
    """Which stacks go together. Squares are apart for Stiefel's closed form."""
    batches: dict[tuple[str, int, bool], list[int]] = {}
    for i, ((m, n), manifold) in enumerate(zip(shapes, manifolds)):
        batches.setdefault((manifold, n, m == n), []).append(i)
    return [Problems(tuple(where), manifold, square) for (manifold, _, square), where in batches.items()]


# --- retractions -----------------------------------------------------------------------------------------------------------


def polar_factor(VV: Tensor, eta: Tensor, update: Update) -> tuple[Tensor, Tensor]:
    """X of the Stiefel retraction from VᵀV (k, n, n), which is near a multiple of I."""
    size = diagonal(VV).mean(-1)[:, None, None]
    R = VV / size
    Z = near_identity_inverse_sqrt(R)
    return Z / size.sqrt(), inverts(Z, R)


def column_norms(VV: Tensor, eta: Tensor, update: Update) -> tuple[Tensor, Tensor]:
    """X of the DGram retraction: columns are made orthogonal by polar(V / c), then get their own length back, decayed and capped.

    A tangent step leaves the Gram matrix diagonal to first order, so VᵀV / (c c') is near I until eta nears the column norms.
    """
    c = diagonal(VV).sqrt()
    inverse = ratio(torch.ones_like(c), c)
    after = c * (1 - eta[:, :, 0] * update.decay)
    if update.norm_cap is not None:
        after = after.clamp_max(update.norm_cap)
    unit = inverse[:, :, None] * VV * inverse[:, None, :]
    Z = near_identity_inverse_sqrt(unit)
    return inverse[:, :, None] * Z * after[:, None, :], inverts(Z, unit)


def unit_columns(VV: Tensor, eta: Tensor, update: Update) -> tuple[Tensor, Tensor]:
    """X of the Oblique retraction, which reads the diagonal of VᵀV alone and lands whenever no column vanishes."""
    c = diagonal(VV).sqrt()
    return torch.diag_embed(ratio(torch.ones_like(c), c)), (c > 0).all(-1)[:, None, None]


RETRACTIONS: dict[str, Callable[[Tensor, Tensor, Update], tuple[Tensor, Tensor]]] = {
    "stiefel": polar_factor,
    "dgram": column_norms,
    "oblique": unit_columns,
}
"""By manifold name: the right factor X, and whether it lands on the manifold, (k, 1, 1) bool. Euclidean weights need none."""


def retract(points: Sequence[Tensor], manifold: str, eta: Tensor, update: Update) -> tuple[list[Tensor], Tensor]:
    """V X (k_i, m_i, n) of each trial point V, and whether they landed, (k, 1, 1) bool of all together."""
    if manifold == "euclidean":
        return list(points), torch.cat([torch.isfinite(V.sum((-2, -1), keepdim=True)) for V in points])
    VV = torch.cat([squared_lengths(V) if manifold == "oblique" else V.mT @ V for V in points])
    X, landed = RETRACTIONS[manifold](VV, eta, update)
    back = (X - identity_like(X)).split([V.size(0) for V in points])
    return [torch.baddbmm(V, V, E) for V, E in zip(points, back)], landed


def trial_points(
    data: Sequence[tuple[Tensor, Tensor]], answer: Answer, manifold: str, eta: Tensor, length: Tensor, update: Update
) -> list[Tensor]:
    """V = W - eta·length·T / max(1, ‖T‖₂) (k_i, m_i, n) of each stack; euclidean weights are decayed as well, decoupled.

    data: W and the scaled G that `gram` returned, of each stack. eta, length: (k, 1, 1) of all stacks, the learning rate and ‖A‖₂.
    """
    step = eta * length / answer.norm.clamp_min(1)
    F, M = step * answer.F, step * answer.M
    if manifold == "euclidean":
        M = M + eta * update.decay * identity_like(M)
    sizes = [W.size(0) for W, _ in data]
    points = []
    for (W, G), of_G, of_W in zip(data, F.split(sizes), M.split(sizes)):
        points.append(torch.baddbmm(torch.baddbmm(W, W, of_W, alpha=-1), G, of_G, alpha=-1))
    return points


# --- the step --------------------------------------------------------------------------------------------------------------


class GramStep(NamedTuple):
    """weights, certificates and warm multipliers, one for each stack: (k, m, n), fields of (k,), (k, n, n)."""

    weights: list[Tensor]
    certificates: list[Certificate]
    warm: list[Tensor]


def gram_kernel(
    Ws: Sequence[Tensor],
    Gs: Sequence[Tensor],
    manifolds: Sequence[str],
    etas: Sequence[Tensor],
    solvers: Mapping[str, Solver],
    update: Update,
    warm: Sequence[Tensor] | None = None,
) -> GramStep:
    """`gram_step` without its guard over float32 arithmetic: what torch.compile(..., fullgraph=True) takes."""
    weights, certificates, multipliers = list(Ws), list(Ws), list(Ws)
    for batch in group([tuple(W.shape[-2:]) for W in Ws], manifolds):
        problems, units = zip(*(gram(Ws[i], Gs[i], batch.manifold) for i in batch.where))
        problem = Gram(*(torch.cat(parts) for parts in zip(*problems)))
        start = None if warm is None else torch.cat([warm[i] for i in batch.where])
        answer, bound, L = solve_gram(problem, batch.manifold, batch.square, solvers[batch.manifold], start)
        sizes = [Ws[i].size(0) for i in batch.where]
        lengths = [LENGTHS[update.length](*Ws[i].shape[-2:]) for i in batch.where]
        eta = torch.cat([etas[i].expand(k, 1, 1) for i, k in zip(batch.where, sizes)])
        length = torch.cat([x.new_full((k, 1, 1), size) for x, k, size in zip(eta.split(sizes), sizes, lengths)])
        stacks = [(Ws[i], unit) for i, unit in zip(batch.where, units)]
        points = trial_points(stacks, answer, batch.manifold, eta, length, update)
        moved, landed = retract(points, batch.manifold, eta, update)
        moves = (problem.moving & landed).split(sizes)
        fields = [field.split(sizes) for field in certificate(problem, answer._replace(ok=answer.ok & landed), bound)]
        for j, i in enumerate(batch.where):
            weights[i] = torch.where(moves[j], moved[j], Ws[i])
            certificates[i] = Certificate(*(field[j] for field in fields))
            multipliers[i] = L.split(sizes)[j]
    return GramStep(weights, certificates, multipliers)


def gram_step(
    Ws: Sequence[Tensor],
    Gs: Sequence[Tensor],
    manifolds: Sequence[str],
    etas: Sequence[Tensor],
    solvers: Mapping[str, Solver],
    update: Update,
    warm: Sequence[Tensor] | None = None,
    kernel: Callable[..., GramStep] = gram_kernel,
) -> GramStep:
    """One update of every matrix, batched over all of equal n and manifold. Pure, and without a host sync.

    Args:
        Ws, Gs: stacks (k_i, m_i, n_i) tall, float32: weights on their manifold, and momenta at any scale.
        manifolds: a name of MANIFOLDS for each stack.
        etas: 0-d learning rates on the device, one for each stack.
        solvers: the Solver of each manifold that occurs.
        warm: multipliers that the step before returned; in units of ‖G‖_F, so that they need no rescaling.
        kernel: gram_kernel, or torch.compile of it.

    Returns:
        GramStep. A matrix whose G is zero or not finite keeps its weight bitwise.

    Raises:
        ValueError: a manifold without a solver, or G shaped unlike W.

    The guard: a retraction that does not land keeps the weight, and `ok` is False. An answer that is not finite, too long, above its
    dual bound, or at odds with its Gram matrix is not taken; if none is left, the step is along the normalised tangent projection of
    G, which float32 cannot spoil, and the certificate's `ok` is False. `rectangular_step` repeats such a matrix without squaring its
    condition number, once the caller has read `ok`: at once on a CPU; on CUDA a step later from a pinned copy, which costs no sync.
    """
    for W, G, manifold in zip(Ws, Gs, manifolds):
        check(W, G, manifold)
        if manifold not in solvers:
            raise ValueError(
                f"no solver for manifold {manifold!r}; give one of its own in solvers ({', '.join(solvers)})"
            )
    with torch.no_grad(), float32_products(Ws[0].device):
        return kernel(Ws, Gs, manifolds, etas, solvers, update, warm)


def rectangular_step(W: Tensor, G: Tensor, manifold: str, eta: Tensor, update: Update) -> Tensor:
    """The update of W (k, m, n) by one rectangular float32 matrix sign at the least-squares multiplier, and an exact retraction: the guard's
    second thought.

    Costs many times the Gram form, and holds up to condition numbers of 1e5 where that one ends at 1e3, and for steps as long as the
    columns. Where G is zero or not finite the weight is kept.
    """
    constraint = CONSTRAINTS[manifold]
    with torch.no_grad(), float32_products(W.device):
        problem, unit = gram(W, G, manifold)
        A = msign(torch.baddbmm(unit, W, 2 * least_squares_multiplier(problem, constraint)), _STEPS, torch.float32)
        N = W.mT @ A
        T = A - W @ constraint.normal(problem, constraint.project(plus_transpose(N)))
        length = LENGTHS[update.length](*W.shape[-2:]) / spectral_norm(T.mT @ T, iterations=24).clamp_min(1)
        V = W - eta * length * T
        if manifold == "euclidean":
            V = V - eta * update.decay * W
        V = torch.where(V.isfinite().all(dim=(-2, -1), keepdim=True), V, W)  # an SVD raises on anything else
        moved = _EXACT[manifold].retract(V)
        if manifold == "dgram":
            c = torch.linalg.vector_norm(moved, dim=-2, keepdim=True)
            after = c * (1 - eta * update.decay)
            moved = moved * ratio(after if update.norm_cap is None else after.clamp_max(update.norm_cap), c)
        return torch.where(problem.moving, moved, W)


_STEPS = 12  # of the rectangular matrix sign, for singular values down to 1e-5 of the Frobenius norm
_EXACT = {**MANIFOLDS, "dgram": DGram("column_norms")}  # retractions by SVD, for V however far from the manifold


# --- cost ------------------------------------------------------------------------------------------------------------------


def answer_products(manifold: str, square: bool, solver: Solver) -> int:
    """n × n × n products of `solve_gram` for one matrix."""
    if manifold == "stiefel" and square and solver.name != "dual_ascent":
        return 1 + 3 * len(SKEW) + 1 + 1
    method = SOLVERS[solver.name]
    sign = 2 + 4 * solver.root_steps - 3
    answers = solver.calls if method.keep else 1
    return 1 + solver.calls * sign + 4 * answers + (solver.calls - 1) * method.products(solver) + 18 * solver.cap


def step_flops(shapes: Sequence[tuple[int, int, int]], manifolds: Sequence[str], solvers: Mapping[str, Solver]) -> int:
    """FLOPs (2 a multiply-add) of one gram_step on tall stacks (k, m, n), matrix products only, counted as they are made."""
    flops = 0
    for (k, m, n), manifold in zip(shapes, manifolds):
        tall = 4 if manifold == "euclidean" else 6  # GᵀG, WᵀG, W M, G F; then VᵀV (on oblique WᵀW instead), V (X - I)
        small = answer_products(manifold, m == n, solvers[manifold]) + (5 if manifold in ("stiefel", "dgram") else 0)
        flops += 2 * k * n * n * (tall * m + small * n)
    return flops
