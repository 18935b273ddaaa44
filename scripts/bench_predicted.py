"""Tokens a second of training GPT-2 124M on one H100-class GPU: predictions, the bars, and what was measured.

`scripts/bench.py predicted` runs this module. Nothing is timed. The time of a step under AdamW is what others measured on an H100
(modded-nanogpt of October 2024, under Adam: 473,000 tokens a second of each GPU, which is 41% of the peak). Another assignment replaces
AdamW on the matrices by the certified step. Its time is its products plus its other bytes, as in bench_counts, plus the passes of the
optimizer around it. The launch of kernels is taken to be hidden behind the device's work. The measurements are those of one device of this
class: of the last folder of results/ by name whose `bench_train.json` has a rate for AdamW.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from typing import Any

import torch

from model.gpt import GPT
from optim.assignment import assign
from optim.certified import CertifiedStep
from optim.ownership import step_flops
from scripts.bench_counts import BYTES_PER_S, PRODUCT_RATES, fused
from scripts.command import ROOT
from scripts.reproduce import ASSIGNMENTS
from scripts.timing import NOT_MEASURED, Rows
from training.build import gpt_config
from training.config import compose

TOKENS = 65536  # of a step
ADAMW_TOKENS_PER_S = 473e3
BARS = {"adamw": 500e3, "hetero": 0.95}
"""The bars: tokens a second for AdamW; for Hetero, its share of AdamW's rate."""

# Bytes a parameter: AdamW reads the weight, the gradient and two moments and writes all but the gradient. ManifoldMuon stacks gradients and
# weights (read and write), advances the momentum (read two, write two), and writes the weights back (read and write).
ADAMW_BYTES, MUON_BYTES = 28, 40


@cache
def groups_of(assignment: str) -> Counter[tuple[int, int, str]]:
    """(m, n, manifold) of every matrix of ManifoldMuon in GPT-2 124M, tall, with the number of such matrices."""
    cfg = compose(["model=gpt2_124m", f"assignment={assignment}"])
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GPT(gpt_config(cfg)).named_parameters()}
    rows = assign(shapes, cfg.assignment.rules or {}, cfg.optim.always_adamw)
    return Counter((max(row.shape), min(row.shape), row.manifold) for row in rows if row.manifold)


@cache
def step_seconds(m: int, n: int, manifold: str) -> tuple[float, float]:
    """Seconds of the certified step of one tall (m, n) matrix, at the slower and the faster rate of products."""
    flops = step_flops(CertifiedStep(products="float16"), m, n, manifold)
    _, size = fused(1, m, n, manifold, "default")
    slow, fast = (flops / rate + size / BYTES_PER_S for rate in PRODUCT_RATES)
    return slow, fast


def predicted_rows() -> Rows:
    """A row for each assignment."""
    base, rows = TOKENS / ADAMW_TOKENS_PER_S, []
    folder, measured = measurements()
    for assignment in ("adamw", *ASSIGNMENTS):
        groups = groups_of(assignment)
        numbers = sum(k * m * n for (m, n, _), k in groups.items())
        around = numbers * (MUON_BYTES - ADAMW_BYTES) / BYTES_PER_S
        slow, fast = (base + around + sum(k * step_seconds(*group)[i] for group, k in groups.items()) for i in range(2))
        bar, rate = BARS.get(assignment, "none"), measured.get(assignment)
        rows.append(
            {"assignment": assignment, "tokens/s, predicted": TOKENS / slow, "at faster products": TOKENS / fast}
            | {"share of AdamW's, predicted": base / slow, "at faster": base / fast, "bar": bar}
            | {"tokens/s, measured": rate or NOT_MEASURED}
            | {"share of AdamW's, measured": rate / measured["adamw"] if rate else NOT_MEASURED}
            | {"measured in": folder if rate else "-"}
        )
    return rows


def measurements() -> tuple[str, dict[str, float]]:
    """The last folder of results/ by name that has a rate of AdamW on a device of this class, and assignment → tokens a second of the
    certified step in it. Without such a folder, both are empty."""
    files = ROOT.glob("results/*h[12]00*/bench_train.json")
    for file in sorted(files, reverse=True):
        rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
        found = {row["assignment"]: row["tokens/s"] for row in rows if _fits(row)}
        if "adamw" in found:
            return file.parent.name, found
    return "", {}


def _fits(row: dict[str, Any]) -> bool:
    """Whether a row of bench_train.json has the rate of AdamW or of the certified step, without further settings."""
    asked = row["model"] == "gpt2_124m" and row["optim"] in ("-", "manifold_muon") and row["variant"] == "-"
    return asked and isinstance(row["tokens/s"], float)
