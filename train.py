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

# A job imports this file as `train`, because ranks and jobs on a cluster import the worker by name; help needs nothing of what follows.
if __name__ == "__main__":
    from training.command import run_command

    raise SystemExit(run_command(__doc__))

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.loader import Prefetcher, validation_windows
from model.probes import probe
from model.spectra import Spectra
from training.average import average_of
from training.batch import micro_batch_size
from training.build import build
from training.checks import check
from training.coordinate import coordinate_check
from training.data import batches_of, held_out_windows, open_data, separator_of
from training.init_from import start_from
from training.limits import machine_limits
from training.log import Later, NoLog, RunLog
from training.phases import Phases, as_phase
from training.placement import place
from training.ranks import Ranks, world_size
from training.resume import agreed_checkpoint, restore, resumption, rng_state, set_rng_state, state_of
from training.run import claimed, end_of, end_summary, resolve_device, speed
from training.schedule import lr_multiplier
from training.settings import Settings
from training.signals import StopSignal
from training.stability import Stability
from training.start import open_log, print_start
from training.step import FiniteGuard, accumulate, clip, mean_loss, micro_batches
from training.trace import Trace
from training.validate import cut_windows, shortened


def train(cfg: Settings, directory: Path | None = None, label: str = "") -> float:
    """Train a configuration to its end; returns the best validation loss (nats a token).

    Args:
        cfg: from `training.config.compose`.
        directory: where the run is written; None if the configuration decides.
        label: which job of a sweep this is, for the progress bar.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is written. InUse, a ConfigError: another process writes this run.
        LostRanks: another rank has ended. Stopped: a signal came, and the run has saved.
    """
    check(cfg, world_size())
    ranks = Ranks.init(cfg)
    try:
        with ranks.explained(), machine_limits(cfg), StopSignal() as stop, claimed(ranks, cfg, directory) as claim:
            run = Run(ranks, cfg, claim, label)
            if not (run.finished and ranks.from_main(end_of, claim)):
                if stop.requested(ranks):
                    stop.end(ranks, run.step)
                run.train(stop)
            return run.stability.best
    finally:
        ranks.close()


