"""What README.md and docs/ claim is what results/ shows."""

import json
import math
import re
from itertools import groupby, pairwise, product
from pathlib import Path
from statistics import fmean

import pytest
import torch
import yaml
from conftest import ROOT
from documents import EXPERIMENTS, FORMULAS, FRONT

from model.gpt import GPT
from model.residual import RESIDUAL_RULES
from optim.msign import msign
from scripts.analysis.optima import seed_slopes
from scripts.analysis.statistics import Difference, best_rate
from training.build import gpt_config
from training.config import compose

PAGES = {"demo": FRONT, "demo_paper": EXPERIMENTS}
"""The tables that a script renews, and where each stands."""
ATTENTION = ("instability_small", "published_failure", "published_horizon", "published_width")
"""The experiments on saturated attention."""


def text(file):
    return " ".join(file.read_text().split())


def result(name):
    return json.loads((ROOT / "results" / name).read_text())


def full_losses(name):
    return {row["assignment"]: row["full_val_loss"] for row in result(f"{name}/table.json")["rows"]}


def mean_loss(file, **wanted):
    return fmean(r["val_loss_final"] for r in result(file)["rows"] if all(r[key] == wanted[key] for key in wanted))


def claims():
    """Claim → command and outcome, of the table on the front."""
    lines = FRONT.read_text().split("## Claims of the sources")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    return {claim: (command, outcome) for _, claim, command, outcome in cells}


@pytest.mark.parametrize("claim", claims())
def test_a_claim_has_a_command_and_results(claim):
    command, outcome = claims()[claim]
    experiments, files = re.findall(r"`E (\w+)`", command), re.findall(r"`pytest (\S+)`", command)
    assert experiments or files or command == "`make reproduce`"
    assert all((ROOT / "scripts" / "experiments" / f"{name}.py").exists() for name in experiments)
    assert all((ROOT / file).exists() for file in files)
    there = [(ROOT / "results" / name / "table.md").exists() for name in experiments]
    assert not any(there) if outcome == "not run yet" else all(there)


# ---- the family ----


def family_losses(steps):
    """Optimizer → seed → held-out loss of its stable runs."""
    found = {}
    for r in result("family/table.json")["rows"]:
        if r["max_steps"] == steps and r["status"] == "ok":
            found.setdefault(r["optimizer"], {})[r["seed"]] = r["val_loss"]
    return found


def test_the_family_is_ordered_as_the_pages_say():
    short, long = ({name: fmean(seeds.values()) for name, seeds in family_losses(n).items()} for n in ("100", "400"))
    first, last = (sorted(losses, key=losses.get) for losses in (short, long))
    assert "SOAP is seventh at 100 steps and first at 400" in text(EXPERIMENTS)
    assert first.index("SOAP") == 6 and last[:3] == ["SOAP", "NorMuon", "Muon"] and len(last) == 13
    assert {"NorMuon", "Muon", "DGram"} <= {*first[:4]} & {*last[:4]}
    assert {name for name in long if long[name] > long["AdamW"]} == {"SGD", "Lion"}


def test_the_family_costs_what_the_page_says():
    costs = result("family/table.json")["costs"]
    assert 9 < costs["SOAP"]["state_bytes"] / costs["Muon"]["state_bytes"] < 10
    assert 4 < costs["Shampoo"]["ms_per_step"] / costs["Muon"]["ms_per_step"] < 5


def test_no_constraint_beats_muon_as_the_pages_say():
    for steps in ("100", "400"):
        found = family_losses(steps)
        apart = {name: Difference.of(found[name], found["Muon"]) for name in found if name != "Muon"}
        assert apart["DGram"].low < 0 < apart["DGram"].high
        assert all(apart[name].low > 0 for name in ("Stiefel", "Hyperball", "spectral sphere", "oblique with gains"))
        assert (apart["Hetero"].low > 0) == (steps == "100")


# ---- why Hetero ----


def by_setting(name, key):
    """Setting → the values of a key of the rows, by seed."""
    found = {}
    for r in result(name)["rows"]:
        found.setdefault(r["setting"], {})[r["seed"]] = r[key]
    return found


def mean_of(*settings):
    losses = by_setting("why_hetero/table.json", "val_loss")
    return fmean(loss for setting in settings for loss in losses[setting].values())


def mean_of_matrices(setting, matrix, key):
    lines = result("why_hetero/table.json")["matrices"]
    return fmean(m[key] for m in lines if (m["setting"], m["matrix"]) == (setting, matrix))


