"""nGPT: its forward pass in NumPy, one token at a time; unit vectors after every step; who owns them; and νGPT's transfer."""

import copy
import math
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import finish, start_ranks

from model.gpt import GPT, GPTConfig
from model.layers import MLP
from model.scale import scale_statistics
from model.unit_norm import UnitNorm
from optim.assignment import AssignmentError, assign, parameter_table
from train import train
from training import checkpoint
from training.build import build_optimizers, gpt_config
from training.checks import check
from training.config import compose
from training.groups import adamw_groups
from training.log import read_records
from training.ranks import leave_group
from training.settings import AdamW
from training.transfer import changes, transfer_table, transferred
from training.validate import ConfigError

SIZES = ["model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=12", "model.vocab_size=40"]


def build(*overrides):
    cfg = compose(["model=ngpt_demo", *SIZES, "optim.adamw.lr=0.02", "optim.muon.lr=0.05", *overrides])
    torch.manual_seed(0)
    model = GPT(gpt_config(cfg))
    return model, build_optimizers(model, transferred(cfg), model.unit_vectors())


def advance(model, optimizers, steps):
    for step in steps:
        x = torch.randint(40, (4, 13), generator=torch.Generator().manual_seed(step))
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizers.step()
        optimizers.zero_grad()


def gap_to_unit_length(model, names=None):
    """Largest | ‖w‖ - 1 | over all vectors of embedding space, found by their length: that of the embedding."""
    gaps = []
    for name, p in model.named_parameters():
        if p.ndim == 2 and (names is None or name in names):
            vectors = p if p.size(1) == 16 and not name.endswith("c_proj.weight") else p.T
            assert vectors.size(1) == 16
            gaps.append((vectors.detach().double().norm(dim=1) - 1).abs().max().item())
    return max(gaps)


# ---- the forward pass ----


