"""GPT-2: counts, names, causality, the loss without logits, and generation."""

import pytest
import torch
import torch.nn.functional as F

from model import loss as loss_module
from model.gpt import GPT, GPTConfig
from model.loss import linear_cross_entropy
from training.checks import check
from training.config import compose
from training.validate import ConfigError

TINY_SHAPE = {"block_size": 16, "vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16}
TINY = GPTConfig(**TINY_SHAPE)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(TINY)


@pytest.fixture
def tokens():
    return torch.randint(40, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("gpt2_124m", 124.4),
        ("gpt2_350m", 354.6),
        ("gpt2_774m", 773.6),
        ("gpt2_1_5b", 1556.8),
        ("mini", 30.1),
        ("demo", 0.8),
    ],
)
def test_sizes(size, millions):
    cfg = compose([f"model={size}"])
    with torch.device("meta"):
        count = GPT(GPTConfig(**vars(cfg.model))).parameter_count()
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


def test_124m_exactly():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.parameter_count() == 124_373_760
    assert model.parameter_count(positions=False) == 123_587_328
    assert model.flops_per_token() == 6 * 123_587_328 + 12 * 12 * 768 * 1024


def test_nanogpt_names(model):
    block = {f"{n}.weight" for n in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")}
    expected = {f"transformer.{n}.weight" for n in ("wte", "wpe", "ln_f")} | {
        f"transformer.h.{i}.{n}" for i in range(2) for n in block
    }
    assert set(dict(model.named_parameters())) == expected
    assert set(model.state_dict()) == expected | {"lm_head.weight"}
    assert model.lm_head.weight is model.transformer.wte.weight


def test_initial_scales():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=8, n_head=4, n_embd=128, bias=True))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
        elif name.endswith("bias"):
            assert not p.any()


def test_equals_attention_and_mlp_written_out(model, tokens):
    """The slow twin: one block at a time, with explicit softmax attention."""
    weights = model.state_dict()
    h = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"]
    mask = torch.full((16, 16), -torch.inf).triu(1)
    for i in range(2):
        W = {k.removeprefix(f"transformer.h.{i}."): v for k, v in weights.items() if f"h.{i}." in k}
        x = F.layer_norm(h, (16,)) * W["ln_1.weight"]
        q, k, v = (x @ W["attn.c_attn.weight"].T).split(16, -1)
        heads = []
        for head in range(2):
            s = slice(8 * head, 8 * head + 8)
            scores = q[..., s] @ k[..., s].mT / 8**0.5 + mask
            heads.append(torch.softmax(scores, -1) @ v[..., s])
        h = h + torch.cat(heads, -1) @ W["attn.c_proj.weight"].T
        x = F.layer_norm(h, (16,)) * W["ln_2.weight"]
        h = h + F.gelu(x @ W["mlp.c_fc.weight"].T) @ W["mlp.c_proj.weight"].T
    logits = (F.layer_norm(h, (16,)) * weights["transformer.ln_f.weight"]) @ weights["lm_head.weight"].T
    assert torch.allclose(model(tokens)[0], logits, atol=1e-5)


def test_causal(model, tokens):
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 40
    ours, theirs = model(tokens)[0], model(changed)[0]
    assert torch.allclose(ours[:, :9], theirs[:, :9], atol=1e-6) and not torch.allclose(
        ours[:, 9:], theirs[:, 9:], atol=1e-3
    )


def test_loss_is_the_cross_entropy_of_the_logits(model, tokens):
    x, y = tokens[:, :-1], tokens[:, 1:]
    logits, nothing = model(x)
    none, loss = model(x, y)
    assert nothing is None and none is None
    assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), y.flatten()).item(), abs=1e-6)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunked_loss_and_gradients_equal_the_plain_ones(monkeypatch, dtype, cap):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(37, 16, generator=generator, dtype=torch.float64).to(dtype)
    W = torch.randn(50, 16, generator=generator, dtype=torch.float64).float()
    y = torch.randint(50, (37,), generator=generator)
    results = []
    for limit in (2**26, 0):
        monkeypatch.setattr(loss_module, "_FULL_LOGITS", limit)
        monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", 50 * 8)  # eight rows at a time, the last chunk short
        a, b, bias = h.clone().requires_grad_(), W.clone().requires_grad_(), W[:, 0].clone().requires_grad_()
        value = linear_cross_entropy(a, b, y) if cap is None else linear_cross_entropy(a, b, y, bias, cap)
        (3 * value).backward()
        results.append((value.detach(), a.grad, b.grad, *([] if cap is None else [bias.grad])))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for plain, chunked in zip(*results):
        assert torch.linalg.norm((plain - chunked).float()) <= tolerance * torch.linalg.norm(plain.float())


