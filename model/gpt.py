"""GPT-2: embeddings → blocks → head, loss, generation, and the counts of parameters and operations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import PG_OP_OVERHEAD
from model.layers import MLPS, CausalSelfAttention
from model.loss import linear_cross_entropy
from model.residual import ResidualRule, Stream, residual_problems, residual_rule
from model.scale import StoredScale
from optim.casts import cast


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2 124M as nanoGPT trains it.

    vocab_size may exceed the tokenizer's: 50257 is padded to 50304 = 393·128 for the matrix units.
    rope: rotary positions in place of the table of positions. mlp: a name of model.layers.MLPS. tied: whether the head is the embedding.
    unit_weights: nGPT's matrices (arXiv 2410.01131), whose vectors of embedding space are to be kept at unit length, see
        `GPT.unit_vectors`, with the learned scales s_qk, s_uv and s_z that this needs.
    storage: the size at which s_qk and s_z are stored, see StoredScale; None for 1/√d. logit_scale: s_z at the start.
    residual: the residual rule and its settings, see model.residual.
    qk_norm, qk_clip (threshold of a logit; None: off), qk_clip_on, logit_cap (None: off), head_gate: see model/attention.py.
    weight_scale: multiplies GPT-2's initial c_fc (σ_w of arXiv 2403.02579); residual_scale: its initial c_proj, which write into
    the stream.
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False
    rope: bool = False
    mlp: str = "gelu"
    tied: bool = True
    unit_weights: bool = False
    storage: float | None = None
    logit_scale: float = 1.0
    residual: Mapping[str, Any] = field(default_factory=lambda: {"rule": "pre_norm"})
    qk_norm: bool = False
    qk_clip: float | None = None
    qk_clip_on: str = "gain"
    logit_cap: float | None = None
    head_gate: str = "none"
    weight_scale: float = 1.0
    residual_scale: float = 1.0

    def problems(self) -> list[str]:
        """What does not fit together, each with its remedy; empty if nothing. Ranges of single values: training/settings.py."""
        found = residual_problems(self.residual)
        if self.n_embd % self.n_head:
            found.append(
                f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}; change one of them"
            )
        elif self.rope and self.n_embd // self.n_head % 2:
            found.append(
                f"model.rope turns pairs of channels, and a head has {self.n_embd // self.n_head}; make it even"
            )
        norm = "attention.qk_norm=true" if self.qk_norm else "model.unit_weights=true" if self.unit_weights else None
        if norm and self.qk_clip and self.qk_clip_on == "weights":
            found.append(
                f"{norm} undoes what attention.qk_clip does to the weights; switch one off, or use attention.qk_clip_on=gain"
            )
        return found

    @property
    def stream(self) -> Stream:
        """What a residual rule is told."""
        radius = 1.0 if self.unit_weights else math.sqrt(self.n_embd)
        return Stream(self.n_embd, self.n_layer, self.bias, radius)


class Block(nn.Module):
    """Attention and MLP, each joined to the stream by the residual rule."""

    def __init__(self, config: GPTConfig, rule: ResidualRule, layer: int) -> None:
        super().__init__()
        self.ln_1 = rule.join(config.stream, layer)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = rule.join(config.stream, layer)
        self.mlp = MLPS[config.mlp](config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) → (B, T, d)."""
        x = self.ln_1(x, self.attn)
        return self.ln_2(x, self.mlp)


