"""Pretrain a GPT with a chosen geometry for every weight matrix.

    python train.py assignment=hetero                     one run; every key of configs/ can be set here
    python train.py -m assignment=all_stiefel,hetero      a sweep, one directory a job

A run is a configuration; a step is batch → loss → gradient → geometry → weights.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from data.loader import Loader, Prefetcher, validation_windows
from data.prepare import prepare
from data.shards import DataError, Dataset, open_dataset
from model.gpt import GPT, GPTConfig
from optim.groups import (
    AssignmentError,
    Optimizers,
    adamw_groups,
    assign,
    build_optimizers,
    muon_groups,
    parameter_table,
)
from optim.schedule import SCHEDULES, lr_multiplier
from optim.spectra import spectra
from training import checkpoint
from training.checkpoint import CheckpointError
from training.log import RunLog, WandbSink
from training.progress import ProgressSink
from training.resume import find_checkpoint, restore, state_of
from training.run import environment, resolve_device, run_directory, run_name, use_compile
from training.stability import Stability
from training.transfer import problems_of_transfer, transfer_table, transferred
from training.validate import ConfigError, problems_of_batch, problems_of_schedule, problems_of_values

USER_ERRORS = (ConfigError, DataError, CheckpointError)


def train(cfg: dict[str, Any], directory: Path | None = None) -> float:
    """Run a configuration to its end; returns the best validation loss (nats a token).

    Args:
        cfg: plain configuration, as `training.config.compose` gives it.
        directory: where the run is written; None for the configuration's own choice.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is written.
    """
    check(cfg)
    device, dtype = resolve_device(cfg)
    dataset = open_data(cfg)
    block, windows = cfg["model"]["block_size"], cfg["global_batch_tokens"] // cfg["model"]["block_size"]
    loader = Loader(dataset.train, block, cfg["seed"], windows)
    held_out = validation_windows(dataset.val, block, cfg["eval_windows"])
    directory = directory or run_directory(cfg)
    resumed = find_checkpoint(cfg, directory, dataset.fingerprint)

    torch.manual_seed(cfg["seed"])
    model = GPT(gpt_config(cfg)).to(device)
    optimizers = build_optimizers(model, transferred(cfg), model.unit_vectors())
    stability = Stability(**cfg["stability"])
    step, seconds, skipped = 0, 0.0, 0
    if resumed is not None:
        step, seconds, skipped = restore(resumed.state, model, optimizers, stability)
    first_step = step
    if resumed is not None and step >= cfg["max_steps"]:
        print(f"{directory} is finished: {step} of {cfg['max_steps']} steps")
        return stability.best
    print_start(model, optimizers, cfg, directory, resumed)
    log = open_log(cfg, directory, optimizers, first_step, resumed is not None)

    compiled = torch.compile(model) if use_compile(cfg, device) else model
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    batches = Prefetcher(loader, step)
    skipped = torch.tensor(skipped, device=device)  # updates left out because a loss or gradient was not finite
    val_loss, tokens, clock = math.nan, 0, time.perf_counter()
    try:
        while True:
            fresh, last = step > first_step or resumed is None, step == cfg["max_steps"]
            pause = time.perf_counter()

            # Once in a while: evaluate on the fixed windows.
            if fresh and (step % cfg["eval_interval"] == 0 or last):
                val_loss = evaluate(compiled, held_out, cfg["micro_batch_size"], device, autocast)
                log.write("eval", step, loss=val_loss)
                if stability.validation(step, val_loss):
                    log.write("event", step, event="unstable", message=stability.reason)

            # Once in a while: write down every singular value.
            if fresh and (step % cfg["log"]["interval_spectra"] == 0 or last):
                for name, record in spectra(ruled_matrices(model, optimizers)):
                    log.write("spectra", step, name=name, **record)

            # Once in a while: save. A run resumed from here has written exactly what this one has.
            if fresh and step > 0 and (step % cfg["checkpoint"]["interval"] == 0 or last):
                log.sync()
                elapsed = seconds + pause - clock
                state = state_of(cfg, dataset.fingerprint, model, optimizers, stability, step, elapsed, int(skipped))
                metric = val_loss if step % cfg["eval_interval"] == 0 or last else None
                checkpoint.save(directory / "checkpoints", step, state, keep=cfg["checkpoint"]["keep"], metric=metric)
            if last:
                break
            clock += time.perf_counter() - pause  # pauses are not training time

            # Batch → loss → gradient.
            optimizers.set_lr(schedule(cfg, step))
            loss = accumulate(compiled, batches.next(step), cfg["micro_batch_size"], device, autocast)
            norm = clip(model.parameters(), cfg["grad_clip"])

            # Gradient → geometry → weights, unless something is not finite; nobody waits for the answer.
            bad = ~(loss.isfinite() & norm.isfinite())
            skipped += bad
            optimizers.step(skip=bad)
            optimizers.zero_grad()
            step += 1
            tokens += cfg["global_batch_tokens"]

            # Once in a while: read the numbers back.
            if step % cfg["log"]["interval"] == 0 or step == cfg["max_steps"]:
                lr, count = schedule(cfg, step - 1), int(skipped)
                now = time.perf_counter()
                rate, tokens, seconds, clock = tokens / (now - clock), 0, seconds + now - clock, now
                log.write("train", step, loss=loss, grad_norm=norm, lr=lr, tokens_per_s=rate, skipped_updates=count)
                if stability.train(step, loss.item()) or (count and stability.nonfinite(step, "a loss or gradient")):
                    log.write("event", step, event="unstable", message=stability.reason)
        log.write("end", step, **summary(stability, seconds, device))
    finally:
        batches.close()
        log.close()
    return stability.best


# ---- one step ----


def schedule(cfg: dict[str, Any], step: int) -> float:
    """The multiplier of every peak learning rate for the update after `step` updates."""
    return lr_multiplier(step, **cfg["schedule"])


def micro_batches(windows: Any, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows (N, T+1) uint16 as inputs and targets (size, T) int64 on the device."""
    for start in range(0, len(windows), size):
        part = torch.from_numpy(windows[start : start + size].astype("int64"))
        part = part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part
        yield part[:, :-1], part[:, 1:]


