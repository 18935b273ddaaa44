"""The matrix sign msign(X) = U Vᵀ (polar factor) of X = U S Vᵀ by odd matrix polynomials.

One step maps every singular value through the same odd polynomial a·x + b·x³ + c·x⁵; a good list of coefficients drives
[l, 1] to 1 in few steps. The list is Polar Express (Amsel, Persson, Musco, Gower, arXiv 2505.16932) unless another one is given; both
come from optim/iterators.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .iterators import LOWER, SAFETY, Quintic, polar_express_coefficients
from .linalg import ratio


def msign(X: Tensor, steps: int, dtype: torch.dtype, lower: float = LOWER) -> Tensor:
    """Polar factor of every matrix of X, by `steps` Polar Express iterations in `dtype`; as published: `optim.published.published_sign`.

    Args:
        X: (..., m, n), any float dtype. Zero stays zero.
        steps: number of quintic iterations; ten bring singular values of [1e-3, 1]·‖X‖_F to 1 within the rounding of `dtype`.
        dtype: arithmetic of the iteration.
        lower: the smallest singular value, relative to ‖X‖_F, that the coefficients are made for.

    Returns:
        (..., m, n) in `dtype`.
    """
    return iterate(X, polar_express_coefficients(steps, lower), SAFETY, dtype)


def iterate(X: Tensor, coefficients: Sequence[Quintic], margin: float, dtype: torch.dtype) -> Tensor:
    """What these quintics, one after the other, make of X / (margin·‖X‖_F): an approximate polar factor of every matrix.

    Args:
        X: (..., m, n), any float dtype. Zero stays zero.
        coefficients, margin: as in `optim.iterators.Iteration`.
        dtype: arithmetic of the iteration.

    Returns:
        (..., m, n) in `dtype`.
    """
    wide = X.size(-2) < X.size(-1)
    Y = X.to(dtype)
    size = torch.linalg.vector_norm(Y, dim=(-2, -1), keepdim=True)
    Y = ratio(Y, size * margin)
    shape = Y.shape
    Y = (Y if wide else Y.mT).reshape(-1, *sorted(shape[-2:]))  # (k, n, m) with n ≤ m: the Gram matrix is the small one
    for a, b, c in coefficients:
        A = Y @ Y.mT  # (k, n, n)
        # baddbmm adds inside the float32 accumulator: in bfloat16 this halves the error of the composed map.
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        Y = torch.baddbmm(Y, B, Y, beta=a)
    return (Y if wide else Y.mT).reshape(shape)
