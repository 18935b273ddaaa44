"""What ManifoldMuon gives a step rule and gets back, and the stacks of equally shaped matrices that it is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .manifolds import tall
from .refine import Refine

ONE_ROUND, TWO_ROUNDS, EXACTLY = 0, 1, 2
"""Levels, in the state of every matrix: its next step is made with one round of the retraction, with two, or in float32 with the exact
retraction. A step rule sets them."""


class Stack(NamedTuple):
    """What a step rule is given: equally shaped matrices of one parameter group.

    W, G: (k, m, n) tall, float32: the weights and their (Nesterov) momentum. manifold: a name of MANIFOLDS.
    eta: 0-d float32 on W's device, the step (the learning rate). weight_decay: decoupled, per unit of eta.
    skip: 0-d or (k,) bool on W's device; where true, nothing moves.
    level: (k,) float32, how each matrix is to be stepped: ONE_ROUND, TWO_ROUNDS or EXACTLY; highest: the largest, on the host.
    whole: (m, n), tall, of the parameter before its cut into blocks, given only with block_length="whole": the blocks together then move as
    far, in root mean square, as the uncut parameter would. None: the step of every block has the full length.
    refine: what is done to the directions before they are taken.
    """

    W: Tensor
    G: Tensor
    manifold: str
    eta: Tensor
    weight_decay: float
    skip: Tensor
    level: Tensor
    highest: int
    whole: tuple[int, int] | None = None
    refine: Refine | None = None


class Moved(NamedTuple):
    """What a step rule returns of a stack.

    W: new weights (k, m, n). T, scale: the direction that was taken is scale·T, T (k, m, n) of any float dtype and scale (k, 1, 1), 0 where
    none was. level: (k,) float32, of the next step of each matrix. fallback: (k,) bool, whether this step was made
    exactly, or failed: its direction was lost in rounding, or its trial point did not land. row_squares: the new mean squares of rows, where
    the stack's `refine` keeps them.
    """

    W: Tensor
    T: Tensor
    scale: Tensor
    level: Tensor
    fallback: Tensor
    row_squares: Tensor | None = None

    @property
    def direction(self) -> Tensor:
        """scale·T (k, m, n), 0 where the scale is, whatever T is."""
        return torch.where(self.scale > 0, self.scale * self.T, 0)


class StepRule(Protocol):
    """What ManifoldMuon needs of a rule; hashable, so that the operations of a step are counted once."""

    def __hash__(self) -> int: ...

    def describe(self, device: torch.device) -> str:
        """What a person should know of the rule on this device, in one line."""

    def init(self, W: Tensor, manifold: str) -> Tensor:
        """W (..., m, n), any orientation, brought onto the manifold."""

    def __call__(self, stack: Stack) -> Moved:
        """The step of a stack."""


class OnHost:
    """A small whole number of the device (0-d) on its way to the host.

    `read` waits for the copy. It is called one step later, when the copy is long done: the host does not stall, and the value does not
    depend on timing.
    """

    def __init__(self, number: Tensor) -> None:
        self.number, self.event = number, None
        if number.is_cuda:
            self.number = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> int:
        """The number."""
        if self.event is not None:
            self.event.synchronize()
        return int(self.number)


@dataclass
class Bucket:
    """The matrices of one parameter group that have the same tall shape and dtype; `blocks` row blocks of each parameter stand in a row.

    state: by name, one tensor for all, of which each parameter's state is a view. momentum: (k, m, n) float32. level: (k,) float32, of
    the next step. fallbacks: (k,) float32, how many steps were not the ordinary one. row_squares: (k, rows) float32, see
    optim/refine.py, of rows of the parameter, which are columns of the stack where that is transposed (`wide`).
    highest: the largest level, on its way to the host.
    seen: W, G, T (k, m, n) of the last step, if it was watched.
    """

    params: list[Tensor]
    blocks: int
    group: dict[str, Any]
    state: dict[str, Tensor]
    wide: bool = False
    highest: OnHost | None = None
    seen: tuple[Tensor, Tensor, Tensor] | None = None

    def stack(self, tensors: Iterable[Any]) -> Tensor:
        """Parameters or gradients as one tall (k, m, n) copy, in their dtype."""
        return torch.cat([tall(row_blocks(t, self.blocks)) for t in tensors])

    def rows_of(self, i: int) -> slice:
        """Where the i-th parameter stands in the stack."""
        return slice(i * self.blocks, (i + 1) * self.blocks)


def row_blocks(t: Tensor, blocks: int) -> Tensor:
    """(m, n) as (blocks, m / blocks, n), a view where t is contiguous."""
    return t.reshape(blocks, t.size(0) // blocks, t.size(1))


def divides(blocks: Any, rows: int) -> bool:
    """Whether rows can be cut into so many blocks."""
    return isinstance(blocks, Integral) and int(blocks) >= 1 and rows % int(blocks) == 0


def state_shapes(p: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a parameter's state, see Bucket."""
    blocks = group["blocks"]
    shapes = {"momentum": tuple(tall(row_blocks(p, blocks)).shape), "level": (blocks,), "fallbacks": (blocks,)}
    if group["row_beta"] is not None:
        shapes["row_squares"] = (blocks, p.size(0) // blocks)
    return shapes


def whole_shape(p: Tensor, group: dict[str, Any]) -> tuple[int, int] | None:
    """The tall shape of a parameter whose blocks share the length of a step, else None."""
    m, n = tall(p).shape
    return (m, n) if group["block_length"] == "whole" and group["blocks"] > 1 else None
