"""When a run counts as unstable: one definition, used by the loop, the tables and the sweeps.

A run is unstable from the first step at which

1. its loss or its gradient is not finite, or
2. its validation loss is more than ``max_rise`` above the best so far, or
3. its training loss lies more than ``z_threshold`` standard deviations above its running mean for ``z_steps`` steps on
   end.

It stays so: training may recover and go on, the record does not. The paper calls runs unstable without defining it;
this definition is ours. The third rule is blind by design while the loss still falls steeply, since the fall itself
widens the variance.

Before that, the probes may give an early warning (training/warning.py), whose lead time is part of the record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from training.warning import Alarm, EarlyWarning, WarningRules

Positive = Annotated[float, ("above", 0)]

# A spread below this share of the mean is taken for this share: a loss that hardly moves must not raise an alarm when
# it moves a little.
_LEAST_RELATIVE_SPREAD = 1e-3


@dataclass(frozen=True)
class StabilityRules:
    """The definition; configs/config.yaml.

    ``max_rise`` is in nats. ``z_threshold=None`` switches the third rule off. ``on_unstable``: "mark" trains on, "stop" ends
    the run; ``max_skipped`` ends it once more updates than that were left out because something was not finite (None: never).
    """

    max_rise: Positive
    z_threshold: Positive | None
    z_steps: Annotated[int, ("low", 1)]
    on_unstable: Literal["mark", "stop"]
    max_skipped: Annotated[int | None, ("low", 0), ("null", "means no limit")]
    warning: WarningRules | None


class Stability:
    """The record of one run. Each observation returns True at the one step that makes the run unstable.

    ``decay`` is that of the exponential moving mean and variance of the training loss; until 1/(1 - decay) losses were seen
    they are plain averages, and the third rule waits.
    """

    decay: ClassVar[float] = 0.98

    def __init__(self, rules: StabilityRules) -> None:
        self.rules = rules
        self.unstable_step: int | None = None
        self.reason: str | None = None
        self.best = math.inf
        self.best_step: int | None = None
        self._mean = self._variance = 0.0
        self._seen = self._high_steps = self._skipped = 0
        self._early = None if rules.warning is None else EarlyWarning(rules.warning)

    @property
    def lead(self) -> int | None:
        """Steps from the early warning to the step that made the run unstable; None unless there were both, in this order."""
        warned = None if self._early is None else self._early.warned_step
        if warned is None or self.unstable_step is None or warned > self.unstable_step:
            return None
        return self.unstable_step - warned

    def probe(self, step: int, seen: Mapping[str, Any]) -> Alarm | None:
        """Observe the summary of a probe; the early warning, once in a run."""
        return None if self._early is None else self._early.observe(step, seen)

    @property
    def stopped(self) -> bool:
        """Whether the run is to end here, by ``on_unstable`` or because too many updates were left out."""
        too_many = self.rules.max_skipped is not None and self._skipped > self.rules.max_skipped
        return too_many or (self.rules.on_unstable == "stop" and self.unstable_step is not None)

    def skipped(self, count: int) -> None:
        """Observe how many updates were left out so far because something was not finite."""
        self._skipped = count

    def train(self, step: int, loss: float) -> bool:
        """Observe the training loss of a step (nats, already averaged over ranks)."""
        if not math.isfinite(loss):
            return self._mark(step, f"training loss is {loss}")
        if self._is_high(loss):
            # Kept out of the statistics: a spike that widened them would hide the spikes after it.
            self._high_steps += 1
            if self._high_steps >= self.rules.z_steps:
                return self._mark(
                    step,
                    f"training loss {loss:.4g} is more than {self.rules.z_threshold:g} standard deviations above its "
                    f"running mean {self._mean:.4g}, for {self._high_steps} steps on end",
                )
            return False
        self._high_steps = 0
        self._average(loss)
        return False

    def validation(self, step: int, loss: float) -> bool:
        """Observe a validation loss (nats); keeps ``best`` and ``best_step``."""
        if not math.isfinite(loss):
            return self._mark(step, f"validation loss is {loss}")
        if loss < self.best:
            self.best, self.best_step = loss, step
        if loss > self.best + self.rules.max_rise:
            rise = loss - self.best
            return self._mark(
                step,
                f"validation loss {loss:.4g} is {rise:.4g} above its best, {self.best:.4g} at step {self.best_step}",
            )
        return False

    def nonfinite(self, step: int, what: str, rank: int = 0) -> bool:
        """Record a loss or gradient that is not finite: ``what``, the first offending tensor, found by ``rank``."""
        return self._mark(step, f"{what} is not finite on rank {rank}")

    def state_dict(self) -> dict[str, Any]:
        """The whole record as plain numbers and strings, and that of the warning; the thresholds belong to the configuration."""
        early = {} if self._early is None else self._early.state_dict()
        return {**{name: getattr(self, name) for name in _RECORD}, "early": early}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a record; ValueError if it is not one of this class."""
        expected = {*_RECORD, "early"}
        if state.keys() != expected:
            raise ValueError(
                f"a stability record has {sorted(expected)}, not {sorted(state)}; resume with the version that saved it"
            )
        for name in _RECORD:
            setattr(self, name, state[name])
        if self._early is not None and state["early"]:
            self._early.load_state_dict(state["early"])

    def _is_high(self, loss: float) -> bool:
        if self.rules.z_threshold is None or self._seen * (1 - self.decay) < 1:
            return False
        spread = max(math.sqrt(self._variance), _LEAST_RELATIVE_SPREAD * abs(self._mean))
        return loss - self._mean > self.rules.z_threshold * spread

    def _average(self, loss: float) -> None:
        """Update the moving mean and variance (Finch 2009, section 9); early on the k-th loss weighs 1/k."""
        self._seen += 1
        weight = max(1 - self.decay, 1 / self._seen)
        difference = loss - self._mean
        self._mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference * difference)

    def _mark(self, step: int, reason: str) -> bool:
        if self.unstable_step is not None:
            return False
        self.unstable_step, self.reason = step, reason
        return True


_RECORD = ("unstable_step", "reason", "best", "best_step", "_mean", "_variance", "_seen", "_high_steps", "_skipped")
