"""How far each sublayer turns the residual stream, under any residual rule.

The angle is that between the stream before a sublayer and after it: what the rule makes of the sublayer's output, with its norms, its decay
and its learned steps. On a sphere it is all that happens to the stream; elsewhere the stream also grows or shrinks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from model.gpt import GPT


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """The angle between vectors a and b (..., d), of any length above 0, → (...,) radians from 0 to π.

    2·atan2(‖u - v‖, ‖u + v‖) for the unit vectors u and v (Kahan, "How futile are mindless assessments of roundoff in floating-point
    computation?", 2006, section 12) is exact to rounding at any angle; the arccosine of ⟨u,v⟩ loses half of the digits near 0.
    """
    u, v = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (a, b))
    return 2 * torch.atan2(torch.linalg.vector_norm(u - v, dim=-1), torch.linalg.vector_norm(u + v, dim=-1))


def tangent_length(x: Tensor, g: Tensor) -> Tensor:
    """The length of the part of g (..., d) that is orthogonal to x (..., d), → (...,): the part that turns x."""
    u = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(g - (u * g).sum(-1, keepdim=True) * u, dim=-1)


class Turns:
    """Hooks on all sublayers of a model, and what they measure in its next forward pass.

    hooks: their handles, which the caller removes. Nothing waits for the device until `record`.
    """

    def __init__(self, model: GPT) -> None:
        self._expected = model.config.stream.radius
        self._names = ("attn", "mlp")[: len(model.transformer.h[0].joined())]
        self._steps: list[Tensor] = []  # of each sublayer: turn, tangential output, size of the stream after it
        self._first, self._last, self._output = (torch.empty(0) for _ in range(3))
        self.hooks: list[RemovableHandle] = []
        for block in model.transformer.h:
            for joint, sublayer in block.joined():
                self.hooks.append(sublayer.register_forward_hook(self._keep_output))
                self.hooks.append(joint.register_forward_hook(self._measure))

    def _keep_output(self, sublayer: nn.Module, args: Any, output: Tensor) -> None:
        self._output = output.double()

    def _measure(self, joint: nn.Module, args: tuple[Tensor, nn.Module], output: Tensor) -> None:
        x, y = args[0].double(), output.double()
        self._first = self._first if self._steps else x
        self._last = y
        turn, tangential = angle_between(x, y), tangent_length(x, self._output) / self._expected
        self._steps.append(torch.stack([turn.mean(), tangential.mean(), _size(y)]))

    def record(self) -> dict[str, Any]:
        """What was measured, all means over tokens, for L blocks with 2 sublayers (or 1, if model.mlp=none); floats and lists of floats.

        turn_attn, turn_mlp: (L,) the angle, in radians, by which each sublayer turned the stream. path: the sum of all. net: the angle
        between the stream before the first block and after the last one.
        step_attn, step_mlp: (L,) the turn over t, where t is the length of the tangential part of the sublayer's output over the length
        that sublayers expect of the stream (`Stream.radius`). Under GeoNorm with embedding=normalize this is scale/D(l), as long as the
        angle is not clamped and the offset is 0; with embedding=none it is that times the expected length over the token's own, about 35
        for GPT-2's embedding. Under pre-norm it falls as the stream grows. NaN where the outputs are 0.
        size: (2L + 1,) root mean square of the stream, before the first block and after each sublayer.
        """
        path = torch.stack(self._steps)  # (2L, 3)
        ends = torch.stack([angle_between(self._first, self._last).mean(), _size(self._first)])
        (net, size), rows = ends.tolist(), torch.cat([path, (path[:, 0] / path[:, 1])[:, None]], 1).T.tolist()
        turn, _, sizes, step = rows
        count = len(self._names)
        return {
            **{f"turn_{name}": turn[i::count] for i, name in enumerate(self._names)},
            **{f"step_{name}": step[i::count] for i, name in enumerate(self._names)},
            "size": [size, *sizes],
            "path": sum(turn),
            "net": net,
        }


def _size(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt().mean()
