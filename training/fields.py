"""What values a setting may have: each field of a section states its type and range once, and one checker reads them all.

A section of the configuration is a frozen dataclass whose fields are made by the functions of this module:

    @dataclass(frozen=True)
    class Log:
        interval: int = whole(low=1)
        interval_spectra: int | None = optional(whole(low=1))

`problems` lists everything that is wrong with the values of such a section, `read` makes an instance of it. No field has a default:
the defaults stand in configs/.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

MISSING = "???"  # OmegaConf's word for a value that must still be given
_KIND = "kind"  # of a field's metadata
MOST = 10**15  # no number of a configuration is larger
YAML_WORDS = {
    "no": False,
    "off": False,
    "n": False,
    "yes": True,
    "on": True,
    "y": True,
}  # YAML 1.1's booleans, text here


@dataclass(frozen=True)
class Problem:
    """What is wrong with the value at a dotted key, with its remedy."""

    key: str
    message: str

    def __str__(self) -> str:
        return self.message


# ---- the kinds of values ----


class Kind:
    """The values that a setting may have. `remedy` says what to give instead of a wrong one."""

    remedy = ""

    def fits(self, value: Any) -> bool:
        """Whether a value is one of them."""
        raise NotImplementedError

    def hint(self, value: Any) -> str:
        """What the user probably meant by a wrong value, to be added to the remedy."""
        return ""

    def problems(self, key: str, value: Any) -> list[Problem]:
        """Everything that is wrong with the value at a dotted key."""
        if isinstance(value, str) and value == MISSING:
            return [Problem(key, f"{key} is missing; give it, or choose an experiment")]
        return [] if self.fits(value) else self.wrong(key, value)

    def wrong(self, key: str, value: Any) -> list[Problem]:
        """What is wrong with a value that does not fit."""
        return [Problem(key, f"{key} is {shown(value)}; {self.remedy}{self.hint(value)}")]

    def read(self, value: Any) -> Any:
        """The typed object that a value without problems stands for."""
        return value

    def plain(self, value: Any) -> Any:
        """The value with whole numbers as such: 1e9, which YAML reads as a float, is 1000000000. Anything else is left as it is."""
        return value


@dataclass(frozen=True)
class Number(Kind):
    """A finite number in a range; `low` and `high` belong to it, `above` and `below` do not."""

    whole: bool
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    @property
    def remedy(self) -> str:
        noun = "a whole number" if self.whole else "a number"
        if self.low is not None and self.high is not None:
            return f"give {noun} from {self.low:,} to {self.high:,}"
        ends = (("of at least", self.low), ("above", self.above), ("up to", self.high), ("below", self.below))
        limits = [f"{word} {limit:,}" for word, limit in ends if limit is not None]
        return f"give {noun} {' and '.join(limits)}".rstrip()

    def fits(self, value: Any) -> bool:
        if not is_number(value) or abs(value) > MOST or (self.whole and not isinstance(value, int)):
            return False
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def hint(self, value: Any) -> str:
        return f", and at most {MOST:.0e}" if is_number(value) and value > MOST else ""

    def plain(self, value: Any) -> Any:
        return int(value) if self.whole and isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few words or booleans; `options` gives them, since a registry may grow."""

    options: Callable[[], Collection[Any]]

    @property
    def choices(self) -> list[Any]:
        """The words and booleans, as they are now."""
        return list(self.options())

    @property
    def remedy(self) -> str:
        words = [shown(choice).strip("'") for choice in self.choices]
        return f"choose {' or '.join(words)}" if len(words) == 2 else f"choose one of {', '.join(words)}"

    def fits(self, value: Any) -> bool:
        return any(type(value) is type(choice) and value == choice for choice in self.choices)

    def hint(self, value: Any) -> str:
        meant = YAML_WORDS.get(value.lower()) if isinstance(value, str) else None
        if meant is not None and self.fits(meant):
            return f" ({value} is text here; write {shown(meant)})"
        return _did_you_mean(value, [choice for choice in self.choices if isinstance(choice, str)])


