"""The failure of attention at 30M parameters."""

from dataclasses import replace

from scripts.experiments import instability_small

EXPERIMENT = replace(
    instability_small.EXPERIMENT,
    hypothesis="The same question as instability_small at 30M parameters: about an hour on one large GPU.",
    base=("experiment=instability_one_gpu",),
    workers=1,
)
