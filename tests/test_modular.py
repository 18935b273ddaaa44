"""Steps in each parameter's own norm, and the coordinate check that measures what they do to features."""

import copy
import json
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from test_remedies import tiny_gpt
from torch import nn

from model.residual import PostNormJoint, Stream
from optim.modular import Modular, norm_of
from optim.norms import FEATURES
from scripts import updates
from train import train
from training.build import build_optimizers
from training.checks import check
from training.config import compose
from training.coordinate import CoordinateCheck, coordinate_check
from training.log import read_records
from training.validate import ConfigError

SETTINGS = ["optim=modular", "assignment=unconstrained", "log.interval_updates=2"]


def loss_of(model, seed=0):
    x = torch.randint(40, (2, 17), generator=torch.Generator().manual_seed(seed))
    return model(x[:, :-1], x[:, 1:])[1]


@pytest.mark.parametrize("pair", [("rms", "rms"), ("one", "rms"), ("rms", "max"), ("l2", "l2"), ("one", "max")])
@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_a_step_has_the_size_of_the_learning_rate_in_its_norm(shape, pair):
    p = torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
    before = p.detach().clone()
    optimizer = Modular(
        [{"params": [p], "input": pair[0], "output": pair[1]}], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.0
    )
    p.grad = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 1e-6  # of any scale
    optimizer.step()
    change = (p - before).T if pair[0] == "one" else p - before
    size = norm_of(p, *pair, exact=True).size(change.detach())
    assert size == pytest.approx(0.1, rel=2e-3)
    assert (change * (p.grad.T if pair[0] == "one" else p.grad)).sum() < 0


def test_small_singular_values_come_to_one_too():
    generator = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(24, 8, generator=generator, dtype=torch.float64), full_matrices=False)
    G = (U * torch.logspace(0, -3, 8, dtype=torch.float64)) @ Vh
    sigma = torch.linalg.svdvals(norm_of(G, "l2", "l2").steepest(G.float()).double())
    assert (sigma[:-1] - 1).abs().max() < 1e-3  # the last is a little below a thousandth of ‖G‖_F


def test_a_schedule_and_the_settings_of_a_group_act():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    group = {"params": [p], "input": "rms", "output": "rms"}
    optimizer = Modular([group], lr=9.0, momentum=0.9, nesterov=False, weight_decay=9.0)
    p.grad = torch.tensor([1.0, 1.0])
    optimizer.param_groups[0].update(lr=0.1, weight_decay=1.0, momentum=0.5)
    optimizer.step()
    assert torch.allclose(p, torch.tensor([0.9 - 0.1, -1.8 - 0.1]))
    optimizer.step()
    assert torch.allclose(optimizer.state[p]["momentum"], torch.tensor([1.5, 1.5]))


def test_momentum_decay_and_a_skipped_step():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = Modular(
        [{"params": [p], "input": "rms", "output": "rms"}], lr=0.1, momentum=0.5, nesterov=False, weight_decay=1.0
    )
    p.grad = torch.tensor([1.0, 1.0, -1.0])
    assert optimizer.step(lambda: "the closure's loss") == "the closure's loss"
    assert torch.allclose(p, torch.tensor([0.9 - 0.1, -1.8 - 0.1, 2.7 + 0.1]))
    kept, state = p.detach().clone(), optimizer.state[p]["momentum"].clone()
    optimizer.found_inf = torch.ones(())
    p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert torch.equal(p, kept) and torch.equal(optimizer.state[p]["momentum"], state)
    optimizer.found_inf = None
    p.grad = torch.tensor([-0.4, -0.6, 0.0])  # momentum .5·(1, 1, -1): its sign turns for the second alone
    optimizer.step()
    assert torch.allclose(p, 0.9 * kept - 0.1 * torch.tensor([1.0, -1.0, -1.0]))


def test_a_copy_and_a_pickle_step_as_the_original_and_a_loaded_state_brings_its_norm():
    def made(*pair):
        p = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
        group = {"params": [p], "input": pair[0], "output": pair[1]}
        return Modular([group], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.0)

    def stepped(optimizer):
        [p] = optimizer.param_groups[0]["params"]
        p.grad = torch.arange(24.0).view(6, 4)
        optimizer.step()
        return p

    for optimizer in (copy.deepcopy(made("one", "rms")), pickle.loads(pickle.dumps(made("one", "rms")))):
        assert torch.equal(stepped(optimizer), stepped(made("one", "rms")))
    other = made("one", "rms")
    other.load_state_dict(made("rms", "rms").state_dict())
    assert torch.equal(stepped(other), stepped(made("rms", "rms")))


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_of_a_model_steps_by_the_same_size_and_no_feature_changes_by_more(tied):
    torch.manual_seed(0)
    model, cfg = tiny_gpt(tied=tied), compose([*SETTINGS, "optim.modular.lr=0.01"])
    optimizers = build_optimizers(model, cfg)
    assert {row.optimizer for row in optimizers.rows} == {"Modular"}
    assert {row.geometry for row in optimizers.rows} == {"one → rms", "rms → rms"}
    checks = coordinate_check(model, cfg)
    loss_of(model).backward()
    checks.watch(True)
    optimizers.step()
    x = torch.randint(40, (2, 16))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs = {}
    block = model.transformer.h[0]

    def keep(module, given):
        inputs.setdefault(module, given[0])

    handles = [module.register_forward_pre_hook(keep) for module in (block.ln_1, block.mlp.c_fc)]
    records = dict(checks.records(x))
    for handle in handles:
        handle.remove()
    assert records.keys() == weights.keys() and ("lm_head.weight" in records) == (not tied)
    for name, record in records.items():
        assert record["size"] == pytest.approx(0.01, rel=2e-3), name
        assert 0 < record["change_mean"] <= record["change_max"] <= 1.001 * record["size"] * record["input_max"], name
        assert torch.equal(weights[name], model.get_parameter(name))
    name = "transformer.h.0.mlp.c_fc.weight"
    change = FEATURES["rms"](inputs[block.mlp.c_fc] @ (weights[name] - checks.before[name]).T)
    assert records[name]["change_max"] == pytest.approx(change.max().item(), rel=1e-3)
    name = "transformer.h.0.ln_1.weight"  # of what the norm gives to attention, not of what attention makes of it
    change = FEATURES["rms"](F.layer_norm(inputs[block.ln_1], (16,)) * (weights[name] - checks.before[name]))
    assert records[name]["change_max"] == pytest.approx(change.max().item(), rel=1e-3)
    assert records["transformer.wte.weight"]["input_max"] == 1
    assert records["transformer.ln_f.weight"]["input_max"] == pytest.approx(
        1, rel=1e-2
    )  # behind the norm, not before it


