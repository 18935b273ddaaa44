"""Every remedy keeps its promise: logits bounded, gates that begin as the identity, column norms capped, rates and blocks by pattern."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model.attention import HeadGate, QKClip, capped_attention, causal_logits
from model.gpt import GPT, GPTConfig
from optim.assignment import AssignmentError
from optim.manifolds import MANIFOLDS
from optim.published import PublishedStep
from optim.stack import Stack
from scripts.analysis.runs import load_model
from scripts.experiments import mechanism
from scripts.export import export
from train import train
from training.build import build_optimizers, gpt_config
from training.checks import check
from training.config import compose
from training.groups import by_pattern
from training.validate import ConfigError

TINY = GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny_gpt(**settings):
    return GPT(GPTConfig(**{**vars(TINY), **settings}))


def heated(model, factor):
    """The model with queries and keys `factor` times as long."""
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[: 2 * model.config.n_embd] *= factor
    return model


def largest_logits(attn, x):
    """(H,) over the batch, from the definition."""
    q, k, _ = attn.heads(x)
    return causal_logits(q, k, attn.logit_cap).amax((0, 2, 3))


# ---- logits ----


def test_qk_norm_bounds_every_logit_by_its_gains():
    attn = heated(tiny_gpt(qk_norm=True), 1000).transformer.h[0].attn
    x = 100 * torch.randn(4, 16, 16)
    width = 8
    assert largest_logits(attn, x).max() <= math.sqrt(width) + 1e-4
    with torch.no_grad():
        attn.q_norm.weight.mul_(3)
    assert math.sqrt(width) < largest_logits(attn, x).max() <= 3 * math.sqrt(width) + 1e-4


@pytest.mark.parametrize("target", ["gain", "weights"])
@pytest.mark.parametrize("bias", [False, True])
def test_qk_clip_bounds_the_logits_and_touches_no_other_head(target, bias):
    model = heated(tiny_gpt(n_layer=1, qk_clip=5.0, qk_clip_on=target, bias=bias), 30).train()
    attn, x = model.transformer.h[0].attn, torch.randn(4, 16, 16)
    with torch.no_grad():
        attn.c_attn.weight[0:8] /= 100  # the first head's queries: far below the threshold
    q, k, v = attn.heads(x)
    before = largest_logits(attn, x)
    assert before[0] < 5 < before[1]
    attn(x)
    attn.clip_logits(torch.tensor(False))
    after = largest_logits(attn, x)
    assert after[1].item() == pytest.approx(5.0, rel=1e-4) and torch.equal(after[0], before[0])
    new_q, new_k, new_v = attn.heads(x)
    assert torch.equal(new_v, v) and torch.equal(new_q[:, 0], q[:, 0]) and torch.equal(new_k[:, 0], k[:, 0])
    attn(x)
    attn.clip_logits(torch.tensor(False))
    assert torch.allclose(largest_logits(attn, x), after, rtol=1e-5)
    heated(model, 3)
    attn(x)
    hot = largest_logits(attn, x)
    attn.clip_logits(torch.tensor(True))  # the update was refused, and so is this one
    assert torch.equal(largest_logits(attn, x), hot) and hot[1] > 5 and not attn.qk_clip.largest.isfinite().any()


def test_qk_clip_sees_every_micro_batch_and_every_chunk_of_rows(monkeypatch):
    monkeypatch.setattr("model.attention._CLIP_ROWS", 5)
    clip, batches = QKClip(1.0, "gain", 2), torch.randn(3, 2, 4, 2, 16, 8)
    for q, k in batches:
        clip.watch(q, k, q.size(-1) ** -0.5)
    expected = torch.stack([causal_logits(q, k).amax((0, 2, 3)) for q, k in batches]).amax(0)
    assert torch.allclose(clip.largest, expected)
    assert torch.allclose(clip.shrink(), (1 / expected).clamp(max=1))
    assert (clip.largest == -torch.inf).all() and (clip.shrink() == 1).all()
    clip.largest.fill_(torch.nan)
    assert (clip.shrink() == 1).all()


def test_the_soft_cap_bounds_logits_and_is_the_plain_path_far_from_it():
    q, k, v = 20 * torch.randn(3, 2, 2, 16, 8)
    z, plain = causal_logits(q, k, cap=5.0), causal_logits(q, k)
    past = torch.isfinite(plain)
    assert torch.equal(past, torch.isfinite(z)) and z[past].abs().max() <= 5 < plain[past].abs().max()
    assert torch.allclose(z[past], 5 * torch.tanh(plain[past] / 5), atol=1e-5)
    fused = F.scaled_dot_product_attention(q / 20, k, v, is_causal=True)
    assert (capped_attention(q / 20, k, v, 1e6, 0.0) - fused).abs().max() < 1e-4
    every = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    fused = F.scaled_dot_product_attention(q / 20, k, v, every)
    assert (capped_attention(q / 20, k, v, 1e6, 0.0, mask=every) - fused).abs().max() < 1e-4


def test_a_soft_capped_model_is_causal_and_learns_through_its_cap():
    model, x = heated(tiny_gpt(logit_cap=2.0), 20), torch.randint(40, (2, 16))
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 40
    assert torch.allclose(model(x)[0][:, :9], model(changed)[0][:, :9], atol=1e-6)
    model(x, x)[1].backward()
    assert model.transformer.h[0].attn.c_attn.weight.grad[:16].norm() > 0


# ---- gates ----


@pytest.mark.parametrize("kind", ["token", "position"])
def test_head_gates_begin_as_the_identity_and_then_weigh_heads(kind):
    x = torch.randint(40, (2, 12))
    torch.manual_seed(1)
    plain = tiny_gpt()
    torch.manual_seed(1)
    gated = tiny_gpt(head_gate=kind)
    assert torch.allclose(plain(x)[0], gated(x)[0], atol=1e-6)
    attn, h = gated.transformer.h[0].attn, torch.randn(2, 12, 16)
    with torch.no_grad():
        attn.head_gate.weight.normal_()
    gates = attn.head_gate(h)
    assert gates.shape[1:] == (2, 12, 1) and 0 < gates.min() < 1 < gates.max() <= 2
    q, k, v = attn.heads(h)
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True) * gates
    by_hand = sum(heads[:, i] @ attn.c_proj.weight[:, 8 * i : 8 * i + 8].T for i in range(2))
    assert torch.allclose(attn(h), by_hand, atol=1e-6)


@pytest.mark.parametrize(("kind", "share"), [("token", 0.015625), ("position", 1024 / 768 * 12 / 768)])
def test_the_overhead_of_gates_is_printed(kind, share):
    with torch.device("meta"):
        model = GPT(GPTConfig(head_gate=kind))
    assert model.transformer.h[0].attn.head_gate.weight.numel() == round(share * 768**2)
    assert f"{100 * share:.2f}% of W_O" in model.describe()
    assert (share < 0.016) == (kind == "token")  # the paper's bound; the reading by position breaks it at 1024 tokens


def test_gates_by_position_tell_positions_apart_and_nothing_else():
    gate = HeadGate("position", 2, 16, 16)
    torch.nn.init.normal_(gate.weight)
    assert torch.equal(gate(torch.randn(3, 12, 16)), gate(torch.randn(1, 12, 16)))


# ---- weights ----


def test_the_norm_cap_bounds_columns_and_leaves_them_orthogonal(tiny, tmp_path):
    settings = ["optim=manifold_muon", "assignment=all_dgram", "optim.muon.lr=0.5", "max_steps=12"]
    largest = {}
    for cap in ("null", "0.7"):
        where = f"output_dir={tmp_path}/{cap}"
        train(compose([*tiny[:-1], *settings, where, f"optim.muon.rule.norm_cap={cap}"]))
        model, _, _ = load_model(tmp_path / cap)
        weights = [p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
        tall = [W if W.size(0) >= W.size(1) else W.T for W in weights]
        largest[cap] = max(torch.linalg.vector_norm(W, dim=0).max().item() for W in tall)
        assert max(MANIFOLDS["dgram"].distance(W).item() for W in weights) < 1e-3
    assert largest["null"] > 0.8 and largest["0.7"] <= 0.7 * 1.002


def test_decay_of_manifold_weights_shrinks_what_dgram_leaves_free():
    dgram = MANIFOLDS["dgram"]
    W, G, eta = dgram.retract(torch.randn(2, 12, 6)), torch.zeros(2, 12, 6), torch.tensor(0.1)
    rules = [PublishedStep(2, 0.1, 10, torch.float32, decay_manifolds=decays) for decays in (False, True)]
    kept, shrunk = (rule(Stack(W, G, "dgram", eta, 0.5, torch.tensor(False), torch.zeros(1), 0)).W for rule in rules)
    assert torch.allclose(torch.linalg.matrix_norm(shrunk), 0.95 * torch.linalg.matrix_norm(kept), rtol=1e-4)
    assert MANIFOLDS["dgram"].distance(shrunk).max() < 1e-5
    Q = MANIFOLDS["stiefel"].retract(W)
    assert (
        MANIFOLDS["stiefel"]
        .distance(rules[1](Stack(Q, G, "stiefel", eta, 0.5, torch.tensor(False), torch.zeros(1), 0)).W)
        .max()
        < 1e-2
    )


def test_learning_rates_by_pattern_scale_the_step():
    moved = {}
    for scale in (1.0, 0.25):
        torch.manual_seed(0)
        model = tiny_gpt()
        cfg = compose(["assignment=unconstrained", "optim=manifold_muon", f"optim.muon.lr_scale={{attn: {scale}}}"])
        optimizers = build_optimizers(model, cfg)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        x = torch.randint(40, (2, 17), generator=torch.Generator().manual_seed(0))
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizers.set_lr(0.5)
        for group in optimizers.muon.param_groups:
            group["weight_decay"] = 0.0
        optimizers.step()
        moved[scale] = {name: (p - before[name]).norm().item() for name, p in model.named_parameters()}
    for name in moved[1.0]:
        share = 0.25 if "attn" in name else 1.0
        assert moved[0.25][name] == pytest.approx(share * moved[1.0][name], rel=1e-3, abs=1e-7), name


def test_blocks_put_every_head_on_the_manifold_by_itself():
    cfg = compose(["assignment=all_stiefel", "optim=manifold_muon", "optim.muon.blocks={c_attn: 6}"])
    model = tiny_gpt()
    optimizers = build_optimizers(model, cfg)
    x = torch.randint(40, (2, 17))
    for _ in range(3):
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizers.step()
        optimizers.zero_grad()
    for block in model.transformer.h:
        heads = block.attn.c_attn.weight.view(6, 8, 16)  # queries, keys, values of two heads
        assert torch.allclose(heads @ heads.mT, torch.eye(8).expand(6, -1, -1), atol=1e-4)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention.head_gate=sigmoid"], "attention.head_gate is 'sigmoid'; choose one of none, token, position"),
        (["attention.qk_clip=-1"], "attention.qk_clip is -1; give a number above 0 (null switches it off)"),
        (["attention=qk_clip", "attention.qk_clip_on=weights"], "off their manifold; use attention.qk_clip_on=gain"),
        (["attention.qk_norm=true", "attention.qk_clip=5", "attention.qk_clip_on=weights"], "switch one off"),
        (
            ["experiment=ngpt_demo", "attention.qk_clip=5", "attention.qk_clip_on=weights"],
            "model.unit_weights=true undoes what attention.qk_clip does",
        ),
        (["init.weight_scale=0"], "init.weight_scale is 0; give a number above 0"),
        (["optim.muon.lr_scale={attention: 0.5}"], "'attention' matches no matrix"),
        (["optim.muon.lr_scale={attn: 0.5, c_attn: 0.2}"], "several patterns ('attn', 'c_attn') match"),
        (["optim.muon.blocks={c_attn: 7}"], "whole number that divides its 384 rows"),
        (["stability.on_unstable=halt"], "on_unstable is 'halt'; choose mark or stop"),
        (["stability.warning.probes=1"], "warning.probes is 1; give a whole number of at least 3"),
        (["probe.windows=0"], "probe.windows is 0"),
        (["data=mix", "data.parts={a: 1}", "batches.order=in_order"], "batches.order=in_order: a mixture has no order"),
    ],
)
def test_senseless_switches_are_refused_with_the_remedy(overrides, message):
    with pytest.raises(ConfigError) as caught:
        check(compose(overrides))
    assert message in str(caught.value)


def test_patterns_without_matrices_are_named():
    with pytest.raises(AssignmentError, match="key: pattern 'x' matches no matrix"):
        by_pattern([], {"x": 1}, 0, "key")


def test_published_clip_is_allowed_where_nothing_is_constrained():
    for assignment in ("unconstrained", "adamw"):
        check(compose(["attention=qk_clip", "attention.qk_clip_on=weights", f"assignment={assignment}"]))


# ---- in training ----


@pytest.mark.parametrize("attention", ["qk_norm", "qk_clip", "soft_cap", "gated"])
def test_every_switch_trains_and_resumes_bitwise(tiny, tmp_path, attention):
    common = [
        *tiny[:-1],
        f"attention={attention}",
        "attention.qk_clip_on=gain",
        "optim=manifold_muon",
        "probe.interval=4",
    ]
    common += ["attention.qk_clip=0.01"] if attention == "qk_clip" else []
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    train(compose([*common, f"output_dir={straight}", "max_steps=10"]))
    first = compose([*common, f"output_dir={halved}", "max_steps=10"])
    train(replace(first, max_steps=5))
    train(compose([*common, f"output_dir={halved}", "max_steps=10", "resume=auto"]))
    a, b = load_model(straight)[0].state_dict(), load_model(halved)[0].state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    if attention == "qk_clip":
        assert a["transformer.h.0.attn.qk_clip.gain"].max() < 1
    if attention == "gated":
        assert a["transformer.h.0.attn.head_gate.weight"].any()


def test_a_model_with_switches_is_not_exported_as_gpt2(tiny, tmp_path):
    train(compose([*tiny, "attention=qk_norm", "max_steps=5", "assignment=adamw"]))
    from scripts.command import UsageError

    with pytest.raises(UsageError, match=r"attention\.qk_norm"):
        export(str(tmp_path / "run"), tmp_path / "gpt.pt")


def test_every_remedy_composes_and_the_plain_run_has_none():
    plain = compose(["experiment=mechanism", "assignment=all_dgram"])
    assert gpt_config(plain) == GPTConfig(**vars(plain.model))
    for name, overrides in mechanism.REMEDIES.items():
        cfg = compose(["experiment=mechanism", "assignment=all_dgram", *overrides])
        check(cfg)
        assert (cfg == plain) == (name == "none"), name


def test_soft_capped_attention_has_dropout():
    q, k, v = torch.randn(3, 1, 64, 2, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    y = capped_attention(q, k, v, 5.0, 0.5)[:, :, 0]  # the first token sees itself alone
    kept = y.any(-1)
    assert 0 < kept.sum() < 64 and torch.allclose(y[kept], 2 * v[:, :, 0][kept])


def test_a_head_without_a_finite_logit_is_not_scaled():
    clip = QKClip(10.0, "gain", 4)
    clip.largest.copy_(torch.tensor([torch.inf, torch.nan, 20.0, 5.0]))
    assert clip.shrink().tolist() == [1.0, 1.0, 0.5, 1.0]
