"""How alike the tokens of a run's model are after each block: at initialisation and after training."""

from __future__ import annotations

import math
from typing import Any

import torch

from data.loader import validation_windows
from model.collapse import depth
from model.gpt import GPT
from model.probes import new_directions
from scripts.analysis.experiment_figures import ROUNDING
from scripts.analysis.exponents import initial
from scripts.analysis.runs import RecordedRun, load_model
from scripts.analysis.study import Study
from scripts.analysis.tables import Column
from training.data import open_data

WINDOWS = 4
PANELS = {"initial": "at initialisation", "unmasked": "the same, no causal mask", "trained": "after training"}
"""What is measured of a run, and its words in a picture."""


@torch.no_grad()
def distances(model: GPT, x: torch.Tensor, causal: bool = True) -> list[float]:
    """‖X - 1x̄ᵀ‖/‖X‖ of the embeddings and after each block (L + 1) on the windows x (B, T) int64, in float64.

    causal: false lets every token attend to all tokens of its window. The model becomes float64.
    """
    model, T = model.double().eval(), x.size(1)
    mask = None if causal else torch.ones(1, 1, T, T, dtype=torch.bool)
    streams = [model.embed(x)]
    for block in model.transformer.h:
        streams.append(block(streams[-1], None, mask))
    return [depth(X)["distance_from_mean"].item() for X in streams]


def profile(run: RecordedRun) -> dict[str, Any]:
    """The distances of PANELS, and the share of the last stream outside the embeddings' span after training."""
    trained, cfg, _ = load_model(run.directory)
    windows = validation_windows(open_data(cfg).val, cfg.model.block_size, WINDOWS)
    x = torch.from_numpy(windows[:, :-1].astype("int64"))
    start = initial(cfg, cfg.seed)
    outside = {"outside_initial": new_directions(start, x)[-1], "outside": new_directions(trained, x)[-1]}
    curves = {"initial": distances(start, x), "unmasked": distances(start, x, False), "trained": distances(trained, x)}
    return {**curves, **outside}


def profiles(study: Study) -> dict[str, Any]:
    """The profile of every run, by the name of its directory."""
    return {"profiles": {r.directory.name: profile(r) for r in study.runs}}


def digits(heading: str, kind: str, study: Study) -> Column:
    """A column with the digits in which the tokens of the last block are equal: -log₁₀ of their distance, at most 15."""

    def value(run: RecordedRun) -> float:
        return -math.log10(max(study.facts["profiles"][run.directory.name][kind][-1], ROUNDING))

    return Column(heading, f"digits_{kind}", value, digits=2)


def last_of(heading: str, field: str) -> Column:
    """A column with the value after the last block of a list of the last probe."""
    return Column(
        heading, field, lambda r: next((p[field][-1] for p in r.records.get("probe", [])[-1:]), None), digits=2
    )