def test_the_explanations_of_hetero_stand_or_fall_as_the_page_says():
    losses = by_setting("why_hetero/table.json", "val_loss")

    def apart(ours, theirs):
        return Difference.of(losses[ours], losses[theirs])

    level = [("hetero", "all_stiefel"), ("all_dgram", "unconstrained"), ("hetero_inv", "unconstrained")]
    level += [("c_fc", "mlp_c_proj"), ("mlp_radius_1.5", "hetero")]
    assert all(apart(*pair).low < 0 < apart(*pair).high for pair in level)
    lower = [("all_dgram", "hetero"), ("hetero_inv", "hetero"), ("all_dgram", "all_stiefel"), ("mlp_0-1", "mlp_2-3")]
    lower += [("mlp_radius_2.5", "hetero"), ("mlp_from_unit_length", "hetero"), ("hetero", "nothing")]
    assert all(apart(*pair).high < 0 for pair in lower)
    for key, sign in (("largest_logit", 1), ("least_entropy", -1)):
        seen = by_setting("why_hetero/table.json", key)
        assert sign * fmean(seen["all_dgram"].values()) > sign * fmean(seen["hetero"].values())


def test_the_matrices_of_hetero_are_as_the_page_says():
    for matrix in ("mlp.c_fc", "mlp.c_proj"):
        assert mean_of_matrices("hetero", matrix, "length_spread") < 0.125
        assert 1.7 < mean_of_matrices("hetero", matrix, "length_mean") < 2
        assert mean_of_matrices("all_stiefel", matrix, "size_share") > 50 / (64 * 256)
        assert mean_of_matrices("all_dgram", matrix, "normal_share") > 0.9 * mean_of_matrices(
            "all_stiefel", matrix, "normal_share"
        )
    assert 0.45 < mean_of_matrices("hetero", "attn.c_attn", "normal_share") < 0.55


# ---- the demonstration ----


def test_the_tables_are_those_that_scripts_wrote():
    for file in (FRONT, EXPERIMENTS):
        found = dict(re.findall(r"<!-- table:(\w+) -->\n(.*?)<!-- /table -->", file.read_text(), re.DOTALL))
        assert found == {
            name: (ROOT / "results" / name / "table.md").read_text() for name, page in PAGES.items() if page == file
        }


def test_the_order_on_the_front_is_that_of_the_table():
    claimed = re.search(r"orders the assignments (.*?);", text(FRONT))[1]
    loss = full_losses("demo")
    assert claimed.split(" < ") == sorted(loss, key=loss.get) and len(loss) == 5
    assert "Nothing became unstable in the demonstration" in text(FRONT)
    assert {row["status"] for row in result("demo/table.json")["rows"]} == {"ok"}


def test_the_seeds_differ_as_the_front_says():
    assert "gives the same order, but between the two seeds a loss moves by up to 0.02, which is more than" in text(
        FRONT
    )
    first, second = full_losses("demo"), full_losses("demo_seed_2")
    assert sorted(first, key=first.get) == sorted(second, key=second.get)
    moved = max(abs(first[name] - second[name]) for name in first)
    assert 0.015 < moved < 0.02
    assert any(abs(a - b) < moved for losses in (first, second) for a, b in pairwise(sorted(losses.values())))


def test_the_rules_differ_as_the_page_says():
    assert (
        "Assignments with DGram on attention end lower than there. Assignments with Stiefel on attention end higher"
        in (text(EXPERIMENTS))
    )
    ours, published = full_losses("demo"), full_losses("demo_paper")
    lower = {name for name in ours if published[name] < ours[name]}
    assert {"All-DGram", "Hetero-Inv"} <= lower and not lower & {"All-Stiefel", "Hetero"}


def test_the_rules_at_their_best_rates_differ_as_the_page_says():
    assert "lower than the published one with All-Stiefel, All-DGram and Hetero. With Hetero-Inv the two are level" in (
        text(EXPERIMENTS)
    )
    best = {}
    for row in sorted(result("solver_sweep/table.json"), key=lambda row: -row["mean"]):
        best[row["assignment"], row["setting"]] = row  # the lowest comes last
    gain = {name: best[name, "paper"]["mean"] - best[name, "manifold_muon"]["mean"] for name, _ in best}
    error = {name: max(best[name, rule]["error"] for rule in ("paper", "manifold_muon")) for name in gain}
    assert {name for name in gain if gain[name] > 2 * error[name]} == {"All-Stiefel", "All-DGram", "Hetero"}
    assert abs(gain["Hetero-Inv"]) < error["Hetero-Inv"]


