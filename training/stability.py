"""When a run counts as unstable: one definition for the loop, the tables and the sweeps.

A run is unstable from the first step at which

1. its loss or its gradient is not finite, or
2. its validation loss is more than ``max_rise`` above its best, or
3. its training loss is more than ``z_threshold`` standard deviations above its running mean in ``z_steps`` records in a row.

A run that recovers still counts as unstable. The paper does not define the word; this definition is ours. The third rule does not react
while the loss falls steeply, because that makes the variance large.

The probes may give an early warning before (training/warning.py); its lead time is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from model.residual import Positive
from training.warning import Alarm, EarlyWarning, WarningRules

# The standard deviation is at least this share of the mean, so that a small change of a constant loss is not an alarm.
_LEAST_RELATIVE_SPREAD = 1e-3


@dataclass(frozen=True)
class StabilityRules:
    """The definition; configs/config.yaml.

    ``max_rise`` is in nats. ``z_threshold=None`` switches the third rule off. ``on_unstable``: "mark" continues, "stop" ends the
    run. ``max_skipped`` ends the run after more skipped updates than that (None: never); see FiniteGuard.
    """

    max_rise: Positive
    z_threshold: Positive | None
    z_steps: Annotated[int, ("low", 1)]
    on_unstable: Literal["mark", "stop"]
    max_skipped: Annotated[int | None, ("low", 0), ("null", "means no limit")]
    warning: WarningRules | None


class Stability:
    """The stability of one run. An observation of a loss returns True at the step at which the run becomes unstable.

    ``decay`` belongs to the exponential moving mean and variance of the training loss. For the first 1/(1 - decay) losses they are plain
    averages, and the third rule is not applied.
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

    def observe_probe(self, step: int, seen: Mapping[str, Any]) -> Alarm | None:
        """Observe the record of a probe; returns the early warning, at most once in a run."""
        return None if self._early is None else self._early.observe(step, seen)

    @property
    def stopped(self) -> bool:
        """Whether the run must end here, by ``on_unstable`` or ``max_skipped``."""
        too_many = self.rules.max_skipped is not None and self._skipped > self.rules.max_skipped
        return too_many or (self.rules.on_unstable == "stop" and self.unstable_step is not None)

    def observe_skipped(self, count: int) -> None:
        """Observe the number of skipped updates so far."""
        self._skipped = count

    def observe_train_loss(self, step: int, loss: float) -> bool:
        """Observe the training loss of a step (nats, mean over ranks)."""
        if not math.isfinite(loss):
            return self._mark(step, f"training loss is {loss}")
        if self._is_high(loss):
            # Left out of mean and variance: otherwise one spike would hide the next.
            self._high_steps += 1
            if self._high_steps >= self.rules.z_steps:
                return self._mark(
                    step,
                    f"training loss {loss:.4g} is more than {self.rules.z_threshold:g} standard deviations above its "
                    f"running mean {self._mean:.4g}, for {self._high_steps} records in a row",
                )
            return False
        self._high_steps = 0
        self._average(loss)
        return False

    def observe_val_loss(self, step: int, loss: float) -> bool:
        """Observe a validation loss (nats); updates ``best`` and ``best_step``."""
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

    def observe_nonfinite(self, step: int, what: str, rank: int | None = None) -> bool:
        """Observe that ``what``, a loss or a gradient, was not finite; on ``rank``, or None for what is of all ranks."""
        return self._mark(step, f"{what} is not finite" + ("" if rank is None else f" on rank {rank}"))

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers and strings, with that of the early warning; without the thresholds."""
        early = {} if self._early is None else self._early.state_dict()
        return {**{name: getattr(self, name) for name in _RECORD}, "early": early}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; ValueError for other keys."""
        expected = {*_RECORD, "early"}
        if state.keys() != expected:
            raise ValueError(
                f"the state of Stability has the keys {sorted(expected)}, not {sorted(state)}; resume with the version that saved it"
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
        """Update the moving mean and variance (Finch 2009, section 9); at first the k-th loss has the weight 1/k."""
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
