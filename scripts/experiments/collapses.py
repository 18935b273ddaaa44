"""The four collapses with and without skips and MLP, by depth, before and after training."""

from pathlib import Path

from scripts.analysis import collapses
from scripts.analysis.collapses import PANELS
from scripts.analysis.experiment_figures import collapse_curves
from scripts.analysis.study import Experiment, Study
from scripts.analysis.tables import FINAL, LAST_ENTROPY, STATUS, Column, case

ATTENTION_ALONE = ("model.mlp=none", "assignment=custom", "assignment.name=AdamW", "assignment.rules={attn: adamw}")
SKIPS, MLP = {"true": "skips", "false": "no skips"}, {"gelu": "MLP", "none": "no MLP"}


def columns(study: Study) -> list[Column]:
    """The columns of the table: the loss, then each collapse after training; rank in depth at initialisation too."""
    return [
        case("skips", "model.skips"),
        case("mlp", "mlp"),
        case("depth", "model.n_layer"),
        FINAL,
        collapses.digits("digits, start", "initial", study),
        collapses.digits("no mask", "unmasked", study),
        collapses.digits("trained", "trained", study),
        collapses.last_of("eff. rank", "effective_rank"),
        collapses.last_of("width", "width_rank"),
        Column("outside", "outside", lambda r: study.facts["profiles"][r.directory.name]["outside"], digits=2),
        Column("R²", "least_recovery", lambda r: r.last_probe("least_recovery"), digits=2),
        LAST_ENTROPY,
        STATUS,
    ]


def draw(study: Study, path: Path) -> Path:
    """Draw the first seed of the deepest models."""
    deepest = max(study.axes["model.n_layer"], key=int)
    found = {}
    for (depth, skips, mlp), runs in study.grouped("model.n_layer", "model.skips", "mlp").items():
        if depth == deepest:
            label = f"{SKIPS.get(skips.lower(), skips)}, {MLP[mlp]}"
            found[label] = study.facts["profiles"][runs[0].directory.name]
    curves = {title: {label: profile[kind] for label, profile in found.items()} for kind, title in PANELS.items()}
    return collapse_curves({f"{title}, depth {deepest}": of for title, of in curves.items()}, path)


EXPERIMENT = Experiment(
    hypothesis="Do tokens become equal without skips and without MLP, and does training undo it? (arXiv 2604.23681, arXiv 2103.03404)",
    base=("experiment=crossing", "assignment=adamw", "max_steps=500", "probe.interval=250"),
    axes={"model.skips": "true,false", "mlp": {"gelu": (), "none": ATTENTION_ALONE}, "model.n_layer": "4,16"},
    seeds="1,2",
    measure=collapses.profiles,
    columns=columns,
    figures={"collapse.png": draw},
    remark=lambda study: (
        "digits: -log₁₀ of ‖X − 1x̄ᵀ‖/‖X‖ after the last block, the digits in which tokens are equal (at most 15); start: at initialisation; "
        "no mask: the same weights, each token attends to all. outside: share of the last stream outside the embeddings' span, after training. "
        "eff. rank, width, R² and entropy are those of the last probe. All cases have the same learning rate."
    ),
)
