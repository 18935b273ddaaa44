"""What a run measures once in a while: losses, singular values, certificates, updates, and what the probe sees."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from torch import nn

from data.loader import validation_windows
from data.shards import Tokens
from model.gpt import GPT
from model.probes import probe
from model.scale import scale_statistics
from model.spectra import Spectra
from training.average import Average
from training.coordinate import coordinate_check
from training.data import held_out_windows
from training.log import NoLog, RunLog
from training.optimizers import Optimizers
from training.phases import Phases, as_phase
from training.placement import Placement
from training.ranks import Ranks
from training.settings import Settings
from training.step import mean_loss, micro_batches

# The distance from its manifold, relative to ‖WᵀW‖_F, from which a matrix is reported: the published step, in bfloat16, keeps to 0.01.
_OFF = 0.05


class Observer:
    """Measures, and writes records of the step that is done. All ranks must call each method; only the log of rank 0 writes.

    Args:
        val: the validation split. phase: the clock to which the measurements belong.
        autocast: the context of the model's computation.
    """

    def __init__(
        self,
        ranks: Ranks,
        cfg: Settings,
        model: GPT,
        optimizers: Optimizers,
        val: Tokens,
        phase: Phases,
        autocast: AbstractContextManager,
    ) -> None:
        self.ranks, self.cfg, self.model, self.optimizers, self.val = ranks, cfg, model, optimizers, val
        self.phase, self.autocast = phase, autocast
        self.held_out = held_out_windows(cfg, val)
        self.probe_windows, _ = next(micro_batches(self.held_out, cfg.probe.windows, ranks.device))
        self.coordinates = coordinate_check(model, cfg)
        self.begun_spectra: tuple[int, Spectra] | None = None  # their step, and spectra that are not recorded yet

    def watch(self, certificate: bool, update: bool) -> None:
        """Let the next step keep what its certificates and the records of its updates need."""
        self.optimizers.watch(certificate)
        self.coordinates.watch(update)

    def loss(self, model: nn.Module, windows: np.ndarray | None = None) -> float:
        """The mean loss (nats a token) of `model`, which is the model or its compiled form, on the fixed windows or on others."""
        windows = self.held_out if windows is None else windows
        return mean_loss(model, self.model, windows, self.cfg.micro_batch_size, self.ranks, self.autocast)

    @as_phase("eval")
    def evaluate(self, log: RunLog | NoLog, step: int, placement: Placement, average: Average | None) -> float:
        """Record the validation loss, and that of the average of the weights, if there is one; returns the former."""
        loss, averaged = self.loss(placement.evaluated), {}
        if average:
            with average.in_place():
                averaged["average_loss"] = self.loss(placement.evaluated)
        log.write("eval", step, loss=loss, **averaged)
        return loss

    @as_phase("eval")
    def evaluate_split(self, log: RunLog | NoLog, step: int, placement: Placement) -> None:
        """Record the loss on the whole validation split."""
        windows = validation_windows(self.val, self.cfg.model.block_size)
        loss = self.loss(placement.evaluated, windows)
        log.write("full_eval", step, loss=loss, tokens=windows[:, 1:].size)

    @as_phase("spectra")
    def write_spectra(self, log: RunLog | NoLog, step: int, placement: Placement, wait: bool) -> None:
        """Record all singular values of every matrix that matches a rule; without `wait`, those of a GPU may be left to `finish_spectra`."""
        with placement.whole() as params:
            if self.ranks.is_main:
                self.finish_spectra(log)
                self.begun_spectra = step, Spectra(self.optimizers.ruled_matrices(params))
                self.finish_spectra(log, wait=wait or placement.lends)

    def finish_spectra(self, log: RunLog | NoLog, wait: bool = True) -> None:
        """Record the spectra that were begun, under their step; without `wait`, only if they are known by now."""
        if self.begun_spectra is not None and (wait or self.begun_spectra[1].done):
            (step, spectra), self.begun_spectra = self.begun_spectra, None
            records = dict(spectra.records())
            for name, record in records.items():
                log.write("spectra", step, name=name, **record)
            distances = {name: record.get("distance", 0.0) for name, record in records.items()}
            if off := {name: far for name, far in distances.items() if far > _OFF}:
                worst = max(off, key=off.__getitem__)
                message = (
                    f"{len(off)} matrices are off their manifold; the worst is {worst}, by {off[worst]:.2g} of ‖WᵀW‖_F"
                )
                log.write("event", step, event="off_manifold", message=message)

    @as_phase("certificate")
    def write_certificates(self, log: RunLog | NoLog, step: int) -> None:
        """Record how close the last step of each matrix was to the best step; the rank that owns a matrix knows it."""
        certificates = self.optimizers.certificates(self.ranks.gather_objects)
        for name, certificate in certificates:
            log.write("certificate", step, name=name, **certificate)
        if uphill := [name for name, certificate in certificates if certificate["feas"] < 0]:
            message = f"steps went uphill: of {len(uphill)} matrices, such as {uphill[0]}"
            log.write("event", step, event="uphill", message=message)

    @as_phase("updates")
    def write_updates(self, log: RunLog | NoLog, step: int) -> None:
        """Record how far the last step moved each parameter and the features behind it, on the first validation windows."""
        if self.ranks.is_main:
            for name, record in self.coordinates.records(self.probe_windows):
                log.write("update", step, name=name, **record)

    @as_phase("probe")
    def write_probe(self, log: RunLog | NoLog, step: int, placement: Placement) -> dict[str, Any]:
        """Record attention and collapse on the first validation windows, and return the record; record the learned scales too.

        All ranks compute the same.
        """
        with placement.whole():
            seen, scales = probe(self.model, self.probe_windows), scale_statistics(self.model.scales())
        log.write("probe", step, **seen)
        for name, record in scales.items():
            log.write("scales", step, name=name, **record)
        return seen
