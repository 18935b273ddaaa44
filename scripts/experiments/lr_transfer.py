"""Does the best learning rate move with the size?"""

from scripts.analysis.experiment_figures import loss_by_rate
from scripts.analysis.study import Case, Experiment, Study, losses_by, optimum_table
from scripts.command import UsageError

RATE, MODELS = "optim.adamw.lr", {"none": "nGPT", "nu": "νGPT"}
SIZES = {"model.n_embd": "width", "model.n_layer": "depth", "max_steps": "steps"}


def shape(study: Study, case: Case) -> list[str]:
    """The overrides of a case: heads of the same width at every size; for νGPT also the size at which its learning rate is stated."""
    width, base, head = int(case["model.n_embd"]), study.around, study.options["head"]
    if head < 1 or width % head or int(base["model.n_embd"]) % head:
        raise UsageError(
            f"head={head} does not divide every width; choose a divisor of all widths and of the first of around="
        )
    own = {
        "n_embd": base["model.n_embd"],
        "n_head": int(base["model.n_embd"]) // head,
        "n_layer": base["model.n_layer"],
    }
    stated = [
        *(f"transfer.base.{key}={value}" for key, value in own.items()),
        f"transfer.base_steps={base['max_steps']}",
    ]
    return [f"model.n_head={width // head}", *(stated if case["transfer"] == "nu" else [])]


def panels_by_size(study: Study) -> list:
    """The panels of the picture: a row for each model, a panel for each size that is varied."""

    def curves(model: str, axis: str) -> dict:
        return {value: losses_by(runs, RATE) for value, runs in study.along(axis, transfer=model).items()}

    return [[(f"{MODELS[m]}: {SIZES[a]}", curves(m, a)) for a in SIZES] for m in study.axes["transfer"]]


EXPERIMENT = Experiment(
    hypothesis="Does the best learning rate stay as width, depth or training grows? nGPT and νGPT, one of the three varied at a time.",
    base=("experiment=lr_transfer",),
    axes={"transfer": "none,nu", "model.n_embd": "128,256,512", "model.n_layer": "2,4,8", "max_steps": "150,300,600"}
    | {RATE: "0.0025,0.005,0.01,0.02,0.04,0.08"},
    around={"model.n_embd": "128", "model.n_layer": "4", "max_steps": "300"},
    options={"head": 32},
    derived=shape,
    tables=lambda study: [optimum_table(study, RATE, "transfer", MODELS, SIZES)],
    figures={"loss_by_rate.png": lambda study, path: loss_by_rate(panels_by_size(study), path)},
)
