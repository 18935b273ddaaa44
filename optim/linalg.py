"""Products at a named precision, and the functions of matrices that are made of them.

The large products of the certified step go through `Products`; only `msign.iterate`, `top_pair`, `Manifold.tangent` and an exact
`Manifold.retract`, and methods of manifolds without a Gram condition make their own. Matrices are kept in the precision of their products,
so that a chain of products needs no conversion between them; every sum inside a product is float32.

    float32    IEEE float32, TF32 off: what a CPU does
    float16    11 bits; the matrices of the step are normalised, so that entries that matter lie far above float16's smallest, 6e-8
    bfloat16   8 bits, three fewer than the step would like; kept for comparison

The signs of a matrix, the factor UVᵀ of X = U Σ Vᵀ, by who needs them:

    matrix_sign, gram_stage   here: smoothed, by products; the certified step
    skew_sign                 here: of a skew matrix; square Stiefel matrices
    msign, iterate            msign.py: by an iteration of the literature, at a given precision
    polar                     manifolds.py: nearly exact; initial weights, exact retractions, studies
    PublishedStep.polar       published.py: as the published code rounds it

Where 16 bits are asked for on a CPU they are emulated: multiplied in float32, and the result rounded.

Shapes: k matrices at a time, tall X (k, m, n) with m ≥ n, symmetric S (k, n, n). Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from .iterators import Quintic, polar_express_coefficients

PRECISIONS = ("float32", "float16", "bfloat16")
LOW_BITS = 2.0**11  # how far float16's second half of a number lies below its first
DROPPED_BITS = {torch.float16: 13, torch.bfloat16: 16}  # of float32's significand


class Products:
    """Matrix products (k, a, b) @ (k, b, c) → (k, a, c) of one precision, a name of PRECISIONS: operands and result are of `dtype`.

    Raises:
        ValueError: an unknown precision.
    """

    def __init__(self, precision: str) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r} of products; choose one of {', '.join(PRECISIONS)}")
        self.precision = precision
        self.dtype: torch.dtype = getattr(torch, precision)
        self.is_16_bit = self.dtype.itemsize < 4

    def __call__(self, X: Tensor, Y: Tensor) -> Tensor:
        """X @ Y."""
        X, Y = X.to(self.dtype), Y.to(self.dtype)
        if X.is_cuda or not self.is_16_bit:
            return X @ Y
        return (X.float() @ Y.float()).to(self.dtype)

    def add(self, C: Tensor, beta: float, X: Tensor, Y: Tensor, alpha: float = 1.0) -> Tensor:
        """beta·C + alpha·X @ Y, rounded once."""
        C, X, Y = C.to(self.dtype), X.to(self.dtype), Y.to(self.dtype)
        if X.is_cuda or not self.is_16_bit:
            return torch.baddbmm(C, X, Y, beta=beta, alpha=alpha)
        return torch.baddbmm(C.float(), X.float(), Y.float(), beta=beta, alpha=alpha).to(self.dtype)

    def in_float32(self, X: Tensor, Y: Tensor) -> Tensor:
        """X @ Y in float32, as it was summed."""
        X, Y = X.to(self.dtype), Y.to(self.dtype)
        if not self.is_16_bit:
            return X @ Y
        return torch.bmm(X, Y, out_dtype=torch.float32) if X.is_cuda else X.float() @ Y.float()

    def times_vector(self, X: Tensor, v: Tensor) -> Tensor:
        """X v (k, a, 1) for v (k, b, 1), at least float32; X is read as it is kept, since a product would convert a copy of it first."""
        return (X * v.mT).sum(-1, keepdim=True) if self.is_16_bit else X @ v

    def gram(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """XᵀX (k, n, n) float32 of float32 X, to nearly float32 accuracy, its diagonal (k, n), and X rounded, as `times_near_identity` takes it.

        At 16 bits X comes in two halves, high + low, of 22 bits together in float16 and 16 in bfloat16; low·low lies below the last of them
        and is left out. The diagonal, which is all sum and no cancellation, is taken elementwise. Two tall products instead of one.
        """
        if not self.is_16_bit:
            S = X.mT @ X
            return S, diagonal(S), X
        high, low = self.halves(X)
        cross = self.in_float32(high.mT, low) / LOW_BITS  # (k, n, n)
        S, squares = self.in_float32(high.mT, high) + cross + cross.mT, X.square().sum(-2)
        return torch.where(on_diagonal(S), squares[:, None, :], S), squares, high

    def halves(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """High, of `dtype`, and low, float32, of float32 X = high + low / LOW_BITS; at 16 bits only.

        By the bits: of X - X.to(float16), torch.compile makes 0, since it leaves out casts to 16 bits and back.
        """
        bits = DROPPED_BITS[self.dtype]
        high = (((X.view(torch.int32) + (1 << bits - 1)) >> bits) << bits).view(torch.float32)
        if self.dtype == torch.float16:  # its smallest numbers are multiples of 2^-24
            high = torch.where(X.abs() < 2.0**-14, (X * 2.0**24).round() / 2.0**24, high)
        return high.to(self.dtype), (X - high) * LOW_BITS

    def times_near_identity(self, X: Tensor, rounded: Tensor, Y: Tensor) -> Tensor:
        """X (I + Y) in float32, for float32 X, X rounded to `dtype` (`rounded`), and small Y (k, n, n). Only Y off its diagonal is rounded."""
        if not self.is_16_bit:
            return torch.baddbmm(X, X, Y)
        return X + X * own_diagonal(Y)[:, None, :] + self.in_float32(rounded, without_diagonal(Y))


def products_for(device: torch.device, precision: str | None = None) -> Products:
    """The products named, or the device's own choice: float16 on CUDA, float32 elsewhere."""
    return Products(precision or ("float16" if device.type == "cuda" else "float32"))


