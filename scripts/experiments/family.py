"""Points of the family of steepest descent, tuned equally."""

from scripts.analysis import contest
from scripts.analysis.experiment_figures import loss_of_trials
from scripts.analysis.search import Axis, Search
from scripts.analysis.study import Case, Experiment, Study
from scripts.analysis.tables import HELD_OUT, STATUS, Table, case

MUON = "optim=manifold_muon"
POINTS = {  # name → overrides, first learning rate, first weight decay; None: no decay acts on a matrix
    "AdamW": (("optim=adamw",), 1.5e-3, 0.1),
    "SGD": (("optim=sgd",), 0.0625, 1e-4),
    "Lion": (("optim=lion",), 7.5e-5, 1.0),
    "Shampoo": (("optim=shampoo",), 0.2, 0.1),
    "SOAP": (("optim=soap",), 7.5e-4, 0.1),
    "Muon": (("assignment=unconstrained", MUON), 0.025, 0.1),
    "NorMuon": (("assignment=unconstrained", MUON, "optim.muon.row_beta=0.95"), 0.05, 0.1),
    "Hyperball": (("assignment=all_hyperball", MUON), 0.05, None),
    "spectral sphere": (("assignment=all_spectral_sphere", MUON), 0.05, None),
    "spectral ball": (("assignment=all_spectral_ball", MUON), 0.05, 0.1),
    "oblique with gains": (("assignment=all_oblique_gain", MUON), 0.05, 0.1),
    "Stiefel": (("assignment=all_stiefel", MUON), 0.1, None),
    "DGram": (("assignment=all_dgram", MUON), 0.05, 0.1),
    "Hetero": (("assignment=hetero", MUON), 0.1, 0.1),
    "modular": (("assignment=unconstrained", "optim=modular"), 0.02, 0.1),
}


def searched(study: Study, case: Case) -> list[Axis]:
    """Learning rate and weight decay of the matrices, and with `modular` of all parameters; else the others have the same AdamW in every case."""
    _, rate, decay = POINTS[case["optimizer"]]
    return [Axis("optim.matrices.lr", rate)] + ([Axis("optim.matrices.weight_decay", decay, 4.0)] if decay else [])


def tables(study: Study) -> list[Table]:
    """A line for each optimizer and horizon."""
    named, cost = [case("steps", "max_steps"), case("optimizer", "optimizer")], contest.cost_columns(study, "AdamW")
    return [
        contest.contest_table(study, [*named, HELD_OUT, *cost, STATUS], contest.opponents("optimizer", "AdamW", "Muon"))
    ]


EXPERIMENT = Experiment(
    hypothesis="Which point of the family reaches the lowest loss, if each is searched by the same rule over rate and decay?\n"
    "earlier= names the table.json of other commands of it, with whose losses the table may compare.",
    base=("experiment=family",),
    axes={"optimizer": {name: overrides for name, (overrides, _, _) in POINTS.items()}, "max_steps": "100,400"},
    search=Search(searched, along="max_steps"),
    seeds="1,2,3",
    options={"trials": 6, "further_trials": 6, "earlier": ""},
    check=contest.earlier_losses,
    measure=lambda study: {"targets": contest.targets(study, "AdamW"), "costs": contest.costs(study)},
    tables=tables,
    figures={
        "trials.png": lambda study, path: loss_of_trials(contest.trials_by(study, "max_steps", "optimizer"), path)
    },
    remark=lambda study: contest.cost_remark(),
)