def accumulate(
    model: nn.Module, windows: Any, size: int, device: torch.device, autocast: AbstractContextManager
) -> Tensor:
    """Gradient of the mean loss over all windows (N, T+1), `size` at a time; returns that mean (0-d, on the device)."""
    total = torch.zeros((), device=device)
    for x, y in micro_batches(windows, size, device):
        with autocast:
            _, loss = model(x, y)
        share = loss * (len(x) / len(windows))
        share.backward()
        total += share.detach()
    return total


def clip(parameters: Iterable[Tensor], largest: float) -> Tensor:
    """Global gradient norm (0-d) before it is clipped to `largest`; 0 leaves the gradients alone."""
    return nn.utils.clip_grad_norm_(parameters, largest if largest > 0 else math.inf)


@torch.no_grad()
def evaluate(
    model: nn.Module, windows: Any, size: int, device: torch.device, autocast: AbstractContextManager
) -> float:
    """Mean loss over the windows (N, T+1), in nats a token."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for x, y in micro_batches(windows, size, device):
        with autocast:
            _, loss = model(x, y)
        total += loss.double() * len(x)
    model.train()
    return total.item() / len(windows)


# ---- what a run is made of ----


def check(cfg: dict[str, Any], world: int = 1) -> None:
    """Raise ConfigError with every problem of the configuration."""
    problems = [f"{key} is missing; give it, or choose an experiment" for key in missing(cfg)]
    if problems := problems or problems_of_transfer(cfg):
        raise ConfigError(problems)
    shape = gpt_config(cfg)
    problems = problems_of_values(cfg) + problems_of_schedule(cfg, SCHEDULES) + problems_of_batch(cfg, world)
    if impossible := shape.problems():
        problems += impossible
    else:
        with torch.device("meta"):
            model = GPT(shape)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        optim = cfg["optim"]
        try:
            rows = assign(shapes, cfg["assignment"]["rules"] or {}, optim["always_adamw"], model.unit_vectors())
            muon_groups(rows, optim["muon"])
            adamw_groups(rows, optim["adamw"])
        except AssignmentError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def missing(cfg: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys whose value is still to be given."""
    for key, value in cfg.items():
        if isinstance(value, dict):
            yield from missing(value, f"{prefix}{key}.")
        elif value == "???":
            yield prefix + key


