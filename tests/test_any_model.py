"""The optimizer in a project of others: models that are not ours, the monitor, and the package that `pip install .` installs."""

import importlib.util
import math
import shutil
import subprocess
import sys
import warnings
import zipfile

import pytest
import torch
from conftest import ROOT
from torch import nn

from optim import MANIFOLDS, AssignmentError, CertifiedStep, ManifoldMuon, ManifoldWarning, Monitor, for_model
from optim.any_model import assigned

MUON = {"lr": 0.02, "adamw": {"lr": 3e-3, "weight_decay": 0.1}}


class Tagger(nn.Module):
    """An LSTM over tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.lstm = nn.LSTM(16, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 20)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0])


class Vision(nn.Module):
    """A small ViT: patches by a convolution, torch's own encoder, a mean."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(16, 2)

    def forward(self, images):
        return self.head(self.encoder(self.patches(images).flatten(2).mT).mean(1))


def train(model, optimizers, x, y, steps):
    """The loss at each step."""
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tagger(steps=0, watch=False):
    """A trained LSTM, its optimizers and a monitor, or None."""
    torch.manual_seed(0)
    model = Tagger()
    optimizers = for_model(model, {"lstm": "stiefel"}, adamw_for=["head"], blocks={"lstm": 4}, **MUON)
    monitor = Monitor(optimizers[0], interval=2) if watch else None
    tokens = torch.randint(20, (8, 13))
    return model, optimizers, monitor, train(model, optimizers, tokens[:, :-1], tokens[:, 1:], steps)


def test_the_options_of_a_step_reach_the_optimizer():
    given = {"block_length": "whole", "cautious": True, "row_beta": 0.9}
    muon, _ = for_model(Tagger(), {"lstm": "stiefel"}, adamw_for=["head"], blocks={"lstm": 4}, **MUON, **given)
    assert all(given.items() <= group.items() for group in muon.param_groups)


def test_an_lstm_trains_with_its_gates_on_the_manifold():
    model, (muon, adamw), _, losses = tagger(20)
    assert losses[-1] < losses[0] - 0.1
    assert {n for g in muon.param_groups for n in g["names"]} == {
        f"lstm.weight_{k}_l{i}" for k in ("ih", "hh") for i in (0, 1)
    }
    for gate in model.lstm.weight_hh_l0.view(4, 16, 16):
        assert MANIFOLDS["stiefel"].distance(gate) < 1e-5
    decays = {g["weight_decay"]: {id(p) for p in g["params"]} for g in adamw.param_groups}
    assert decays[0.1] == {id(model.embedding.weight), id(model.head.weight)}
    assert id(model.head.bias) in decays[0.0] and id(model.lstm.bias_ih_l0) in decays[0.0]


def test_a_vision_transformer_trains_on_two_manifolds_with_ordinary_schedules_and_state(tmp_path):
    torch.manual_seed(0)
    model = Vision()
    rules = {"self_attn": "stiefel", "linear1|linear2": "dgram"}
    optimizers = for_model(model, rules, adamw_for=["head"], rule=CertifiedStep(quality="high"), **MUON)
    for optimizer in optimizers:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 2
    assert train(model, optimizers, images, labels, 15)[-1] < 0.6
    assert [float(o.param_groups[0]["lr"]) for o in optimizers] == pytest.approx([0.01, 1.5e-3])
    torch.save([o.state_dict() for o in optimizers], tmp_path / "state.pt")
    for optimizer, state in zip(optimizers, torch.load(tmp_path / "state.pt")):
        optimizer.load_state_dict(state)
    report = Monitor(optimizers[0]).report()
    assert {seen.manifold for seen in report.values()} == {"stiefel", "dgram"}
    assert max(seen.distance for seen in report.values()) < 1e-5


def test_what_belongs_to_whom():
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False))
    model[2].weight = model[0].weight  # tied
    model[1].bias.requires_grad_(False)
    rows = assigned(model, dict(model.named_parameters()), {"*": "stiefel"}, ())
    assert {row.name: row.manifold for row in rows} == {"0.weight": None, "1.weight": "stiefel", "1.bias": None}
    for pattern, remedy in {
        "2": "its weight is tied to '0.weight'; use that",
        "1.bias": "without requires_grad",
    }.items():
        with pytest.raises(AssignmentError, match=f"pattern '{pattern}' matches no parameter; .*{remedy}"):
            for_model(model, {"*": "stiefel"}, adamw_for=[pattern], **MUON)
    muon, adamw = for_model(model, {"*": "stiefel"}, **MUON)
    assert [p is model[0].weight for g in adamw.param_groups for p in g["params"]] == [True]
    assert muon.param_groups[0]["names"] == ["1.weight"]


