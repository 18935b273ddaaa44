"""The two exponents of signal propagation at initialisation: measured on any GPT, and in closed form for GPT-2.

Angle: how fast tokens become alike or different. With q the mean square of a token's coordinates and p the mean product of those of two
tokens, λ_a = log[(1 - c') / (1 - c)], where c = p/q before a block and c' after it; below zero, tokens collapse. Gradient: λ_g = log of
the growth of the squared gradient through a block, from output to input. Cowsik, Nebabu, Qi, Ganguli (arXiv 2403.02579) report that both
together predict the final loss, which is best where both are zero; results/exponents has what our runs gave.
They study attention without a causal mask. With a mask, positions are not equivalent, so c is taken over the second half of them,
from sums over the whole batch. [our reading]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from model.probes import evaluation_mode
from model.residual import LerpJoint, SphereJoint

if TYPE_CHECKING:
    from model.gpt import GPT

SKIPS = ("one", "normalised")
"""Factor a of the stream where a branch of strength α is added: 1, or √(1 - α²) (both in arXiv 2403.02579)."""


def squared_skip(strength: float, skip: str) -> float:
    """a², the squared factor of the stream, for a branch of this strength and a name of SKIPS."""
    return 1.0 if skip == "one" else 1 - strength**2


@dataclass(frozen=True)
class Exponents:
    """λ_a and λ_g of every block, in order; the exponents are their means. Natural logarithms."""

    angles: tuple[float, ...]
    gradients: tuple[float, ...]

    @property
    def angle(self) -> float:
        """λ_a: below zero tokens collapse, above zero they separate."""
        return sum(self.angles) / len(self.angles)

    @property
    def gradient(self) -> float:
        """λ_g: below zero gradients vanish towards the first block, above zero they explode."""
        return sum(self.gradients) / len(self.gradients)


# ---- inputs ----


def near_collapse(model: GPT, batch: int, tokens: int, correlation: float, generator: torch.Generator) -> Tensor:
    """A stream (batch, tokens, d) with the scale of the embeddings, in which all pairs of tokens have one correlation (1: collapse).

    x_i = √ρ g + √(1 - ρ) z_i, with one g for a sequence; g and z_i standard normal.
    """
    d, embedding = model.config.n_embd, model.transformer
    tables = [table for table in (embedding.wte, embedding.wpe) if table is not None]
    scale = math.sqrt(sum(table.weight.square().mean().item() for table in tables))
    common, own = torch.randn(batch, 1, d, generator=generator), torch.randn(batch, tokens, d, generator=generator)
    x = math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own
    return embedding.entry(scale * x.to(embedding.wte.weight.device))


# ---- measurement ----


def streams(model: GPT, x: Tensor, strength: float = 1.0, skip: str = "one") -> Iterator[Tensor]:
    """The stream x (B, T, d), and the stream after every block, with each branch multiplied by `strength` (α).

    Works for any residual rule: the branch is what the rule adds. α = 1 with skip "one" is the model itself, without the rounding of a
    stream in bfloat16. If a rule keeps the stream on a sphere, every token is scaled to the length that the rule gives it.

    Raises:
        ValueError: another α or skip, of a model without skips.
    """
    keep = math.sqrt(squared_skip(strength, skip))
    if not model.config.skips and not strength == keep == 1:
        raise ValueError(
            "a model without skips has no strength of its branches; use model.skips=true, or strength 1 with skip one"
        )
    yield x
    for block in model.transformer.h:
        for joint, sublayer in block.joined():
            joined = joint(x, sublayer)
            if strength == keep == 1:
                x = joined
                continue
            x = keep * x + strength * (joined - x)
            if isinstance(joint, (SphereJoint, LerpJoint)):
                new, old = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (joined, x))
                x = x * (new / old)
        yield x


def misalignment(X: Tensor) -> Tensor:
    """1 - c (0-d) of the second half of the tokens of X (B, T, d), from deviations from the mean, which avoids cancellation."""
    X = X[:, X.size(1) // 2 :].double()
    n, d = X.shape[1:]
    deviation = (X - X.mean(1, keepdim=True)).square().sum() / ((n - 1) * d)
    return deviation / (X.square().sum() / (n * d))


def measured_exponents(
    model: GPT, x: Tensor, generator: torch.Generator, strength: float = 1.0, skip: str = "one"
) -> Exponents:
    """Both exponents of a model for the stream x (B, T, d), T at least 4, in evaluation mode.

    λ_g of a block is log(‖∂s/∂X‖² / ‖∂s/∂X'‖²) with X before and X' after it, for s = ⟨X_L, R⟩ with R standard normal.
    """
    with evaluation_mode(model), torch.enable_grad():
        passed = list(streams(model, x.detach().requires_grad_(), strength, skip))
        direction = torch.randn(x.shape, generator=generator).to(x.device)
        gradients = torch.autograd.grad(passed[-1], passed, direction)
    apart = [misalignment(X.detach()).log().item() for X in passed]
    sizes = [g.double().square().sum().log().item() for g in gradients]
    return Exponents(
        tuple(after - before for before, after in itertools.pairwise(apart)),
        tuple(before - after for before, after in itertools.pairwise(sizes)),
    )


# ---- closed form ----


def gaussian_mean(f: Tensor, u: Tensor) -> float:
    """E[f(z)] for standard normal z, from the values of f on an even grid u."""
    weight = torch.exp(-u.square() / 2)
    return ((f * weight).sum() / weight.sum()).item()


def gelu_moments(variance: float) -> tuple[float, float]:
    """E[φ(u)²] and variance·E[φ'(u)²] for φ = GELU and u ~ N(0, variance): covariance of the MLP at c = 1, and its slope in c."""
    grid = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    u = (math.sqrt(variance) * grid).requires_grad_()
    value = F.gelu(u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    return gaussian_mean(value.detach().square(), grid), variance * gaussian_mean(slope.square(), grid)


def closed_form(
    model: GPT, tokens: int, correlation: float, scale: float, strength: float = 1.0, skip: str = "one"
) -> Exponents:
    """The exponents of a pre-norm GPT near collapse by mean-field theory. [our derivation]

    Two covariances between tokens are followed from block to block: C of the stream (at the start scale² on the diagonal and
    scale²·correlation off it) and Γ of its gradient. k is the mean square of what a branch writes, a the skip, α the strength. While
    logits are small, attention averages over all earlier tokens: M_ij = 1/i for j ≤ i.

        attention   C' = a²C + α²k M ĉ Mᵀ             Γ = a²Γ' + (α²k/Q) MᵀΓ'M        k = (‖W_v‖_F²/d)(‖W_o‖_F²/d)
        MLP         C' = a²C + α²(k₀ - k₁(1 - ĉ))     Γ = (a² + α²k₁/Q) Γ'            k₀ = (‖W_2‖_F²/d) E[φ²],  k₁ = (‖W_2‖_F²/d) σ² E[φ'²]

    Here ĉ = C/Q, Q is the mean of C's diagonal, and σ² = ‖W_1‖_F²/d_mlp. Only Frobenius norms of the weights enter, so this holds for any
    rotation-invariant initialisation: GPT-2's normal one, and its retractions. LayerNorm removes two of d directions from a gradient.

    Raises:
        ValueError: see `require_plain`.
    """
    require_plain(model)
    d, keep_squared = model.config.n_embd, squared_skip(strength, skip)
    own = torch.eye(tokens, dtype=torch.float64)
    average = torch.ones_like(own).tril() / torch.arange(1, tokens + 1, dtype=torch.float64)[:, None]
    C = scale**2 * (correlation + (1 - correlation) * own)
    backward, apart = [], [_misalignment_of(C)]
    for block in model.transformer.h:
        value = mean_square_gain(block.attn.c_attn.weight[2 * d :], d)
        written = strength**2 * value * mean_square_gain(block.attn.c_proj.weight, d)
        Q = C.diagonal().mean()
        to_attention = written / Q * (1 - 2 / d)
        C = keep_squared * C + written * average @ (C / Q) @ average.T
        to_mlp = torch.zeros(())
        if block.mlp is not None:
            hidden = block.mlp.c_fc.weight
            k0, k1 = gelu_moments(mean_square_gain(hidden, hidden.size(0)))
            gain = strength**2 * mean_square_gain(block.mlp.c_proj.weight, d)
            Q = C.diagonal().mean()
            to_mlp = gain * k1 / Q * (1 - 2 / d)
            C = keep_squared * C + gain * (k0 - k1 * (1 - C / Q))
        backward.append((to_attention, to_mlp))
        apart.append(_misalignment_of(C))
    return Exponents(
        tuple(math.log(after / before) for before, after in itertools.pairwise(apart)),
        _gradient_exponents(backward, average, keep_squared),
    )


def require_plain(model: GPT) -> None:
    """Check that the exponents of a model are derived.

    Raises:
        ValueError: another residual rule or MLP, a switch of attention that is on, unit weights, biases, or no skips.
    """
    config = model.config
    switched = config.qk_norm or config.logit_cap or config.head_gate != "none" or config.unit_weights
    other_mlp = config.mlp not in ("gelu", "gelu_tanh", "none")
    if config.residual.rule != "pre_norm" or switched or config.bias or other_mlp or not config.skips:
        raise ValueError(
            "the closed form is derived for residual=pre_norm, attention=plain, model.mlp=gelu or none, model.bias=false, skips and "
            "weights of any length (model.unit_weights=false); measure this model instead"
        )


def mean_square_gain(W: Tensor, rows: int) -> float:
    """‖W‖_F²/rows: mean square of Wx over that of x, for an isotropic x."""
    return W.detach().double().square().sum().item() / rows


def _gradient_exponents(
    backward: Sequence[tuple[Tensor, Tensor]], average: Tensor, keep_squared: float
) -> tuple[float, ...]:
    """λ_g of every block from the gradient that its branches pass back, relative to the stream's; at the output, gradients are independent."""
    G = torch.eye(len(average), dtype=torch.float64)
    found = []
    for to_attention, to_mlp in reversed(backward):
        before = G.trace()
        G = (keep_squared + to_mlp) * G
        G = keep_squared * G + to_attention * average.T @ G @ average
        found.append(math.log(G.trace() / before))
    return tuple(reversed(found))


def _misalignment_of(C: Tensor) -> float:
    """1 - c of the second half of the tokens, from their covariance (T, T)."""
    C = C[len(C) // 2 :, len(C) // 2 :]
    n = len(C)
    q = C.trace() / n
    p = (C.sum() - C.trace()) / (n * (n - 1))
    return (1 - p / q).item()
