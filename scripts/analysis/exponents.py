"""The exponents of signal propagation of untrained models, over seeds: by assignment, and over initial scales."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data.loader import validation_windows
from model.exponents import SKIPS, Exponents, closed_form, embedded, measured_exponents, near_collapse
from model.gpt import GPT
from scripts.analysis.runs import RecordedRun
from scripts.analysis.statistics import Estimate, rank_correlation
from scripts.analysis.tables import Table
from scripts.command import UsageError
from training.build import build
from training.checks import check
from training.config import compose
from training.data import open_data

BATCH = 4  # sequences on which a model is measured
STRENGTHS, SCALES = (0.1, 0.95), (0.5, 16.0)  # of the phase diagram
FIRST_SEED = 1337
EXPONENT_HEADINGS = {
    "assignment": "assignment",
    "angle_synthetic": "λ_a, near collapse",
    "angle_closed": "closed form",
    "angle_text": "λ_a, text",
    "gradient_synthetic": "λ_g, near collapse",
    "gradient_closed": "closed form",
    "gradient_text": "λ_g, text",
}


def initial(cfg: Any, seed: int) -> GPT:
    """The model of a configuration at the beginning of training: its weights on their manifolds and, for nGPT, of unit length."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(cfg)[0]


def expected(model: GPT, tokens: int, correlation: float, stream: torch.Tensor, **joined: Any) -> Exponents | None:
    """The exponents of a synthetic stream (B, T, d) by the closed form; None if the model has no closed form."""
    try:
        return closed_form(model, tokens, correlation, stream.square().mean().sqrt().item(), **joined)
    except ValueError:
        return None


def estimates(overrides: Sequence[str], models: int, correlation: float) -> dict[str, Estimate]:
    """λ_a and λ_g on synthetic tokens, on text, and by the closed form, as means over `models` models of a configuration."""
    cfg, found = compose(overrides), dict[str, list[float]]()
    check(cfg)
    text = open_data(cfg).val
    for seed in range(models):
        model, generator = initial(cfg, FIRST_SEED + seed), torch.Generator().manual_seed(seed)
        tokens = model.config.block_size
        windows = torch.from_numpy(validation_windows(text, tokens, BATCH)[:, :-1].astype("int64"))
        synthetic = near_collapse(model, BATCH, tokens, correlation, generator)
        results = {
            "synthetic": measured_exponents(model, synthetic, generator),
            "closed": expected(model, tokens, correlation, synthetic),
            "text": measured_exponents(model, embedded(model, windows), generator),
        }
        for name, exponents in results.items():
            if exponents is not None:
                found.setdefault(f"angle_{name}", []).append(exponents.angle)
                found.setdefault(f"gradient_{name}", []).append(exponents.gradient)
    return {key: Estimate.of(values) for key, values in found.items()}


def phase(overrides: Sequence[str], points: int, models: int, correlation: float, skip: str) -> dict[str, Any]:
    """Both exponents over residual strength (rows) and scale of c_fc (columns), measured and by the closed form."""
    strengths = torch.linspace(*STRENGTHS, points).tolist()
    scales = torch.logspace(math.log10(SCALES[0]), math.log10(SCALES[1]), points).tolist()
    fields: dict[str, list[list[float]]] = {
        key: [[0.0] * points for _ in strengths] for key in ("angle", "gradient", "angle_closed", "gradient_closed")
    }
    for column, scale in enumerate(scales):
        cfg = compose([*overrides, f"init.weight_scale={scale}"])
        for row, strength in enumerate(strengths):
            joined, seen, predicted = {"strength": strength, "skip": skip}, [], []
            for seed in range(models):
                model, generator = initial(cfg, seed), torch.Generator().manual_seed(seed)
                tokens = model.config.block_size
                stream = near_collapse(model, BATCH, tokens, correlation, generator)
                seen.append(measured_exponents(model, stream, generator, **joined))
                predicted.append(expected(model, tokens, correlation, stream, **joined))
            for kind in ("angle", "gradient"):
                known = [getattr(e, kind) for e in predicted if e is not None]
                fields[kind][row][column] = statistics.fmean(getattr(e, kind) for e in seen)
                fields[f"{kind}_closed"][row][column] = statistics.fmean(known) if known else math.nan
        print(f"weight scale {scale:.2f} done", flush=True)
    return {"strengths": strengths, "scales": scales, "skip": skip, **fields}


def cells(runs: Sequence[RecordedRun], overrides: Sequence[str], correlation: float) -> list[dict[str, Any]]:
    """A row for each run: its initial scales, its exponents at initialisation, and its final loss."""
    found = []
    for r in runs:
        settings = [f"{key}={value}" for key, value in r.case.items()]
        seen = estimates([*overrides, *settings], 2, correlation)
        scales = {key.partition(".")[2]: float(value) for key, value in r.case.items()}
        began = {kind: seen[f"{kind}_synthetic"].mean for kind in ("angle", "gradient")}
        found.append({**scales, **began, "loss": r.final})
    return found


def correlations(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Spearman's ρ of the final loss with |λ_a|, |λ_g| and their sum. A run that diverged counts as the worst."""
    loss = [x if x is not None and math.isfinite(x) else math.inf for x in (c["loss"] for c in cells)]
    angle, gradient = ([abs(c[key]) for c in cells] for key in ("angle", "gradient"))
    both = [a + g for a, g in zip(angle, gradient)]
    seen = {"|λ_a|": angle, "|λ_g|": gradient, "sum": both}
    return {name: rank_correlation(values, loss) for name, values in seen.items()}


def exponents_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of exponents, with a line for each assignment. rows: each Estimate as a dict, by key."""
    keys = list(EXPONENT_HEADINGS)[1:]
    texts = [{key: Estimate(**row[key]).text(3, "+") for key in keys if key in row} for row in rows]
    lines = [[row["assignment"], *(text.get(key, "–") for key in keys)] for row, text in zip(rows, texts)]
    return Table(list(EXPONENT_HEADINGS.values()), lines, [False, *[True] * len(keys)])


def exponents_remark(facts: Mapping[str, Any]) -> str:
    """Sentences below the table: the correlation with the losses of trained models, and what the signs mean."""
    found = ", ".join(f"{key} {value:+.2f}" for key, value in facts["rank_correlation"].items())
    trained = (
        f"Rank correlation of the final loss of {len(facts['trained'])} trained models with {found}. " if found else ""
    )
    return (
        f"{trained}Exponents: mean ± standard error over seeds, per block. λ_a < 0: tokens collapse; λ_g > 0: gradients grow "
        "towards the first block."
    )


def require_sound(options: Mapping[str, Any]) -> None:
    """Check the options of the experiment.

    Raises:
        UsageError: an option is impossible.
    """
    if options["models"] < 1 or options["skip"] not in SKIPS or not 0 < options["correlation"] < 1:
        raise UsageError(
            f"models={options['models']} must be at least 1, skip={options['skip']} one of {', '.join(SKIPS)}, "
            f"correlation={options['correlation']} in (0, 1); change that"
        )
