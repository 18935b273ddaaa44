"""Steps on the sphere: GeoNorm's geodesic (arXiv 2601.22095) and the family of retractions around it (arXiv 2608.02668).

A point x of a sphere and an update g, both (..., d), span a plane; every step here is a rotation of x in that plane,

    v = g - (⟨x,g⟩/‖x‖²) x,    t = ‖v‖ / ‖x‖,    x' = x cos φ(t) + v (‖x‖/‖v‖) sin φ(t),

and the steps differ only in the angle φ. The length of x is kept to rounding whatever φ is. With φ(t) = t + O(t³) all agree with the
Euler step x + v to first order. The last term is computed as v · sin φ(t)/t, which is smooth where v = 0 and where x' = -x.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .linalg import at_least_float32, cast, first_derivative_only

MAX_ANGLE = math.pi / 4
"""GeoNorm's clamp, radians."""

OFFSET_FADE = 1e-3
"""Below this angle (radians) GeoNorm's offset fades out."""

# Lengths that count as zero: of a point, which then has no tangent space, and of an update, which then has no direction.
_SMALLEST_RADIUS = 1e-6
_SMALLEST_UPDATE = 1e-12

DECAYS: dict[str, Callable[[int, int], float]] = {
    "harmonic": lambda layer, layers: 1 / (layer + 1),
    "sqrt": lambda layer, layers: 1 / math.sqrt(layer + 1),
    "linear": lambda layer, layers: (layers - layer) / layers,
    "cosine": lambda layer, layers: 0.5 * (1 + math.cos(math.pi * layer / layers)),
    "none": lambda layer, layers: 1.0,
}
"""Factor 1/D(l) of the angle in block l = 0..L-1 of L. harmonic, sqrt and linear are those of public ports of GeoNorm; cosine is ours."""


