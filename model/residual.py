"""How a sublayer's output joins the residual stream: one small class a rule, chosen by `residual=`.

A rule makes modules: what brings the embedding into the stream (`entry`), what joins a sublayer to it (`join`, called with the stream
and the sublayer), and what stands before the head (`exit`); and it initialises the sublayers. It knows nothing else of a sublayer,
which is any map (B, T, d) → (B, T, d). The joints of a block are named `ln_1` and `ln_2`, so that pre-norm keeps nanoGPT's parameter names.

The fields of a rule are its settings (configs/residual). Rules differ in where the stream is normed, not by which norm: the norms of
the flat rules are all GPT-2's LayerNorm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.scale import StoredScale
from optim.geonorm import DECAYS, cast, geonorm_angle, retraction_angle, rotate, to_sphere

Positive = Annotated[float, ("above", 0)]
Decay = Annotated[str, ("options", tuple(DECAYS))]


class Sublayer(Protocol):
    """What a rule may know of attention and MLP."""

    c_proj: nn.Linear  # the matrix that writes into the stream

    def __call__(self, x: Tensor) -> Tensor: ...

    def matrices(self) -> list[tuple[Tensor, bool]]:
        """Its matrices as papers count them (views of its weights), and whether the output is multiplied by each."""


@dataclass(frozen=True)
class Stream:
    """The stream a rule works on: its width d, the number of blocks, whether norms have a bias, and the length (radius) of the
    vectors for which the sublayers are scaled: √d as after a LayerNorm, or 1 for weights made of unit vectors."""

    width: int
    layers: int
    bias: bool
    radius: float


# ---- flat rules ----


@dataclass(frozen=True)
class ResidualRule:
    """What a rule does where it does not say otherwise: nothing to the embedding, a final LayerNorm, GPT-2's initialisation.

    rule: its name in RESIDUAL_RULES.
    """

    rule: str

    def entry(self, stream: Stream) -> nn.Module:
        """What brings the embedding (B, T, d) into the stream."""
        return nn.Identity()

    def join(self, stream: Stream, layer: int) -> nn.Module:
        """A module (x, sublayer) → x for either sublayer of block `layer`, counted from 0."""
        raise NotImplementedError

    def exit(self, stream: Stream) -> nn.Module:
        """What stands between the stream and the head."""
        return nn.LayerNorm(stream.width, bias=stream.bias)

    @torch.no_grad()
    def init(self, sublayer: Sublayer, stream: Stream) -> None:
        """Initialise a sublayer whose matrices are N(0, 0.02): the one that writes into the stream at 0.02/√(2L) (GPT-2)."""
        nn.init.normal_(sublayer.c_proj.weight, std=0.02 / math.sqrt(2 * stream.layers))


@dataclass(frozen=True)
class PreNorm(ResidualRule):
    """x + f(LayerNorm(x)): GPT-2's rule."""

    def join(self, stream: Stream, layer: int) -> nn.Module:
        return PreNormJoint(stream.width, bias=stream.bias)


class PreNormJoint(nn.LayerNorm):
    """x + f(LayerNorm(x))."""

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:  # type: ignore[override]  # a norm that is given the sublayer too
        return x + sublayer(super().forward(x))


class PostNormJoint(nn.LayerNorm):
    """LayerNorm(gain · x + f(x))."""

    def __init__(self, stream: Stream, gain: float) -> None:
        super().__init__(stream.width, bias=stream.bias)
        self.gain = gain

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:  # type: ignore[override]  # as above
        return super().forward(torch.add(sublayer(x), x, alpha=self.gain))


@dataclass(frozen=True)
class PostNorm(ResidualRule):
    """LayerNorm(x + f(x)): the first Transformer (arXiv 1706.03762) and GPT-1. The last norm of the last block is the final norm."""

    def join(self, stream: Stream, layer: int) -> nn.Module:
        return PostNormJoint(stream, 1.0)

    def exit(self, stream: Stream) -> nn.Module:
        return nn.Identity()


@dataclass(frozen=True)
class DeepNorm(PostNorm):
    """LayerNorm(α x + f(x)) with α = (2L)^¼ (DeepNet, arXiv 2203.00555, decoder-only), and its initialisation: Xavier's, times
    β = (8L)^-¼ for every matrix that the output is multiplied by (all but queries and keys)."""

    def join(self, stream: Stream, layer: int) -> nn.Module:
        return PostNormJoint(stream, (2 * stream.layers) ** 0.25)

    @torch.no_grad()
    def init(self, sublayer: Sublayer, stream: Stream) -> None:
        for W, multiplies in sublayer.matrices():
            nn.init.xavier_normal_(W, gain=(8 * stream.layers) ** -0.25 if multiplies else 1.0)


class TwoNormJoint(nn.Module):
    """x + gain · LayerNorm(f(LayerNorm(x)))."""

    def __init__(self, stream: Stream, gain: float) -> None:
        super().__init__()
        self.before = nn.LayerNorm(stream.width, bias=stream.bias)
        self.after = nn.LayerNorm(stream.width, bias=stream.bias)
        self.gain = gain

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return torch.add(x, self.after(sublayer(self.before(x))), alpha=self.gain)


