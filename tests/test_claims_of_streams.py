"""What README.md and docs/ claim of residual rules and their streams is what results/ shows."""

import math
from collections import Counter
from statistics import fmean, stdev

import pytest
from documents import EXPERIMENTS, FRONT, mean_loss, result, text
from test_claims import claims

from model.residual import RESIDUAL_RULES
from optim.geonorm import MAX_ANGLE
from scripts.analysis.statistics import Difference

BYTE_FREQUENCIES = 3.2
"""Less than the loss of the standard library's bytes if only how often each occurs is known, which is 3.2096."""
GEONORMS = ("geonorm_no_norms", "geonorm_with_norms")


def test_geonorm_and_the_projection_beside_pre_norm_under_muon():
    assert "GeoNorm ends below pre-norm with three of the four assignments" in text(EXPERIMENTS)
    names = ("unconstrained", "all_stiefel", "all_dgram", "hetero")
    apart = {
        (rule, theirs): {
            name: apart_by("crossing", "residual", theirs, "val_loss_final", assignment=name)[rule] for name in names
        }
        for rule, theirs in (("geonorm", "pre_norm"), ("proj_sphere", "pre_norm"), ("proj_sphere", "geonorm"))
    }
    below = {pair: {name for name, d in found.items() if d.high < 0} for pair, found in apart.items()}
    level = {pair: {name for name, d in found.items() if d.low < 0 < d.high} for pair, found in apart.items()}
    assert below["geonorm", "pre_norm"] == {*names} - {"all_dgram"} and level["geonorm", "pre_norm"] == {"all_dgram"}
    assert below["proj_sphere", "pre_norm"] == {"all_stiefel", "hetero"} <= level["proj_sphere", "geonorm"]
    assert level["proj_sphere", "pre_norm"] == {"unconstrained", "all_dgram"}


def test_two_runs_of_the_retractions_became_unstable_and_a_smaller_first_step_helps():
    assert "two of their runs became unstable" in text(EXPERIMENTS)
    rows = result("residual_rules/table.json")["rows"]
    assert [r["residual"] for r in rows if r["unstable_step"] is not None] == ["cayley_sphere", "p_sphere"]
    for rule in ("proj_sphere", "cayley_sphere", "p_sphere"):
        assert mean_loss("residual_alpha/table.json", residual=rule) < mean_loss(
            "residual_rules/table.json", residual=rule
        )


def apart_by(name, key, theirs, loss="val_loss", **wanted):
    """Difference of the losses of each case from those of another, by the value of an axis."""
    losses = {}
    for r in result(f"{name}/table.json")["rows"]:
        if all(r[k] == value for k, value in wanted.items()):
            losses.setdefault(r[key], {})[r["seed"]] = r[loss]
    return {case: Difference.of(found, losses[theirs]) for case, found in losses.items() if case != theirs}


def test_the_residual_rules_at_their_best_are_ordered_as_the_page_says():
    assert "four rules end below pre-norm**: GeoNorm with norms, deep-norm, peri-norm and post-norm" in text(
        EXPERIMENTS
    )
    muon, adamw = (apart_by("residual_tuned", "residual", "pre_norm", optimizer=name) for name in ("muon", "adamw"))
    lower = {"geonorm_with_norms", "deep_norm", "peri_norm", "post_norm"}
    assert {rule for rule, d in muon.items() if d.high < 0} == lower
    assert muon["ngpt"].mean < muon["post_norm"].mean and muon["ngpt"].high > 0
    assert {rule for rule, d in muon.items() if d.low > 0} == {"sandwich_norm"}
    assert min(muon, key=lambda rule: muon[rule].mean) == "geonorm_with_norms"
    lower = {*GEONORMS, "ngpt", "cayley_sphere", "p_sphere"}
    assert {rule for rule, d in adamw.items() if d.high < 0} == lower and adamw["peri_norm"].mean < 0
    assert {rule for rule, d in adamw.items() if d.low > 0} == adamw.keys() - lower - {"peri_norm"}
    norms = {
        name: apart_by("residual_tuned", "residual", "geonorm_with_norms", optimizer=name) for name in ("muon", "adamw")
    }
    assert all(d[rule].low > 0 for d in norms.values() for rule in ("post_norm", "sandwich_norm"))
    for rule in ("deep_norm", "peri_norm"):
        assert norms["muon"][rule].low < 0 < norms["muon"][rule].high and norms["adamw"][rule].low > 0
    assert all(norms["muon"][rule].low > 0 for rule in ("proj_sphere", "cayley_sphere", "p_sphere"))
    assert min(adamw, key=lambda rule: adamw[rule].mean) == "geonorm_with_norms"
    for rule in ("cayley_sphere", "p_sphere"):
        assert norms["adamw"][rule].low < 0 < norms["adamw"][rule].high
    assert norms["adamw"]["proj_sphere"].low > 0
    losses = {}
    for r in result("residual_tuned/table.json")["rows"]:
        losses.setdefault(r["optimizer"], {}).setdefault(r["residual"], []).append(r["val_loss"])
    scatter = [fmean(stdev(seeds) for seeds in losses[name].values()) for name in ("adamw", "muon")]
    assert 4.5 < scatter[0] / scatter[1] < 5.5
    said = "two of the three seeds of post-norm did not get beyond the loss of byte frequencies"
    assert said in text(EXPERIMENTS)
    stuck = [rule for rule, found in losses["adamw"].items() for loss in found if loss > BYTE_FREQUENCIES]
    assert stuck == ["post_norm"] * 2


