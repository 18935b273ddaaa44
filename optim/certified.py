"""The certified step rule of `optim=manifold_muon`: ManifoldMuon's stacks, solved near-optimally in n × n (optim/gram_step.py).

What it adds to the pure functions: which solver serves which manifold, the multipliers kept for a warm start, the certificates of the
last step, and what happens to the rare matrix whose answer the guard refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from optim.gram_step import GramStep, Update, gram_kernel, gram_step, rectangular_step, step_flops
from optim.lmo import Certificate, Solver
from optim.manifold_muon import Stack
from optim.manifolds import MANIFOLDS, DGram, Manifold


class CertifiedStep:
    """One near-optimal, certified update of every stack.

    Args:
        solvers: a Solver for each manifold that may occur.
        length, norm_cap: see optim.gram_step.Update; weight decay comes with the stacks.
        warm_start: start from the multipliers of the step before, kept in the optimizer's state.
        compiled: put the kernel through torch.compile (fullgraph).

    Attributes:
        certificates: of the last step, one Certificate of (k,) tensors for each stack; not `ok` where the guard refused the Gram
            form's answer.
    """

    certifies = True

    def __init__(
        self, solvers: Mapping[str, Solver], *, length: str, norm_cap: float | None, warm_start: bool, compiled: bool
    ) -> None:
        self.solvers = dict(solvers)
        self.update = partial(Update, length=length, norm_cap=norm_cap)
        self.keeps_dual = warm_start
        self.compiled = compiled
        self.certificates: list[Certificate] = []
        self._refused: _Delayed | None = None

    @cached_property
    def kernel(self) -> Any:
        """The n × n kernel, compiled once if that was asked for."""
        return torch.compile(gram_kernel, fullgraph=True, dynamic=False) if self.compiled else gram_kernel

    def init(self, W: Tensor, manifold: str) -> Tensor:
        """W (..., m, n) brought onto the manifold by an exact polar factor; DGram keeps its column norms."""
        return _MANIFOLDS[manifold].init(W)

    def flops(self, m: int, n: int, manifold: str) -> float:
        """Operations (two a multiply-add) of one step of one tall (m, n) matrix."""
        return step_flops([(1, m, n)], [manifold], self.solvers)

    def __call__(self, stacks: list[Stack]) -> list[Tensor]:
        """New weights, one (k, m, n) for each stack; duals are updated in place."""
        if not stacks:
            return []
        step = self._solve(stacks)
        self.certificates = step.certificates
        if self.keeps_dual:
            torch._foreach_copy_([s.dual for s in stacks], step.warm)
        return self._rescue(stacks, step)

    def _solve(self, stacks: list[Stack]) -> GramStep:
        # One call for each amount of decay: that is a number of the kernel, not a tensor.
        weights, certificates, warm = ([None] * len(stacks) for _ in range(3))
        for decay in dict.fromkeys(s.weight_decay for s in stacks):
            mine = [i for i, s in enumerate(stacks) if s.weight_decay == decay]
            chosen = [stacks[i] for i in mine]
            result = gram_step(
                [s.W for s in chosen],
                [s.G for s in chosen],
                [s.manifold for s in chosen],
                [s.eta for s in chosen],
                self.solvers,
                self.update(decay=decay),
                [s.dual for s in chosen] if self.keeps_dual else None,
                self.kernel,
            )
            for i, *fields in zip(mine, *result):
                weights[i], certificates[i], warm[i] = fields
        return GramStep(weights, certificates, warm)

    def _rescue(self, stacks: list[Stack], step: GramStep) -> list[Tensor]:
        """Repeat in rectangular form the matrices whose answer was refused, as soon as the host knows of them without waiting.

        On a CPU that is now. On CUDA it is a step later: the refused step itself went along the projected gradient.
        """
        refused = _Delayed(torch.cat([~c.ok for c in step.certificates]))
        known, self._refused = (refused, None) if refused.ready else (self._refused, refused)
        if known is None or not known.ready or not known.any():
            return step.weights
        weights = []
        for stack, new, flags in zip(stacks, step.weights, known.split([len(s.W) for s in stacks])):
            if any(flags):
                where = [i for i, flag in enumerate(flags) if flag]
                again = rectangular_step(
                    stack.W[where], stack.G[where], stack.manifold, stack.eta, self.update(decay=stack.weight_decay)
                )
                new = new.clone()
                new[where] = torch.where(again.isfinite().all(dim=(-2, -1), keepdim=True), again, new[where])
            weights.append(new)
        return weights


class _Delayed:
    """Flags (k,) of the device on their way to the host; `ready` once they have arrived, which is at once on a CPU."""

    def __init__(self, flags: Tensor) -> None:
        self.event = None
        if flags.device.type == "cuda":
            self.flags = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self.flags.copy_(flags, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.flags = flags

    @property
    def ready(self) -> bool:
        return self.event is None or self.event.query()

    def any(self) -> bool:
        return bool(self.flags.any())

    def split(self, sizes: list[int]) -> list[list[bool]]:
        return [part.tolist() for part in self.flags.split(sizes)]


_MANIFOLDS: dict[str, Manifold] = {**MANIFOLDS, "dgram": DGram("column_norms")}
