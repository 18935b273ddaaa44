"""From parameter names to optimizers: every parameter is given to exactly one, and a table says which. Pure: names and shapes, no tensors.

An assignment is a mapping from patterns to a manifold or to `adamw`. A pattern is a dotted piece of a parameter's name and matches
wherever it fits on whole components; a component may be a glob (`c_*`, `*`), a range of layers (`0-3`), or alternatives of these
(`wte|wpe`, `0-3|6`):

    attn                 transformer.h.7.attn.c_proj.weight, and everything else below attn
    attn.c_attn          the fused QKV matrices
    h.0-3.mlp            the MLPs of the first four layers
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

from .manifolds import MANIFOLDS

ADAMW = "adamw"

# What may be asked of a matrix whose vectors the model wants at unit length. Any other manifold would pull it another way after every
# step. Oblique is unit vectors too, those of the tall form's columns: it then keeps them alone.
_BESIDE_UNIT_LENGTH = (ADAMW, "euclidean", "oblique")


class AssignmentError(ValueError):
    """The assignment does not give every matrix exactly one geometry; `.problems` lists every reason."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)  # for pickle, which would pass the message only


@dataclass(frozen=True)
class Row:
    """One parameter: its name, shape, optimizer ("ManifoldMuon", "AdamW" or another's class), manifold or None, and whether a rule spoke of it.

    unit: the dimension along which its vectors are kept at unit length beside the optimizer, or None. norm: in which it steps, in words,
    if its optimizer asks for one. radius: the size of a manifold of fixed size. blocks: into how many matrices the rows are cut. lr_scale: the
    factor of its optimizer's learning rate.
    """

    name: str
    shape: tuple[int, ...]
    optimizer: str
    manifold: str | None
    ruled: bool
    unit: int | None = None
    norm: str | None = None
    radius: float = 1.0
    blocks: int = 1
    lr_scale: float = 1.0

    @property
    def geometry(self) -> str:
        """The manifold or norm, unit vectors and the factor of the learning rate in words, "-" for none."""
        words = [word for word in (self.manifold, self.norm) if word]
        words += [] if self.blocks == 1 else [f"{self.blocks} blocks"]
        words += [] if self.radius == 1 else [f"radius {self.radius:g}"]
        words += [] if self.unit is None else [("unit columns", "unit rows")[self.unit]]
        words += [] if self.lr_scale == 1 else [f"lr x {self.lr_scale:.4g}"]
        return ", ".join(words) or "-"


def _component_matches(pattern: str, component: str) -> bool:
    return any(_choice_matches(choice, component) for choice in pattern.split("|"))


