"""A batch is cut into micro-batches of any size: what fits is taken, and the gradient is the same."""

import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.prepare import prepare
from data.shards import DataError
from model.gpt import GPT, GPTConfig
from training.checks import check
from training.config import compose
from training.data import open_data
from training.placement import Replicated, require_gradients
from training.ranks import Ranks
from training.start import shortened
from training.step import accumulate, clip, host_tokens, mean_loss, micro_batch_size, micro_batches
from training.validate import ConfigError


def test_the_micro_batch_is_what_fits():
    assert micro_batch_size(64, 64) == 64 and micro_batch_size(16, 5) == 4
    assert micro_batch_size(8, 64) == 8  # at most what a rank has
    assert micro_batch_size(7, 4) == 4  # 4 and 3: the divisor 1 would be far less than was asked for
    assert micro_batch_size(9, 6) == 3  # half of it is near enough, and all are alike
    for windows in range(1, 40):
        for wanted in range(1, 50):
            size = micro_batch_size(windows, wanted)
            most = min(windows, wanted)
            assert most / 2 <= size <= most
            if windows % size:
                assert size == most and not any(windows % s == 0 for s in range(-(-most // 2), most + 1))


@pytest.mark.parametrize("size", [2, 4, 6])
def test_a_smaller_last_micro_batch_counts_by_its_windows(size):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=1, n_head=2, n_embd=16)).double()
    windows = np.random.default_rng(0).integers(0, 32, (7, 9)).astype(np.uint16)
    found = []
    for micro in (7, size):
        model.zero_grad()
        loss = accumulate(model, windows, micro, torch.device("cpu"), contextlib.nullcontext())
        found.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    (loss, gradients), (other, others) = found
    assert other == pytest.approx(loss, abs=1e-6)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(gradients, others))


def test_a_parameter_without_gradient_is_named():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    used.sum().backward()
    with pytest.raises(RuntimeError, match=r"no gradient reached h\.0\.alpha; use it in the forward pass"):
        require_gradients({"h.0.beta": used, "h.0.alpha": unused})
    model = torch.nn.ParameterDict({"beta": used, "alpha": unused})
    placement = Replicated(model, Ranks(0, 1, torch.device("cpu"), 60.0), compose(["device=cpu"]))
    with pytest.raises(RuntimeError, match="no gradient reached alpha;"):
        placement.gradients()


def test_a_batch_for_a_gpu_is_pinned_once(monkeypatch):
    """With a stand-in for pinning; on the CPU there is none."""
    windows, pinned = np.arange(63, dtype=np.uint16).reshape(7, 9), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    tokens = host_tokens(windows, torch.device("cuda"))
    assert pinned == [tokens] and tokens.dtype == torch.int64 and tokens.tolist() == windows.tolist()
    parts = list(micro_batches(tokens, 3, torch.device("cpu")))
    assert [len(x) for x, _ in parts] == [3, 3, 1] and len(pinned) == 1
    for given, others in zip(parts, micro_batches(windows, 3, torch.device("cpu"))):
        assert all(map(torch.equal, given, others))
    assert len(pinned) == 1


@pytest.mark.parametrize("experiment", ["demo", "paper", "one_gpu", "ngpt_124m", "instability_one_gpu"])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_documented_recipes_run_on_any_usual_number_of_ranks(experiment, world):
    check(compose([f"experiment={experiment}"]), world)
    check(compose([f"experiment={experiment}", f"launcher.nproc={world}"]))


def test_only_an_impossible_batch_is_refused():
    with pytest.raises(ConfigError, match=r"block_size 1024 x 3 ranks = 3072; use global_batch_tokens=64512 or 67584"):
        check(compose(["experiment=paper"]), 3)
    with pytest.raises(ConfigError, match=r"use global_batch_tokens=128$"):
        check(compose(["global_batch_tokens=1"]))


def test_what_is_cut_is_said_in_one_line():
    assert shortened(compose([]), 1, 64, 2) == []
    assert shortened(compose(["experiment=paper"]), 8, 10**6, 2) == [
        "micro_batch_size=64: a rank has 8 windows in an update and uses 8 at a time"
    ]
    windows = compose(["eval_windows=64", "probe.windows=128", "probe.interval=10"])
    assert shortened(windows, 1, 64, 64) == [
        "probe.windows=128: a run evaluates only 64 windows; all of them are probed"
    ]
    assert shortened(replace(windows, probe=replace(windows.probe, interval=None)), 1, 64, 64) == []
    assert shortened(compose(["eval_windows=64"]), 1, 9, 2) == [
        f"eval_windows=64: the data has only 9 validation windows of {windows.model.block_size} tokens; all are used"
    ]
    assert shortened(compose(["max_steps=10"]), 1, 64, 2) == [
        "schedule.warmup_steps=30 is too long for 10 updates; the warm-up has 7"
    ]


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    folder = [f"data.dir={tmp_path}/mine", "data.max_tokens=20000"]
    prepare(compose(folder).data)
    with pytest.raises(DataError, match=r"holds bytes tokens, and data\.tokenizer is gpt2; add data\.tokenizer=bytes"):
        open_data(compose([*folder, "data.auto_prepare=false", "data.tokenizer=gpt2", "model.vocab_size=50304"]))


def test_a_validation_loss_is_without_dropout_and_training_goes_on_with_it():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=1, n_head=2, n_embd=16, dropout=0.5))
    windows = np.random.default_rng(0).integers(0, 32, (5, 9)).astype(np.uint16)
    alone, plain = Ranks(0, 1, torch.device("cpu"), 1.0), contextlib.nullcontext()
    found = mean_loss(model, model, windows, 2, alone, plain)
    assert model.training
    x = torch.from_numpy(windows.astype("int64"))
    assert found == pytest.approx(model.eval()(x[:, :-1], x[:, 1:])[1].item(), rel=1e-6)


def test_small_gradients_stay_and_large_ones_come_to_the_limit():
    for size, limit, expected in ((0.5, 1.0, 0.5), (3.0, 1.0, 1.0), (3.0, None, 3.0)):
        gradients = [torch.tensor([0.6 * size]), torch.tensor([[0.8 * size]])]
        total, norms = clip(gradients, limit)
        assert total.item() == pytest.approx(size) and norms.tolist() == pytest.approx([0.6 * size, 0.8 * size])
        assert math.hypot(*map(float, gradients)) == pytest.approx(expected, rel=1e-5)