@dataclass(frozen=True)
class SandwichNorm(ResidualRule):
    """x + gain · LayerNorm(f(LayerNorm(x))) (CogView, arXiv 2105.13290).

    depth_gain: "none" (gain 1, as published) or "sqrt" (1/√(l+1), as a public port of GeoNorm's baselines has it).
    """

    depth_gain: Literal["none", "sqrt"]

    def join(self, stream: Stream, layer: int) -> nn.Module:
        return TwoNormJoint(stream, DECAYS[self.depth_gain](layer, stream.layers))


@dataclass(frozen=True)
class PeriNorm(ResidualRule):
    """x + LayerNorm(f(LayerNorm(x))), and the embedding is normed too (Peri-LN, arXiv 2502.02732)."""

    def entry(self, stream: Stream) -> nn.Module:
        return nn.LayerNorm(stream.width, bias=stream.bias)

    def join(self, stream: Stream, layer: int) -> nn.Module:
        return TwoNormJoint(stream, 1.0)


# ---- rules on the sphere ----


class ToSphere(nn.Module):
    """Every vector of (B, T, d) scaled to the radius; nothing is learned, for a gain would leave the sphere."""

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.radius = radius

    def forward(self, x: Tensor) -> Tensor:
        return to_sphere(x, self.radius)