def _choice_matches(choice: str, component: str) -> bool:
    if layers := re.fullmatch(r"(\d+)-(\d+)", choice):
        return component.isdigit() and int(layers[1]) <= int(component) <= int(layers[2])
    return fnmatchcase(component, choice)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern fits somewhere on whole components of a dotted parameter name."""
    wanted, have = pattern.split("."), name.split(".")
    starts = range(len(have) - len(wanted) + 1)
    return any(all(_component_matches(w, h) for w, h in zip(wanted, have[s:])) for s in starts)


def assign(
    shapes: Mapping[str, tuple[int, ...]],
    rules: Mapping[str, str],
    always_adamw: Iterable[str],
    unit_vectors: Mapping[str, int] | None = None,
    command_line: bool = True,
) -> list[Row]:
    """Give every parameter to one optimizer.

    Args:
        shapes: parameter name → shape.
        rules: pattern → manifold name or "adamw", for matrices.
        always_adamw: patterns of tables (embeddings, head), which no rule may claim. Vectors are AdamW's without asking.
        unit_vectors: parameter name → dimension along which its vectors are to be kept at unit length. A matrix given to the oblique
            manifold is left to it.
        command_line: whether the rules are the setting `assignment.rules`, which remedies then spell out.

    Raises:
        AssignmentError: listing every parameter matched by no rule or by several, every rule that matches nothing, every
            unknown manifold, and every matrix of unit vectors that would be put on another manifold as well.
    """
    unit = unit_vectors or {}
    hits = {name: [rule for rule in rules if matches(rule, name)] for name in shapes}
    tables = {name for name in shapes if any(matches(pattern, name) for pattern in always_adamw)}
    matrices = {name for name, shape in shapes.items() if len(shape) == 2} - tables
    if problems := _problems(rules, hits, tables, matrices, unit, command_line):
        raise AssignmentError(problems)
    rows = []
    for name, shape in shapes.items():
        choice = rules[hits[name][0]] if name in matrices else ADAMW
        optimizer, manifold = ("AdamW", None) if choice == ADAMW else ("ManifoldMuon", choice)
        kept = None if choice == "oblique" else unit.get(name)
        rows.append(Row(name, tuple(shape), optimizer, manifold, ruled=name in matrices, unit=kept))
    return rows


def _problems(
    rules: Mapping[str, str],
    hits: Mapping[str, Sequence[str]],
    tables: Collection[str],
    matrices: Collection[str],
    unit: Collection[str],
    command_line: bool,
) -> list[str]:
    """What is wrong with rules, of which `hits` match each parameter; unit: names of matrices of unit vectors."""
    choices = [*MANIFOLDS, ADAMW]
    problems = [
        f"assignment: rule '{rule}' asks for '{choice}'; choose one of {', '.join(choices)}"
        for rule, choice in rules.items()
        if choice not in choices
    ]
    claimed: dict[str, list[str]] = {}  # rule → tables
    unclear: dict[tuple[str, ...], list[str]] = {}  # none or several rules → matrices
    contested: dict[str, list[str]] = {}  # rule → matrices of unit vectors
    for name, found in hits.items():
        if name in tables and found:
            claimed.setdefault(found[0], []).append(name)
        if name in matrices and len(found) != 1:
            unclear.setdefault(tuple(found), []).append(name)
        elif name in matrices and name in unit and rules[found[0]] in MANIFOLDS.keys() - _BESIDE_UNIT_LENGTH:
            contested.setdefault(found[0], []).append(name)
    problems += [
        f"assignment: rule '{rule}' claims {listed(names)}, which is always AdamW's; narrow the rule, or optim.always_adamw"
        for rule, names in claimed.items()
    ]
    problems += [f"assignment: {_unclear(found, names, matrices)}" for found, names in unclear.items()]
    problems += [
        f"assignment: {listed(names)} would have two owners: the model keeps their vectors at unit length, and "
        f"rule '{rule}' puts them on '{rules[rule]}'; choose {', '.join(_BESIDE_UNIT_LENGTH)}, or model.unit_weights=false"
        for rule, names in contested.items()
    ]
    used = {rule for name, found in hits.items() if name in tables or name in matrices for rule in found}
    unused = [rule for rule in rules if rule not in used]
    kept = {rule: choice for rule, choice in rules.items() if rule in used} if command_line else {}
    problems += [
        f"assignment: rule '{rule}' matches no 2-D parameter, and all others are AdamW's; remove it"
        if any(rule in found for found in hits.values())
        else f"assignment: rule '{rule}' matches no matrix; {_meant(rule, kept, unclear.get((), []))}"
        for rule in unused
    ]
    return problems


def _unclear(hits: Sequence[str], names: Sequence[str], matrices: Collection[str]) -> str:
    """The sentence about matrices that several rules match, or none."""
    if hits:
        return f"several rules ({', '.join(map(repr, hits))}) match {listed(names)}; keep one of them"
    parts = names[0].split(".")
    alone = (
        part for part in parts[-2::-1] if not part.isdigit() and all(n in names for n in matrices if matches(part, n))
    )
    return f"no rule matches {listed(names)}; add one, such as {next(alone, names[0])}: adamw"


def _meant(pattern: str, kept: Mapping[str, str], left: Collection[str]) -> str:
    """What to do about a rule that matches no matrix: a similar part of the names that are left without a rule, or the `kept` rules alone."""
    if "|" in pattern and all(any(matches(part, name) for name in left) for part in pattern.split("|")):
        return "alternatives stand between two dots, such as h.0|2.attn for two layers"
    if near := similar(pattern, left):
        return near
    if not kept or not all(re.fullmatch(r"[\w.-]+", known) for known in kept):
        return "remove it"
    return f"remove it: assignment=custom 'assignment.rules={{{', '.join(f'{k}: {v}' for k, v in kept.items())}}}'"


def similar(pattern: str, names: Iterable[str]) -> str | None:
    """'did you mean ...?' with the part of the names most like the end of a pattern; None if none is similar."""
    components = {part for name in names for part in name.split(".") if not part.isdigit()}
    near = get_close_matches(pattern.split(".")[-1], components, 1)
    return f"did you mean '{near[0]}'?" if near else None


def listed(names: Iterable[str]) -> str:
    """Up to three names in quotes, those of equal layers as one, and how many more there are."""
    quoted = [f"'{name}'" for name in folded(names)]
    more = f" and {len(quoted) - 3} more" if len(quoted) > 3 else ""
    return ", ".join(quoted[:3]) + more


def by_pattern(
    names: Iterable[str],
    values: Mapping[str, Any],
    default: Any,
    key: str,
    owners: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The value of every parameter of one optimizer, by name: that of the pattern it matches, or the default.

    `key` is what the caller calls the mapping, and `owners` are all parameters and the names of their optimizers; both for messages.

    Raises:
        AssignmentError: a parameter is matched by several patterns, or a pattern matches none.
    """
    hits = {name: tuple(pattern for pattern in values if matches(pattern, name)) for name in names}
    several: dict[tuple[str, ...], list[str]] = {}
    for name, found in hits.items():
        if len(found) > 1:
            several.setdefault(found, []).append(name)
    problems = [
        f"{key}: several patterns ({', '.join(map(repr, found))}) match {listed(them)}; keep one of them"
        for found, them in several.items()
    ]
    used = {pattern for found in hits.values() for pattern in found}
    problems += [
        f"{key}: pattern '{pattern}' matches no matrix or vector of this optimizer; {_elsewhere(pattern, hits, owners or {})}"
        for pattern in values
        if pattern not in used
    ]
    if problems:
        raise AssignmentError(problems)
    return {name: values[found[0]] if found else default for name, found in hits.items()}


