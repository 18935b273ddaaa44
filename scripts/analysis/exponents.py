"""The exponents of signal propagation of untrained models, over seeds: by assignment, over initial scales, and beside the final loss of
trained models: does it follow |λ_a|, |λ_g|, or both together, as arXiv 2403.02579 reports?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from data.loader import validation_windows
from model import layer_map
from model.exponents import SKIPS, Exponents, closed_form, measured_exponents, near_collapse
from model.gpt import GPT
from scripts.analysis.runs import final_losses
from scripts.analysis.statistics import Estimate, holm, rank_correlation, rank_correlation_p, rank_regression
from scripts.analysis.study import Study
from scripts.analysis.tables import Table
from scripts.command import UsageError
from training.build import build
from training.checks import check
from training.config import compose
from training.data import open_data
from training.overrides import group_choices

BATCH = 4  # sequences on which a model is measured
_OF_A_RUN = 2  # models at initialisation that are measured for each trained one
FIRST_SEED = 1337
EXPONENT_HEADINGS = {
    "assignment": "assignment",
    "angle_synthetic": "λ_a, near collapse",
    "angle_closed": "closed form",
    "angle_paper": "paper's map",
    "angle_text": "λ_a, text",
    "gradient_synthetic": "λ_g, near collapse",
    "gradient_closed": "closed form",
    "gradient_paper": "paper's map",
    "gradient_text": "λ_g, text",
}
KINDS = {  # other rule, other assignment
    (False, False): "initial scales",
    (True, False): "residual rules",
    (False, True): "assignments",
    (True, True): "rules and assignments",
}
"""How a trained network differs from GPT-2 under AdamW, for the picture."""
SIZES = {"|λ_a|": "angle", "|λ_g|": "gradient"}


# ---- phase diagram ----

STRENGTH = "strength"


@dataclass(frozen=True)
class PlaneAxis:
    """An axis of the phase diagram: a setting of the section `init`, or STRENGTH, the α by which both branches are multiplied."""

    name: str
    label: str
    low: float
    high: float
    log: bool = True

    def values(self, points: int) -> list[float]:
        """So many values, in equal steps or ratios."""
        if self.log:
            return torch.logspace(math.log10(self.low), math.log10(self.high), points, dtype=torch.float64).tolist()
        return torch.linspace(self.low, self.high, points, dtype=torch.float64).tolist()


@dataclass(frozen=True)
class Plane:
    """A plane of the phase diagram, and the settings that are the same in all of it."""

    across: PlaneAxis
    down: PlaneAxis
    fixed: Mapping[str, float]


_ATTENTION_BRANCH = PlaneAxis("attention_residual_scale", "scale of attention's branch", 1 / 32, 8)
PLANES = (
    Plane(
        PlaneAxis("weight_scale", "scale of c_fc", 1, 16),
        PlaneAxis(STRENGTH, "strength α of both branches", 0.1, 0.95, log=False),
        {"attention_residual_scale": 0.25},
    ),
    Plane(
        PlaneAxis("mlp_residual_scale", "scale of the MLP's branch", 1 / 16, 16),
        _ATTENTION_BRANCH,
        {STRENGTH: 0.7, "weight_scale": 4},
    ),
    Plane(
        PlaneAxis("attention_scale", "scale of the product of queries and keys", 10, 3000),
        _ATTENTION_BRANCH,
        {STRENGTH: 0.7, "weight_scale": 2},
    ),
)
"""Both zero lines cross each plane at width 64 with 4 layers and the normalised skip. Scales are factors of GPT-2's initial ones."""