@pytest.mark.parametrize(
    ("rules", "more", "reason"),
    [
        ({"lstm": "stifel"}, {"adamw_for": ["head"]}, "choose one of"),
        ({"lstm": "stiefel"}, {}, "no rule matches 'head.weight'"),
        ({"*": "stiefel"}, {"adamw_for": ["hed"]}, "pattern 'hed' matches no parameter; did you mean 'head'?"),
        (
            {"*": "stiefel"},
            {"adamw_for": ["x"]},
            "pattern 'x' matches no parameter; they are 'embedding.weight', 'lstm",
        ),
        ({"*": "stiefel"}, {"adamw_for": "head"}, r"^adamw_for is one text; give a list .*: adamw_for=\['head'\]$"),
        (
            {"lstm": "stiefel", "head": "adamw", "fc": "dgram"},
            {},
            "^assignment: rule 'fc' matches no matrix; remove it$",
        ),
        (
            {"*weight*": "stiefel", "bias_hh_l0": "dgram"},
            {},
            "rule 'bias_hh_l0' matches no 2-D parameter, and all others",
        ),
        ({"*": "adamw"}, {}, "no matrix has a manifold; use torch.optim.AdamW"),
        ({"*": "stiefel"}, {"blocks": {"lstm": 5}}, "blocks: 5 do not divide the 64 rows of 'lstm.weight_ih_l0'"),
        ({"*": "stiefel"}, {"blocks": {"lstm": "2"}}, "blocks: '2' do not divide the 64 rows"),
        ({"*": "stiefel"}, {"blocks": {"gru": 5}}, "blocks: pattern 'gru' matches no matrix"),
    ],
)
def test_what_is_wrong_is_named(rules, more, reason):
    with pytest.raises(AssignmentError, match=reason):
        for_model(Tagger(), rules, **more, **MUON)


def test_a_wrong_setting_of_adamw_leaves_the_matrices_as_they_are():
    model = Tagger()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="Invalid learning rate"):
        for_model(model, {"*": "stiefel"}, lr=0.1, adamw={"lr": -1.0})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_without_vectors_and_a_matrix_without_a_gradient_are_refused():
    with pytest.raises(AssignmentError, match="no parameter is left to AdamW; construct ManifoldMuon"):
        for_model(nn.Linear(4, 4, bias=False), {"*": "stiefel"}, **MUON)
    with pytest.raises(AssignmentError, match="no rule matches '0'; add one, such as 0: adamw"):
        for_model(nn.ParameterList([torch.eye(4, 3), torch.ones(3)]), {}, **MUON)
    model = Tagger()
    muon, _ = for_model(model, {"*": "stiefel"}, **MUON)
    before = [p.detach().clone() for p in model.parameters()]
    model.lstm.weight_ih_l0.sum().backward()
    with pytest.raises(RuntimeError, match=r"have no gradient, the first of shape .* requires_grad_"):
        muon.step()
    assert (
        all(map(torch.equal, model.parameters(), before)) and not muon.state[model.lstm.weight_ih_l0]["momentum"].any()
    )


# ---- the monitor ----


def test_the_monitor_reports_and_changes_nothing():
    watched, _, monitor, losses = tagger(4, watch=True)
    plain, _, _, same = tagger(4)
    assert losses == same and all(torch.equal(p, q) for p, q in zip(watched.parameters(), plain.parameters()))
    report = monitor.report()
    assert len(report) == 4
    for seen in report.values():
        assert seen.distance < 1e-5 and seen.largest == pytest.approx(1, abs=1e-5) and seen.smallest > 0.999
        assert 0.8 < seen.feas <= 1.001 and seen.step == pytest.approx(1, abs=0.1) and seen.fallbacks == 0
    header, *lines = str(report).splitlines()
    assert (
        header.split() == ["manifold", "distance", "largest", "smallest", "feas", "step", "normal", "fallbacks"]
        and len(lines) == 4
    )


