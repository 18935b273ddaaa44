"""Every residual rule under AdamW."""

from dataclasses import replace

from model.residual import RESIDUAL_RULES
from scripts.experiments import crossing

SIZE = ("model.n_embd=128", "global_batch_tokens=2048", "micro_batch_size=16")

EXPERIMENT = replace(
    crossing.EXPERIMENT,
    hypothesis="How do all residual rules compare without weight geometry? Every rule under AdamW, at the demonstration's width.",
    base=(*crossing.EXPERIMENT.base, *SIZE),
    axes={"assignment": "adamw", "residual": ",".join(RESIDUAL_RULES)},
)
