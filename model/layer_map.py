"""The layer map of Cowsik, Nebabu, Qi, Ganguli (arXiv 2403.02579): what a block of their model does to the angle between tokens.

Their model differs from GPT-2: attention has one head and no causal mask, the MLP has a tanh, and LN(x) = √d x/‖x‖.

    X ← a X + α_A softmax(Q Kᵀ/√d) V        Q, K, V of LN(X): QᵀK has entries of variance σ_A²/d, V those of 1/d
    X ← m X + α_M W₂ tanh(W₁ LN(X))         W₁ has entries of variance σ_w²/d, W₂ those of σ_2²/d_mlp

Without a mask all tokens are alike, so two numbers say all: the mean square q of a token's coordinates and the mean product p of those of
two tokens. The map is the mean over random weights at large width. With c = p/q, where LN makes q = 1, and φ = tanh:

    q' = a²q + α_A² (c + (1 - c) S₀)        S₀ = E Σ_j a_ij²           the chance that two draws from a row of attention meet
    p' = a²p + α_A² (c + (1 - c) S₁)        S₁ = E Σ_j a_ij a_kj       the same for two rows
    q″ = m²q' + α_M² σ_2² E[φ(u)²]          u, v ~ N(0, σ_w²) of correlation c'
    p″ = m²p' + α_M² σ_2² E[φ(u)φ(v)]

For a given X the logits of a row are Gaussian, of deviation σ_A√(1 - c) once their common part is left out, and those of two rows have
the correlation c. S₀ and S₁ follow by 1/s² = ∫ t e^(-ts) dt for the sum s of the softmax, exactly for any number of tokens. [our derivation:
the model is the paper's, but its own formulas for S₀ and S₁ were not seen]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.exponents import Exponents, mean_square_gain, require_plain, squared_skip

if TYPE_CHECKING:
    from model.gpt import GPT


def _normal(step: float) -> tuple[Tensor, Tensor]:
    """Values of a standard normal variable on an even grid, and their weights: means of smooth functions are exact to rounding."""
    z = torch.arange(-8, 8 + step, step, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2)
    return z, weight / weight.sum()


_FINE = _normal(0.1)  # for tanh, which is steep
LARGEST_DEVIATION = 12.0  # of the logits of `meeting`: beyond, its grid would be too large


def meeting(sigma: float, correlation: float, tokens: int) -> tuple[float, float, float]:
    """S₀, S₁ and S₂ of a softmax over `tokens` normal logits of deviation sigma; logits of two rows have the correlation, in [0, 1].

    S₂ = E Σ_j a_ij² (1 - 2 a_ij + Σ_k a_ik²): what a logit of the row changes in its mean, squared and summed.

    Raises:
        ValueError: sigma is above LARGEST_DEVIATION.
    """
    if sigma > LARGEST_DEVIATION:
        raise ValueError(
            f"logits of deviation {sigma:.3g} are beyond {LARGEST_DEVIATION:g}; measure this model instead"
        )
    return _meeting(round(sigma, 9), round(correlation, 12), tokens)


@lru_cache(maxsize=4096)
def _meeting(sigma: float, correlation: float, tokens: int) -> tuple[float, float, float]:
    step, n, wide, narrow = 0.5, tokens, sigma * math.sqrt(correlation), sigma * math.sqrt(1 - correlation)
    (shared, likely), (own, weight) = (_normal(min(0.4, 0.8 / max(size, 1.0))) for size in (wide, narrow))
    # log t; less than 1e-8 of each integral lies beyond these ends.
    log_t = torch.arange(-math.log(n) - 8 * sigma - 20, 8 * sigma + 5, step, dtype=torch.float64)
    size = torch.exp(log_t[:, None, None] + wide * shared[:, None] + narrow * own)  # t·e^logit, (t, shared, own)
    terms = itertools.accumulate([torch.exp(-size), size, size, size, size], torch.mul)  # size^k e^-size, k = 0 .. 4
    none, one, *more = (term @ weight for term in terms)  # means over the own part, (t, shared)
    empty, two, three, four = (mean @ likely for mean in (none, *more))  # (t,)
    rest = empty.pow(n - 1)
    both = (one * likely @ one.T) * (none * likely @ none.T).pow(n - 1)
    pairs = four * rest + (n - 1) * two.square() * empty.pow(n - 2)  # of (Σ a²)², times 6
    same, cubes, squares = (n * step * values.sum().item() for values in (two * rest, three * rest / 2, pairs / 6))
    return same, n * step**2 * both.sum().item(), same - 2 * cubes + squares


def tanh_moments(sigma: float, apart: float) -> tuple[float, float]:
    """E[tanh(u)²], and E[tanh(u)²] - E[tanh(u) tanh(v)], for u, v ~ N(0, sigma²) of the correlation 1 - apart, in [0, 1].

    The second is the variance of tanh, given the part that u and v share; so it is exact however small it is.
    """
    weight, value = _FINE[1], torch.tanh(_pair(sigma, apart))
    mean = value @ weight
    spread = (value - mean[:, None]).square() @ weight
    return ((value.square() @ weight) @ weight).item(), (spread @ weight).item()


def tanh_slope(sigma: float, apart: float) -> float:
    """sigma² E[tanh'(u) tanh'(v)] for such u and v: the derivative of E[tanh(u) tanh(v)] by the correlation."""
    weight, slope = _FINE[1], 1 - torch.tanh(_pair(sigma, apart)).square()
    return sigma**2 * ((slope @ weight).square() @ weight).item()


def _pair(sigma: float, apart: float) -> Tensor:
    """Values of u, (shared part, own part)."""
    z = _FINE[0]
    return sigma * (math.sqrt(1 - apart) * z[:, None] + math.sqrt(apart) * z)


@dataclass(frozen=True)
class LayerMap:
    """A block of the paper's model. Its methods follow q and q - p, which stays exact near collapse.

    tokens: n. sigma_a: σ_A. attention: α_A. sigma_w: σ_w. mlp: α_M σ_2. skip: a² = m² of the stream, 1 or 1 - α².
    """

    tokens: int
    sigma_a: float
    attention: float
    sigma_w: float
    mlp: float
    skip: float = 1.0

    def step(self, q: float, apart: float) -> tuple[float, float]:
        """(q, q - p) before the block → the same after it; 0 ≤ p ≤ q."""
        return self.after_mlp(*self.after_attention(q, apart))

    def after_attention(self, q: float, apart: float) -> tuple[float, float]:
        """(q, q - p) after the first branch."""
        d, strength = apart / q, self.attention**2
        same, both, _ = meeting(self.sigma_a * math.sqrt(d), 1 - d, self.tokens)
        return self.skip * q + strength * (1 - d + d * same), self.skip * apart + strength * d * (same - both)

    def after_mlp(self, q: float, apart: float) -> tuple[float, float]:
        """(q, q - p) after the second branch."""
        own, spread = tanh_moments(self.sigma_w, apart / q)
        return self.skip * q + self.mlp**2 * own, self.skip * apart + self.mlp**2 * spread

    def gradient(self, q: float, apart: float, own: float, mutual: float) -> tuple[float, float]:
        """The mean square of a token's gradient and the mean product of those of two, (own, mutual), from the output of a block whose
        input has (q, q - p) to its input. [our derivation]

            MLP            own' = (m² + k₁(1)/q') own        mutual' = (m² + k₁(c')/q') mutual       k₁: α_M²σ_2² times the slope
            attention      own = a² own' + (α_A²/q) [(S₀ + (2 - c) f S₂) own' + (n - 1) S₁ (1 + c f (1 - S₁)) mutual']

        S₂ is defined in `meeting`; f = σ_A²(1 - c). The gradient goes through values, keys (f) and queries ((1 - c) f). The factor 1 - S₁ is
        exact if rows are uniform over some of the tokens. Mutual follows from the sum over all pairs, since rows sum to 1. Near collapse,
        with independent gradients, own grows by (a² + α_A²/n)(m² + α_M² k₁).
        """
        n, d, strength = self.tokens, apart / q, self.attention**2 / q
        c = 1 - d
        after_q, after_apart = self.after_attention(q, apart)
        own *= self.skip + self.mlp**2 * tanh_slope(self.sigma_w, 0.0) / after_q
        mutual *= self.skip + self.mlp**2 * tanh_slope(self.sigma_w, after_apart / after_q) / after_q
        same, both, change = meeting(self.sigma_a * math.sqrt(d), c, n)
        f = self.sigma_a**2 * d
        mixed = (same + f * change) * own + (n - 1) * both * (1 + c * f * (1 - both)) * mutual
        off = (own + (n - 1) * mutual - mixed) / (n - 1)
        query = d * f
        return (
            self.skip * own + strength * (mixed + query * change * own),
            self.skip * mutual + strength * (off + query * both * (1 - both) * mutual),
        )


def exponents_of(maps: Sequence[LayerMap], scale: float, correlation: float) -> Exponents:
    """λ_a and λ_g of every block of a stack, for tokens of root mean square `scale` and one correlation in [0, 1) before the first block.

    λ_g is for gradients that are independent from token to token at the output, as `measured_exponents` takes them.
    """
    passed = [(scale**2, scale**2 * (1 - correlation))]
    for block in maps:
        passed.append(block.step(*passed[-1]))
    own, mutual, gradients = 1.0, 0.0, list[float]()
    for block, before in zip(reversed(maps), reversed(passed[:-1])):
        grown, mutual = block.gradient(*before, own, mutual)
        gradients.append(math.log(grown / own))
        own = grown
    logs = [math.log(apart / q) for q, apart in passed]
    return Exponents(tuple(b - a for a, b in itertools.pairwise(logs)), tuple(reversed(gradients)))


def layer_maps(model: GPT, tokens: int, strength: float = 1.0, skip: str = "one") -> list[LayerMap]:
    """The paper's blocks with the scales of a GPT's weights: a tanh instead of its non-linearity, and no mask.

    σ_A² is the mean of ‖W_qᵀW_k‖_F² over heads, times the squared scale of the logits; strengths are multiplied by `strength` as in
    `model.exponents.streams`.

    Raises:
        ValueError: see `model.exponents.require_plain`.
    """
    require_plain(model)
    d, found = model.config.n_embd, []
    for block in model.transformer.h:
        attn, mlp = block.attn, block.mlp
        q, k, v = attn.c_attn.weight.detach().double().chunk(3)
        heads = (W.unflatten(0, (attn.n_head, -1)) for W in (q, k))
        product = torch.einsum("hij,hik->hjk", *heads).square().sum((1, 2)).mean().item()
        spread, back = 1.0, 0.0  # without an MLP, nothing is written back
        if mlp is not None:
            spread = math.sqrt(mean_square_gain(mlp.c_fc.weight, mlp.c_fc.weight.size(0)))
            back = strength * math.sqrt(mean_square_gain(mlp.c_proj.weight, d))
        written = mean_square_gain(v, d) * mean_square_gain(attn.c_proj.weight, d)
        found.append(
            LayerMap(
                tokens,
                attn.scale * math.sqrt(product),
                strength * math.sqrt(written),
                spread,
                back,
                squared_skip(strength, skip),
            )
        )
    return found
