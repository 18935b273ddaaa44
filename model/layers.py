"""Attention and MLP of GPT-2, with nanoGPT's parameter names so that weights can be exchanged, and their variants: rotary positions,
SwiGLU, and the learned scales of nGPT (arXiv 2410.01131)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import HeadGate, KeyValueCache, QKClip, capped_attention, clip_head_weights, computed_by
from model.config import GPTConfig
from model.scale import Scaled, StoredScale
from optim.geonorm import to_sphere
from optim.linalg import cast


class Rotary(nn.Module):
    """Rotary positions (RoPE, arXiv 2104.09864): channels i and i + D/2 of a head are rotated by the angle position · 10000^(-2i/D).

    Which channels form a pair is a convention; this is the one of GPT-NeoX.
    """

    def __init__(self, head_width: int, block_size: int) -> None:
        super().__init__()
        angle = torch.outer(torch.arange(block_size, dtype=torch.float64), self.rates(head_width))
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angle.cos().float(), persistent=False)  # (block_size, D/2)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    @staticmethod
    def rates(head_width: int) -> Tensor:
        """The angle (D/2,) by which each pair of channels turns from one position to the next, float64."""
        return 10_000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """(B, H, T, D) → the same, in x's dtype. The first token has the position `start`."""
        a, b = cast(x, torch.float32).chunk(2, -1)
        here = slice(start, start + x.size(-2))
        cos, sin = self.cos[here], self.sin[here]
        return cast(torch.cat([a * cos - b * sin, a * sin + b * cos], -1), x.dtype)


