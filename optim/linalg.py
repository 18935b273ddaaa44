"""Products at a named precision, and the functions of matrices that are made of them.

Every product of the certified step goes through `Products`, which decides the precision of its operands; sums are always float32.

    float32    IEEE float32, TF32 off: what a CPU does
    float16    operands rounded to 11 bits, accumulated in float32: tensor cores. `SCALE` keeps small entries out of the subnormals
    bfloat16   the same with 8 bits; three bits fewer than the step would like, kept for comparison

Where 16-bit operands are asked for on a CPU they are emulated: rounded as they would be, and multiplied in float32.

Shapes: k matrices at a time, tall X (k, m, n) with m ≥ n, symmetric S (k, n, n). Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from optim.msign import polar_express_coefficients

Coefficients = Sequence[tuple[float, float, float]]

PRECISIONS = ("float32", "float16", "bfloat16")
SCALE = 64.0  # a power of two: float16 then resolves entries down to 1e-6, and holds entries up to 1000
LOW_BITS = 2.0**11  # how far float16's second half of a number lies below its first


class Products:
    """Matrix products (k, a, b) @ (k, b, c) → float32 (k, a, c) with operands of one precision, a name of PRECISIONS.

    Raises:
        ValueError: an unknown precision.
    """

    def __init__(self, precision: str) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r} of products; choose one of {', '.join(PRECISIONS)}")
        self.precision = precision
        self.dtype = getattr(torch, precision)

    def __call__(self, X: Tensor, Y: Tensor) -> Tensor:
        """X @ Y."""
        if self.dtype == torch.float32:
            return X @ Y
        if self.dtype == torch.float16:
            return self._multiply(X * SCALE, Y * SCALE) / SCALE**2
        return self._multiply(X, Y)

    def _multiply(self, X: Tensor, Y: Tensor) -> Tensor:
        X, Y = X.to(self.dtype), Y.to(self.dtype)
        if X.is_cuda:
            return torch.bmm(X, Y, out_dtype=torch.float32)
        return X.float() @ Y.float()

    def stages(self, stages: Sequence[int]) -> tuple[int, ...]:
        """The stages that a Gram iteration of so many steps is to be cut into at this precision."""
        return (sum(stages),) if self.dtype == torch.float32 else tuple(stages)

    def add(self, C: Tensor, beta: float, X: Tensor, Y: Tensor) -> Tensor:
        """beta·C + X @ Y; in float32 one call, with the sum inside the product."""
        if self.dtype == torch.float32:
            return torch.baddbmm(C, X, Y, beta=beta)
        return beta * C + self(X, Y)

    def gram(self, X: Tensor) -> Tensor:
        """XᵀX (k, n, n) to nearly float32 accuracy: operands of 16 bits come in two halves, X = hi + lo, of 22 bits in float16, 16 in bfloat16.

        lo·lo is left out: it lies below the last bit of the two. The diagonal, which is all sum and no cancellation, is taken elementwise.
        Two tall products instead of one.
        """
        if self.dtype == torch.float32:
            return X.mT @ X
        high = X.to(self.dtype).to(X.dtype)
        cross = self(high.mT, (X - high) * LOW_BITS) / LOW_BITS  # (k, n, n)
        S = self(high.mT, high) + cross + cross.mT
        return S + torch.diag_embed(X.square().sum(-2) - diagonal(S))

    def times_near_identity(self, X: Tensor, Y: Tensor) -> Tensor:
        """X (I + Y) for small Y (k, n, n): only X Y is a product, and in 16 bits not even its diagonal part."""
        if self.dtype == torch.float32:
            return torch.baddbmm(X, X, Y)
        on = diagonal(Y)
        return X + X * on[:, None, :] + self(X, Y - torch.diag_embed(on))


def products_for(device: torch.device, precision: str | None = None) -> Products:
    """The products named, or the device's own choice: float16 on CUDA, float32 elsewhere."""
    return Products(precision or ("float16" if device.type == "cuda" else "float32"))


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """float32 products inside are IEEE float32 whatever the global settings: autocast off, and TF32 off."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


# ---- small helpers ----


def diagonal(S: Tensor) -> Tensor:
    """Diagonal (k, n) of S (k, n, n), a view."""
    return torch.diagonal(S, dim1=-2, dim2=-1)


def eye_like(S: Tensor) -> Tensor:
    """I (n, n) of S's dtype and device."""
    return torch.eye(S.size(-1), dtype=S.dtype, device=S.device)


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """⟨X, Y⟩ of every pair, as (k, 1, 1)."""
    return (X * Y).sum(dim=(-2, -1), keepdim=True)


