"""Transfer of learning rates to another model size: the multipliers of νGPT (arXiv 2604.27077, table 1, from summaries and a port).

With `transfer.rule=nu`, the settings of a configuration are those tuned for a base model; `transferred` converts them to the width, depth
and number of steps of this run. The config.yaml of a run has the settings before the transfer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from model.config import RATE_GROUPS
from model.residual import NGPT
from optim.assignment import ADAMW
from training.settings import NoTransfer, Settings

_SCALES = "optim.adamw.lr_scale."


@dataclass(frozen=True)
class Change:
    """A setting that the transfer changes: its group of parameters, its dotted key, its value before and after, and the formula."""

    group: str
    key: str
    before: float | None
    after: float
    why: str


def problems_of_transfer(cfg: Settings) -> list[str]:
    """Reasons why the transfer does not apply to this configuration, with remedies."""
    transfer, model = cfg.transfer, cfg.model
    if isinstance(transfer, NoTransfer):
        return []
    found = []
    if not model.unit_weights or model.tied or not isinstance(cfg.residual, NGPT):
        found.append(
            "transfer=nu is for nGPT only; choose such a model, for instance model=ngpt_demo, or transfer=none"
        )
    if model.bias or not model.rope:
        found.append(
            "transfer=nu has no rates for biases and a table of positions; use model.bias=false model.rope=true"
        )
    if any(choice != ADAMW for choice in (cfg.assignment.rules or {}).values()):
        found.append("transfer=nu was measured for Adam on every matrix; choose assignment=adamw, or transfer=none")
    if not cfg.optim.adamw.lr > 0:
        found.append(
            "transfer=nu multiplies optim.adamw.lr, which is 0; give a number above 0, or choose transfer=none"
        )
    at_base, here = (shape.n_embd / shape.n_head for shape in (transfer.base, model))
    if at_base != here:
        heads = model.n_embd / at_base
        remedy = (
            f"model.n_head={heads:g}" if heads.is_integer() else f"a model.n_embd that is a multiple of {at_base:g}"
        )
        found.append(
            f"transfer=nu keeps the width of a head, {at_base:g} at the base and {here:g} here; choose {remedy}"
        )
    return found


def changes(cfg: Settings) -> list[Change]:
    """Every setting that the transfer changes, in the order of the paper's table; empty without transfer.

    A factor of optim.adamw.lr_scale for one of its groups multiplies that of the transfer.
    m_width, m_depth and m_steps are the ratios of width, depth and number of steps of this run to those of the base.
    """
    t, model, residual = cfg.transfer, cfg.model, cfg.residual
    if isinstance(t, NoTransfer) or not isinstance(residual, NGPT):
        return []
    width, depth = model.n_embd / t.base.n_embd, model.n_layer / t.base.n_layer
    steps, lr = cfg.max_steps / t.base_steps, cfg.optim.adamw.lr
    given = cfg.optim.adamw.lr_scale or {}

    def scaled(group: str, key: str, value: float, ratio: str, of: float, power: float) -> Change:
        return Change(group, key, value, value * of**power, f"{ratio}^{power:.3g}, {ratio} = {of:g}")

    overall = scaled("every learning rate", "optim.adamw.lr", lr, "m_steps", steps, t.horizon)

    def rate(group: str, name: str, power: float, factor: float = 1.0) -> Change:
        factor *= given.get(RATE_GROUPS[name], 1.0)
        change = scaled(group, _SCALES + RATE_GROUPS[name], overall.after * factor, "m_width", width, power)
        return replace(change, before=lr, why=change.why if factor == 1 else f"{factor:g} {change.why}")

    stored = "the same at every width"
    return [
        overall,
        rate("input embedding", "embedding", t.width.embedding),
        rate("hidden matrices", "hidden", t.width.hidden),
        rate("head", "head", t.width.head, t.head_factor),
        scaled("alpha, at the start", "residual.alpha", residual.alpha, "m_depth", depth, t.alpha_depth),
        Change("alpha, stored", "residual.storage", residual.storage, t.storage, stored),
        Change("s_qk and s_z, stored", "model.storage", model.storage, t.storage, stored),
        scaled("s_z, at the start", "model.logit_scale", model.logit_scale, "m_width", width, t.logit_width),
    ]


def transferred(cfg: Settings) -> Settings:
    """The configuration after the transfer; the same object without transfer."""
    after = {change.key: change.after for change in changes(cfg)}
    if not after:
        return cfg

    def of(section: str) -> dict[str, Any]:
        return {key.removeprefix(section): value for key, value in after.items() if key.startswith(section)}

    lr, given = after["optim.adamw.lr"], cfg.optim.adamw.lr_scale or {}
    scales = {**given, **{pattern: rate / lr for pattern, rate in of(_SCALES).items()}}
    return replace(
        cfg,
        optim=replace(cfg.optim, adamw=replace(cfg.optim.adamw, lr=lr, lr_scale=scales)),
        residual=replace(cfg.residual, **of("residual.")),
        model=replace(cfg.model, **of("model.")),
    )


def transfer_table(cfg: Settings) -> str:
    """The learning rates and scales before and after the transfer, as text; empty without transfer."""
    lines = [("", "at the base", "here", "why")]
    for change in changes(cfg):
        before = "1/√d" if change.before is None else f"{change.before:.4g}"
        lines.append((change.group, before, f"{change.after:.4g}", change.why))
    if len(lines) == 1:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)
