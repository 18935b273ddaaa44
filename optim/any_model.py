"""ManifoldMuon for a model of any kind: which of its matrices get a manifold, and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .assignment import AssignmentError, Row, assign, by_pattern, listed, matches, similar
from .certified import CertifiedStep
from .manifold_muon import ManifoldMuon
from .stack import StepRule, divides

TABLES = (nn.Embedding, nn.EmbeddingBag)
"""Modules whose weights are tables, a row a token, and so AdamW's."""


def for_model(
    model: nn.Module,
    rules: Mapping[str, str],
    *,
    lr: float,
    adamw: Mapping[str, Any],
    adamw_for: Iterable[str] = (),
    blocks: Mapping[str, int] | None = None,
    radius: Mapping[str, float] | None = None,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    block_length: str = "each",
    cautious: bool = False,
    row_beta: float | None = None,
    rule: StepRule | None = None,
) -> tuple[ManifoldMuon, torch.optim.AdamW]:
    """The optimizers of a model: ManifoldMuon for the matrices that a rule gives a manifold, AdamW for everything else.

    The matrices are brought onto their manifolds here. Both are ordinary torch optimizers: call `step` and `zero_grad` of both, give each
    its schedule, save both states. Parameters without `requires_grad` belong to neither; tied ones count once.

    Args:
        rules: pattern of parameter names → a manifold or "adamw", see optim/assignment.py; {"*": "stiefel"} is every matrix. Each 2-D
            parameter must match exactly one. Embeddings (TABLES) and parameters of other shapes are AdamW's without a rule.
        lr: of ManifoldMuon, the length of a step in spectral norm.
        adamw: settings of torch.optim.AdamW, such as {"lr": 1e-3}. Its weight decay is for matrices and tables, not for vectors.
        adamw_for: patterns of further parameters that are AdamW's whatever the rules say: the output layer, as a rule.
        blocks: pattern → into how many matrices the rows are cut, such as {"in_proj_weight": 3} for queries, keys and values.
        radius: pattern → the size of a manifold of fixed size, such as {"linear1": 2.0}: W / 2 is on it; 1 for all others.
        momentum, nesterov, weight_decay, block_length, cautious, row_beta: see ManifoldMuon.
        rule: the step rule; None for the certified step. The published one takes neither `cautious` nor `row_beta`.

    Raises:
        AssignmentError: a 2-D parameter matches no rule or several, a pattern matches nothing, blocks that do not divide a matrix; or
            there is nothing for one of the two optimizers. ValueError: a setting is wrong, see ManifoldMuon.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = assigned(model, params, rules, adamw_for)
    muon, rest = [row for row in rows if row.manifold], [row for row in rows if not row.manifold]
    if not muon:
        raise AssignmentError(["no matrix has a manifold; use torch.optim.AdamW"])
    if not rest:
        raise AssignmentError(["no parameter is left to AdamW; construct ManifoldMuon"])
    vectors = {"params": [params[row.name] for row in rest if len(row.shape) < 2], "weight_decay": 0.0}
    others = {"params": [params[row.name] for row in rest if len(row.shape) >= 2]}
    for_rest = torch.optim.AdamW([group for group in (others, vectors) if group["params"]], **adamw)
    manifold_muon = ManifoldMuon(  # last: it moves the matrices
        [
            {"params": [params[name] for name in group["names"]], **group}
            for group in _groups(muon, blocks or {}, radius or {})
        ],
        rule or CertifiedStep(),
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        block_length=block_length,
        cautious=cautious,
        row_beta=row_beta,
    )
    return manifold_muon, for_rest


def assigned(
    model: nn.Module, params: Mapping[str, torch.Tensor], rules: Mapping[str, str], adamw_for: Iterable[str]
) -> list[Row]:
    """One row for each of `params`, as `for_model` assigns them; `parameter_table` prints them."""
    if isinstance(adamw_for, str):
        raise AssignmentError([f"adamw_for is one text; give a list of patterns: adamw_for=[{adamw_for!r}]"])
    adamw_for = tuple(adamw_for)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, TABLES)}
    unruled = {
        name for name, p in params.items() if id(p) in tables or any(matches(pattern, name) for pattern in adamw_for)
    }
    problems = [
        f"adamw_for: pattern '{pattern}' matches no parameter; {_remedy(pattern, model, params)}"
        for pattern in adamw_for
        if not any(matches(pattern, name) for name in params)
    ]
    rows: list[Row] = []
    try:
        shapes = {name: tuple(p.shape) for name, p in params.items() if name not in unruled}
        rows = assign(shapes, rules, (), command_line=False)
    except AssignmentError as error:
        problems += error.problems
    if problems:
        raise AssignmentError(problems)
    by_name = {row.name: row for row in rows}
    return [by_name.get(name) or Row(name, tuple(p.shape), "AdamW", None, ruled=False) for name, p in params.items()]


def _remedy(pattern: str, model: nn.Module, names: Collection[str]) -> str:
    """What to do about a pattern that matches none of the names of parameters which a model trains."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))  # also under the further names of tied weights
    own = next((first[id(p)] for name, p in every.items() if matches(pattern, name)), None)
    if own is None:
        return similar(pattern, every) or f"they are {listed(names)}"
    return f"its weight is tied to '{own}'; use that name" if own in names else "it is without requires_grad; remove it"


def _groups(rows: list[Row], blocks: Mapping[str, int], radius: Mapping[str, float]) -> list[dict[str, Any]]:
    """For each manifold, each cut into blocks and each radius, the names of its matrices.

    Raises:
        AssignmentError: a pattern of `blocks` or `radius` matches nothing, or blocks do not divide a matrix.
    """
    cuts = by_pattern([row.name for row in rows], blocks, 1, "blocks")
    if wrong := [row for row in rows if not divides(cuts[row.name], row.shape[0])]:
        raise AssignmentError(
            [f"blocks: {cuts[row.name]!r} do not divide the {row.shape[0]} rows of '{row.name}'" for row in wrong]
        )
    radii = by_pattern([row.name for row in rows], radius, 1.0, "radius")
    alike: dict[tuple[str, int, float], list[str]] = {}
    for row in rows:
        alike.setdefault((str(row.manifold), cuts[row.name], radii[row.name]), []).append(row.name)
    return [{"names": names, "manifold": m, "blocks": b, "radius": r} for (m, b, r), names in alike.items()]
