"""Measurements in one forward pass on a fixed batch: logits and entropy of attention, norms of its weights, turns of the stream, and collapse.

The paper (arXiv 2606.13276) explains instability by logits that saturate the softmax, but it measures neither logits nor entropy. A probe
measures both, on any model at any step. It computes attention explicitly, in evaluation mode and float32, and does not change the run:
it computes no gradient, draws no random number and changes no state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from model.attention import causal_logits
from model.collapse import depth, mixing_dimensions, outside_span, recovery
from model.spectra import rounded
from model.turns import Turns
from optim.linalg import exact_sums

if TYPE_CHECKING:
    from model.gpt import GPT
    from model.layers import CausalSelfAttention

SATURATED = 0.99
"""A row of attention is saturated if its largest probability exceeds this."""

_SQUARINGS = 8  # the 256th power of a Gram matrix gives its largest eigenvalue with a relative error below 1e-3
_TOP_SHARE = 1e-3  # the 99.9th percentile


@torch.no_grad()
def probe(model: GPT, x: Tensor) -> dict[str, Any]:
    """Measure a model on the windows x (B, T) int64, T at least 2; returns a record of floats and lists. Documents are not kept apart.

    For each of L layers a list over H heads: `logit_max`, `logit_p999`, `entropy` (divided by log of the position), `saturated` (share of rows),
    `jacobian` (mean ‖∂softmax‖_F), `qk_norm_product` (‖W_q‖₂‖W_k‖₂), `qk_product_norm` (‖W_qᵀW_k‖₂), `recovery` (R²).
    For each of L + 1 depths of the stream: `distance_from_mean`, `mean_cosine`, `effective_rank`, `width_rank`.
    `stream`: what `model.turns.Turns.record` says of the angles by which the sublayers turn the stream.
    Summary: `largest_logit`, `largest_qk_norm`; `least_entropy`, `greatest_saturation` of a layer (mean of its heads) and
    `least_head_entropy`, `greatest_head_saturation` of a head; `least_recovery` of a head.
    """
    attention: list[dict[str, Tensor]] = []
    streams: list[dict[str, Tensor]] = []
    blocks, turns = model.transformer.h, Turns(model)
    hooks = [*turns.hooks, blocks[0].register_forward_pre_hook(lambda _, args: streams.append(depth(args[0].float())))]
    for block in blocks:
        hooks.append(
            block.attn.register_forward_pre_hook(lambda attn, args: attention.append(attention_record(attn, args[0])))
        )
        hooks.append(block.register_forward_hook(lambda _, args, out: streams.append(depth(out.float()))))
    forward_with(hooks, model, x)
    stacked = {key: torch.stack([record[key] for record in attention]) for key in attention[0]}  # (L, H) each
    stacked |= qk_norms(torch.stack([block.attn.c_attn.weight for block in blocks]).float(), model.config.n_head)
    stacked |= {key: torch.stack([record[key] for record in streams]) for key in streams[0]}  # (L + 1,)
    record = {key: rounded(value.tolist()) for key, value in stacked.items()}
    stream = {key: rounded(value) for key, value in turns.record().items()}
    return {**record, "stream": stream, **probe_summary(stacked)}


def probe_summary(stacked: dict[str, Tensor]) -> dict[str, float]:
    """The extremes over layers and heads, which curves, tables and the early warning use."""
    entropy, saturated = stacked["entropy"], stacked["saturated"]
    numbers = {
        "largest_logit": stacked["logit_max"].max(),
        "largest_qk_norm": stacked["qk_product_norm"].max(),
        "least_entropy": entropy.mean(-1).min(),
        "least_head_entropy": entropy.min(),
        "greatest_saturation": saturated.mean(-1).max(),
        "greatest_head_saturation": saturated.max(),
        "least_recovery": stacked["recovery"].min(),
    }
    return {key: rounded(value.item()) for key, value in numbers.items()}


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """A context with dropout and autocast off; afterwards the mode of the model is as before."""
    training = model.training
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        model.train(training)


@torch.no_grad()
def head_mixing(model: GPT, x: Tensor, known_gates: bool = False) -> Tensor:
    """`model.collapse.mixing_dimensions` of every layer and head (L, H) on the windows x (B, T) int64.

    known_gates: whether the reader knows the gates of the heads, if there are any; otherwise a gated output is a head's output.
    """
    found: list[Tensor] = []

    def measure(attn: CausalSelfAttention, args: tuple[Tensor, ...]) -> None:
        _, _, o = explicit_attention(attn, args[0])
        if attn.head_gate is None or not known_gates:
            found.append(mixing_dimensions(o))
            return
        B, T, _ = args[0].shape
        gates = attn.head_gate(args[0].float()).expand(B, -1, T, 1).squeeze(-1).mT.flatten(0, 1)
        found.append(mixing_dimensions(o / gates[..., None], gates))

    forward_with([block.attn.register_forward_pre_hook(measure) for block in model.transformer.h], model, x)
    return torch.stack(found)


@torch.no_grad()
def new_directions(model: GPT, x: Tensor) -> list[float]:
    """`model.collapse.outside_span` of the embeddings and after every layer (L + 1) on the windows x (B, T) int64.

    Of each window the first d/2 tokens count: the embeddings of d tokens would span everything, and later tokens do not act on earlier ones.
    """
    first = model.config.n_embd // 2
    streams: list[Tensor] = []
    blocks = model.transformer.h
    hooks = [blocks[0].register_forward_pre_hook(lambda _, args: streams.append(args[0][:, :first].float()))]
    hooks += [
        block.register_forward_hook(lambda _, args, out: streams.append(out[:, :first].float())) for block in blocks
    ]
    forward_with(hooks, model, x)
    return [outside_span(X, streams[0]).item() for X in streams]


def forward_with(hooks: Iterable[RemovableHandle], model: GPT, x: Tensor) -> None:
    """Run the model on x (B, T) in evaluation mode with these hooks, then remove them, also after an error."""
    try:
        with evaluation_mode(model), exact_sums(x.device):
            model.features(x)
    finally:
        for hook in hooks:
            hook.remove()


def explicit_attention(attn: CausalSelfAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and probabilities (B, H, T, T) of attention on its input x (B, T, d), and the outputs of its heads (B·T, H, w)."""
    q, k, v = attn.heads(x.float())
    z = causal_logits(q, k, attn.logit_cap, attn.scale)
    p = torch.softmax(z, dim=-1)
    y = p @ v if attn.head_gate is None else (p @ v) * attn.head_gate(x)
    return z, p, y.transpose(1, 2).flatten(0, 1)