@dataclass(frozen=True)
class Text(Kind):
    """Text of at least `shortest` characters, and at most `longest` bytes in UTF-8."""

    shortest: int = 1
    longest: int = 10_000

    @property
    def remedy(self) -> str:
        return f"give text of {self.shortest} to {self.longest:,} bytes"

    def fits(self, value: Any) -> bool:
        if not isinstance(value, str) or "\0" in value:
            return False
        return self.shortest <= len(value) and len(value.encode(errors="replace")) <= self.longest

    def hint(self, value: Any) -> str:
        return f"; as text it is written '\"{value}\"'" if is_number(value) or isinstance(value, bool) else ""


@dataclass(frozen=True)
class PathText(Text):
    """The path of a file or folder."""

    longest: int = 3500
    part: int = 255  # the longest name that file systems take, in bytes

    @property
    def remedy(self) -> str:
        return f"give a path of up to {self.longest:,} bytes, each name of it up to {self.part}"

    def fits(self, value: Any) -> bool:
        return super().fits(value) and all(len(name.encode(errors="replace")) <= self.part for name in value.split("/"))


@dataclass(frozen=True)
class Optional(Kind):
    """What another kind takes, or null; `null` says what that does."""

    kind: Kind
    null: str

    @property
    def remedy(self) -> str:
        return f"{self.kind.remedy} (null {self.null})"

    def fits(self, value: Any) -> bool:
        return value is None or self.kind.fits(value)

    def wrong(self, key: str, value: Any) -> list[Problem]:
        found = self.kind.wrong(key, value)
        return found if any(problem.key != key for problem in found) else super().wrong(key, value)

    def hint(self, value: Any) -> str:
        return self.kind.hint(value)

    def read(self, value: Any) -> Any:
        return None if value is None else self.kind.read(value)

    def plain(self, value: Any) -> Any:
        return None if value is None else self.kind.plain(value)