def _elsewhere(pattern: str, names: Collection[str], owners: Mapping[str, str]) -> str:
    """Why a pattern matches none of an optimizer's names, and the remedy."""
    owner = next((owner for name, owner in owners.items() if name not in names and matches(pattern, name)), None)
    if owner is not None:
        return f"'{pattern}' belongs to {owner} here; remove the pattern, or give the matrices another optimizer"
    if not names:
        return "it has none here; remove the pattern"
    return f"it has {listed(names)}; a weight that is tied to another one has the name of the first"


def parameter_table(rows: list[Row], aliases: Mapping[str, str] | None = None) -> str:
    """The assignment as text, equal layers folded into one line (`h.0-11`). `aliases` maps a name to a tied twin, for display."""
    aliases, lines = aliases or {}, [("", "shape", "optimizer", "manifold")]
    alike: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        alike.setdefault((_any_layer(row.name), shape, row.optimizer, row.geometry), []).append(row.name)
    for (_, shape, optimizer, geometry), names in alike.items():
        [name] = folded(names)
        lines.append((name + (f" (= {aliases[names[0]]})" if names[0] in aliases else ""), shape, optimizer, geometry))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def folded(names: Iterable[str]) -> list[str]:
    """Names with those of equal layers drawn into one: transformer.h.0-3.attn.c_attn.weight. The first number is the layer."""
    layers: dict[str, list[int]] = {}
    for name in names:
        layers.setdefault(_any_layer(name), []).extend(map(int, re.findall(r"\.(\d+)\.", name)[:1]))
    return [name.replace("#", _ranges(found), 1) if found else name for name, found in layers.items()]


def _any_layer(name: str) -> str:
    """A name with # for the number of its layer, the first number in it: transformer.h.#.attn.c_attn.weight."""
    return re.sub(r"\.\d+\.", ".#.", name, count=1)


def _ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] → "0-2,5"."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(sorted(layers)), key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
