"""Measure attention and the four collapses in a trained model: one table for each checkpoint, and curves over training.

    python scripts/probe.py outputs/first
    python scripts/probe.py outputs/first windows=8 figures=outputs/first

Every checkpoint of the run is measured on the first validation windows; the table has a line for each layer. figures= names a folder for a
picture of what the run itself measured during training (probe.interval). The columns:

    logit, p99.9       largest attention logit, and the 99.9th percentile of the head where it is largest
    entropy            of attention, relative to log(position), mean and least over heads
    saturated          share of rows with a probability above .99, mean over heads
    jacobian           norm of the softmax's Jacobian, mean over heads
    turn attn, mlp     angle in radians by which attention and the MLP of the layer turn the stream, mean over tokens (model/turns.py)
    from mean          ‖X - 1x̄ᵀ‖/‖X‖ of the stream after the layer: 0 if all tokens are equal
    cosine, eff. rank  mean cosine of pairs of tokens; effective rank of 128 tokens
    width              share of the directions that are used
    R²                 how well a linear reader that knows W_O recovers a head from the sum over heads; least over heads
    hidden             dimensions of a token's head outputs that W_O maps to zero
    mixable            dimensions in which a head's output on these windows can change while the sum stays the same, if W_O is unknown
                       (model/collapse.py, mixing_dimensions); least over heads
    gates known        the same, if the reader knows the gates of the heads; only with attention.head_gate
    outside            share of the stream after the layer that is outside the span of the embeddings (model/collapse.py, outside_span), of
                       the first d/2 tokens of each window; independent random directions would have one half

The four collapses (arXiv 2604.23681): rank in depth is `from mean`, `cosine` and `eff. rank`; rank in width is `width`; the head channel is
`R²`, `hidden`, `mixable` and `gates known`; entropy is `entropy` and `saturated`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from math import isnan, nan
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from data.loader import validation_windows
from model.collapse import ambiguous_dimensions, null_space
from model.gpt import GPT
from model.probes import head_mixing, new_directions, probe
from scripts.analysis.experiment_figures import probe_curves
from scripts.analysis.figures import sign
from scripts.analysis.runs import model_of, read_run
from scripts.analysis.tables import Table
from scripts.command import UsageError, parse, problems_of_run, refuse, run
from training.checkpoint import load
from training.data import open_data
from training.settings import Settings, settings_of
from training.validate import problems_of_directory

LAYER_HEADINGS = [
    *("layer", "logit", "p99.9", "entropy", "least", "saturated", "jacobian"),
    *("turn attn", "turn mlp", "from mean", "cosine", "eff. rank", "width", "outside", "R²", "hidden", "mixable"),
]


def checkpoints(directory: Path) -> Iterator[tuple[int, GPT, Settings]]:
    """Step, model (on the CPU) and settings of every checkpoint of a run, in order.

    Raises:
        UsageError: there is no checkpoint. CheckpointError: one is damaged.
    """
    found = sorted((directory / "checkpoints").glob("step_*"))
    if not found:
        raise UsageError(
            f"no checkpoint in {directory}/checkpoints; name a run that reached checkpoint.interval, or its end"
        )
    for path in found:
        loaded = load(path)
        yield loaded.step, model_of(loaded), settings_of(loaded.state["config"])


def layer_table(model: GPT, x: torch.Tensor) -> tuple[str, dict[str, Any]]:
    """The table of one model on the windows x (B, T) int64, for a terminal, and the record of `probe`."""
    seen, outside, mixable = probe(model, x), new_directions(model, x), [head_mixing(model, x)]
    headings = LAYER_HEADINGS
    if model.config.head_gate != "none":
        mixable.append(head_mixing(model, x, known_gates=True))
        headings = [*headings, "gates known"]
    lines = []
    for i, block in enumerate(model.transformer.h):
        heads = [seen[key][i] for key in ("logit_max", "logit_p999", "entropy", "saturated", "jacobian", "recovery")]
        logit, high, entropy, saturated, jacobian, recovered = heads
        turned = [seen["stream"][key][i] if key in seen["stream"] else nan for key in ("turn_attn", "turn_mlp")]
        after = [seen[key][i + 1] for key in ("distance_from_mean", "mean_cosine", "effective_rank", "width_rank")]
        attention = [max(logit), max(high), fmean(entropy), min(entropy), fmean(saturated), fmean(jacobian)]
        hidden = null_space(block.attn.c_proj.weight.detach())
        lines.append(
            [
                str(i),
                *(
                    "–" if isnan(n) else f"{n:.3g}"
                    for n in (*attention, *turned, *after, outside[i + 1], min(recovered))
                ),
                str(hidden),
                *(f"{int(of_heads[i].min()):,}" for of_heads in mixable),
            ]
        )
    return Table(headings, lines, [True] * len(headings)).text(), seen


def work(arguments: list[str]) -> int:
    """Print the tables, and draw the picture if figures= is given."""
    others, options = parse(arguments, {"windows": 4, "figures": ""}, problems_of_run)
    if options["windows"] < 1:
        raise UsageError(f"windows={options['windows']} must be at least 1")
    directory = Path(others[0])
    if options["figures"]:
        refuse(problems_of_directory(Path(options["figures"]), "figures"))
        trained = read_run(directory)
        if not trained.records.get("probe"):
            raise UsageError(
                f"{directory} has no probes to draw; train with probe.interval=25, or another number of steps"
            )
    for step, model, cfg in checkpoints(directory):
        if cfg.batches.documents:
            raise UsageError(
                f"{directory} keeps documents apart (batches.documents=true), which the probe does not know"
            )
        windows = validation_windows(open_data(cfg).val, cfg.model.block_size, options["windows"])
        x = torch.from_numpy(windows[:, :-1].astype("int64"))
        shape = model.config
        count = ambiguous_dimensions(x.numel(), shape.n_head, shape.n_embd // shape.n_head)
        print(f"{directory}, step {step}: {model.describe()}")
        if len(windows) < options["windows"]:
            print(f"windows={options['windows']}: the validation split has no more than {len(windows)} windows")
        table, seen = layer_table(model, x)
        print(table)
        print(
            f"  turns: {seen['stream']['path']:.3g} radians together; from the first stream to the last {seen['stream']['net']:.3g}."
        )
        print(
            f"  R² and hidden: with W_O known. mixable: with W_O unknown, one M for all {x.numel():,} tokens; with an M for each token it "
            f"would be n(H-1)w = {count:,}, the count of arXiv 2604.23681.\n"
        )
    if options["figures"]:
        target = Path(options["figures"])
        target.mkdir(parents=True, exist_ok=True)
        path = probe_curves(trained, target / "probes.png")
        sign(path, [trained])
        print(f"written: {path}")
    return 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