def test_the_monitor_warns_where_a_constraint_is_violated():
    model, (muon, _), monitor, _ = tagger(2, watch=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.report()
    with torch.no_grad():
        model.lstm.weight_hh_l1 *= 1.5  # another library's decay, a rounded copy
    with pytest.warns(ManifoldWarning, match=r"1 of 4 matrices are off .* lstm\.weight_hh_l1 \(stiefel, distance 0\."):
        monitor.report()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(ManifoldWarning, match="weight_hh_l1"):
        muon.step()  # the third, which is watched: so far off, the ordinary step does not land
    muon.step()  # the exact retraction, which the step before asked for
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.report()
    with torch.no_grad():
        model.lstm.weight_hh_l1[0, 0] = math.nan
    with pytest.warns(ManifoldWarning, match="distance nan"):
        monitor.report()
    monitor.remove()
    muon.step()


def test_the_monitor_reports_a_weight_that_is_not_a_number_after_a_step():
    model, (muon, _), monitor, _ = tagger(2, watch=True)
    with torch.no_grad():
        model.lstm.weight_hh_l1[0, 0] = math.nan
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(ManifoldWarning, match="distance nan"):
        muon.step()  # which is watched
    assert math.isnan(monitor.certified["lstm.weight_hh_l1"]["feas"])


def test_a_gradient_that_is_not_finite_moves_nothing_and_the_monitor_warns_if_it_goes_on():
    model, (muon, _), monitor, _ = tagger(2, watch=True)
    sick, well = model.lstm.weight_hh_l1, model.lstm.weight_hh_l0
    before, momentum = sick.detach().clone(), muon.state[sick]["momentum"].clone()

    def step(value):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        sick.grad[::16] = value  # a row of each of its four blocks
        old = well.detach().clone()
        muon.step()
        assert not torch.equal(well, old)

    step(math.nan)  # the third, which is watched: one of two since the first is no warning
    step(math.inf)
    assert torch.equal(sick, before) and torch.equal(muon.state[sick]["momentum"], momentum)
    with pytest.warns(
        ManifoldWarning, match=r"most of the last 2 steps of 1 matrices .*, of lstm\.weight_hh_l1 2: a gradient is"
    ):
        step(math.nan)
    step(1.0)
    assert not torch.equal(sick, before) and monitor.report()["lstm.weight_hh_l1"].fallbacks == 3


def test_the_monitor_watches_an_optimizer_without_names():
    weight = nn.Parameter(torch.randn(8, 4))
    muon = ManifoldMuon(
        [{"params": [weight], "manifold": "oblique"}],
        CertifiedStep(),
        lr=0.1,
        momentum=0.9,
        nesterov=True,
        weight_decay=0.0,
    )
    monitor = Monitor(muon)
    weight.grad = torch.randn(8, 4)
    muon.step()
    assert monitor.report()["group 0, matrix 0"].feas > 0.8


def test_the_monitor_refuses_what_it_cannot_watch():
    _, (muon, adamw), _, _ = tagger()
    for interval in (0, -5, 2.5):
        with pytest.raises(ValueError, match=f"interval is {interval}; give a whole number of steps from 1 on"):
            Monitor(muon, interval=interval)
    with pytest.raises(ValueError, match=r"not AdamW; give the first .*\ninterval is 0"):
        Monitor(adamw, interval=0)


# ---- the package ----

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
USE = """
import sys
sys.path.insert(0, sys.argv[1])
import manifold_muon, pickle, torch
from manifold_muon import Monitor, for_model
assert manifold_muon.__file__.startswith(sys.argv[1]) and not {"optim", "training", "model"} & set(sys.modules)
model = torch.nn.LSTM(8, 8)
muon, adamw = for_model(model, {"*": "stiefel"}, lr=.02, adamw={"lr": 1e-3}, blocks={"*": 4})
monitor = Monitor(muon)
model(torch.randn(5, 2, 8))[0].square().sum().backward()
muon.step(), adamw.step()
assert max(seen.distance for seen in pickle.loads(pickle.dumps(monitor.report())).values()) < 1e-5
print("installed:", *sorted({name.partition(".")[0] for name in sys.modules if name.startswith("manifold_muon")}))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="setuptools, which builds the package, is not installed"
)
def test_what_pip_installs_is_the_optimizer_alone(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "optim", source / "optim", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD, tmp_path], cwd=source, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"manifold_muon", "manifold_gpt"}
    assert next(site.glob("*.dist-info/top_level.txt")).read_text().split() == ["manifold_muon"]
    there = subprocess.run([sys.executable, "-I", "-c", USE, site], cwd=tmp_path, capture_output=True, text=True)
    assert there.stdout == "installed: manifold_muon\n", there.stderr
