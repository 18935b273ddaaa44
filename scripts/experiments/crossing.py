"""Weight manifolds against residual rules."""

import math

from scripts.analysis.experiment_figures import heat_map
from scripts.analysis.study import Experiment, Study
from scripts.analysis.tables import ASSIGNMENT, BEST, FINAL, STATUS, Column, case
from scripts.command import UsageError


def target(study: Study) -> dict[str, float | None]:
    """The target loss: that of the command line, or the lowest loss that every run of every stable case reaches, rounded up. None without one."""
    stable = [r for group in study.groups if all(r.stable for r in group) for r in group]
    reached = [r.best for r in stable if r.best is not None]
    common = math.ceil(max(reached) * 100) / 100 if reached else None
    return {"target": study.options["target"] or common}


def require_target(study: Study) -> None:
    """Raises UsageError if the option is no loss."""
    if not 0 <= study.options["target"] < math.inf:
        raise UsageError(f"target={study.options['target']} is no loss; give a number above 0, or leave it out")


def columns(study: Study) -> list[Column]:
    """The columns of the table."""
    loss = study.facts["target"]
    return [
        ASSIGNMENT,
        case("residual", "residual"),
        BEST,
        FINAL,
        *([Column(f"steps to {loss:g}", "steps_to_target", lambda r: r.steps_to(loss), digits=0)] if loss else []),
        STATUS,
    ]


EXPERIMENT = Experiment(
    hypothesis="Which geometry of the weights suits which geometry of the stream? Assignments x residual rules at one budget.\n"
    "target= is a loss; the table shows the step at which each run reaches it. 0 takes a loss that every stable case reaches.",
    base=("experiment=crossing",),
    axes={"assignment": "unconstrained,all_stiefel,all_dgram,hetero", "residual": "pre_norm,geonorm,proj_sphere"},
    seeds="1,2,3",
    options={"target": 0.0},
    check=require_target,
    measure=target,
    columns=columns,
    figures={"heat_map.png": lambda study, path: heat_map(study.groups, "assignment", "residual", path)},
    remark=lambda study: "All cases have the same learning rate: no rule is compared at its own best one.",
)
