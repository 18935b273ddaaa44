"""Kinds of values that one setting alone has; training/fields.py has the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optim.iterators import unsound
from training.fields import MOST, YAML_WORDS, Kind, PathText, Several, is_number


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
    """Keyword arguments for a class of a library: names with any plain values. A list becomes a tuple."""

    remedy = "give a mapping of the optimizer's own settings, such as {momentum: 0.9}; {} for its defaults"

    def fits(self, value: Any) -> bool:
        return isinstance(value, Mapping) and all(isinstance(name, str) and name.isidentifier() for name in value)

    def read(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: self.read(item) for name, item in value.items()}
        return tuple(map(self.read, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class StepsOrShare(Kind):
    """A number of updates; or, below 1, a share of all updates."""

    remedy = "give a whole number of updates, 0 or more, or a share of them below 1"

    def fits(self, value: Any) -> bool:
        return is_number(value) and 0 <= value <= MOST and (value < 1 or value == int(value))

    def read(self, value: Any) -> float:
        return value if value % 1 else int(value)


@dataclass(frozen=True)
class Resume(PathText):
    """`never`, `auto` or the path of a checkpoint."""

    remedy = "choose never or auto, or give the path of a checkpoint"

    def fits(self, value: Any) -> bool:
        return super().fits(value) and value.lower() not in (*YAML_WORDS, "true", "false", "none")

    def hint(self, value: Any) -> str:
        return ""