class _TangentMoments(torch.autograd.Function):
    """⟨x,x⟩, ⟨x,g⟩ and ⟨v,v⟩ over the last dimension, kept as size 1; v is formed, since ⟨g,g⟩ - ⟨x,g⟩²/⟨x,x⟩ cancels where g ∥ x.

    By hand, because all gradients are combinations of x and g: nothing else is stored, and each takes two passes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        xx = _square_length(x)
        xg = (x * g).sum(-1, keepdim=True)
        c = xg / xx.clamp_min(_SMALLEST_RADIUS**2)
        ctx.save_for_backward(x, g, c)
        return xx, xg, _square_length(torch.addcmul(g, x, c, value=-1))

    @staticmethod
    def backward(ctx, d_xx: Tensor, d_xg: Tensor, d_vv: Tensor) -> tuple[Tensor, Tensor]:
        first_derivative_only()
        x, g, c = ctx.saved_tensors
        mixed = d_xg - 2 * c * d_vv
        return (
            torch.addcmul(2 * (d_xx + c.square() * d_vv) * x, mixed, g),
            torch.addcmul(mixed * x, 2 * d_vv, g),
        )


def _square_length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()


class _ToSphere(torch.autograd.Function):
    """to_sphere, by hand: its gradient needs only what it returns, which the next layer keeps anyhow, so nothing else is stored."""

    @staticmethod
    def forward(ctx, x: Tensor, radius: float) -> Tensor:
        y = at_least_float32(x)
        length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        has_direction = length > _SMALLEST_RADIUS
        factor = torch.where(has_direction, radius / length.clamp_min(_SMALLEST_RADIUS), 1.0)
        out = cast(y * factor, x.dtype)
        ctx.save_for_backward(out, factor, torch.where(has_direction, factor / radius**2, 0.0))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        first_derivative_only()
        out, factor, inward = ctx.saved_tensors
        y, g = at_least_float32(out), at_least_float32(grad)
        along = (y * g).sum(-1, keepdim=True)
        return cast(torch.addcmul(factor * g, y, inward * along, value=-1), grad.dtype), None


def to_sphere(x: Tensor, radius: float = 1.0) -> Tensor:
    """x (..., d) scaled to the length `radius`, computed in float32 and returned in x's dtype.

    A vector shorter than 1e-6 is left as it is: zero has no direction, and a gradient multiplied by radius/‖x‖ in every layer would
    overflow.
    """
    return _ToSphere.apply(x, radius)


def rotate(x: Tensor, g: Tensor, angle: Callable[[Tensor], Tensor], radius: float | None = None) -> Tensor:
    """The point x moved on its sphere along the tangential part of g, by the angle that `angle` makes of t = ‖v‖/‖x‖.

    Args:
        x, g: (..., d), any float dtype; computed in float32 at least.
        angle: t (..., 1) ≥ 0, radians of the exponential map, → φ (..., 1), radians. φ(0) must be 0.
        radius: None keeps each point's own length, as GeoNorm does. A number also brings the result to that length, at no cost: in a
            bfloat16 stream the rounding of every cast would otherwise add up over the layers to a drift.

    Returns:
        x' (..., d) in x's dtype. Where v = 0, x, brought to the `radius` if there is one. Where ‖x‖ < 1e-6, as in padding, which has no
        direction to turn, x itself (a port of GeoNorm adds g there).
    """
    point, update = at_least_float32(x), at_least_float32(g)
    own_xx, xg, vv = _TangentMoments.apply(point, update)
    xx = own_xx.clamp_min(_SMALLEST_RADIUS**2)
    t = (vv.clamp_min(_SMALLEST_UPDATE**2) / xx).sqrt()
    phi = angle(t)
    along, across = phi.cos(), phi.sin() / t
    if radius is not None:
        scale = radius * xx.rsqrt()
        along, across = along * scale, across * scale
    has_direction = own_xx > _SMALLEST_RADIUS**2
    # x cos φ + v sin φ/t, with v written out: one pass over x and g. Triton 3.6 cannot compile `across` if it is guarded before it is used here.
    kept = torch.where(has_direction, along - across * xg / xx, 1.0)
    return cast(torch.addcmul(kept * point, torch.where(has_direction, across, 0.0), update), x.dtype)


def geonorm_angle(t: Tensor, scale: Tensor | float, offset: Tensor | float, decay: float) -> Tensor:
    """GeoNorm's angle (arXiv 2601.22095, Eq. 3-5 and appendix D, as two public ports have them).

        min((min(t, π/4) · scale + offset) · decay, π/4)

    Clamped from above only: a negative offset may turn the point back. One thing is ours: the offset fades out linearly below
    t = OFFSET_FADE. Unfaded it turns even an update of zero length, whose direction is noise or 0/0, and the gradient of that
    direction grows like offset/t; the faded angle makes a zero update the identity and bounds the gradient.

    Args:
        t: (..., 1) radians. scale, offset: learned, 0-d. decay: 1/D(l), see DECAYS.
    """
    faded = (t / OFFSET_FADE).clamp_max(1.0)
    return ((t.clamp_max(MAX_ANGLE) * scale + offset * faded) * decay).clamp_max(MAX_ANGLE)


def retraction_angle(t: Tensor, p: Tensor | float) -> Tensor:
    """The angle φ_p(t) = p · arctan(t/p) of the retraction family (arXiv 2608.02668).

    p = 1 is the metric projection (x + v)/‖x + v‖, p = 2 the Cayley transform, p = ∞ the exponential map; it saturates at p·π/2, and
    vanishes as p → 0. The source names these members and their saturation; this formula is our reading of it, the only smooth one of
    the form p·f(t/p) that has them all. All p agree to O(t²): φ = t - t³/(3p²) + ...

    Args:
        t: (..., 1) radians, already multiplied by the learned step. p: positive, a 0-d tensor or a number, math.inf included.
    """
    if not isinstance(p, Tensor) and math.isinf(p):
        return t
    return p * torch.atan(t / p)
