"""The public optimizer track: steps to a validation loss of 3.28 on FineWeb, by its rule. Needs a GPU and the published shards."""

from scripts.analysis.runs import RecordedRun
from scripts.analysis.statistics import TARGET, Estimate, judged
from scripts.analysis.study import Experiment, Study
from scripts.analysis.tables import Table

HEADINGS = ["optimizer", "assignment", f"steps to {TARGET}", "loss there", "n", "p"]


def line(runs: list[RecordedRun]) -> list[str]:
    """The cells of a case. The stopping step is the same for all seeds; without one, the loss is that of the last step of all."""
    stopped, _, losses, p = judged([dict(zip(*r.curve("eval"))) for r in runs])
    named = [runs[0].value_of(axis) for axis in ("optim", "assignment")]
    reached = "not reached" if stopped is None else str(stopped)
    return [*named, reached, Estimate.of(losses).text(4), str(len(runs)), f"{p:.1e}"]


def table(study: Study) -> list[Table]:
    """One line for each case."""
    return [Table(HEADINGS, [line(runs) for runs in study.groups], [False, False, *[True] * 4])]


EXPERIMENT = Experiment(
    hypothesis=f"In how many steps does an optimizer reach {TARGET}, by the rules of the public optimizer track?\n"
    "scripts/speedrun_log.py writes logs of the runs that can be submitted there.",
    base=("experiment=speedrun_track3",),
    axes={"optim": "manifold_muon", "assignment": "unconstrained,hetero"},
    seeds="1,2,3,4",
    workers=1,
    tables=table,
    remark=lambda study: (
        "A step counts as reached if (3.28 - mean)·√n ≥ 0.004 there: one-sided p < .001 at σ = 0.0013. "
        "p is that at the step of the loss, not adjusted for the evaluations before it."
    ),
)