# ---- attention ----


def test_no_run_of_the_experiments_on_attention_became_unstable():
    assert "No run of these experiments became unstable" in text(EXPERIMENTS)
    for name in ATTENTION:
        assert {row["status"] for row in result(f"{name}/table.json")["rows"]} == {"ok"}


def test_hetero_is_ahead_exactly_where_attention_on_dgram_saturates():
    assert "Where attention on DGram saturates, Hetero ends with a lower loss" in text(EXPERIMENTS)
    seen = set()
    for name in ATTENTION:
        rows = [r for r in result(f"{name}/table.json")["rows"] if r["assignment"] in ("all_dgram", "hetero")]
        for _, group in groupby(sorted(rows, key=setting_of), setting_of):
            cases = [list(c) for _, c in groupby(sorted(group, key=assignment_of), assignment_of)]
            dgram, hetero = (fmean(r["val_loss_final"] for r in case) for case in cases)
            saturated = fmean(r["greatest_saturation"] for r in cases[0]) > 0.05
            assert (hetero < dgram) == saturated, (name, cases)
            seen.add(saturated)
    assert seen == {True, False}


def setting_of(row):
    return row["optim"], row["lr"]


def assignment_of(row):
    return row["assignment"]


def test_what_restores_attention():
    losses = {name: {} for name in ("all_dgram", "hetero_inv")}
    for row in result("mechanism/table.json")["rows"]:
        losses[row["assignment"]][row["remedy"]] = row
    for rows in losses.values():
        assert set(sorted(rows, key=lambda remedy: rows[remedy]["val_loss_final"])[:2]) == {"norm_cap", "decay"}
        entropy = {remedy: row["least_entropy"] for remedy, row in rows.items()}
        assert (
            entropy["none"] < entropy["soft_cap"] < min(entropy[r] for r in ("qk_norm", "qk_clip", "norm_cap", "decay"))
        )
        assert entropy["head_blocks"] < entropy["none"]


# ---- streams ----


def test_geonorm_beats_pre_norm_with_three_assignments_of_four_under_muon():
    assert "GeoNorm beats pre-norm with three of the four assignments" in text(EXPERIMENTS)
    wins = [
        mean_loss("crossing/table.json", assignment=a, residual="geonorm")
        < mean_loss("crossing/table.json", assignment=a, residual="pre_norm")
        for a in ("unconstrained", "all_stiefel", "all_dgram", "hetero")
    ]
    assert wins == [True, True, False, True]


def test_two_runs_of_the_retractions_became_unstable_and_a_smaller_first_step_helps():
    assert "two of their runs became unstable" in text(EXPERIMENTS)
    rows = result("residual_rules/table.json")["rows"]
    assert [r["residual"] for r in rows if r["unstable_step"] is not None] == ["cayley_sphere", "p_sphere"]
    for rule in ("proj_sphere", "cayley_sphere", "p_sphere"):
        assert mean_loss("residual_alpha/table.json", residual=rule) < mean_loss(
            "residual_rules/table.json", residual=rule
        )


def apart_by(name, key, theirs, **wanted):
    """Difference of the losses of each case from those of another, by the value of an axis."""
    losses = {}
    for r in result(f"{name}/table.json")["rows"]:
        if all(r[k] == value for k, value in wanted.items()):
            losses.setdefault(r[key], {})[r["seed"]] = r["val_loss"]
    return {case: Difference.of(found, losses[theirs]) for case, found in losses.items() if case != theirs}


def test_the_residual_rules_at_their_best_are_ordered_as_the_page_says():
    muon, adamw = (apart_by("residual_tuned", "residual", "pre_norm", optimizer=name) for name in ("muon", "adamw"))
    lower = {"geonorm_with_norms", "deep_norm", "peri_norm", "post_norm"}
    assert {rule for rule, d in muon.items() if d.high < 0} == lower
    assert muon["ngpt"].mean < muon["post_norm"].mean and 0 < muon["ngpt"].high < 0.005
    assert {rule for rule, d in muon.items() if d.low > 0} == {"sandwich_norm"}
    assert min(muon, key=lambda rule: muon[rule].mean) == "geonorm_with_norms"
    assert {rule for rule, d in adamw.items() if not d.low < 0 < d.high} == {"post_norm"} and adamw["post_norm"].low > 0
    norms = {
        name: apart_by("residual_tuned", "residual", "geonorm_with_norms", optimizer=name) for name in ("muon", "adamw")
    }
    assert all(d[rule].low > 0 for d in norms.values() for rule in ("post_norm", "sandwich_norm"))
    assert all(d["deep_norm"].low < 0 < d["deep_norm"].high for d in norms.values())
    assert all(norms["muon"][rule].low > 0 for rule in ("proj_sphere", "cayley_sphere", "p_sphere"))
    assert min(adamw, key=lambda rule: adamw[rule].mean) == "cayley_sphere"
    below = {"geonorm_no_norms", "geonorm_with_norms", "peri_norm", "ngpt", "cayley_sphere", "p_sphere"}
    assert {rule for rule, d in adamw.items() if d.mean < 0} == below
    scatter = [fmean(d.error for d in found.values()) for found in (adamw, muon)]
    assert scatter[0] > 10 * scatter[1]


