"""Pretrain a GPT with a chosen geometry for every weight matrix.

    python train.py assignment=hetero                     one run; every key of configs/ can be set here
    python train.py -m assignment=all_stiefel,hetero      a sweep, one directory for each job
    torchrun --nproc_per_node=8 train.py                  on eight devices; several nodes with torchrun's own options

A run is a configuration; a step is batch → loss → gradient → geometry → weights.
"""

from __future__ import annotations

# In a command, or in a rank that it started: set signal handlers before the imports, which take seconds.
if __name__ in ("__main__", "__mp_main__"):
    from training.signals import exit_on_stop_signals

    exit_on_stop_signals()

# The command ends here. Ranks, and jobs on a cluster, import this file again as `train`, to find the worker by its name. Help needs no more.
if __name__ == "__main__":
    from training.command import run_command

    raise SystemExit(run_command(__doc__))

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.loader import Prefetcher
from training.attention import Backend, choose
from training.average import average_of
from training.build import build
from training.checks import check
from training.compiler import CompilerWatch, uses_compiler
from training.data import batches_of, open_data, require_as_prepared, separator_of
from training.directory import claimed, end_of, end_summary
from training.effects import without_effect
from training.init_from import start_from
from training.limits import machine_limits
from training.log import NoLog, RunLog
from training.machine import environment, resolve_device, speed, wait_for
from training.observer import Observer
from training.phases import Phases, as_phase
from training.placement import place
from training.ranks import Ranks, joined, world_size
from training.resume import agreed_checkpoint, changes_of, restore, resumption, rng_state, set_rng_state
from training.schedule import lr_multiplier
from training.settings import Settings
from training.signals import StopSignal
from training.stability import Stability
from training.start import open_log, print_start, shortened
from training.step import FiniteGuard, accumulate, clip, host_tokens, micro_batch_size
from training.trace import Trace


def train(cfg: Settings, directory: Path | None = None, label: str = "", given: Sequence[str] = ()) -> float:
    """Train a configuration to its end; returns the best validation loss (nats a token).

    Args:
        cfg: from `training.config.compose`.
        directory: where the run is written; None if the configuration decides.
        label: which job of a sweep this is. given: dotted keys that the user set, for remarks on those without effect.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is written. InUse, a ConfigError: another process writes this run.
        LostRanks: another rank has ended. Stopped: a signal came, and the run has saved.
    """
    check(cfg, world_size())
    with joined(cfg) as ranks, machine_limits(cfg), StopSignal() as stop, claimed(ranks, cfg, directory) as folder:
        run = Run(ranks, cfg, folder, label, given)
        end = ranks.from_main(end_of, folder) if run.finished else None
        if end is not None and end["step"] == run.step:
            return run.stability.best  # it had ended before
        if stop.requested(ranks):
            stop.end(ranks, run.step)
        run.train(stop)
        return run.stability.best