# Where torch keeps the precision of float32 products, from the outside in: a place with "none" has that of the one around it.
_PLACES = (("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("mkldnn", "all"), ("mkldnn", "matmul"))


@contextmanager
def _float32_products() -> Iterator[None]:
    """Inside, float32 products are those of IEEE float32; afterwards every setting of torch is what it was.

    torch has the setting twice: by places, and as one word. The word cannot be read while a place disagrees with it, so the places are
    emptied first. Inside, both agree, since a compiler may read either.
    """
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    before = []
    for place in _PLACES:
        before.append(read(*place))
        write(*place, "none")
    word = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(word)
        for place, precision in zip(_PLACES, before):
            write(*place, precision)


@contextmanager
def exact_sums(device: torch.device) -> Iterator[None]:
    """Inside, products are what `Products` says whatever the global settings: autocast off, TF32 off, sums of 16-bit products float32."""
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    try:
        with _float32_products(), torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False):
            yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = reduced


PROGRAMS = 64
"""How many programs of one function torch.compile makes at most. Its own limit of 8 is an error where a function is compiled whole, and the
step needs a program for each manifold, shape and number of rounds."""


def allow_programs() -> None:
    """Let torch.compile make PROGRAMS programs of one function; it imports the compiler, which takes seconds."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)


@cache
def compiled_whole(function: Callable) -> Any:
    """The function through torch.compile, once, whole and for fixed shapes, with fitted coefficients as constants of the program."""
    allow_programs()
    for constant in (sign_coefficients, cap_fit):
        torch.compiler.assume_constant_result(constant)  # not a decorator: it would import the compiler
    return torch.compile(function, fullgraph=True, dynamic=False)


# ---- small helpers ----


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; x itself where it has it.

    `x.to(x.dtype)` is an alias of x, and torch 2.11 compiles an autograd.Function that returns one with a gradient of zero, silently.
    """
    return x if x.dtype == dtype else x.to(dtype)


def first_derivative_only() -> None:
    """For the backward pass of an autograd.Function that saves what it computed: a second derivative would take that for constant.

    Raises:
        RuntimeError: a second derivative is wanted (create_graph=True).
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "steps on the sphere and the loss in chunks have no second derivatives here; leave out create_graph=True"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """x, or its float32 where it has 16 bits."""
    return x.float() if x.element_size() < 4 else x


def diagonal(S: Tensor) -> Tensor:
    """Diagonal (k, n) of S (k, n, n), a view."""
    return torch.diagonal(S, dim1=-2, dim2=-1)


def on_diagonal(S: Tensor) -> Tensor:
    """Which entries are on the diagonal of S (k, n, n), as bools (n, n)."""
    return torch.eye(S.size(-1), dtype=torch.bool, device=S.device)


def own_diagonal(S: Tensor) -> Tensor:
    """Diagonal (k, n) of S (k, n, n), on CUDA as a tensor of its own, by a sum over rows.

    A compiled program reads a view of the diagonal again for every entry of the matrices that it computes, one sector of memory for each.
    """
    return torch.where(on_diagonal(S), S, 0).sum(-1) if S.is_cuda else diagonal(S)


def without_diagonal(S: Tensor) -> Tensor:
    """S (k, n, n) with zeros on its diagonal; on CUDA as `own_diagonal` reads it, on a CPU by the faster way."""
    return torch.where(on_diagonal(S), 0, S) if S.is_cuda else S - torch.diag_embed(diagonal(S))


def eye_like(S: Tensor) -> Tensor:
    """I (n, n) of S's dtype and device."""
    return torch.eye(S.size(-1), dtype=S.dtype, device=S.device)


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """⟨X, Y⟩ of every pair, as (k, 1, 1), float32 at least."""
    return (at_least_float32(X) * at_least_float32(Y)).sum(dim=(-2, -1), keepdim=True)


def frobenius(X: Tensor) -> Tensor:
    """‖X‖_F of every matrix, as (k, 1, 1), float32 at least."""
    return torch.linalg.vector_norm(at_least_float32(X), dim=(-2, -1), keepdim=True)


def symmetric_sum(X: Tensor) -> Tensor:
    """X + Xᵀ."""
    return X + X.mT


def ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 where y is 0."""
    return torch.where(y != 0, x / torch.where(y != 0, y, 1), 0)


def over(X: Tensor, size: Tensor) -> Tensor:
    """X / size for a size that broadcasts over X, such as (k, 1, 1) or (k, 1, n), and 0 where it is 0: one pass over X."""
    return X * ratio(torch.ones_like(size), size)


def column_norms(X: Tensor) -> Tensor:
    """Lengths of the columns of X (k, m, n), as (k, 1, n)."""
    return torch.linalg.vector_norm(X, dim=-2, keepdim=True)


# ---- the matrix sign ----


def sign_coefficients(steps: int, lower: float) -> Sequence[Quintic]:
    """Polar Express for singular values in [lower, 1], in `steps` odd quintics: nearly the best ones, with the authors' cushion and safety."""
    return polar_express_coefficients(steps, lower=lower)


def gram_stage(R: Tensor, coefficients: Sequence[Quintic], mm: Products) -> Tensor:
    """Q (k, n, n) with X Q = p(X) for the composition p of odd quintics, from R = XᵀX (k, n, n) with ‖R‖₂ ≤ 1.

    Source: Gram Newton–Schulz (Zhang, Amsel, Chen, Dao; Dao-AILab/gram-newton-schulz). An odd polynomial step is X ← X (aI + Z) with
    Z = bR + cR²; R follows in n × n as well. Its rounding errors grow from step to step: 16 bits bear three steps, then R must be formed
    anew. 4·steps - 3 products.
    """
    Q = None
    for i, (a, b, c) in enumerate(coefficients):
        last = i == len(coefficients) - 1
        # At 16 bits by plain products: on a GPU, one that adds a matrix copies it first, and takes a third longer.
        if mm.is_16_bit:
            P = (a * eye_like(R) + b * R + c * mm(R, R)).to(mm.dtype)  # (k, n, n) = aI + Z
            Q = P if Q is None else mm(Q, P)
            R = R if last else mm(P, mm(R, P))
        else:
            Z = mm.add(R, b, R, R, alpha=c)  # (k, n, n) = bR + cR²
            Q = Z + a * eye_like(Z) if Q is None else mm.add(Q, a, Q, Z)
            RZ = None if last else mm.add(R, a, R, Z)  # R(aI + Z)
            R = R if RZ is None else mm.add(RZ, a, Z, RZ)  # (aI + Z)R(aI + Z)
    assert Q is not None
    return Q


def matrix_sign(
    X: Tensor, stages: Sequence[int], lower: float, mm: Products, S: Tensor | None = None
) -> tuple[Tensor, Callable[[], Tensor]]:
    """A ≈ U Vᵀ (k, m, n) of X = U Σ Vᵀ, and a function that returns AᵀA (k, n, n) for two more products.

    Singular values σ ≥ lower·‖XᵀX‖_F^½ come near 1, smaller ones stay below: a smoothed sign. `stages` are the numbers of steps between
    two formations of XᵀX, which 16 bits need; float32 takes all steps in one stage. S is the first XᵀX where the caller has it. Zero for zero X.
    """
    stages = tuple(stages) if mm.is_16_bit else (sum(stages),)
    coefficients = sign_coefficients(sum(stages), lower)
    S = mm.in_float32(X.mT, X) if S is None else S  # (k, n, n)
    size = frobenius(S)  # its root is at least ‖X‖₂
    S = over(S, size).to(mm.dtype)
    done = 0
    for steps in stages:
        S = mm(X.mT, X) if done else S  # formed anew: rounding errors of the last stage are gone
        Q = gram_stage(S, coefficients[done : done + steps], mm)
        X = mm(X, Q if done else over(Q, size.sqrt()))
        done += steps
    return X, lambda: mm(Q, mm(S, Q))


def skew_sign(K: Tensor, steps: int, lower: float, mm: Products) -> Tensor:
    """The orthogonal skew factor (k, n, n) of skew K (k, n, n): its singular values above lower·‖K‖ to 1. 3·steps products."""
    square = mm.in_float32(K, K)  # (k, n, n) = -KᵀK; squares of a small K are below what float16 holds
    size = frobenius(square)
    X, square = over(K, size.sqrt()).to(mm.dtype), over(square, size).to(mm.dtype)
    for i, (a, b, c) in enumerate(sign_coefficients(steps, lower)):
        square = mm(X, X) if i else square
        X = mm.add(X, a, X, mm.add(square, -b, square, square, alpha=c))
    return 0.5 * (X - X.mT)


# ---- norms ----


def _start_vector(n: int, device: torch.device) -> Tensor:
    """(n,) float64: multiples of the golden ratio modulo 1, less ½. Quasi-random, and so orthogonal to no eigenspace in practice."""
    return torch.frac(torch.arange(1, n + 1, dtype=torch.float64, device=device) * 0.6180339887498949) - 0.5


def largest_eigenvalue(apply: Callable[[Tensor], Tensor], like: Tensor, iterations: int) -> Tensor:
    """The largest |eigenvalue| (k, 1, 1), from below, of v ↦ apply(v), (k, n, 1) float32 → the same, by `iterations` of Lanczos.

    The map must be symmetric; its eigenvalues may have both signs.

    `like` (k, ·, n) gives k, n and device. What is largest of the small tridiagonal matrix is read from its 128th power, at most .4% short:
    an eigensolver would make the host wait.
    """
    k, n = like.size(0), like.size(-1)
    v = _start_vector(n, like.device)
    v = (v / torch.linalg.vector_norm(v)).to(at_least_float32(like).dtype)[:, None].expand(k, n, 1)
    previous, beta = torch.zeros_like(v), torch.zeros_like(v[:, :1])
    alphas, betas = [], []
    for _ in range(iterations):
        w = apply(v) - beta * previous
        alpha = inner(v, w)
        w = w - alpha * v
        alphas.append(alpha.view(k))  # diagonal of the tridiagonal matrix
        betas.append(beta.view(k))  # beside it
        beta = frobenius(w)
        previous, v = v, over(w, beta)
    T = torch.diag_embed(torch.stack(alphas, dim=-1)) + symmetric_sum(
        torch.diag_embed(torch.stack(betas[1:], dim=-1), offset=1)
    )  # (k, iterations, iterations)
    power = over(T, frobenius(T))
    for i in range(7):
        power = power @ power
        if i == 3:  # float32 would lose the 128th power of a small number
            power = over(power, frobenius(power))
    return ratio(frobenius(T @ power), frobenius(power))  # not ⟨power, T·power⟩, in which λ and -λ would cancel


def top_pair(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value σ (k, 1, 1), from below, of W (k, m, n), and its vectors u (k, m, 1), v (k, n, 1); zero for zero W.

    W at any scale. By WᵀW to the power 2^16, squared n × n: the error of σ is at most about log(n)/2^17 of it, where singular values crowd
    at the top; u and v are then a mixture of theirs.
    """
    largest = W.abs().amax(dim=(-2, -1), keepdim=True)
    W = W / torch.where(largest > 0, largest, 1)
    S = W.mT @ W  # (k, n, n)
    for _ in range(16):
        S = over(S, frobenius(S))
        S = S @ S
    v = S @ _start_vector(W.size(-1), W.device).to(S.dtype)[:, None].expand(*S.shape[:-1], 1)
    v = over(v, frobenius(v))
    u = W @ v
    sigma = frobenius(u)
    return over(u, sigma), sigma * largest, v


def effective_rank(sigma: Tensor) -> Tensor:
    """exp of the entropy of σ / Σσ, (..., k) → (...): k if all singular values are equal, 1 if only one is not zero, 0 if all are zero."""
    total = sigma.sum(-1, keepdim=True)
    return torch.where(total[..., 0] > 0, torch.special.entr(ratio(sigma, total)).sum(-1).exp(), 0)


# ---- equations ----


def su_step(
    project: Callable[[Tensor], Tensor],
    metric: Callable[[Tensor], Tensor],
    H: Tensor,
    Z: Tensor,
    d: Tensor,
    iterations: int,
    mm: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    """dL (k, n, n) with P(D dL Z + Z dL D) = -H/2: with Z = (XᵀX)^(-1/2) held fixed, (G + 2W(L + dL))Z is tangent.

    By dL, A = XZ changes by 2W dL Z, and H by P(2D dL Z + 2Z dL D), which is to be -H. dL = P(dL): only such an L keeps ‖G + 2WL‖_* above the
    optimum. project is P, metric multiplies by D = WᵀW, d (k, n) is D's diagonal,
    H = P(WᵀA + AᵀW) (k, n, n) for A = XZ; a factor of Z and H alike changes nothing. By conjugate gradients, preconditioned with
    d_i z_jj + z_ii d_j; one product an iteration beside the metric's. Source: Su, kexue.fm 11221, in products.
    """
    z = at_least_float32(own_diagonal(Z))
    scale = symmetric_sum(d[..., :, None] * z[..., None, :])

    r = -0.5 * H  # (k, n, n) residual
    dL = torch.zeros_like(r)
    p = q = project(ratio(r, scale)).to(H.dtype)  # r, preconditioned within the range of P
    rq = inner(r, q)
    for i in range(iterations):
        Ap = project(symmetric_sum(metric(mm(p, Z))))  # (k, n, n): the equation's left side at p
        step = ratio(rq, inner(p, Ap))
        dL = (dL + step * p).to(H.dtype)  # kept at H's precision, like all of these
        if i < iterations - 1:
            r = (r - step * Ap).to(H.dtype)
            q = project(ratio(r, scale)).to(H.dtype)
            before, rq = rq, inner(r, q)
            p = (q + ratio(rq, before) * p).to(H.dtype)
    return dL


def inverse_sqrt_increment(E: Tensor, rounded: Tensor, mm: Products) -> Tensor:
    """(I + E)^(-1/2) - I (k, n, n) float32 for small symmetric E, to second order: the error is 5/16·‖E‖³. One product.

    From E (float32) and E rounded to the precision of the products (`rounded`).
    """
    return 0.375 * mm.in_float32(rounded, rounded) - 0.5 * E


def cap_fit(degree: int, lower: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """48 nodes u in [lower, 1], (48,), and the matrix (degree + 1, 48) that fits values at them by a polynomial in u².

    Least squares of u·p(u²): what a singular value u is multiplied by matters in proportion to u. On the device of `like`, in its dtype.
    """
    return _cap_fit(degree, lower, like.dtype, like.device)


@lru_cache(maxsize=8)
def _cap_fit(degree: int, lower: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    u = torch.linspace(lower, 1, 48, dtype=torch.float64)
    basis = torch.stack([u ** (2 * j) for j in range(degree + 1)], dim=1)
    return u.to(device, dtype), (torch.linalg.pinv(basis * u[:, None]) * u).to(device, dtype)
