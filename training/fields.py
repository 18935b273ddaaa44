"""The values that a setting may have. The annotation of a field states them, and this module checks them.

A section of the configuration is a frozen dataclass. Its fields have no defaults; the defaults are in configs/:

    @dataclass(frozen=True)
    class Log:
        interval: Annotated[int, ("low", 1)]
        interval_spectra: Annotated[int, ("low", 1)] | None

An annotation is a type (bool, int, float, str, Literal, tuple, Mapping, another section, or a union of these). Annotated adds conditions
as pairs (name, value), or a Kind:

    low, high, above, below     limits of a number; `low` and `high` belong to the range
    shortest, longest           limits of the length of a text
    path                        true for a text that is the path of a file or folder
    options                     the allowed texts
    null                        what null means, for a type that may be None
    by, types                   for one of several sections: the key that selects it, and a mapping from its values to the sections

`Section(type).problems` lists all wrong values of such a section, `read` makes an instance, and `plain` is the inverse of `read`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

MISSING = "???"  # OmegaConf's mark of a missing value
MOST = 10**15  # the largest allowed number
_SIMILAR = 0.75  # difflib's ratio of two names of which one may be meant by the other
# words that are booleans in YAML 1.1, but text here
YAML_WORDS = {"no": False, "off": False, "n": False, "yes": True, "on": True, "y": True}


@dataclass(frozen=True)
class Problem:
    """A message about the wrong value at a dotted key, with a remedy; `missing` if there is no value."""

    key: str
    message: str
    missing: bool = False

    def __str__(self) -> str:
        return self.message


# ---- the kinds of values ----


class Kind:
    """A set of values that a setting may have."""

    @property
    def remedy(self) -> str:
        """What to give instead of a wrong value."""
        raise NotImplementedError

    @property
    def example(self) -> str:
        """A value in a message."""
        return "<value>"

    def fits(self, value: Any) -> bool:
        """Whether a value is in the set."""
        return not self.wrong("", value)

    def hint(self, value: Any) -> str:
        """A guess what the user meant by a wrong value, as an addition to the remedy."""
        return ""

    def problems(self, key: str, value: Any) -> list[Problem]:
        """All problems of the value at a dotted key."""
        if isinstance(value, str) and value == MISSING:
            return [Problem(key, f"{key} is missing; give {key}={self.example}", missing=True)]
        return self.wrong(key, value)

    def wrong(self, key: str, value: Any) -> list[Problem]:
        """All problems of a value that is not missing."""
        return [] if self.fits(value) else [self.refusal(key, value)]

    def refusal(self, key: str, value: Any) -> Problem:
        """The problem that a value is not in the set."""
        return Problem(key, f"{key} is {shown(value)}; {self.remedy}{self.hint(value)}")

    def read(self, value: Any) -> Any:
        """The typed object for a valid value."""
        return value


@dataclass(frozen=True)
class Number(Kind):
    """A finite number in a range. A whole number may be written as 1e9, which YAML reads as a float."""

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
        if not is_number(value) or abs(value) > MOST or (self.whole and value != int(value)):
            return False
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def hint(self, value: Any) -> str:
        return f", and at most {MOST:.0e}" if is_number(value) and value > MOST else ""

    def read(self, value: Any) -> Any:
        return int(value) if self.whole else float(value)


@dataclass(frozen=True)
class Choice(Kind):
    """One of several texts or booleans; a function, if they come from a registry that may grow."""

    options: Collection[Any] | Callable[[], Collection[Any]]

    @property
    def choices(self) -> Collection[Any]:
        """The allowed texts and booleans now."""
        return self.options() if callable(self.options) else self.options

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
        return ""


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
        length = len(value) if value.strip() else 0
        return self.shortest <= length and len(value.encode(errors="replace")) <= self.longest

    def hint(self, value: Any) -> str:
        if isinstance(value, str) and not value.strip():
            return "; it is blank"
        return f"; as text it is written '\"{value}\"'" if is_number(value) or isinstance(value, bool) else ""


@dataclass(frozen=True)
class PathText(Text):
    """The path of a file or folder. A ~ at its start is the home directory, which not every shell replaces after "key="."""

    longest: int = 3500
    part: int = 255  # the longest name that file systems allow, in bytes

    @property
    def example(self) -> str:
        return "<path>"

    @property
    def remedy(self) -> str:
        return f"give a path of up to {self.longest:,} bytes, each name of it up to {self.part}"

    def fits(self, value: Any) -> bool:
        return super().fits(value) and all(len(name.encode(errors="replace")) <= self.part for name in value.split("/"))

    def read(self, value: Any) -> str:
        return os.path.expanduser(value)


@dataclass(frozen=True)
class Optional(Kind):
    """A value of another kind, or null; `null` says what null means."""

    kind: Kind
    null: str = "switches it off"

    @property
    def remedy(self) -> str:
        return f"{self.kind.remedy} (null {self.null})"

    def wrong(self, key: str, value: Any) -> list[Problem]:
        found = [] if value is None else self.kind.wrong(key, value)
        return [self.refusal(key, value) if problem.key == key else problem for problem in found]

    def hint(self, value: Any) -> str:
        return self.kind.hint(value)

    def read(self, value: Any) -> Any:
        return None if value is None else self.kind.read(value)


@dataclass(frozen=True)
class Several(Kind):
    """A list of values of one kind."""

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


@dataclass(frozen=True)
class Patterns(Kind):
    """A mapping from patterns of names to values of one kind."""

    kind: Kind

    @property
    def example(self) -> str:
        return "{...}"

    @property
    def remedy(self) -> str:
        return f"give a mapping such as {{pattern: value}}, and for each value {self.kind.remedy.removeprefix('give ')}"

    def wrong(self, key: str, value: Any) -> list[Problem]:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) and name for name in value):
            return [self.refusal(key, value)]
        return [problem for name, item in value.items() for problem in self.kind.problems(_dotted(key, name), item)]

    def read(self, value: Any) -> Any:
        return {name: self.kind.read(item) for name, item in value.items()}


@dataclass(frozen=True)
class Either(Kind):
    """A value of one of two kinds."""

    first: Kind
    second: Kind

    @property
    def remedy(self) -> str:
        return f"{self.first.remedy}, or {self.second.remedy.removeprefix('give ')}"

    def fits(self, value: Any) -> bool:
        return self.first.fits(value) or self.second.fits(value)

    def hint(self, value: Any) -> str:
        return self.first.hint(value) or self.second.hint(value)

    def read(self, value: Any) -> Any:
        return (self.first if self.first.fits(value) else self.second).read(value)


_KINDS: dict[type[Any], Mapping[str, Kind]] = {}


@dataclass(frozen=True)
class Section(Kind):
    """A mapping with the fields of a dataclass as keys; `owner` is its name if it is one of several sections."""

    type: type[Any]
    owner: str = ""

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """The kind of each setting, by name."""
        if self.type not in _KINDS:
            hints = get_type_hints(self.type, include_extras=True)
            _KINDS[self.type] = {field.name: kind_of(hints[field.name]) for field in dataclasses.fields(self.type)}
        return _KINDS[self.type]

    @property
    def remedy(self) -> str:
        return f"give a section with the keys {', '.join(self.kinds)}"

    def wrong(self, key: str, value: Any) -> list[Problem]:
        if not isinstance(value, Mapping):
            return [self.refusal(key, value)]
        found, of = [], f" of {self.owner}" if self.owner else ""
        for name in value:
            if name not in self.kinds:
                near = get_close_matches(str(name)[:100], list(self.kinds), 1, _SIMILAR)
                hint = f"; did you mean {near[0]}?" if near else "; remove it"
                found.append(Problem(_dotted(key, name), f"{_dotted(key, name)} is no setting{of}{hint}"))
        for name, kind in self.kinds.items():
            found += kind.problems(_dotted(key, name), value.get(name, MISSING))
        return found

    def read(self, value: Any) -> Any:
        return self.type(**{name: kind.read(value[name]) for name, kind in self.kinds.items()})


@dataclass(frozen=True)
class Variant(Kind):
    """One of several sections; the value of the key `by` selects it."""

    by: str
    types: Mapping[str, type[Any]]

    @property
    def remedy(self) -> str:
        return f"give a section with the key {self.by} and the keys that belong to its value"

    def wrong(self, key: str, value: Any) -> list[Problem]:
        if not isinstance(value, Mapping):
            return [self.refusal(key, value)]
        name = value.get(self.by, MISSING)
        unknown = Choice(self.types).problems(_dotted(key, self.by), name)
        if unknown:
            return unknown
        section = Section(self.types[name], name)
        absent = [_dotted(key, other) for other in section.kinds if other not in value]
        if not absent:
            return section.wrong(key, value)
        group = key.partition(".")[0]
        remedy = f"choose all of them with {group}="
        remedy += name if key == group else f", of which python train.py {group}= --help lists the choices"
        why = f"{key}.{self.by} is '{name}', but {key} has the settings of another {self.by}; {remedy}"
        own = section.wrong(key, {other: value[other] for other in section.kinds if other in value})
        return [Problem(absent[0], why), *(problem for problem in own if problem.key not in absent)]

    def read(self, value: Any) -> Any:
        return Section(self.types[value[self.by]]).read(value)


# ---- from annotations to kinds ----


def kind_of(hint: Any) -> Kind:
    """The kind of values that an annotation allows."""
    conditions: dict[str, Any] = {}
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        if isinstance(notes[0], Kind):
            return notes[0]
        conditions = dict(notes)
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType) and type(None) in parts:
        null = conditions.pop("null", Optional.null)
        rest: Any = Union.__getitem__(tuple(part for part in parts if part is not type(None)))
        return Optional(kind_of(Annotated[(rest, *conditions.items())] if conditions else rest), null)
    if "by" in conditions:
        return Variant(**conditions)
    if "options" in conditions or origin is Literal:
        return Choice(conditions.get("options", parts))
    if origin in (Union, types.UnionType):
        return Either(*map(kind_of, parts))
    if origin is tuple:
        return Several(kind_of(parts[0]), None if parts[1] is Ellipsis else len(parts))
    if origin is not None:
        return Patterns(kind_of(parts[1]))
    if hint is bool:
        return Choice((True, False))
    if hint in (int, float):
        return Number(hint is int, **conditions)
    if hint is str:
        return PathText() if "path" in conditions else Text(**conditions)
    return Section(hint)


def plain(value: Any) -> Any:
    """The inverse of `read`: dicts, lists, numbers and text, as in YAML and in checkpoints."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


# ---- words ----


def leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted key and the value of everything in nested mappings; an empty mapping is a value."""
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) or math.isfinite(value)


def shown(value: Any) -> str:
    """A value as text for a message: null, true and false as in YAML; a long value is cut."""
    words = {None: "null", True: "true", False: "false"}
    written = words[value] if value is None or isinstance(value, bool) else repr(value)
    return written if len(written) <= 80 else f"{written[:60]}... ({len(written):,} characters)"


def _dotted(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