def test_a_search_with_one_seed_tells_less_as_the_page_says():
    said = "only post-norm was apart from pre-norm. Under Muon it chose twice the rate for pre-norm, whose loss is then"
    assert said in text(EXPERIMENTS)
    adamw = apart_by("residual_tuned_one_seed", "residual", "pre_norm", optimizer="adamw")
    assert {rule for rule, d in adamw.items() if not d.low < 0 < d.high} == {"post_norm"} and adamw["post_norm"].low > 0
    found = {}
    for name in ("residual_tuned", "residual_tuned_one_seed"):
        rows = [r for r in result(f"{name}/table.json")["rows"] if r["optimizer"] == "muon"]
        found[name] = [r for r in rows if r["residual"] == "pre_norm"]
    best, other = ({float(r["optim.muon.lr"]) for r in rows} for rows in found.values())
    assert {2 * rate for rate in best} == other
    lost = mean_of_rows(found["residual_tuned_one_seed"]) - mean_of_rows(found["residual_tuned"])
    lead = -apart_by("residual_tuned", "residual", "pre_norm", optimizer="muon")["geonorm_with_norms"].mean
    assert 0.4 < lost / lead < 0.6
    trials = result("residual_tuned_one_seed/table.json")["trials"]
    tried = {
        t["optim.muon.lr"]: t["val_loss"] for t in trials if (t["optimizer"], t["residual"]) == ("muon", "pre_norm")
    }
    assert abs(tried["0.05"] - tried["0.025"]) < 0.005


def mean_of_rows(rows):
    return fmean(r["val_loss"] for r in rows)


def test_the_streams_of_the_residual_rules_are_as_the_page_says():
    assert "turns of more than 160 degrees in a sublayer" in text(EXPERIMENTS)
    found = {(s["optimizer"], s["residual"]): s for s in result("residual_tuned/table.json")["stream"]}
    assert all(fmean(found["adamw", rule]["turn"]) > math.radians(160) for rule in ("cayley_sphere", "p_sphere"))
    muon, adamw = (found[name, "pre_norm"]["step"] for name in ("muon", "adamw"))
    assert 3 < muon[1] / muon[-1] < 4.5 and adamw[-1] > adamw[1] / 2 and all(s[0] > 3 * s[1] for s in (muon, adamw))
    scales = {(name, rule): found[name, rule]["scales"] for name in ("muon", "adamw") for rule in GEONORMS}
    starts = {"scale_attn": 1, "scale_mlp": 1, "offset_attn": 0, "offset_mlp": 0}
    moved = {key: {name: [x - starts[name] for x in given[name]] for name in starts} for key, given in scales.items()}
    assert all(abs(x) < 0.1 for rule in GEONORMS for layers in moved["muon", rule].values() for x in layers)
    assert "with norms under Muon within a fortieth, and under AdamW, in both forms, within a quarter" in text(
        EXPERIMENTS
    )
    within = {("muon", "geonorm_with_norms"): 1 / 40, **{("adamw", form): 1 / 4 for form in GEONORMS}}
    for case, share in within.items():
        for i, turn in enumerate(found[case]["turn"]):
            kind, layer = ("attn", "mlp")[i % 2], i // 2
            scale, offset = (scales[case][f"{name}_{kind}"][layer] for name in ("scale", "offset"))
            clamped = min(MAX_ANGLE, (MAX_ANGLE * scale + offset) / (layer + 1))
            assert turn == pytest.approx(clamped, rel=share)
    offsets = moved["adamw", "geonorm_no_norms"]["offset_attn"]
    assert offsets[0] > 0 > max(offsets[1:]) and -0.125 < min(offsets) < -0.1