@dataclass(frozen=True)
class Several(Kind):
    """A list whose items are of one kind."""

    kind: Kind
    count: int | None = None

    @property
    def remedy(self) -> str:
        number = "a list" if self.count is None else f"a list of {self.count}"
        return f"give {number}, and for each item {self.kind.remedy.removeprefix('give ')}"

    def fits(self, value: Any) -> bool:
        right_length = isinstance(value, list) and self.count in (None, len(value))
        return right_length and all(map(self.kind.fits, value))

    def read(self, value: Any) -> Any:
        return tuple(map(self.kind.read, value))

    def plain(self, value: Any) -> Any:
        return list(map(self.kind.plain, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Patterns(Kind):
    """A mapping from patterns of names to values of one kind."""

    kind: Kind

    @property
    def remedy(self) -> str:
        return f"give a mapping such as {{pattern: value}}, and for each value {self.kind.remedy.removeprefix('give ')}"

    def fits(self, value: Any) -> bool:
        return not self.wrong("", value)

    def wrong(self, key: str, value: Any) -> list[Problem]:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) and name for name in value):
            return super().wrong(key, value)
        return [problem for name, item in value.items() for problem in self.kind.problems(_dotted(key, name), item)]

    def plain(self, value: Any) -> Any:
        return {k: self.kind.plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class Either(Kind):
    """What one of two kinds takes."""

    first: Kind
    second: Kind

    @property
    def remedy(self) -> str:
        return f"{self.first.remedy}, or {self.second.remedy.removeprefix('give ')}"

    def fits(self, value: Any) -> bool:
        return self.first.fits(value) or self.second.fits(value)


@dataclass(frozen=True)
class Section(Kind):
    """A mapping with the keys of a dataclass."""

    type: Any

    @property
    def kinds(self) -> dict[str, Kind]:
        """The kind of each setting, by name."""
        return {f.name: f.metadata[_KIND] for f in dataclasses.fields(self.type) if _KIND in f.metadata}

    @property
    def remedy(self) -> str:
        return f"give a section with the keys {', '.join(self.kinds)}"

    def fits(self, value: Any) -> bool:
        return not self.wrong("", value)

    def wrong(self, key: str, value: Any) -> list[Problem]:
        kinds = self.kinds
        if not isinstance(value, Mapping):
            return super().wrong(key, value)
        found = []
        for name in value:
            if name not in kinds:
                hint = _did_you_mean(name, kinds) or "; remove it"
                found.append(Problem(_dotted(key, name), f"{_dotted(key, name)} is no setting{hint}"))
        for name, kind in kinds.items():
            found += kind.problems(_dotted(key, name), value.get(name, MISSING))
        return found

    def read(self, value: Any) -> Any:
        return self.type(**{name: kind.read(value[name]) for name, kind in self.kinds.items()})

    def plain(self, value: Any) -> Any:
        kinds = self.kinds
        if not isinstance(value, Mapping):
            return value
        return {name: kinds[name].plain(item) if name in kinds else item for name, item in value.items()}


@dataclass(frozen=True)
class Variant(Kind):
    """One of several sections, told apart by the value of the key `by`."""

    by: str
    types: Mapping[str, Any]

    @property
    def remedy(self) -> str:
        return f"give a section with the key {self.by} and what belongs to it"

    def fits(self, value: Any) -> bool:
        return not self.wrong("", value)

    def wrong(self, key: str, value: Any) -> list[Problem]:
        if not isinstance(value, Mapping):
            return super().wrong(key, value)
        name = value.get(self.by, MISSING)
        unknown = Choice(lambda: self.types).problems(_dotted(key, self.by), name)
        return unknown or self._section(name).wrong(key, value)

    def read(self, value: Any) -> Any:
        return self._section(value[self.by]).read(value)

    def plain(self, value: Any) -> Any:
        name = value.get(self.by) if isinstance(value, Mapping) else None
        return self._section(name).plain(value) if isinstance(name, str) and name in self.types else value

    def _section(self, name: str) -> Section:
        return Section(self.types[name])


# ---- the fields of a section ----


def of(kind: Kind) -> Any:
    """A field of any kind."""
    return dataclasses.field(metadata={_KIND: kind})


def number(
    low: float | None = None, high: float | None = None, above: float | None = None, below: float | None = None
) -> Any:
    """A finite number in a range."""
    return of(Number(False, low, high, above, below))


def whole(low: int, high: int | None = None) -> Any:
    """A whole number of at least `low`, and at most `high` if that is given."""
    return of(Number(True, low, high))


def flag() -> Any:
    """True or false."""
    return choice(True, False)


def choice(*choices: Any) -> Any:
    """One of these words (or booleans)."""
    return of(Choice(lambda: choices))


def text(longest: int = 10_000, shortest: int = 1) -> Any:
    """Text of this length."""
    return of(Text(shortest, longest))


def path() -> Any:
    """The path of a file or folder."""
    return of(PathText())


def optional(field: Any, null: str = "switches it off") -> Any:
    """What another field takes, or null; `null` completes the sentence "null ..."."""
    return of(Optional(_kind(field), null))


def several(field: Any, count: int | None = None) -> Any:
    """A list of what another field takes, of `count` items if that is given."""
    return of(Several(_kind(field), count))


def either(first: Any, second: Any) -> Any:
    """What one of two other fields takes."""
    return of(Either(_kind(first), _kind(second)))


def patterns(field: Any) -> Any:
    """A mapping from patterns of names to what another field takes."""
    return of(Patterns(_kind(field)))


def section(type: Any) -> Any:
    """A section of its own."""
    return of(Section(type))


def variant(by: str, types: Mapping[str, Any]) -> Any:
    """One of several sections, told apart by the value of the key `by`."""
    return of(Variant(by, types))


def _kind(field: Any) -> Kind:
    return field.metadata[_KIND]


# ---- words ----


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) or math.isfinite(value)


def shown(value: Any) -> str:
    """A value as a message shows it: null, true and false as YAML has them, and cut where it is long."""
    words = {None: "null", True: "true", False: "false"}
    written = words[value] if value is None or isinstance(value, bool) else repr(value)
    return written if len(written) <= 80 else f"{written[:60]}... ({len(written):,} characters)"


def _dotted(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _did_you_mean(value: Any, choices: Collection[str]) -> str:
    near = get_close_matches(str(value)[:100], list(choices), 1)
    return f"; did you mean {near[0]}?" if near else ""
