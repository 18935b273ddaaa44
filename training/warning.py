"""An early warning: attention's largest logit is followed over the probes and extrapolated to where it saturates the softmax.

The singular values of a matrix that nothing holds back grow about linearly in the step under Muon, whose updates have a fixed length.
A logit is bilinear in two such matrices, so its square root grows about linearly as well: a straight line through the last probes says
when it will reach a given logit. The growth of ‖W_qᵀW_k‖₂ alone, which no choice of batch disturbs, is followed the same way.
[our inference; the paper measured neither]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

# Below this share of the limit nothing is forecast: every run's logits grow quickly at first, and most level off.
_LEAST_SHARE = 0.25


@dataclass(frozen=True)
class Alarm:
    """What was foreseen. message: one sentence. expected_step: when saturation is expected, at the latest now; lead: steps until then."""

    message: str
    expected_step: int
    lead: int


@dataclass(frozen=True)
class WarningRules:
    """When to warn; configs/config.yaml.

    logit: the largest logit at which attention counts as saturated; null switches the forecast off. horizon: a warning comes when this
    logit is expected within so many steps. probes: how many of the last probes the line is drawn through; before that many were seen,
    there is no forecast. entropy: a layer whose mean entropy, relative to log(position), is below this is warned of at once.
    """

    logit: Annotated[float | None, ("above", 0), ("null", "switches the forecast off")]
    horizon: Annotated[int, ("low", 1)]
    probes: Annotated[int, ("low", 3)]
    entropy: Annotated[float, ("low", 0), ("below", 1)]


class EarlyWarning:
    """Warns once in a run, by its rules."""

    def __init__(self, rules: WarningRules) -> None:
        self.rules = rules
        self.steps: list[int] = []
        self.logits: list[float] = []
        self.norms: list[float] = []
        self.warned_step: int | None = None

    def observe(self, step: int, seen: Mapping[str, Any]) -> Alarm | None:
        """Take the summary of a probe (`largest_logit`, `largest_qk_norm`, `least_entropy`); the alarm, once."""
        self.steps = [*self.steps, step][-self.rules.probes :]
        self.logits = [*self.logits, seen["largest_logit"]][-self.rules.probes :]
        self.norms = [*self.norms, seen["largest_qk_norm"]][-self.rules.probes :]
        if self.warned_step is not None:
            return None
        alarm = self._collapsed(step, seen) or self._forecast(step)
        if alarm is not None:
            self.warned_step = step
        return alarm

    def _collapsed(self, step: int, seen: Mapping[str, Any]) -> Alarm | None:
        entropy, logit = seen["least_entropy"], seen["largest_logit"]
        if not entropy >= self.rules.entropy:
            return Alarm(f"attention's entropy has fallen to {entropy:.2g} of its maximum in a layer", step, 0)
        if self.rules.logit is not None and not logit < self.rules.logit:
            return Alarm(f"attention's largest logit is {logit:.3g}, where the softmax saturates", step, 0)
        return None

    def _forecast(self, step: int) -> Alarm | None:
        """Both the logit and the norm behind it must head for the limit: one of them alone is often noise."""
        limit = self.rules.logit
        if limit is None or len(self.steps) < self.rules.probes or not self.logits[-1] >= _LEAST_SHARE * limit:
            return None
        by_logit = crossing(self.steps, [math.sqrt(max(x, 0.0)) for x in self.logits], math.sqrt(limit))
        # The logit that the norm stands for: in proportion, as of now.
        norm_limit = self.norms[-1] * limit / self.logits[-1]
        by_norm = crossing(self.steps, [math.sqrt(x) for x in self.norms], math.sqrt(norm_limit))
        latest = max(by_logit, by_norm)
        if not latest < math.inf or (expected := round(latest)) - step > self.rules.horizon:
            return None
        message = (
            f"attention's largest logit is {self.logits[-1]:.3g} and growing; at this pace it reaches {limit:g}, where the "
            f"softmax saturates, at step {expected}, in {expected - step} steps"
        )
        return Alarm(message, expected, expected - step)

    def state_dict(self) -> dict[str, Any]:
        """The record as plain lists and numbers; the thresholds belong to the configuration."""
        return {name: getattr(self, name) for name in _RECORD}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a record."""
        for name in _RECORD:
            setattr(self, name, state[name])


_RECORD = ("steps", "logits", "norms", "warned_step")


def crossing(steps: Sequence[int], values: Sequence[float], limit: float) -> float:
    """Where the least-squares line through (steps, values) reaches `limit`; infinite if it does not rise or a value is not finite."""
    if not all(map(math.isfinite, values)):
        return math.inf
    mean_step, mean = sum(steps) / len(steps), sum(values) / len(values)
    spread = sum((s - mean_step) ** 2 for s in steps)
    slope = sum((s - mean_step) * (v - mean) for s, v in zip(steps, values)) / spread if spread else 0.0
    return mean_step + (limit - mean) / slope if slope > 0 else math.inf
