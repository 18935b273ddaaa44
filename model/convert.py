"""Weights from elsewhere and for elsewhere: Hugging Face's GPT-2, nanoGPT, and models of this project. Pure: tensors and settings, no files.

Both others have the parameter names of model/gpt.py, because those are nanoGPT's. Hugging Face stores the four matrices of a layer
transposed (Conv1D), and every bias; where a model has none, zeros are written. The layouts are those that the published code reads:
transformers' modeling_gpt2.py and nanoGPT's model.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from model.config import Attention, GPTConfig, Init, Shape

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
"""Our kinds of MLP → the activation functions of Hugging Face's GPT-2."""
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
"""The settings that GPT-2 has everywhere: the arguments of nanoGPT's GPTConfig."""

_TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
# Causal masks that older programs stored. A bias is called attn.<matrix>.bias.
_MASKS = re.compile(r"\.attn\.(bias|masked_bias)$")
_EMBEDDING, _HEAD, _POSITIONS = "transformer.wte.weight", "lm_head.weight", "transformer.wpe.weight"
# Settings of a GPTConfig that do not change what a trained model computes, or only together with another one, which is compared.
_WITHOUT_EFFECT = {*(field.name for field in fields(Init)), "qk_clip_on", "storage", "logit_scale", "dropout"}


@dataclass(frozen=True)
class Weights:
    """A model from elsewhere.

    source: where it comes from, for messages. tensors: parameter name, as in model/gpt.py → tensor; a tied head may be missing.
    settings: what is known of its configuration, by dotted key, such as model.n_head; residual.rule is the residual rule.
    """

    source: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]


class NotGPT2(Exception):
    """A model cannot be converted; the message says why."""


def foreign_settings(config: GPTConfig, also: Mapping[str, Any] | None = None) -> list[str]:
    """Settings of a model that GPT-2 does not have, as "attention.qk_norm=true". `also`: name → further values that are possible."""
    plain, also = GPTConfig(), also or {}
    found = [] if config.residual.rule == plain.residual.rule else [f"residual={config.residual.rule}"]
    for section, group in (("model", Shape), ("attention", Attention)):
        for field in fields(group):
            value = getattr(config, field.name)
            possible = (getattr(plain, field.name), *also.get(field.name, ()))
            if field.name not in (*SIZES, *_WITHOUT_EFFECT) and value not in possible:
                found.append(f"{section}.{field.name}={str(value).lower() if isinstance(value, bool) else value}")
    return found


# ---- Hugging Face ----


