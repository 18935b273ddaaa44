"""Optional parts of attention: bounds on the logits, and a gate for each head.

configs/attention switches each part on. The bounds are remedies for one failure: logits grow until the softmax selects a single token,
and its gradient vanishes (arXiv 2606.13276, proposition 4.2). Attention itself is in model/layers.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from optim.linalg import cast

PG_OP_OVERHEAD = 0.016
"""Parameters of head gates, as a share of W_O: arXiv 2604.23681 states that PG-OP stays below this."""

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""What computes torch's scaled_dot_product_attention, by the name that `attention_backend` gives."""

# Rows of logits that QK-clip computes at a time: its memory is at most B·H·512·T numbers.
_CLIP_ROWS = 512


def computed_by(backend: str | None) -> AbstractContextManager[object]:
    """A context in which this backend computes scaled_dot_product_attention, or an error says that it cannot; None: torch chooses."""
    return nullcontext() if backend is None else sdpa_kernel(BACKENDS[backend])


def causal_logits(
    q: Tensor, k: Tensor, cap: float | None = None, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """scale·q·k for q (B, H, T, w), k (B, H, S, w) as float32 (B, H, T, S), -inf for keys after the query; the last of both is the same token.

    mask: (B, 1, T, S) bool, what each query attends to instead; None for all keys up to its own.
    scale: None for 1/√w.  cap: unless None, every logit z becomes cap·tanh(z/cap) (soft cap; Gemma 2, arXiv 2408.00118).
    """
    z = cast(q @ k.mT, torch.float32) * (q.size(-1) ** -0.5 if scale is None else scale)
    if cap:
        z = cap * torch.tanh(z / cap)
    hidden = torch.ones(z.shape[-2:], dtype=torch.bool, device=z.device).triu(1 + z.size(-1) - z.size(-2))
    return z.masked_fill(hidden if mask is None else ~mask, -torch.inf)


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, cap: float, dropout: float, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """Attention with soft-capped logits, (B, H, T, w) → (B, H, T, w), causal without a mask; see `causal_logits`.

    Fused kernels do not support it, so all B·H·T² logits are computed, and about six numbers for each are kept for the backward pass: for
    GPT-2, 16 windows of 1024 tokens need 4.5 GiB a layer in float32. Choose micro_batch_size accordingly.
    """
    p = cast(torch.softmax(causal_logits(q, k, cap, scale, mask), dim=-1), v.dtype)
    return F.dropout(p, dropout) @ v


class KeyValueCache:
    """The keys and values of one layer for the tokens so far, so that the next token needs no others to be computed again.

    capacity: the largest number of tokens. length: the number of tokens so far.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.stored: Tensor | None = None  # (2, B, H, capacity, w): keys and values

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (B, H, length, w) of all tokens, after those (B, H, T, w) of the next T were added."""
        if self.stored is None:
            self.stored = k.new_empty(2, *k.shape[:2], self.capacity, k.size(-1))
        start, self.length = self.length, self.length + k.size(-2)
        self.stored[0, :, :, start : self.length] = k
        self.stored[1, :, :, start : self.length] = v
        return self.stored[0, :, :, : self.length], self.stored[1, :, :, : self.length]


def document_mask(x: Tensor, separator: int, first: bool) -> tuple[Tensor, Tensor]:
    """What a token may attend to if the windows x (B, T) int64 consist of documents: the tokens of its own document up to itself.

    separator: the token that ends a document; or begins one, if `first`.

    Returns:
        The mask (B, 1, T, T) bool, and the position of each token in its document (B, T) int64.
    """
    starts = x == separator if first else F.pad(x[:, :-1] == separator, (1, 0))
    number, place = starts.cumsum(1), torch.arange(x.size(1), device=x.device)
    begun = torch.where(starts, place, 0).cummax(1).values
    mask = (number[:, :, None] == number[:, None, :]).tril()
    return mask[:, None], place - begun


class HeadGate(nn.Module):
    """A gate g ∈ (0, 2) for each token and head, applied to the head's output before the output projection.

    Our reconstruction of PG-OP (arXiv 2604.23681). We have not seen its formula; the paper states a parameter overhead below 1.6% of
    W_O, and that the output of each head becomes easier to recover from the sum. Two readings:

        token      g[i, h] = 2σ(x_i · w_h): H vectors of length d, 1/w of W_O for heads of width w (1.56% at w = 64)
        position   g[i, h] = 2σ(t[i, h]): a learned table (T, H), T·H/d² of W_O: 2.08% for the 1024 positions of GPT-2 124M, more than stated

    The weights start at zero, so every gate starts at 1, and the model starts as the one without gates. They are stored as one vector,
    because AdamW updates vectors whatever an assignment says about matrices.
    """

    def __init__(self, kind: str, n_head: int, width: int, block_size: int) -> None:
        super().__init__()
        self.kind, self.n_head = kind, n_head
        self.weight = nn.Parameter(torch.zeros(n_head * (width if kind == "token" else block_size)))

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Gates (B or 1, H, T, 1) for attention's input x (B, T, d), whose first token has the position `start`."""
        if self.kind == "token":
            return 2 * torch.sigmoid(x @ self.weight.view(self.n_head, -1).T).mT.unsqueeze(-1)
        table = self.weight.view(-1, self.n_head)[start : start + x.size(1)]  # (T, H)
        return cast(2 * torch.sigmoid(table).T[None, :, :, None], x.dtype)


class QKClip(nn.Module):
    """After each update, scales down the logits of every head whose largest logit S in the batch exceeded τ, by γ = τ/S.

    The rule of MuonClip (Kimi K2, arXiv 2507.20534, section 2.1). `target` is what is scaled:

        weights   W_q and W_k of the head, by √γ each, as published. This scales rows, so a matrix leaves its manifold.
        gain      one number for each head, by γ: the same function of the input, and the matrix does not change. [ours]

    Finding the largest logits costs one more product QKᵀ a step, without softmax and without gradient.
    """

    def __init__(self, threshold: float, target: str, n_head: int) -> None:
        super().__init__()
        self.threshold, self.target = threshold, target
        self.gain: Tensor | None
        self.largest: Tensor
        self.register_buffer("gain", torch.ones(n_head, 1, 1) if target == "gain" else None)
        self.register_buffer("largest", torch.full((n_head,), -torch.inf), persistent=False)

    @torch.no_grad()
    def watch(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Update the largest logit of each head (H,) since the last clip with the logits scale·q·k of q, k (B, H, T, w)."""
        T = q.size(-2)
        for start in range(0, T, _CLIP_ROWS):
            stop = min(start + _CLIP_ROWS, T)
            z = cast(q[..., start:stop, :] @ k[..., :stop, :].mT, torch.float32) * scale
            future = torch.ones(z.shape[-2:], dtype=torch.bool, device=z.device).triu(1 + start)
            z = z.masked_fill(future, -torch.inf)
            self.largest.copy_(torch.maximum(self.largest, z.amax((0, 2, 3))))

    @torch.no_grad()
    def shrink(self) -> Tensor:
        """The factor γ ≤ 1 for the logits of each head (H,), the same on all ranks. Starts a new maximum."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.largest, dist.ReduceOp.MAX)
        # A head without a finite largest logit is not scaled: the update of that step is skipped too.
        seen = self.largest.isfinite() & (self.largest > self.threshold)
        factor = torch.where(seen, self.threshold / self.largest, torch.ones_like(self.largest))
        self.largest.fill_(-torch.inf)
        return factor


@torch.no_grad()
def clip_head_weights(c_attn: nn.Linear, factor: Tensor) -> None:
    """Scale the queries and keys of every head in the fused matrix (3·H·w, d) by the square root of its factor (H,)."""
    root = factor.sqrt()
    for p in c_attn.parameters():
        queries_and_keys = p.view(3, len(root), -1)[:2]
        queries_and_keys.mul_(root[None, :, None].to(p.dtype))
