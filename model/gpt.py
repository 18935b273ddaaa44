"""GPT-2: embeddings → blocks → head; loss, generation, and the numbers of parameters and operations."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import PG_OP_OVERHEAD, KeyValueCache, document_mask
from model.config import GPTConfig, Init
from model.generate import Sampling, sampled_tokens
from model.layers import MLPS, CausalSelfAttention
from model.loss import capped, linear_cross_entropy
from model.scale import Scaled, Scales, StoredScale
from optim.linalg import cast


class Block(nn.Module):
    """Attention and MLP, or attention alone; the residual rule adds the output of each to the stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = config.residual.join(config.stream, layer)
        self.attn = CausalSelfAttention(config)
        kind = MLPS[config.mlp]
        self.ln_2 = config.residual.join(config.stream, layer) if kind else None
        self.mlp = kind(config) if kind else None
        self.rounded = config.stream_dtype == "bfloat16"

    @torch.no_grad()
    def scale_weights(self, init: Init) -> None:
        """Multiply the weights by the factors of the initialisation."""
        queries_and_keys = self.attn.c_attn.weight[: 2 * self.attn.c_attn.in_features]
        queries_and_keys.mul_(math.sqrt(init.attention_scale))
        self.attn.c_proj.weight.mul_(init.residual_scale * init.attention_residual_scale)
        if self.mlp is not None:
            self.mlp.c_fc.weight.mul_(init.weight_scale)
            self.mlp.c_proj.weight.mul_(init.residual_scale * init.mlp_residual_scale)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, T, d) → (B, T, d). cache, mask: see `CausalSelfAttention.forward`."""
        attn: typing.Any = self.attn if cache is None and mask is None else partial(self.attn, cache=cache, mask=mask)
        x = self.kept(self.ln_1(x, attn))
        return x if self.mlp is None or self.ln_2 is None else self.kept(self.ln_2(x, self.mlp))

    def joined(self) -> list[tuple[nn.Module, typing.Any]]:
        """The sublayers in their order, as (joint, sublayer)."""
        second = [] if self.mlp is None or self.ln_2 is None else [(self.ln_2, self.mlp)]
        return [(self.ln_1, self.attn), *second]

    def scales(self) -> dict[str, Tensor]:
        """The learned scales of the block. Those of the residual rule have the name of the sublayer behind theirs, such as alpha_attn."""
        joined = list(zip(("_attn", "_mlp"), self.joined()))
        scaled = [(end, m) for end, (joint, _) in joined for m in joint.modules() if isinstance(m, Scaled)]
        own = [("", sublayer) for _, (_, sublayer) in joined if isinstance(sublayer, Scaled)]
        return {name + end: values for end, module in [*scaled, *own] for name, values in module.scales().items()}

    def kept(self, x: Tensor) -> Tensor:
        """The stream x as it is kept for the next sublayer, which computes with it in x's dtype.

        A compiled model stores only the 16 bits: the cast back is part of the kernels that read them.
        """
        return cast(cast(x, torch.bfloat16), x.dtype) if self.rounded else x


class Transformer(nn.Module):
    """Everything before the head. With rotary positions, wpe is None."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.rope else nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.entry = config.residual.entry(config.stream)
        blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.h = typing.cast(Sequence[Block], blocks)
        self.ln_f = config.residual.exit(config.stream)