def initial(cfg: Any, seed: int) -> GPT:
    """The model of a configuration at the beginning of training: its weights on their manifolds and, for nGPT, of unit length."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(cfg)[0]


def near_collapse_exponents(model: GPT, seed: int, correlation: float, **joined: Any) -> dict[str, Exponents]:
    """The exponents of a model near collapse: measured, and where they are derived, by our closed form and by the paper's layer map."""
    generator, tokens = torch.Generator().manual_seed(seed), model.config.block_size
    stream = near_collapse(model, BATCH, tokens, correlation, generator)
    scale = stream.square().mean().sqrt().item()
    found = {"synthetic": measured_exponents(model, stream, generator, **joined)}
    try:
        found["closed"] = closed_form(model, tokens, correlation, scale, **joined)
        found["paper"] = layer_map.exponents_of(layer_map.layer_maps(model, tokens, **joined), scale, correlation)
    except ValueError:
        pass  # nothing is derived for this model
    return found


def estimates(overrides: Sequence[str], models: int, correlation: float) -> dict[str, Estimate]:
    """λ_a and λ_g near collapse and on text, as means over `models` models of a configuration."""
    cfg, found = compose(overrides), dict[str, list[float]]()
    check(cfg)
    windows = validation_windows(open_data(cfg).val, cfg.model.block_size, BATCH)[:, :-1]
    for seed in range(models):
        model, generator = initial(cfg, FIRST_SEED + seed), torch.Generator().manual_seed(seed)
        read = model.embed(torch.from_numpy(windows.astype("int64")))
        text = {"text": measured_exponents(model, read, generator)}
        for name, exponents in {**near_collapse_exponents(model, seed, correlation), **text}.items():
            found.setdefault(f"angle_{name}", []).append(exponents.angle)
            found.setdefault(f"gradient_{name}", []).append(exponents.gradient)
    return {key: Estimate.of(values) for key, values in found.items()}


def phase(
    overrides: Sequence[str], plane: Plane, points: int, models: int, correlation: float, skip: str
) -> dict[str, Any]:
    """Both exponents over a plane, as means over `models` models: measured, by our closed form, and by the paper's layer map."""
    cfg, across, down = compose(overrides), plane.across.values(points), plane.down.values(points)
    fields: dict[str, list[list[float]]] = {}
    for y in down:
        line: dict[str, list[float]] = {}
        for x in across:
            settings = {**plane.fixed, plane.across.name: x, plane.down.name: y}
            joined = {"strength": settings.pop(STRENGTH), "skip": skip}
            here = replace(cfg, init=replace(cfg.init, **settings))
            seeds = range(models)
            found = [near_collapse_exponents(initial(here, FIRST_SEED + s), s, correlation, **joined) for s in seeds]
            for way in ("synthetic", "closed", "paper"):
                known = [f[way] for f in found if way in f]
                line.setdefault(f"angle_{way}", []).append(mean_or_nan([e.angle for e in known]))
                line.setdefault(f"gradient_{way}", []).append(mean_or_nan([e.gradient for e in known]))
        for key, values in line.items():
            fields.setdefault(key, []).append(values)
        print(f"{plane.down.label} {y:.3g} done", flush=True)
    return {"plane": asdict(plane), "across": across, "down": down, "skip": skip, **fields}


def mean_or_nan(values: Sequence[float]) -> float:
    """The mean; NaN where nothing is derived."""
    return statistics.fmean(values) if values else math.nan


# ---- trained models ----


def cells(study: Study, overrides: Sequence[str], correlation: float) -> list[dict[str, Any]]:
    """A row for each case: its settings, its exponents at initialisation, and its final loss.

    The loss is the mean over seeds, and infinite if a run became unstable.

    scaled, other_rule, other_assignment: whether its initial scales, residual rule or assignment differ from those of `around`.
    kind: see KINDS.
    """
    found = []
    for runs in study.groups:
        case = runs[0].case
        settings = [f"{key}={value}" for key, value in case.items()]
        seen = estimates([*overrides, *settings], _OF_A_RUN, correlation)
        began = {kind: seen[f"{kind}_synthetic"].mean for kind in ("angle", "gradient")}
        away = {axis for axis, value in study.around.items() if case[axis] != value}
        rule, assignment = "residual" in away, "assignment" in away
        marked = {"other_rule": rule, "other_assignment": assignment, "kind": KINDS[rule, assignment]}
        marked["scaled"] = bool(away - {"residual", "assignment"})
        losses = final_losses(runs) if all(r.stable for r in runs) else [math.inf]
        found.append({**case, **marked, **began, "loss": statistics.fmean(losses)})
    return found