def norm(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def turned(x, position):
    """RoPE: channel pairs as complex numbers, times e^(i · position · rate)."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * 10_000.0 ** (-2 * np.arange(half) / len(x)))
    return np.concatenate([z.real, z.imag])


def ngpt_logits(weights, tokens, layers, heads, d):
    """The published equations for one sequence, token after token, with a list of past keys and values."""
    width, past, logits = d // heads, [([], []) for _ in range(layers)], []
    eigen = lambda stored, init: stored * init / d**-0.5  # noqa: E731
    for position, token in enumerate(tokens):
        h = norm(weights["transformer.wte.weight"][token])
        for layer, (keys, values) in enumerate(past):
            W = {k.split(".", 3)[3]: v for k, v in weights.items() if k.startswith(f"transformer.h.{layer}.")}
            Wq, Wk, Wv = np.split(W["attn.c_attn.weight"], 3)
            s_qk = eigen(W["attn.s_qk.weight"], 1.0).reshape(heads, width)
            q, k, v = ((M @ h).reshape(heads, width) for M in (Wq, Wk, Wv))
            q, k = (np.stack([s_qk[i] * norm(turned(u[i], position)) for i in range(heads)]) for u in (q, k))
            keys.append(k)
            values.append(v)
            out = []
            for i in range(heads):
                scores = np.array([np.sqrt(width) * q[i] @ past_k[i] for past_k in keys])
                p = np.exp(scores - scores.max())
                out.append(sum(w * past_v[i] for w, past_v in zip(p / p.sum(), values)))
            h_A = norm(W["attn.c_proj.weight"] @ np.concatenate(out))
            h = norm(norm(h) + np.abs(eigen(W["ln_1.alpha.weight"], 0.05)) * (h_A - norm(h)))
            u, v = np.split(W["mlp.s_uv.weight"] * np.sqrt(d) * (W["mlp.c_fc.weight"] @ h), 2)
            h_M = norm(W["mlp.c_proj.weight"] @ (u * v / (1 + np.exp(-v))))
            h = norm(norm(h) + np.abs(eigen(W["ln_2.alpha.weight"], 0.05)) * (h_M - norm(h)))
        logits.append(eigen(weights["s_z.weight"], 1.0) * (weights["lm_head.weight"] @ h))
    return np.stack(logits)


def test_forward_equals_the_published_equations_one_token_at_a_time():
    model, optimizers = build()
    advance(model, optimizers, range(3))  # so that no scale is still at its initial value
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("alpha.weight"):
                p[::3] *= -1  # its absolute value counts
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    tokens = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(9))
    ours = model(tokens)[0].detach().double().numpy()
    for sequence, logits in zip(tokens.numpy(), ours):
        assert np.abs(ngpt_logits(weights, sequence, layers=2, heads=2, d=16) - logits).max() < 2e-5


def test_scales_start_as_published_and_the_stream_has_unit_length():
    model, _ = build()
    block, d = model.transformer.h[0], 16
    stored = {"alpha": block.ln_1.alpha, "s_qk": block.attn.s_qk, "s_uv": block.mlp.s_uv, "s_z": model.s_z}
    assert {n: s.weight.shape[0] for n, s in stored.items()} == {"alpha": d, "s_qk": d, "s_uv": 8 * d, "s_z": 40}
    for name, parameter, effective in (
        ("alpha", d**-0.5, 0.05),
        ("s_qk", d**-0.5, 1.0),
        ("s_uv", 1.0, math.sqrt(d)),
        ("s_z", d**-0.5, 1.0),
    ):
        assert torch.allclose(stored[name].weight, torch.tensor(parameter)), name
        assert torch.allclose(stored[name](), torch.tensor(effective)), name
    h = model.features(torch.randint(40, (2, 12)))
    assert torch.allclose(h.norm(dim=-1), torch.ones(2, 12), atol=1e-6)


def test_124m_has_the_published_parts():
    with torch.device("meta"):
        model = GPT(gpt_config(compose(["experiment=ngpt_124m"])))
    d, L, V = 768, 12, 50304
    assert model.parameter_count() == 2 * V * d + L * (4 * d * d + 12 * d * d + 2 * d + d + 8 * d) + V
    cfg = compose(["experiment=ngpt_124m"])
    assert cfg.optim.adamw.weight_decay == cfg.schedule.warmup_steps == cfg.schedule.floor == 0
    check(cfg)


# ---- learned scales ----


def test_scales_are_the_values_that_act():
    model, optimizers = build()
    advance(model, optimizers, range(2))
    with torch.no_grad():
        model.transformer.h[1].ln_2.alpha.weight[0] = -7.0  # its absolute value counts
    found, d = scale_statistics(model.scales()), 16
    assert list(found) == ["alpha_attn", "alpha_mlp", "s_qk", "s_uv", "s_z"]
    alpha = np.abs(model.transformer.h[1].ln_2.alpha.weight.detach().double().numpy() * 0.05 * d**0.5)
    expected = {"mean": alpha.mean(), "deviation": alpha.std(), "least": alpha.min(), "greatest": 7 * 0.05 * d**0.5}
    assert {key: value[1] for key, value in found["alpha_mlp"].items()} == pytest.approx(expected, rel=1e-6)
    assert found["s_uv"]["mean"][0] == pytest.approx(model.transformer.h[0].mlp.s_uv.weight.mean().item() * d**0.5)
    assert found["s_z"]["greatest"] == pytest.approx(model.s_z().max().item())


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["residual=geonorm"], ["scale_attn", "offset_attn", "scale_mlp", "offset_mlp"]),
        (
            ["residual=p_sphere", "residual.alpha=0.5", "residual.decay=harmonic"],
            ["alpha_attn", "p_attn", "alpha_mlp", "p_mlp"],
        ),
        (["residual=proj_sphere", "attention=qk_norm"], ["alpha_attn", "alpha_mlp", "q_gain", "k_gain"]),
        (["residual=ngpt"], ["alpha_attn", "alpha_mlp"]),
        ([], []),
    ],
)
def test_names_of_scales(overrides, names):
    model = GPT(gpt_config(compose([*SIZES, *overrides])))
    found = scale_statistics(model.scales())
    assert list(found) == names and all(len(v["mean"]) == 2 for v in found.values())
    if "p_attn" in found:  # before the decay with depth
        assert [*found["alpha_attn"]["mean"], *found["p_mlp"]["mean"]] == pytest.approx([0.5, 0.5, 2.0, 2.0])
        assert found["p_mlp"]["deviation"] == [0.0, 0.0]
    if "scale_attn" in found:
        assert found["scale_attn"]["mean"] == [1.0, 1.0]


# ---- unit vectors ----


@pytest.mark.parametrize("assignment", ["adamw", "unconstrained"])
def test_every_vector_of_embedding_space_has_unit_length_after_every_step(assignment):
    model, optimizers = build(f"assignment={assignment}")
    before = model.lm_head.weight.detach().clone()
    assert gap_to_unit_length(model) < 1e-6
    for step in range(4):
        advance(model, optimizers, [step])
        assert gap_to_unit_length(model) < 1e-6
    assert (model.lm_head.weight - before).norm() > 0.1


def test_unit_norm_leaves_zero_and_the_other_dimension_alone():
    W = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    UnitNorm([(W, 1)])
    assert torch.equal(W, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_a_resumed_run_is_bitwise_the_same_and_still_unit(tiny, tmp_path):
    common = [*tiny[:-1], "model=ngpt_demo", "schedule.warmup_steps=0"]
    train(compose([*common, f"output_dir={tmp_path}/straight"]))
    halfway = compose([*common, f"output_dir={tmp_path}/stopped"])
    train(replace(halfway, max_steps=10, schedule=replace(halfway.schedule, decay_steps=20)))
    train(compose([*common, f"output_dir={tmp_path}/stopped", "resume=auto"]))
    straight, stopped = (
        checkpoint.load_newest(tmp_path / d / "checkpoints").state["model"] for d in ("straight", "stopped")
    )
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    records = [list(read_records(tmp_path / d, "scales")) for d in ("straight", "stopped")]
    assert records[0] == records[1] and [r["step"] for r in records[0][::5]] == [0, 5, 10, 15, 20]
    model = GPT(gpt_config(halfway))
    model.load_state_dict(stopped)
    assert gap_to_unit_length(model) < 1e-6


def work(folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    model, optimizers = build("assignment=unconstrained")
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(3):
        x = torch.randint(40, (4, 13), generator=torch.Generator().manual_seed(step))[rank::world]
        parallel(x[:, :-1], x[:, 1:])[1].backward()
        optimizers.step()
        optimizers.zero_grad()
        assert gap_to_unit_length(model) < 1e-6
    torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")
    leave_group()


def test_two_ranks_hold_the_same_unit_vectors(tmp_path):
    assert finish(start_ranks(2, work, str(tmp_path))) == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone, optimizers = build("assignment=unconstrained")
    advance(alone, optimizers, range(3))
    for name, value in alone.state_dict().items():
        assert torch.allclose(value, first[name], atol=2e-3), name


# ---- one owner ----


@pytest.mark.parametrize("manifold", ["stiefel", "dgram"])
def test_two_owners_of_one_matrix_are_refused(tiny, manifold):
    rules = f"assignment.rules={{attn: {manifold}, mlp: adamw}}"
    with pytest.raises(ConfigError) as caught:
        check(compose([*tiny, "model=ngpt_demo", "assignment=custom", rules]))
    [problem] = caught.value.problems
    assert (
        "would have two owners" in problem
        and "choose adamw, euclidean, oblique, or model.unit_weights=false" in problem
    )
    check(
        compose([*tiny, "residual=ngpt", "assignment=all_stiefel"])
    )  # nGPT's stream alone has no quarrel with a manifold


def test_oblique_is_expressed_once():
    """The manifold keeps its matrices, along the columns of their tall form; the rest are kept as nGPT has them."""
    model, optimizers = build("assignment=custom", "assignment.rules={attn: adamw, mlp: oblique}")
    advance(model, optimizers, range(3))
    others = {name for name in model.unit_vectors() if ".mlp." not in name}
    assert gap_to_unit_length(model, others) < 1e-6
    for block in model.transformer.h:
        for W in (block.mlp.c_fc.weight, block.mlp.c_proj.weight):
            columns = W if W.size(0) > W.size(1) else W.T
            assert torch.allclose(columns.norm(dim=0), torch.ones(16), atol=1e-6)
    table = parameter_table(optimizers.rows)
    assert [line.split()[-1] for line in table.splitlines() if ".mlp.c_fc" in line] == ["oblique"]
    assert any(line.endswith("unit columns") for line in table.splitlines() if ".attn.c_proj" in line)


def test_a_new_manifold_is_taken_for_another_owner():
    with pytest.raises(AssignmentError, match="two owners"):
        assign({"h.0.attn.w": (4, 4)}, {"attn": "dgram"}, [], {"h.0.attn.w": 1})


# ---- learning rates by group, and νGPT ----


def test_learning_rates_by_group():
    shapes = {"a.wte.weight": (4, 2), "a.mlp.c_fc.weight": (2, 2), "a.ln": (2,)}
    rows = assign(shapes, {"mlp": "adamw"}, ["wte"])
    adamw = AdamW(
        lr=0.1, betas=(0.9, 0.95), eps=1e-8, fused="always", weight_decay=0.3, lr_scale={"wte|ln": 2, "c_*": 0.5}
    )
    assert adamw_groups(rows, adamw) == [
        (["a.wte.weight"], {"weight_decay": 0.3, "lr": 0.2}),
        (["a.mlp.c_fc.weight"], {"weight_decay": 0.3, "lr": 0.05}),
        (["a.ln"], {"weight_decay": 0.0, "lr": 0.2}),
    ]
    with pytest.raises(AssignmentError, match="pattern 'wpe' matches no matrix or vector"):
        adamw_groups(rows, replace(adamw, lr_scale={"wpe": 2}))
    _, optimizers = build("optim.adamw.lr_scale={lm_head: 0.5}")
    optimizers.set_lr(0.1)
    [adamw] = optimizers
    assert sorted({g["lr"] for g in adamw.param_groups}) == pytest.approx([0.001, 0.002])


NU = ["experiment=nugpt_demo", "model.n_head=4"]


def test_nugpt_at_the_base_is_ngpt_but_for_the_listed_differences():
    nu, n = compose([*NU, "optim.adamw.lr=0.01"]), compose(["experiment=ngpt_demo", "optim.adamw.lr=0.01"])
    logits = []
    for cfg in (nu, n):
        torch.manual_seed(0)
        logits.append(GPT(gpt_config(cfg))(torch.arange(16)[None])[0])
    assert torch.allclose(*logits, atol=1e-6)
    ours, n = transferred(nu).plain(), n.plain()
    assert (ours.pop("grad_clip"), n.pop("grad_clip")) == (None, 1.0)
    assert (ours["schedule"].pop("floor"), n["schedule"].pop("floor")) == (0.1, 0.0)
    adamw, plain = ours["optim"]["adamw"], n["optim"]["adamw"]
    assert (adamw.pop("eps"), plain.pop("eps")) == (1e-16, 1e-8)
    assert (
        adamw.pop("lr_scale") == {"wte": 1.0, "c_attn|c_fc|c_proj": 1.0, "lm_head": 0.5}
        and plain.pop("lr_scale") is None
    )
    for section in ("model", "residual"):
        assert (ours[section].pop("storage"), n[section].pop("storage")) == (0.03, None)
    del ours["transfer"], n["transfer"]
    assert ours == n


def test_nugpt_multipliers():
    """Twice as wide, four times as deep, eight times as long: the paper's exponents by hand."""
    cfg = compose(
        [*NU, "model.n_embd=256", "model.n_head=8", "model.n_layer=16", "max_steps=1600", "optim.adamw.lr=0.01"]
    )
    after = {change.key.rpartition(".")[2]: change.after for change in changes(cfg)}
    assert after["lr"] == pytest.approx(0.01 / 2)
    assert after["wte"] == pytest.approx(0.005 / 2**0.5)
    assert after["c_attn|c_fc|c_proj"] == pytest.approx(0.005 / 2**0.75)
    assert after["lm_head"] == pytest.approx(0.0025 / 2**0.75)
    assert after["alpha"] == pytest.approx(0.0125) and after["logit_scale"] == pytest.approx(2**0.5)
    table = transfer_table(cfg).splitlines()
    assert len(table) == 9 and "m_depth^-1, m_depth = 4" in table[5]
    assert table[2].split()[:4] == ["input", "embedding", "0.01", "0.003536"]
    untouched = copy.deepcopy(cfg)
    model = GPT(gpt_config(cfg))
    optimizers = build_optimizers(model, transferred(cfg), model.unit_vectors())
    assert cfg == untouched
    rates = {id(p): g["lr"] for o in optimizers for g in o.param_groups for p in g["params"]}
    named = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert named["transformer.wte.weight"] == pytest.approx(after["wte"])
    assert named["transformer.h.3.mlp.c_fc.weight"] == pytest.approx(after["c_attn|c_fc|c_proj"])
    assert named["lm_head.weight"] == pytest.approx(after["lm_head"])
    assert all(
        named[n] == pytest.approx(0.005)
        for n in named
        if n.endswith(("alpha.weight", "s_qk.weight", "s_uv.weight", "s_z.weight"))
    )
    assert torch.allclose(model.s_z(), torch.tensor(2**0.5)) and torch.allclose(model.s_z.weight, torch.tensor(0.03))
    alpha = model.transformer.h[0].ln_1.alpha
    assert torch.allclose(alpha(), torch.tensor(0.0125)) and torch.allclose(alpha.weight, torch.tensor(0.03))


def test_a_factor_of_the_user_multiplies_that_of_the_transfer():
    wider = [*NU, "model.n_embd=256", "model.n_head=8"]
    plain, halved = (compose([*wider, *own]) for own in ([], ["optim.adamw.lr_scale={wte: 0.5, s_qk: 2}"]))
    check(halved)
    rates = [transferred(cfg).optim.adamw.lr_scale for cfg in (plain, halved)]
    assert rates[1] == pytest.approx({**rates[0], "wte": 0.5 * rates[0]["wte"], "s_qk": 2})
    [before, after] = (next(c.after for c in changes(cfg) if c.group == "input embedding") for cfg in (plain, halved))
    assert after == pytest.approx(before / 2)
    with pytest.raises(ConfigError, match="c_attn"):
        check(compose([*wider, "optim.adamw.lr_scale={c_attn: 2}"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=demo", "residual=pre_norm"], "choose such a model"),
        (["assignment=unconstrained"], "measured for Adam"),
        (["model.n_embd=256"], "choose model.n_head=8"),
        (["model.n_embd=144"], "choose a model.n_embd that is a multiple of 32"),
        (["model.bias=true"], "has no rates for biases"),
        (["optim.adamw.lr=0"], "which is 0; give a number above 0"),
        (["transfer.rule=mup"], "choose none or nu"),
    ],
)
def test_transfer_is_refused_where_it_was_not_measured(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(compose([*NU, *overrides]))


def test_unit_norm_changes_nothing_after_a_refused_update():
    W = torch.randn(5, 3)
    keep = UnitNorm([(W, 1)])
    W.mul_(2)
    before = W.clone()
    keep(torch.tensor(True))
    assert torch.equal(W, before)
    keep(torch.tensor(False))
    assert torch.allclose(W.norm(dim=1), torch.ones(5))


def test_s_uv_multiplies_what_the_non_linearity_is_given_bias_and_all():
    mlp = MLP(GPTConfig(n_embd=16, unit_weights=True, bias=True))
    torch.nn.init.normal_(mlp.c_fc.bias)
    x = torch.randn(3, 16)
    assert torch.allclose(mlp.hidden(x), mlp.s_uv() * mlp.c_fc(x), atol=1e-6)
