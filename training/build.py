"""From a configuration to a model and its optimizers: `build` makes both.

A configuration may transfer settings from another model size (training/transfer.py), and some models have vectors of unit length
(`GPT.unit_vectors`). `build` applies both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from model.config import GPTConfig
from model.gpt import GPT
from model.unit_norm import UnitNorm
from optim.assignment import AssignmentError, Row, assign
from optim.certified import CertifiedStep
from optim.iterators import IteratorError, iterator
from optim.manifold_muon import ManifoldMuon
from optim.modular import Modular
from optim.published import PublishedStep
from optim.stack import StepRule
from training import library
from training.capture import CudaGraphs
from training.groups import (
    Groups,
    adamw_groups,
    cut_and_sized,
    given_to_library,
    library_groups,
    modular_groups,
    muon_groups,
    norm_pairs,
    problems_of_tables,
)
from training.optimizers import Optimizers
from training.settings import CertifiedRule, Library, Optim, PublishedRule, Settings
from training.settings import Modular as ModularSettings
from training.transfer import transferred


def build(cfg: Settings, device: torch.device | str = "cpu") -> tuple[GPT, Optimizers]:
    """The model of a configuration, with weights drawn from torch's global generator, and its optimizers.

    Raises:
        AssignmentError, LookupError: see `build_optimizers`.
    """
    model = GPT(gpt_config(cfg)).to(device)
    optimizers = build_optimizers(model, transferred(cfg), model.unit_vectors())
    if cfg.capture:
        optimizers.capture(CudaGraphs(torch.device(device)))
    return model, optimizers


def gpt_config(cfg: Settings) -> GPTConfig:
    """The settings of the model, after the transfer of learning rates and scales."""
    cfg = transferred(cfg)
    return GPTConfig(**vars(cfg.model), **vars(cfg.attention), **vars(cfg.init), residual=cfg.residual)


def step_rule(settings: Optim) -> StepRule:
    """The step rule of ManifoldMuon."""
    rule = settings.muon.rule
    if not isinstance(rule, (CertifiedRule, PublishedRule)):
        raise TypeError(f"no step rule is made of {rule}; name it in step_rule of training/build.py")
    chosen = None if rule.iterator is None else iterator(rule.iterator)
    if isinstance(rule, CertifiedRule):
        return CertifiedStep(rule.quality, rule.products, rule.length, rule.norm_cap, rule.compile, chosen)
    dtype = getattr(torch, rule.msign_dtype)
    return PublishedStep(
        rule.dual_steps, rule.alpha, rule.msign_steps, dtype, rule.decay_manifolds, rule.retraction, chosen
    )


def rehearse(
    shapes: Mapping[str, tuple[int, ...]], cfg: Settings, unit_vectors: Mapping[str, int] | None = None
) -> tuple[list[Row], list[str]]:
    """What `build_optimizers` would assign to parameters of these names and shapes, and its errors, with remedies."""
    matrices = cfg.optim.of_matrices()
    problems = library.problems(matrices) if isinstance(matrices, Library) else []
    problems += problems_of_tables(shapes, cfg.optim)
    rows: list[Row] = []
    try:
        step_rule(cfg.optim)
    except IteratorError as error:
        key = "products" if isinstance(cfg.optim.muon.rule, CertifiedRule) else "msign_dtype"
        problems.append(
            f"optim.muon.rule.iterator: {error}; optim.muon.rule.{key}=float32 is the first, and scripts/design_iterator.py "
            "with safety=1.01 prints the second"
        )
    try:
        rows = assign(shapes, cfg.assignment.rules or {}, cfg.optim.always_adamw, unit_vectors)
        rows, mine, _ = _shared_out(rows, cfg.optim)
        norm_pairs(shapes, cfg.optim.norms)
    except AssignmentError as error:
        return rows, [*problems, *error.problems]
    if not mine and any(value is not None for value in vars(cfg.optim.matrices).values()):
        problems.append(
            "optim.matrices has no effect here: AdamW has every matrix; set optim.adamw, or choose another assignment"
        )
    return rows, problems


def _shared_out(rows: list[Row], optim: Optim) -> tuple[list[Row], Groups, Groups]:
    """The rows with the optimizers of the configuration, and the groups of the matrices' optimizer and of AdamW.

    Raises:
        AssignmentError: see training/groups.py.
    """
    matrices = optim.of_matrices()
    if isinstance(matrices, ModularSettings):
        return *modular_groups(rows, optim.norms), []
    if isinstance(matrices, Library):
        rows = given_to_library(rows, library.display_name(matrices))
        groups = library_groups(rows, matrices)
    else:
        rows = cut_and_sized(rows, matrices)
        groups = muon_groups(rows, matrices)
    rest = adamw_groups(rows, optim.adamw)
    of_both = ((matrices.lr, groups), (optim.adamw.lr, rest))
    scales = {name: group["lr"] / lr for lr, found in of_both if lr for names, group in found for name in names}
    return [replace(row, lr_scale=scales.get(row.name, 1.0)) for row in rows], groups, rest


def _optimizer_of_matrices(groups: list[dict[str, Any]], optim: Optim) -> tuple[str, torch.optim.Optimizer]:
    """The optimizer of the matrices (of all parameters, if it is Modular), and its name."""
    matrices = optim.of_matrices()
    if isinstance(matrices, ModularSettings):
        return "Modular", Modular(groups, **vars(matrices))
    if isinstance(matrices, Library):
        return library.display_name(matrices), library.make(matrices, groups)
    keys = ("lr", "momentum", "weight_decay", "nesterov", "block_length", "cautious", "row_beta")
    return "ManifoldMuon", ManifoldMuon(groups, step_rule(optim), **{key: getattr(matrices, key) for key in keys})


def build_optimizers(model: nn.Module, cfg: Settings, unit_vectors: Mapping[str, int] | None = None) -> Optimizers:
    """The optimizers of a model; weights are retracted onto their manifolds.

    Args:
        model: any module; only parameter names and shapes matter. Tied parameters count once, under their first name.
        cfg: the configuration; only `assignment.rules` and `optim` are used.
        unit_vectors: see `assign`; normalised here, and by every `Optimizers.step`.

    Raises:
        AssignmentError: see `assign` and training/groups.py. LookupError: there is no optimizer `optim.library.optimizer`.
    """
    params, adamw = dict(model.named_parameters()), cfg.optim.adamw
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    rows = assign(shapes, cfg.assignment.rules or {}, cfg.optim.always_adamw, unit_vectors)
    rows, mine, rest = _shared_out(rows, cfg.optim)

    def with_params(groups: Groups) -> list[dict[str, Any]]:
        return [{"params": [params[name] for name in names], "names": names, **group} for names, group in groups]

    named: dict[str, torch.optim.Optimizer] = {}
    if mine:
        name, optimizer = _optimizer_of_matrices(with_params(mine), cfg.optim)
        named[name] = optimizer
    if rest:
        fused = adamw.fused == "always" or any(params[name].is_cuda for names, _ in rest for name in names)
        named["AdamW"] = torch.optim.AdamW(
            with_params(rest), lr=adamw.lr, betas=adamw.betas, eps=adamw.eps, fused=fused
        )
    peak_lr = {
        name: [group.get("lr", optimizer.defaults["lr"]) for _, group in groups]
        for (name, optimizer), groups in zip(named.items(), filter(None, (mine, rest)))
    }
    unit_norm = UnitNorm([(params[r.name], r.unit) for r in rows if r.unit is not None])
    return Optimizers(named, peak_lr, rows, unit_norm)