class Run:
    """The training of a configuration on one rank. Every rank computes its part of each batch; rank 0 writes the records."""

    def __init__(self, ranks: Ranks, cfg: Settings, directory: Path, label: str, given: Sequence[str]) -> None:
        self.ranks, self.cfg, self.directory, self.label = ranks, cfg, directory, label
        self.device, dtype = ranks.device, resolve_device(cfg)[1]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # not of an earlier run in this process
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
        dataset = open_data(cfg)
        self.data = dataset.fingerprint
        self.loader = batches_of(cfg, dataset.train, ranks.rank, ranks.world)
        windows = cfg.global_batch_tokens // cfg.model.block_size
        self.micro_batch = micro_batch_size(windows // ranks.world, cfg.micro_batch_size)
        resumed = agreed_checkpoint(ranks, cfg, self.directory, self.data)
        if resumed is None:
            require_as_prepared(cfg, dataset)
        kept = None if resumed is None else Backend(resumed.state["attention"], dtype)
        self.attention = ranks.from_main(choose, cfg, self.device, self.micro_batch, kept)

        torch.manual_seed(cfg.seed)
        self.model, self.optimizers = build(cfg, self.device)
        self.model.attend_by(self.attention.backend, self.attention.dtype)
        self.model.separator = separator_of(cfg, dataset)
        self.stability = Stability(cfg.stability)
        if not ranks.is_main:
            torch.manual_seed(cfg.seed + ranks.rank)  # equal weights on all ranks, but different dropout
        self.guard = FiniteGuard([name for name, _ in self.model.named_parameters()], self.device)
        self.phase = Phases(self.device)
        if self.optimizers.muon is not None:
            self.optimizers.muon.around_exchange = partial(self.phase, "exchange")
        self.observer = Observer(ranks, cfg, self.model, self.optimizers, dataset.val, self.phase, self.autocast)
        self.step, self.seconds, self.tokens = 0, 0.0, 0  # tokens: since the last training record
        notes: list[str] = []
        self.origin: dict[str, Any] = {}  # a record of the weights that were not drawn here
        if resumed is None and cfg.init_from is not None:
            loss = partial(self.observer.loss, self.model)
            self.origin, notes = start_from(ranks, cfg.init_from, self.model, self.optimizers, loss)
        self.average = average_of(cfg.average, self.model)
        self.changed: list[str] = []  # settings, since the checkpoint
        self.resumed_at: int | None = None
        self.ended_at: int | None = None
        self.val_loss: float | None = None  # of the current weights; None: not computed
        if resumed is not None:
            parts = (self.model, self.optimizers, self.stability, self.guard, self.average)
            missed = restore(resumed, cfg, *parts, rank=ranks.rank)
            self.step, self.seconds, self.val_loss = resumed.step, float(resumed.state["seconds"]), resumed.metric
            self.resumed_at, self.ended_at = self.step, self.step if resumed.state["ended"] else None
            self.changed = changes_of(resumed.state["config"], cfg)
            notes = [*(f"changed: {change}" for change in self.changed), *missed]
        if ranks.is_main:
            cut = shortened(cfg, ranks.world, len(self.observer.held_out), len(self.observer.probe_windows))
            remarks = [*without_effect(cfg, given, sweep=bool(label)), *cut, *resumption(resumed, cfg, notes)]
            print_start(cfg, ranks, directory, self.model, self.optimizers, self.attention, remarks)

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or stability ends the run."""
        return self.step >= self.cfg.max_steps or self.stability.stopped

    def train(self, stop: StopSignal) -> None:
        """The loop: once in a while measure, save, and read numbers from the device; always make a step."""
        cfg, ranks = self.cfg, self.ranks
        log: RunLog | NoLog = NoLog()
        if ranks.is_main:
            log = open_log(cfg, self.directory, self.optimizers, self.step, self.resumed_at is not None, self.label)
        self.placement = place(self.model, self.optimizers, ranks, cfg)
        if self.origin:
            log.write("init_from", self.step, **self.origin)
        if self.changed:
            log.write("event", self.step, event="changed", settings=self.changed)
        if self.attention.seconds:
            log.write("event", self.step, event="attention", **self.attention.record())
        batches = Prefetcher(lambda step: host_tokens(self.loader.batch(step), self.device), self.step)
        trace = Trace(cfg.profile if ranks.is_main else None, self.directory, self.device)
        self.compiler = CompilerWatch(uses_compiler(cfg, self.device, self.optimizers.muon is not None))
        self.clock = time.perf_counter()
        try:
            while True:
                stopping = stop.requested(ranks)
                with self.pause(wait=stopping or any(map(self.due, cfg.intervals()))):
                    saves = stopping or self.due(cfg.checkpoint.interval or cfg.max_steps)
                    if saves:
                        self.note_skipped(log)  # first, since it may end the run
                    self.look(log)
                    if self.step > 0 and (saves or (self.finished and self.step != self.ended_at)):
                        self.save(log, ended=self.finished)
                if self.finished:
                    break
                if stopping:
                    stop.end(ranks, self.step)
                numbers = self.make_step(log, batches, stop)
                trace.step()
                if self.step % cfg.log.interval == 0 or self.step == cfg.max_steps:
                    self.read_back(log, *numbers)
            summary = end_summary(self.stability, self.elapsed, self.device)
            log.write("end", self.step, time=self.phase.read(), state_bytes=self.optimizers.state_bytes(), **summary)
        finally:
            trace.close()
            self.compiler.close()
            batches.close()
            log.close()
            del self.placement  # DDP must not outlive the process group

    def make_step(self, log: RunLog | NoLog, batches: Prefetcher, stop: StopSignal) -> tuple[Tensor, Tensor, float]:
        """One step: batch → loss → gradient → geometry → weights. Returns its loss, the norm of its gradient (0-d) and lr multiplier."""
        cfg, ranks, phase = self.cfg, self.ranks, self.phase

        # Batch → loss → gradient; a stop between two micro-batches ends the run with the state of the last finished step.
        before, interrupted = rng_state(self.device), partial(stop.interrupts, ranks)
        with phase("data"):
            batch = batches.next(self.step)
        with phase("forward_backward"):
            part = accumulate(self.placement.replica, batch, self.micro_batch, self.device, self.autocast, interrupted)
        if part is None:
            self.abandon_step(log, before)
            stop.end(ranks, self.step)
        loss = ranks.all_reduce_mean(part.clone())

        # Gradient → geometry → weights; skipped on the device if something is not finite, without a host sync.
        multiplier = lr_multiplier(self.step, **vars(cfg.schedule))
        self.optimizers.set_lr(multiplier)
        self.step, self.val_loss, self.tokens = self.step + 1, None, self.tokens + cfg.global_batch_tokens
        self.observer.watch(self.due(cfg.log.interval_certificate), self.due(cfg.log.interval_updates))
        with phase("optimizer"):
            norm, norms = clip(self.placement.gradients(), cfg.grad_clip, self.placement.whole_norms)
            skip = self.guard.check(self.step, part, loss, norms)
            self.optimizers.step(skip=skip)
            self.model.clip_logits(skip)
            self.optimizers.zero_grad()
            if self.average:
                self.average.update(skip)
        return loss, norm, multiplier

    # ---- once in a while ----

    def due(self, interval: int | None) -> bool:
        """Whether an action is due that is done every `interval` steps and at the end (None: never), and was not done before the resumed save."""
        if interval is None or self.step == self.ended_at:  # what the end asks for was done before the save
            return False
        if self.step % interval:
            return self.finished
        return self.step != self.resumed_at  # what this step asks for was done before the save

    @contextmanager
    def pause(self, wait: bool) -> Iterator[None]:
        """A context whose duration does not count as training time. With `wait`, a GPU first ends the steps before it, which do count."""
        if wait:
            wait_for(self.device)
        start = time.perf_counter()
        self.elapsed = self.seconds + start - self.clock
        yield
        self.clock += time.perf_counter() - start

    def look(self, log: RunLog | NoLog) -> None:
        """Measure and record what is due, and check that the replicas are equal."""
        cfg, observer, placement = self.cfg, self.observer, self.placement
        if self.due(cfg.eval_interval):
            self.val_loss = observer.evaluate(log, self.step, placement, self.average)
            if self.stability.observe_val_loss(self.step, self.val_loss):
                self.note_unstable(log)
        if cfg.full_eval and self.finished and self.step != self.ended_at:
            observer.evaluate_split(log, self.step, placement)
        if self.due(cfg.log.interval_spectra):
            observer.write_spectra(log, self.step, placement, wait=self.finished)
        if self.due(cfg.log.interval_certificate):
            observer.write_certificates(log, self.step)
        if self.due(cfg.log.interval_updates):
            observer.write_updates(log, self.step)
        if self.due(cfg.probe.interval):
            seen = observer.write_probe(log, self.step, placement)
            if alarm := self.stability.observe_probe(self.step, seen):
                log.write("event", self.step, event="warning", **vars(alarm))
        if self.due(cfg.launcher.checksum_interval):
            placement.check()

    @as_phase("checkpoint")
    def save(self, log: RunLog | NoLog, ended: bool) -> None:
        """Save a checkpoint. A run resumed from it has exactly the records that are written so far; ended: those of an end too."""
        self.observer.finish_spectra(log)
        log.sync()
        state = {  # all ranks compute it, since some parts are gathered from all
            "config": self.cfg.plain(),
            "data": self.data,
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "stability": self.stability.state_dict(),
            "guard": self.guard.state_dict(self.ranks),
            "average": self.average.state_dict() if self.average else None,
            "rng": self.ranks.gather_objects(rng_state(self.device)),
            "attention": self.attention.backend,
            "step": self.step,
            "seconds": self.elapsed,
            "ended": ended,
            "environment": environment(self.device),
        }
        self.placement.save(self.directory / "checkpoints", self.step, state, self.cfg.checkpoint.keep, self.val_loss)

    def abandon_step(self, log: RunLog | NoLog, before: dict[str, Any]) -> None:
        """Save the state of the last finished step, with the random numbers `before` the step that was interrupted."""
        set_rng_state(before)
        with self.pause(wait=True):
            self.note_skipped(log)
            if self.step > 0:
                self.save(log, ended=False)

    def read_back(self, log: RunLog | NoLog, loss: Tensor, norm: Tensor, multiplier: float) -> None:
        """Write one training record, for which the host waits for the device; other training steps do not wait."""
        skipped = self.guard.count  # waits for the device
        now = time.perf_counter()
        rate = speed(self.tokens / (now - self.clock), self.model, self.device, self.ranks)
        self.seconds, self.clock, self.tokens = self.seconds + now - self.clock, now, 0
        numbers = {"loss": loss, "grad_norm": norm, "lr": self.optimizers.rates(multiplier), "skipped_updates": skipped}
        numbers["fallbacks"] = self.optimizers.fallbacks(self.ranks.sum)
        log.write("train", self.step, **numbers, time=self.phase.read(), **rate)
        if compiled := self.compiler.read():
            log.write("event", self.step, **compiled)
        self.observer.finish_spectra(log, wait=False)
        self.note_skipped(log)
        if self.stability.observe_train_loss(self.step, loss.item()):
            self.note_unstable(log)

    def note_skipped(self, log: RunLog | NoLog) -> None:
        """Observe the updates that were skipped so far; the first makes the run unstable."""
        self.stability.observe_skipped(skipped := self.guard.count)
        if skipped and self.stability.unstable_step is None:
            self.stability.observe_nonfinite(*self.guard.first(self.ranks))
            self.note_unstable(log)

    def note_unstable(self, log: RunLog | NoLog) -> None:
        """Record that the run is unstable; training continues unless `stability.on_unstable` is stop."""
        seen = self.stability
        log.write("event", seen.unstable_step or 0, event="unstable", message=seen.reason, lead=seen.lead)
