"""Does the best learning rate move with the size?"""

from scripts.analysis.experiment_figures import loss_by_rate
from scripts.analysis.optima import losses_by, optimum_table, slope_table
from scripts.analysis.study import Case, Experiment, Study
from scripts.command import UsageError

RATE, MODELS = "optim.adamw.lr", {"gpt": "GPT", "ngpt": "nGPT", "nugpt": "νGPT"}
SIZES = {"model.n_embd": "width", "model.n_layer": "depth", "max_steps": "steps"}
OWN = ("model=ngpt_baseline", "transfer=none", "grad_clip=1.0", "schedule.warmup_steps=0.1", "optim.adamw.eps=1e-8")
ARMS = {"gpt": OWN, "ngpt": ("transfer=none",), "nugpt": ("transfer=nu",)}


def shape(study: Study, case: Case) -> list[str]:
    """The overrides of a case: heads of the same width at every size; for νGPT also the size at which its learning rate is stated."""
    width, base, head = int(case["model.n_embd"]), study.around, study.options["head"]
    home = int(base["model.n_embd"])
    if head < 1 or width % head or home % head:
        raise UsageError(
            f"head={head} does not divide every width; choose a divisor of all widths and of the first of around="
        )
    own = {"n_embd": home, "n_head": home // head, "n_layer": base["model.n_layer"]}
    stated = [*(f"transfer.base.{key}={own[key]}" for key in own), f"transfer.base_steps={base['max_steps']}"]
    return [f"model.n_head={width // head}", *(stated if case["arm"] == "nugpt" else [])]


def varied(study: Study) -> dict[str, str]:
    """The sizes that have several values; all, if none has."""
    return {axis: size for axis, size in SIZES.items() if len(study.axes[axis]) > 1} or SIZES


def panels_by_size(study: Study) -> list:
    """The panels of the picture: a row for each model, a panel for each size that is varied."""

    def curves(arm: str, axis: str) -> dict:
        return {value: losses_by(runs, RATE) for value, runs in study.along(axis, arm=arm).items()}

    sizes = varied(study).items()
    return [[(f"{MODELS[arm]}: {name}", curves(arm, a)) for a, name in sizes] for arm in study.axes["arm"]]


EXPERIMENT = Experiment(
    hypothesis="How far does the best learning rate move as width, depth or training doubles? GPT, nGPT and νGPT, one size at a time.",
    base=("experiment=lr_transfer",),
    axes={
        "arm": ARMS,
        "model.n_embd": "32,64,128",
        "model.n_layer": "2,4,8",
        "max_steps": "50,100,200,400",
        RATE: "0.005,0.01,0.02",
    },
    around={"model.n_embd": "64", "model.n_layer": "4", "max_steps": "200"},
    extended=RATE,
    seeds="1,2,3",
    options={"head": 16},
    derived=shape,
    tables=lambda study: [table(study, RATE, MODELS, varied(study)) for table in (slope_table, optimum_table)],
    figures={"loss_by_rate.png": lambda study, path: loss_by_rate(panels_by_size(study), path)},
)
