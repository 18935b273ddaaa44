"""Probes: every measure against a case with a known answer, and no trace in the training numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CLOCK, ROOT
from device_checks import LOW_PRECISION, low_precision_products, require_low_precision

from model.attention import causal_logits
from model.collapse import (
    ambiguous_dimensions,
    depth,
    mixing_dimensions,
    null_space,
    recovery,
    singular_values,
)
from model.gpt import GPT, GPTConfig
from model.probes import (
    explicit_attention,
    head_mixing,
    logit_statistics,
    probe,
    probe_summary,
    product_norm,
    qk_norms,
    row_statistics,
)
from model.spectra import Spectra
from optim.linalg import effective_rank
from scripts import probe as command
from scripts.analysis.runs import read_run
from train import train
from training.config import compose
from training.log import read_records

TINY = GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def causal(p):
    """Rows of probability over the allowed positions only."""
    p = p.tril()
    return p / p.sum(-1, keepdim=True)


# ---- attention ----


@pytest.mark.parametrize(
    "switches",
    [{}, {"qk_norm": True}, {"head_gate": "token"}, {"qk_clip": 1.0}, {"logit_cap": 0.1}, {"scale": 2.0}],
    ids=str,
)
@torch.no_grad()
def test_the_explicit_path_is_the_fused_one(switches):
    model = GPT(GPTConfig(**{**vars(TINY), "n_embd": 32, **switches})).eval()
    attn, x = model.transformer.h[0].attn, 3 * torch.randn(3, 16, 32)
    if attn.head_gate is not None:
        attn.head_gate.weight.normal_()
    heads = explicit_attention(attn, x)[2]
    assert (attn.c_proj(heads.flatten(1)).view(3, 16, 32) - attn(x)).abs().max() < 1e-5
    q, k, v = attn.heads(x)
    explicit = torch.softmax(causal_logits(q, k), -1) @ v
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (explicit - fused).abs().max() < 1e-5


def test_the_summary_takes_the_extremes_of_heads_and_of_layers():
    heads = {name: torch.tensor([[0.25, 0.5], [0.125, 0.875]]) for name in ("entropy", "saturated", "recovery")}
    heads |= {"logit_max": torch.tensor([[1.0, 2.0]]), "qk_product_norm": torch.tensor([[3.0, 4.0]])}
    assert probe_summary({**heads, "qk_norm_product": torch.tensor([[9.0, 9.0]])}) == {
        "largest_logit": 2,
        "largest_qk_norm": 4,
        "least_entropy": 0.375,
        "least_head_entropy": 0.125,
        "greatest_saturation": 0.5,
        "greatest_head_saturation": 0.875,
        "least_recovery": 0.125,
    }


def test_a_probe_ignores_the_precision_of_other_products():
    require_low_precision("cpu")
    model, x = GPT(GPTConfig(**{**vars(TINY), "n_embd": 64})).eval(), torch.randint(40, (4, 16))
    expected = probe(model, x)
    for lower in LOW_PRECISION.values():
        with low_precision_products(lower):
            assert probe(model, x) == expected


def test_uniform_and_one_hot_attention():
    T = 12
    uniform = row_statistics(causal(torch.ones(2, 3, T, T)))
    assert torch.allclose(uniform["entropy"], torch.ones(3)) and not uniform["saturated"].any()
    # The Jacobian of a uniform row of n is (I - 11ᵀ/n)/n, of Frobenius norm √(n - 1)/n.
    expected = sum(math.sqrt(n - 1) / n for n in range(2, T + 1)) / (T - 1)
    assert uniform["jacobian"].tolist() == pytest.approx([expected] * 3, rel=1e-5)
    one_hot = row_statistics(torch.eye(T).expand(2, 3, T, T))
    assert one_hot["entropy"].abs().max() == 0 and one_hot["jacobian"].abs().max() == 0
    assert one_hot["saturated"].tolist() == [1.0] * 3


def test_the_jacobian_norm_is_that_of_the_derivative():
    p = causal(torch.rand(1, 1, 6, 6))
    norms = [torch.linalg.matrix_norm(torch.diag(r) - torch.outer(r, r)) for r in p[0, 0, 1:]]
    assert row_statistics(p)["jacobian"].item() == pytest.approx(sum(norms).item() / 5, rel=1e-5)


def test_saturation_counts_the_rows_above_99_per_cent():
    p = torch.eye(5).repeat(1, 1, 1, 1)
    p[0, 0, 2] = torch.tensor([0.0, 0.02, 0.98, 0, 0])
    assert row_statistics(p)["saturated"].item() == pytest.approx(
        3 / 4
    )  # the first row has no choice and does not count


def test_largest_and_high_percentile_logit():
    z = causal_logits(torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 8))
    seen = logit_statistics(z)
    for head in range(3):
        values = z[:, head][torch.isfinite(z[:, head])]
        assert len(values) == 2 * 40 * 41 // 2
        assert seen["logit_max"][head] == values.max()
        assert (values >= seen["logit_p999"][head]).sum() == math.ceil(1e-3 * len(values))


def test_norms_of_the_weights_behind_the_logits():
    c_attn = torch.randn(3, 3 * 12, 12)
    seen = qk_norms(c_attn, n_head=3)
    for layer in range(3):
        q, k, _ = c_attn[layer].double().view(3, 3, 4, 12)
        for head in range(3):
            product = torch.linalg.matrix_norm(q[head].T @ k[head], 2).item()
            separate = torch.linalg.matrix_norm(q[head], 2) * torch.linalg.matrix_norm(k[head], 2)
            assert seen["qk_product_norm"][layer, head].item() == pytest.approx(product, rel=1e-3)
            assert seen["qk_norm_product"][layer, head].item() == pytest.approx(separate.item(), rel=1e-3)


def test_the_norm_is_right_where_the_gap_is_small_or_the_rank_is_low():
    U = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    for sigma in ([1, 0.999, 0.5, 0.1, 0, 0], [3, 0, 0, 0, 0, 0], [2, 2, 2, 2, 2, 2], [0] * 6):
        A = U * torch.tensor(sigma, dtype=torch.float64)  # A Aᵀ has eigenvalues σ²
        assert product_norm(A @ A.T, torch.eye(6, dtype=torch.float64)).item() == pytest.approx(max(sigma), rel=1e-3)


# ---- collapse ----


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_planted_rank(rank):
    U, V = (torch.linalg.qr(torch.randn(n, rank)).Q for n in (20, 30))
    X = (U @ V.T).expand(2, -1, -1)
    assert effective_rank(singular_values(X)[..., :rank]).tolist() == pytest.approx([rank] * 2, rel=1e-6)
    seen = depth(X)
    assert seen["effective_rank"].item() == pytest.approx(rank, rel=1e-3)
    assert seen["width_rank"].item() == pytest.approx(rank / 20)
    assert depth(1e-4 * X)["width_rank"].item() == pytest.approx(rank / 20)


def test_a_direction_is_used_from_a_thousandth_of_the_largest_on():
    X = torch.zeros(1, 4, 8)
    X[0].fill_diagonal_(1.0)
    X[0] *= torch.tensor([1.0, 0.5, 2e-3, 5e-4])[:, None]
    assert depth(X)["width_rank"].item() == pytest.approx(3 / 4)


def test_the_rank_of_many_tokens_is_that_of_tokens_spread_over_all():
    X = torch.eye(2).repeat_interleave(200, 0)[None]  # the second half of 400 tokens differs from the first
    assert depth(X)["effective_rank"].item() == pytest.approx(2, rel=1e-2)


def test_tokens_that_are_all_the_same_and_tokens_that_share_nothing():
    same = depth(torch.randn(3, 1, 16).expand(-1, 10, -1))
    assert same["distance_from_mean"].item() == pytest.approx(0, abs=1e-6)
    assert same["mean_cosine"].item() == pytest.approx(1) and same["effective_rank"].item() == pytest.approx(
        1, rel=1e-3
    )
    apart = depth(torch.eye(16)[None, :10])
    assert apart["mean_cosine"].item() == pytest.approx(0, abs=1e-6)
    assert apart["distance_from_mean"].item() == pytest.approx(math.sqrt(1 - 1 / 10))
    assert apart["effective_rank"].item() == pytest.approx(10) and apart["width_rank"].item() == 1


def test_singular_values_through_the_gram_matrix():
    X = torch.randn(2, 7, 11, dtype=torch.float64)
    assert torch.allclose(singular_values(X), torch.linalg.svdvals(X))
    X[0, 0, 0] = torch.inf
    assert singular_values(X)[0].isnan().all() and torch.allclose(singular_values(X)[1], torch.linalg.svdvals(X[1]))


def test_orthogonal_heads_are_recovered_and_confounded_heads_are_not():
    heads, w = torch.randn(600, 3, 4), 4
    orthogonal = torch.linalg.qr(torch.randn(12, 12)).Q
    assert recovery(heads, orthogonal).min() > 0.999
    confounded = orthogonal.clone()
    confounded[:, w : 2 * w] = confounded[:, :w]  # the second head writes where the first does: only their sum is left
    first, second, third = recovery(heads, confounded).tolist()
    assert first == pytest.approx(0.5, abs=0.1) and second == pytest.approx(0.5, abs=0.1) and third > 0.999
    assert recovery(heads + 100, confounded).tolist() == pytest.approx([first, second, third], abs=1e-3)  # variance
    faint = recovery(torch.randn(4000, 2, 1), torch.tensor([1.0, 0.01]).diag())
    assert faint.tolist() == pytest.approx([1, 8 / 9], abs=0.02)  # read with an error of one per cent
    silent = orthogonal.clone()
    silent[:, :w] = 0
    assert recovery(heads, silent)[0] < 0.1


def test_null_space_of_the_output_projection():
    W = torch.randn(12, 12)
    assert null_space(W) == 0
    W[:, 4:8] = W[:, :4]
    assert null_space(W) == null_space(1e-6 * W) == 4 and null_space(1e-9 * torch.eye(3)) == 0
    assert ambiguous_dimensions(tokens=128, n_head=12, width=64) == 128 * 11 * 64


def mixed(heads, W_o, seed, size=1e-3):
    """The heads (N, H, w) and the projection after a random mixing near 1."""
    N, H, w = heads.shape
    generator = torch.Generator().manual_seed(seed)
    M = torch.eye(H * w, dtype=torch.float64) + size * torch.randn(
        H * w, H * w, generator=generator, dtype=torch.float64
    )
    return (heads.flatten(1) @ M.mT).view(N, H, w), W_o @ torch.linalg.inv(M)


@pytest.mark.parametrize(("tokens", "rank"), [(40, None), (7, None), (40, 5)])
def test_mixings_keep_the_sum_and_change_a_head_in_as_many_dimensions_as_are_counted(tokens, rank):
    H, w = 3, 2
    heads = torch.randn(tokens, H, w, dtype=torch.float64)
    if rank is not None:  # heads that repeat each other
        flat = heads.flatten(1)
        heads = (flat[:, :rank] @ torch.randn(rank, H * w, dtype=torch.float64)).view(tokens, H, w)
    W_o = torch.randn(6, H * w, dtype=torch.float64)
    counted = mixing_dimensions(heads)
    for h in range(H):
        U = torch.linalg.qr(heads[:, h]).Q
        changes = []
        for seed in range(60):
            others, W = mixed(heads, W_o, seed)
            assert torch.allclose(others.flatten(1) @ W.mT, heads.flatten(1) @ W_o.mT)
            change = others[:, h] - heads[:, h]
            changes.append((change - U @ (U.mT @ change)).flatten())  # but for a new name of its own channels
        assert torch.linalg.matrix_rank(torch.stack(changes), rtol=1e-9) == counted[h]
    assert counted.tolist() == [w * (min(tokens, rank or H * w) - w)] * H


def test_a_head_alone_cannot_be_mixed():
    assert mixing_dimensions(torch.randn(20, 1, 4)).tolist() == [0]
    torch.manual_seed(0)
    nearly = torch.randn(40, 2, 2, dtype=torch.float64)
    nearly[:, 1] = nearly[:, 0] @ torch.randn(2, 2, dtype=torch.float64) + 1e-5 * nearly[:, 1]
    assert mixing_dimensions(nearly).tolist() == [0, 0], (
        "what is left after a projection counts relative to what was there before"
    )


def test_the_mixing_of_a_model_is_measured_on_its_heads():
    model, x = GPT(TINY), torch.randint(40, (2, 16))
    seen, first = head_mixing(model, x), model.transformer.h[0]
    with torch.no_grad():
        heads = explicit_attention(first.attn, F.layer_norm(model.embed(x), (16,), first.ln_1.weight))[2]
    assert seen.shape == (2, 2) and torch.equal(seen[0], mixing_dimensions(heads))
    assert (seen > 0).all() and (seen <= 8 * 8).all()  # w = 8, and the other head has at most 8 directions


@pytest.mark.parametrize(
    ("kind", "width", "tokens", "said"), [("position", 768, 1024, True), ("token", 768, 1024, False)]
)
def test_gates_larger_than_the_paper_states_say_so(kind, width, tokens, said):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=1, n_head=12, n_embd=width, block_size=tokens, head_gate=kind))
    assert ("which arXiv 2604.23681 states to be below 1.6%" in model.describe()) == said
    assert ("2.08% of W_O" if said else "1.56% of W_O") in model.describe()


# ---- the probe ----


def test_a_probe_leaves_no_trace():
    model = GPT(GPTConfig(**{**vars(TINY), "dropout": 0.5, "qk_clip": 0.1}))
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    largest = model.transformer.h[0].attn.qk_clip.largest.clone()
    x = torch.randint(40, (2, 16))
    rng = torch.get_rng_state()
    first = probe(model, x)
    assert model.training and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.transformer.h[0].attn.qk_clip.largest, largest)
    assert all(p.grad is None for p in model.parameters()) and probe(model, x) == first
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_record_has_every_layer_and_head_and_sums_itself_up():
    model = GPT(TINY)
    seen = probe(model, torch.randint(40, (2, 16)))
    for key in (
        "logit_max",
        "logit_p999",
        "entropy",
        "saturated",
        "jacobian",
        "qk_norm_product",
        "qk_product_norm",
        "recovery",
    ):
        assert len(seen[key]) == 2 and all(len(layer) == 2 for layer in seen[key]), key
    for key in ("distance_from_mean", "mean_cosine", "effective_rank", "width_rank"):
        assert len(seen[key]) == 3, key
    assert seen["largest_logit"] == max(map(max, seen["logit_max"]))
    assert seen["least_head_entropy"] == min(map(min, seen["entropy"]))
    assert seen["least_entropy"] == pytest.approx(min(sum(layer) / 2 for layer in seen["entropy"]), rel=1e-5)


def test_a_saturated_model_is_seen_as_one():
    model = GPT(TINY)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:32] *= 100
    seen = probe(model, torch.randint(40, (2, 16)))
    assert seen["greatest_saturation"] > 0.5 and seen["least_entropy"] < 0.2 and seen["largest_logit"] > 50


def test_a_model_that_overflows_is_probed_and_says_so():
    model = GPT(TINY)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.fill_(torch.inf)
    seen = probe(model, torch.randint(40, (2, 16)))
    assert math.isnan(seen["largest_logit"]) and not math.isnan(seen["logit_max"][0][0])


# ---- in training ----


def numbers(directory):
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in read_records(directory) if r["kind"] != "probe"]


def test_training_is_bitwise_the_same_with_and_without_probes(tiny, tmp_path):
    for interval in ("null", 3):
        where = f"output_dir={tmp_path}/{interval}"
        train(
            compose(
                [
                    *tiny[:-1],
                    "assignment=adamw",
                    "model.dropout=0.1",
                    where,
                    f"probe.interval={interval}",
                    "max_steps=10",
                ]
            )
        )
    assert numbers(tmp_path / "null") == numbers(tmp_path / "3")
    assert not list(read_records(tmp_path / "null", "probe"))
    assert [r["step"] for r in read_records(tmp_path / "3", "probe")] == [0, 3, 6, 9, 10]


def test_the_command_prints_a_table_a_checkpoint_and_draws(tiny, tmp_path, capsys):
    train(compose([*tiny, "assignment=adamw", "max_steps=10", "probe.interval=5", "checkpoint.keep=5"]))
    assert command.main([str(tmp_path / "run"), f"figures={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("mixable") == 4 and "are free" not in printed
    assert printed.count("eff. rank") == 2 and "step 5:" in printed and "step 10:" in printed
    assert printed.count("turn mlp") == 2 and printed.count("radians together") == 2
    assert (tmp_path / "probes.png").stat().st_size > 1000
    assert command.main([str(tmp_path / "run"), "windows=999"]) == 0
    assert capsys.readouterr().out.count("the validation split has no more than") == 2
    assert command.main([str(ROOT / "configs")]) == 2 and "no checkpoint" in capsys.readouterr().err
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.read_text().splitlines(True) if '"kind": "probe"' not in line))
    assert command.main([str(tmp_path / "run"), f"figures={tmp_path}"]) == 2
    said = capsys.readouterr()
    assert "has no probes to draw" in said.err and not said.out


def test_a_run_tells_its_least_entropy_and_greatest_saturation(tiny, tmp_path):
    train(compose([*tiny, "assignment=adamw", "max_steps=10", "probe.interval=5"]))
    run = read_run(tmp_path / "run")
    seen = list(read_records(tmp_path / "run", "probe"))
    assert run.least_entropy == min(r["least_entropy"] for r in seen)
    assert run.greatest_saturation == max(r["greatest_saturation"] for r in seen)


def test_a_run_that_keeps_documents_apart_is_refused(tiny, tmp_path, capsys):
    train(compose([*tiny, "assignment=adamw", "max_steps=2", "probe.interval=null", "batches.documents=true"]))
    capsys.readouterr()
    assert command.main([str(tmp_path / "run")]) == 2 and "batches.documents=true" in capsys.readouterr().err


def test_the_spectrum_of_zero():
    [(_, record)] = Spectra({"zero": (torch.zeros(4, 3), None, 1)}).records()
    assert record["off_diagonal"] == 0 and record["sigma"] == [0, 0, 0]


def test_a_spectrum_is_that_of_the_matrix_of_its_name():
    matrices = {"a": torch.randn(24, 9), "b": torch.randn(9, 24), "c": torch.randn(24, 9)}
    found = dict(Spectra({name: (W, None, 1) for name, W in matrices.items()}).records())
    for name, W in matrices.items():
        tall = (W if W.size(0) > W.size(1) else W.T).double()
        gram = tall.T @ tall
        off = gram - torch.diag(gram.diagonal())
        assert found[name]["sigma"] == pytest.approx(torch.linalg.svdvals(tall).tolist(), rel=1e-5)
        assert found[name]["gram_diagonal"] == pytest.approx(gram.diagonal().tolist(), rel=1e-5)
        assert found[name]["off_diagonal"] == pytest.approx((off.norm() / gram.norm()).item(), rel=1e-5)
