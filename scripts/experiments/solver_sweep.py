"""Our step against the published one, each at its best learning rate."""

from scripts.analysis.experiment_figures import loss_by_rate
from scripts.analysis.optima import losses_by
from scripts.analysis.runs import held_out_by_seed
from scripts.analysis.statistics import Difference
from scripts.analysis.study import Experiment, Study, best_of, loss_cell, pivot
from scripts.analysis.tables import Table

RATE = "optim.muon.lr"
RULES = {"paper": "published", "manifold_muon": "ours"}


def tables(study: Study) -> list[Table]:
    """Two tables: the losses at every rate, and the best of both step rules."""
    lines = []
    for assignment in study.axes["assignment"]:
        best = [best_of(study, RATE, assignment=assignment, optim=optim) for optim in RULES]
        found = [rate_and_runs for rate_and_runs in best if rate_and_runs is not None]
        if len(found) == len(RULES):
            theirs, ours = (held_out_by_seed(runs) for _, runs in found)
            gain = Difference.of(ours, theirs).text() if ours.keys() & theirs.keys() else ""
            cells = [cell for rate, runs in found for cell in (loss_cell(runs), rate)]
            lines.append([found[0][1][0].assignment, *cells, gain])
    headings = ["assignment", "published", "at lr", "ours", "at lr", "ours − published"]
    return [pivot(study, RATE, "lr"), Table(headings, lines, [False, *[True] * 5], "Best against best:")]


def panels_by_assignment(study: Study) -> list:
    """The panels of the picture: one for each assignment, with a curve for each step rule."""
    found: dict[str, dict] = {}
    for (_, optim), runs in study.grouped("assignment", "optim").items():
        found.setdefault(runs[0].assignment, {})[RULES.get(optim, optim)] = losses_by(runs, RATE)
    return list(found.items())


EXPERIMENT = Experiment(
    hypothesis="Does our step reach a lower loss than the published one? Both over learning rates, best against best.\n"
    "A correct solver moves one to four times further at the same learning rate, so only best can be compared with best.",
    base=("experiment=solver_sweep",),
    axes={
        "assignment": "all_stiefel,all_dgram,hetero,hetero_inv",
        "optim": ",".join(RULES),
        RATE: "0.01,0.02,0.05,0.1,0.2",
    },
    seeds="1,2,3",
    tables=tables,
    figures={
        "loss_by_rate.png": lambda study, path: loss_by_rate(
            [panels_by_assignment(study)], path, "learning rate of the matrices"
        )
    },
    remark=lambda study: (
        "The cells hold final losses. The differences are of losses on held-out text, paired by seed, with Student's 95% interval. The "
        "best rate was chosen on the same seeds."
    ),
)
