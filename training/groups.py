"""From rows of the assignment to the parameter groups of the optimizers, by the patterns of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from optim.assignment import AssignmentError, Row, by_pattern, folded, listed, matches
from optim.manifolds import MANIFOLDS
from optim.modular import norm_of
from training.settings import AdamW, Library, Muon, Norms, Optim

Groups = list[tuple[list[str], dict[str, Any]]]
"""Parameter groups: names of parameters, and what they share."""

USUAL_TABLES = ("wte", "wpe", "lm_head")
"""The tables that models of this project may have: of tokens, of positions, and the head."""


def owners(rows: list[Row]) -> dict[str, str]:
    """The name of each parameter's optimizer."""
    return {row.name: row.optimizer for row in rows}


def muon_groups(rows: list[Row], muon: Muon) -> Groups:
    """ManifoldMuon's parameter groups: names of the matrices that share a manifold, its radius, a learning rate and a cut into blocks.

    Raises:
        AssignmentError: see `by_pattern`; or the step rule does not know an option.
    """
    mine = [row.name for row in rows if row.manifold]
    scales = by_pattern(mine, muon.lr_scale or {}, 1.0, "optim.muon.lr_scale", owners(rows))
    groups: dict[tuple, list[str]] = {}  # by manifold, factor of the rate, blocks, radius
    options = {
        "block_length": muon.block_length != "each",
        "cautious": muon.cautious,
        "row_beta": muon.row_beta is not None,
    }
    problems = [
        f"optim.muon.{name} is an option of the certified step, but the step rule is '{muon.rule.kind}'; use optim=manifold_muon, "
        f"or leave optim.muon.{name} as it is in configs/optim"
        for name, given in options.items()
        if mine and given and muon.rule.kind == "published"
    ]
    for row in rows:
        if row.manifold:
            groups.setdefault((row.manifold, scales[row.name], row.blocks, row.radius), []).append(row.name)
    if problems:
        raise AssignmentError(problems)
    return [
        (names, {"manifold": manifold, "lr": muon.lr * scale, "blocks": cut, "radius": radius})
        for (manifold, scale, cut, radius), names in groups.items()
    ]


def cut_and_sized(rows: list[Row], muon: Muon) -> list[Row]:
    """The rows, with the blocks of each matrix and the radius of its manifold.

    Raises:
        AssignmentError: see `by_pattern`; or blocks that do not divide the rows, a radius that is 0, or one for a manifold without a fixed size.
    """
    mine = [row for row in rows if row.manifold]
    names = [row.name for row in mine]
    blocks = by_pattern(names, muon.blocks or {}, 1, "optim.muon.blocks", owners(rows))
    radii = by_pattern(names, muon.radius or {}, 1.0, "optim.muon.radius", owners(rows))
    undivided: dict[tuple[int, int], list[str]] = {}  # by blocks and rows
    unsized: dict[tuple[str, float], list[str]] = {}  # by manifold and radius
    for row in mine:
        cut, radius = blocks[row.name], radii[row.name]
        if row.shape[0] % cut:
            undivided.setdefault((cut, row.shape[0]), []).append(row.name)
        if row.manifold and radius != 1 and not (radius > 0 and MANIFOLDS[row.manifold].sized):
            unsized.setdefault((row.manifold, radius), []).append(row.name)
    sized = ", ".join(name for name, own in MANIFOLDS.items() if own.sized)
    problems = [
        *(
            f"optim.muon.blocks of {listed(wrong)} is {cut}; give a whole number that divides its {height} rows"
            for (cut, height), wrong in undivided.items()
        ),
        *(
            f"optim.muon.radius of {listed(wrong)} on '{manifold}' is {radius:g}; give a number above 0, or 1 for a set of matrices "
            f"without a fixed size; these have one: {sized}"
            for (manifold, radius), wrong in unsized.items()
        ),
    ]
    if problems:
        raise AssignmentError(problems)
    return [
        replace(row, blocks=blocks[row.name], radius=float(radii[row.name])) if row.manifold else row for row in rows
    ]


def problems_of_tables(shapes: Mapping[str, tuple[int, ...]], optim: Optim) -> list[str]:
    """Patterns of tables that match no parameter. Those of USUAL_TABLES may: not every model has all of them."""
    lists = {"optim.always_adamw": optim.always_adamw, "optim.norms.tables": optim.norms.tables}
    return [
        f"{key}: the pattern '{pattern}' matches no parameter; correct it, or leave it out"
        for key, patterns in lists.items()
        for pattern in patterns
        if pattern not in USUAL_TABLES and not any(matches(pattern, name) for name in shapes)
    ]


