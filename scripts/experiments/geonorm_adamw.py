"""What GeoNorm needs under AdamW."""

from dataclasses import replace

from scripts.analysis.contest import contest_table, opponents
from scripts.analysis.search import Axis, Search
from scripts.experiments import residual_tuned

GEONORM = "residual=geonorm_no_norms"
ARMS = {  # most of them change one thing of pre_norm, of geonorm, or of the projection
    "pre_norm": ("residual=pre_norm",),
    "pre_norm_start": ("residual=pre_norm", "init.residual_scale=0.03"),  # its first layer turns as that of GeoNorm
    "geonorm": (GEONORM,),
    "start": (GEONORM, "init.residual_scale=35"),  # its first layer turns as that of pre-norm, layer l by 1/l of it
    "start_no_decay": (GEONORM, "init.residual_scale=35", "residual.decay=none"),  # every layer turns as under pre-norm
    "fast_angle": (GEONORM, "optim.adamw.lr_scale={angle: 10}"),  # scale and offset learn ten times as fast
    "fixed_angle": (GEONORM, "optim.adamw.lr_scale={angle: 0}"),
    "fixed_offset": (GEONORM, "optim.adamw.lr_scale={offset: 0}"),
    "no_depth_decay": (GEONORM, "residual.decay=none"),
    "gains": (GEONORM, "residual.input_norm=rms", "residual.final_norm=rms"),
    "warmup": (GEONORM, "schedule.warmup_steps=0.4"),
    "proj_start": ("residual=proj_sphere", "init.residual_scale=35"),  # as start_no_decay, but the angle is not clamped
    "proj_small_step": ("residual=proj_sphere", "residual.alpha=0.1"),
    "slow_writes": (GEONORM, "optim.adamw.lr_scale={c_proj: 0.1}"),  # the matrices that write into the stream
}
OPPONENTS = opponents("residual", "pre_norm", "geonorm")

EXPERIMENT = replace(
    residual_tuned.EXPERIMENT,
    hypothesis="Why does GeoNorm lose to pre-norm under AdamW: first turns, learned angle, outputs, norms, or warm-up?\n"
    "Every arm at its own best rate. At step 0, the first layer turns the stream in `start` as under pre-norm at width 64, and every\n"
    "layer does in `start_no_decay`. `pre_norm_start` is pre-norm whose first layer turns it as little as GeoNorm's.",
    axes={"optimizer": {"adamw": residual_tuned.OPTIMIZERS["adamw"]}, "residual": ARMS},
    options={"trials": 4, "further_trials": 6, "search_seeds": "0,11,12"},
    search=Search(lambda study, case: [Axis(*residual_tuned.RATES["adamw"])]),
    tables=lambda study: [contest_table(study, residual_tuned.COLUMNS, OPPONENTS)],
)