def attention_record(attn: CausalSelfAttention, x: Tensor) -> dict[str, Tensor]:
    """Statistics of each head of attention on its input x (B, T, d); (H,) each."""
    z, p, tokens = explicit_attention(attn, x)
    return {**logit_statistics(z), **row_statistics(p), "recovery": recovery(tokens, attn.c_proj.weight)}


def logit_statistics(z: Tensor) -> dict[str, Tensor]:
    """Maximum and 99.9th percentile (H,) of causal logits z (B, H, T, T), -inf above the diagonal."""
    B, H, T, _ = z.shape
    above = math.ceil(_TOP_SHARE * B * T * (T + 1) / 2)
    top = z.transpose(0, 1).reshape(H, -1).topk(above, dim=-1).values  # descending
    return {"logit_max": top[:, 0], "logit_p999": top[:, -1]}


def row_statistics(p: Tensor) -> dict[str, Tensor]:
    """Entropy, saturation and Jacobian (H,) of causal attention p (B, H, T, T), averaged over all rows but the first.

    entropy: -Σp log p divided by its largest possible value, log of the position. saturated: share of rows with a probability above .99.
    jacobian: Frobenius norm of the Jacobian of the softmax, diag(p) - ppᵀ; its square is Σp² - 2Σp³ + (Σp²)².
    """
    p = p[:, :, 1:]
    positions = torch.arange(2, p.size(-1) + 1, device=p.device)
    squares = p.square().sum(-1)
    jacobian = (squares - 2 * p.pow(3).sum(-1) + squares.square()).clamp_min(0).sqrt()
    return {
        "entropy": (torch.special.entr(p).sum(-1) / positions.log()).mean((0, 2)),
        "saturated": (p.amax(-1) > SATURATED).float().mean((0, 2)),
        "jacobian": jacobian.mean((0, 2)),
    }


def qk_norms(c_attn: Tensor, n_head: int) -> dict[str, Tensor]:
    """Spectral norms of each head's query and key matrices: ‖W_q‖₂‖W_k‖₂ and ‖W_qᵀW_k‖₂, (L, H) each.

    c_attn: (L, 3d, d), the fused matrices. Without biases, QK-norm and rotary positions, a logit is at most ‖W_qᵀW_k‖₂
    times the squared length of the inputs, divided by √w; with rotary positions, ‖W_q‖₂‖W_k‖₂ times that.
    """
    L, _, d = c_attn.shape
    q, k, _ = c_attn.double().view(L, 3, n_head, -1, d).unbind(1)  # (L, H, w, d) each
    Q, K = q @ q.mT, k @ k.mT
    eye = torch.eye(q.size(-2), dtype=torch.float64, device=q.device).expand(L, n_head, -1, -1)
    return {"qk_norm_product": product_norm(Q, eye) * product_norm(K, eye), "qk_product_norm": product_norm(Q, K)}


def product_norm(Q: Tensor, K: Tensor) -> Tensor:
    """‖AᵀB‖₂ (...,) from Q = AAᵀ and K = BBᵀ (..., w, w), without a decomposition, so that it is fast on any device.

    The squared singular values of AᵀB are the eigenvalues of KQ. Repeated squaring of KQ gives its
    dominant eigenvector x. Then Aᵀx is the dominant left singular vector, and the error of its Rayleigh quotient xᵀQKQx / xᵀQx is of
    second order.
    """
    power = K @ Q
    for _ in range(_SQUARINGS):
        power = power / torch.linalg.matrix_norm(power, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)
        power = power @ power
    largest = torch.linalg.vector_norm(power, dim=-2).argmax(-1)  # the longest column is the most accurate
    x = torch.take_along_dim(power, largest[..., None, None], dim=-1)
    Qx = Q @ x
    squared = (Qx.mT @ K @ Qx) / (x.mT @ Qx).clamp_min(torch.finfo(power.dtype).tiny)
    return squared.clamp_min(0).sqrt()[..., 0, 0]