class Run:
    """The training of a configuration on one rank. Every rank computes its part of each batch; only rank 0 writes."""

    def __init__(self, ranks: Ranks, cfg: Settings, directory: Path, label: str = "") -> None:
        self.ranks, self.cfg, self.directory, self.label = ranks, cfg, directory, label
        self.device, dtype = ranks.device, resolve_device(cfg)[1]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # not of an earlier run in this process
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
        dataset = open_data(cfg)
        self.data, self.val = dataset.fingerprint, dataset.val
        windows = cfg.global_batch_tokens // cfg.model.block_size
        self.loader = batches_of(cfg, dataset.train, ranks.rank, ranks.world)
        self.micro_batch = micro_batch_size(windows // ranks.world, cfg.micro_batch_size)
        self.held_out = held_out_windows(cfg, dataset.val)
        self.probe_windows, _ = next(micro_batches(self.held_out, cfg.probe.windows, self.device))
        resumed = agreed_checkpoint(ranks, cfg, self.directory, self.data)

        torch.manual_seed(cfg.seed)
        self.model, self.optimizers = build(cfg, self.device)
        self.model.separator = separator_of(cfg, dataset)
        self.stability = Stability(cfg.stability)
        if not ranks.is_main:
            torch.manual_seed(cfg.seed + ranks.rank)  # equal weights on all ranks, but different dropout
        self.coordinates = coordinate_check(self.model, cfg)
        self.guard = FiniteGuard([name for name, _ in self.model.named_parameters()], self.device)
        self.average = average_of(cfg.average, self.model)
        self.step, self.seconds = 0, 0.0
        notes: list[str] = []
        self.origin: dict[str, Any] = {}  # a record of the weights that were not drawn here
        if resumed is not None:
            parts = (self.model, self.optimizers, self.stability, self.guard, self.average)
            self.step, self.seconds, notes = restore(resumed, cfg, *parts, ranks.rank)
        elif cfg.init_from is not None:
            measured = (self.model, self.model, self.held_out, cfg.micro_batch_size, ranks, self.autocast)
            loss = partial(mean_loss, *measured)
            self.origin, notes = start_from(ranks, cfg.init_from, self.model, self.optimizers, loss)
        self.resumed_at = self.step if resumed is not None else None
        # The loss of the current weights; None if it was not computed.
        self.val_loss: float | None = resumed.metric if resumed is not None else None
        self.full_val_loss: float | None = None
        self.phase = Phases(self.device)
        if self.optimizers.muon is not None:
            self.optimizers.muon.around_exchange = partial(self.phase, "exchange")
        self.spectra = Later("spectra")
        if ranks.is_main:
            cut = cut_windows(cfg, len(self.held_out), len(self.probe_windows))
            remarks = [*shortened(cfg, ranks.world), *cut, *resumption(resumed, cfg, notes)]
            print_start(cfg, directory, self.model, self.optimizers, remarks)

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or stability ends the run."""
        return self.step >= self.cfg.max_steps or self.stability.stopped

    def train(self, stop: StopSignal) -> None:
        """The loop: once in a while evaluate, record and save; always batch → loss → gradient → geometry → weights."""
        cfg, ranks, phase = self.cfg, self.ranks, self.phase
        about = cfg, self.directory, self.optimizers, self.step, self.resumed_at is not None, self.label
        log: RunLog | NoLog = open_log(*about) if ranks.is_main else NoLog()
        self.placement = place(self.model, self.optimizers, ranks, cfg)
        if self.origin:
            log.write("init_from", self.step, **self.origin)
        batches = Prefetcher(self.loader, self.step)
        trace = Trace(cfg.profile if ranks.is_main else None, self.directory, self.device)
        self.clock, tokens = time.perf_counter(), 0
        try:
            while True:
                stopping = stop.requested(ranks)
                with self.pause():
                    # Once in a while: evaluate on the fixed windows.
                    if self.due(cfg.eval_interval):
                        self.evaluate(log)

                    # Once in a while: record all singular values, and the certificates of the steps.
                    if self.due(cfg.log.interval_spectra):
                        self.write_spectra(log)
                    if self.due(cfg.log.interval_certificate):
                        self.write_certificates(log)
                    if self.due(cfg.log.interval_updates):
                        self.write_updates(log)

                    # Once in a while: probe attention and collapse.
                    if self.due(cfg.probe.interval):
                        self.write_probe(log)

                    # Once in a while: check that the replicas are equal, and save.
                    if self.due(cfg.launcher.checksum_interval):
                        self.placement.check()
                    if self.step > 0 and (self.due(cfg.checkpoint.interval or cfg.max_steps) or stopping):
                        self.save(log)
                if self.finished:
                    break
                if stopping:
                    stop.end(ranks, self.step)

                # Batch → loss → gradient; a stop between two micro-batches ends the run with the state of the last finished step.
                before, interrupted = rng_state(), partial(stop.interrupts, ranks)
                with phase("data"):
                    batch = batches.next(self.step)
                with phase("forward_backward"):
                    replica = self.placement.replica
                    part = accumulate(replica, batch, self.micro_batch, self.device, self.autocast, interrupted)
                if part is None:
                    self.abandon_step(log, before)
                    stop.end(ranks, self.step)
                loss = ranks.all_reduce_mean(part.clone())

                # Gradient → geometry → weights; skipped on the device if something is not finite, without a host sync.
                multiplier = lr_multiplier(self.step, **vars(cfg.schedule))
                self.optimizers.set_lr(multiplier)
                self.step, self.val_loss = self.step + 1, None
                tokens += cfg.global_batch_tokens
                self.optimizers.watch(self.due(cfg.log.interval_certificate))
                self.coordinates.watch(self.due(cfg.log.interval_updates))
                with phase("optimizer"):
                    norm, norms = clip(self.placement.gradients(), cfg.grad_clip, self.placement.whole_norms)
                    skip = self.guard.check(self.step, part, loss, norms)
                    self.optimizers.step(skip=skip)
                    self.model.clip_logits()
                    self.optimizers.zero_grad()
                    if self.average:
                        self.average.update(skip)
                trace.step()

                # Once in a while: read the numbers from the device.
                if self.step % cfg.log.interval == 0 or self.step == cfg.max_steps:
                    self.read_back(log, loss, norm, multiplier, tokens)
                    tokens = 0
            summary = end_summary(self.stability, self.seconds, self.device)
            own = {"time": phase.read(), "state_bytes": self.optimizers.state_bytes()}
            log.write("end", self.step, full_val_loss=self.full_val_loss, **own, **summary)
        finally:
            trace.close()
            batches.close()
            log.close()
            del self.placement  # DDP must not outlive the process group

    # ---- once in a while ----

    def due(self, interval: int | None) -> bool:
        """Whether an action of every `interval` steps and of the end is due (None: never). At a resumed step it was done before the save."""
        now = interval is not None and (self.step % interval == 0 or self.finished)
        return now and self.step != self.resumed_at

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A context whose duration does not count as training time."""
        start = time.perf_counter()
        self.elapsed = self.seconds + start - self.clock
        yield
        self.clock += time.perf_counter() - start

    @as_phase("eval")
    def evaluate(self, log: RunLog | NoLog) -> None:
        """Record the validation loss and observe its stability; at the end, with `full_eval`, record the loss on the whole validation split."""
        with_it = self.cfg.micro_batch_size, self.ranks, self.autocast
        self.val_loss, averaged = mean_loss(self.placement.evaluated, self.model, self.held_out, *with_it), {}
        if self.average:
            with self.average.in_place():
                averaged["average_loss"] = mean_loss(self.placement.evaluated, self.model, self.held_out, *with_it)
        log.write("eval", self.step, loss=self.val_loss, **averaged)
        if self.stability.validation(self.step, self.val_loss):
            self.note_unstable(log)
        if self.finished and self.cfg.full_eval:
            windows = validation_windows(self.val, self.cfg.model.block_size)
            self.full_val_loss = mean_loss(self.placement.evaluated, self.model, windows, *with_it)
            log.write("full_eval", self.step, loss=self.full_val_loss, tokens=windows[:, 1:].size)

    @as_phase("spectra")
    def write_spectra(self, log: RunLog | NoLog) -> None:
        """Record all singular values of every matrix that matches a rule of the assignment; on a GPU, as soon as they are known."""
        with self.placement.whole() as params:
            if self.ranks.is_main:
                self.spectra.write(log)
                self.spectra.expect(self.step, Spectra(self.optimizers.ruled_matrices(params)))
                self.spectra.write(log, wait=self.finished or self.placement.lends)

    @as_phase("certificate")
    def write_certificates(self, log: RunLog | NoLog) -> None:
        """Record how close the last step of each matrix was to the best step; the rank that owns a matrix knows it."""
        for name, certificate in self.optimizers.certificates(self.ranks.gather_objects):
            log.write("certificate", self.step, name=name, **certificate)

    @as_phase("updates")
    def write_updates(self, log: RunLog | NoLog) -> None:
        """Record how far the last step moved each parameter and the features behind it, on the first validation windows."""
        if self.ranks.is_main:
            for name, record in self.coordinates.records(self.probe_windows):
                log.write("update", self.step, name=name, **record)

    @as_phase("probe")
    def write_probe(self, log: RunLog | NoLog) -> None:
        """Record attention and collapse on the first validation windows, and an early warning. All ranks compute the same."""
        with self.placement.whole():
            seen = probe(self.model, self.probe_windows)
        log.write("probe", self.step, **seen)
        if alarm := self.stability.probe(self.step, seen):
            log.write("event", self.step, event="warning", **vars(alarm))

    @as_phase("checkpoint")
    def save(self, log: RunLog | NoLog) -> None:
        """Save a checkpoint. A run resumed from it has exactly the records that are written so far."""
        self.spectra.write(log)
        log.sync()
        rng = self.ranks.gather_objects(rng_state())
        guard = self.guard.state_dict(self.ranks)
        parts = (self.cfg, self.data, self.model, self.optimizers, self.stability, guard, self.average)
        state = state_of(*parts, self.step, self.elapsed, rng)
        keep, metric, folder = self.cfg.checkpoint.keep, self.val_loss, self.directory / "checkpoints"
        self.placement.save(folder, self.step, state, keep, metric)

    def abandon_step(self, log: RunLog | NoLog, before: dict[str, Any]) -> None:
        """Save the state of the last finished step, with the random numbers `before` the step that was interrupted."""
        set_rng_state(before)
        with self.pause():
            if self.step > 0:
                self.save(log)

    def read_back(self, log: RunLog | NoLog, loss: Tensor, norm: Tensor, multiplier: float, tokens: int) -> None:
        """Write one training record, for which the host waits for the device; other training steps do not wait."""
        skipped, now = self.guard.count, time.perf_counter()
        rate, self.seconds, self.clock = tokens / (now - self.clock), self.seconds + now - self.clock, now
        rates = self.optimizers.rates(multiplier)
        numbers = {"loss": loss, "grad_norm": norm, "lr": rates, "skipped_updates": skipped, "time": self.phase.read()}
        log.write("train", self.step, **numbers, **speed(rate, self.model, self.device, self.ranks))
        self.spectra.write(log, wait=False)
        self.stability.skipped(skipped)
        if skipped and self.stability.unstable_step is None and self.stability.nonfinite(*self.guard.first(self.ranks)):
            self.note_unstable(log)
        if math.isfinite(loss.item()) and self.stability.train(self.step, loss.item()):
            self.note_unstable(log)

    def note_unstable(self, log: RunLog | NoLog) -> None:
        """Record that the run is unstable; training continues unless `stability.on_unstable` is stop."""
        seen = self.stability
        log.write("event", seen.unstable_step or 0, event="unstable", message=seen.reason, lead=seen.lead)
