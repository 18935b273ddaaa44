"""The settings of a GPT: its shape and parts, the optional parts of attention, and the scales at initialisation.

Annotated gives the range of a setting; training/fields.py reads it. The defaults are in configs/.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from model.residual import NGPT, RESIDUAL_RULES, Positive, ResidualRule, Stream, residual_rule

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RATE_GROUPS = {"embedding": "wte", "hidden": "c_attn|c_fc|c_proj", "head": "lm_head"}
"""Groups of parameters whose learning rates change with the model size (training/transfer.py), as patterns of names."""


@dataclass(frozen=True)
class Shape:
    """The shape of a GPT and its parts; configs/model.

    vocab_size: may exceed the tokenizer's: 50257 is padded to 50304 = 393·128 for the matrix units of GPUs.
    stream_dtype: the dtype of the residual stream between two sublayers; sublayers and norms compute in their usual dtype.
    rope: rotary positions instead of a table of positions; "half": of half of the channels, see HalfRotary.
    tied: whether the head and the embedding share their weight.
    mlp: the kind of MLP, a name of model.layers.MLPS; "none": blocks without one. skips: whether a sublayer's output is added to the
        stream; without, it takes the stream's place. Both are switches for the study of collapse (arXiv 2604.23681), in no recipe.
    head_cap: unless None, every logit z of the head becomes c·z/√(z² + c²). head_bias: whether the untied head has a bias.
    unit_weights: nGPT (arXiv 2410.01131): the rows or columns of the matrices have unit length, see `GPT.unit_vectors`, and there are the
        learned scales s_qk, s_uv and s_z.
    storage: the size at which s_qk and s_z are stored, see StoredScale; None for 1/√d. logit_scale: s_z at the start.
    """

    block_size: Annotated[int, ("low", 1), ("high", 2**24)]
    vocab_size: Annotated[int, ("low", 1), ("high", 2**24)]
    n_layer: Annotated[int, ("low", 1), ("high", 1000)]
    n_head: Annotated[int, ("low", 1), ("high", 2**16)]
    n_embd: Annotated[int, ("low", 1), ("high", 2**20)]
    dropout: Annotated[float, ("low", 0), ("below", 1)]
    bias: bool
    stream_dtype: Literal["float32", "bfloat16"]
    rope: Literal[True, False, "half"]
    mlp: Literal["gelu", "gelu_tanh", "swiglu", "relu2", "none"]
    skips: bool
    tied: bool
    head_cap: Positive | None
    head_bias: bool
    unit_weights: bool
    storage: Annotated[float | None, ("above", 0), ("null", "means 1/√n_embd")]
    logit_scale: Positive


@dataclass(frozen=True)
class Attention:
    """The optional parts of attention, see model/attention.py; configs/attention. None: off.

    qk_norm: queries and keys have unit root mean square, times a learned gain, or with "no_gain" without one.
    scale: of the logits q·k; None for 1/√(width of a head), and √ of it with unit weights.
    """

    qk_norm: Literal[True, False, "no_gain"]
    scale: Annotated[Positive | None, ("null", "means 1/√(width of a head)")]
    qk_clip: Positive | None
    qk_clip_on: Literal["weights", "gain"]
    logit_cap: Positive | None
    head_gate: Literal["none", "token", "position"]


@dataclass(frozen=True)
class Init:
    """Factors of GPT-2's initial scales; they name the scales of arXiv 2403.02579.

    weight_scale: for c_fc (σ_w). residual_scale: for c_proj, which writes into the stream (α).
    attention_residual_scale, mlp_residual_scale: the same for one branch alone, beside residual_scale (α_A and α_M).
    attention_scale: for the product of queries and keys (σ_A): their parts of c_attn are each multiplied by its square root.
    """

    weight_scale: Positive
    residual_scale: Positive
    attention_residual_scale: Positive
    mlp_residual_scale: Positive
    attention_scale: Positive


@cache
def _gpt2() -> dict[str, Any]:
    """The settings of GPT-2 124M in configs/."""
    files = ("model/_gpt2", "model/gpt2_124m", "attention/plain", "residual/pre_norm", "config")
    parts, shape, attention, residual, config = (yaml.safe_load((CONFIGS / f"{f}.yaml").read_text()) for f in files)
    del shape["defaults"]
    return {**parts, **shape, **attention, **config["init"], "residual": residual_rule(residual)}


@dataclass(frozen=True, init=False)
class GPTConfig(Shape, Attention, Init):
    """All settings of a GPT: GPTConfig(n_layer=24, n_head=16, n_embd=1024). Settings that are not given are those of GPT-2 124M.

    Raises:
        TypeError: a setting is unknown.
    """

    residual: ResidualRule

    def __init__(self, **settings: Any) -> None:
        settings = {**_gpt2(), **settings}
        if wrong := settings.keys() - {field.name for field in fields(self)}:
            raise TypeError(f"a GPT has no setting {', '.join(sorted(wrong))}; see model/config.py")
        vars(self).update(settings)

    def problems(self) -> list[str]:
        """Combinations of settings that are not possible, with remedies. training/fields.py checks the single values."""
        found = []
        if self.n_embd % self.n_head:
            found.append(
                f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}; change one of them"
            )
        elif self.rope and self.n_embd // self.n_head % (4 if self.rope == "half" else 2):
            whole = "a multiple of 4" if self.rope == "half" else "even"
            found.append(
                f"model.rope rotates pairs of channels, and a head has {self.n_embd // self.n_head}; make it {whole}"
            )
        if not self.skips and self.residual.needs_skips:
            able = ", ".join(name for name, rule in RESIDUAL_RULES.items() if not rule.needs_skips)
            found.append(
                f"model.skips=false is not possible with residual={self.residual.rule}, which {self.residual.needs_skips}; "
                f"use model.skips=true, or a residual rule of {able}"
            )
        if isinstance(self.residual, NGPT) and self.residual.embedding == "none":
            found.append(
                "residual=ngpt interpolates on the sphere, where tokens must begin; use residual.embedding=normalize"
            )
        if self.tied and self.head_bias:
            found.append("model.head_bias is for a head of its own; use model.tied=false")
        if self.unit_weights and self.head_cap:
            found.append(
                "model.head_cap bounds the logits, as model.unit_weights does already; use model.head_cap=null"
            )
        norm = "model.unit_weights=true" if self.unit_weights else None
        if self.qk_norm:
            norm = f"attention.qk_norm={str(self.qk_norm).lower()}"
        if norm and self.qk_clip and self.qk_clip_on == "weights":
            found.append(
                f"{norm} undoes what attention.qk_clip does to the weights; switch one off, or use attention.qk_clip_on=gain"
            )
        return found

    @property
    def stream(self) -> Stream:
        """The stream, as a residual rule needs it."""
        radius = 1.0 if self.unit_weights else math.sqrt(self.n_embd)
        return Stream(self.n_embd, self.n_layer, self.bias, radius, self.skips)
