"""The collapses of a transformer's representation, each as a number (after Cirrincione, arXiv 2604.23681).

    rank in depth                   the tokens of a sequence grow alike: `depth`
    rank in width                   they use few of the directions they have: `depth`, its width_rank
    head-channel identity           a head's output cannot be read from the sum over heads: `recovery` and `null_space` if the output
                                    projection is known, `mixing_dimensions` if it is not
    entropy                         attention looks at one token: `model.probes.attention_record`

The paper names the collapses; how they are measured here is standard, and ours to choose. [inference]
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.spectra import singular_values

# Singular values below this share of the largest are not counted as a direction in use.
_WIDTH_TOLERANCE = 1e-3
# Tokens whose Gram matrix is decomposed: enough for a rank, few enough for a probe during training.
_GRAM_TOKENS = 128
# The sum over heads is read with this relative error (1% in amplitude): what needs more than that is not recovered.
_READING_NOISE = 1e-4


def effective_rank(sigma: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values (..., k) → (...): k for equal ones, 1 for a single one."""
    p = sigma / sigma.sum(-1, keepdim=True).clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.special.entr(p).sum(-1).exp()


def depth(X: Tensor) -> dict[str, Tensor]:
    """How far the tokens of each sequence X (B, T, d) have grown alike; 0-d float64, averaged over sequences.

    Returns:
        distance_from_mean: ‖X - 1x̄ᵀ‖_F / ‖X‖_F, 0 when all tokens are the same. mean_cosine: of all pairs, 1 then.
        effective_rank: of at most 128 evenly spaced tokens. width_rank: share of their min(n, d) singular values above a
        thousandth of the largest.
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
    """R² (H,) with which each head's output can be read, linearly, from the sum over heads.

    A ridge regression of the heads on y_i = Σ_h W_O^h o_ih, fitted on every second token and judged on the others. 1: the head is
    there to be read; 0: it is lost. The ridge stands for reading y with an error of one per cent.

    Args:
        heads: (N, H, w) outputs of the heads for N tokens. W_o: (d, H·w), the output projection as nn.Linear keeps it.
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
    """Dimensions a token of head outputs (H·w) that the output projection W_o (d, H·w) does not show at all."""
    sigma = torch.linalg.svdvals(W_o.double())
    return W_o.size(1) - int((sigma > sigma[0] * max(W_o.shape) * torch.finfo(W_o.dtype).eps).sum())


def mixing_dimensions(heads: Tensor) -> Tensor:
    """Dimensions (H,) in which each head's output can change while the sum over heads stays, if the output projection is not known.

    For every invertible M (H·w, H·w), the heads M o and the projection W_O M⁻¹ have the sum W_O o. Near M = 1, head h changes by
    Σ_g M_hg o_g. What its own channels could make of it (g = h) only renames them; what is left is, for each of its w channels, a vector
    of the span of the other heads' outputs, without that of its own: w times the rank of that span. Directions below a thousandth of the
    largest are not counted. [our measure of what arXiv 2604.23681 counts]

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
    """n(H - 1)w, the count of arXiv 2604.23681: the same if every token could be mixed by an M of its own."""
    return tokens * (n_head - 1) * width
