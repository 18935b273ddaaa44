"""Carrying a learning rate over to another size: νGPT's multipliers (arXiv 2604.27077, table 1, as its digests and a port have it).

A configuration whose `transfer.rule` is `nu` states settings tuned at a base; `transferred` returns the configuration that these become
at its own width, depth and number of steps. The configuration a run writes down is the one it was given.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_INPUT, _HIDDEN, _HEAD = "wte", "c_attn|c_fc|c_proj", "lm_head"  # patterns of parameter names


@dataclass(frozen=True)
class Change:
    """One setting under transfer: the group of parameters it concerns, its dotted key, its value before and after, and why."""

    group: str
    key: str
    before: float | None
    after: float
    why: str


def problems_of_transfer(cfg: Mapping[str, Any]) -> list[str]:
    """Whether the model is one that the transfer rule was measured for, and there is something to carry over."""
    transfer, model = cfg["transfer"], cfg["model"]
    if transfer["rule"] == "none":
        return []
    found = []
    if not model["unit_weights"] or model["tied"] or cfg["residual"]["rule"] != "ngpt":
        found.append(
            "transfer=nu carries nGPT's settings over; choose a model of it, such as model=ngpt_demo, or transfer=none"
        )
    if any(choice != "adamw" for choice in (cfg["assignment"]["rules"] or {}).values()):
        found.append("transfer=nu was measured for Adam on every matrix; choose assignment=adamw, or transfer=none")
    if not cfg["optim"]["adamw"]["lr"] > 0:
        found.append(
            "transfer=nu multiplies optim.adamw.lr, which is 0; give a number above 0, or choose transfer=none"
        )
    heads = [shape["n_embd"] / shape["n_head"] for shape in (transfer["base"], model)]
    if heads[0] != heads[1]:
        found.append(
            f"transfer=nu keeps the width of a head, {heads[0]:g} at the base and {heads[1]:g} here; "
            f"choose model.n_head={model['n_embd'] / heads[0]:g}"
        )
    return found


def changes(cfg: Mapping[str, Any]) -> list[Change]:
    """Every setting that transfer touches, in the order of the paper's table; none without transfer.

    With m_width, m_depth and m_steps the ratios of this model's width, depth and number of steps to the base's.
    """
    t = cfg["transfer"]
    if t["rule"] == "none":
        return []
    base, model, residual, lr = t["base"], cfg["model"], cfg["residual"], cfg["optim"]["adamw"]["lr"]
    width, depth = model["n_embd"] / base["n_embd"], model["n_layer"] / base["n_layer"]
    steps = cfg["max_steps"] / t["base_steps"]
    overall = lr * steps ** t["horizon"]
    scaled = {name: f"m_width^{power:g}, m_width = {width:g}" for name, power in t["width"].items()}

    def rate(name: str, factor: float = 1.0) -> float:
        return overall * factor * width ** t["width"][name]

    return [
        Change(
            "every learning rate", "optim.adamw.lr", lr, overall, f"m_steps^{t['horizon']:.3g}, m_steps = {steps:g}"
        ),
        Change("input embedding", f"optim.adamw.lr_scale.{_INPUT}", lr, rate("embedding"), scaled["embedding"]),
        Change("hidden matrices", f"optim.adamw.lr_scale.{_HIDDEN}", lr, rate("hidden"), scaled["hidden"]),
        Change(
            "head",
            f"optim.adamw.lr_scale.{_HEAD}",
            lr,
            rate("head", t["head_factor"]),
            f"{t['head_factor']:g} {scaled['head']}",
        ),
        Change(
            "alpha, at the start",
            "residual.alpha",
            residual["alpha"],
            residual["alpha"] * depth ** t["alpha_depth"],
            f"m_depth^{t['alpha_depth']:g}, m_depth = {depth:g}",
        ),
        Change("alpha, stored", "residual.storage", residual["storage"], t["storage"], "the same at every width"),
        Change("s_qk and s_z, stored", "model.storage", model["storage"], t["storage"], "the same at every width"),
        Change(
            "s_z, at the start",
            "model.logit_scale",
            model["logit_scale"],
            model["logit_scale"] * width ** t["logit_width"],
            f"m_width^{t['logit_width']:g}, m_width = {width:g}",
        ),
    ]


def transferred(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with its settings carried over; a copy, and equal to the original without transfer."""
    result = copy.deepcopy(dict(cfg))
    adamw, factors = result["optim"]["adamw"], {}
    for change in changes(cfg):
        *path, name = change.key.split(".")
        if path[-1] == "lr_scale":
            factors[name] = change.after / adamw["lr"]
        elif change.key == "optim.adamw.lr":
            adamw["lr"] = change.after
        else:
            result[path[0]][name] = change.after
    if factors:
        adamw["lr_scale"] = {**factors, **(adamw["lr_scale"] or {})}
    return result


def transfer_table(cfg: Mapping[str, Any]) -> str:
    """What each group's learning rate and scales became, and why, as text; empty without transfer."""
    lines = [("", "at the base", "here", "why")]
    for change in changes(cfg):
        before = "1/√d" if change.before is None else f"{change.before:.4g}"
        lines.append((change.group, before, f"{change.after:.4g}", change.why))
    if len(lines) == 1:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)
