"""The exponents of signal propagation at initialisation: do tokens collapse, do gradients explode, and does the loss know?

    python scripts/exponents.py                                           every assignment of the demonstration, a minute
    python scripts/exponents.py experiment=paper seeds=2                  GPT-2 124M
    python scripts/exponents.py experiment=ngpt_demo assignments=adamw    nGPT, on its sphere
    python scripts/exponents.py scan=13 skip=normalised                   and a phase diagram of 13 x 13 models
    python scripts/exponents.py train=5 max_steps=200                     and the final loss of 5 x 5 trained models against |λ|

Overrides of train.py say which model; it is only built, not trained, unless `train=` asks for it. Options of this command:

    assignments=   which initialisations are compared (adamw,all_stiefel,all_dgram,hetero,hetero_inv)
    seeds=         models per line and per point of the phase diagram (5)
    correlation=   of the synthetic tokens (0.99)
    scan=          points along each axis of the phase diagram, residual strength and scale of c_fc; 0: none
    skip=          what multiplies the stream in the scan: one, or normalised, √(1 - α²)
    train=         points along each axis of the trained grid; 0: none
    workers=       runs trained side by side (2)
    output_dir=    where they are kept (outputs/exponents)
    results=       where exponents.md, exponents.json and the pictures are written (results/exponents)
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.loader import validation_windows
from model.exponents import SKIPS, Exponents, closed_form, embedded, measure, near_collapse
from model.gpt import GPT
from scripts.command import UsageError, as_code, parse, run
from scripts.grid import Job, run_grid
from scripts.runs import read_run
from train import check, open_data
from training.build import build_optimizers, gpt_config
from training.config import compose
from training.run import environment
from training.settings import Settings
from training.transfer import transferred

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {
    "assignments": "adamw,all_stiefel,all_dgram,hetero,hetero_inv",
    "seeds": 5,
    "correlation": 0.99,
    "scan": 0,
    "skip": "normalised",
    "train": 0,
    "workers": 2,
    "output_dir": "outputs/exponents",
    "results": "",
}
BATCH = 4  # sequences a model is measured on
SCAN_STRENGTHS, SCAN_SCALES = (0.1, 0.95), (0.5, 16.0)
TRAIN_RESIDUALS, TRAIN_SCALES = (0.25, 16.0), (0.25, 8.0)
SEED_OF_RESULTS = 1337


@dataclass(frozen=True)
class Estimate:
    """Mean and standard error over seeds."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of at least one value; a single one has no error."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error)

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + ("" if math.isnan(self.error) else f" ± {self.error:.3f}")


def build(cfg: Settings, seed: int) -> GPT:
    """The model of a configuration as training would begin with it: its weights on their manifolds and, for nGPT, of unit length."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(gpt_config(cfg))
    build_optimizers(model, transferred(cfg), model.unit_vectors())
    return model


def expected(model: GPT, tokens: int, correlation: float, stream: torch.Tensor, **joined: Any) -> Exponents | None:
    """The closed form for a synthetic stream, where there is one."""
    try:
        return closed_form(model, tokens, correlation, stream.square().mean().sqrt().item(), **joined)
    except ValueError:
        return None


def measured(cfg: Settings, seeds: int, correlation: float, text: torch.Tensor) -> dict[str, Estimate]:
    """λ_a and λ_g on synthetic tokens and on text (B, T), and by the closed form, over seeds."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        model, generator = build(cfg, SEED_OF_RESULTS + seed), torch.Generator().manual_seed(seed)
        synthetic = near_collapse(model, BATCH, text.size(1), correlation, generator)
        results = {
            "synthetic": measure(model, synthetic, generator),
            "closed": expected(model, text.size(1), correlation, synthetic),
            "text": measure(model, embedded(model, text), generator),
        }
        for name, exponents in results.items():
            if exponents is not None:
                found.setdefault(f"angle_{name}", []).append(exponents.angle)
                found.setdefault(f"gradient_{name}", []).append(exponents.gradient)
    return {key: Estimate.of(values) for key, values in found.items()}