def test_chunks_give_a_bias_its_gradient_where_nothing_else_has_one(monkeypatch):
    h, W, y = torch.randn(9, 4), torch.randn(6, 4), torch.randint(6, (9,))
    grads = []
    for limit in (2**26, 0):
        monkeypatch.setattr(loss_module, "_FULL_LOGITS", limit)
        bias = torch.zeros(6, requires_grad=True)
        linear_cross_entropy(h, W, y, bias, None).backward()
        grads.append(bias.grad)
    assert torch.allclose(*grads, atol=1e-6) and grads[0].norm() > 0


def test_generate_is_without_dropout_and_leaves_the_mode_as_it_is(tokens):
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=1, n_head=2, n_embd=16, dropout=0.5)).train()
    x = tokens[:, :4] % 40
    assert torch.equal(model.generate(x, 8, temperature=0), model.generate(x, 8, temperature=0)) and model.training
    assert torch.equal(model.eval().generate(x, 8, temperature=0), model.generate(x, 8, temperature=0))
    assert not model.training


def test_ngpts_rule_needs_tokens_on_its_sphere():
    with pytest.raises(ConfigError, match=r"use residual\.embedding=normalize"):
        check(compose(["residual=ngpt", "residual.embedding=none"]))


def test_generate(model, tokens):
    x = tokens[:, :4]
    greedy = model.generate(x, 20, temperature=0)
    assert greedy.shape == (3, 24) and torch.equal(greedy[:, :4], x)
    assert torch.equal(greedy[:, 4], model(x)[0][:, -1].argmax(-1))
    assert torch.equal(greedy, model.generate(x, 20, temperature=1.0, top_k=1))
    torch.manual_seed(0)
    first = model.generate(x, 8, temperature=2.0, top_k=5)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(x, 8, temperature=2.0, top_k=5))
    allowed = torch.topk(model(x)[0][:, -1], 5).indices
    assert all(first[i, 4] in allowed[i] for i in range(3))


def test_impossible_shapes_are_refused_with_every_reason():
    with pytest.raises(ValueError, match=r"n_embd=30 is not divisible by model.n_head=4") as caught:
        GPT(GPTConfig(n_embd=30, n_head=4, qk_norm=True, qk_clip=1.0, qk_clip_on="weights"))
    assert "attention.qk_norm=true undoes" in str(caught.value)
    with pytest.raises(TypeError, match="a GPT has no setting n_emb"):
        GPTConfig(n_emb=32)
    with pytest.raises(ValueError, match="exceeds"):
        GPT(TINY)(torch.zeros(1, 17, dtype=torch.long))


def test_half_rotary_turns_half_of_the_channels_by_the_position():
    """Channels of the second half of each pair's list keep their values; logits depend on distance only."""
    from model.layers import HalfRotary

    rotary, x = HalfRotary(16, 32), torch.randn(1, 1, 1, 16).expand(1, 1, 32, 16)
    y = rotary(x)
    still = [4, 5, 6, 7, 12, 13, 14, 15]
    assert torch.equal(y[..., still], x[..., still]) and not torch.allclose(y[..., 1:, :4], x[..., 1:, :4])
    z = y @ y.mT
    assert torch.allclose(z[..., 0, 3], z[..., 10, 13], atol=1e-5)


def test_the_head_of_the_speedrun_is_bounded():
    model = GPT(GPTConfig(**{**TINY_SHAPE, "tied": False, "head_bias": True, "head_cap": 2.0}))
    model.lm_head.weight.data.mul_(1e4)
    logits, _ = model(torch.randint(40, (2, 16)))
    assert 1.9 < logits.abs().max() <= 2
    with pytest.raises(ValueError, match=r"model\.head_bias is for a head of its own; use model\.tied=false"):
        GPT(GPTConfig(**TINY_SHAPE, head_bias=True))
