"""ManifoldMuon as an optimizer of torch: schedules over a resume, copies and pickles, groups, and what its arguments may be."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from optim import CertifiedStep, ManifoldMuon, for_model
from optim import manifold_muon as module
from optim.manifolds import MANIFOLDS

STEPS = 8
SCHEDULES = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "step": lambda o: lr_scheduler.StepLR(o, 3),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, STEPS),  # moves momentum or betas too
}


def pair(**settings):
    """A model whose matrices have two shapes and some of which are cut, and its two optimizers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6))
    rules = {"0|1": "stiefel", "2": "dgram"}
    return model, *for_model(model, rules, lr=0.1, adamw={"lr": 0.1}, blocks={"1": 2}, **settings)


def advance(model, optimizers, steps):
    for step in steps:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def equal(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def optimizer_of(*groups, **settings):
    common = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0}
    groups = [{"manifold": "stiefel", **group} for group in groups]
    return ManifoldMuon(groups, CertifiedStep(), **{**common, **settings})


def matrix():
    return nn.Parameter(torch.eye(4, 2))


# ---- schedules ----


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_after_a_resume_as_without_one(name):
    """Of ManifoldMuon as of AdamW: every rate, and the weights."""

    def start():
        model, *optimizers = pair()
        return model, optimizers, [SCHEDULES[name](o) for o in optimizers]

    def run(model, optimizers, schedules, steps):
        seen = []
        for step in steps:
            seen.append([(float(g["lr"]), g.get("momentum")) for o in optimizers for g in o.param_groups])
            advance(model, optimizers, [step])
            for schedule in schedules:
                schedule.step()
        return seen

    straight = start()
    whole = run(*straight, range(STEPS - 1))
    stopped = start()
    run(*stopped, range(4))
    file = io.BytesIO()
    torch.save([stopped[0].state_dict(), *(part.state_dict() for pair in stopped[1:] for part in pair)], file)
    file.seek(0)
    resumed = model, optimizers, schedules = start()
    for part, state in zip([model, *optimizers, *schedules], torch.load(file)):
        part.load_state_dict(state)
    assert run(*resumed, range(4, STEPS - 1)) == whole[4:]
    assert equal(model, straight[0])
    assert all(isinstance(group["lr"], torch.Tensor) for group in optimizers[0].param_groups)


def test_a_schedule_can_be_made_for_a_loaded_state():
    _, muon, _ = pair()
    lr_scheduler.ExponentialLR(muon, 0.5)
    _, again, _ = pair()
    again.load_state_dict(muon.state_dict())
    lr_scheduler.ExponentialLR(again, 0.5, last_epoch=3)  # asks for initial_lr


def test_a_rate_that_the_user_made_a_number_stays_one():
    saved, p = optimizer_of({"params": [matrix()]}, lr=0.03), matrix()
    loaded = optimizer_of({"params": [p]})
    loaded.param_groups[0]["lr"] = 0.2
    loaded.load_state_dict(saved.state_dict())
    assert type(loaded.param_groups[0]["lr"]) is float and loaded.param_groups[0]["lr"] == pytest.approx(0.03)
    p.grad = torch.ones_like(p)
    loaded.step()


def test_a_loaded_state_shares_nothing_and_leaves_the_geometry():
    saved = optimizer_of({"params": [matrix()]}, weight_decay=0.1)
    loaded = optimizer_of({"params": [matrix()], "manifold": "hyperball", "radius": 2.0}, lr=0.2)
    loaded.load_state_dict(saved.state_dict())
    group = loaded.param_groups[0]
    assert (group["manifold"], group["radius"], group["weight_decay"]) == ("hyperball", 2.0, 0.1)
    group["lr"].fill_(5)
    assert saved.param_groups[0]["lr"] == pytest.approx(0.1)


def test_a_state_of_other_groups_is_refused():
    saved = optimizer_of({"params": [matrix(), matrix()]})
    loaded = optimizer_of({"params": [matrix()]}, {"params": [matrix()], "manifold": "dgram"})
    with pytest.raises(ValueError, match=r"groups of \[2\] matrices, and this optimizer has \[1, 1\]; construct it"):
        loaded.load_state_dict(saved.state_dict())


def test_a_state_of_other_shapes_changes_nothing():
    saved = optimizer_of({"params": [matrix(), nn.Parameter(torch.eye(4, 1))]}).state_dict()
    loaded = optimizer_of({"params": [matrix(), matrix()], "blocks": 2})
    for state in saved["state"].values():
        state["momentum"] += 1
    with pytest.raises(
        ValueError, match=r"momentum of matrix 0 is \(1, 4, 2\) and not \(2, 2, 2\); level of .*; construct the"
    ):
        loaded.load_state_dict(saved)
    assert not any(state["momentum"].any() for state in loaded.state.values())
    loaded.load_state_dict(saved | {"state": {}})  # what is not there stays as it is


# ---- copies ----


def saved_and_loaded(parts):
    file = io.BytesIO()
    torch.save(parts, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded])
def test_a_copy_with_its_model_trains_on_alike(duplicate):
    model, *optimizers = pair(row_beta=0.9)
    advance(model, optimizers, range(2))
    other, *twins = duplicate((model, *optimizers))
    assert [p is q for p, q in zip(other.parameters(), model.parameters())] == [False] * 6
    advance(other, twins, range(2, 4))
    assert not equal(model, other)  # what was copied stays where it was
    advance(model, optimizers, range(2, 4))
    assert equal(model, other)
    assert str(optimizers[0].state_dict()) == str(twins[0].state_dict())


# ---- groups and settings ----


