"""From a configuration to a model and its optimizers. No other module does this.

A configuration may transfer settings from another model size (training/transfer.py), and some models have vectors of unit length
(`GPT.unit_vectors`). `build` applies both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from model.config import GPTConfig
from model.gpt import GPT
from model.unit_norm import UnitNorm
from optim.assignment import AssignmentError, Row, assign
from optim.certified import CertifiedStep
from optim.manifold_muon import ManifoldMuon, StepRule
from optim.published import PublishedStep
from training import library
from training.groups import adamw_groups, given_to_library, library_groups, muon_groups
from training.optimizers import Optimizers
from training.settings import CertifiedRule, Library, Muon, Optim, Settings
from training.transfer import transferred


def build(cfg: Settings, device: torch.device | str = "cpu") -> tuple[GPT, Optimizers]:
    """The model of a configuration, with weights drawn from torch's global generator, and its optimizers.

    Raises:
        AssignmentError: see `build_optimizers`.
    """
    model = GPT(gpt_config(cfg)).to(device)
    return model, build_optimizers(model, transferred(cfg), model.unit_vectors())


def gpt_config(cfg: Settings) -> GPTConfig:
    """The settings of the model, after the transfer of learning rates and scales."""
    cfg = transferred(cfg)
    return GPTConfig(**vars(cfg.model), **vars(cfg.attention), **vars(cfg.init), residual=cfg.residual)


def step_rule(settings: Optim) -> StepRule:
    """The step rule of ManifoldMuon."""
    rule = settings.muon.rule
    if isinstance(rule, CertifiedRule):
        return CertifiedStep(rule.quality, rule.products, rule.length, rule.norm_cap, rule.compile)
    dtype = getattr(torch, rule.msign_dtype)
    return PublishedStep(rule.dual_steps, rule.alpha, rule.msign_steps, dtype, rule.decay_manifolds, rule.retraction)


def rehearse(
    shapes: Mapping[str, tuple[int, ...]], cfg: Settings, unit_vectors: Mapping[str, int] | None = None
) -> tuple[list[Row], list[str]]:
    """What `build_optimizers` would assign to parameters of these names and shapes, and its errors, with remedies."""
    matrices = cfg.optim.of_matrices()
    found = library.problems(matrices) if isinstance(matrices, Library) else []
    rows: list[Row] = []
    try:
        rows = assign(shapes, cfg.assignment.rules or {}, cfg.optim.always_adamw, unit_vectors)
        rows, *_ = _shared_out(rows, cfg.optim)
    except AssignmentError as error:
        found += error.problems
    return rows, found


Groups = list[tuple[list[str], dict[str, Any]]]


def _shared_out(rows: list[Row], optim: Optim) -> tuple[list[Row], Groups, Groups]:
    """The rows with the optimizers of the configuration, and the groups of the matrices' optimizer and of AdamW.

    Raises:
        AssignmentError: see training/groups.py.
    """
    matrices = optim.of_matrices()
    if isinstance(matrices, Library):
        rows = given_to_library(rows, library.display_name(matrices))
        groups = library_groups(rows, matrices)
    else:
        groups = muon_groups(rows, matrices)
    return rows, groups, adamw_groups(rows, optim.adamw)


def build_optimizers(model: nn.Module, cfg: Settings, unit_vectors: Mapping[str, int] | None = None) -> Optimizers:
    """The optimizers of a model; weights are retracted onto their manifolds.

    Args:
        model: any module; only parameter names and shapes matter. Tied parameters count once, under their first name.
        cfg: the configuration; only `assignment.rules` and `optim` are used.
        unit_vectors: see `assign`; normalised here, and by every `Optimizers.step`.

    Raises:
        AssignmentError: see `assign` and training/groups.py. LookupError: there is no optimizer `optim.library.optimizer`.
    """
    params, matrices, adamw = dict(model.named_parameters()), cfg.optim.of_matrices(), cfg.optim.adamw
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    rows = assign(shapes, cfg.assignment.rules or {}, cfg.optim.always_adamw, unit_vectors)
    rows, mine, rest = _shared_out(rows, cfg.optim)

    def with_params(groups: Groups) -> list[dict[str, Any]]:
        return [{"params": [params[name] for name in names], "names": names, **group} for names, group in groups]

    named: dict[str, torch.optim.Optimizer] = {}
    if mine and isinstance(matrices, Library):
        named[library.display_name(matrices)] = library.make(matrices, with_params(mine))
    elif mine and isinstance(matrices, Muon):
        common = {"lr": matrices.lr, "momentum": matrices.momentum, "weight_decay": matrices.weight_decay}
        named["ManifoldMuon"] = ManifoldMuon(
            with_params(mine), step_rule(cfg.optim), nesterov=matrices.nesterov, **common
        )
    if rest:
        named["AdamW"] = torch.optim.AdamW(with_params(rest), lr=adamw.lr, betas=adamw.betas, eps=adamw.eps, fused=True)
    return Optimizers(named, rows, UnitNorm([(params[r.name], r.unit) for r in rows if r.unit is not None]))
