"""Averages of the weights: what they are, refused updates, resumption, and that training knows nothing of them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from scripts.analysis.runs import load_model
from train import train
from training import checkpoint
from training.average import average_of
from training.config import compose
from training.log import read_records
from training.settings import EmaAverage, NoAverage, WindowAverage

SETTINGS = {"ema": EmaAverage("ema", 0.8), "window": WindowAverage("window", 3)}
CHOICES = {"ema": ["average=ema", "average.decay=0.8"], "window": ["average=window", "average.length=3"]}


def expected(kind, weights):
    """The average in float64 of the weights after accepted updates; for a window: after all updates, None where refused."""
    if kind == "ema":
        accepted = [w for w in weights if w is not None]
        shares = [0.8 ** (len(accepted) - 1 - i) for i in range(len(accepted))]
    else:
        whole = len(weights) // 3 * 3
        accepted = [w for w in weights[max(0, whole - 3) :] if w is not None]
        shares = [1.0] * len(accepted)
    return sum(s * w.double() for s, w in zip(shares, accepted)) / sum(shares)


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_average_is_that_of_the_accepted_updates(kind):
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    average, seen = average_of(SETTINGS[kind], model), []
    assert torch.equal(average.mean()[0], model.weight)
    for step in range(14):
        refused = step in (0, 4, 5)
        if not refused:
            model.weight.data.add_(torch.randn(3, 4))
        seen.append(None if refused else model.weight.detach().clone())
        average.update(torch.tensor(refused))
        if step > 0:
            torch.testing.assert_close(average.mean()[0].double(), expected(kind, seen), rtol=1e-5, atol=1e-6)
    own = model.weight.detach().clone()
    with average.in_place():
        assert not torch.equal(model.weight, own)
    assert torch.equal(model.weight, own)
    again = average_of(SETTINGS[kind], model)
    assert again.load_state_dict(average.state_dict()) == []
    for other in (average, again):
        model.weight.data.mul_(1.5)
        other.update(torch.tensor(False))
        model.weight.data.div_(1.5)
    assert torch.equal(average.mean()[0], again.mean()[0])


def test_without_an_average_there_is_none():
    assert average_of(NoAverage("none"), nn.Linear(2, 2)) is None


def test_an_average_of_another_kind_or_shape_starts_from_the_weights():
    model, other = nn.Linear(4, 3, bias=False), nn.Linear(5, 3, bias=False)
    ema, window = (average_of(settings, model) for settings in SETTINGS.values())
    model.weight.data.mul_(2)  # as those of a checkpoint come after the averages were made
    wider = average_of(SETTINGS["ema"], other).state_dict()
    for average, state in ((window, ema.state_dict()), (ema, wider), (window, None)):
        assert average.load_state_dict(state) == ["average of the weights: starts from scratch"]
        assert torch.equal(average.mean()[0], model.weight)


def losses(directory, key="loss"):
    return [r[key] for r in read_records(directory, "eval")]


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_with_an_average_is_the_same_run_and_is_resumed_bitwise(tiny, tmp_path, kind):
    common, folders = (
        [*tiny[:-1], "assignment=adamw", "max_steps=8"],
        {name: tmp_path / name for name in ("plain", "straight", "stopped")},
    )
    best = train(compose([*common, f"output_dir={folders['plain']}"]))
    assert train(compose([*common, *CHOICES[kind], f"output_dir={folders['straight']}"])) == best
    halfway = compose([*common, *CHOICES[kind], f"output_dir={folders['stopped']}"])
    train(replace(halfway, max_steps=5, schedule=replace(halfway.schedule, decay_steps=8)))
    train(compose([*common, *CHOICES[kind], f"output_dir={folders['stopped']}", "resume=auto"]))
    assert losses(folders["plain"]) == losses(folders["straight"]) == losses(folders["stopped"])
    averaged = losses(folders["straight"], "average_loss")
    assert averaged == losses(folders["stopped"], "average_loss")
    assert averaged[0] == losses(folders["straight"])[0] and averaged[-1] != losses(folders["straight"])[-1]
    a, b = (checkpoint.load_newest(folders[n] / "checkpoints").state["average"] for n in ("straight", "stopped"))
    assert a["position"] == b["position"]
    for ours, theirs in zip(a["means"], b["means"]):
        assert all(torch.equal(w, theirs[name]) for name, w in ours.items())
    plain, mean = (dict(load_model(folders["straight"], average=b)[0].named_parameters()) for b in (False, True))
    for name, w in mean.items():
        expected = sum(n * part[name].double() for n, part in zip(a["counts"], a["means"])) / sum(a["counts"])
        torch.testing.assert_close(w.double(), expected, rtol=1e-5, atol=1e-7)
    assert not any(torch.equal(w, mean[name]) for name, w in plain.items())