def test_a_further_group_is_refused():
    optimizer = optimizer_of({"params": [matrix()]})
    with pytest.raises(RuntimeError, match="takes no further group; construct a new one with all groups"):
        optimizer.add_param_group({"params": [matrix()], "manifold": "stiefel"})
    assert len(optimizer.param_groups) == 1


def test_matrices_have_names_without_being_given_any():
    optimizer = optimizer_of({"params": [matrix(), matrix()]}, {"params": [matrix()], "names": ["mine"]})
    optimizer.watched = True
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    assert list(optimizer.certificates()) == ["group 0, matrix 0", "group 0, matrix 1", "mine"]


def test_what_is_no_step_rule_and_a_group_without_manifold_are_refused():
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0}
    with pytest.raises(ValueError, match="rule is 'certified'; give a step rule, such as CertifiedStep"):
        ManifoldMuon([{"params": [matrix()], "manifold": "stiefel"}], "certified", **settings)
    with pytest.raises(ValueError, match="a parameter group has no manifold; give"):
        ManifoldMuon([matrix()], CertifiedStep(), **settings)


WRONG = {
    "lr": (-0.05, float("nan"), float("inf"), "0.1", True, None),
    "momentum": (1.5, 1, -0.1, "a"),
    "nesterov": ("no", 1),
    "weight_decay": (-1, float("inf")),
    "block_length": ("foo", None),
    "cautious": ("no",),
    "row_beta": (1.5, 1.0, -0.1),
    "radius": (0, -1.0, "a", float("nan")),
    "blocks": (0, 3, 2.0, "2"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_setting_is_refused(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        optimizer_of({"params": [matrix()], name: value})
    assert repr(value) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_all_wrong_settings_come_at_once():
    with pytest.raises(ValueError) as caught:
        optimizer_of(
            {"params": [matrix()]}, {"params": [nn.Parameter(torch.ones(3))], "manifold": "steifel"}, lr=-1, momentum=2
        )
    for part in (
        "lr is -1; give a finite",
        "momentum is 2; give",
        "manifold 'steifel'; choose",
        "(3,); give it to AdamW",
    ):
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 4


def test_a_schedule_may_put_a_number_in_the_place_of_the_rate():
    for name in MANIFOLDS:
        stepped = []
        for rate in (0.05, torch.tensor(0.05)):
            p = matrix()
            optimizer = optimizer_of({"params": [p], "manifold": name})
            optimizer.param_groups[0]["lr"] = rate
            p.grad = torch.ones_like(p)
            optimizer.step()
            stepped.append(p.detach().clone())
        assert torch.equal(*stepped), name


def test_each_matrix_has_one_name():
    with pytest.raises(ValueError, match="1 names for 2 matrices; give each its name"):
        optimizer_of({"params": [matrix(), matrix()], "names": ["a"]})
    p, q = matrix(), matrix()
    optimizer = optimizer_of({"params": [p, q], "names": ["h.1", "h.11"]})
    before = p.detach().clone()
    for x in (p, q):
        x.data.mul_(2)
    optimizer.bring_onto_manifold("h.11")
    assert torch.equal(p, 2 * before) and MANIFOLDS["stiefel"].distance(q) < 1e-5


def test_a_state_with_settings_that_no_group_may_have_is_refused():
    optimizer = optimizer_of({"params": [matrix()]})
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["param_groups"][0] |= {"momentum": 7.0, "nesterov": "x"}
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"momentum is 7\.0; give .*; nesterov is 'x'; give True or False"):
        optimizer.load_state_dict(wrong)
    assert str(optimizer.state_dict()) == str(before)


def test_weights_of_16_bits_are_refused():
    with pytest.raises(ValueError, match=r"no weights in torch.bfloat16, which would .*; keep them in float32"):
        optimizer_of({"params": [nn.Parameter(torch.ones(4, 2, dtype=torch.bfloat16))]})


def test_in_float64_a_skipped_step_keeps_every_bit():
    p = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double())
    optimizer = optimizer_of({"params": [p]})
    before, p.grad = p.detach().clone(), torch.ones_like(p)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(p, before)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert (p - before).abs().max() > 0.01


def test_what_torch_allows_is_allowed():
    optimizer_of({"params": [matrix()]}, lr=torch.tensor(0.1), momentum=0, row_beta=0.0, block_length="whole")
    assert optimizer_of({"params": [matrix()]}, lr=0).param_groups[0]["lr"] == 0


@pytest.mark.parametrize("cap", [-1, 0, float("nan"), "1"])
def test_a_wrong_cap_is_refused(cap):
    with pytest.raises(ValueError, match=r"norm_cap is .*; give a number above 0, or None for no cap"):
        CertifiedStep(norm_cap=cap)


def test_what_is_stepped_along():
    g, before, no = torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.tensor(False)
    for nesterov in (False, True):
        momentum = before.clone()
        along = module.advance(g, momentum, 0.9, nesterov, no)
        assert torch.allclose(momentum, 0.9 * before + g)
        assert torch.allclose(along, g + 0.9 * momentum if nesterov else momentum)


def test_a_refused_step_leaves_weights_of_any_radius_bitwise():
    shapes = ((24, 9), (9, 24))
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = optimizer_of({"params": params, "radius": 1.7})
    with torch.no_grad():
        for p in params:  # weights of elsewhere, of which x / R · R is not always x
            p.copy_(torch.randn(p.shape))
    before = [p.detach().clone() for p in params]
    for found_inf, broken in ((None, torch.nan), (torch.ones(()), 1.0)):  # no direction; refused
        optimizer.found_inf = found_inf
        for p in params:
            p.grad = broken * torch.randn(p.shape)
        optimizer.step()
        assert all(torch.equal(p.detach(), old) for p, old in zip(params, before))