def gpt_config(cfg: dict[str, Any]) -> GPTConfig:
    """The model's shape and residual rule."""
    settings = transferred(cfg)
    return GPTConfig(**settings["model"], residual=settings["residual"])


def open_data(cfg: dict[str, Any]) -> Dataset:
    """The prepared data; the kind that takes seconds prepares itself."""
    if cfg["data"]["auto_prepare"]:
        prepare(cfg["data"])
    dataset = open_dataset(cfg["data"]["dir"], name=cfg["data"]["name"])
    if dataset.manifest.vocab_size > cfg["model"]["vocab_size"]:
        raise ConfigError(
            [
                f"model.vocab_size={cfg['model']['vocab_size']} is smaller than the data's vocabulary of {dataset.manifest.vocab_size} "
                f"({dataset.manifest.tokenizer} tokens); raise it to at least that"
            ]
        )
    return dataset


def ruled_matrices(model: nn.Module, optimizers: Optimizers) -> dict[str, tuple[Tensor, str | None]]:
    """Every matrix that the assignment speaks of, with its manifold (None for AdamW's)."""
    params = dict(model.named_parameters())
    return {row.name: (params[row.name], row.manifold) for row in optimizers.rows if row.ruled}


# ---- what is written down ----


def open_log(cfg: dict[str, Any], directory: Path, optimizers: Optimizers, first_step: int, resumed: bool) -> RunLog:
    """The run's directory with its configuration, parameter table and environment, and the log with its sinks."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False))
    (directory / "parameters.txt").write_text(parameter_table(optimizers.rows) + "\n")
    (directory / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    logger, name = cfg["logger"], run_name(cfg)
    group = logger["group"] or directory.parent.name
    wandb = WandbSink(
        mode=logger["mode"],
        project=logger["project"],
        group=group,
        name=name,
        config=cfg,
        directory=directory,
        resume=resumed,
    )
    progress = ProgressSink(name, cfg["max_steps"], first_step=first_step)
    return RunLog(directory, [wandb, progress], resume_step=first_step if resumed else None)


def print_start(
    model: GPT, optimizers: Optimizers, cfg: dict[str, Any], directory: Path, resumed: checkpoint.Loaded | None
) -> None:
    """The table of geometries, what was carried over from a base, and where the run goes."""
    print(parameter_table(optimizers.rows, {"transformer.wte.weight": "lm_head.weight"} if model.config.tied else {}))
    if carried_over := transfer_table(cfg):
        print(carried_over)
    print(f"{model.parameter_count():,} parameters → {directory}")
    if resumed is not None:
        for path, reason in resumed.skipped:
            print(f"skipped {path}: {reason}")
        print(f"resumed from {resumed.path}, step {resumed.step}")
    sys.stdout.flush()


def summary(stability: Stability, seconds: float, device: torch.device) -> dict[str, Any]:
    """What a table needs of a finished run."""
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "best_val_loss": stability.best,
        "best_step": stability.best_step,
        "unstable_step": stability.unstable_step,
        "reason": stability.reason,
        "train_seconds": seconds,
        "peak_device_bytes": memory,
    }


def main() -> None:
    """The command line: Hydra composes, a user's mistake ends with exit code 2 and its remedy."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from training.config import plain

    @hydra.main(version_base="1.3", config_path="configs", config_name="config")
    def run(config: Any) -> float:
        job = HydraConfig.get()
        sweeping = job.mode == RunMode.MULTIRUN
        try:
            best = train(plain(config), Path(job.runtime.output_dir) if sweeping else None)
        except USER_ERRORS as error:
            print(error, file=sys.stderr)
            if sweeping:  # the other jobs go on; Hydra reports this one at the end
                raise
            raise SystemExit(2) from None
        print(f"best validation loss {best:.4f}")
        return best

    run()


if __name__ == "__main__":
    main()