def sizes_of(cells: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[float]], list[float]]:
    """|λ_a| and |λ_g| of each row by name, and the losses."""
    return {name: [abs(c[key]) for c in cells] for name, key in SIZES.items()}, [loss_of(c) for c in cells]


def loss_of(cell: Mapping[str, Any]) -> float:
    """The final loss of a row; infinite, which counts as the worst, if it is not finite."""
    return cell["loss"] if cell["loss"] is not None and math.isfinite(cell["loss"]) else math.inf


def correlations(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Spearman's ρ of the final loss with |λ_a|, |λ_g| and their sum."""
    sizes, loss = sizes_of(cells)
    both = [sum(pair) for pair in zip(*sizes.values())]
    return {name: rank_correlation(values, loss) for name, values in {**sizes, "sum": both}.items()}


def fits(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The ranks of the final loss fitted by those of |λ_a|, of |λ_g|, and of both: over all networks, and over two parts of them."""
    parts = {
        "all": cells,
        "initial scales": [c for c in cells if not (c["other_rule"] or c["other_assignment"])],
        "rules and assignments": [c for c in cells if not c["scaled"]],
    }
    found = []
    for name, part in parts.items():
        sizes, loss = sizes_of(part)
        for chosen in (["|λ_a|"], ["|λ_g|"], ["|λ_a|", "|λ_g|"]):
            fit = rank_regression({key: sizes[key] for key in chosen}, loss)
            if fit is not None:
                found.append({"networks": name, "by": " and ".join(chosen), **asdict(fit)})
    return found


def foretold(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each assignment with several residual rules: the rank correlations over the rules, and which rule λ_a would choose.

    A network whose sublayers write zero has λ_a = λ_g = 0 by construction and is left out: under pre_rms_norm c_proj is zero, unless the
    assignment brings it onto Stiefel. p: of each correlation by itself. p_holm: adjusted by Holm for all correlations that are returned.
    """
    found: list[dict[str, Any]] = []
    unscaled = [c for c in cells if not c["scaled"] and (c["angle"] or c["gradient"])]
    for assignment in dict.fromkeys(c["assignment"] for c in unscaled):
        part = sorted((c for c in unscaled if c["assignment"] == assignment), key=lambda c: abs(c["angle"]))
        if len(part) < 2:
            continue
        sizes, loss = sizes_of(part)
        rho = {name: rank_correlation(values, loss) for name, values in sizes.items()}
        found.append(
            {
                "assignment": assignment,
                "rules": len(part),
                "rho": rho,
                "p": {name: rank_correlation_p(value, len(part)) for name, value in rho.items()},
                "nearest": part[0]["residual"],
                "place": 1 + sum(x < loss[0] for x in loss),
                "best": part[loss.index(min(loss))]["residual"],
            }
        )
    adjusted = iter(holm([p for row in found for p in row["p"].values()]))
    return [{**row, "p_holm": {name: next(adjusted) for name in row["p"]}} for row in found]


# ---- what is written ----


def exponents_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of exponents, with a line for each assignment. rows: each Estimate as a dict, by key."""
    keys = list(EXPONENT_HEADINGS)[1:]
    texts = [{key: Estimate(**row[key]).text(3, "+") for key in keys if key in row} for row in rows]
    lines = [[row["assignment"], *(text.get(key, "–") for key in keys)] for row, text in zip(rows, texts)]
    return Table(list(EXPONENT_HEADINGS.values()), lines, [False, *[True] * len(keys)])


def fits_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of `fits`."""
    headings = ["networks", "number", "loss by", *(f"slope of {name}" for name in SIZES)]
    lines = [
        [row["networks"], str(row["count"]), row["by"]]
        + ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*row["slopes"][n]) if n in row["slopes"] else "–" for n in SIZES]
        + [f"{row['explained']:.2f}", f"{row['foretold']:.2f}", f"{row['error']:.1f}"]
        for row in rows
    ]
    caption = "The rank of the final loss, fitted by the ranks of the exponents:"
    return Table(
        [*headings, "R²", "R², left out", "error, places"], lines, [False, True, False, *[True] * 5], caption=caption
    )


