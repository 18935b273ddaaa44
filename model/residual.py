"""Residual rules: how the output of a sublayer is added to the residual stream. One class for each rule, chosen by `residual=`.

A rule makes three kinds of modules: `entry`, between the embedding and the stream; `join`, which adds a sublayer's output and is called
with the stream and the sublayer; `exit`, between the stream and the head. It also initialises the sublayers. A sublayer is any map
(B, T, d) → (B, T, d). The joints of a block are called `ln_1` and `ln_2`, so that pre-norm has nanoGPT's parameter names.

The fields of a rule are its settings (configs/residual). The norms of the flat rules are GPT-2's LayerNorm, but for PreRMSNorm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.scale import Scaled, StoredScale
from optim.geonorm import DECAYS, geonorm_angle, retraction_angle, rotate, to_sphere
from optim.linalg import cast

Positive = Annotated[float, ("above", 0)]
Decay = Annotated[str, ("options", tuple(DECAYS))]


class Sublayer(Protocol):
    """What a rule may use of attention and MLP."""

    c_proj: nn.Linear  # writes into the stream

    def __call__(self, x: Tensor) -> Tensor: ...

    def matrices(self) -> list[tuple[Tensor, bool]]:
        """Its separate matrices (views of its weights), and for each whether the output is multiplied by it."""


@dataclass(frozen=True)
class Stream:
    """The stream of a rule: its width d, the number of blocks, whether norms have a bias, and the length (radius) of the vectors that the
    sublayers expect: √d, as after a LayerNorm, or 1 for unit weights. skips: whether x itself is kept beside what a sublayer writes."""

    width: int
    layers: int
    bias: bool
    radius: float
    skips: bool


# ---- flat rules ----


@dataclass(frozen=True)
class ResidualRule:
    """The base of all rules: the embedding is not changed, a final LayerNorm, GPT-2's initialisation.

    rule: its name in RESIDUAL_RULES.
    needs_skips: why the rule has no form without skips (model.skips=false), as "which ..."; empty if its joints know that form.
    writes_zero: whether `init` makes every c_proj zero.
    """

    needs_skips: ClassVar[str] = "has no form without skips"
    writes_zero: ClassVar[bool] = False

    rule: str

    def entry(self, stream: Stream) -> nn.Module:
        """The module between the embedding (B, T, d) and the stream."""
        return nn.Identity()

    def join(self, stream: Stream, layer: int) -> nn.Module:
        """A module (x, sublayer) → x for each sublayer of block `layer`, counted from 0."""
        raise NotImplementedError

    def exit(self, stream: Stream) -> nn.Module:
        """The module between the stream and the head."""
        return nn.LayerNorm(stream.width, bias=stream.bias)

    @torch.no_grad()
    def init(self, sublayer: Sublayer, stream: Stream) -> None:
        """Initialise a sublayer whose matrices have the standard deviation 0.02 already: its c_proj gets 0.02/√(2L) (GPT-2)."""
        nn.init.normal_(sublayer.c_proj.weight, std=0.02 / math.sqrt(2 * stream.layers))


@dataclass(frozen=True)
class PreNorm(ResidualRule):
    """x + f(LayerNorm(x)): GPT-2's rule."""

    needs_skips = ""

    def join(self, stream: Stream, layer: int) -> nn.Module:
        return PreNormJoint(stream)


