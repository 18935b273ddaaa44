"""What GeoNorm needs under AdamW."""

from dataclasses import replace

from scripts.analysis.contest import contest_table
from scripts.analysis.search import Axis, Search
from scripts.experiments import residual_tuned

GEONORM = "residual=geonorm_no_norms"
ARMS = {  # one thing is changed at a time
    "pre_norm": ("residual=pre_norm",),
    "pre_norm_start": ("residual=pre_norm", "init.residual_scale=0.03"),  # its first turns are those of GeoNorm
    "geonorm": (GEONORM,),
    "start": (GEONORM, "init.residual_scale=35"),  # and these are those of pre-norm
    "fast_angle": (GEONORM, "optim.adamw.lr_scale={angle: 10}"),  # scale and offset learn ten times as fast
    "fixed_angle": (GEONORM, "optim.adamw.lr_scale={angle: 0}"),
    "fixed_offset": (GEONORM, "optim.adamw.lr_scale={offset: 0}"),
    "no_depth_decay": (GEONORM, "residual.decay=none"),
    "gains": (GEONORM, "residual.input_norm=rms", "residual.final_norm=rms"),
    "warmup": (GEONORM, "schedule.warmup_steps=0.4"),
    "proj_start": ("residual=proj_sphere", "init.residual_scale=35"),  # the projection is not clamped
    "proj_small_step": ("residual=proj_sphere", "residual.alpha=0.1"),
    "slow_writes": (GEONORM, "optim.adamw.lr_scale={c_proj: 0.1}"),  # the matrices that write into the stream
}
OPPONENTS = {name: lambda case, name=name: {"residual": name} for name in ("pre_norm", "geonorm")}

EXPERIMENT = replace(
    residual_tuned.EXPERIMENT,
    hypothesis="Why does GeoNorm lose to pre-norm under AdamW: first turns, learned angle, outputs, norms, warm-up? Each arm changes one thing.\n"
    "Every arm at its own best rate. `start` scales c_proj to the first turns of pre-norm at width 64; `pre_norm_start` does the reverse.",
    axes={"optimizer": {"adamw": residual_tuned.OPTIMIZERS["adamw"]}, "residual": ARMS},
    options={"trials": 4},
    search=Search(lambda study, case: [Axis(*residual_tuned.RATES["adamw"])]),
    tables=lambda study: [contest_table(study, residual_tuned.COLUMNS, OPPONENTS)],
)
