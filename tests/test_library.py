"""Optimizers of libraries (optim=soap and others): groups, skipped updates, resume, refusals, and parity with ours."""

import functools
import importlib.util
import inspect
import math
import sys

import pytest
import torch
import yaml
from conftest import ROOT
from torch import nn

from training import checkpoint
from training.build import build, build_optimizers
from training.checks import check
from training.config import compose
from training.optimizers import skips_on_device
from training.validate import ConfigError

FILES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs/optim").glob("[!_]*.yaml"))}
LIBRARY = {name: parts["library"] for name, parts in FILES.items() if "library" in parts}
SMALL = ["model=demo", "model.n_layer=1", "model.n_embd=16", "model.block_size=16"]


def needs(name):
    """A mark that skips where the optimizer's package is not installed."""
    module = LIBRARY[name]["optimizer"].partition(".")[0]
    absent = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(absent, reason=f"{module} is not installed; pip install -e '.[baselines]'")


EACH = pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in LIBRARY])


composed = functools.cache(lambda *overrides: compose(overrides))


def settled(name, *overrides):
    """A small model and its optimizers, from seed 0."""
    torch.manual_seed(0)
    return build(composed(*SMALL, f"optim={name}", *overrides))


def steps(model, optimizers, first, last):
    """Updates first..last - 1, each on its own batch; returns the last loss."""
    for step in range(first, last):
        x = torch.randint(0, 257, (4, 17), generator=torch.Generator().manual_seed(step % 2))
        loss = model(x[:, :-1], x[:, 1:])[1]
        loss.backward()
        optimizers.set_lr(1 - step / 100)
        optimizers.step(skip=torch.tensor(False))
        optimizers.zero_grad()
    return loss.item()


def everything(model, optimizers):
    """All numbers of a model and of the state of its optimizers."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value.tolist() if isinstance(value, torch.Tensor) else value

    return plain([model.state_dict(), optimizers.state_dict()])


# ---- what every optimizer does ----


@EACH
def test_the_matrices_are_its_own_and_it_learns(name):
    model, optimizers = settled(name)
    row = next(row for row in optimizers.rows if row.name.endswith("c_fc.weight"))
    assert row.manifold == "euclidean" and row.optimizer in optimizers.named and row.optimizer != "AdamW"
    group = optimizers.named[row.optimizer].param_groups[0]
    assert len(group["params"]) == 4 and type(optimizers.named[row.optimizer]).__name__ == row.optimizer.split()[0]
    assert steps(model, optimizers, 0, 30) < 0.95 * math.log(320)
    assert optimizers.state_bytes()[row.optimizer] >= 4


@EACH
def test_a_skipped_update_leaves_no_trace(name):
    model, optimizers = settled(name)
    steps(model, optimizers, 0, 3)
    before = everything(model, optimizers)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizers.step(skip=torch.tensor(True))
    optimizers.zero_grad()
    assert everything(model, optimizers) == before


@EACH
def test_resume_is_bitwise(name, tmp_path):
    """Through a file, with state of any type: numbers, lists of tensors, counters in the groups."""
    model, optimizers = settled(name)
    steps(model, optimizers, 0, 12)
    checkpoint.save(tmp_path, 12, {"model": model.state_dict(), "optimizers": optimizers.state_dict()})
    steps(model, optimizers, 12, 15)
    again, taken = settled(name)
    state = checkpoint.load_newest(tmp_path).state
    again.load_state_dict(state["model"])
    assert taken.load_state_dict(state["optimizers"]) == []
    steps(again, taken, 12, 15)
    assert everything(again, taken) == everything(model, optimizers)


def test_state_of_another_optimizer_or_shape_starts_from_scratch():
    _, optimizers = settled("sgd")
    model, muon = settled("torch_muon")
    steps(model, muon, 0, 1)
    lines = optimizers.load_state_dict(muon.state_dict())
    assert "SGD's state of transformer.h.0.attn.c_attn.weight: starts from scratch" in lines and len(lines) == 4
    _, wider = settled("torch_muon", "model.n_embd=32")
    assert any(
        line.startswith("Muon's state of transformer.h.0.mlp.c_fc.weight")
        for line in wider.load_state_dict(muon.state_dict())
    )


def test_our_optimizers_and_fused_ones_of_torch_skip_without_a_host_sync():
    assert skips_on_device(settled("adamw")[1].named["AdamW of matrices"])
    assert skips_on_device(settled("modular", "assignment=unconstrained")[1].named["Modular"])
    assert not skips_on_device(settled("sgd")[1].named["SGD"])


def test_one_name_for_the_rate_and_decay_of_all():
    for name in ("manifold_muon", "paper", "sgd"):
        _, optimizers = settled(
            name, "assignment=unconstrained", "optim.matrices.lr=0.25", "optim.matrices.weight_decay=0.5"
        )
        group = next(iter(optimizers)).param_groups[0]
        assert float(group["lr"]) == 0.25 and group["weight_decay"] == 0.5


def test_factors_of_the_rate_make_groups():
    _, optimizers = settled("sgd", "optim.library.lr_scale={attn: 0.5}", "optim.matrices.lr=0.5")
    assert [group["lr"] for group in optimizers.named["SGD"].param_groups] == [0.25, 0.5]


# ---- state of a kind of its own ----


class Overflowing(torch.optim.SGD):
    """Its matrices are infinite after a step."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.fill_(math.inf)


