"""Singular values and Gram statistics of weights: what a geometry does to a matrix, seen over training.

Singular values are the roots of the eigenvalues of a float64 Gram matrix, equal shapes in one batch: on a GPU the SVD of one matrix of
GPT-2 takes tenths of a second. The eigenvalues err by about 1e-16·σ_max², so a singular value σ errs by 1e-16·σ_max²/σ: below 1e-8·σ_max
what is returned is noise of that size; above it the error is smaller than that of an SVD in float32 (1e-7·σ_max).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Residual = Callable[[Tensor], Tensor]
"""The distance (...,) of matrices (..., m, n) from what they are to be, such as optim.manifolds.Manifold.residual."""

# Numbers that are converted to float64 together: 1 GiB, so that the spectra of a large model do not run it out of memory.
_TOGETHER = 2**27


def singular_values(X: Tensor) -> Tensor:
    """Singular values (k, min(m, n)) of X (k, m, n), descending, float64, through the smaller Gram matrix; NaN if X is not finite."""
    X = X.double()
    return _roots(X @ X.mT if X.size(-2) <= X.size(-1) else X.mT @ X)


def _roots(gram: Tensor) -> Tensor:
    sound = gram.isfinite().all(-1).all(-1)[:, None]  # the decomposition raises on what is not
    gram = torch.where(sound[..., None], gram, torch.zeros_like(gram))
    sigma = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(-1)
    return torch.where(sound, sigma, torch.full_like(sigma, torch.nan))


def spectrum(W: Tensor, residual: Residual | None = None, blocks: int = 1) -> dict[str, Any]:
    """Spectrum of a matrix W (m, n), any float dtype.

    Returns:
        sigma: its min(m, n) singular values, descending, see above. gram_diagonal: the squared column norms of the tall form.
        off_diagonal: ‖Off(WᵀW)‖_F relative to ‖WᵀW‖_F. residual: what the function of this name says, if one is given; with
        `blocks`, into which the rows are cut, the largest of a block. Floats carry six significant digits, what float32 weights are worth.
    """
    return _spectra_of_stack(W.unsqueeze(0), residual, blocks)[0]


@torch.no_grad()
def _spectra_of_stack(W: Tensor, residual: Residual | None, blocks: int) -> list[dict[str, Any]]:
    T = W.detach().double()
    T = T if T.size(-2) >= T.size(-1) else T.mT  # (k, m, n), tall
    gram = T.mT @ T
    diagonal = torch.diagonal(gram, dim1=-2, dim2=-1)
    off = torch.linalg.matrix_norm(gram - torch.diag_embed(diagonal)) / torch.linalg.matrix_norm(gram)
    columns = {"sigma": _roots(gram), "gram_diagonal": diagonal, "off_diagonal": off}
    if residual is not None:
        columns["residual"] = residual(W.unflatten(1, (blocks, -1))).amax(-1)
    read = {name: values.tolist() for name, values in columns.items()}
    return [{name: _rounded(values[i]) for name, values in read.items()} for i in range(len(W))]


def _rounded(value: Any) -> Any:
    return [_rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.6g}")


def spectra(matrices: Mapping[str, tuple[Tensor, Residual | None, int]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """`spectrum` of each named (matrix, residual, blocks), in order; alike ones are decomposed together."""
    alike: dict[tuple, list[str]] = {}
    for name, (W, residual, blocks) in matrices.items():
        alike.setdefault((W.shape, residual, blocks), []).append(name)
    found: dict[str, dict] = {}
    for (shape, residual, blocks), names in alike.items():
        at_once = max(1, _TOGETHER // shape.numel())
        for start in range(0, len(names), at_once):
            part = names[start : start + at_once]
            stack = torch.stack([matrices[name][0].detach() for name in part])
            found.update(zip(part, _spectra_of_stack(stack, residual, blocks)))
    yield from ((name, found[name]) for name in matrices)