class PreNormJoint(nn.LayerNorm):
    """x + f(LayerNorm(x)); without skips, f(LayerNorm(x))."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream.width, bias=stream.bias)
        self.skips = stream.skips

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:  # type: ignore[override]  # a norm that is given the sublayer too
        written = sublayer(super().forward(x))
        return x + written if self.skips else written


@dataclass(frozen=True)
class PreRMSNorm(ResidualRule):
    """x + f(RMSNorm(x)), with an RMSNorm of the embedding too and c_proj zero at the start: the rule of the public speedruns
    (github.com/KellerJordan/modded-nanogpt, records/track_3_optimization)."""

    needs_skips = "starts with sublayers that write zero"
    writes_zero = True

    def entry(self, stream: Stream) -> nn.Module:
        return nn.RMSNorm(stream.width)

    def join(self, stream: Stream, layer: int) -> nn.Module:
        return PreRMSNormJoint(stream.width)

    def exit(self, stream: Stream) -> nn.Module:
        return nn.RMSNorm(stream.width)

    @torch.no_grad()
    def init(self, sublayer: Sublayer, stream: Stream) -> None:
        nn.init.zeros_(sublayer.c_proj.weight)


class PreRMSNormJoint(nn.RMSNorm):
    """x + f(RMSNorm(x))."""

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:  # type: ignore[override]  # as above
        return x + sublayer(super().forward(x))


class PostNormJoint(nn.LayerNorm):
    """LayerNorm(gain · x + f(x)); without skips, LayerNorm(f(x))."""

    def __init__(self, stream: Stream, gain: float) -> None:
        super().__init__(stream.width, bias=stream.bias)
        self.gain, self.skips = gain, stream.skips

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:  # type: ignore[override]  # as above
        written = sublayer(x)
        return super().forward(torch.add(written, x, alpha=self.gain) if self.skips else written)


@dataclass(frozen=True)
class PostNorm(ResidualRule):
    """LayerNorm(x + f(x)): the first Transformer (arXiv 1706.03762) and GPT-1. The last norm of the last block is the final norm."""

    needs_skips = ""

    def join(self, stream: Stream, layer: int) -> nn.Module:
        return PostNormJoint(stream, 1.0)

    def exit(self, stream: Stream) -> nn.Module:
        return nn.Identity()


@dataclass(frozen=True)
class DeepNorm(PostNorm):
    """LayerNorm(α x + f(x)) with α = (2L)^¼ (DeepNet, arXiv 2203.00555, decoder-only), and its initialisation: Xavier's, times
    β = (8L)^-¼ for every matrix by which the output is multiplied (all but queries and keys)."""

    def join(self, stream: Stream, layer: int) -> nn.Module:
        return PostNormJoint(stream, (2 * stream.layers) ** 0.25)

    @torch.no_grad()
    def init(self, sublayer: Sublayer, stream: Stream) -> None:
        for W, multiplies in sublayer.matrices():
            nn.init.xavier_normal_(W, gain=(8 * stream.layers) ** -0.25 if multiplies else 1.0)


class TwoNormJoint(nn.Module):
    """x + gain · LayerNorm(f(LayerNorm(x))); without skips, the second term alone."""

    def __init__(self, stream: Stream, gain: float) -> None:
        super().__init__()
        self.before = nn.LayerNorm(stream.width, bias=stream.bias)
        self.after = nn.LayerNorm(stream.width, bias=stream.bias)
        self.gain, self.skips = gain, stream.skips

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        written = self.after(sublayer(self.before(x)))
        return torch.add(x, written, alpha=self.gain) if self.skips else self.gain * written


@dataclass(frozen=True)
class SandwichNorm(ResidualRule):
    """x + gain · LayerNorm(f(LayerNorm(x))) (CogView, arXiv 2105.13290).

    depth_gain: "none" (gain 1, as published) or "sqrt" (1/√(l+1), as in a public port of GeoNorm's baselines).
    """

    needs_skips = ""

    depth_gain: Literal["none", "sqrt"]

    def join(self, stream: Stream, layer: int) -> nn.Module:
        return TwoNormJoint(stream, DECAYS[self.depth_gain](layer, stream.layers))


@dataclass(frozen=True)
class PeriNorm(ResidualRule):
    """x + LayerNorm(f(LayerNorm(x))), with a LayerNorm of the embedding too (Peri-LN, arXiv 2502.02732)."""

    needs_skips = ""

    def entry(self, stream: Stream) -> nn.Module:
        return nn.LayerNorm(stream.width, bias=stream.bias)

    def join(self, stream: Stream, layer: int) -> nn.Module:
        return TwoNormJoint(stream, 1.0)


# ---- rules on the sphere ----


class ToSphere(nn.Module):
    """Every vector of (B, T, d) scaled to the radius. There is no learned gain, which would leave the sphere."""

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.radius = radius

    def forward(self, x: Tensor) -> Tensor:
        return to_sphere(x, self.radius)


class GainNorm(nn.Module):
    """x scaled to the length `radius` and multiplied by a learned gain (d,). On a sphere of that radius, only the gain acts."""

    def __init__(self, width: int, radius: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.radius = radius

    def forward(self, x: Tensor) -> Tensor:
        return to_sphere(x, self.radius) * self.weight


class GeodesicAngle(Scaled):
    """GeoNorm's angle with a learned scale (1 at the start) and offset (0) for each sublayer."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.offset = nn.Parameter(torch.zeros(()))
        self.decay = decay

    def forward(self, t: Tensor) -> Tensor:
        return geonorm_angle(t, self.scale, self.offset, self.decay)

    def scales(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "offset": self.offset}


class RetractionAngle(Scaled):
    """φ_p(α t · decay) with a learned step α = softplus(raw_alpha) > 0, and p fixed or learned as softplus(raw_p)."""

    def __init__(self, alpha: float, p: float, learn_p: bool, decay: float) -> None:
        super().__init__()
        self.raw_alpha = nn.Parameter(torch.tensor(_softplus_inverse(alpha)))
        self.raw_p = nn.Parameter(torch.tensor(_softplus_inverse(p))) if learn_p else None
        self.p, self.decay = p, decay

    def forward(self, t: Tensor) -> Tensor:
        p = self.p if self.raw_p is None else F.softplus(self.raw_p)
        return retraction_angle(t * (F.softplus(self.raw_alpha) * self.decay), p)

    def scales(self) -> dict[str, Tensor]:
        """α before the decay, and p if it is learned."""
        learned = {} if self.raw_p is None else {"p": F.softplus(self.raw_p)}
        return {"alpha": F.softplus(self.raw_alpha), **learned}


def _softplus_inverse(y: float) -> float:
    return y + math.log(-math.expm1(-y))


class SphereJoint(nn.Module):
    """x rotated in the direction of the tangential part of f(x); `angle` computes the angle from the length of that part."""

    def __init__(self, norm: nn.Module, angle: Callable[[Tensor], Tensor], radius: float | None) -> None:
        super().__init__()
        self.norm, self.angle, self.radius = norm, angle, radius

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return rotate(x, sublayer(self.norm(x)), self.angle, self.radius)


@dataclass(frozen=True)
class _OnSphere(ResidualRule):
    """The settings of all rules on the sphere. The sources do not state them, or disagree; configs/residual/_sphere.yaml says why it has which.

    embedding: "normalize" scales the embedding of every token to the radius. "none" leaves it unchanged, and every token keeps its
        length; GPT-2's embeddings are so short (0.02 √d) that the first steps then reach GeoNorm's clamp.
    radius: "auto" is the length that the sublayers expect (√d for GPT-2's weights, 1 for nGPT's); or "sqrt_d", "unit".
    input_norm: "none", or "rms": a norm with a gain before each sublayer; at the radius "auto" only the gain acts.
    final_norm: "none", or "rms": the same before the head.
    The two ports by name: `residual=geonorm_no_norms` and `residual=geonorm_with_norms`.
    """

    needs_skips = "turns the stream towards what a sublayer writes"

    embedding: Literal["normalize", "none"]
    radius: Literal["auto", "sqrt_d", "unit"]
    input_norm: Literal["none", "rms"]
    final_norm: Literal["none", "rms"]

    def radius_of(self, stream: Stream) -> float:
        """The radius as a number."""
        return {"auto": stream.radius, "sqrt_d": math.sqrt(stream.width), "unit": 1.0}[self.radius]

    def entry(self, stream: Stream) -> nn.Module:
        return ToSphere(self.radius_of(stream)) if self.embedding == "normalize" else nn.Identity()

    @staticmethod
    def norm(kind: Literal["none", "rms"], stream: Stream) -> nn.Module:
        """A norm with a gain, or none."""
        return GainNorm(stream.width, stream.radius) if kind == "rms" else nn.Identity()

    def exit(self, stream: Stream) -> nn.Module:
        return self.norm(self.final_norm, stream)

    def join(self, stream: Stream, layer: int) -> nn.Module:
        known_radius = self.radius_of(stream) if self.embedding == "normalize" else None
        return SphereJoint(self.norm(self.input_norm, stream), self.angle(layer, stream.layers), known_radius)

    def angle(self, layer: int, layers: int) -> nn.Module:
        """The module that computes an angle from the length of an update, for each sublayer of block `layer`."""
        raise NotImplementedError


@dataclass(frozen=True)
class GeoNorm(_OnSphere):
    """A geodesic step (arXiv 2601.22095): see optim.geonorm.geonorm_angle. Both sublayers of a block have the same decay.

    decay: how the angle decreases with depth: a name of optim.geonorm.DECAYS.
    """

    decay: Decay

    def angle(self, layer: int, layers: int) -> nn.Module:
        return GeodesicAngle(DECAYS[self.decay](layer, layers))


@dataclass(frozen=True)
class ProjSphere(_OnSphere):
    """The metric projection (x + αv)/‖x + αv‖ · ‖x‖ with a learned step α for each sublayer (Proj-SpheretNorm, arXiv 2608.02668).

    alpha: the step at the start. The source does not state it; 1 is the Euler step x + v to first order. With AdamW, 0.1 gave a lower loss
        (results/residual_alpha).
    decay: how the step decreases with depth: a name of DECAYS.
    """

    alpha: Positive
    decay: Decay

    def angle(self, layer: int, layers: int) -> nn.Module:
        return RetractionAngle(self.alpha, 1.0, False, DECAYS[self.decay](layer, layers))


@dataclass(frozen=True)
class CayleySphere(ProjSphere):
    """The Cayley transform (Cay-SpheretNorm, same source), p = 2 of the family; the settings are those of ProjSphere."""

    def angle(self, layer: int, layers: int) -> nn.Module:
        return RetractionAngle(self.alpha, 2.0, False, DECAYS[self.decay](layer, layers))


@dataclass(frozen=True)
class PSphere(ProjSphere):
    """Any member of the family (p-SpheretNorm, same source): see optim.geonorm.retraction_angle.

    p: 1 is ProjSphere, 2 is CayleySphere. learn_p: whether p is the start of a learned value for each sublayer. The source reports the
        best loss at a finite p, but not which, and not whether it is learned; ours starts at 2 and is learned.
    """

    p: Positive
    learn_p: bool

    def angle(self, layer: int, layers: int) -> nn.Module:
        return RetractionAngle(self.alpha, self.p, self.learn_p, DECAYS[self.decay](layer, layers))


class LerpJoint(Scaled):
    """Norm(x + |α| (Norm(f(x)) - x)) with a learned α (d,), on the sphere of the given radius."""

    def __init__(self, norm: nn.Module, width: int, alpha: float, stored: float, radius: float) -> None:
        super().__init__()
        self.norm, self.radius = norm, radius
        self.alpha = StoredScale(width, alpha, stored)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        # nGPT normalises x here too, but the previous joint or the entry has already done so: a config whose entry does not is refused.
        target = to_sphere(cast(sublayer(self.norm(x)), x.dtype), self.radius)
        return to_sphere(torch.lerp(x, target, cast(self.alpha().abs(), x.dtype)), self.radius)

    def scales(self) -> dict[str, Tensor]:
        return {"alpha": self.alpha().abs()}


@dataclass(frozen=True)
class NGPT(_OnSphere):
    """nGPT's rule (arXiv 2410.01131): a step with a learned length for each channel towards the normalised output, then back onto the sphere.

    alpha: the step at the start. storage: the stored parameter's value at the start; null for 1/√d.
    """

    alpha: Positive
    storage: Annotated[float | None, ("above", 0), ("null", "means 1/√n_embd")]

    def join(self, stream: Stream, layer: int) -> nn.Module:
        norm, stored = self.norm(self.input_norm, stream), self.storage or stream.width**-0.5
        return LerpJoint(norm, stream.width, self.alpha, stored, self.radius_of(stream))


RESIDUAL_RULES: dict[str, type[ResidualRule]] = {
    "pre_norm": PreNorm,
    "pre_rms_norm": PreRMSNorm,
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
"""Residual rules by the name that `residual=` gives; their defaults are in configs/residual."""


def residual_rule(settings: Mapping[str, Any]) -> ResidualRule:
    """The rule of valid plain settings: `rule`, a name of RESIDUAL_RULES, and the fields of that rule."""
    return RESIDUAL_RULES[settings["rule"]](**settings)
