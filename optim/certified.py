"""How a gradient becomes a step on a manifold: the certified step of `optim=manifold_muon`, from top to bottom.

For tall W (m × n) on a manifold with Gram projector P, and momentum G,

    maximise ⟨G, T⟩   subject to   ‖T‖₂ ≤ 1,   P(WᵀT + TᵀW) = 0,        then   W ← retraction of W - eta·T.          (1)

Dual.  For symmetric L = P(L) every feasible T has ⟨G, T⟩ = ⟨G + 2WL, T⟩ ≤ ‖X‖_* with X = G + 2WL, and the matrix sign of X attains it.
So a good L makes sign(X) nearly tangent, and any L bounds the optimum from above: optim/certificate.py measures every step by that.

    1. multiplier   L that makes X the tangent projection of G (least squares), then a Su step toward the best L (kexue.fm 11221)
    2. sign         A = X (XᵀX)^(-1/2), smoothed: singular values below `lower` stay small
    3. tangent      T = A - W K deletes what the retraction would delete anyway
    4. cap          step 3 raised some singular values of T above 1; dividing T by ‖T‖₂ would shorten all: lower those alone, project again
    5. retract      V = W - eta·T / max(1, ‖T‖₂), then V (VᵀV)^(-1/2) by a small n × n factor
    6. fallback     where V is too far from the manifold for that, or the products' precision gives no direction, the weight stays, and the next
                    step of this matrix takes a second round, or is made exactly and in float32

A square Stiefel matrix has the closed form T = W·sign(skew(WᵀG)). A set without a Gram condition may take its direction from
problem (1) on another manifold (`Manifold.problem`), and moves by `Manifold.move` instead of 5 and 6.

Legend.  W weight, c the lengths of its columns, U = W/c; G momentum, scaled to the largest entry LARGEST_ENTRY; C = UᵀG; `cL` the
multiplier L with row i times c_i, so that W L = U·cL and nothing overflows where lengths differ; S = XᵀX; A matrix sign; N = UᵀA; K the
factor of the normal part, which is W K or U·cK; B has the symmetric part TᵀT; T direction; R what caps it, T R; V trial point;
E = P(VᵀV) - target, on Stiefel VᵀV - I; M what a round of the retraction adds, V (I + M). Shapes: k matrices of one tall shape,
(k, m, n). Matrices are kept in the precision of `mm`, the products (optim/linalg.py); weights, V, E and M are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .frame import Frame, frame_of
from .iterators import Iteration
from .linalg import (
    Products,
    cap_fit,
    compiled_whole,
    exact_sums,
    eye_like,
    frobenius,
    gram_stage,
    inverse_sqrt_increment,
    largest_eigenvalue,
    matrix_sign,
    over,
    products_for,
    ratio,
    sign_coefficients,
    skew_sign,
    su_step,
    symmetric_sum,
)
from .manifolds import MANIFOLDS, Effort, Manifold, stacked, unstacked
from .msign import iterate
from .refine import Refine
from .stack import EXACTLY, ONE_ROUND, TWO_ROUNDS, Moved, Stack

LENGTHS: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda m, n: 1.0,
    "rms": lambda m, n: 0.2 * max(m, n) ** 0.5,
}
"""‖T‖₂ by name: 1, or what gives Muon's update the root mean square .2 that AdamW's has (Moonlight, arXiv 2502.16982)."""

FAR = 0.1  # the distance from a manifold from which on `direction` refuses a matrix; bfloat16 weights are .01 away
LARGEST_ENTRY = 0.125  # of G as the step sees it: far from both ends of float16, and so is 1/‖G‖₂ up to 2^30 entries
SKEW_STEPS, SKEW_LOWER = 7, 1e-3  # of a square Stiefel matrix; feas .997 and more on recorded problems
CAP_FROM = 0.5  # the cap's polynomial is fitted on singular values in [CAP_FROM, 1]·‖T‖₂; smaller ones hardly exist
# Lanczos iterations for ‖T‖₂ in n × n, and with the tall T itself, which costs memory traffic: 2% short on average and 6.5% at most on recorded
# problems, up to a fifth on random ones of low rank.
SMALL_NORM_STEPS, TALL_NORM_STEPS = 7, 2
# A direction is used only if the tangent share of G is above so many eps of the products: in general, and in the closed form of a square
# Stiefel matrix. At a third of the first, every one of 400 random momenta has a feas above .85 in float16
# (tests/test_hard_momenta.py).
TANGENT_SHARE, SKEW_SHARE = 48.0, 4.0

# ‖E‖₂ above which the next step has two rounds, and is exact. At the first limit, one round leaves an error of 5/16·‖E‖³ = 2e-7; at the
# second, two rounds would still land.
ASK_TWO_ROUNDS, ASK_EXACTLY = 0.008, 0.15
LANDS = (0.015, 0.3)  # ‖E‖ that one round, and two, still bring onto the manifold to a few 1e-6
# Lanczos iterations for ‖E‖₂: at most two fifths short on random E; the limits above leave room for that
DISTANCE_STEPS = 4


# ---- 1. multiplier ----


def dual_matrix(frame: Frame, G: Tensor, C: Tensor, effort: Effort, mm: Products) -> tuple[Tensor, Tensor | None]:
    """X = G + 2WL (k, m, n), and XᵀX (k, n, n) float32 if that is known in n × n. C: UᵀG.

    The normal part of G is taken away first, in m × n. A momentum may be normal for the most part: taken from GᵀG, that part would leave
    negative eigenvalues of XᵀX, with which no inverse root converges.
    """
    cK = frame.normal(C)
    X = mm.add(G, 1.0, frame.U, cK, alpha=-1.0)  # the tangent part of G
    if not effort.su:
        return X, None
    # UᵀX. A difference loses digits: in 16 bits X has lost as many, in float32 they matter.
    UX = C - frame.times_gram(cK, mm) if mm.is_16_bit else mm(frame.U.mT, X)
    S = mm.in_float32(X.mT, X)
    size = frobenius(S)
    # From here all but X is in units of the root of size, in which ‖X‖₂ ≤ 1: what is tangent may be small, and its squares must not leave
    # float16.
    XX = S = over(S, size).to(mm.dtype)  # (k, n, n)
    UX = over(UX, size.sqrt()).to(mm.dtype)
    cL = UWL = torch.zeros_like(UX)  # of what the Su steps add to L; UWL is UᵀW L
    coefficients, metric = sign_coefficients(effort.su_steps, effort.su_lower), partial(frame.metric, mm=mm)
    for _ in range(effort.su):
        Z = gram_stage(over(S, frobenius(S)).to(mm.dtype), coefficients, mm)  # (k, n, n) ≈ (XᵀX)^(-1/2), up to a factor
        H = frame.tangency(mm(UX + 2 * UWL, Z)).to(mm.dtype)  # (k, n, n): UᵀA = (UᵀX) Z
        dL = su_step(frame.manifold.project, metric, H, Z, frame.d, effort.conjugate_gradients, mm)
        cL = (cL + effort.relaxation * frame.c * dL).to(mm.dtype)
        UWL = frame.times_gram(cL, mm)
        S = XX + 2 * symmetric_sum(mm(cL.mT, UX + UWL))
    return mm.add(X, 1.0, frame.U, cL * size.sqrt(), alpha=2.0), S.float() * size


# ---- 2. sign, 3. tangent, 4. cap ----


def cap_polynomial(norm: Tensor, effort: Effort) -> Tensor:
    """Coefficients (k, degree + 1, 1, 1) of p with s·p(s²/‖T‖²) ≈ min(s, 1), over-relaxed, for singular values s of T; norm (k, 1, 1)."""
    nodes, fit = cap_fit(effort.cap_degree, CAP_FROM, norm)
    s = norm.flatten(1) * nodes  # (k, nodes)
    factor = 1 + effort.cap_relaxation * ((1 / s).clamp_max(1) - 1)
    return (factor @ fit.mT)[:, :, None, None]


def cap_factor(B: Tensor, effort: Effort, mm: Products) -> Tensor:
    """R (k, n, n) for which T R has the singular values of T, capped at 1, from B with the symmetric part TᵀT; effort.cap_degree - 1 products."""
    B = 0.5 * symmetric_sum(B)
    norm = largest_eigenvalue(lambda v: mm.times_vector(B, v), B, SMALL_NORM_STEPS).sqrt().clamp_min(1)
    p = cap_polynomial(norm, effort)  # (k, degree + 1, 1, 1)
    x = B / norm**2
    R = p[:, -1] * x + p[:, -2] * eye_like(x)
    for j in range(effort.cap_degree - 2, -1, -1):
        R = mm(R, x) + p[:, j] * eye_like(x)
    return R.to(mm.dtype)


def tangent_sign(W: Tensor, G: Tensor, manifold: Manifold, effort: Effort, mm: Products) -> tuple[Tensor, Tensor]:
    """T (k, m, n) near the optimum of (1), tangent, and ‖X‖_F (k, 1, 1), the size of what there was to take a sign of."""
    if not manifold.conditioned:
        if effort.iterator:
            return iterate(G, effort.iterator.coefficients, effort.iterator.margin, mm.dtype), frobenius(G)
        return matrix_sign(G, effort.stages, effort.lower, mm)[0], frobenius(G)
    if manifold.closed_form(W):
        U = W.to(mm.dtype)
        C = mm(U.mT, G)  # (k, n, n)
        skew = 0.5 * (C - C.mT)
        return mm(U, skew_sign(skew, SKEW_STEPS, SKEW_LOWER, mm)), frobenius(skew)
    frame = frame_of(W, manifold, mm)
    C = mm(frame.U.mT, G)  # (k, n, n)
    X, S = dual_matrix(frame, G, C, effort, mm)
    A, gram_of_A = matrix_sign(X, effort.stages, effort.lower, mm, S)  # (k, m, n)
    for i in range(effort.caps):  # A becomes its tangent part, nearly capped
        AA = mm(A.mT, A) if i else gram_of_A()  # (k, n, n) = AᵀA
        N = mm(frame.U.mT, A)  # (k, n, n)
        cK = frame.normal(N)
        removed = frame.times_gram(cK, mm)  # UᵀU·cK
        # The tangent part of A is T = A - U·cK, and TᵀT the symmetric part of AᵀA - 2cKᵀ(N - UᵀU·cK/2).
        R = cap_factor(mm.add(AA, 1.0, cK.mT, N - 0.5 * removed, alpha=-2.0), effort, mm)
        # T R, less its own normal part: UᵀTR = (N - UᵀU·cK) R.
        A = mm.add(mm(A, R), 1.0, frame.U, mm(cK, R) + frame.normal(mm(N - removed, R)), alpha=-1.0)
    return A, frobenius(X)


def least_share(W: Tensor, manifold: Manifold, mm: Products) -> float:
    """The tangent share of ‖G‖_F above which a direction made by these products is used."""
    return (SKEW_SHARE if manifold.closed_form(W) else TANGENT_SHARE) * torch.finfo(mm.dtype).eps


class Direction(NamedTuple):
    """T (k, m, n), in the precision of the products; scale (k, 1, 1) float32: 1 / max(1, ‖T‖₂), or 0 where there is no direction.

    There is none where G is zero, or where it `failed` (k,): G is not finite, or what is tangent in G is lost in the rounding of the products.
    """

    T: Tensor
    scale: Tensor
    failed: Tensor


def direction_of(W: Tensor, G: Tensor, manifold: Manifold, effort: Effort, mm: Products) -> Direction:
    """The direction of the step at tall W along G, both float32, G at any scale."""
    W, G, manifold = manifold.problem(W, G)  # from here on, those whose problem (1) is solved
    # By the largest entry: squares of a gradient of size 1e-25 or 1e25 leave the range of float32.
    largest = G.abs().amax(dim=(-2, -1), keepdim=True)
    given = torch.isfinite(largest) & (largest > 0)
    G = torch.where(given, G, 0) / torch.where(given, largest, 1) * LARGEST_ENTRY
    G = G.to(mm.dtype)
    T, size = tangent_sign(W, G, manifold, effort, mm)
    norm = largest_eigenvalue(lambda v: mm.times_vector(T.mT, mm.times_vector(T, v)), T, TALL_NORM_STEPS).sqrt()
    # Both comparisons are false where a number is NaN.
    found = given & norm.isfinite() & (ratio(size, frobenius(G)) > least_share(W, manifold, mm))
    return Direction(T, torch.where(found, 1 / norm.clamp_min(1), 0), (~found & (largest != 0)).flatten())


# ---- 5. retract ----


def polish(
    V: Tensor, manifold: Manifold, shrink: Tensor | float, norm_cap: float, mm: Products
) -> tuple[Tensor, Tensor, Tensor]:
    """One round of the retraction: V (I + M) (k, m, n), the small M (k, n, n), and E (k, n, n) of V in the precision of the products.

    M makes V (VᵀV)^(-1/2) of V. Where lengths l of columns are free, it makes that of V/l, whose columns then get the lengths l·f, with
    f = shrink, or less for a length of at most norm_cap: (V/l)(I + M₁)(l·f) = V (I + M) with M = l⁻¹ M₁ l·f + f - I.
    """
    S, squares, V_rounded = mm.gram(V)  # (k, n, n), (k, n)
    lengths = squares.sqrt()[:, :, None] if manifold.free_lengths else None  # (k, n, 1)
    E = manifold.defect(S if lengths is None else over(over(S, lengths), lengths.mT))
    E_rounded = E.to(mm.dtype)
    M = inverse_sqrt_increment(E, E_rounded, mm)
    if lengths is not None:
        factor = torch.clamp_max(shrink * torch.ones_like(lengths), norm_cap / lengths).mT  # (k, 1, n)
        M = over(M, lengths) * lengths.mT * factor + torch.diag_embed(factor.squeeze(-2) - 1)
    return mm.times_near_identity(V, V_rounded, M), M, E_rounded


def retract(
    V: Tensor, manifold: Manifold, shrink: Tensor, norm_cap: float, level: Tensor, highest: int, mm: Products
) -> tuple[Tensor, Tensor]:
    """A point of the manifold near the trial point V (k, m, n), and ‖E‖₂ (k,), how far V was from it.

    The distance is infinite where the increment M is not finite. Free lengths of columns become length·shrink, at most norm_cap.
    highest: ONE_ROUND; TWO_ROUNDS, a second one where the level (k,) asks for it; EXACTLY, an exact retraction, and a round for the lengths.
    """
    new, M, E = polish(V, manifold, shrink, norm_cap, mm)
    if highest == EXACTLY:
        new, M, _ = polish(manifold.retract(torch.where(V.isfinite(), V, 0)), manifold, shrink, norm_cap, mm)
    distance = largest_eigenvalue(lambda v: mm.times_vector(E, v), E, DISTANCE_STEPS).flatten()
    distance = torch.where(M.to(mm.dtype).isfinite().all(dim=(-2, -1)), distance, torch.inf)
    if highest == TWO_ROUNDS:
        again, _, _ = polish(new, manifold, 1.0, torch.inf, mm)
        new = torch.where(level[:, None, None] >= TWO_ROUNDS, again, new)
    return new, distance


# ---- the step ----


def reach(length: str, m: int, n: int, whole: tuple[int, int] | None) -> float:
    """The length of a step of one (m, n) matrix in spectral norm, per unit of eta.

    With `whole`, the shape of the uncut parameter, its blocks together move as far as it would, in root mean square: a direction of
    which all min(m, n) singular values are 1 has ‖T‖_F² = min(m, n), and those of the blocks add up. [ours]
    """
    if whole is None:
        return LENGTHS[length](m, n)
    blocks = whole[0] * whole[1] / (m * n)
    return LENGTHS[length](*whole) * (min(whole) / (blocks * min(m, n))) ** 0.5


def step(
    W: Tensor,
    G: Tensor,
    eta: Tensor,
    level: Tensor,
    skip: Tensor,
    manifold: Manifold,
    effort: Effort,
    mm: Products,
    *,
    highest: int = 0,
    decay: float = 0.0,
    length: str = "spectral",
    norm_cap: float | None = None,
    whole: tuple[int, int] | None = None,
    refine: Refine | None = None,
) -> Moved:
    """One update of tall W (k, m, n) float32 on its manifold along momentum G, at any scale. Pure, without a host sync.

    Args:
        eta: 0-d learning rate on the device: the length of the step in spectral norm, times LENGTHS[length].
        level: (k,), see optim/stack.py. highest: the largest level that is served; see `retract`.
        skip: 0-d or (k,) bool, on the device: where true nothing moves, whatever G is.
        decay: decoupled, per unit of eta, of weights without a Gram condition (but see their `move`) and of free lengths of columns;
            norm_cap: after the step no free length is longer; longer ones are cut to it at once.
        whole: the shape of the parameter of which the matrices are blocks, if its step is to be as long as without the cut, see `reach`.
        refine: what happens to the direction before it is taken, see optim/refine.py.

    Returns:
        Moved. Where there is no direction, or V did not land, the weight is kept bitwise.
    """
    T, scale, failed = direction_of(W, G, manifold, effort, mm)
    moving, failed = (scale.flatten() > 0) & ~skip, failed & ~skip
    row_squares = rows_before = None if refine is None else refine.row_squares
    if refine is not None:
        T, row_squares = refine(torch.where(scale > 0, scale * T, 0), W, manifold)
        scale = (scale > 0).to(T.dtype)
    shrink = 1 - eta * decay
    step_length = eta * reach(length, W.size(-2), W.size(-1), whole)  # 0-d
    exact = highest == EXACTLY
    if manifold.gram_space:
        cap = torch.inf if norm_cap is None else norm_cap
        new, distance = retract(W - step_length * scale * T, manifold, shrink, cap, level, highest, mm)
        landed = distance < torch.inf if exact else distance <= torch.where(level >= TWO_ROUNDS, LANDS[1], LANDS[0])
        wanted = torch.where(distance <= ASK_EXACTLY, TWO_ROUNDS, EXACTLY)  # NaN asks for EXACTLY
        wanted = torch.where(distance <= ASK_TWO_ROUNDS, ONE_ROUND, wanted).to(level.dtype)
    else:
        new = manifold.move(W, G, scale * T, step_length, shrink)
        landed, wanted = torch.ones_like(moving), torch.zeros_like(level)
    taken = moving & landed
    next_level = torch.where(moving, wanted, level)
    next_level = torch.where(failed, ONE_ROUND if exact else EXACTLY, next_level)
    if row_squares is not None and rows_before is not None:
        row_squares = torch.where(taken[:, None], row_squares, rows_before)
    return Moved(
        W=torch.where(taken[:, None, None], new, W),
        T=T,
        scale=torch.where(taken[:, None, None], scale, 0),
        level=next_level,
        fallback=failed | (moving if exact else moving & ~landed),
        row_squares=row_squares,
    )


# ---- 6. the rule, with its fallback ----


@dataclass(frozen=True)
class CertifiedStep:
    """The step rule `certified` of ManifoldMuon: every stack by `step`.

    Each matrix steps at the level that its last step asked for: one round of the retraction, two, or an exact step. The level is kept with
    the matrix, on the device. The host knows the highest level of a stack (`Stack.highest`), which its last step sent; it decides what is
    computed. Where a matrix asked for EXACTLY, which no healthy matrix does, its stack is stepped once more, exactly and in float32, for
    those matrices alone.

    Args:
        quality: a key of a manifold's `efforts`: "default" or "high", which has more Su steps and caps: up to twice the operations. It is
            better for momenta of full rank, and on tall Stiefel matrices worse for momenta of low rank.
        products: a name of PRECISIONS, or None for the device's own.
        length, norm_cap: see `step`; weight decay comes with the stacks.
        iterator: of unconstrained matrices; None for the step's own, see `Effort`.
        compile: put `step` through torch.compile, which fuses what lies between the products; None for the device's own: on CUDA.

    Raises:
        ValueError: an unknown quality, precision or length, a cap that is not above 0, or an iterator that diverges in the products'
            precision.
    """

    quality: str = "default"
    products: str | None = None
    length: str = "spectral"
    norm_cap: float | None = None
    compile: bool | None = None
    iterator: Iteration | None = None

    def __post_init__(self) -> None:
        for manifold in MANIFOLDS.values():
            effort_of(manifold, self.quality)
        products_for(torch.device("cpu"), self.products)
        if self.length not in LENGTHS:
            raise ValueError(f"unknown step length {self.length!r}; choose one of {', '.join(LENGTHS)}")
        if self.norm_cap is not None and not (isinstance(self.norm_cap, Real) and self.norm_cap > 0):
            raise ValueError(f"norm_cap is {self.norm_cap!r}; give a number above 0, or None for no cap")
        if self.iterator:
            # By default the precision that a GPU would choose, so that a rule fits any device.
            self.iterator.require(getattr(torch, self.products or "float16"))

    def describe(self, device: torch.device) -> str:
        """What a person should know of the rule on this device, in one line."""
        precision = products_for(device, self.products).precision
        return f"certified step, {self.quality} quality, {precision} products"

    def init(self, W: Tensor, manifold: str) -> Tensor:
        """W (..., m, n), any orientation, brought onto the manifold by its exact retraction."""
        return MANIFOLDS[manifold].retract(W)

    def __call__(self, stack: Stack) -> Moved:
        """What `step` makes of a stack, each matrix at its level."""
        W, level, manifold = stack.W, stack.level, MANIFOLDS[stack.manifold]
        effort = replace(effort_of(manifold, self.quality), iterator=self.iterator)
        given = (W, stack.G, stack.eta, level, stack.skip, manifold, effort)
        settings: dict[str, Any] = {"decay": stack.weight_decay, "length": self.length, "norm_cap": self.norm_cap}
        settings |= {"whole": stack.whole, "refine": stack.refine}
        call = compiled_whole(step) if (W.is_cuda if self.compile is None else self.compile) else step
        with torch.no_grad(), exact_sums(W.device):
            highest = min(stack.highest, TWO_ROUNDS)
            moved = call(*given, products_for(W.device, self.products), highest=highest, **settings)
            if stack.highest < EXACTLY:
                return moved
            # Rare: not worth a compilation.
            exact = step(*given, Products("float32"), highest=EXACTLY, **settings)
            # An exact step asks for what its own distance needs. Where the ordinary step failed again just now, the next one is exact too:
            # otherwise the matrix would move in every second step only.
            stays = (moved.level == EXACTLY) & (exact.scale.flatten() > 0)
            exact = exact._replace(level=torch.where(stays, EXACTLY, exact.level))
            return _choose(level == EXACTLY, exact, moved)


def _choose(mask: Tensor, yes: Moved, no: Moved) -> Moved:
    """Of each matrix what `yes` holds where mask (k,) is true, else what `no` holds."""

    def choose(x: Any, y: Any) -> Any:
        return None if x is None else torch.where(mask.view(-1, *[1] * (x.ndim - 1)), x, y)

    return Moved(*(choose(x, y) for x, y in zip(yes, no)))


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
        G: momentum, shaped like W, at any scale. The direction is zero where G is zero or not finite, or where its tangent part is lost in the
            rounding of the products; float32 keeps what 16 bits lose.
        manifold: a name of MANIFOLDS.
        products: "float32", "float16" or "bfloat16"; None for the device's choice.
        quality: "default" or "high".

    Raises:
        ValueError: an unknown manifold, precision or quality, W and G of different shape, or W is far from the manifold.
    """
    if manifold not in MANIFOLDS:
        raise ValueError(f"unknown manifold {manifold!r}; choose one of {', '.join(MANIFOLDS)}")
    if W.shape != G.shape or W.ndim not in (2, 3):
        raise ValueError(f"W {tuple(W.shape)} and G {tuple(G.shape)} must be equally shaped (m, n) or (k, m, n)")
    M = MANIFOLDS[manifold]
    if (distance := M.distance(W).max().item()) > FAR:
        raise ValueError(
            f"W is {distance:.2g} from {manifold}; divide it by its radius, if it has one, or retract it: MANIFOLDS['{manifold}'].retract(W)"
        )
    stacks = [stacked(X).float() for X in (W, G)]
    with torch.no_grad(), exact_sums(W.device):
        T, scale, *_ = direction_of(stacks[0], stacks[1], M, effort_of(M, quality), products_for(W.device, products))
        T = torch.where(scale > 0, T.double(), 0)
        T = T / torch.linalg.matrix_norm(T, 2, keepdim=True).clamp_min(1)  # the step is content with an estimate
    return unstacked(T, W).to(W.dtype)
