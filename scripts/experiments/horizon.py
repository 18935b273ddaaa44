"""The order of the loss table, by horizon."""

from scripts.analysis.contest import REMARK, contest_table, differences, earlier_losses, known_losses, trials_by
from scripts.analysis.experiment_figures import gap_by_tokens, loss_of_trials
from scripts.analysis.search import Axis, Search
from scripts.analysis.statistics import Difference
from scripts.analysis.study import Case, Experiment, Study
from scripts.analysis.tables import HELD_OUT, PUBLISHED, STATUS, case

ASSIGNMENTS = {name.lower().replace("-", "_"): name for name in PUBLISHED}
ADAMW = {"adamw": ("assignment=unconstrained", "optim=adamw")}  # on matrices; the rest is as in the other arms
OURS = {name: (f"assignment={name}", "optim=manifold_muon") for name in ASSIGNMENTS}
THEIRS = {f"{name}_published": (f"assignment={name}", "optim=paper") for name in ASSIGNMENTS}
COMPILED = ["optim.muon.rule.compile=true"]  # in the longest runs, where it saves more time than it takes
UNDECAYED = {"all_stiefel", *THEIRS} - {"unconstrained_published"}  # there no decay acts on a matrix
PAPER = {  # tokens of the runs of arXiv 2606.13276, one seed each, and their losses minus that of Unconstrained
    name: (3.28e9, float(PUBLISHED[name]) - float(PUBLISHED["Unconstrained"])) for name in ("Hetero", "All-Stiefel")
}


def searched(study: Study, case: Case) -> list[Axis]:
    """Learning rate and weight decay of the matrices. Embeddings, head and norms have the same AdamW in every case."""
    rate = Axis("optim.matrices.lr", 3e-3 if case["arm"] in ADAMW else 0.05)
    return [rate] if case["arm"] in UNDECAYED else [rate, Axis("optim.matrices.weight_decay", 0.1, 4.0)]


def baseline(case: Case) -> dict[str, str]:
    """Unconstrained under the same step rule; for AdamW, under ours."""
    return {"arm": "unconstrained_published" if case["arm"] in THEIRS else "unconstrained"}


def curves(study: Study) -> dict[str, dict[float, Difference]]:
    """What the picture shows, label → tokens → difference: arms of our step rule; those of the published one if no others are asked for."""
    found, theirs = dict[str, dict[float, Difference]](), THEIRS.keys() >= {*study.axes["arm"]}
    for (arm, steps), apart in differences(known_losses(study), [*study.axes], baseline).items():
        if (arm in THEIRS) == theirs:
            label, tokens = arm.removesuffix("_published"), int(steps) * study.runs[0].config["global_batch_tokens"]
            found.setdefault(ASSIGNMENTS.get(label, "AdamW"), {})[tokens] = apart
    return found


COLUMNS = [case("steps", "max_steps"), case("arm", "arm"), HELD_OUT, STATUS]
EXPERIMENT = Experiment(
    hypothesis="Do the constrained assignments close up on Unconstrained as training gets longer, each at its own best rate and decay?\n"
    "earlier= names the table.json of other commands of it: the picture shows their losses too, and the table may compare with them.",
    base=("experiment=horizon",),
    axes={"arm": {**ADAMW, **OURS, **THEIRS}, "max_steps": "250,1000,4000,16000"},
    derived=lambda study, case: COMPILED if case["arm"] in OURS and case["max_steps"] == "16000" else [],
    search=Search(searched, along="max_steps"),
    seeds="1,2,3",
    options={"trials": 6, "further_trials": 6, "earlier": ""},
    check=earlier_losses,
    tables=lambda study: [contest_table(study, COLUMNS, {"Unconstrained": baseline})],
    figures={
        "gap.png": lambda study, path: gap_by_tokens(curves(study), path, PAPER),
        "trials.png": lambda study, path: loss_of_trials(trials_by(study, "max_steps", "arm"), path),
    },
    remark=lambda study: REMARK,
)
