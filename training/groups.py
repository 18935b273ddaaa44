"""From rows of the assignment to the parameter groups of both optimizers, by the patterns of the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from optim.assignment import AssignmentError, Row, matches
from training.settings import AdamW, Muon


def by_pattern(names: Iterable[str], values: Mapping[str, Any], default: Any, key: str) -> dict[str, Any]:
    """The value of every parameter of one optimizer, by name: that of the pattern it matches, or the default.

    `key` is what the configuration calls the mapping, for messages.

    Raises:
        AssignmentError: a parameter is matched by several patterns, or a pattern matches none.
    """
    hits = {name: [pattern for pattern in values if matches(pattern, name)] for name in names}
    problems = [
        f"{key}: '{name}' is matched by several patterns ({', '.join(map(repr, found))}); keep one of them"
        for name, found in hits.items()
        if len(found) > 1
    ]
    used = {pattern for found in hits.values() for pattern in found}
    problems += [
        f"{key}: pattern '{pattern}' matches no matrix or vector of this optimizer; see the table of parameters for names"
        for pattern in values
        if pattern not in used
    ]
    if problems:
        raise AssignmentError(problems)
    return {name: values[found[0]] if found else default for name, found in hits.items()}


def muon_groups(rows: list[Row], muon: Muon) -> list[tuple[list[str], dict[str, Any]]]:
    """ManifoldMuon's parameter groups: names of the matrices that share a manifold, a learning rate and a cut into blocks.

    Raises:
        AssignmentError: see `by_pattern`; or the blocks do not divide a matrix's rows, or a factor is not positive.
    """
    mine = [row.name for row in rows if row.manifold]
    scales = by_pattern(mine, muon.lr_scale or {}, 1.0, "optim.muon.lr_scale")
    blocks = by_pattern(mine, muon.blocks or {}, 1, "optim.muon.blocks")
    groups: dict[tuple, list[str]] = {}
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
        if not row.manifold:
            continue
        scale, cut = scales[row.name], blocks[row.name]
        if not scale >= 0:
            problems.append(f"optim.muon.lr_scale of '{row.name}' is {scale}; give a factor, at least 0")
        if not (isinstance(cut, int) and cut > 0 and row.shape[0] % cut == 0):
            problems.append(
                f"optim.muon.blocks of '{row.name}' is {cut}; give a whole number that divides its {row.shape[0]} rows"
            )
        groups.setdefault((row.manifold, scale, cut), []).append(row.name)
    if problems:
        raise AssignmentError(problems)
    return [
        (names, {"manifold": manifold, "lr": muon.lr * scale, "blocks": cut})
        for (manifold, scale, cut), names in groups.items()
    ]


def adamw_groups(rows: list[Row], adamw: AdamW) -> list[tuple[list[str], dict[str, Any]]]:
    """AdamW's parameter groups: names of the parameters that share a weight decay (vectors have none) and a learning rate.

    Raises:
        AssignmentError: see `by_pattern`.
    """
    mine = {row.name: row for row in rows if row.optimizer == "AdamW"}
    groups: dict[tuple[float, float], list[str]] = {}
    for name, scale in by_pattern(mine, adamw.lr_scale or {}, 1.0, "optim.adamw.lr_scale").items():
        decay = adamw.weight_decay if len(mine[name].shape) >= 2 else 0.0
        groups.setdefault((decay, adamw.lr * scale), []).append(name)
    return [(names, {"weight_decay": decay, "lr": lr}) for (decay, lr), names in groups.items()]
