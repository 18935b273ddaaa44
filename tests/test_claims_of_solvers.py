"""What README.md claims of solvers and optimizers is what results/ shows."""

import json

from conftest import ROOT
from test_claims import apart, claims, level

TALL = ("stiefel_102_blocks.3.c_attn", "dgram_295_blocks.0.c_attn")
SQUARE = "stiefel_2_blocks.3.c_proj"


def shares():
    """(problem, solver, calls) → share of the optimum."""
    [file] = (ROOT / "results").glob("*/bench_lmo.json")
    rows = json.loads(file.read_text())["rows"]
    return {(r["problem"], r["solver"], r["calls"]): r["⟨G,A⟩/optimum"] for r in rows if "⟨G,A⟩/optimum" in r}


def said(claim):
    """The outcome of the claim that begins so."""
    [outcome] = [outcome for text, (_, outcome) in claims().items() if text.startswith(claim)]
    return outcome


def test_dual_ascent_is_as_the_front_says():
    assert said("dual ascent solves") == (
        "on tall matrices neither in 24 steps of 0.1, as in arXiv 2606.13276, nor in its own 100 of 0.01: "
        "on Stiefel it ends below its first step, on DGram below least squares; square: the optimum"
    )
    found, (stiefel, dgram) = shares(), TALL
    for ends in (("dual_ascent", 24), ("slow_ascent", 100)):
        assert found[(stiefel, *ends)] < found[stiefel, "dual_ascent", 1]
        assert found[(dgram, *ends)] < found[dgram, "least_squares", 1]
    assert found[SQUARE, "slow_ascent", 100] > 0.999 and found[SQUARE, "dual_ascent", 24] > 0.99
    assert said("one dual step is nearly") == "yes on Stiefel; on DGram it reaches far less"
    first = {problem: found[problem, "dual_ascent", 1] / found[problem, "least_squares", 1] for problem in TALL}
    assert abs(first[stiefel] - 1) < 1e-3 and first[dgram] < 0.75


def test_fixed_points_and_projections_are_as_the_front_says():
    assert "only with Anderson acceleration, after 24; square: the optimum in one" in said("a fixed point, 5 to 10")
    assert said("alternating projections").endswith("tall: nine tenths of the optimum after 24")
    found = shares()
    for problem in TALL:
        assert found[problem, "su_anderson", 24] > 0.999 and found[problem, "su", 24] < 0.99
        assert max(found[problem, "su_anderson", 12], found[problem, "su", 12]) < 0.98
        assert 0.9 < found[problem, "alternating", 24] < 0.95
    assert min(found[SQUARE, "su", 1], found[SQUARE, "alternating", 3]) > 0.999


def test_steps_of_one_sign_are_as_the_front_says():
    assert "below the certified step" in said("one sign of the tangent")
    assert said("a closed form, in").endswith("on the one recorded problem, nearer to it than the certified step")
    found = shares()
    for problem in TALL:
        assert found[problem, "least_squares", 1] < found[problem, "step, default, float16", 1]
    assert found[TALL[0], "intrinsic", 1] > found[TALL[0], "step, default, float32", 1]
    assert min(found[SQUARE, "least_squares", 1], found[SQUARE, "intrinsic", 1]) > 0.999


def test_the_optimizers_of_the_sources_are_as_the_front_says():
    assert said("free lengths of columns") == "yes: DGram ends below Stiefel at both horizons"
    assert all(apart(steps, "Stiefel")["DGram"].high < 0 for steps in ("100", "400"))
    assert said("Stiefel is worse than") == claims()["lower loss than Muon"][1] == "at 100 steps; level at 400"
    assert apart("100", "spectral ball")["Stiefel"].low > 0 and "Stiefel" in level("400", "spectral ball")
    assert apart("100", "Muon")["NorMuon"].high < 0 and "NorMuon" in level("400", "Muon")
    assert said("fewer tokens a second than Muon") == "yes, both"
    assert all(apart(steps, "Muon")["Stiefel"].low > 0 for steps in ("100", "400"))
    costs = json.loads((ROOT / "results/family/table.json").read_text())["costs"]
    assert costs["Stiefel"]["ms_per_step"] > costs["Muon"]["ms_per_step"]
