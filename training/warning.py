"""An early warning of instability: the largest logit of attention is extrapolated to the value at which the softmax saturates.

Updates of Muon have a fixed length, so the singular values of an unconstrained matrix grow about linearly in the step. A logit is bilinear
in two such matrices, so its square root grows about linearly too: a straight line through the last probes predicts when it reaches a
given value. ‖W_qᵀW_k‖₂, which does not depend on the batch, is extrapolated in the same way. [our inference; the paper measures neither]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

# No forecast below this share of the limit: at first, the logits of every run grow quickly, and most then stop growing.
_LEAST_SHARE = 0.25


@dataclass(frozen=True)
class Alarm:
    """A warning. message: one sentence. expected_step: when saturation is expected, or now if attention is saturated. lead: steps until then."""

    message: str
    expected_step: int
    lead: int


@dataclass(frozen=True)
class WarningRules:
    """When to warn; configs/config.yaml.

    logit: a largest logit at which attention counts as saturated; null switches the forecast off. horizon: warn if this logit is
    expected within so many steps. probes: the line is fitted to so many last probes; with fewer, there is no forecast. entropy: warn
    without a forecast if the mean entropy of a layer, relative to log(position), is below this.
    """

    logit: Annotated[float | None, ("above", 0), ("null", "switches the forecast off")]
    horizon: Annotated[int, ("low", 1)]
    probes: Annotated[int, ("low", 3)]
    entropy: Annotated[float, ("low", 0), ("below", 1)]


class EarlyWarning:
    """Warns at most once in a run, by its rules."""

    def __init__(self, rules: WarningRules) -> None:
        self.rules = rules
        self.steps: list[int] = []
        self.logits: list[float] = []
        self.norms: list[float] = []
        self.warned_step: int | None = None

    def observe(self, step: int, seen: Mapping[str, Any]) -> Alarm | None:
        """Observe the record of a probe (`largest_logit`, `largest_qk_norm`, `least_entropy`); returns the alarm, once."""
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
        if math.isnan(entropy) and not math.isfinite(logit):
            return Alarm("attention's entropy is not a number in a layer", step, 0)
        if entropy < self.rules.entropy:
            return Alarm(f"attention's entropy has fallen to {entropy:.2g} of its maximum in a layer", step, 0)
        if self.rules.logit is not None and not logit < self.rules.logit:
            return Alarm(f"attention's largest logit is {logit:.3g}, where the softmax saturates", step, 0)
        return None

    def _forecast(self, step: int) -> Alarm | None:
        """Predict saturation if both the logit and the norm approach their limits: one alone is often noise."""
        limit = self.rules.logit
        if limit is None or len(self.steps) < self.rules.probes or not self.logits[-1] >= _LEAST_SHARE * limit:
            return None
        by_logit = crossing(self.steps, [math.sqrt(max(x, 0.0)) for x in self.logits], math.sqrt(limit))
        # The norm at which the logit reaches its limit, if their ratio stays as it is.
        norm_limit = self.norms[-1] * limit / self.logits[-1]
        by_norm = crossing(self.steps, [math.sqrt(x) for x in self.norms], math.sqrt(norm_limit))
        latest = max(by_logit, by_norm)
        if not latest < math.inf or (expected := max(step, round(latest))) - step > self.rules.horizon:
            return None
        message = (
            f"attention's largest logit is {self.logits[-1]:.3g} and growing; at this rate it reaches {limit:g}, where the "
            f"softmax saturates, at step {expected}, in {expected - step} steps"
        )
        return Alarm(message, expected, expected - step)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain lists and numbers; without the thresholds."""
        return {name: getattr(self, name) for name in _RECORD}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for name in _RECORD:
            setattr(self, name, state[name])


_RECORD = ("steps", "logits", "norms", "warned_step")


def crossing(steps: Sequence[int], values: Sequence[float], limit: float) -> float:
    """The step at which the least-squares line through (steps, values) reaches `limit`; infinite if it does not rise or a value is not finite."""
    if not all(map(math.isfinite, values)):
        return math.inf
    mean_step, mean = sum(steps) / len(steps), sum(values) / len(values)
    spread = sum((s - mean_step) ** 2 for s in steps)
    slope = sum((s - mean_step) * (v - mean) for s, v in zip(steps, values)) / spread if spread else 0.0
    return mean_step + (limit - mean) / slope if slope > 0 else math.inf
