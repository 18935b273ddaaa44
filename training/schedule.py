"""Learning-rate schedules: pure functions of the step, as a multiple of the peak learning rate.

A schedule maps the number of finished steps to a multiplier of the peak learning rates of all groups, so Muon and AdamW have the same
schedule, as in arXiv 2606.13276. Warm-up is that of nanoGPT: (step + 1) / (warmup + 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine(progress: float, floor: float, decay: float) -> float:
    """Half a cosine from 1 at progress 0 to `floor` at progress 1."""
    return floor + 0.5 * (1 - floor) * (1 + math.cos(math.pi * progress))


def linear(progress: float, floor: float, decay: float) -> float:
    """A straight line from 1 at progress 0 to `floor` at progress 1."""
    return 1 - (1 - floor) * progress


def constant(progress: float, floor: float, decay: float) -> float:
    """Always 1."""
    return 1.0


def wsd(progress: float, floor: float, decay: float) -> float:
    """Warm-up, stable, decay: 1 until the last share `decay` of the steps after warm-up, then a straight line to `floor`."""
    return 1.0 if progress <= 1 - decay else linear((progress - 1 + decay) / decay, floor, decay)


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": wsd,
}


def warmup_updates(warmup_steps: float, decay_steps: int) -> int:
    """How many of the first `decay_steps` updates are warm-up.

    Args:
        warmup_steps: a whole number w of updates; or, below 1, a share of `decay_steps` d, rounded. If w ≥ d, no update would be left for
            the decay: then the result is d·w/(w + d).
        decay_steps: the step at which the schedule reaches its floor.

    >>> warmup_updates(30, 200), warmup_updates(0.15, 200), warmup_updates(30, 10)
    (30, 30, 7)
    """
    if warmup_steps < 1:
        return min(round(warmup_steps * decay_steps), decay_steps - 1)
    if warmup_steps < decay_steps:
        return int(warmup_steps)
    return int(decay_steps * warmup_steps / (warmup_steps + decay_steps))


def lr_multiplier(step: int, *, kind: str, warmup_steps: float, decay_steps: int, floor: float, decay: float) -> float:
    """Multiplier of every peak learning rate for the update that follows `step` finished updates.

    Args:
        step: finished updates, from 0.
        kind: a key of SCHEDULES.
        warmup_steps: updates of linear warm-up, or a share of `decay_steps`; see `warmup_updates`.
        decay_steps: the step at which the schedule reaches `floor`; it stays there.
        floor: last multiplier (the published recipe: 6e-5 / 6e-4 = 0.1).
        decay: for `wsd` only, the fraction of the steps after warm-up that decay.
    """
    warmup = warmup_updates(warmup_steps, decay_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, decay_steps - warmup))
    return SCHEDULES[kind](progress, floor, decay)
