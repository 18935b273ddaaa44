"""Settings that other settings make ineffective. Sweeps and experiments compose such settings, so a run reports them and goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from optim.assignment import ADAMW, matches
from optim.manifolds import MANIFOLDS, Manifold
from training.ranks import world_size
from training.settings import CertifiedRule, Settings
from training.trace import WAITED


def _manifolds(cfg: Settings) -> list[Manifold]:
    """The manifolds of the matrices that ManifoldMuon has; `euclidean` is one of them."""
    if cfg.optim.library or cfg.optim.modular:
        return []
    return [MANIFOLDS[name] for name in set((cfg.assignment.rules or {}).values()) - {ADAMW}]


def _free_lengths(cfg: Settings) -> bool:
    return any(manifold.free_lengths for manifold in _manifolds(cfg))


def _decays(cfg: Settings) -> bool:
    """Whether the decay of the matrices may move one: it acts on sizes that a manifold leaves free.

    `decay_manifolds` of the published step shortens every weight before its step, which the retraction then makes longer.
    """
    if cfg.optim.library or cfg.optim.modular:
        return True
    on_all = getattr(cfg.optim.muon.rule, "decay_manifolds", None)  # the certified step has no such setting
    return any(on_all if m.gram_space and on_all is not None else m.decays for m in _manifolds(cfg))


def _iterator(cfg: Settings) -> Any:
    """The chosen iteration; None where none is, or where the step rule has no such setting."""
    return getattr(cfg.optim.muon.rule, "iterator", None)


def _iterates(cfg: Settings) -> bool:
    """Whether the chosen iteration is used: by the published step everywhere, by the certified step where there is no condition."""
    return not isinstance(cfg.optim.muon.rule, CertifiedRule) or not all(m.conditioned for m in _manifolds(cfg))


@cache
def _forgets_scale(manifold: str) -> bool:
    """Whether a matrix and its double are brought to the same point of a manifold."""
    W = 0.1 * torch.eye(4, 2)
    return torch.allclose(MANIFOLDS[manifold].retract(W), MANIFOLDS[manifold].retract(2 * W))


def _keeps_scale(cfg: Settings, *parts: str) -> bool:
    """Whether a factor of the initial matrices of these parts of a block, such as mlp.c_fc, is still there before the first step."""
    names = [f"transformer.h.{layer}.{part}.weight" for layer in range(cfg.model.n_layer) for part in parts]
    rules = (cfg.assignment.rules or {}).items()
    chosen = {next((choice for pattern, choice in rules if matches(pattern, name)), ADAMW) for name in names}
    return not cfg.model.unit_weights and not all(choice != ADAMW and _forgets_scale(choice) for choice in chosen)


def _keeps_attention_scale(cfg: Settings) -> bool:
    """The same for the factor of queries and keys. If the parts of c_attn are brought to a fixed size together, their ratio is left of it."""
    name = "transformer.h.{}.attn.c_attn.weight"
    cuts = (cfg.optim.muon.blocks or {}).items()
    counts = [
        next((count for pattern, count in cuts if matches(pattern, name.format(layer))), 1)
        for layer in range(cfg.model.n_layer)
    ]
    together = any(count % 3 for count in counts)
    return not cfg.model.unit_weights and (together or _keeps_scale(cfg, "attn.c_attn"))


def _decay_steps_act(cfg: Settings) -> bool:
    """Whether the end of the decay changes a learning rate: also a constant one has a warm-up, which may be a share of it or end with it."""
    asked, updates = cfg.schedule.warmup_steps, cfg.schedule.decay_steps
    return cfg.schedule.kind != "constant" or 0 < asked < 1 or asked >= min(updates, cfg.max_steps)


def _ranks(cfg: Settings) -> int:
    return max(world_size(), cfg.launcher.nproc)


FIXED_SIZE = "these matrices, or their rows or columns, are brought to a fixed size before the first step"
ONE_RANK = "there is one rank"
ONLY_SWEEP = "it is for a sweep, which the option -m starts"

EFFECTS: tuple[tuple[str, Callable[[Settings], Any], str], ...] = (
    ("schedule.floor", lambda c: c.schedule.kind != "constant", "schedule=constant stays at the peak"),
    ("schedule.decay_steps", _decay_steps_act, "schedule=constant stays at the peak"),
    ("schedule.decay", lambda c: c.schedule.kind == "wsd", "it is for schedule=wsd"),
    ("attention.qk_clip_on", lambda c: c.attention.qk_clip, "attention.qk_clip is null"),
    ("model.storage model.logit_scale", lambda c: c.model.unit_weights, "model.unit_weights is false"),
    ("model.storage residual.storage", lambda c: c.transfer.rule == "none", "the transfer replaces it"),
    ("optim.adamw", lambda c: not c.optim.modular, "AdamW has no parameter, since optim.modular has all"),
    ("optim.muon", _manifolds, "ManifoldMuon has no matrix"),
    (
        "log.interval_certificate",
        lambda c: c.log.interval_certificate is None or _manifolds(c),
        "ManifoldMuon has no matrix",
    ),
    (
        "optim.muon.rule.dual_steps optim.muon.rule.alpha optim.muon.rule.quality",
        lambda c: any(m.conditioned for m in _manifolds(c)),
        "no matrix is on a manifold whose steps fulfil a condition",
    ),
    (
        "optim.muon.rule.iterator",
        lambda c: _iterator(c) is None or _iterates(c),
        "no matrix is unconstrained or in the spectral ball",
    ),
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
        "optim.muon.rule.norm_cap optim.muon.rule.retraction",
        _free_lengths,
        "no matrix is on a manifold with free column norms, such as dgram",
    ),
    (
        "optim.muon.rule.decay_manifolds",
        lambda c: any(m.gram_space for m in _manifolds(c)),
        "no matrix is on a manifold with a retraction",
    ),
    (
        "optim.muon.rule.msign_steps",
        lambda c: _iterator(c) is None,
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
    ("init.weight_scale init.mlp_residual_scale", lambda c: c.model.mlp != "none", "model.mlp is none"),
    (
        "init.residual_scale init.attention_residual_scale init.mlp_residual_scale",
        lambda c: not c.residual.writes_zero,
        "the residual rule lets these matrices start at zero",
    ),
    ("init.weight_scale", lambda c: _keeps_scale(c, "mlp.c_fc"), FIXED_SIZE),
    ("init.residual_scale", lambda c: _keeps_scale(c, "attn.c_proj", "mlp.c_proj"), FIXED_SIZE),
    ("init.attention_residual_scale", lambda c: _keeps_scale(c, "attn.c_proj"), FIXED_SIZE),
    ("init.mlp_residual_scale", lambda c: _keeps_scale(c, "mlp.c_proj"), FIXED_SIZE),
    ("init.attention_scale", _keeps_attention_scale, FIXED_SIZE),
    ("init", lambda c: c.init_from is None, "the weights come from init_from"),
    (
        "residual.radius",
        lambda c: getattr(c.residual, "embedding", None) != "none",
        "residual.embedding is none, so every token keeps its length",
    ),
    (
        "profile",
        lambda c: c.profile is None or c.max_steps > WAITED,
        f"a trace begins after {WAITED} updates, which is the end",
    ),
    ("allow_changes", lambda c: not c.allow_changes or c.resume != "never", "resume is never"),
    ("init_from", lambda c: c.init_from is None or c.resume in ("never", "auto"), "resume names a checkpoint"),
    ("launcher.shard", lambda c: c.launcher.shard == "ddp" or _ranks(c) > 1, ONE_RANK),
    ("launcher.timeout_s", lambda c: _ranks(c) > 1, ONE_RANK),
    ("launcher.checksum_interval", lambda c: not c.launcher.checksum_interval or _ranks(c) > 1, ONE_RANK),
    ("logger.project logger.group", lambda c: c.logger.mode != "disabled", "logger.mode is disabled"),
)
"""Settings or sections; whether they have an effect in a configuration; and if not, why."""


def without_effect(cfg: Settings, given: Sequence[str], sweep: bool = False) -> list[str]:
    """A line for each of the given dotted keys that has no effect beside the other settings. sweep: whether the run is a job of a sweep."""
    rows = EFFECTS if sweep else (*EFFECTS, ("sweep", lambda _: False, ONLY_SWEEP))
    found = []
    for key in given:
        own = ((acts, why) for names, acts, why in rows if any(f"{key}.".startswith(f"{n}.") for n in names.split()))
        if reason := next((why for acts, why in own if not acts(cfg)), None):
            found.append(f"{key} has no effect: {reason}")
    return found
