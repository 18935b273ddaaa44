"""The exponents of signal propagation at initialisation, beside the final loss."""

from dataclasses import asdict
from typing import Any

from scripts.analysis import exponents
from scripts.analysis.experiment_figures import loss_against_exponents, phase_diagram
from scripts.analysis.study import Case, Experiment, Study

PLAIN = "assignment=adamw"  # trains the models: a retraction would undo their scales


def checked(study: Study, case: Case) -> list[str]:
    """Check the options before anything is trained; there are no further overrides."""
    exponents.require_sound(study.options)
    return []


def exponents_of(study: Study) -> dict[str, Any]:
    """Exponents by assignment, over the phase diagram, and of the trained models."""
    o, overrides, facts = study.options, study.overrides, dict[str, Any]()
    facts["exponents"] = []
    for name in o["assignments"].split(","):
        seen = exponents.estimates([*overrides, f"assignment={name}"], o["models"], o["correlation"])
        facts["exponents"].append({"assignment": name, **{key: asdict(e) for key, e in seen.items()}})
    plain = [*overrides, PLAIN]
    facts["scan"] = o["scan"] and exponents.phase(plain, o["scan"], o["models"], o["correlation"], o["skip"])
    facts["trained"] = exponents.cells(study.runs, plain, o["correlation"])
    facts["rank_correlation"] = exponents.correlations(facts["trained"]) if len(study.runs) > 1 else {}
    return facts


EXPERIMENT = Experiment(
    hypothesis="Do tokens collapse and gradients explode at initialisation, and does the final loss depend on it?",
    base=(PLAIN, "max_steps=150"),
    axes={"init.residual_scale": "0.25,0.7071,2,5.657,16", "init.weight_scale": "0.25,0.5946,1.414,3.364,8"},
    seeds="1337",
    options={"assignments": "adamw,all_stiefel,all_dgram,hetero,hetero_inv"}
    | {"models": 5, "correlation": 0.99, "scan": 9, "skip": "normalised"},
    derived=checked,
    measure=exponents_of,
    tables=lambda study: [exponents.exponents_table(study.facts["exponents"])],
    figures={
        "phase.png": lambda study, path: study.facts["scan"] and phase_diagram(study.facts["scan"], path),
        "loss.png": lambda study, path: len(study.runs) > 1 and loss_against_exponents(study.facts["trained"], path),
    },
    remark=lambda study: exponents.exponents_remark(study.facts),
    untrained=True,
)