class HalfRotary(Rotary):
    """Rotary positions of half of the pairs of channels; the other half does not know positions. The angles are those of the public
    speedruns: position · base^(-i/(D/4 - 1)) for i = 0 .. D/4 - 1, with base 1024 (github.com/KellerJordan/modded-nanogpt)."""

    @staticmethod
    def rates(head_width: int) -> Tensor:
        turning = 1024.0 ** -torch.linspace(0, 1, head_width // 4, dtype=torch.float64)
        return torch.cat([turning, torch.zeros_like(turning)])


ROTARIES: dict[bool | str, type[Rotary]] = {True: Rotary, "half": HalfRotary}
"""Rotary positions by the value of `model.rope`."""


class CausalSelfAttention(Scaled):
    """Multi-head causal attention; queries, keys and values come from one fused matrix `c_attn` (3d, d).

    With unit weights, queries and keys are normalised within each head and multiplied by s_qk, and the scale of the logits is √D, not
    1/√D. The configuration may add the parts of model/attention.py: QK-norm, QK-clip, a soft cap, head gates.

    backend: unless None, what computes attention without a mask, for queries of `backend_dtype`; see BACKENDS.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d, width = config.n_embd, config.n_embd // config.n_head
        self.n_head, self.dropout, self.logit_cap = config.n_head, config.dropout, config.logit_cap
        self.backend: str | None = None
        self.backend_dtype = torch.float32
        self.c_attn = nn.Linear(d, 3 * d, bias=config.bias)
        self.c_proj = nn.Linear(d, d, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.rotary = ROTARIES[config.rope](width, config.block_size) if config.rope else None
        gained = config.qk_norm != "no_gain"
        self.q_norm = nn.RMSNorm(width, elementwise_affine=gained) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(width, elementwise_affine=gained) if config.qk_norm else None
        self.qk_clip = QKClip(config.qk_clip, config.qk_clip_on, config.n_head) if config.qk_clip else None
        gated = config.head_gate != "none"
        self.head_gate = HeadGate(config.head_gate, config.n_head, d, config.block_size) if gated else None
        self.s_qk = StoredScale(d, 1.0, config.storage or d**-0.5) if config.unit_weights else None
        self.scale = config.scale or (math.sqrt(width) if config.unit_weights else 1 / math.sqrt(width))

    def heads(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, D) of x (B, T, d), whose first token has the position `start`; the logits are scale·q·k."""
        B, T, d = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)
        if self.q_norm is not None and self.k_norm is not None:
            # Unit root mean square, times a learned gain (Henry et al., arXiv 2010.04245).
            q, k = (cast(norm(cast(u, torch.float32)), v.dtype) for norm, u in ((self.q_norm, q), (self.k_norm, k)))
        if self.rotary is not None:
            q, k = self.rotary(q, start), self.rotary(k, start)
        if self.s_qk is not None:
            s = self.s_qk().view(self.n_head, 1, -1)
            q, k = (cast(s * to_sphere(u), v.dtype) for u in (q, k))
        if self.qk_clip is not None and self.qk_clip.gain is not None:
            q = q * cast(self.qk_clip.gain, v.dtype)
        return q, k, v

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, T, d) → (B, T, d). With a cache, x follows the tokens whose keys and values are in it, and is added to them.

        mask: (B, 1, T, T) bool, what each token attends to; None for all earlier tokens and itself. It needs an empty cache, or none.
        """
        T, start = x.size(1), 0 if cache is None else cache.length
        q, k, v = self.heads(x, start)
        if cache is not None:
            k, v = cache.append(k, v)
        dropout = self.dropout if self.training else 0.0
        if self.qk_clip is not None and self.training:
            self.qk_clip.watch(q, k, self.scale)
        if self.logit_cap:
            y = capped_attention(q, k, v, self.logit_cap, dropout, self.scale, mask)
        else:
            # After cached tokens, a single query sees every key; several queries need a mask, because is_causal aligns the first ones.
            if start and T > 1:
                mask = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)
            causal = start == 0 and mask is None
            with computed_by(self.backend if causal and q.dtype == self.backend_dtype else None):
                y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=self.scale)
        if self.head_gate is not None:
            y = y * self.head_gate(x, start)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(x.shape)))

    def clip_logits(self, skip: Tensor) -> None:
        """If QK-clip is on, scale down the heads whose logits exceeded the threshold since the last call; with `skip` (0-d bool) none."""
        if self.qk_clip is None:
            return
        factor = torch.where(skip, 1.0, self.qk_clip.shrink())
        if self.qk_clip.gain is None:
            clip_head_weights(self.c_attn, factor)
        else:
            self.qk_clip.gain.mul_(factor[:, None, None])

    def matrices(self) -> list[tuple[Tensor, bool]]:
        """W_q, W_k, W_v and W_o, each with whether the result of attention is multiplied by it: only by W_v and W_o."""
        q, k, v = self.c_attn.weight.chunk(3)
        return [(q, False), (k, False), (v, True), (self.c_proj.weight, True)]

    def scales(self) -> dict[str, Tensor]:
        """s_qk, and the gains of the QK-norm: nothing after them undoes a factor of the logits."""
        norms = {"q_gain": self.q_norm, "k_gain": self.k_norm}
        gains: dict[str, Tensor] = {
            name: norm.weight for name, norm in norms.items() if norm is not None and norm.elementwise_affine
        }
        return gains if self.s_qk is None else {**gains, "s_qk": self.s_qk()}


class MLP(Scaled):
    """Two matrices with an exact GELU between them; the hidden layer is four times as wide as the stream.

    With unit weights, the input of the non-linearity is multiplied by √d · s_uv, because products of unit vectors are small.
    """

    branches = 1

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d, hidden = config.n_embd, 4 * config.n_embd
        self.c_fc = nn.Linear(d, self.branches * hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, d, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.s_uv = StoredScale(self.branches * hidden, math.sqrt(d), 1.0) if config.unit_weights else None

    def activation(self, h: Tensor) -> Tensor:
        """The non-linearity between the two matrices."""
        return F.gelu(h)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) → (B, T, d)."""
        return self.dropout(self.c_proj(self.activation(self.hidden(x))))

    def hidden(self, x: Tensor) -> Tensor:
        """The input of the non-linearity. s_uv multiplies the weights, because they are fewer than the activations."""
        if self.s_uv is None:
            return self.c_fc(x)
        s, b = self.s_uv(), self.c_fc.bias
        return F.linear(x, self.c_fc.weight * s[:, None], b if b is None else b * s)

    def matrices(self) -> list[tuple[Tensor, bool]]:
        """The matrices into the hidden layer and out of it; the output is multiplied by both."""
        return [(W, True) for W in (*self.c_fc.weight.chunk(self.branches), self.c_proj.weight)]

    def scales(self) -> dict[str, Tensor]:
        """s_uv, with the factor √d of the forward pass."""
        return {} if self.s_uv is None else {"s_uv": self.s_uv()}


class TanhMLP(MLP):
    """The MLP with the approximation of GELU by tanh that GPT-2 was trained with: `gelu_new` of Hugging Face."""

    def activation(self, h: Tensor) -> Tensor:
        return F.gelu(h, approximate="tanh")


class SwiGLU(MLP):
    """u · SiLU(v), with u and v from one fused matrix `c_fc` (8d, d): arXiv 2002.05202, with the width of nGPT."""

    branches = 2

    def activation(self, h: Tensor) -> Tensor:
        u, v = h.chunk(2, -1)
        return u * F.silu(v)


class SquaredReLU(MLP):
    """max(x, 0)² between the two matrices: arXiv 2109.08668."""

    def activation(self, h: Tensor) -> Tensor:
        return F.relu(h).square()


MLPS: dict[str, type[MLP] | None] = {
    "gelu": MLP,
    "gelu_tanh": TanhMLP,
    "swiglu": SwiGLU,
    "relu2": SquaredReLU,
    "none": None,
}
"""Kinds of MLP by the name that `model.mlp` gives; None: blocks have none."""
