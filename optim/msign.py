"""The matrix sign msign(X) = U Vᵀ (polar factor) of X = U S Vᵀ by odd matrix polynomials.

One iteration maps every singular value through the same odd polynomial a·x + b·x³ + c·x⁵; a good list of coefficients drives
[l, 1] to 1 in few steps. The list here is Polar Express (Amsel, Persson, Musco, Gower, arXiv 2505.16932): each polynomial is the
best uniform approximation of 1 on the interval which the polynomials before it left.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# The authors' list is generated for singular values down to 1e-3, with a cushion that keeps early slopes moderate.
_LOWER = 1e-3
_CUSHION = 0.02407327424182761
_SAFETY = 1.01  # the list is widened by this factor so that rounding cannot push a singular value out of its interval


def optimal_quintic(lower: float, upper: float) -> tuple[float, float, float]:
    """Best uniform odd quintic approximation of 1 on [lower, upper], by Remez exchange on four points.

    Returns (a, b, c) of p(x) = a·x + b·x³ + c·x⁵. Source: arXiv 2505.16932, Algorithm 1 and its published code. When the interval
    is a point to within 5e-6 the Taylor quintic (15/8, -10/8, 3/8) takes over, as there.
    """
    if lower / upper >= 1 - 5e-6:
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    error, previous = np.inf, None
    while previous is None or abs(previous - error) > 1e-15:
        previous = error
        nodes = np.array([lower, q, r, upper])
        system = np.stack([nodes, nodes**3, nodes**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b**2 - 20 * a * c)
        q, r = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
    return float(a), float(b), float(c)


@lru_cache
def polar_express_coefficients(
    steps: int, lower: float = _LOWER, cushion: float = _CUSHION, safety: float = _SAFETY
) -> tuple[tuple[float, float, float], ...]:
    """Coefficients (a, b, c) of `steps` Polar Express polynomials for singular values in [lower, 1].

    `cushion` bounds how small the lower end of an interval is taken to be, relative to its upper end; `safety` rescales the argument
    of each polynomial. The authors' list ends with the eighth entry, the Taylor quintic, which is repeated without safety.
    """
    coefficients, l, u = [], lower, 1.0
    for step in range(steps):
        a, b, c = optimal_quintic(max(l, cushion * u), u)

        def value(x: float, a: float = a, b: float = b, c: float = c) -> float:
            return a * x + b * x**3 + c * x**5

        # Centre the image of [l, u] on 1: with a cushion, p(l) lies below the equioscillation band.
        centre = 2 / (value(l) + value(u))
        a, b, c = a * centre, b * centre, c * centre
        l = value(l) * centre
        u = 2 - l
        s = safety if step < 7 else 1.0
        coefficients.append((a / s, b / s**3, c / s**5))
    return tuple(coefficients)


def msign(X: Tensor, steps: int = 10, dtype: torch.dtype = torch.bfloat16, lower: float = _LOWER) -> Tensor:
    """Polar factor of every matrix of X, by `steps` Polar Express iterations in `dtype`.

    Args:
        X: (..., m, n), any float dtype. Zero stays zero.
        steps: number of quintic iterations; ten bring singular values of [1e-3, 1]·‖X‖_F to 1 within the rounding of `dtype`.
        dtype: arithmetic of the iteration; the published setting is bfloat16.
        lower: the smallest singular value, relative to ‖X‖_F, that the coefficients are made for.

    Returns:
        (..., m, n) in `dtype`.
    """
    wide = X.size(-2) < X.size(-1)
    Y = X.to(dtype)
    Y = Y / (torch.linalg.vector_norm(Y, dim=(-2, -1), keepdim=True) * _SAFETY + 1e-7)
    shape = Y.shape
    Y = (Y if wide else Y.mT).reshape(
        -1, *sorted(shape[-2:])
    )  # (k, n, m) with n <= m: the Gram matrix is the small one
    for a, b, c in polar_express_coefficients(steps, lower):
        A = Y @ Y.mT  # (k, n, n)
        # baddbmm adds inside the float32 accumulator: in bfloat16 this halves the error of the composed map.
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        Y = torch.baddbmm(Y, B, Y, beta=a)
    return (Y if wide else Y.mT).reshape(shape)
