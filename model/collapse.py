"""Measures of collapse in a transformer's representations (after Cirrincione, arXiv 2604.23681).

    rank in depth                   the tokens of a sequence become alike: `depth`
    rank in width                   they use few of their directions: width_rank of `depth`
    head-channel identity           the output of a head cannot be recovered from the sum over heads: `recovery` and `null_space` if the
                                    output projection is known, `mixing_dimensions` if it is not
    entropy                         attention selects a single token: `model.probes.attention_record`

Beside them, `outside_span`: the directions that the paper says only an MLP can add. The paper names the collapses; the measures are our
choice of standard ones. [inference]
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.spectra import singular_values
from optim.linalg import effective_rank

# A direction with a singular value below this share of the largest counts as unused.
_WIDTH_TOLERANCE = 1e-3
# Number of tokens of which singular values are computed: few enough for a probe during training.
_GRAM_TOKENS = 128
# Relative error (squared) with which the sum over heads is read: 1% in amplitude.
_READING_NOISE = 1e-4


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


def outside_span(X: Tensor, E: Tensor) -> Tensor:
    """The share of ‖X‖² that lies outside of the linear span of the embeddings E; 0-d float64, averaged over sequences.

    X, E: (B, n, d), of the same tokens. With n ≥ d, the embeddings usually span everything, and the share is 0; for independent random
    directions it is 1 - n/d. arXiv 2604.23681 states that no stack of attention layers leaves the span. That holds for a single head whose
    W_O W_V is a multiple of the identity; other weights, and several heads, do leave it (tests/test_collapse.py).
    """
    _, sigma, V = torch.linalg.svd(E.double(), full_matrices=False)
    used = sigma > sigma[:, :1] * max(E.shape[1:]) * torch.finfo(E.dtype).eps
    X = X.double()
    within = (X @ V.mT) * used[:, None]  # (B, n, k)
    return (1 - within.square().sum((1, 2)) / X.square().sum((1, 2))).clamp_min(0).mean()


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


def mixing_dimensions(heads: Tensor, gates: Tensor | None = None) -> Tensor:
    """Dimensions (H,) in which the output of each head can change without a change of the sum over heads, if W_O is not known.

    For every invertible M (H·w, H·w), the heads M o with the projection W_O M⁻¹ give the same sum W_O o. Near M = 1, head h changes by
    Σ_g M_hg o_g. The term g = h only mixes the head's own channels, so it is not counted. For each of the w channels there remains a
    vector in the span of the other heads' outputs, orthogonal to the head's own: w times the rank of that span. Directions below a
    thousandth of the largest are not counted. [our measure of what arXiv 2604.23681 counts]

    With gates G_ih that the reader knows (PG-OP), the sum is W_O G_i o_i, where G_i multiplies each head by its gate. A change of head h by
    Σ_g M_hg o_g then changes the sum by G_ih Σ_g M_hg o_ig, and a change of W_O undoes it if that is some Σ_g K_hg G_ig o_ig. So of the
    directions above, those are left that are also in the span of (G_ig/G_ih)·o_ig: all if the gates are equal, usually none if the gates of
    the heads differ from token to token. A direction counts as left if a thousandth of its length, at most, is outside. The gates must
    not be zero. [our derivation]

    Args:
        heads: (N, H, w) outputs of the heads for N tokens, before the gates. N > 2·H·w, if the count with gates is to say something: the
            spans of fewer tokens overlap by themselves.
        gates: (N, H), or None.
    """
    o = heads.double()
    found = []
    for h in range(o.size(1)):
        U = _basis(o[:, h])
        others = torch.cat([o[:, :h], o[:, h + 1 :]], 1).flatten(1)  # (N, (H - 1)·w)
        largest = torch.linalg.matrix_norm(others, 2) if others.numel() else None
        free = _basis(others - U @ (U.mT @ others), largest)
        left = free.size(1)
        if gates is not None and left:
            relative = gates.double() / gates[:, h : h + 1].double()
            gated = _basis((relative[..., None] * o).flatten(1))
            left = int((singular_values((free - gated @ (gated.mT @ free))[None]) < _WIDTH_TOLERANCE).sum())
        found.append(o.size(2) * left)
    return torch.tensor(found)


def _basis(A: Tensor, largest: Tensor | None = None) -> Tensor:
    """Orthonormal columns (N, r) that span A (N, k), but for directions below a thousandth of the largest (default: of A's own)."""
    if not A.numel():
        return A
    U, sigma, _ = torch.linalg.svd(A, full_matrices=False)
    return U[:, sigma > _WIDTH_TOLERANCE * (sigma[0] if largest is None else largest)]


def ambiguous_dimensions(tokens: int, n_head: int, width: int) -> int:
    """n(H - 1)w, the count of arXiv 2604.23681: as `mixing_dimensions`, but with a separate M for every token.

    It is the dimension of all changes of the other heads' outputs together with what one head writes (n·d numbers) that leave the sum as it
    is, for any W_O and any gates but zero (tests/test_collapse.py). [our reading; the paper's proof was not available to us]
    """
    return tokens * (n_head - 1) * width
