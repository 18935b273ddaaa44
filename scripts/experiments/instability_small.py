"""The failure of attention at small scale."""

from scripts.analysis.experiment_figures import warning_signs
from scripts.analysis.study import Experiment, Study
from scripts.analysis.tables import ATTENTION_COLUMNS, ATTENTION_REMARK, case

STEP_RULE_NAMES = {"paper": "published", "manifold_muon": "certified"}


def rows(study: Study) -> dict[str, list]:
    """The rows of the picture: runs by step rule and learning rate."""
    found = study.grouped("optim", "optim.muon.lr")
    return {f"{STEP_RULE_NAMES.get(optim, optim)}, lr {rate}": runs for (optim, rate), runs in found.items()}


EXPERIMENT = Experiment(
    hypothesis="Which assignments saturate the softmax, when, and does the loss rise? Five assignments under both step rules, at two rates.",
    base=("experiment=instability_small",),
    axes={
        "optim": "paper,manifold_muon",
        "optim.muon.lr": "0.05,0.1",
        "assignment": "unconstrained,all_stiefel,all_dgram,hetero,hetero_inv",
    },
    columns=lambda study: [
        case("step rule", "optim"),
        case("lr", "optim.muon.lr"),
        case("assignment", "assignment"),
        *ATTENTION_COLUMNS,
    ],
    figures={"instability.png": lambda study, path: warning_signs(rows(study), path)},
    remark=lambda study: ATTENTION_REMARK,
)