def norm_pairs(shapes: Mapping[str, tuple[int, ...]], norms: Norms) -> dict[str, tuple[str, str]]:
    """The norms of input and output of each parameter.

    Raises:
        AssignmentError: see `by_pattern`; or a parameter has no such norm.
    """
    given: dict[str, tuple[str, str] | None] = by_pattern(shapes, norms.patterns or {}, None, "optim.norms.patterns")
    source, target = norms.others
    tables = {name for name in shapes if any(matches(pattern, name) for pattern in norms.tables)}
    pairs = {name: pair or ("one" if name in tables else source, target) for name, pair in given.items()}
    problems = {}
    for name, pair in pairs.items():
        try:
            norm_of(torch.empty(shapes[name], device="meta"), *pair)
        except ValueError as error:
            problems[f"optim.norms: {error}"] = name
    if problems:
        raise AssignmentError([f"{problem} (for '{name}')" for problem, name in problems.items()])
    return pairs


def modular_groups(rows: list[Row], norms: Norms) -> tuple[list[Row], Groups]:
    """The rows, all given to Modular, and its parameter groups: names of the parameters that share their norms.

    Raises:
        AssignmentError: see `norm_pairs`; or a matrix is on a manifold, of which Modular knows nothing.
    """
    held = {row.manifold: row.name for row in rows if row.manifold not in (None, "euclidean")}
    if held:
        raise AssignmentError(
            [
                f"assignment: '{manifold}' is for '{name}', but optim.modular knows no manifolds; use assignment=unconstrained"
                for manifold, name in held.items()
            ]
        )
    groups: dict[tuple[str, str], list[str]] = {}
    pairs = norm_pairs({row.name: row.shape for row in rows}, norms)
    for name, pair in pairs.items():
        groups.setdefault(pair, []).append(name)
    rows = [replace(row, optimizer="Modular", manifold=None, norm=" → ".join(pairs[row.name])) for row in rows]
    return rows, [(names, {"input": source, "output": target}) for (source, target), names in groups.items()]


def given_to_library(rows: list[Row], name: str) -> list[Row]:
    """The rows, with the matrices given to a library's optimizer of this name, which knows no manifolds.

    Raises:
        AssignmentError: a matrix is on a manifold, or there are none for it.
    """
    held: dict[str, list[str]] = {}
    for row in rows:
        if row.manifold not in (None, "euclidean"):
            held.setdefault(row.manifold, []).append(row.name)
    problems = [
        f"assignment: '{manifold}' is for {folded(names)[0]}, but {name}, which optim.library chooses, knows no manifolds; "
        "use assignment=unconstrained, or optim=manifold_muon"
        for manifold, names in held.items()
    ]
    if not any(row.manifold for row in rows):
        problems.append(
            f"assignment: no matrix is left for {name} of optim.library; use assignment=unconstrained, or optim=manifold_muon"
        )
    if problems:
        raise AssignmentError(problems)
    return [replace(row, optimizer=name) if row.manifold else row for row in rows]


def library_groups(rows: list[Row], library: Library) -> Groups:
    """The parameter groups of a library's optimizer: names of the matrices that share a learning rate.

    Raises:
        AssignmentError: see `by_pattern`.
    """
    groups: dict[float, list[str]] = {}
    mine = [row.name for row in rows if row.manifold]
    for name, scale in by_pattern(mine, library.lr_scale or {}, 1.0, "optim.library.lr_scale", owners(rows)).items():
        groups.setdefault(scale, []).append(name)
    return [(names, {"lr": library.lr * scale}) for scale, names in groups.items()]


def adamw_groups(rows: list[Row], adamw: AdamW) -> Groups:
    """AdamW's parameter groups: names of the parameters that share a weight decay (vectors have none) and a learning rate.

    Raises:
        AssignmentError: see `by_pattern`.
    """
    mine = {row.name: row for row in rows if row.optimizer == "AdamW"}
    groups: dict[tuple[float, float], list[str]] = {}
    for name, scale in by_pattern(mine, adamw.lr_scale or {}, 1.0, "optim.adamw.lr_scale", owners(rows)).items():
        decay = adamw.weight_decay if len(mine[name].shape) >= 2 else 0.0
        groups.setdefault((decay, adamw.lr * scale), []).append(name)
    return [(names, {"weight_decay": decay, "lr": lr}) for (decay, lr), names in groups.items()]