class Counting(torch.optim.Optimizer):
    """SGD on signs, with state in bfloat16 and counters in the group and on the host."""

    def __init__(self, params, lr=0.1, momentum=0.5, **kwargs):
        super().__init__(params, {"lr": lr, "momentum": momentum, "count": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("mean", [torch.zeros_like(p, dtype=torch.bfloat16), None])[0].lerp_(
                    p.grad.bfloat16(), 0.5
                )
                state["calls"] = state.get("calls", 0) + 1
                p.sub_(state["mean"][0].float().sign(), alpha=group["lr"] / (group["count"] * state["calls"]))


class Closing(Counting):
    """Needs a closure."""

    def step(self, closure):
        return closure()


class Foreign(Counting):
    """Keeps an object that a checkpoint cannot hold."""

    def step(self):
        for group in self.param_groups:
            self.state[group["params"][0]]["object"] = object()


def test_counters_in_groups_and_low_precision_survive_a_resume():
    other = [
        f"optim.library.optimizer={__name__}.Counting",
        "~optim.library.settings.nesterov",
        "optim.library.weight_decay=0",
    ]
    model, optimizers = settled("sgd", *other)
    steps(model, optimizers, 0, 3)
    again, taken = settled("sgd", *other, "optim.library.settings.momentum=0.25")
    again.load_state_dict(model.state_dict())
    assert taken.load_state_dict(optimizers.state_dict()) == []
    group = taken.named["Counting"].param_groups[0]
    assert group["count"] == 3 and group["momentum"] == 0.25  # a setting is the configuration's
    state = taken.named["Counting"].state[group["params"][0]]
    assert state["mean"][0].dtype == torch.bfloat16 and state["mean"][1] is None and state["calls"] == 3


# ---- refusals ----

AS = "optim.library.optimizer="


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["assignment=hetero"],
            "'stiefel' is for .* but SGD, which optim.library chooses, knows no manifolds; use assignment=unconstrained",
        ),
        (["assignment=adamw"], "no matrix is left for SGD .* use assignment=unconstrained"),
        ([f"{AS}nowhere.SOAP"], "there is no module nowhere; install it, or mend the path"),
        ([f"{AS}torch.optim.SOAP"], "names no class"),
        ([f"{AS}SOAP"], "names no class; give an import path such as torch.optim.SGD"),
        ([f"{AS}torch.nn.Linear"], "is not a torch.optim.Optimizer"),
        ([f"{AS}{__name__}.Closing"], "cannot be used: TypeError: .*closure.*choose another optimizer"),
        ([f"{AS}{__name__}.Foreign"], "cannot be used: its state.* is a builtins.object"),
        ([f"{AS}{__name__}.Overflowing"], "cannot be used: a matrix is not finite after two steps; change .*settings"),
        ([f"{AS}{__name__}.Counting"], "optim.library.weight_decay is 0.0001, but .*Counting has none; give 0"),
        (["+optim.library.settings.momentun=1"], "momentun is no setting of torch.optim.SGD; did you mean momentum"),
        (["+optim.library.settings.lr=1"], "settings.lr has a key of its own; use optim.library.lr"),
        (["optim.library.settings.momentum=-1"], "Invalid momentum value: -1; change optim.library.settings.momentum"),
        (
            ["optim.library.settings.nesterov=no", "+optim.library.settings.foreach=Yes"],
            "settings.nesterov is 'no'; no is text here; write false\n.*foreach is 'Yes'; Yes is text here; write true",
        ),
        (["optim.library.settings.momentum=nan"], "settings.momentum is nan; give a finite number"),
        (["optim.library.lr_scale={attention: 2}"], "pattern 'attention' matches no matrix"),
    ],
)
def test_what_cannot_run_is_refused_with_the_remedy(overrides, message):
    plain = (
        []
        if "SGD" in message or "settings" in message or "lr_scale" in overrides[0]
        else ["~optim.library.settings.nesterov", *([] if "has none" in message else ["optim.library.weight_decay=0"])]
    )
    with pytest.raises(ConfigError, match=message):
        check(compose([*SMALL, "optim=sgd", *plain, *overrides]))