def foretold_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of `foretold`."""
    lines = [
        [row["assignment"], str(row["rules"]), *(f"{row['rho'][n]:+.2f} (p {row['p_holm'][n]:.2f})" for n in SIZES)]
        + [row["nearest"], str(row["place"]), row["best"]]
        for row in rows
    ]
    headings = ["assignment", "rules", *(f"ρ of loss and {name}" for name in SIZES)]
    caption = "Whether the exponents foretell which residual rules train well; p is adjusted for all correlations of the table (Holm):"
    return Table(
        [*headings, "nearest to λ_a = 0", "its place", "lowest loss"],
        lines,
        [False, True, True, True, False, True, False],
        caption=caption,
    )


def networks_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    """Exponents and final loss of every residual rule with every assignment, by loss."""
    rows = sorted((c for c in cells if not c["scaled"]), key=loss_of)
    lines = [
        [c["assignment"], c["residual"], f"{c['angle']:+.3f}", f"{c['gradient']:+.3f}", f"{loss_of(c):.3f}"]
        for c in rows
    ]
    caption = "Residual rules and assignments, with the initial scales of each:"
    return Table(
        ["assignment", "residual", "λ_a", "λ_g", "final"], lines, [False, False, True, True, True], caption=caption
    )


def tables(facts: Mapping[str, Any]) -> list[Table]:
    """The tables of the experiment; those of trained models only if there are any."""
    trained = [fits_table(facts["fits"]), foretold_table(facts["foretold"]), networks_table(facts["trained"])]
    return [exponents_table(facts["exponents"]), *(table for table in trained if table.lines)]


def exponents_remark(facts: Mapping[str, Any]) -> str:
    """Sentences below the tables: the correlation with the losses of trained models, and what the words mean."""
    found = ", ".join(f"{key} {value:+.2f}" for key, value in facts["rank_correlation"].items())
    trained = (
        f"Rank correlation of the final loss of {len(facts['trained'])} trained models with {found}. " if found else ""
    )
    slopes = (
        "Slopes: Student's 95% interval. R², left out: each network is foretold by a fit to the others; error: how many places such a "
        "forecast misses by (root mean square). A run that became unstable has the last place. "
        if facts["fits"]
        else ""
    )
    left_out = (
        "pre_rms_norm is left out where its c_proj starts at zero, which it does unless it is on Stiefel: both exponents are then 0 by "
        "construction. "
        if facts["foretold"]
        else ""
    )
    return (
        f"{trained}{slopes}{left_out}Exponents: mean ± standard error over seeds, per block. λ_a < 0: tokens collapse; λ_g > 0: gradients grow "
        "towards the first block. Paper's map: no causal mask, one head, tanh, with the scales of the same weights."
    )


def require_sound(options: Mapping[str, Any]) -> None:
    """Check the options of the experiment.

    Raises:
        UsageError: an option is impossible.
    """
    if options["models"] < 1 or options["skip"] not in SKIPS or not 0 < options["correlation"] < 1:
        raise UsageError(
            f"models={options['models']} must be at least 1, skip={options['skip']} one of {', '.join(SKIPS)}, "
            f"correlation={options['correlation']} in (0, 1); change that"
        )
    unknown = [name for name in options["assignments"].split(",") if name not in group_choices("assignment")]
    if unknown or options["scan"] < 0:
        raise UsageError(
            f"assignments={options['assignments']} must be names of configs/assignment, and scan={options['scan']} at least 0; change that"
        )
