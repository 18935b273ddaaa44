"""Training on documents that do not see each other, and in epochs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_residual import rule_of

from model.attention import document_mask
from model.config import GPTConfig
from model.gpt import GPT
from model.residual import RESIDUAL_RULES
from train import train
from training.checks import check
from training.config import compose
from training.data import open_data, separator_of
from training.log import read_records
from training.resume import changes_of
from training.validate import ConfigError

END = 9


def test_the_mask_of_a_window_by_hand():
    x = torch.tensor([[1, 2, END, 3, END, END, 4]])
    mask, positions = document_mask(x, END, first=False)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert mask.shape == (1, 1, 7, 7)
    document = [0, 0, 0, 1, 1, 2, 3]
    assert mask[0, 0].tolist() == [[document[i] == document[j] and j <= i for j in range(7)] for i in range(7)]
    assert document_mask(x, END, first=True)[1].tolist() == [[0, 1, 0, 1, 0, 0, 1]]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("changes", [{}, {"rope": True, "qk_norm": True}, {"head_gate": "token"}, {"logit_cap": 2.0}])
def test_documents_in_a_window_are_computed_as_if_alone(first, changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=16, n_layer=2, n_head=2, n_embd=16, **changes)).double()
    documents = [torch.randint(8, (n,)) for n in (5, 1, 11)]
    end = torch.tensor([END])
    parts = [torch.cat([end, d] if first else [d, end]) for d in documents]
    alone = torch.cat([model(part[None])[0][0] for part in parts])
    x = torch.cat(parts)[None]
    assert not torch.allclose(model(x)[0][0], alone, atol=1e-3)
    model.separator = (END, first)
    torch.testing.assert_close(model(x)[0][0], alone, atol=1e-6, rtol=1e-6)
    y = torch.randint(8, x.shape)
    loss = model(x, y)[1]
    torch.testing.assert_close(loss, F.cross_entropy(alone, y[0]).float(), atol=1e-6, rtol=1e-6)
    loss.backward()


def test_what_a_cache_holds_is_one_document():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=2, n_head=2, n_embd=16)).eval()
    x = torch.tensor([[1, END, 3, END, 4]])
    expected = model.features(x)
    model.separator = (END, False)
    torch.testing.assert_close(model.features(x, model.new_caches()), expected)


@pytest.mark.parametrize("rule", RESIDUAL_RULES)
def test_every_residual_rule_passes_the_mask_on(rule):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=2, n_head=2, n_embd=16, residual=rule_of(rule)))
    with torch.no_grad():
        for p in model.parameters():  # with weights so large that every sublayer counts; some rules start them at zero
            if p.ndim == 2:
                p.mul_(5).add_(0.1 * torch.randn_like(p))
    x = torch.tensor([[1, END, 2, 3], [4, END, 2, 3]])
    together = model(x)[0]
    assert not torch.allclose(together[0, 2:], together[1, 2:], atol=1e-2)
    model.separator = (END, False)
    out = model(x)[0]
    torch.testing.assert_close(out[0, 2:], out[1, 2:])


def test_training_by_documents_and_epochs_is_resumed_exactly(tiny):
    overrides = [*tiny, "batches.order=epoch", "batches.documents=true", "probe.interval=null"]
    plain = train(compose([*tiny, "probe.interval=null"]))
    whole, stopped = (f"{tiny[-1]}_{name}" for name in ("whole", "stopped"))
    assert train(compose([*overrides, whole])) != plain
    train(compose([*overrides, stopped, "max_steps=10", "schedule.decay_steps=20"]))
    train(compose([*overrides, stopped, "resume=auto", "schedule.decay_steps=20"]))
    losses = [
        [record["loss"] for record in read_records(place.partition("=")[2], "train")] for place in (whole, stopped)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "overrides",
    [["attention=qk_clip"], ["attention.head_gate=position"], ["probe.interval=5"]],
    ids=str,
)
def test_what_does_not_know_documents_is_refused(tiny, overrides):
    with pytest.raises(ConfigError, match=r"batches\.documents=true does not work with .*; switch one of them off"):
        check(compose([*tiny, "batches.documents=true", "probe.interval=null", *overrides]))


def test_the_separator_is_that_of_the_data(tiny):
    cfg = compose([*tiny, "batches.documents=true", "probe.interval=null"])
    assert separator_of(cfg, open_data(cfg)) == (256, False)
    assert separator_of(compose(tiny), open_data(cfg)) is None


def test_another_order_of_the_batches_is_another_run(tiny):
    saved = compose(tiny).plain()
    assert changes_of(saved, compose([*tiny, "batches.order=epoch"])) == ["batches.order: replacement → epoch"]


def test_more_steps_change_a_transferred_rate():
    own = ["experiment=nugpt_demo", "schedule.decay_steps=400"]
    for transfer, changed in (("none", []), ("nu", ["max_steps: 200 → 400"])):
        before, after = (compose([*own, f"transfer={transfer}", f"max_steps={n}"]) for n in (200, 400))
        assert changes_of(before.plain(), after) == changed


def test_places_are_those_of_an_array(tiny):
    """The type that indexing needs, whatever the step."""
    from data.loader import Loader

    part, offset = Loader(open_data(compose(tiny)).train, 16, 0, 4).places(10**9)
    assert part.dtype == offset.dtype == np.int64
