"""The recipes of CONTRIBUTING.md at work, in a copy of the repository to which tests/test_contributing.py has applied them."""

import re

import pytest
import torch
from documents import CONTRIBUTING, LESS, TINY_RUN, blocks, commands, in_process, without_workers
from test_contributing import WHERE

from data import prepare as preparing
from optim.certificate import certify
from optim.certified import direction
from optim.manifolds import MANIFOLDS
from training.build import build
from training.config import compose

BLOCKS = [block for block in blocks(CONTRIBUTING) if not WHERE.match(block.code)]
WIDTH = ["model.n_embd=64"]  # two groups of 32 columns
HEADINGS = list(dict.fromkeys(block.heading for block in BLOCKS))


@pytest.fixture(scope="module")
def little_stdlib(tmp_path_factory):
    """Overrides naming the default data, cut short."""
    overrides = ["data.max_tokens=20000", f"data.dir={tmp_path_factory.mktemp('data')}/stdlib"]
    assert preparing.main(overrides) == 0
    return overrides


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_commands_and_examples_run(heading, little_stdlib, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    without_workers(monkeypatch)
    for block in (block for block in BLOCKS if block.heading == heading):
        if block.language == "python":
            exec(compile(block.code, block.file, "exec"), {"__name__": "example"})
            continue
        for words in commands(block.code):
            data = [] if any(word.startswith("data=") for word in words) else little_stdlib
            tiny = {"train.py": [*data, *WIDTH], "scripts/experiment.py": [*LESS.get(words[2], []), *TINY_RUN, *data]}
            in_process(words, tiny.get(words[1], []), monkeypatch)
    assert re.search("best validation loss|written to", capsys.readouterr().out)


# ---- manifolds ----

ADDED = ("frobenius", "stiefel_by_head")


@pytest.mark.parametrize("name", ADDED)
def test_a_manifold_has_the_axioms_and_is_certified(name):
    """P projects, the retraction lands and stays, tangent parts are tangent, directions are feasible and near the dual value."""
    M = MANIFOLDS[name]
    g = torch.Generator().manual_seed(0)
    W, G = (torch.randn(2, 96, 64, generator=g, dtype=torch.float64) for _ in range(2))
    S = W.mT @ W
    assert torch.allclose(M.project(M.project(S)), M.project(S))
    R = M.retract(W)
    assert M.distance(R).max() < 1e-12 and torch.allclose(M.retract(R), R)
    assert M.tangency(R, M.tangent(R, G)).abs().max() < 1e-10
    certificate = certify(R, G, direction(R, G, M.name), M.name)
    assert (certificate.feas > 0.9).all() and (certificate.feas <= 1).all() and (certificate.tangency < 1e-5).all()


@pytest.mark.parametrize("rule", ["manifold_muon", "paper"])
def test_both_step_rules_train_on_a_new_manifold(rule):
    """Three steps of a model: certified, and every weight on its manifold."""
    torch.manual_seed(0)
    rules = "{attn.c_attn: stiefel, attn.c_proj: stiefel_by_head, mlp: frobenius}"
    small = ["model=demo", "model.n_layer=2", f"optim={rule}"]
    model, optimizers = build(compose([*small, "assignment=custom", f"assignment.rules={rules}"]))
    optimizers.watch(True)
    for _ in range(3):
        x = torch.randint(0, 257, (2, 17))
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizers.step()
        optimizers.zero_grad()
    found = optimizers.muon.certificates()
    added = [row for row in optimizers.rows if row.manifold in ADDED]
    assert {row.manifold for row in added} == {*ADDED}
    for row in added:
        distance = MANIFOLDS[row.manifold].distance(model.get_parameter(row.name).detach())
        exact = rule == "manifold_muon" or row.manifold == "frobenius"
        assert distance < (2e-6 if exact else 1e-2)  # bfloat16 msign
        assert 0 < found[row.name]["feas"] <= 1


# ---- a residual rule ----


def test_the_residual_rule_is_its_formula():
    from test_residual import LAYER, STREAM, norm, on_sphere, residual_rule, settings, sublayer

    joint, x, f = residual_rule(settings("layer_scale")).join(STREAM, LAYER), on_sphere(), sublayer()
    assert torch.allclose(joint(x, f), x + 0.1 * f(norm(x)), atol=2e-6)


# ---- a step rule ----


def test_the_step_rule_takes_feasible_steps():
    model, optimizers = build(
        compose(["model=demo", "model.n_layer=1", "optim=paper", "optim.muon.rule.kind=projected"])
    )
    optimizers.watch(True)
    x = torch.randint(0, 257, (2, 17))
    model(x[:, :-1], x[:, 1:])[1].backward()
    optimizers.step()
    found = optimizers.muon.certificates()
    assert found
    for certificate in found.values():
        assert 0.3 < certificate["feas"] <= 1 and certificate["tangency"] < 1e-2  # bfloat16 msign