class GainNorm(nn.Module):
    """x scaled to the length `radius` and multiplied by a learned gain (d,): on a sphere of that radius, only the gain."""

    def __init__(self, width: int, radius: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.radius = radius

    def forward(self, x: Tensor) -> Tensor:
        return to_sphere(x, self.radius) * self.weight


class GeodesicAngle(nn.Module):
    """GeoNorm's angle with its learned scale (1 at the start) and offset (0): one pair a sublayer."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.offset = nn.Parameter(torch.zeros(()))
        self.decay = decay

    def forward(self, t: Tensor) -> Tensor:
        return geonorm_angle(t, self.scale, self.offset, self.decay)


class RetractionAngle(nn.Module):
    """φ_p(α t · decay) with a learned step α = softplus(raw_alpha) > 0, and p fixed or learned as softplus(raw_p)."""

    def __init__(self, alpha: float, p: float, learn_p: bool, decay: float) -> None:
        super().__init__()
        self.raw_alpha = nn.Parameter(torch.tensor(_softplus_inverse(alpha)))
        self.raw_p = nn.Parameter(torch.tensor(_softplus_inverse(p))) if learn_p else None
        self.p, self.decay = p, decay

    def forward(self, t: Tensor) -> Tensor:
        p = self.p if self.raw_p is None else F.softplus(self.raw_p)
        return retraction_angle(t * (F.softplus(self.raw_alpha) * self.decay), p)


def _softplus_inverse(y: float) -> float:
    return y + math.log(-math.expm1(-y))


class SphereJoint(nn.Module):
    """x rotated along the tangential part of f(x), by the angle that `angle` makes of the update's length."""

    def __init__(self, norm: nn.Module, angle: Callable[[Tensor], Tensor], radius: float | None) -> None:
        super().__init__()
        self.norm, self.angle, self.radius = norm, angle, radius

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return rotate(x, sublayer(self.norm(x)), self.angle, self.radius)


@dataclass(frozen=True)
class _OnSphere(ResidualRule):
    """What the rules on the sphere have in common. The sources leave these open, or disagree; the defaults are those that need
    nothing besides the geometry.

    embedding: "normalize" scales it to the radius, at every position alike. "none" takes it as it is, and every token keeps the length
        it came with; GPT-2's embeddings are so short (0.02 √d) that the first steps then run into GeoNorm's clamp. Default: normalize.
    radius: "auto" is what the sublayers are scaled for (√d for GPT-2's weights, 1 for nGPT's), "sqrt_d" or "unit". Default: auto.
    input_norm: "none", or "rms": a norm with a gain before each sublayer, which on a sphere only adds the gain. Default: none, as one
        of GeoNorm's ports, a trained language model, has it; the other keeps the norms.
    final_norm: "none", or "rms": the same before the head. Default: none, for the same reason.
    """

    embedding: Literal["normalize", "none"]
    radius: Literal["auto", "sqrt_d", "unit"]
    input_norm: Literal["none", "rms"]
    final_norm: Literal["none", "rms"]

    def radius_of(self, stream: Stream) -> float:
        """The radius in numbers."""
        return {"auto": stream.radius, "sqrt_d": math.sqrt(stream.width), "unit": 1.0}[self.radius]

    def entry(self, stream: Stream) -> nn.Module:
        return ToSphere(self.radius_of(stream)) if self.embedding == "normalize" else nn.Identity()

    def exit(self, stream: Stream) -> nn.Module:
        return GainNorm(stream.width, stream.radius) if self.final_norm == "rms" else nn.Identity()

    def join(self, stream: Stream, layer: int) -> nn.Module:
        norm = GainNorm(stream.width, stream.radius) if self.input_norm == "rms" else nn.Identity()
        known_radius = self.radius_of(stream) if self.embedding == "normalize" else None
        return SphereJoint(norm, self.angle(layer, stream.layers), known_radius)

    def angle(self, layer: int, layers: int) -> nn.Module:
        """The module that makes an angle of an update's length, for either sublayer of a block."""
        raise NotImplementedError


@dataclass(frozen=True)
class GeoNorm(_OnSphere):
    """A geodesic step (arXiv 2601.22095): see optim.geonorm.geonorm_angle. Both sublayers of a block share its decay.

    decay: how the angle shrinks with depth: a name of optim.geonorm.DECAYS. Default: harmonic, as in both ports.
    """

    decay: Decay

    def angle(self, layer: int, layers: int) -> nn.Module:
        return GeodesicAngle(DECAYS[self.decay](layer, layers))


@dataclass(frozen=True)
class ProjSphere(_OnSphere):
    """The metric projection (x + αv)/‖x + αv‖ · ‖x‖ with a learned step α a sublayer (Proj-SpheretNorm, arXiv 2608.02668).

    alpha: the step at the start. The source gives none; 1 is the Euler step of pre-norm, to first order. Under AdamW 0.1 did better
        (results/residual_alpha).
    decay: how the step shrinks with depth: a name of DECAYS. Default: none, since the step is learned for each sublayer.
    """

    alpha: Positive
    decay: Decay

    def angle(self, layer: int, layers: int) -> nn.Module:
        return RetractionAngle(self.alpha, 1.0, False, DECAYS[self.decay](layer, layers))


@dataclass(frozen=True)
class CayleySphere(ProjSphere):
    """The Cayley transform (Cay-SpheretNorm, same source), p = 2 of the family; settings as ProjSphere's."""

    def angle(self, layer: int, layers: int) -> nn.Module:
        return RetractionAngle(self.alpha, 2.0, False, DECAYS[self.decay](layer, layers))


@dataclass(frozen=True)
class PSphere(ProjSphere):
    """Any member of the family (p-SpheretNorm, same source): see optim.geonorm.retraction_angle.

    p: 1 is ProjSphere, 2 CayleySphere. learn_p: whether it is learned, one a sublayer, from there on. The source finds the best loss
        at a finite p without saying which, or whether it is learned; ours starts at 2 and is learned.
    """

    p: Positive
    learn_p: bool

    def angle(self, layer: int, layers: int) -> nn.Module:
        return RetractionAngle(self.alpha, self.p, self.learn_p, DECAYS[self.decay](layer, layers))


class LerpJoint(nn.Module):
    """Norm(x + |α| (Norm(f(x)) - x)) with a learned α (d,), on the sphere of the given radius."""

    def __init__(self, norm: nn.Module, width: int, alpha: float, stored: float, radius: float) -> None:
        super().__init__()
        self.norm, self.radius = norm, radius
        self.alpha = StoredScale(width, alpha, stored)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        # nGPT norms x once more; it is normed already, by the joint before or the entry.
        target = to_sphere(cast(sublayer(self.norm(x)), x.dtype), self.radius)
        return to_sphere(torch.lerp(x, target, cast(self.alpha().abs(), x.dtype)), self.radius)


@dataclass(frozen=True)
class NGPT(_OnSphere):
    """nGPT's rule (arXiv 2410.01131): a step of a learned length per channel toward the normed output, and back onto the sphere.

    alpha: the step at the start. storage: the stored parameter's value at the start; null for 1/√d.
    """

    alpha: Positive
    storage: Annotated[float | None, ("above", 0), ("null", "means 1/√n_embd")]

    def join(self, stream: Stream, layer: int) -> nn.Module:
        norm = GainNorm(stream.width, stream.radius) if self.input_norm == "rms" else nn.Identity()
        stored = self.storage or stream.width**-0.5
        return LerpJoint(norm, stream.width, self.alpha, stored, self.radius_of(stream))


RESIDUAL_RULES: dict[str, type[ResidualRule]] = {
    "pre_norm": PreNorm,
    "post_norm": PostNorm,
    "deep_norm": DeepNorm,
    "sandwich_norm": SandwichNorm,
    "peri_norm": PeriNorm,
    "geonorm": GeoNorm,
    "proj_sphere": ProjSphere,
    "cayley_sphere": CayleySphere,
    "p_sphere": PSphere,
    "ngpt": NGPT,
}
"""Residual rules by the name that `residual=` gives; their settings stand in configs/residual."""


def residual_rule(settings: Mapping[str, Any]) -> ResidualRule:
    """The rule of plain settings without problems: `rule`, a name of RESIDUAL_RULES, and the rule's fields."""
    return RESIDUAL_RULES[settings["rule"]](**settings)