def test_geonorm_under_adamw_needs_what_the_page_says():
    plain, pre_norm = (apart_by("geonorm_adamw", "residual", rule) for rule in ("geonorm", "pre_norm"))
    assert {arm for arm, d in plain.items() if d.high < 0} == {"start", "warmup"}
    assert pre_norm["start"].mean < 0 < pre_norm["start_no_decay"].mean
    assert all(plain[arm].low < 0 < plain[arm].high for arm in ("fast_angle", "fixed_angle", "fixed_offset", "gains"))
    assert abs(pre_norm["pre_norm_start"].mean) < pre_norm["pre_norm_start"].error


def test_there_are_eleven_residual_rules():
    assert (
        "eleven rules" in text(FRONT) and "ten of the eleven rules" in text(EXPERIMENTS) and len(RESIDUAL_RULES) == 11
    )
    compared = {r["residual"] for r in result("residual_rules/table.json")["rows"]}
    assert len(compared) == 10 and set(RESIDUAL_RULES) - compared == {
        "pre_rms_norm"
    }  # the norm of the public optimizer track


# ---- collapse ----


def test_tokens_become_equal_as_the_page_says():
    found = result("collapses/table.json")
    rows = {(r["skips"], r["mlp"], r["n_layer"], r["seed"]): r for r in found["rows"]}
    assert set(rows) == set(product(("true", "false"), ("gelu", "none"), ("4", "16"), (1, 2)))
    for (skips, mlp, depth, seed), row in rows.items():
        if skips == "true":
            assert row["digits_initial"] < row["digits_trained"] < 0.2
            assert mlp == "gelu" or 0.05 < row["outside"] < rows["true", "gelu", depth, seed]["outside"]
        else:
            assert 2.5 < row["digits_initial"] < 3.6 or depth == "4"
            assert row["digits_trained"] == 15 or (depth == "4" and row["digits_trained"] > row["digits_initial"])
            assert found["profiles"][Path(row["directory"]).name]["unmasked"][3] < 1e-14


# ---- exponents ----


def test_the_exponents_foretell_what_the_page_says():
    found = result("exponents/table.json")
    scales, across = (
        {f["by"]: f for f in found["fits"] if f["networks"] == part}
        for part in ("initial scales", "rules and assignments")
    )
    both = scales.pop("|λ_a| and |λ_g|")
    assert all(low > 0 for _, low, _ in both["slopes"].values()) and f"{both['foretold']:.0%}" == "13%"
    assert all(0 < f["foretold"] < both["foretold"] for f in scales.values())
    assert all(f["foretold"] < 0 for f in across.values())
    assert all(f["nearest"] != f["best"] for f in found["foretold"]) and len(found["foretold"]) == 6
    assert sum(f["best"] == "peri_norm" for f in found["foretold"] if f["assignment"] != "adamw") > 2
    near = {
        e["assignment"]: (e["angle_synthetic"]["mean"], e["gradient_synthetic"]["mean"]) for e in found["exponents"]
    }
    assert near["all_stiefel"][0] < 10 * near["all_dgram"][0] and near["all_stiefel"][1] > 10 * near["all_dgram"][1]
    assert near["all_dgram"] == pytest.approx(near["adamw"], abs=0.01)
    assert abs(near["hetero_inv"][0]) < 0.05 and near["hetero_inv"][1] == max(gradient for _, gradient in near.values())


# ---- the best learning rate ----


