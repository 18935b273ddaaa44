"""Every residual rule at its own best rate."""

from scripts.analysis.contest import REMARK, contest_table, trials_by
from scripts.analysis.experiment_figures import loss_of_trials
from scripts.analysis.runs import RecordedRun
from scripts.analysis.search import Axis, Search
from scripts.analysis.stream_figures import turns
from scripts.analysis.study import Case, Experiment, Study
from scripts.analysis.tables import STATUS, TURN_COLUMNS, Column, case

FLAT = ("pre_norm", "pre_rms_norm", "post_norm", "deep_norm", "sandwich_norm", "peri_norm")
ANGLE = "optim.adamw.lr_scale={angle: 1}"  # of GeoNorm's scale and offset
RULES = {
    **{rule: (f"residual={rule}",) for rule in FLAT},
    "geonorm_no_norms": ("residual=geonorm_no_norms", ANGLE),
    "geonorm_with_norms": ("residual=geonorm_with_norms", ANGLE),
    **{rule: (f"residual={rule}",) for rule in ("proj_sphere", "cayley_sphere", "p_sphere", "ngpt")},
}
SPHERE_STEP = {  # the setting of a rule's learned step, its first value, the factor
    **dict.fromkeys(("geonorm_no_norms", "geonorm_with_norms"), ("optim.adamw.lr_scale.angle", 1.0, 10.0)),
    **dict.fromkeys(("proj_sphere", "cayley_sphere", "p_sphere"), ("residual.alpha", 0.3, 3.0)),
    "ngpt": ("residual.alpha", 0.1, 2.0),
}
OPTIMIZERS = {"adamw": ("assignment=adamw",), "muon": ("assignment=unconstrained",)}
RATES = {"adamw": ("optim.adamw.lr", 4e-3), "muon": ("optim.muon.lr", 0.05)}


def searched(study: Study, case: Case) -> list[Axis]:
    """The learning rate, and what moves the learned step of a rule that has one."""
    step = SPHERE_STEP.get(case["residual"])
    return [Axis(*RATES[case["optimizer"]])] + ([Axis(*step)] if step else [])


def by_optimizer(study: Study) -> dict[str, dict[str, list[RecordedRun]]]:
    """Optimizer → rule → runs, for the picture."""
    found: dict[str, dict[str, list[RecordedRun]]] = {}
    for (optimizer, rule), runs in study.grouped("optimizer", "residual").items():
        found.setdefault(optimizer, {})[rule] = runs
    return found


LOSS = Column("val loss", "val_loss", lambda r: r.held_out)
COLUMNS = [case("optimizer", "optimizer"), case("residual", "residual"), LOSS, *TURN_COLUMNS, STATUS]
EXPERIMENT = Experiment(
    hypothesis="Which residual rule is best, each at its own best rate, and how far does each turn the stream? Under AdamW and Muon.",
    base=("experiment=residual_tuned",),
    axes={"optimizer": OPTIMIZERS, "residual": RULES},
    search=Search(searched),
    seeds="1,2,3",
    options={"trials": 5},
    tables=lambda study: [contest_table(study, COLUMNS, {"pre_norm": lambda case: {"residual": "pre_norm"}})],
    figures={
        "turns.png": lambda study, path: turns(by_optimizer(study), path),
        "trials.png": lambda study, path: loss_of_trials(trials_by(study, "optimizer", "residual"), path),
    },
    remark=lambda study: REMARK,
)