class GPT(nn.Module):
    """GPT-2 under nanoGPT's parameter names: transformer.{wte, wpe, h.<i>.{ln_1, attn, ln_2, mlp}, ln_f}, lm_head tied to wte.

    separator: unless None, the token between documents and whether it begins one: then a token attends only to its own document, where
    positions start at 0. The configuration of a model does not hold it, because it is of the data.

    Initialisation: normal, of standard deviation 0.02; the residual rule initialises the matrices that write into the stream; then come the
    factors of `Init`.

    Raises:
        ValueError: the configuration is impossible; the message lists every reason.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config = config
        self.separator: tuple[int, bool] | None = None
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight
        stored = config.storage or config.n_embd**-0.5
        self.s_z = StoredScale(config.vocab_size, config.logit_scale, stored) if config.unit_weights else None
        self.apply(self._init)
        for block in self.transformer.h:
            for _, sublayer in block.joined():
                config.residual.init(sublayer, config.stream)
            block.scale_weights(config)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def with_context(self, tokens: int) -> GPT:
        """This model for windows of up to `tokens` tokens, in eval mode: itself if it can read them, otherwise a copy.

        Rotary positions continue beyond those of training without a change; nGPT (arXiv 2410.01131) is claimed to read on so.

        Raises:
            ValueError: the positions are learned, and there are not as many.
        """
        if tokens <= self.config.block_size:
            return self.eval()
        if not self.config.rope or self.config.head_gate == "position":
            learned = "attention.head_gate=position" if self.config.rope else "model.rope=false"
            raise ValueError(
                f"a context of {tokens} tokens is longer than model.block_size={self.config.block_size}, and with {learned} every position "
                "is learned; train with rotary positions (model.rope=true), or shorten the context"
            )
        with torch.random.fork_rng(devices=[]):  # its random weights are replaced
            longer = GPT(GPTConfig(**{**vars(self.config), "block_size": tokens})).to(self.lm_head.weight.device)
        longer.load_state_dict(self.state_dict())
        longer.separator = self.separator
        return longer.eval()

    def attend_by(self, backend: str | None, dtype: torch.dtype) -> None:
        """Let a backend of model.attention.BACKENDS compute attention where queries have this dtype; None: torch chooses."""
        for block in self.transformer.h:
            block.attn.backend, block.attn.backend_dtype = backend, dtype

    def unit_vectors(self) -> dict[str, int]:
        """Matrices whose vectors the optimizer must keep at unit length: parameter name → the dimension along which the vectors lie.

        With unit weights: the rows of tables and of the matrices that read the stream, and the columns of those that write into it.
        Without unit weights, none.
        """
        if not self.config.unit_weights:
            return {}
        matrices = (name for name, p in self.named_parameters() if p.ndim == 2)
        return {name: 0 if name.endswith("c_proj.weight") else 1 for name in matrices}

    def scales(self) -> Scales:
        """Every learned scale with the values that act: nGPT's alpha, s_qk, s_uv and s_z, those of the rules on the sphere, and the
        gains of the QK-norm. Gains of the stream's norms are not among them, because the matrix behind them can undo them. GPT-2 has none."""
        blocks = [block.scales() for block in self.transformer.h]
        layered = {name: [scales[name] for scales in blocks] for name in blocks[0]}
        return layered if self.s_z is None else {**layered, "s_z": self.s_z()}

    def tied_names(self) -> dict[str, str]:
        """Parameter name → the second name of the same weight."""
        return {"transformer.wte.weight": "lm_head.weight"} if self.config.tied else {}

    def clipped_names(self) -> list[str]:
        """Matrices that QK-clip scales; none if it is off or scales a gain."""
        clips = self.config.qk_clip and self.config.qk_clip_on == "weights"
        return [name for name, _ in self.named_parameters() if name.endswith("c_attn.weight")] if clips else []

    def zero_names(self) -> list[str]:
        """Matrices that are zero at the start."""
        zero = self.config.residual.writes_zero
        return [name for name, _ in self.named_parameters() if name.endswith("c_proj.weight")] if zero else []

    def head_weight(self) -> Tensor:
        """The matrix (V, d) of the logits: the weight of the head, times s_z if there is one."""
        W = self.lm_head.weight
        return W if self.s_z is None else W * self.s_z().unsqueeze(1)

    def embed(self, x: Tensor, start: int = 0, positions: Tensor | None = None) -> Tensor:
        """Token ids (B, T) int64 → the stream (B, T, d) before the first block. positions: (B, T) int64; None for those from `start` on.

        Raises:
            ValueError: the tokens reach beyond `block_size`.
        """
        stop = start + x.size(1)
        if self.config.block_size < stop:
            raise ValueError(f"a sequence of {stop} tokens exceeds model.block_size={self.config.block_size}; crop it")
        h = self.transformer.wte(x)
        if self.transformer.wpe is not None:
            h = h + self.transformer.wpe(torch.arange(start, stop, device=x.device) if positions is None else positions)
        return self.transformer.entry(self.transformer.drop(h))

    def features(self, x: Tensor, caches: Sequence[KeyValueCache] | None = None) -> Tensor:
        """Token ids (B, T) int64 → the last hidden state (B, T, d), after the final norm of the residual rule.

        With `caches` (see `new_caches`), x follows the tokens that they hold; all are then one document.
        """
        mask, positions = document_mask(x, *self.separator) if self.separator and caches is None else (None, None)
        h = self.embed(x, caches[0].length if caches else 0, positions)
        for layer, block in enumerate(self.transformer.h):
            h = block(h, caches[layer] if caches else None, mask)
        return self.transformer.ln_f(h)

    def new_caches(self) -> list[KeyValueCache]:
        """An empty cache of keys and values for each layer."""
        return [KeyValueCache(self.config.block_size) for _ in self.transformer.h]

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """For tokens x (B, T) int64: (logits (B, T, V), None). With targets y (B, T): (None, mean loss in nats, 0-d)."""
        h = self.features(x)
        if y is None:
            return self.logits(h), None
        # Under autocast the norm returns float32, but the product with the head is computed in the autocast dtype.
        if torch.is_autocast_enabled(h.device.type):
            h = cast(h, torch.get_autocast_dtype(h.device.type))
        bias, cap = self.lm_head.bias, self.config.head_cap
        return None, linear_cross_entropy(h.flatten(0, 1), self.head_weight(), y.flatten(), bias, cap)

    def logits(self, h: Tensor) -> Tensor:
        """The logits (..., V) of the last hidden state h (..., d)."""
        z = self.lm_head(h) if self.s_z is None else F.linear(h, self.head_weight(), self.lm_head.bias)
        return capped(z, self.config.head_cap)

    def generate(self, x: Tensor, new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """Continue x (B, T) int64 by `new_tokens` sampled tokens, → (B, T + new_tokens), in eval mode. temperature 0: the most likely token.

        Raises:
            ValueError: see Sampling.
        """
        training, sampling = self.training, Sampling(temperature, top_k)
        tokens = [*sampled_tokens(self.eval(), x, new_tokens, sampling)]
        self.train(training)
        return torch.cat([x, *tokens], 1)

    def parameter_count(self, positions: bool = True) -> int:
        """Number of parameters; a tied head counts once. Without the position table if `positions` is false."""
        total = sum(p.numel() for p in self.parameters())
        table = self.transformer.wpe
        return total if positions or table is None else total - table.weight.numel()

    def clip_logits(self, skip: Tensor) -> None:
        """Apply QK-clip, if it is on. Must be called after every update; with `skip` (0-d bool, on the device) after one that was refused."""
        for block in self.transformer.h:
            block.attn.clip_logits(skip)

    def describe(self) -> str:
        """The number of parameters, and how many head gates add to the output projections, as text."""
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

        N does not count tables that are only read by index: positions, and the embedding if the head is untied. Attention counts in
        full, without the causal mask, as is usual.
        """
        c = self.config
        multiplied = self.parameter_count(positions=False) - (0 if c.tied else self.transformer.wte.weight.numel())
        return 6 * multiplied + 12 * c.n_layer * c.n_embd * c.block_size
