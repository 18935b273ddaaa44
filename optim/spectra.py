"""Singular values and Gram statistics of weights: what a geometry does to a matrix, seen over training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from optim.manifolds import MANIFOLDS, tall


@torch.no_grad()
def spectrum(W: Tensor, manifold: str | None = None, blocks: int = 1) -> dict[str, list[float] | float]:
    """Spectrum of a matrix W (m, n), computed in float32 with one SVD.

    Returns:
        sigma: its min(m, n) singular values, descending. gram_diagonal: the squared column norms of the tall form.
        off_diagonal: ‖Off(WᵀW)‖_F relative to ‖WᵀW‖_F. residual: distance from `manifold`, if one is named; with `blocks`, into
        which the rows are cut, that of the block farthest from it. Floats carry six significant digits, which is what float32
        singular values are worth.
    """
    T = tall(W.detach().float())
    gram = T.mT @ T
    diagonal = torch.diagonal(gram)
    off = torch.linalg.matrix_norm(gram - torch.diag(diagonal)) / torch.linalg.matrix_norm(gram)
    record = {
        "sigma": _rounded(torch.linalg.svdvals(T)),
        "gram_diagonal": _rounded(diagonal),
        "off_diagonal": float(f"{off.item():.6g}"),
    }
    if manifold is not None:
        residual = MANIFOLDS[manifold].residual(W.detach().unflatten(0, (blocks, -1))).max()
        record["residual"] = float(f"{residual.item():.6g}")
    return record


def spectra(matrices: dict[str, tuple[Tensor, str | None, int]]) -> Iterator[tuple[str, dict]]:
    """`spectrum` of each named (matrix, manifold, blocks), in order."""
    for name, (W, manifold, blocks) in matrices.items():
        yield name, spectrum(W, manifold, blocks)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{v:.6g}") for v in values.tolist()]
