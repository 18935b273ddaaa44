"""Which settings have no effect beside the others. Sweeps and experiments compose such settings, so a run remarks on them and goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from optim.assignment import ADAMW
from optim.manifolds import MANIFOLDS, Manifold
from training.settings import Settings


def _manifolds(cfg: Settings) -> list[Manifold]:
    """The manifolds of the matrices that ManifoldMuon has; `euclidean` is one of them."""
    if cfg.optim.library or cfg.optim.modular:
        return []
    return [MANIFOLDS[name] for name in set((cfg.assignment.rules or {}).values()) - {ADAMW}]


def _free_lengths(cfg: Settings) -> bool:
    return any(manifold.free_lengths for manifold in _manifolds(cfg))


def _decays(cfg: Settings) -> bool:
    """Whether the decay of the matrices may move one: it acts on sizes that a manifold leaves free."""
    if cfg.optim.library or cfg.optim.modular:
        return True
    on_lengths = getattr(cfg.optim.muon.rule, "decay_manifolds", True)  # the certified step has no such setting
    return any(m.free_lengths and on_lengths if m.constrained else m.decays for m in _manifolds(cfg))


EFFECTS: tuple[tuple[str, Callable[[Settings], Any], str], ...] = (
    ("schedule.floor", lambda c: c.schedule.kind != "constant", "schedule=constant stays at the peak"),
    ("schedule.decay", lambda c: c.schedule.kind == "wsd", "it is for schedule=wsd"),
    ("attention.qk_clip_on", lambda c: c.attention.qk_clip, "attention.qk_clip is null"),
    ("model.storage model.logit_scale", lambda c: c.model.unit_weights, "model.unit_weights is false"),
    ("model.storage residual.storage", lambda c: c.transfer.rule == "none", "the transfer replaces it"),
    ("optim.adamw", lambda c: not c.optim.modular, "AdamW has no parameter, since optim.modular has all"),
    ("optim.muon", _manifolds, "ManifoldMuon has no matrix"),
    (
        "optim.muon.lr optim.library.lr optim.modular.lr",
        lambda c: c.optim.matrices.lr is None,
        "optim.matrices.lr replaces it",
    ),
    (
        "optim.muon.weight_decay optim.library.weight_decay optim.modular.weight_decay",
        lambda c: c.optim.matrices.weight_decay is None,
        "optim.matrices.weight_decay replaces it",
    ),
    ("optim.muon.weight_decay optim.matrices.weight_decay", _decays, "no matrix has a size that is free to decay"),
    ("optim.muon.block_length", lambda c: c.optim.muon.blocks, "optim.muon.blocks cuts no matrix"),
    (
        "optim.muon.rule.norm_cap optim.muon.rule.retraction optim.muon.rule.decay_manifolds",
        _free_lengths,
        "no matrix is on a manifold with free column norms, such as dgram",
    ),
    (
        "optim.muon.rule.msign_steps",
        lambda c: c.optim.muon.rule.iterator is None,
        "optim.muon.rule.iterator replaces it",
    ),
    (
        "optim.norms",
        lambda c: c.optim.modular or c.log.interval_updates,
        "it is for optim=modular and log.interval_updates",
    ),
    (
        "probe.windows",
        lambda c: c.probe.interval or c.log.interval_updates,
        "probe.interval and log.interval_updates are null",
    ),
    ("stability.z_steps", lambda c: c.stability.z_threshold, "stability.z_threshold is null"),
    ("stability.warning", lambda c: c.probe.interval, "probe.interval is null"),
    (
        "stability.warning.horizon stability.warning.probes",
        lambda c: c.stability.warning and c.stability.warning.logit,
        "there is no forecast without stability.warning.logit",
    ),
    ("logger.project logger.group", lambda c: c.logger.mode != "disabled", "logger.mode is disabled"),
)
"""Settings or sections; whether they have an effect in a configuration; and if not, why."""


def without_effect(cfg: Settings, given: Sequence[str]) -> list[str]:
    """A line for each of the given dotted keys that has no effect beside the other settings."""
    found = []
    for key in given:
        rows = (
            (acts, why) for names, acts, why in EFFECTS if any(f"{key}.".startswith(f"{n}.") for n in names.split())
        )
        if reason := next((why for acts, why in rows if not acts(cfg)), None):
            found.append(f"{key} has no effect: {reason}")
    return found
