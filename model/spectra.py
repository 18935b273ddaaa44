"""Singular values and Gram statistics of weights: what a geometry does to a matrix, seen over training.

Singular values are the roots of the eigenvalues of a float64 Gram matrix, equal shapes in one batch: on a GPU the SVD of one matrix of
GPT-2 takes tenths of a second. The eigenvalues err by about 1e-16·σ_max², so a singular value σ errs by 1e-16·σ_max²/σ: below 1e-8·σ_max
what is returned is noise of that size; above it the error is smaller than that of an SVD in float32 (1e-7·σ_max).

Of weights on a GPU, the device computes the Gram matrices only. They are decomposed on the CPU in a thread of its own, while the
training goes on: an eigenvalue solver on the device would make the host wait, and needs more time than all of the products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.linalg import ratio

Distance = Callable[[Tensor], Tensor]
"""The distance (...,) of matrices (..., m, n) from what they are to be, such as optim.manifolds.Manifold.distance."""

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


@dataclass(frozen=True)
class Measured:
    """What is measured of alike matrices W (k, m, n), on their device.

    gram: (k, n, n) float64, of their tall form. distance: (k,), the distances from the manifold.
    """

    gram: Tensor
    distance: Tensor | None

    def on_host(self) -> Measured:
        """The same in the memory of the host; on a GPU this begins copies that must be waited for."""
        return Measured(_to_host(self.gram), None if self.distance is None else _to_host(self.distance))

    def records(self) -> list[dict[str, Any]]:
        """The spectrum of each matrix, see `Spectra`."""
        diagonal = torch.diagonal(self.gram, dim1=-2, dim2=-1)
        off = torch.linalg.matrix_norm(self.gram - torch.diag_embed(diagonal))
        off = ratio(off, torch.linalg.matrix_norm(self.gram))
        columns = {"sigma": _roots(self.gram), "gram_diagonal": diagonal, "off_diagonal": off}
        if self.distance is not None:
            columns["distance"] = self.distance
        read = {name: values.tolist() for name, values in columns.items()}
        return [{name: rounded(values[i]) for name, values in read.items()} for i in range(len(self.gram))]


def _to_host(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) if x.is_cuda else x


@torch.no_grad()
def _measure(W: Tensor, distance: Distance | None, blocks: int) -> Measured:
    T = W.detach().double()
    T = T if T.size(-2) >= T.size(-1) else T.mT  # (k, m, n), tall
    return Measured(T.mT @ T, None if distance is None else distance(W.unflatten(1, (blocks, -1))).amax(-1))


def rounded(value: Any) -> Any:
    """A number, or lists of numbers, rounded to six significant digits, about the precision of float32."""
    return [rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.6g}")


class Spectra:
    """The spectrum of each named (matrix, distance, blocks) as it is when this is made; alike matrices are decomposed together.

    sigma: the min(m, n) singular values of a matrix W (m, n) of any float dtype, descending, see above. gram_diagonal: the squared column
    norms of the tall form. off_diagonal: ‖Off(WᵀW)‖_F relative to ‖WᵀW‖_F. distance: what the function of this name says, if one is given;
    with `blocks`, into which the rows are cut, the largest of a block. Floats carry six significant digits, what float32 weights are worth.

    The weights may change as soon as this is made. For weights on a GPU, only `records` waits, and only before `done`.
    """

    def __init__(self, matrices: Mapping[str, tuple[Tensor, Distance | None, int]]) -> None:
        self.order = list(matrices)
        alike: dict[tuple, list[str]] = {}
        for name, (W, distance, blocks) in matrices.items():
            alike.setdefault((W.shape, distance, blocks), []).append(name)
        measured: list[tuple[list[str], Measured]] = []
        for (shape, distance, blocks), names in alike.items():
            at_once = max(1, _TOGETHER // shape.numel())
            for start in range(0, len(names), at_once):
                part = names[start : start + at_once]
                stack = torch.stack([matrices[name][0].detach() for name in part])
                measured.append((part, _measure(stack, distance, blocks).on_host()))
        self._measured = measured
        self._found: Future[dict[str, Any]] | None = None
        if any(W.is_cuda for W, _, _ in matrices.values()):
            copied = torch.cuda.Event()
            copied.record()
            pool = ThreadPoolExecutor(1, "spectra")
            self._found = pool.submit(_decompose, measured, copied)
            pool.shutdown(wait=False)  # the thread ends after its work

    @property
    def done(self) -> bool:
        """Whether `records` has nothing to wait for. On a CPU it computes there and then, so that nothing competes with the training."""
        return self._found is None or self._found.done()

    def records(self) -> list[tuple[str, dict[str, Any]]]:
        """(name, spectrum) of each matrix, in order."""
        found = _decompose(self._measured) if self._found is None else self._found.result()
        return [(name, found[name]) for name in self.order]


def _decompose(measured: list[tuple[list[str], Measured]], copied: torch.cuda.Event | None = None) -> dict[str, Any]:
    if copied is not None:
        copied.synchronize()
    return {name: record for names, part in measured for name, record in zip(names, part.records())}
