"""Weight manifolds against residual rules."""

import math

from scripts.analysis.experiment_figures import heat_map
from scripts.analysis.study import Experiment, Study
from scripts.analysis.tables import BEST, FINAL, STATUS, Column, case


def target(study: Study) -> dict[str, float]:
    """The target loss: that of the command line, or the lowest loss that every run of every stable case reaches, rounded up."""
    stable = [r for group in study.groups if all(r.stable for r in group) for r in group]
    reached = [r.best for r in stable if r.best is not None]
    common = math.ceil(max(reached) * 100) / 100 if reached else math.inf
    return {"target": study.options["target"] or common}


def columns(study: Study) -> list[Column]:
    """The columns of the table."""
    loss = study.facts["target"]
    return [
        Column("assignment", "assignment", lambda r: r.assignment),
        case("residual", "residual"),
        BEST,
        FINAL,
        Column(f"steps to {loss:.2f}", "steps_to_target", lambda r: r.steps_to(loss), digits=0),
        STATUS,
    ]


EXPERIMENT = Experiment(
    hypothesis="Which geometry of the weights suits which geometry of the stream? Assignments x residual rules at one budget.\n"
    "target= is a loss; the table shows the step at which each run reaches it. 0 takes a loss that every stable case reaches.",
    base=("experiment=crossing",),
    axes={"assignment": "unconstrained,all_stiefel,all_dgram,hetero", "residual": "pre_norm,geonorm,proj_sphere"},
    seeds="1,2,3",
    options={"target": 0.0},
    measure=target,
    columns=columns,
    figures={"heat_map.png": lambda study, path: heat_map(study.groups, "assignment", "residual", path)},
    remark=lambda study: "All cases have the same learning rate: no rule is compared at its own best one.",
)
