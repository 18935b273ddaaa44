"""Attention and MLP of GPT-2, under nanoGPT's parameter names so that weights can be exchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import HeadGate, QKClip, capped_attention, clip_head_weights

if TYPE_CHECKING:
    from model.gpt import GPTConfig


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention; queries, keys and values come from one fused matrix `c_attn` (3d, d).

    The switches of model/attention.py (QK-norm, QK-clip, soft-cap, head gates) are off unless the configuration asks for them.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.n_embd // config.n_head
        self.n_head, self.dropout, self.logit_cap = config.n_head, config.dropout, config.logit_cap
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.q_norm = nn.RMSNorm(width) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(width) if config.qk_norm else None
        self.qk_clip = QKClip(config.qk_clip, config.qk_clip_on, config.n_head) if config.qk_clip else None
        gated = config.head_gate != "none"
        self.head_gate = HeadGate(config.head_gate, config.n_head, config.n_embd, config.block_size) if gated else None

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, d/H) of x (B, T, d), as the logits q·k/√(d/H) see them."""
        B, T, d = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)
        if self.q_norm is not None:  # unit root mean square, times a learned gain (Henry et al., arXiv 2010.04245)
            q, k = self.q_norm(q.float()).to(v.dtype), self.k_norm(k.float()).to(v.dtype)
        if self.qk_clip is not None and self.qk_clip.gain is not None:
            q = q * self.qk_clip.gain.to(v.dtype)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) → (B, T, d)."""
        q, k, v = self.heads(x)
        dropout = self.dropout if self.training else 0.0
        if self.qk_clip is not None and self.training:
            self.qk_clip.watch(q, k)
        if self.logit_cap:
            y = capped_attention(q, k, v, self.logit_cap, dropout)
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        if self.head_gate is not None:
            y = y * self.head_gate(x)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(x.shape)))

    def clip_logits(self) -> None:
        """Scale back the heads whose logits exceeded the threshold since the last call, if QK-clip is on."""
        if self.qk_clip is None:
            return
        factor = self.qk_clip.shrink()
        if self.qk_clip.gain is None:
            clip_head_weights(self.c_attn, factor)
        else:
            self.qk_clip.gain.mul_(factor[:, None, None])


class MLP(nn.Module):
    """Two matrices with an exact GELU between them, four times as wide as the stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) → (B, T, d)."""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))