def frobenius(X: Tensor) -> Tensor:
    """‖X‖_F of every matrix, as (k, 1, 1)."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)


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


@torch.compiler.assume_constant_result
def sign_coefficients(steps: int, lower: float) -> Coefficients:
    """Polar Express for singular values in [lower, 1]: the best composition of exactly `steps` odd quintics (optim/msign.py)."""
    return polar_express_coefficients(steps, lower=lower)


def gram_stage(S: Tensor, coefficients: Coefficients, mm: Products) -> Tensor:
    """Q (k, n, n) with X Q = p(X) for the composition p of odd quintics, from S = XᵀX (k, n, n) with ‖S‖₂ ≤ 1.

    Source: Gram Newton–Schulz (Zhang, Amsel, Chen, Dao; Dao-AILab/gram-newton-schulz). An odd polynomial step is X ← X (aI + bR + cR²)
    with R = XᵀX; R follows in n × n as well. Its rounding errors grow from step to step: 16-bit operands bear three steps, then S must
    be formed anew. 4·steps - 3 products, one less for the first.
    """
    R, Q = S, None
    for i, (a, b, c) in enumerate(coefficients):
        Z = mm.add(R, b / c, R, R) * c  # bR + cR²
        Q = Z + a * eye_like(S) if Q is None else mm.add(Q, a, Q, Z)
        if i < len(coefficients) - 1:
            RZ = mm.add(R, a, R, Z)  # R(aI + Z)
            R = mm.add(RZ, a, Z, RZ)  # (aI + Z)R(aI + Z)
    return Q


def matrix_sign(
    X: Tensor, stages: Sequence[int], lower: float, mm: Products, S: Tensor | None = None
) -> tuple[Tensor, Callable[[], Tensor]]:
    """A ≈ U Vᵀ (k, m, n) of X = U Σ Vᵀ, and a function that returns AᵀA (k, n, n) for two more products.

    Singular values σ ≥ lower·‖XᵀX‖_F^½ come near 1, smaller ones stay below: a smoothed sign. `stages` are the numbers of steps between
    two formations of XᵀX, which 16-bit operands need; with 24 bits one stage does. S is the first XᵀX where the caller has it. Zero for
    zero X.
    """
    stages = mm.stages(stages)
    coefficients = sign_coefficients(sum(stages), lower)
    S = mm(X.mT, X) if S is None else S  # (k, n, n)
    size = frobenius(S)  # its root is at least ‖X‖₂
    X, S = over(X, size.sqrt()), over(S, size)
    done = 0
    for steps in stages:
        if done:
            S = mm(X.mT, X)
        Q = gram_stage(S, coefficients[done : done + steps], mm)
        X = mm(X, Q)
        done += steps
    return X, lambda: mm(Q, mm(S, Q))


def skew_sign(K: Tensor, steps: int, lower: float, mm: Products) -> Tensor:
    """The orthogonal skew factor (k, n, n) of skew K (k, n, n): its singular values above lower·‖K‖ to 1. 3·steps products."""
    coefficients = sign_coefficients(steps, lower)
    square = mm(K, K)  # -KᵀK
    size = frobenius(square)
    X, square = over(K, size.sqrt()), over(square, size)
    for i, (a, b, c) in enumerate(coefficients):
        square = square if i == 0 else mm(X, X)
        X = mm.add(X, a, X, mm.add(square, -b / c, square, square) * c)
    return 0.5 * (X - X.mT)


# ---- norms ----


def probe_vector(n: int, like: Tensor) -> Tensor:
    """A fixed quasi-random unit vector (n, 1), orthogonal to no eigenspace in practice."""
    grid = torch.arange(1, n + 1, dtype=torch.float64, device=like.device) * 0.6180339887498949
    v = grid - grid.floor() - 0.5
    return (v / torch.linalg.vector_norm(v)).to(like.dtype)[:, None]


def largest_eigenvalue(apply: Callable[[Tensor], Tensor], like: Tensor, iterations: int) -> Tensor:
    """λ_max (k, 1, 1), from below, of the positive semidefinite v ↦ apply(v), (k, n, 1) → (k, n, 1), by `iterations` of Lanczos.

    `like` (k, ·, n) gives k, n, dtype and device. The largest eigenvalue of the small tridiagonal matrix is read from its 4096th power:
    an eigensolver would make the host wait.
    """
    k, n = like.size(0), like.size(-1)
    v = probe_vector(n, like).expand(k, n, 1)
    previous, beta = torch.zeros_like(v), torch.zeros_like(v[:, :1])
    alphas, betas = [], []
    for _ in range(iterations):
        w = apply(v) - beta * previous
        alpha = inner(v, w)
        w = w - alpha * v
        alphas.append(alpha.view(k))
        betas.append(beta.view(k))
        beta = frobenius(w)
        previous, v = v, over(w, beta)
    off = torch.diag_embed(torch.stack(betas[1:], dim=-1), offset=1)
    T = torch.diag_embed(torch.stack(alphas, dim=-1)) + symmetric_sum(off)  # (k, iterations, iterations)
    power = T
    for _ in range(12):
        power = over(power, frobenius(power))
        power = power @ power
    return ratio(inner(power, T @ power), inner(power, power)).clamp_min(0)


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

    project is P, metric multiplies by D = WᵀW, d (k, n) is D's diagonal, H = P(WᵀA + AᵀW) (k, n, n). By conjugate gradients,
    preconditioned with d_i z_jj + z_ii d_j; one product an iteration beside the metric's. Source: Su, kexue.fm 11221, in products.
    """
    scale = symmetric_sum(d[..., :, None] * diagonal(Z)[..., None, :])
    r = -0.5 * H
    dL = torch.zeros_like(r)
    p = q = ratio(r, scale)
    rq = inner(r, q)
    for _ in range(iterations):
        Ap = project(symmetric_sum(mm(metric(p), Z)))
        step = ratio(rq, inner(p, Ap))
        dL = dL + step * p
        r = r - step * Ap
        q = ratio(r, scale)
        before, rq = rq, inner(r, q)
        p = q + ratio(rq, before) * p
    return dL


# ---- near the identity ----


def inverse_sqrt_increment(E: Tensor, mm: Products) -> Tensor:
    """(I + E)^(-1/2) - I (k, n, n) for small symmetric E, to second order: the error is 5/16·‖E‖³. One product."""
    return mm.add(E, -0.5, 0.375 * E, E)


@torch.compiler.assume_constant_result
def cap_fit(degree: int, from_: float, like: Tensor, nodes: int = 48) -> tuple[Tensor, Tensor]:
    """Nodes u (nodes,) in [from_, 1], and the matrix (degree + 1, nodes) that fits values at them by a polynomial in u².

    Least squares of u·p(u²): what a singular value u is multiplied by matters in proportion to u. On the device of `like`, in its dtype.
    """
    return _cap_fit(degree, from_, nodes, like.dtype, like.device)


@lru_cache(maxsize=8)
def _cap_fit(degree: int, from_: float, nodes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    u = torch.linspace(from_, 1, nodes, dtype=torch.float64)
    basis = torch.stack([u ** (2 * j) for j in range(degree + 1)], dim=1)
    return u.to(device, dtype), (torch.linalg.pinv(basis * u[:, None]) * u).to(device, dtype)