def to_hf(config: GPTConfig, state: Mapping[str, Tensor], end_of_text: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and the tensors (float32) of GPT2LMHeadModel for a model of this configuration and state dict.

    end_of_text: the id of the token between documents.

    Raises:
        NotGPT2: GPT-2 has no such model.
    """
    if foreign := foreign_settings(config, {"mlp": ACTIVATIONS, "tied": (False,)}):
        raise NotGPT2(f"{', '.join(foreign)}, which Hugging Face's GPT-2 does not have")
    tensors = {}
    for name, t in state.items():
        t = t.detach().float()
        if config.tied and name == _HEAD:
            continue
        tensors[name] = t.T.contiguous() if _TRANSPOSED.search(name) else t.contiguous()
        if not config.bias and (".h." in name or ".ln_f." in name):
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(len(t))
    pdrop = {f"{part}_pdrop": config.dropout for part in ("attn", "embd", "resid")}
    about = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": ACTIVATIONS[config.mlp],
        "tie_word_embeddings": config.tied,
        "layer_norm_epsilon": nn.LayerNorm(1).eps,
        **{key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
        "n_positions": config.block_size,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        **pdrop,
    }
    return about, tensors


def from_hf(source: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Weights:
    """The weights of a GPT2LMHeadModel or GPT2Model, from its config.json and its tensors.

    Raises:
        NotGPT2: it is another model, or a GPT-2 with parts that we do not have.
    """
    ours = {theirs: mlp for mlp, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
    activation = about.get("activation_function", "gelu_new")
    epsilon, hidden = about.get("layer_norm_epsilon", 1e-5), about.get("n_inner")
    reasons = {
        f"model_type {about.get('model_type')}": about.get("model_type") != "gpt2",
        f"activation_function {activation}": activation not in ours,
        f"layer_norm_epsilon {epsilon}": epsilon != nn.LayerNorm(1).eps,
        f"n_inner {hidden}": hidden not in (None, 4 * about.get("n_embd", 0)),
        "scale_attn_weights false": not about.get("scale_attn_weights", True),
        "scale_attn_by_inverse_layer_idx": bool(about.get("scale_attn_by_inverse_layer_idx")),
        "add_cross_attention": bool(about.get("add_cross_attention")),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise NotGPT2(f"{source} has {', '.join(found)}, which is not GPT-2 as it is here")
    sizes = {
        "block_size": about["n_positions"],
        **{key: about[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
    }
    kinds = {"mlp": ours[activation], "tied": bool(about.get("tie_word_embeddings", True))}
    named = {
        name if name == _HEAD else f"transformer.{name.removeprefix('transformer.')}": t for name, t in tensors.items()
    }
    turned = {name: t.T if _TRANSPOSED.search(name) else t for name, t in named.items()}
    return Weights(source, _without_masks(turned), _as_gpt2({**sizes, **kinds}))


def _as_gpt2(model: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a GPT-2 by dotted key, from those of its section `model` that are known."""
    known = {"rope": False, "unit_weights": False, "head_cap": None, **model}
    attention = {"qk_norm": False, "scale": None, "logit_cap": None}
    sections = {"model": known, "attention": attention}
    every = {f"{section}.{key}": value for section, settings in sections.items() for key, value in settings.items()}
    return {"residual.rule": "pre_norm", **every}


# ---- nanoGPT ----


def to_nanogpt(config: GPTConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of nanoGPT's GPTConfig, and the state dict (float32) for its GPT.

    Raises:
        NotGPT2: nanoGPT has no such model.
    """
    if foreign := foreign_settings(config):
        raise NotGPT2(f"{', '.join(foreign)}, which nanoGPT does not have")
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in state.items()}
    return {key: getattr(config, key) for key in SIZES}, tensors


def from_nanogpt(source: str, content: Mapping[str, Any]) -> Weights:
    """The weights of a state dict of nanoGPT, or of its checkpoint (ckpt.pt), which holds one under "model" beside "model_args".

    Raises:
        NotGPT2: it is neither.
    """
    state, arguments = content.get("model", content), content.get("model_args", {})
    if (
        not isinstance(state, Mapping)
        or not all(isinstance(t, Tensor) for t in state.values())
        or not isinstance(arguments, Mapping)
    ):
        raise NotGPT2(f"{source} holds neither a state dict of nanoGPT nor its checkpoint")
    tensors = {re.sub(r"^(_orig_mod\.|module\.)+", "", name): t for name, t in state.items()}
    known = {
        key: arguments[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size") if key in arguments
    }
    return Weights(source, _without_masks(tensors), _as_gpt2({"mlp": "gelu", "tied": True, **known}))


def _without_masks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if not _MASKS.search(name)}


# ---- into a model ----


def known_settings(config: GPTConfig) -> dict[str, Any]:
    """The settings of a model of this project for `Weights.settings`; of attention, those that its parameters do not tell."""
    model = {f"model.{field.name}": getattr(config, field.name) for field in fields(Shape)}
    attention = {f"attention.{name}": getattr(config, name) for name in ("qk_norm", "scale", "logit_cap")}
    return {**model, **attention, **{f"residual.{key}": value for key, value in vars(config.residual).items()}}


def changed_attention(weights: Weights, config: GPTConfig) -> list[str]:
    """A line for each setting of attention in which this configuration differs from that of the weights. Such differences are allowed."""
    have = known_settings(config)
    theirs = {key: value for key, value in weights.settings.items() if key.startswith("attention.")}
    return [
        f"{key}={_word(have[key])}, where the weights had {_word(value)}: attention computes something else with them"
        for key, value in theirs.items()
        if have[key] != value
    ]


def misfits(weights: Weights, config: GPTConfig) -> list[str]:
    """Settings under which a model of this configuration would not compute what the weights were trained for, with the remedy.

    Fewer positions, a larger vocabulary and more biases are possible, see `take`.
    """
    have = known_settings(config)
    theirs = {"model.skips": True, **weights.settings}  # with skips, unless the settings say otherwise
    may_differ = {f"model.{key}" for key in ("block_size", "vocab_size", "bias", "dropout")}
    if not config.unit_weights:
        may_differ |= {"model.storage", "model.logit_scale"}
    may_differ |= {key for key in theirs if key.startswith("attention.")}  # see `changed_attention`
    wrong = [key for key in theirs if key not in may_differ and have.get(key) != theirs[key]]
    if theirs.get("model.vocab_size", 0) > config.vocab_size:
        wrong.append("model.vocab_size")
    if not config.rope and theirs.get("model.block_size", config.block_size) < config.block_size:
        wrong.append("model.block_size")
    found = []
    if not config.bias and any(name.endswith(".bias") and t.any() for name, t in weights.tensors.items()):
        found.append(f"model.bias=false does not fit {weights.source}, whose biases are not zero; set model.bias=true")
    named = {key: key.removesuffix(".rule") for key in wrong}
    return found + [
        f"{name}={_word(have.get(key))} does not fit {weights.source}; set {name}={_word(theirs[key])}"
        for key, name in named.items()
    ]


def _word(value: Any) -> str:
    """A value as the command line expects it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


@torch.no_grad()
def take(weights: Weights, model: nn.Module) -> list[str]:
    """Copy weights into a model by name; returns what does not fit, with remedies, and then the model is unchanged.

    Of a longer table of positions the first are used. A larger vocabulary: every new row of the embedding and the head is the mean of the
    others. Its logit is the mean of the others', so that V' new rows beside V raise a loss by at most log(1 + V'/V), by Jensen's
    inequality, unless `model.head_cap` bends it. Biases that are missing are zero, and zero biases that the model does not have are left out.
    """
    own = {**dict(model.named_parameters()), **{k: b for k, b in model.named_buffers() if k in model.state_dict()}}
    found, problems = {}, []
    for name, p in own.items():
        t = weights.tensors.get(name)
        if t is None and name.endswith(".bias"):
            t = torch.zeros(p.shape)
        if t is None and name == _HEAD:
            t = weights.tensors.get(_EMBEDDING)
        if t is not None and t.ndim == p.ndim == 2 and t.size(1) == p.size(1):
            if name in (_EMBEDDING, _HEAD) and len(t) < len(p):
                t = torch.cat([t, t.mean(0, keepdim=True).expand(len(p) - len(t), -1)])
            if name == _POSITIONS:
                t = t[: len(p)]
        if t is None or t.shape != p.shape:
            problems.append(
                f"{name}: {tuple(p.shape)} here, {'missing' if t is None else tuple(t.shape)} in {weights.source}"
            )
        else:
            found[name] = t
    left = [name for name in weights.tensors if name not in own and name not in model.state_dict()]
    needed = [name for name in left if not name.endswith(".bias") or weights.tensors[name].any()]
    problems += [f"{name}: in {weights.source}, but not in this model" for name in needed]
    if not problems:
        for name, t in found.items():
            own[name].copy_(t)
    return problems