# ---- parity ----


CONVERGING = [2.0, -1.5, 0.5]  # 2x - 1.5x³ + 0.5x⁵; after forty of them, the polar factor
PARITY = {
    "published": (["optim=paper", "optim.muon.rule.msign_dtype=float32"], 5e-6),
    "certified, the same sign": (
        ["optim=manifold_muon", "optim.muon.rule.products=float32", f"optim.muon.rule.iterator={[CONVERGING] * 40}"],
        5e-6,
    ),
    "certified, its own sign": (["optim=manifold_muon", "optim.muon.rule.products=float32"], 0.05),
}
"""Our Muon → its settings, and the largest difference from torch's after ten steps, relative to the change of the weights (Frobenius)."""


@pytest.mark.parametrize(("rows", "columns", "decay"), [(8, 24, 0.1), (16, 16, 0.1), (24, 8, 0.0)])
def test_our_muon_is_torchs(rows, columns, decay, monkeypatch):
    """Ten steps of ManifoldMuon on `euclidean` matrices equal those of torch.optim.Muon, with an exact sign to rounding in float32.

    torch's Muon is in float32 instead of bfloat16, with forty steps of a quintic that converges to the exact sign. The ten Polar Express
    steps of optim=paper are as exact; the certified rule's own sign is smoothed on purpose. adjust_lr_fn=original is
    √(rows / columns) for tall matrices, which is our lr_scale (without decay, which ours scales too). torch's momentum is a mean,
    (1 - μ)·g, ours a sum: the sign is the same.
    """
    module = sys.modules["torch.optim._muon"]
    source = inspect.getsource(module._zeropower_via_newtonschulz)
    assert source.count(".bfloat16()") == 1
    space = dict(vars(module))
    exec(source.replace(".bfloat16()", ".clone()"), space)
    monkeypatch.setattr(module, "_zeropower_via_newtonschulz", space["_zeropower_via_newtonschulz"])
    theirs = [f"ns_coefficients={CONVERGING}", "ns_steps=40", "eps=1e-12"]
    shared = ["optim.matrices.lr=0.02", f"optim.matrices.weight_decay={decay}", "optim.always_adamw=[]"]
    shared += ["assignment=custom", "assignment.rules={weight: euclidean}"]
    scale = max(1, rows / columns) ** 0.5

    def change(*overrides):
        """What ten steps change."""
        torch.manual_seed(0)
        model = nn.Linear(columns, rows, bias=False)
        start = model.weight.detach().clone()
        optimizers = build_optimizers(model, compose([*overrides, *shared]))
        for step in range(10):
            model.weight.grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(step))
            optimizers.step()
        return model.weight.detach() - start

    expected = change("optim=torch_muon", *(f"+optim.library.settings.{setting}" for setting in theirs))
    for rule, (ours, bound) in PARITY.items():
        found = change(*ours, f"optim.muon.lr_scale={{weight: {scale}}}")
        assert torch.linalg.norm(found - expected) < bound * torch.linalg.norm(expected), rule


# ---- who wins ----


@pytest.mark.campaign
@needs("soap")
def test_soap_and_shampoo_reach_a_lower_loss_than_sgd(tmp_path):
    """At half of the demonstration's width and depth, 100 steps on its data; SGD at each of several rates, the others as they are."""
    from data.loader import Loader
    from training.data import open_data
    from training.schedule import lr_multiplier
    from training.step import clip

    shape = ["model.n_embd=64", "model.n_layer=2", "max_steps=100"]

    def last_losses(*overrides):
        cfg = compose([*shape, f"data.dir={tmp_path}/stdlib", *overrides])
        torch.manual_seed(0)
        model, optimizers = build(cfg)
        loader, losses = Loader(open_data(cfg).train, 128, 1, 8), []
        for step in range(100):
            x = torch.from_numpy(loader.batch(step).astype("int64"))
            loss = model(x[:, :-1], x[:, 1:])[1]
            loss.backward()
            clip([p.grad for p in model.parameters()], 1.0)
            optimizers.set_lr(lr_multiplier(step, **vars(cfg.schedule)))
            optimizers.step()
            optimizers.zero_grad()
            losses.append(loss.item())
        return sum(losses[-10:]) / 10

    sgd = min(last_losses("optim=sgd", f"optim.matrices.lr={rate}") for rate in (0.01, 0.03, 0.1))
    assert max(last_losses("optim=soap"), last_losses("optim=shampoo")) < sgd - 0.1
