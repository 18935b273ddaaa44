"""What a run writes and prints before its first step, with remarks on settings that it cannot use."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from model.gpt import GPT
from optim.assignment import ADAMW, parameter_table
from optim.manifolds import MANIFOLDS, Manifold
from training import library
from training.attention import Backend
from training.files import CONFIG_FILE, write_whole
from training.log import METRICS_FILE, RunLog, read_records
from training.optimizers import Optimizers
from training.progress import ProgressSink
from training.ranks import Ranks
from training.run import device_name, environment, run_name
from training.schedule import warmup_updates
from training.settings import Settings
from training.step import micro_batch_size
from training.transfer import transfer_table
from training.wandb_sink import WandbSink


def open_log(
    cfg: Settings, directory: Path, optimizers: Optimizers, step: int, resumed: bool, label: str = ""
) -> RunLog:
    """Write the configuration, the parameter table and the environment into the directory of the run; returns its log with the sinks.

    label: which job of a sweep this is, such as "job 2/4"; the progress shows it, and the seed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / CONFIG_FILE, yaml.safe_dump(cfg.plain(), sort_keys=False))
    write_whole(directory / "parameters.txt", parameter_table(optimizers.rows) + "\n")
    # What was typed; of a sweep, for all of its jobs.
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    write_whole(directory / "environment.json", json.dumps({**environment(), "command": command}, indent=2) + "\n")
    about = {"project": cfg.logger.project, "group": cfg.logger.group or directory.parent.name, "name": directory.name}
    has_history = resumed and (directory / METRICS_FILE).exists()
    history = (record for record in read_records(directory) if record["step"] <= step) if has_history else ()
    wandb = WandbSink(
        mode=cfg.logger.mode,
        directory=directory,
        resume=resumed,
        history=history,
        config=cfg.plain(),
        tags=[cfg.assignment.name, cfg.optim.muon.rule.kind, cfg.data.name],
        **about,
    )
    name = f"{run_name(cfg)}, {label}, seed {cfg.seed}" if label else run_name(cfg)
    progress = ProgressSink(name, cfg.max_steps, eval_interval=cfg.eval_interval, first_step=step)
    return RunLog(directory, [wandb, progress], keep_until=step if resumed else None, fresh=not resumed)


def print_start(
    cfg: Settings,
    ranks: Ranks,
    directory: Path,
    model: GPT,
    optimizers: Optimizers,
    attention: Backend,
    remarks: list[str],
) -> None:
    """Print the parameter table, the transferred settings, the directory of the run, its machine, and one line for each remark."""
    print(parameter_table(optimizers.rows, model.tied_names()))
    if carried_over := transfer_table(cfg):
        print(carried_over)
    if optimizers.muon is not None:
        print(f"ManifoldMuon: {optimizers.muon.describe(model.lm_head.weight.device)}")
    else:
        print("ManifoldMuon has no matrix: optim.muon is not used")
    if cfg.optim.library is not None:
        print(f"{library.display_name(cfg.optim.library)}: {library.describe(cfg.optim.library)}")
    print(f"{model.describe()} → {directory}", machine(cfg, ranks, attention), *remarks, sep="\n", flush=True)


def machine(cfg: Settings, ranks: Ranks, attention: Backend) -> str:
    """On what a run computes, and how, in one line."""
    devices = f"{ranks.world} ranks on " if ranks.world > 1 else ""
    dtype = str(attention.dtype).removeprefix("torch.")
    how = attention.describe() if cfg.attention.logit_cap is None else "explicit attention"
    return f"{devices}{device_name(ranks.device)}, {dtype}, {how}"


def shortened(cfg: Settings, world: int, held_out: int, probed: int) -> list[str]:
    """A line for each setting that is larger than this run can use, and what it uses instead.

    held_out, probed: how many windows of the validation split the run evaluates, and how many it probes.
    """
    found = []
    windows, wanted = cfg.global_batch_tokens // cfg.model.block_size // world, cfg.micro_batch_size
    size = micro_batch_size(windows, wanted)
    if size < wanted:
        found.append(f"micro_batch_size={wanted}: a rank has {windows} windows in an update and uses {size} at a time")
    asked, updates = cfg.schedule.warmup_steps, cfg.schedule.decay_steps
    steps = warmup_updates(asked, updates)
    if asked >= 1 and steps < asked:
        found.append(f"schedule.warmup_steps={asked} is too long for {updates} updates; {steps} of them are warm-up")
    for key, wanted, there in (
        ("eval_windows", cfg.eval_windows, held_out),
        ("probe.windows", cfg.probe.windows, probed),
    ):
        if there < wanted:
            block = cfg.model.block_size
            found.append(
                f"{key}={wanted}: the data has only {there} validation windows of {block} tokens; all are used"
            )
    return found


# ---- settings without effect ----


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
    return any(not m.constrained or (m.free_lengths and on_lengths) for m in _manifolds(cfg))


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
"""Settings or sections; whether they have an effect in a configuration; and if not, why. They are not refused, since sweeps compose them."""


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