def test_the_best_retraction_has_a_finite_p_under_muon_as_the_page_says():
    said = "a half, has the lowest mean, level with 1 and 2, and ends below 4, 8 and the geodesic by more than chance"
    assert said in text(EXPERIMENTS)
    apart, nearest, learned = (
        apart_by("sphere_p_muon", "residual", theirs) for theirs in ("geodesic", "p=0.5", "learned")
    )
    assert {arm for arm, d in nearest.items() if d.low < 0 < d.high} == {"p=1", "p=2", "learned"}
    assert {arm for arm, d in nearest.items() if d.low > 0} == {"p=4", "p=8", "geodesic"}
    pre_norm = {
        r["seed"]: r["val_loss"]
        for r in result("residual_tuned/table.json")["rows"]
        if (r["optimizer"], r["residual"]) == ("muon", "pre_norm")
    }
    losses: dict[str, dict[int, float]] = {}
    for r in result("sphere_p_muon/table.json")["rows"]:
        losses.setdefault(r["residual"], {})[r["seed"]] = r["val_loss"]
    beside = [Difference.of(found, pre_norm) for found in losses.values()]
    assert "All are level with pre-norm" in text(EXPERIMENTS)
    assert len(beside) == 7 and all(d.count == 3 and d.low < 0 < d.high for d in beside)
    assert min(apart, key=lambda arm: apart[arm].mean) == "p=0.5"
    assert {arm for arm, d in apart.items() if d.high < 0} == {"p=0.5"}
    assert learned["p=2"].low < 0 < learned["p=2"].high
    [scales] = [s["scales"] for s in result("sphere_p_muon/table.json")["stream"] if s["residual"] == "learned"]
    assert all(abs(p - 2) < 0.4 for name in ("p_attn", "p_mlp") for p in scales[name])


def test_the_best_retraction_has_a_finite_p_under_adamw_as_the_page_says():
    page = text(EXPERIMENTS)
    assert "The largest fixed p that was tried, 8, is level with 4, and ends below the smaller ones" in page
    found = result("sphere_p_warmup/table.json")
    losses: dict[str, dict[str, float]] = {}
    for r in [*result("residual_tuned_warmup/table.json")["rows"], *found["rows"]]:
        losses.setdefault(r["residual"], {})[r["seed"]] = r["val_loss"]
    stable = {r["seed"] for r in found["rows"] if r["residual"] == "geodesic" and r["status"] == "ok"}
    geodesic = {seed: losses["geodesic"][seed] for seed in stable}

    def minus(one, other):
        return Difference.of(losses[one], losses[other])

    assert minus("p=8", "p=4").low < 0 < minus("p=8", "p=4").high
    for other in ("p=0.5", "p=1", "p=2", "learned", "ngpt", "pre_norm"):
        assert minus("p=8", other).high < 0
    assert minus("p=4", "pre_norm").high < 0 and minus("learned", "pre_norm").high < 0
    assert len(geodesic) == 5
    for other in ("pre_norm", "p=8"):
        apart = Difference.of(geodesic, losses[other])
        assert apart.low < 0 < apart.mean
    for form in GEONORMS:
        arms = {arm: losses[arm] for arm in ("p=0.5", "p=1", "p=2", "p=4", "p=8", "learned")} | {"geodesic": geodesic}
        assert all(Difference.of(losses[form], theirs).high < 0 for theirs in arms.values())
    assert minus("cayley_sphere", "pre_norm").mean > 0 > minus("p=2", "pre_norm").mean
    assert sum(loss > BYTE_FREQUENCIES for loss in losses["cayley_sphere"].values()) == 2
    assert max(losses["p=2"].values()) < BYTE_FREQUENCIES
    # Degrees. What is recorded of a turn is the angle to where the stream was.
    limits = {"p=0.5": 45, "p=2": 180, "p=4": 360, "p=8": 720}
    for s in found["stream"]:
        if (limit := limits.get(s["residual"])) is not None:
            missing = [abs(limit % 360 - math.degrees(turn)) for turn in s["turn"]]
            assert max(missing) < 26
        elif s["residual"] == "p=1":
            assert max(map(math.degrees, s["turn"])) < 75