def rate_slopes(arm, axis):
    """How far the best rate of an arm moves as an axis doubles: the difference from 0 over the seeds, in octaves."""
    base = {"model.n_embd": "64", "model.n_layer": "4", "max_steps": "200"}
    optima = {}
    curves = {}
    for r in result("lr_transfer/table.json")["rows"]:
        if r["arm"] == arm and all(r[key] == value for key, value in base.items() if key != axis):
            curves.setdefault(r[axis], {}).setdefault(r["seed"], {})[float(r["optim.adamw.lr"])] = [r["val_loss_final"]]
    for size, seeds in curves.items():
        found = {seed: best_rate(curve) for seed, curve in seeds.items()}
        optima[size] = {seed: (math.log2(rate), loss, at_end) for seed, (rate, loss, at_end) in found.items()}
    slopes = seed_slopes(optima)
    assert len(slopes) == 3  # no best rate at an end
    return Difference.of(slopes, dict.fromkeys(slopes, 0.0)), {
        size: fmean(o[1] for o in f.values()) for size, f in optima.items()
    }


def test_the_best_rates_move_as_the_page_says():
    assert "by more than half an octave" in text(EXPERIMENTS) and "four fifths of an octave" in text(EXPERIMENTS)
    slopes = {
        (arm, axis): rate_slopes(arm, axis)
        for arm in ("gpt", "ngpt", "nugpt")
        for axis in ("model.n_embd", "model.n_layer", "max_steps")
    }
    moved = {key: slope.mean for key, (slope, _) in slopes.items() if not slope.low < 0 < slope.high}
    assert set(moved) == {
        ("gpt", "model.n_embd"),
        ("ngpt", "model.n_embd"),
        ("ngpt", "max_steps"),
        ("nugpt", "max_steps"),
    }
    assert max(moved["gpt", "model.n_embd"], moved["ngpt", "model.n_embd"]) < -0.5
    assert moved["ngpt", "max_steps"] == pytest.approx(-0.8, abs=0.05)
    assert moved["nugpt", "max_steps"] == pytest.approx(-0.33, abs=0.05)
    for axis, size in (("model.n_embd", "128"), ("max_steps", "400")):
        assert slopes["nugpt", axis][1][size] < slopes["ngpt", axis][1][size]


# ---- numbers ----


CLAIMS = {  # numbers with decimals in the prose: what they say, and where it is known from
    "0.8": lambda: GPT(gpt_config(compose())).parameter_count() / 1e6,
    "0.5": lambda: yaml.safe_load((ROOT / "configs" / "config.yaml").read_text())["stability"]["max_rise"],
    "0.05": lambda: mean_of("all_stiefel", "hetero") - mean_of("all_dgram", "hetero_inv"),
    "2.386": lambda: mean_loss("crossing/table.json", assignment="unconstrained", residual="geonorm"),
    "2.433": lambda: mean_loss("crossing/table.json", assignment="unconstrained", residual="pre_norm"),
    "2.431": lambda: mean_loss("crossing/table.json", assignment="all_dgram", residual="geonorm"),
    "2.427": lambda: mean_loss("crossing/table.json", assignment="all_dgram", residual="pre_norm"),
    "2.660": lambda: mean_loss("residual_rules/table.json", residual="geonorm"),
    "2.389": lambda: mean_loss("residual_rules/table.json", residual="pre_norm"),
}
ABOVE = {"0.02"}  # a bound, which test_the_seeds_differ_as_the_front_says compares


def prose(file):
    """A page without tables, code and links."""
    page = re.sub(
        r"```[\s\S]*?```|<!-- table[\s\S]*?<!-- /table -->|^\|.*$|\]\([^)]*\)|`[^`]*`",
        " ",
        file.read_text(),
        flags=re.MULTILINE,
    )
    return re.sub(r"arXiv [\d.]+|Python [\d.]+ to [\d.]+", " ", page)


def test_every_number_of_the_prose_is_checked():
    numbers = {number for file in (FRONT, EXPERIMENTS) for number in re.findall(r"\d+\.\d+", prose(file))}
    assert numbers == {*CLAIMS, *ABOVE}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_number_of_the_prose_is_what_was_measured(claim):
    digits = len(claim.partition(".")[2])
    assert f"{CLAIMS[claim]():.{digits}f}" == claim


def test_the_rounding_of_msign_is_what_is_told():
    torch.manual_seed(0)
    W = msign(torch.linalg.qr(torch.randn(1024, 256)).Q).float()
    error = torch.linalg.matrix_norm(W.T @ W - torch.eye(256)).item() / 16
    assert error == pytest.approx(5.6e-3, rel=0.05)
    assert "| 2.2e-3 | 5.6e-3 |" in FORMULAS.read_text()
    assert "5.6e-3 here, 2.2e-3 there" in (ROOT / "configs/optim/paper.yaml").read_text()
