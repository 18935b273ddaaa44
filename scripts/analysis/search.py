"""The search for the best settings of every case of an experiment: one rule for all cases, and no edges.

A compass search: the settings lie on a grid of equal factors without ends. The next trial is a neighbour of the best trial so far
that was not tried yet; when all neighbours were tried, the distance is halved. So a best value can be at the edge of what was tried
only if the trials ended first, and `Found.bracketed` says whether they did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

TRIALS = "trials"
"""The folder of the trials, beside the runs of an experiment."""

Point = tuple[Fraction, ...]
"""The place of a trial: for each searched setting, how many factors it is away from the first value."""

SEARCH_OPTIONS = {"trials": 8, "further_trials": 0, "search_seeds": "0", "start": ""}
"""The options of an experiment with a search, and their defaults.

trials: of each case. further_trials: how many more a case gets at most, while its best settings are at an edge (`Found.bracketed`).
search_seeds: of all trials, with commas; no final run should have one of them. Of several, the mean loss counts: with one, roundings may
decide between two settings that are nearly as good.
start: the values of the first trial, with commas, in the order of the searched settings; empty: those of the experiment. With slashes: of
several searches, of which the one that finds the lowest loss counts.
"""


@dataclass(frozen=True)
class Axis:
    """A setting that is searched: a key of train.py, the value of the first trial, and the factor between neighbours (above 1)."""

    key: str
    start: float
    factor: float = 2.0

    def text(self, place: Fraction) -> str:
        """The value at a place, rounded to three digits."""
        return f"{self.start * self.factor ** float(place):.3g}"


@dataclass(frozen=True)
class Search:
    """What is searched in an experiment, whose options have those of `SEARCH_OPTIONS`.

    axes: the settings that are searched in a case, from its study and its values. A setting without effect is left out.
    along: an axis of the experiment, or None. In the order of its values, a search starts at the best point of the one before.
    of: the case whose best settings a case takes; by default itself. A case that takes those of another has no trials.
    """

    axes: Callable[[Any, Mapping[str, str]], list[Axis]]
    along: str | None = None
    of: Callable[[Mapping[str, str]], Mapping[str, str]] = lambda case: case


@dataclass
class Found:
    """The search of a case. axes: what is searched. start: the point of the first trial. tried: point → loss (nats a token), in order.

    The loss of an unstable run is infinite. others: the searches of the same case from other starts, none of which found a lower loss.
    """

    axes: list[Axis]
    start: Point | None = None
    tried: dict[Point, float] = field(default_factory=dict)
    others: list[Found] = field(default_factory=list)

    @property
    def point(self) -> Point:
        """The point with the lowest loss, the first one of equals; before the first trial, that at which it starts."""
        return min(self.tried, key=self.tried.__getitem__, default=self.start or (Fraction(0),) * len(self.axes))

    @property
    def loss(self) -> float:
        """The lowest loss; infinite before the first trial."""
        return self.tried.get(self.point, math.inf)

    @property
    def trials(self) -> list[tuple[dict[str, str], float]]:
        """The values and the loss of all trials, in order, and then those that only the other searches made."""
        found = [(self.values(point), loss) for point, loss in self.tried.items()]
        for other in self.others:
            found += [trial for trial in other.trials if trial not in found]
        return found

    @property
    def best(self) -> dict[str, str]:
        """Key → value at the best point."""
        return self.values(self.point)

    @property
    def bracketed(self) -> bool:
        """Whether, for each setting, a lower and a higher value were tried with the best of the others. Then the best is not at an edge."""
        best = self.point
        for i, place in enumerate(best):
            beside = [p[i] for p in self.tried if p[:i] == best[:i] and p[i + 1 :] == best[i + 1 :]]
            if not min(beside, default=place) < place < max(beside):
                return False
        return True

    def goes_on(self, trials: int, further: int) -> bool:
        """Whether another trial is due, by the options `trials` and `further_trials`."""
        return len(self.tried) < (trials if self.bracketed else trials + further)

    def values(self, point: Point) -> dict[str, str]:
        """Key → value at a point."""
        return {axis.key: axis.text(place) for axis, place in zip(self.axes, point)}

    def next_point(self) -> Point:
        """The point of the next trial. While every loss is infinite, the first setting, which is the learning rate, becomes smaller."""
        best, distance = self.point, Fraction(1)
        if not self.tried:
            return best
        if math.isinf(self.tried[best]):
            return (min(point[0] for point in self.tried) - 1, *best[1:])
        while True:
            for neighbour in _neighbours(best, distance):
                if neighbour not in self.tried:
                    return neighbour
            distance /= 2


def best_of_searches(searches: list[Found]) -> Found:
    """The search with the lowest loss, the first one of equals; it gets the others."""
    best = min(searches, key=lambda search: search.loss)
    best.others = [search for search in searches if search is not best]
    return best


def _neighbours(point: Point, distance: Fraction) -> Iterator[Point]:
    for i, place in enumerate(point):
        for moved in (place + distance, place - distance):
            yield (*point[:i], moved, *point[i + 1 :])