HEADINGS = {
    "assignment": "assignment",
    "angle_synthetic": "λ_a, near collapse",
    "angle_closed": "closed form",
    "angle_text": "λ_a, text",
    "gradient_synthetic": "λ_g, near collapse",
    "gradient_closed": "closed form",
    "gradient_text": "λ_g, text",
}


def exponent_table(overrides: Sequence[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """One row an assignment."""
    rows = []
    for assignment in options["assignments"].split(","):
        cfg = compose([*overrides, f"assignment={assignment}"])
        check(cfg)
        windows = validation_windows(open_data(cfg).val, cfg.model.block_size, BATCH)
        text = torch.from_numpy(windows[:, :-1].astype("int64"))
        rows.append({"assignment": assignment, **measured(cfg, options["seeds"], options["correlation"], text)})
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One row for a terminal or a Markdown table."""
    return "| " + " | ".join(str(row.get(key, "–")) for key in HEADINGS) + " |"


# ---- phase diagram ----


def scan(overrides: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """Both exponents over residual strength (rows) × weight scale (columns), measured and by the closed form."""
    cfg = compose([*overrides, "assignment=adamw"])
    tokens, points = cfg.model.block_size, options["scan"]
    strengths = torch.linspace(*SCAN_STRENGTHS, points).tolist()
    scales = torch.logspace(*(math.log10(s) for s in SCAN_SCALES), points).tolist()
    fields: dict[str, list[list[float]]] = {k: [] for k in ("angle", "gradient", "angle_closed", "gradient_closed")}
    for strength in strengths:
        rows: dict[str, list[float]] = {key: [] for key in fields}
        for scale in scales:
            joined = {"strength": strength, "skip": options["skip"]}
            scaled = replace(cfg, init=replace(cfg.init, weight_scale=scale))
            seen, foretold = [], []
            for seed in range(options["seeds"]):
                model, generator = build(scaled, seed), torch.Generator().manual_seed(seed)
                stream = near_collapse(model, BATCH, tokens, options["correlation"], generator)
                seen.append(measure(model, stream, generator, **joined))
                foretold.append(expected(model, tokens, options["correlation"], stream, **joined))
            for key, kind in (("angle", "angle"), ("gradient", "gradient")):
                rows[key].append(statistics.fmean(getattr(e, kind) for e in seen))
                known = [getattr(e, kind) for e in foretold if e is not None]
                rows[f"{key}_closed"].append(statistics.fmean(known) if known else math.nan)
        for key, values in rows.items():
            fields[key].append(values)
        print(f"strength {strength:.2f} done", flush=True)
    return {"strengths": strengths, "scales": scales, "skip": options["skip"], **fields}


# ---- trained grid ----


def trained_grid(overrides: Sequence[str], options: dict[str, Any], outputs: Path) -> list[dict[str, float]]:
    """Final validation loss of models that differ in their initial scales only, with the exponents they began with.

    AdamW trains them, because a retraction would undo the scales. Raises UsageError if fewer than two came to their end.
    """
    points = options["train"]
    residuals = torch.logspace(*(math.log10(s) for s in TRAIN_RESIDUALS), points).tolist()
    scales = torch.logspace(*(math.log10(s) for s in TRAIN_SCALES), points).tolist()
    jobs, cells = [], []
    for residual in residuals:
        for scale in scales:
            settings = (f"init.residual_scale={residual:.4g}", f"init.weight_scale={scale:.4g}")
            directory = outputs / f"residual_{residual:.4g}_weight_{scale:.4g}"
            jobs.append(Job(("logger.mode=disabled", *overrides, "assignment=adamw", *settings), directory))
            cells.append({"residual_scale": residual, "weight_scale": scale})
    run_grid(jobs, options["workers"])
    ended = [(job, cell) for job, cell in zip(jobs, cells) if job.ended]
    if len(ended) < 2:
        raise UsageError(
            f"{len(ended)} of {len(jobs)} runs came to their end, too few to compare; the lines above say why"
        )
    for job, cell in ended:
        cfg = compose(list(job.overrides))
        windows = validation_windows(open_data(cfg).val, cfg.model.block_size, BATCH)
        text = torch.from_numpy(windows[:, :-1].astype("int64"))
        numbers = measured(cfg, 2, options["correlation"], text)
        cell |= {"angle": numbers["angle_synthetic"].mean, "gradient": numbers["gradient_synthetic"].mean}
        cell["loss"] = read_run(job.directory).final
    return [cell for _, cell in ended]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's ρ: the correlation of the ranks; equal values share their mean rank."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]

    return statistics.correlation(ranks(a), ranks(b))


def correlations(cells: Sequence[dict[str, float]]) -> dict[str, float]:
    """Spearman's ρ of the final loss with |λ_a|, |λ_g| and their sum; runs that diverged count as the worst."""
    loss = [x if x is not None and math.isfinite(x) else math.inf for x in (c["loss"] for c in cells)]
    angle, gradient = ([abs(c[key]) for c in cells] for key in ("angle", "gradient"))
    both = [a + g for a, g in zip(angle, gradient)]
    return {
        "|λ_a|": rank_correlation(angle, loss),
        "|λ_g|": rank_correlation(gradient, loss),
        "sum": rank_correlation(both, loss),
    }


# ---- the command ----


def work(arguments: list[str]) -> int:
    """Measure, and write what was found."""
    overrides, options = parse(arguments, OPTIONS)
    if options["seeds"] < 1 or options["skip"] not in SKIPS or not 0 < options["correlation"] < 1:
        raise UsageError(
            f"seeds={options['seeds']} must be at least 1, skip={options['skip']} one of {', '.join(SKIPS)}, "
            f"correlation={options['correlation']} in (0, 1); change that"
        )
    results = Path(options["results"] or ROOT / "results" / "exponents")
    header = ["| " + " | ".join(HEADINGS.values()) + " |", "|" + "---|" * len(HEADINGS)]
    print("\n".join(header))
    rows = exponent_table(overrides, options)
    facts: dict[str, Any] = {
        "command": " ".join(["python scripts/exponents.py", *arguments]),
        "environment": environment(),
    }
    facts["rows"] = [{k: asdict(v) if isinstance(v, Estimate) else v for k, v in row.items()} for row in rows]
    text = "\n".join([*header, *map(line, rows)])
    results.mkdir(parents=True, exist_ok=True)
    if options["scan"]:
        from scripts.probe_figures import phase_diagram

        facts["scan"] = scan(overrides, options)
        print(f"written: {phase_diagram(facts['scan'], results / 'phase.png')}")
    if options["train"]:
        from scripts.probe_figures import loss_against_exponents

        facts["trained"] = trained_grid(overrides, options, Path(options["output_dir"]))
        facts["rank_correlation"] = correlations(facts["trained"])
        told = ", ".join(f"{key} {value:+.2f}" for key, value in facts["rank_correlation"].items())
        text += f"\n\nRank correlation of the final loss of {len(facts['trained'])} trained models with {told}."
        print(text.splitlines()[-1])
        print(f"written: {loss_against_exponents(facts['trained'], results / 'loss.png')}")
    (results / "exponents.json").write_text(json.dumps(facts, indent=2) + "\n")
    (results / "exponents.md").write_text(
        f"{text}\n\nWritten by {as_code(facts['command'])}: mean ± standard error over {options['seeds']} seeds, per block. λ_a < 0: tokens "
        "collapse; λ_g > 0: gradients grow towards the first block.\n"
    )
    print(f"written: {results / 'exponents.md'}, {results / 'exponents.json'}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(work, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
