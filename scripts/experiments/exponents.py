"""The exponents of signal propagation at initialisation, beside the final loss."""

from dataclasses import asdict
from typing import Any

from model.residual import RESIDUAL_RULES
from scripts.analysis import exponents
from scripts.analysis.experiment_figures import loss_against_exponents, phase_diagram
from scripts.analysis.study import Experiment, Study

PLAIN = "assignment=adamw"  # trains the models of other scales: a retraction would undo them
SCALES = ("init.attention_scale", "init.attention_residual_scale", "init.mlp_residual_scale", "init.weight_scale")


def exponents_of(study: Study) -> dict[str, Any]:
    """Exponents by assignment, over the planes of the phase diagram, and of the trained models."""
    o, overrides = study.options, [*study.experiment.base, *study.overrides]
    facts: dict[str, Any] = {"exponents": []}
    for name in o["assignments"].split(","):
        seen = exponents.estimates([*overrides, f"assignment={name}"], o["models"], o["correlation"])
        facts["exponents"].append({"assignment": name, **{key: asdict(e) for key, e in seen.items()}})
    planes, plain = exponents.PLANES if o["scan"] else (), [*overrides, PLAIN]
    facts["scan"] = [exponents.phase(plain, p, o["scan"], o["models"], o["correlation"], o["skip"]) for p in planes]
    facts["trained"] = exponents.cells(study, overrides, o["correlation"])
    facts["rank_correlation"] = exponents.correlations(facts["trained"]) if len(study.runs) > 1 else {}
    return {**facts, "fits": exponents.fits(facts["trained"]), "foretold": exponents.foretold(facts["trained"])}


EXPERIMENT = Experiment(
    hypothesis="Do tokens collapse and gradients explode at initialisation, and does the final loss depend on it?\n"
    "Networks with other initial scales, and every residual rule with every assignment at the scales of each.",
    base=("experiment=crossing", "max_steps=150", "eval_interval=50"),
    axes=dict(zip(SCALES, ("1,100,3000", "0.1,1,8", "0.25,1,8", "1,4,16")))
    | {
        "assignment": "adamw,unconstrained,all_stiefel,all_dgram,hetero,hetero_inv",
        "residual": ",".join(RESIDUAL_RULES),
    },
    around={**dict.fromkeys(SCALES, "1"), "assignment": "adamw", "residual": "pre_norm"},
    together=(SCALES, ("assignment", "residual")),
    seeds="1337",
    options={"assignments": "adamw,all_stiefel,all_dgram,hetero,hetero_inv"}
    | {"models": 5, "correlation": 0.99, "scan": 9, "skip": "normalised"},
    check=lambda study: exponents.require_sound(study.options),
    measure=exponents_of,
    tables=lambda study: exponents.tables(study.facts),
    figures={
        "phase.png": lambda study, path: study.facts["scan"] and phase_diagram(study.facts["scan"], path),
        "loss.png": lambda study, path: len(study.runs) > 1 and loss_against_exponents(study.facts["trained"], path),
    },
    remark=lambda study: exponents.exponents_remark(study.facts),
    untrained=True,
)