def test_a_norm_behind_its_sublayer_is_measured_too():
    torch.manual_seed(0)
    joint = PostNormJoint(Stream(width=16, layers=1, bias=True, radius=4.0, skips=True), 1.0)
    sublayer, x = nn.Linear(16, 16), torch.randn(2, 4, 16)
    model = Called(joint, sublayer)
    checks = CoordinateCheck(model, {"joint.weight": ("rms", "rms"), "joint.bias": ("rms", "rms")})
    checks.watch(True)
    with torch.no_grad():
        joint.weight += 0.5
        joint.bias -= 0.25
    records = dict(checks.records(x))
    normed = FEATURES["rms"](F.layer_norm(x + sublayer(x), (16,))).max().item()
    assert records["joint.weight"]["input_max"] == pytest.approx(normed, rel=1e-5)
    assert records["joint.weight"]["change_max"] == pytest.approx(0.5 * normed, rel=1e-5)
    assert records["joint.bias"]["change_max"] == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_the_mode_and_the_random_numbers_as_they_are(training):
    model = tiny_gpt(dropout=0.5).train(training)
    checks, random = coordinate_check(model, compose(SETTINGS)), torch.get_rng_state()
    checks.watch(True)
    assert dict(checks.records(torch.randint(40, (2, 16), generator=torch.Generator())))
    assert all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


class Called(nn.Module):
    """A joint that is called with its sublayer."""

    def __init__(self, joint, sublayer):
        super().__init__()
        self.joint, self.sublayer = joint, sublayer

    def forward(self, x):
        return self.joint(x, self.sublayer)


@pytest.mark.parametrize("optim", ["modular", "manifold_muon"])
def test_a_run_records_the_sizes_of_its_steps_and_resumes(tiny, tmp_path, optim, capsys):
    settings = [*tiny, "assignment=unconstrained", f"optim={optim}", "log.interval_updates=2", "max_steps=6"]
    best = train(compose([*settings, "checkpoint.interval=3"]))
    records = [r for r in read_records(tmp_path / "run") if r["kind"] == "update"]
    assert {r["step"] for r in records} == {2, 4, 6} and all(r["size"] > 0 for r in records)
    assert any("updates" in r.get("time", {}) for r in read_records(tmp_path / "run"))
    capsys.readouterr()
    assert updates.main([str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "Step 6 of" in said and re.search(
        r"h\.0\.mlp\.c_fc\.weight +rms → rms +[\d.e-]+ +[\d.e-]+ +[01](\.\d+)?\n", said
    )
    assert "Without a change" not in said
    last = next(r for r in records if r["step"] == 6 and "c_fc" in r["name"])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({**last, "name": "s_z.weight", "change_max": None, "change_mean": None}) + "\n")
    assert updates.main([str(tmp_path / "run")]) == 0
    assert "are not called with features alone: s_z.weight\n" in capsys.readouterr().out
    assert updates.main([str(tmp_path / "run"), "step=3"]) == 2
    assert "has no records 'update' of step 3, but of 2, 4, 6; choose one" in capsys.readouterr().err
    half = next(path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.rstrip("_").endswith("3"))
    again = [*settings, "checkpoint.interval=3", f"resume={half}", f"output_dir={tmp_path}/again"]
    assert train(compose(again)) == best


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["assignment=hetero"], "optim.modular knows no manifolds; use assignment=unconstrained"),
        (["optim.norms.others=[max, rms]"], "there is no norm max → rms"),
        (["optim.norms.patterns={wta: [one, rms]}"], "pattern 'wta' matches no matrix or vector"),
        (["optim.norms.patterns={wte: [one, most]}"], "choose one of one, l2, rms, max"),
    ],
)
def test_what_modular_refuses(overrides, message):
    with pytest.raises(ConfigError, match="problem") as refused:
        check(compose([*SETTINGS, *overrides]))
    assert message in str(refused.value)


def test_nesterov():
    for nesterov, sign in ((False, 1.0), (True, -1.0)):  # momentum .5·1 - .4 = .1, and -.4 + .5·.1 < 0
        p = torch.nn.Parameter(torch.zeros(2))
        group = {"params": [p], "input": "rms", "output": "rms"}
        optimizer = Modular([group], lr=0.1, momentum=0.5, nesterov=nesterov, weight_decay=0.0)
        for g in (1.0, -0.4):
            p.grad, before = torch.full_like(p, g), p.detach().clone()
            optimizer.step()
        assert torch.allclose(p - before, torch.full_like(p, -0.1 * sign))
        assert torch.allclose(optimizer.state[p]["momentum"], torch.full_like(p, 0.1))  # without the look ahead