def test_geonorm_under_adamw_needs_what_the_page_says():
    assert "One arm ends below plain GeoNorm by more than chance, the one with gains" in text(EXPERIMENTS)
    plain, pre_norm = (apart_by("geonorm_adamw", "residual", rule) for rule in ("geonorm", "pre_norm"))
    assert {arm for arm, d in plain.items() if not d.low < 0 < d.high} == {"gains"} and plain["gains"].high < 0
    assert plain["start"].mean < 0 > plain["slow_writes"].mean
    assert pre_norm["start"].mean < 0 < pre_norm["start_no_decay"].low
    assert pre_norm["geonorm"].mean > 0 and all(
        pre_norm[arm].low < 0 < pre_norm[arm].high for arm in ("geonorm", "start")
    )
    assert pre_norm["pre_norm_start"].low < 0 < pre_norm["pre_norm_start"].high
    trials = result("geonorm_adamw/table.json")["trials"]
    tried = {arm: [float(t["optim.adamw.lr"]) for t in trials if t["residual"] == arm] for arm in ("geonorm", "gains")}
    best = {row["residual"]: float(row["optim.adamw.lr"]) for row in result("geonorm_adamw/table.json")["rows"]}
    fast = apart_by("geonorm_adamw_fast", "residual", "geonorm")
    assert {arm for arm, d in fast.items() if d.high < 0} == {"gains"}
    found = {
        folder: fmean(r["val_loss"] for r in result(f"{folder}/table.json")["rows"] if r["residual"] == "geonorm")
        for folder in ("geonorm_adamw", "geonorm_adamw_fast")
    }
    assert found["geonorm_adamw_fast"] < found["geonorm_adamw"]
    assert best["gains"] > max(tried["geonorm"]) and round(best["gains"] / best["geonorm"]) == 11


def test_there_are_eleven_residual_rules():
    assert "eleven rules" in text(FRONT) and "all eleven rules" in text(EXPERIMENTS) and len(RESIDUAL_RULES) == 11
    losses = {}
    for r in result("residual_rules/table.json")["rows"]:
        losses.setdefault(r["residual"], []).append(r["val_loss_final"])
    assert {*losses} == {*RESIDUAL_RULES} and min(losses, key=lambda rule: fmean(losses[rule])) == "pre_norm"


def test_with_a_longer_warm_up_geonorm_is_below_every_other_rule_under_adamw():
    assert "both forms of GeoNorm end below every other rule" in text(EXPERIMENTS)
    said = "the same, each rule at its own best rate, those on the sphere also with their best first step"
    assert claims()[said][1].endswith("under AdamW yes, and with a long warm-up below all other rules")
    for form in GEONORMS:
        apart = apart_by("residual_tuned_warmup", "residual", form)
        assert len(apart) == 11 and all(d.count == 6 for d in apart.values())
        assert {rule for rule, d in apart.items() if d.low <= 0} == {*GEONORMS} - {form}
    counts = Counter(trial["residual"] for trial in result("residual_tuned_warmup/table.json")["trials"])
    assert counts.most_common(1) == [("geonorm_with_norms", 11)] and "longest search, of eleven trials" in text(
        EXPERIMENTS
    )
    below = {rule for rule, d in apart_by("residual_tuned_warmup", "residual", "pre_norm").items() if d.high < 0}
    assert below == {*GEONORMS, "peri_norm", "ngpt", "p_sphere"}
    losses: dict[str, list[float]] = {}
    for r in result("residual_tuned_warmup/table.json")["rows"]:
        losses.setdefault(r["residual"], []).append(r["val_loss"])
    assert "seeds scatter less than under Muon with norms, and more without" in text(EXPERIMENTS)
    under_muon = {form: [] for form in GEONORMS}
    for r in result("residual_tuned/table.json")["rows"]:
        if r["optimizer"] == "muon" and r["residual"] in GEONORMS:
            under_muon[r["residual"]].append(r["val_loss"])
    assert [stdev(losses[form]) < stdev(under_muon[form]) for form in GEONORMS] == [False, True]
    stuck = {rule: sum(loss > BYTE_FREQUENCIES for loss in found) for rule, found in losses.items()}
    assert {rule: n for rule, n in stuck.items() if n} == {"post_norm": 2, "deep_norm": 3, "cayley_sphere": 2}
