"""Every residual rule at its own best rate."""

from scripts.analysis.contest import REMARK, contest_table, opponents, trials_by
from scripts.analysis.experiment_figures import loss_of_trials
from scripts.analysis.figures import draw_scales
from scripts.analysis.runs import RecordedRun
from scripts.analysis.search import Axis, Search
from scripts.analysis.stream_figures import at_the_end, turns
from scripts.analysis.study import Case, Experiment, Study
from scripts.analysis.tables import HELD_OUT, STATUS, TURN_COLUMNS, case

FLAT = ("pre_norm", "pre_rms_norm", "post_norm", "deep_norm", "sandwich_norm", "peri_norm")
SPHERE = ("geonorm_no_norms", "geonorm_with_norms", "proj_sphere", "cayley_sphere", "p_sphere", "ngpt")
OPTIMIZERS = {"adamw": ("assignment=adamw",), "muon": ("assignment=unconstrained",)}
RATES = {"adamw": ("optim.adamw.lr", 4e-3), "muon": ("optim.muon.lr", 0.05)}
START = "init.residual_scale"  # of c_proj: how far the sublayers turn the stream before they have learned
STARTS = {"adamw": 36.0, "muon": 6.0}  # on the sphere, about 35 lets the first layer turn as under pre_norm


def searched(study: Study, case: Case) -> list[Axis]:
    """The learning rate; on the sphere also the first step. nGPT normalises its outputs, so its first step is alpha."""
    rule, optimizer = case["residual"], case["optimizer"]
    starts = {"ngpt": Axis("residual.alpha", 0.1), "geonorm_with_norms": Axis(START, 1.0, 6.0)}
    step = [starts.get(rule, Axis(START, STARTS[optimizer], 6.0))] if rule in (*SPHERE, "geonorm") else []
    return [Axis(*RATES[optimizer]), *step]


def by_optimizer(study: Study) -> dict[str, dict[str, list[RecordedRun]]]:
    """Optimizer → rule → runs, for the picture."""
    found: dict[str, dict[str, list[RecordedRun]]] = {}
    for (optimizer, rule), runs in study.grouped("optimizer", "residual").items():
        found.setdefault(optimizer, {})[rule] = runs
    return found


def runs_of(study: Study, rule_start: str) -> list[tuple[str, list[RecordedRun]]]:
    """A title and the runs of each case whose rule begins so, for the picture of what it learns of each sublayer."""
    cases = study.grouped("optimizer", "residual").items()
    return [(f"{optimizer}: {rule}", runs) for (optimizer, rule), runs in cases if rule.startswith(rule_start)]


COLUMNS = [case("optimizer", "optimizer"), case("residual", "residual"), HELD_OUT, *TURN_COLUMNS, STATUS]
EXPERIMENT = Experiment(
    hypothesis="Which residual rule is best, each at its own best rate, and how far does each turn the stream? Under AdamW and Muon.",
    base=("experiment=residual_tuned",),
    axes={"optimizer": OPTIMIZERS, "residual": ",".join((*FLAT, *SPHERE))},
    search=Search(searched),
    seeds="1,2,3",
    options={"trials": 5, "further_trials": 6, "search_seeds": "0,11,12"},
    measure=at_the_end,
    tables=lambda study: [contest_table(study, COLUMNS, opponents("residual", "pre_norm"))],
    figures={
        "turns.png": lambda study, path: turns(by_optimizer(study), path),
        "scales.png": lambda study, path: draw_scales(runs_of(study, "geonorm"), path),
        "trials.png": lambda study, path: loss_of_trials(trials_by(study, "optimizer", "residual"), path),
    },
    remark=lambda study: REMARK,
)
