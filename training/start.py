"""What a run writes and prints before its first step."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from model.gpt import GPT
from optim.assignment import parameter_table
from training import library
from training.attention import Backend
from training.checkpoint import discard_later
from training.compiler import uses_compiler
from training.directory import run_name
from training.files import CONFIG_FILE, ENVIRONMENT_FILE, PARAMETERS_FILE, ROOT, write_whole
from training.log import METRICS_FILE, RunLog, read_records
from training.machine import device_name, environment, resolve_device
from training.optimizers import Optimizers
from training.progress import ProgressSink
from training.ranks import Ranks
from training.resume import branch_of, goes_on
from training.schedule import warmup_updates
from training.settings import Settings
from training.step import micro_batch_size
from training.transfer import transfer_table
from training.wandb_sink import WandbSink


def open_log(
    cfg: Settings, directory: Path, optimizers: Optimizers, step: int, resumed: bool, label: str = ""
) -> RunLog:
    """Write the configuration, the parameter table and the environment into the directory of the run; returns its log with the sinks.

    Removes the checkpoints after `step` if the run was resumed at an older one that `resume` names.

    label: which job of a sweep this is, such as "job 2/4"; the progress shows it, and the seed.
    """
    # A branch keeps the name of its beginning: resume=auto returns to it until the branch has saved.
    begun_at, continued = branch_of(directory) if resumed else None, resumed and goes_on(cfg, directory)
    plain = cfg.plain() | ({"resume": begun_at} if begun_at and cfg.resume == "auto" else {})
    write_whole(directory / CONFIG_FILE, yaml.safe_dump(plain, sort_keys=False))
    write_whole(directory / PARAMETERS_FILE, parameter_table(optimizers.rows) + "\n")
    about_machine: dict[str, Any] = {**environment(resolve_device(cfg)[0]), "command": typed_command()}
    if resumed and (earlier := earlier_environments(directory, about_machine, step)):
        about_machine["earlier"] = earlier
    write_whole(directory / ENVIRONMENT_FILE, json.dumps(about_machine, indent=2) + "\n")
    has_history = resumed and (directory / METRICS_FILE).exists()
    history = (record for record in read_records(directory) if record["step"] <= step) if has_history else ()
    wandb = WandbSink(
        mode=cfg.logger.mode,
        project=cfg.logger.project,
        group=cfg.logger.group or directory.parent.name,
        directory=directory,
        resume=resumed,
        history=history,
        config=cfg.plain(),
        tags=tags_of(cfg, optimizers),
        name=directory.name if label else cfg.name or directory.name,  # jobs of a sweep may have the same name
    )
    name = f"{run_name(cfg)}, {label}, seed {cfg.seed}" if label else run_name(cfg)
    progress = ProgressSink(name, cfg.max_steps, eval_interval=cfg.eval_interval, first_step=step)
    if resumed and not continued:  # otherwise it skipped only what it could not read, and that may be mended
        discard_later(directory / "checkpoints", step)
    return RunLog(directory, [wandb, progress], keep_until=step if resumed else None, fresh=not resumed)


def earlier_environments(directory: Path, now: Mapping[str, str], step: int) -> list[dict[str, Any]]:
    """The environments and commands that computed the steps before `step`, each `until` its last; the last is left out if it is as `now`.

    They stand in the environment.json that the run wrote before; a file that cannot be read has none.
    """
    found: list[dict[str, Any]] = []
    reached = 0
    try:
        before = json.loads((directory / ENVIRONMENT_FILE).read_text())
        for part in (*before.pop("earlier", []), {**before, "until": step}):
            if (until := min(part["until"], step)) > reached:  # otherwise none of its steps was kept
                reached = until
                found.append({**part, "until": until})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return found[:-1] if found and found[-1] == {**now, "until": step} else found


def typed_command() -> str:
    """The command that runs here; of a sweep or an experiment, the one for all of its runs.

    A program of this repository has its path there.
    """
    program = Path(sys.argv[0]).resolve()
    shown = program.relative_to(ROOT).as_posix() if program.is_relative_to(ROOT) else program.name
    return shlex.join(["python", shown, *sys.argv[1:]])


def tags_of(cfg: Settings, optimizers: Optimizers) -> list[str]:
    """What a run is filtered by in W&B: its assignment, the optimizer of its matrices with the step rule of ManifoldMuon, and its data."""
    rule = [] if optimizers.muon is None else [cfg.optim.muon.rule.kind]
    return [cfg.assignment.name, next(iter(optimizers.named)), *rule, cfg.data.name]


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
    if uses_compiler(cfg, ranks.device, optimizers.muon is not None):
        remarks = [
            *remarks,
            "the first steps wait for torch's compiler: a minute or more, less once its cache has the programs",
        ]
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
        found.append(f"schedule.warmup_steps={asked} is too long for {updates} updates; the warm-up has {steps}")
    wanted, block = cfg.eval_windows, cfg.model.block_size
    if held_out < wanted:
        found.append(
            f"eval_windows={wanted}: the data has only {held_out} validation windows of {block} tokens; all are used"
        )
    if probed < cfg.probe.windows and (cfg.probe.interval or cfg.log.interval_updates):
        found.append(
            f"probe.windows={cfg.probe.windows}: a run evaluates only {probed} windows; all of them are probed"
        )
    return found
