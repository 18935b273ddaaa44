"""Which retraction on the sphere is best, between the projection and the geodesic?"""

from dataclasses import replace

from scripts.analysis.contest import contest_table, opponents, trials_by
from scripts.analysis.experiment_figures import loss_of_trials
from scripts.analysis.figures import draw_scales
from scripts.analysis.search import Search
from scripts.experiments import residual_tuned

POWERS = ("0.5", "1", "2", "4", "8")  # 1 is the projection, 2 is Cayley's
FIXED = {f"p={p}": ("residual=p_sphere", "residual.learn_p=false", f"residual.p={p}") for p in POWERS}
GEODESIC = ("residual=p_sphere", "residual.learn_p=false", "residual.p=1000")  # nearly t itself
ARMS = {**FIXED, "geodesic": GEODESIC, "learned": ("residual=p_sphere",)}

EXPERIMENT = replace(
    residual_tuned.EXPERIMENT,
    hypothesis="arXiv 2608.02668 turns the stream by p·arctan(t/p) and finds the lowest loss at a finite p. Which p is best here?\n"
    "Each p at its own best rate and first step. The geodesic has no clamp and no offset, which GeoNorm has.",
    axes={"optimizer": residual_tuned.OPTIMIZERS, "residual": ARMS},
    search=Search(lambda study, case: residual_tuned.searched(study, {**case, "residual": "p_sphere"})),
    tables=lambda study: [contest_table(study, residual_tuned.COLUMNS, opponents("residual", "geodesic"))],
    figures={
        "scales.png": lambda study, path: draw_scales(residual_tuned.runs_of(study, "learned"), path),
        "trials.png": lambda study, path: loss_of_trials(trials_by(study, "optimizer", "residual"), path),
    },
)