class GPT(nn.Module):
    """GPT-2 under nanoGPT's parameter names: transformer.{wte, wpe, h.<i>.{ln_1, attn, ln_2, mlp}, ln_f}, lm_head tied to wte.

    Initialisation: N(0, 0.02); the residual rule initialises what writes into the stream; times the scales of the configuration.

    Raises:
        ValueError: the configuration is impossible; the message lists every reason.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config = config
        rule = residual_rule(config.residual)
        positions = {} if config.rope else {"wpe": nn.Embedding(config.block_size, config.n_embd)}
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                **positions,
                "drop": nn.Dropout(config.dropout),
                "entry": rule.entry(config.stream),
                "h": nn.ModuleList(Block(config, rule, layer) for layer in range(config.n_layer)),
                "ln_f": rule.exit(config.stream),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight
        stored = config.storage or config.n_embd**-0.5
        self.s_z = StoredScale(config.vocab_size, config.logit_scale, stored) if config.unit_weights else None
        self.apply(self._init)
        for block in self.transformer.h:
            for sublayer in (block.attn, block.mlp):
                rule.init(sublayer, config.stream)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.data.mul_(config.residual_scale)
            elif name.endswith("c_fc.weight"):
                p.data.mul_(config.weight_scale)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def unit_vectors(self) -> dict[str, int]:
        """Matrices to be kept at unit length by whoever trains them: parameter name → the dimension along which their vectors lie.

        With unit weights these are all vectors of embedding space: the rows of tables and of the matrices that read the stream, the
        columns of those that write into it. Without, there are none.
        """
        if not self.config.unit_weights:
            return {}
        matrices = (name for name, p in self.named_parameters() if p.ndim == 2)
        return {name: 0 if name.endswith("c_proj.weight") else 1 for name in matrices}

    def head_weight(self) -> Tensor:
        """The matrix (V, d) of the logits: the head's, with s_z multiplied in."""
        W = self.lm_head.weight
        return W if self.s_z is None else W * self.s_z().unsqueeze(1)

    def embed(self, x: Tensor) -> Tensor:
        """Token ids (B, T) int64 → the stream (B, T, d) that they begin as."""
        T = x.size(1)
        if self.config.block_size < T:
            raise ValueError(f"a sequence of {T} tokens exceeds model.block_size={self.config.block_size}; crop it")
        h = self.transformer.wte(x)
        if not self.config.rope:
            h = h + self.transformer.wpe(torch.arange(T, device=x.device))
        return self.transformer.entry(self.transformer.drop(h))

    def features(self, x: Tensor) -> Tensor:
        """Token ids (B, T) int64 → the last hidden state (B, T, d), normed as the residual rule has it."""
        h = self.embed(x)
        for block in self.transformer.h:
            h = block(h)
        return self.transformer.ln_f(h)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, T, V) and no loss for x (B, T) int64 alone; with targets y (B, T), no logits and the mean loss in nats (0-d)."""
        h = self.features(x)
        if y is None:
            return F.linear(h, self.head_weight()), None
        # Under autocast the norm returns float32; the head's product belongs in the autocast dtype.
        if torch.is_autocast_enabled(h.device.type):
            h = cast(h, torch.get_autocast_dtype(h.device.type))
        return None, linear_cross_entropy(h.flatten(0, 1), self.head_weight(), y.flatten())

    @torch.no_grad()
    def generate(self, x: Tensor, new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """Continue x (B, T) int64 by `new_tokens` sampled tokens, → (B, T + new_tokens). temperature 0 takes the likeliest token.

        Raises:
            ValueError: temperature is negative or top_k is not positive.
        """
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature={temperature} must be at least 0 and top_k={top_k} at least 1")
        for _ in range(new_tokens):
            h = self.features(x[:, -self.config.block_size :])[:, -1]
            logits = F.linear(h, self.head_weight()).float()  # (B, V)
            if top_k is not None:
                kth = torch.topk(logits, min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -torch.inf)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial(torch.softmax(logits / temperature, -1), 1)
            x = torch.cat([x, token], 1)
        return x

    def parameter_count(self, positions: bool = True) -> int:
        """Number of parameters, the tied head counted once; without the position table if `positions` is false."""
        total = sum(p.numel() for p in self.parameters())
        return total if positions or self.config.rope else total - self.transformer.wpe.weight.numel()

    def clip_logits(self) -> None:
        """QK-clip, if the configuration asks for it; to be called after every update."""
        for block in self.transformer.h:
            block.attn.clip_logits()

    def describe(self) -> str:
        """The number of parameters, and what head gates add to the output projections they stand before."""
        text = f"{self.parameter_count():,} parameters"
        gates = [block.attn.head_gate for block in self.transformer.h if block.attn.head_gate is not None]
        if gates:
            added, beside = gates[0].weight.numel(), self.config.n_embd**2
            text += f", head gates among them: {added:,} a layer, {100 * added / beside:.2f}% of W_O"
            if added >= PG_OP_OVERHEAD * beside:
                text += f", which arXiv 2604.23681 states to be below {100 * PG_OP_OVERHEAD:g}%"
        return text

    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward per token: 6N + 12·L·d·T (PaLM, arXiv 2204.02311, appendix B).

        N leaves out the tables that are only looked up: positions, and the embedding if the head is another matrix. Attention is
        counted dense, as is customary.
        """
        c = self.config
        multiplied = self.parameter_count(positions=False) - (0 if c.tied else self.transformer.wte.weight.numel())
        return 6 * multiplied + 12 * c.n_layer * c.n_embd * c.block_size
