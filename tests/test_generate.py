"""Generation: the cache of keys and values equals the recomputed window for every model, and tokens are drawn as asked."""

import pytest
import torch
import torch.nn.functional as F

from model.generate import Sampling, sampled_tokens
from model.gpt import GPT, GPTConfig
from model.residual import RESIDUAL_RULES
from training.config import compose

SHAPE = {"block_size": 12, "vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16}
NGPT = {"rope": True, "mlp": "swiglu", "tied": False, "unit_weights": True}
MODELS = {
    **{rule: {"residual": rule} for rule in RESIDUAL_RULES},
    "nGPT": {"residual": "ngpt", **NGPT},
    "rotary": {"rope": True, "qk_norm": True},
    "biases": {"bias": True, "mlp": "gelu_tanh"},
    "token gates": {"head_gate": "token", "logit_cap": 2.0},
    "attention alone, without skips": {"mlp": "none", "skips": False},
    "position gates": {"head_gate": "position", "qk_clip": 1.0},
}


def gpt(**settings):
    """A small model in eval mode with weights large enough that every part counts."""
    rule = settings.pop("residual", "pre_norm")
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, **settings, residual=compose([f"residual={rule}"]).residual)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 or "gate" in name or "bias" in name:
                p.mul_(5).add_(0.1 * torch.randn_like(p))
        for block in model.transformer.h:
            if block.attn.qk_clip is not None:
                block.attn.qk_clip.gain.fill_(0.7)
    return model


@pytest.fixture
def tokens():
    return torch.randint(40, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_the_cache_equals_the_recomputed_window(settings, tokens):
    """Whatever the parts in which the tokens come: a prompt of five, then one at a time, and three together."""
    model = gpt(**settings)
    whole, caches = model.features(tokens), model.new_caches()
    parts = [model.features(part, caches) for part in tokens.split([5, 1, 1, 3, 1, 1], 1)]
    assert caches[0].length == 12
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a sequence of 13 tokens exceeds"):
        model.features(tokens[:, :1], caches)


@pytest.mark.parametrize("settings", [MODELS["pre_norm"], MODELS["nGPT"]], ids=["pre_norm", "nGPT"])
def test_generation_is_the_same_with_and_without_the_cache_also_past_the_window(settings, tokens):
    model = gpt(**settings)
    for prompt in (tokens[:, :5], torch.cat([tokens, tokens], 1)):
        texts = [torch.cat([*sampled_tokens(model, prompt, 15, Sampling(0), cached)], 1) for cached in (True, False)]
        assert torch.equal(*texts) and texts[0].shape == (3, 15)
    assert torch.equal(
        model.generate(tokens[:, :5], 15, temperature=0)[:, 5:],
        torch.cat([*sampled_tokens(model, tokens[:, :5], 15, Sampling(0))], 1),
    )


def test_one_token_is_computed_for_one_token(tokens):
    """The cache is used: after the prompt the first block is given a single token until the window is full."""
    model, seen = gpt(), []
    model.transformer.h[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].size(1)))
    list(sampled_tokens(model, tokens[:, :5], 10, Sampling()))
    assert seen == [5, *[1] * 7, 12, 12]


def test_top_p_keeps_the_most_likely_tokens_up_to_their_sum():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    torch.manual_seed(0)
    for p, kept in ((0.4, {0}), (0.5, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        drawn = Sampling(top_p=p).draw(logits)
        assert set(drawn.unique().tolist()) == kept
    share = (Sampling(top_p=0.6).draw(logits) == 0).float().mean().item()
    assert share == pytest.approx(0.5 / 0.8, abs=0.03)
    assert set(Sampling(top_k=3, top_p=0.99).draw(logits).unique().tolist()) == {0, 1, 2}
    assert set(Sampling(top_k=1).draw(logits).unique().tolist()) == {0}


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": t} for t in (-1, float("nan"), float("inf"), 1e-40)),
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.1},
    ],
)
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="must be 0, or from 1e-6 to 1e6"):
        Sampling(**wrong)


def test_gelu_tanh_is_the_published_activation():
    model, x = gpt(mlp="gelu_tanh"), torch.randn(2, 3, 16)
    mlp = model.transformer.h[0].mlp
    h = x @ mlp.c_fc.weight.T
    written_out = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    torch.testing.assert_close(mlp(x), written_out @ mlp.c_proj.weight.T, rtol=1e-4, atol=1e-5)
    assert (F.gelu(h) - written_out).abs().max() > 1e-4
