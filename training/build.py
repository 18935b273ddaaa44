"""From a configuration to a model and its optimizers. No other module does this.

A configuration may transfer settings from another model size (training/transfer.py), and some models have vectors of unit length
(`GPT.unit_vectors`). `build` applies both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.config import GPTConfig
from model.gpt import GPT
from model.unit_norm import UnitNorm
from optim.assignment import AssignmentError, Row, assign, folded
from optim.certified import CertifiedStep
from optim.manifold_muon import ManifoldMuon, StepRule
from optim.published import PublishedStep
from training.groups import adamw_groups, muon_groups
from training.settings import CertifiedRule, Optim, Settings
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


class Optimizers:
    """ManifoldMuon and AdamW (each if it has parameters) as one optimizer. After each step, unit vectors are normalised.

    Iterating yields the torch optimizers. `.rows` is the assignment, `.muon` the ManifoldMuon or None.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], rows: list[Row], unit_norm: UnitNorm) -> None:
        self.optimizers, self.rows, self.unit_norm = optimizers, rows, unit_norm
        self.peak_lr = [[float(g["lr"]) for g in o.param_groups] for o in optimizers]

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.optimizers)

    @property
    def muon(self) -> ManifoldMuon | None:
        """The optimizer of the matrices with a manifold or `euclidean`; None if there are none."""
        return next((o for o in self.optimizers if isinstance(o, ManifoldMuon)), None)

    def rates(self, multiplier: float) -> dict[str, float]:
        """The learning rate of the first group of each optimizer, by the name of its class."""
        return {type(o).__name__: peaks[0] * multiplier for o, peaks in zip(self.optimizers, self.peak_lr)}

    def set_lr(self, multiplier: float) -> None:
        """Set the learning rate of every group to `multiplier` times its peak."""
        for optimizer, peaks in zip(self.optimizers, self.peak_lr):
            for group, peak in zip(optimizer.param_groups, peaks):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(peak * multiplier)
                else:
                    group["lr"] = peak * multiplier

    def step(self, skip: Tensor | None = None) -> None:
        """One update by every optimizer; if `skip` (0-d bool, on the device) is true, none. There is no host sync.

        `skip` is passed as `found_inf`, the attribute with which torch.amp.GradScaler makes fused optimizers skip an update.
        """
        for optimizer in self.optimizers:
            optimizer.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]  # as torch does
            if isinstance(optimizer, ManifoldMuon):
                optimizer.step(wait=False)  # its new weights are under way while AdamW steps
            else:
                optimizer.step()
        if self.muon is not None:
            self.muon.receive()
        self.unit_norm()

    def watch(self, on: bool) -> None:
        """Whether ManifoldMuon keeps its next step for the certificates."""
        if self.muon is not None:
            self.muon.watched = on

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def place(self, params: Mapping[str, Tensor], state_like: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Let AdamW update other tensors of the same names and shapes, such as split ones; ManifoldMuon's stay with their owners alone.

        `state_like(state, parameter)` returns the state (of the shape of the parameter) as the new parameter needs it.
        """
        if self.muon is not None:
            self.muon.owners_keep = True
        for optimizer in (o for o in self.optimizers if o is not self.muon):
            for group in optimizer.param_groups:
                for i, (name, old) in enumerate(zip(group["names"], group["params"])):
                    new = group["params"][i] = params[name]
                    state = optimizer.state.pop(old, {})
                    if state:
                        optimizer.state[new] = {
                            k: state_like(v, new) if v.shape == new.shape else v for k, v in state.items()
                        }

    def state_dict(self) -> dict[str, Any]:
        """One state dict per optimizer, by class name."""
        return {type(o).__name__: o.state_dict() for o in self.optimizers}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Load what `state_dict` returned, where optimizer, name and shape are the same. All ranks must call.

        Settings and learning rates are those of the configuration. State that does not fit is left at its start. A weight whose manifold
        has changed is retracted onto the new one. The parameters must already have their saved values.

        Returns:
            One line for everything that was not loaded unchanged; empty for the same assignment.
        """
        missed = [line for optimizer in self.optimizers for line in _take_over(optimizer, state)]
        if self.muon is None:
            return missed
        saved = [group for part in state.values() for group in part["param_groups"]]
        before = {name: (g.get("manifold"), g.get("blocks")) for g in saved for name in g.get("names", ())}
        now = {name: (g["manifold"], g["blocks"]) for g in self.muon.param_groups for name in g["names"]}
        moved = [n for n, place in now.items() if n in before and before[n] != place and place[0] != "euclidean"]
        self.muon.bring_onto_manifold(moved)
        return missed + [f"{name}: brought onto its manifold" for name in folded(moved)]


def _take_over(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> list[str]:
    """Load the saved state that fits into an optimizer, by parameter name; returns a line for everything left at its start."""
    kind, fresh = type(optimizer).__name__, optimizer.state_dict()
    params = {n: p for group in optimizer.param_groups for n, p in zip(group["names"], group["params"])}
    saved = _state_by_name(state.get(kind, {"state": {}, "param_groups": []}), list(params))
    taken: dict[int, dict[str, Tensor]] = {}
    missed: dict[str, list[str]] = {}
    for index, (name, p) in enumerate(params.items()):
        old, start = saved.get(name, {}), fresh["state"].get(index)
        # AdamW creates its state in its first step: numbers, and tensors of the shape of the parameter.
        wanted = start or {key: value if value.ndim == 0 else p for key, value in old.items()}
        fits = {key: old[key] for key, value in wanted.items() if key in old and old[key].shape == value.shape}
        lost = [key for key in wanted if key not in fits]
        if lost or name not in saved:
            missed.setdefault(", ".join(lost) or "state", []).append(name)
        taken[index] = fits if start or not lost else {}
    optimizer.load_state_dict({"state": taken, "param_groups": fresh["param_groups"]})
    return [
        f"{kind}'s {what} of {name}: starts from scratch" for what, names in missed.items() for name in folded(names)
    ]


def _state_by_name(saved: Mapping[str, Any], order: Sequence[str]) -> dict[str, Mapping[str, Tensor]]:
    """Parameter name → its state. The oldest checkpoints have no names; their parameters are in the order `order`."""
    indices = [i for group in saved["param_groups"] for i in group["params"]]
    if all("names" in group for group in saved["param_groups"]):
        order = [name for group in saved["param_groups"] for name in group["names"]]
    return {name: saved["state"].get(i, {}) for name, i in zip(order, indices)} if len(order) == len(indices) else {}


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
    rows: list[Row] = []
    try:
        rows = assign(shapes, cfg.assignment.rules or {}, cfg.optim.always_adamw, unit_vectors)
        muon_groups(rows, cfg.optim.muon)
        adamw_groups(rows, cfg.optim.adamw)
    except AssignmentError as error:
        return rows, error.problems
    return rows, []


def build_optimizers(model: nn.Module, cfg: Settings, unit_vectors: Mapping[str, int] | None = None) -> Optimizers:
    """The optimizers of a model; weights are retracted onto their manifolds.

    Args:
        model: any module; only parameter names and shapes matter. Tied parameters count once, under their first name.
        cfg: the configuration; only `assignment.rules` and `optim` are used.
        unit_vectors: see `assign`; normalised here, and by every `Optimizers.step`.

    Raises:
        AssignmentError: see `assign`, `muon_groups` and `adamw_groups`.
    """
    params, muon, adamw = dict(model.named_parameters()), cfg.optim.muon, cfg.optim.adamw
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    rows = assign(shapes, cfg.assignment.rules or {}, cfg.optim.always_adamw, unit_vectors)

    def with_params(groups: list[tuple[list[str], dict[str, Any]]]) -> list[dict[str, Any]]:
        return [{"params": [params[name] for name in names], "names": names, **group} for names, group in groups]

    optimizers: list[torch.optim.Optimizer] = []
    if groups := with_params(muon_groups(rows, muon)):
        common = {"lr": muon.lr, "momentum": muon.momentum, "weight_decay": muon.weight_decay}
        optimizers.append(ManifoldMuon(groups, step_rule(cfg.optim), nesterov=muon.nesterov, **common))
    if groups := with_params(adamw_groups(rows, adamw)):
        optimizers.append(torch.optim.AdamW(groups, lr=adamw.lr, betas=adamw.betas, eps=adamw.eps, fused=True))
    return Optimizers(optimizers, rows, UnitNorm([(params[r.name], r.unit) for r in rows if r.unit is not None]))
