"""What the steps of each kind of matrix were made of, and what exchanges of layers gain."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from optim.certificate import certify
from scripts import experiment
from scripts.analysis.hetero import KINDS, by_chance, control_table, exchange_table, matrix_table, measured, sums
from scripts.analysis.runs import RecordedRun
from scripts.analysis.search import Axis, Found
from scripts.experiments.why_hetero import ROUTES


def fake(setting, loss, seed=1):
    """A stable run of a setting."""
    return RecordedRun(
        Path("nowhere"), {"seed": seed}, {"eval": [{"step": 9, "loss": loss}]}, {}, {}, {"setting": setting}
    )


def asked(losses):
    """A study of why_hetero with such losses, a list over seeds for each setting."""
    found = experiment.study_of(experiment.load_experiment("why_hetero"), ["setting=" + ",".join(losses)])[0]
    found.found["hetero",] = Found([Axis("optim.muon.lr", 0.1)], tried={(Fraction(-1),): 2.0})
    return replace(found, groups=[[fake(s, loss, 1 + i) for i, loss in enumerate(all_)] for s, all_ in losses.items()])


# ---- exchanges ----

LOSSES = {  # the whole exchange gains .1, .2 and .3; c_fc alone all of it, mlp_c_proj alone half of it, so .05, .1 and .15 too much
    "nothing": [2.4, 2.5, 2.6],
    "hetero": [2.3, 2.3, 2.3],
    "c_fc": [2.3, 2.3, 2.3],
    "mlp_c_proj": [2.35, 2.4, 2.45],
    "mlp_0-1": [2.5, 2.6, 2.7],
    "mlp_radius_1.5": [2.2, 2.3, 2.4],
}


def test_what_an_exchange_gains_alone_and_last():
    table = exchange_table(asked(LOSSES), ROUTES[0])
    assert "From nothing to hetero, at the best settings of hetero (lr 0.05), 3 seeds." in table.caption
    assert table.caption.endswith("gains +0.200 [-0.048, +0.448]:")  # 0.1 · 4.3027 / √3 = 0.248
    assert table.lines == [
        ["mlp.c_fc", "+0.200 [-0.048, +0.448]", "+0.100 [-0.024, +0.224]"],
        ["mlp.c_proj", "+0.100 [-0.024, +0.224]", "+0.000 [+0.000, +0.000]"],
        ["h.0-1.mlp", "-0.100 [-0.100, -0.100]", ""],
        ["h.2-3.mlp", "", "+0.300 [+0.052, +0.548]"],
    ]


def test_how_far_the_gains_of_a_pair_add_up():
    said = sums(asked(LOSSES), ROUTES)
    assert said.endswith("(0 if the groups do not interact): mlp.c_fc and mlp.c_proj +0.100 [-0.024, +0.224] nats.")
    assert said.count("from nothing to hetero") == 1 and "from hetero to all" not in said
    assert sums(asked({name: LOSSES[name] for name in ("nothing", "hetero", "c_fc")}), ROUTES) == ""


def test_controls_say_what_they_are():
    lines = control_table(asked(LOSSES), ROUTES[0]).lines
    words = ["mlp_radius_1.5", "all on Stiefel, MLP of radius 1.5", "2.3000 ± 0.0577"]
    assert lines == [[*words, "-0.200 [-0.200, -0.200]", "+0.000 [-0.248, +0.248]"]]


def test_only_seeds_that_all_settings_have_count():
    found = asked({**LOSSES, "hetero": [2.3, 2.3]})
    table = control_table(found, ROUTES[0])
    assert table.lines[0][2] == "2.2500 ± 0.0500" and table.caption.endswith("2 seeds:")
    assert "mlp.c_fc and mlp.c_proj +0.075 [" in sums(found, ROUTES)  # of .05 and .1


def test_a_setting_with_an_unstable_run_has_no_gain():
    found = asked(LOSSES)
    found.groups[2][0].records["event"] = [{"step": 5, "event": "unstable"}]
    assert exchange_table(found, ROUTES[0]).lines[:2] == [
        ["mlp.c_fc", "", "+0.100 [-0.024, +0.224]"],
        ["mlp.c_proj", "+0.100 [-0.024, +0.224]", ""],
    ]


# ---- what steps were made of ----

WIDTH = 16


def on_the_manifold(manifold, rows, count):
    """Random points (count, rows, WIDTH) in float64: orthonormal columns, for DGram of other lengths."""
    W = torch.linalg.qr(torch.randn(count, rows, WIDTH, dtype=torch.float64)).Q
    return W * (0.5 + torch.rand(count, 1, WIDTH, dtype=torch.float64)) if manifold == "dgram" else W


def size_share(W, G):
    """(⟨W, G⟩ / ‖W‖_F / ‖G‖_F)² of each matrix."""
    return torch.cosine_similarity(W.flatten(1), G.flatten(1)).square()


@pytest.mark.parametrize("kind", ["attn.c_proj", "attn.c_attn", "mlp.c_fc"])
@pytest.mark.parametrize("manifold", ["stiefel", "dgram"])
def test_the_shares_of_a_random_momentum_are_those_by_chance(kind, manifold):
    torch.manual_seed(0)
    W = on_the_manifold(manifold, KINDS[kind] * WIDTH, 100)
    G = torch.randn_like(W)
    found = certify(W, G, W, manifold)
    assert by_chance("normal_share", manifold, kind, WIDTH) == pytest.approx(found.normal_share.mean().item(), rel=0.02)
    assert by_chance("length_share", manifold, kind, WIDTH) == pytest.approx(found.length_share.mean().item(), rel=0.1)
    many, size = (torch.randn(5000, *W.shape[1:]) for _ in range(2)), by_chance("size_share", manifold, kind, WIDTH)
    assert size == pytest.approx(size_share(*many).mean().item(), rel=0.1)
    torch.testing.assert_close(found.size_share, size_share(W, G))
    assert (
        by_chance("normal_share", "euclidean", kind, WIDTH) is None and by_chance("feas", manifold, kind, WIDTH) is None
    )


def test_the_table_of_matrices_has_means_over_layers_and_training_and_ends():
    """Normal shares .1, .3 in one layer and .5, .7 in the other; lengths count at the last step only."""
    rules = {"attn": "stiefel", "h.0.mlp": "dgram", "h.1.mlp": "stiefel"}
    certificates = [
        {"step": step, "name": f"h.{layer}.mlp.c_fc.weight", "normal_share": share + 0.2 * layer, "step_rank": 5.0}
        for step, layer, share in ((1, 0, 0.1), (1, 1, 0.3), (2, 0, 0.3), (2, 1, 0.5))
    ]
    spectra = [{"step": s, "name": "h.0.mlp.c_fc.weight", "length_mean": x} for s, x in ((1, 9.0), (2, 1.5))]
    config = {"seed": 1, "model": {"n_layer": 2, "n_embd": 10}, "assignment": {"rules": rules}}
    run = replace(fake("hetero", 2.0), config=config)
    run.records.update(certificate=certificates, spectra=spectra)
    found = asked({"hetero": [2.0]})
    found.groups = [[run]]
    found.facts["matrices"] = measured(found)
    table = matrix_table(found)
    line = dict(zip(table.headings, next(line for line in table.lines if line[1] == "mlp.c_fc")))
    assert line["manifold"] == "dgram+stiefel" and line["of the step"] == "5.0" and line["length of columns"] == "1.50"
    assert line["normal share (by chance)"] == "0.40"  # two manifolds have no one chance
    config["assignment"]["rules"] = {"mlp": "stiefel"}
    found.facts["matrices"] = measured(found)
    line = next(line for line in matrix_table(found).lines if line[1] == "mlp.c_fc")
    assert line[2:4] == ["stiefel", "0.40 (0.14)"]  # 11 / 80
