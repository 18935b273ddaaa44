"""Kinds of values that one setting alone has; training/fields.py has the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optim.iterators import unsound
from training.fields import MOST, YAML_WORDS, Kind, PathText, Problem, Several, is_number, shown


@dataclass(frozen=True)
class ListOfQuintics(Several):
    """Triples (a, b, c) of odd quintics, applied in order, that are an iteration for the matrix sign."""

    remedy = "give a list of triples [a, b, c] whose composed map is positive and bounded"

    def fits(self, value: Any) -> bool:
        return super().fits(value) and unsound(self.read(value)) is None

    def hint(self, value: Any) -> str:
        return f": {unsound(self.read(value))}" if super().fits(value) else ""


@dataclass(frozen=True)
class Keywords(Kind):
    """Keyword arguments for a class of a library: names with plain values; numbers are finite. A list becomes a tuple."""

    remedy = "give a mapping of the optimizer's own settings, such as {momentum: 0.9}; {} for its defaults"

    def wrong(self, key: str, value: Any) -> list[Problem]:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) and name.isidentifier() for name in value):
            return [self.refusal(key, value)]
        return [problem for name, item in value.items() for problem in _problems_of_argument(f"{key}.{name}", item)]

    def read(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: self.read(item) for name, item in value.items()}
        return tuple(map(self.read, value)) if isinstance(value, list) else value


def _problems_of_argument(key: str, value: Any) -> list[Problem]:
    """Values that are taken for others: text that YAML 1.1 means as a boolean, and numbers that are not finite."""
    if isinstance(value, (Mapping, list)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return [problem for name, item in items for problem in _problems_of_argument(f"{key}.{name}", item)]
    if isinstance(value, str) and value.lower() in YAML_WORDS:
        meant = shown(YAML_WORDS[value.lower()])
        return [Problem(key, f"{key} is {shown(value)}; {value} is text here; write {meant}")]
    if isinstance(value, float) and not math.isfinite(value):
        return [Problem(key, f"{key} is {value}; give a finite number")]
    return []


@dataclass(frozen=True)
class StepsOrShare(Kind):
    """A number of updates; or, below 1, a share of schedule.decay_steps."""

    remedy = "give a whole number of updates, 0 or more, or a share of schedule.decay_steps below 1"

    def fits(self, value: Any) -> bool:
        return is_number(value) and 0 <= value <= MOST and (value < 1 or value == int(value))

    def read(self, value: Any) -> float:
        return value if value % 1 else int(value)


_RESUMES = ("never", "auto")
_WORDS = (*YAML_WORDS, "true", "false", "none", *_RESUMES)


@dataclass(frozen=True)
class Resume(PathText):
    """`never`, `auto` or the path of a checkpoint."""

    remedy = "choose never or auto, or give the path of a checkpoint"

    def fits(self, value: Any) -> bool:
        return super().fits(value) and (value in _RESUMES or value.lower() not in _WORDS)

    def hint(self, value: Any) -> str:
        small = value.lower() if isinstance(value, str) else ""
        return f" (write {small} in small letters)" if small in _RESUMES else ""
