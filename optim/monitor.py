"""A monitor of ManifoldMuon: how far its matrices are from their manifolds, how good its steps are, and a warning when one is off.

A constraint can be violated without any error: a rounded copy, a loaded checkpoint, another library's decay. The loss shows it late.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .manifold_muon import ManifoldMuon
from .manifolds import distance_of
from .stack import row_blocks


class ManifoldWarning(UserWarning):
    """Matrices are not on their manifold, or not finite, or most of their steps are not the ordinary one."""


@dataclass(frozen=True)
class Seen:
    """One matrix; of several blocks the worst.

    distance: from the manifold, see its class's `distance` in optim/manifolds.py. largest, smallest: singular values. feas: the share of the
    optimum that the last watched step achieved at least; step: its norm ‖T‖₂; normal: the share of the momentum's ‖G‖_F² that it could not follow,
    see optim/certificate.py; all NaN if there was none, or another rank owns the matrix. fallbacks: steps so far that were not the
    ordinary one.
    """

    manifold: str
    distance: float
    largest: float
    smallest: float
    feas: float = math.nan
    step: float = math.nan
    normal: float = math.nan
    fallbacks: float = math.nan


class Report(dict[str, Seen]):
    """Name of a matrix → what was seen of it. As text, a table."""

    def off(self, tolerance: float) -> dict[str, Seen]:
        """The matrices farther from their manifold than the tolerance, or not finite."""
        return {
            name: seen
            for name, seen in self.items()
            if not seen.distance <= tolerance or not math.isfinite(seen.largest)
        }

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [
            ("", "manifold", "distance", "largest", "smallest", "feas", "step", "normal", "fallbacks")
        ]
        for name, s in self.items():
            numbers = (s.distance, s.largest, s.smallest, s.feas, s.step, s.normal, s.fallbacks)
            lines.append((name, s.manifold, *("-" if math.isnan(x) else f"{x:.3g}" for x in numbers)))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


class Monitor:
    """Watches every `interval`-th step of an optimizer, the first included, and warns if a matrix is off its manifold after it, or if most
    of its steps since the last watched one were fallbacks.

    Weights and state stay bitwise as they would be without it. A watched step keeps three copies of the matrices until it has been
    judged, and waits for the device; the certificate takes a few eigendecompositions a matrix in float64 (optim/certificate.py).

    Args:
        tolerance: the distance from which to warn. The certified step keeps to a few 1e-6, on the spectral sphere to 3e-5; the published one, in
            bfloat16, to 1e-2.

    Raises:
        ValueError: the optimizer is not a ManifoldMuon, or the interval not a whole number from 1 on.
    """

    def __init__(self, optimizer: ManifoldMuon, *, interval: int = 100, tolerance: float = 1e-4) -> None:
        problems = []
        if not isinstance(optimizer, ManifoldMuon):
            problems.append(
                f"Monitor watches a ManifoldMuon, not {type(optimizer).__name__}; give the first optimizer that for_model returns"
            )
        if not (isinstance(interval, int) and interval >= 1):
            problems.append(f"interval is {interval!r}; give a whole number of steps from 1 on")
        if problems:
            raise ValueError("\n".join(problems))
        self.optimizer, self.interval, self.tolerance = optimizer, interval, tolerance
        self.steps = 0
        self.certified: Mapping[str, Mapping[str, float]] = {}
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def report(self) -> Report:
        """All matrices as they are now, and the last watched step. Warns with ManifoldWarning if some are off their manifold."""
        found = Report()
        for group in self.optimizer.param_groups:
            for name, p in zip(group["names"], group["params"]):
                measured = _measure(row_blocks(p, group["blocks"]), group["manifold"], group["radius"])
                last = self.certified.get(name, {})
                step = [last.get(field, math.nan) for field in ("feas", "norm", "normal_share", "fallbacks")]
                found[name] = Seen(group["manifold"], *measured, *step)
        if off := found.off(self.tolerance):
            worst = max(off, key=lambda name: off[name].distance if math.isfinite(off[name].distance) else math.inf)
            warnings.warn(
                f"{len(off)} of {len(found)} matrices are off their manifold by more than {self.tolerance:g}; the worst is {worst} "
                f"({off[worst].manifold}, distance {off[worst].distance:.3g}); something beside the optimizer changed them, or a step did "
                "not land: `bring_onto_manifold()` of the optimizer brings them back",
                ManifoldWarning,
                stacklevel=2,
            )
        return found

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.optimizer.watched = self.steps % self.interval == 0

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.steps += 1
        if self.optimizer.watched:
            self.optimizer.watched = False
            before, self.certified = self.certified, self.optimizer.certificates()
            self.report()
            self._look_at_fallbacks(before)

    def _look_at_fallbacks(self, before: Mapping[str, Mapping[str, float]]) -> None:
        """Warn of the matrices of which most steps since the certificates `before` were fallbacks."""
        now = self.certified
        new = {name: now[name]["fallbacks"] - seen["fallbacks"] for name, seen in before.items() if name in now}
        if often := [name for name, count in new.items() if count > self.interval / 2]:
            worst = max(often, key=new.__getitem__)
            warnings.warn(
                f"most of the last {self.interval} steps of {len(often)} matrices were not the ordinary one, of {worst} {new[worst]:g}: a "
                "gradient is not finite, or a step has no direction or does not land; look at the gradients and the learning rate",
                ManifoldWarning,
                stacklevel=2,
            )


@torch.no_grad()
def _measure(W: Tensor, manifold: str, radius: float) -> tuple[float, float, float]:
    """The largest distance from the manifold, largest and smallest singular value of the matrices of W (k, m, n); NaN if not finite."""
    if not bool(W.isfinite().all()):
        return (math.nan,) * 3
    sigma = torch.linalg.svdvals(W.float())
    return float(distance_of(manifold, radius)(W).max()), float(sigma.max()), float(sigma.min())
