"""Measures of collapse in a transformer's representations (after Cirrincione, arXiv 2604.23681).

    rank in depth                   the tokens of a sequence become alike: `depth`
    rank in width                   they use few of their directions: width_rank of `depth`
    head-channel identity           the output of a head cannot be recovered from the sum over heads: `recovery` and `null_space` if the
                                    output projection is known, `mixing_dimensions` if it is not
    entropy                         attention selects a single token: `model.probes.attention_record`

The paper names the collapses; the measures are our choice of standard ones. [inference]
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.spectra import singular_values

# A direction with a singular value below this share of the largest counts as unused.
_WIDTH_TOLERANCE = 1e-3
# Number of tokens of which singular values are computed: few enough for a probe during training.
_GRAM_TOKENS = 128
# Relative error (squared) with which the sum over heads is read: 1% in amplitude.
_READING_NOISE = 1e-4


def effective_rank(sigma: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values, (..., k) → (...): k if all are equal, 1 if only one is not zero."""
    p = sigma / sigma.sum(-1, keepdim=True).clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.special.entr(p).sum(-1).exp()


def depth(X: Tensor) -> dict[str, Tensor]:
    """How alike the tokens of each sequence X (B, T, d) are; 0-d float64, averaged over sequences.

    Returns:
        distance_from_mean: ‖X - 1x̄ᵀ‖_F / ‖X‖_F; 0 if all tokens are equal. mean_cosine: over all pairs of tokens; 1 if all are equal.
        effective_rank: of n ≤ 128 evenly spaced tokens. width_rank: share of their min(n, d) singular values above a thousandth of
        the largest.
    """
    X = X.double()
    T = X.size(1)
    norm = torch.linalg.matrix_norm(X)
    distance = torch.linalg.matrix_norm(X - X.mean(1, keepdim=True)) / norm
    unit = X / torch.linalg.vector_norm(X, dim=-1, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    cosine = (unit.sum(1).square().sum(-1) - T) / max(1, T * (T - 1))
    sigma = singular_values(X[:, :: -(-T // _GRAM_TOKENS)])
    used = (sigma > _WIDTH_TOLERANCE * sigma[:, :1]).double().mean(-1)
    return {
        "distance_from_mean": distance.mean(),
        "mean_cosine": cosine.mean(),
        "effective_rank": effective_rank(sigma).mean(),
        "width_rank": used.mean(),
    }


def recovery(heads: Tensor, W_o: Tensor) -> Tensor:
    """R² (H,) of a linear prediction of each head's output from the sum over heads.

    A ridge regression of the heads on y_i = Σ_h W_O^h o_ih, fitted on every second token and evaluated on the others. 1: the head can be
    recovered; 0: it is lost. The ridge corresponds to an error of one per cent in y.

    Args:
        heads: (N, H, w) outputs of the heads for N tokens. W_o: (d, H·w), the output projection, as nn.Linear stores it.
    """
    o = heads.flatten(1).double()
    o = o - o.mean(0)
    y = o @ W_o.double().T
    (y_fit, y_test), (o_fit, o_test) = (y[::2], y[1::2]), (o[::2], o[1::2])
    gram = y_fit.mT @ y_fit
    ridge = _READING_NOISE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    reader = torch.linalg.solve(
        gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), y_fit.mT @ o_fit
    )

    def of_heads(t: Tensor) -> Tensor:
        return t.square().sum(0).view(heads.shape[1:]).sum(-1)

    return 1 - of_heads(o_test - y_test @ reader) / of_heads(o_test).clamp_min(torch.finfo(o.dtype).tiny)


def null_space(W_o: Tensor) -> int:
    """Dimension of the null space of the output projection W_o (d, H·w): directions of the head outputs (H·w) that it removes."""
    sigma = torch.linalg.svdvals(W_o.double())
    return W_o.size(1) - int((sigma > sigma[0] * max(W_o.shape) * torch.finfo(W_o.dtype).eps).sum())


def mixing_dimensions(heads: Tensor) -> Tensor:
    """Dimensions (H,) in which the output of each head can change without a change of the sum over heads, if W_O is not known.

    For every invertible M (H·w, H·w), the heads M o with the projection W_O M⁻¹ give the same sum W_O o. Near M = 1, head h changes by
    Σ_g M_hg o_g. The term g = h only mixes the head's own channels, so it is not counted. For each of the w channels there remains a
    vector in the span of the other heads' outputs, orthogonal to the head's own: w times the rank of that span. Directions below a
    thousandth of the largest are not counted. [our measure of what arXiv 2604.23681 counts]

    Args:
        heads: (N, H, w) outputs of the heads for N tokens.
    """
    o = heads.double()
    _, H, w = o.shape
    found = []
    for h in range(H):
        U, sigma, _ = torch.linalg.svd(o[:, h], full_matrices=False)
        U = U[:, sigma > _WIDTH_TOLERANCE * sigma[0]]
        others = torch.cat([o[:, :h], o[:, h + 1 :]], 1).flatten(1)  # (N, (H - 1)·w)
        left = singular_values((others - U @ (U.mT @ others))[None])[0]
        largest = torch.linalg.matrix_norm(others, 2) if others.numel() else left.new_zeros(())
        found.append(w * (left > _WIDTH_TOLERANCE * largest).sum())
    return torch.stack(found)


def ambiguous_dimensions(tokens: int, n_head: int, width: int) -> int:
    """n(H - 1)w, the count of arXiv 2604.23681: as `mixing_dimensions`, but with a separate M for every token."""
    return tokens * (n_head - 1) * width
