"""What attention can be given beside its four matrices: a bound on the logits, and a gate for each head.

Every part here is a switch of configs/attention. They are remedies for one failure: logits grow until the softmax picks one token for
good, and its gradient vanishes (arXiv 2606.13276, proposition 4.2). The plain path, without any of them, stays in model/layers.py.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from optim.geonorm import cast

PG_OP_OVERHEAD = 0.016
"""Parameters of head gates, as a share of W_O, below which arXiv 2604.23681 states that PG-OP stays."""

# Rows of logits that QK-clip looks at together: bounds its memory at B·H·512·T numbers.
_CLIP_ROWS = 512


def causal_logits(q: Tensor, k: Tensor, cap: float | None = None, scale: float | None = None) -> Tensor:
    """scale·q·k for q, k (B, H, T, w) as float32 (B, H, T, T), -inf above the diagonal.

    scale: None for 1/√w.  cap: unless None, cap·tanh(z/cap) stands for every logit z (soft-cap; Gemma 2, arXiv 2408.00118).
    """
    z = cast(q @ k.mT, torch.float32) * (q.size(-1) ** -0.5 if scale is None else scale)
    if cap:
        z = cap * torch.tanh(z / cap)
    future = torch.ones(z.shape[-2:], dtype=torch.bool, device=z.device).triu(1)
    return z.masked_fill(future, -torch.inf)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, cap: float, dropout: float, scale: float | None = None) -> Tensor:
    """Causal attention with soft-capped logits, (B, H, T, w) → (B, H, T, w).

    Fused kernels take no function of the logits, so all B·H·T² of them are computed and kept for the backward pass: at GPT-2's
    1024 tokens about six numbers a logit, 4.5 GiB a layer for 16 windows in float32. Choose micro_batch_size accordingly.
    """
    p = cast(torch.softmax(causal_logits(q, k, cap, scale), dim=-1), v.dtype)
    return F.dropout(p, dropout) @ v


class HeadGate(nn.Module):
    """A gate g ∈ (0, 2) for each token and head, applied to the head's output before the output projection.

    Our reconstruction of PG-OP (arXiv 2604.23681), whose formula we have not seen; it states a parameter overhead below 1.6% of W_O
    and that one head's part of the sum becomes easier to recover. Two readings:

        token      g[i, h] = 2σ(x_i · w_h): H vectors of length d, 1/w of W_O for heads of width w (1.56% at w = 64)
        position   g[i, h] = 2σ(t[i, h]): a learned table (T, H), T·H/d² of W_O: 2.08% at GPT-2 124M's 1024 positions, more than stated

    The weights start at zero, so that every gate starts at 1 and the model is the one without gates. They are kept flat: a vector is
    AdamW's, whatever an assignment says of attention's matrices.
    """

    def __init__(self, kind: str, n_head: int, width: int, block_size: int) -> None:
        super().__init__()
        self.kind, self.n_head = kind, n_head
        self.weight = nn.Parameter(torch.zeros(n_head * (width if kind == "token" else block_size)))

    def forward(self, x: Tensor) -> Tensor:
        """Gates (B or 1, H, T, 1) for attention's input x (B, T, d)."""
        if self.kind == "token":
            return 2 * torch.sigmoid(x @ self.weight.view(self.n_head, -1).T).mT.unsqueeze(-1)
        table = self.weight.view(-1, self.n_head)[: x.size(1)]  # (T, H)
        return cast(2 * torch.sigmoid(table).T[None, :, :, None], x.dtype)


class QKClip(nn.Module):
    """After each update, heads whose largest logit S of the batch exceeded τ are scaled back: γ = τ/S.

    MuonClip's rule (Kimi K2, arXiv 2507.20534, section 2.1). What is scaled is a choice:

        weights   W_q and W_k of the head by √γ each, as published. Rows are scaled, so a matrix leaves its manifold.
        gain      a number beside the head, by γ: the same function of the input, and the matrix stays where it is. [ours]

    The largest logits cost one more product QKᵀ a step, without its softmax and without a gradient.
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
        """Take the logits scale·q·k of q, k (B, H, T, w) into the largest ones (H,) since the last clip."""
        T = q.size(-2)
        for start in range(0, T, _CLIP_ROWS):
            stop = min(start + _CLIP_ROWS, T)
            z = cast(q[..., start:stop, :] @ k[..., :stop, :].mT, torch.float32) * scale
            future = torch.ones(z.shape[-2:], dtype=torch.bool, device=z.device).triu(1 + start)
            z = z.masked_fill(future, -torch.inf)
            self.largest.copy_(torch.maximum(self.largest, z.amax((0, 2, 3))))

    @torch.no_grad()
    def shrink(self) -> Tensor:
        """The factor γ ≤ 1 of every head's logits (H,), the same on all ranks; begins a new batch."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.largest, dist.ReduceOp.MAX)
        # A head that saw nothing finite is left alone: the update of that step is skipped as well.
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
