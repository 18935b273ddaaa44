"""The claims of arXiv 2604.23681 (Cirrincione) about collapse, each on a model that is built for it, and where a claim has limits.

We have read the paper's abstract, not its proofs. So each test states what is true here; a docstring says where the plain reading is not.
All numbers are float64. Tokens are rows; n tokens of width d are X (n, d).
"""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from data.loader import validation_windows
from data.shards import Split
from model.collapse import ambiguous_dimensions, mixing_dimensions, null_space, outside_span
from model.gpt import GPT, GPTConfig
from model.probes import head_mixing, new_directions
from scripts.analysis import collapses
from scripts.analysis.runs import RecordedRun
from scripts.probe import layer_table
from training.config import compose
from training.settings import settings_of

N, D = 10, 16


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rank(X):
    """The matrix rank: the dimension of the linear span of the rows."""
    return torch.linalg.matrix_rank(X, rtol=1e-9).item()


def affine_rank(X):
    """The dimension of the smallest flat that holds all rows."""
    return rank(X - X.mean(0))


def centred(X):
    """Each token without its mean over the channels, as LayerNorm begins."""
    return X - X.mean(1, keepdim=True)


@torch.no_grad()
def layer_norm(X, gain=True, bias=False, eps=1e-5):
    """A LayerNorm with random gains, none zero, and with random biases if asked."""
    norm = nn.LayerNorm(X.size(1), eps, elementwise_affine=gain, bias=bias)
    if gain:
        norm.weight.copy_(torch.rand(X.size(1)) + 0.5)
    if bias:
        norm.bias.copy_(torch.randn(X.size(1)))
    return norm(X)


# ---- LayerNorm and rank ----


@pytest.mark.parametrize("gain", [False, True])
def test_without_bias_layer_norm_keeps_the_matrix_rank_of_the_centred_tokens(gain):
    """LN(X) = S·X·C·diag(gain): S > 0 scales rows, C removes the mean over channels. S and the gain are invertible; C removes the direction
    of ones. So the rank of XC is kept exactly, and that of X too, unless X spans the direction of ones: then one is lost."""
    for r in (1, 3, D - 1):
        X = torch.randn(N + D, r) @ torch.randn(r, D)
        assert rank(layer_norm(X, gain)) == rank(centred(X)) == rank(X) == r
    everything = torch.randn(N + D, D)
    assert rank(everything) == D and rank(layer_norm(everything, gain)) == rank(centred(everything)) == D - 1


def test_a_bias_changes_the_matrix_rank_and_never_the_affine_rank():
    X = torch.randn(N, 3) @ torch.randn(3, D)
    without, with_bias = ((torch.manual_seed(1), layer_norm(X, bias=bias))[1] for bias in (False, True))
    assert (rank(without), rank(with_bias)) == (3, 4)
    assert affine_rank(without) == affine_rank(with_bias) == 3


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_keeps_the_affine_rank_of_independent_tokens(bias):
    """The usual case of n < d, such as 512 tokens of BERT-base: n independent tokens have affine rank n - 1, before and after."""
    X = torch.randn(N, D)
    assert affine_rank(X) == affine_rank(layer_norm(X, bias=bias)) == N - 1


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_keeps_the_affine_rank_of_tokens_of_equal_spread(bias):
    """If all tokens have one standard deviation, LayerNorm is one affine map, and injective but for the direction of ones."""
    axes = torch.linalg.qr(centred(torch.randn(4, D)).T).Q.T  # four orthonormal directions without a mean
    angle = torch.rand(N) * 2 * math.pi
    X = 2 * axes[0] + angle.cos()[:, None] * axes[1] + angle.sin()[:, None] * axes[2]  # a circle beside the origin
    assert (rank(X), affine_rank(X), affine_rank(layer_norm(X, bias=bias))) == (3, 2, 2)


def test_in_general_layer_norm_can_change_the_affine_rank_by_one():
    """The plain reading, "LayerNorm keeps the affine rank of every set of tokens", is false, because each token is scaled by itself: points
    of a line beside the origin land on an arc, and two points of a ray land on one. As the matrix rank r of the centred tokens is kept, and an
    affine rank is r or r - 1, it never changes by more than one."""
    p, e = centred(torch.randn(2, D))
    line = p + torch.randn(N, 1) * e
    assert (affine_rank(line), affine_rank(layer_norm(line))) == (1, 2)
    ray = torch.stack([p, 3 * p, e])
    assert (affine_rank(ray), affine_rank(layer_norm(ray, eps=0.0))) == (2, 1)
    for r, n in itertools.product((1, 2, 5), (3, 6, 12)):
        X = centred(torch.randn(1, D) + torch.randn(n, r) @ torch.randn(r, D))
        assert abs(affine_rank(layer_norm(X)) - affine_rank(X)) <= 1


# ---- rank over depth ----


def model(layers=1, heads=2, scale=0.3, **settings):
    """A GPT in eval mode whose matrices are N(0, scale²), large enough for attention that is far from uniform."""
    made = GPT(GPTConfig(block_size=N, vocab_size=40, n_layer=layers, n_head=heads, n_embd=D, **settings)).eval()
    for name, p in made.named_parameters():
        if ".h." in name and p.ndim == 2:
            nn.init.normal_(p, std=scale)
    return made


def distance(X):
    """‖X - 1x̄ᵀ‖/‖X‖ of X (1, n, d)."""
    return (torch.linalg.matrix_norm(X - X.mean(1, keepdim=True)) / torch.linalg.matrix_norm(X)).item()


@torch.no_grad()
def through(made, X, causal):
    """The distances of X (1, n, d), and after each block."""
    found, mask = [distance(X)], None if causal else torch.ones(1, 1, N, N, dtype=torch.bool)
    for block in made.transformer.h:
        X = block(X, None, mask)
        found.append(distance(X))
    return found


@pytest.mark.parametrize(
    ("skips", "mlp", "causal", "order"),
    [
        (False, "none", False, 3),  # the regime of Dong et al.
        (False, "gelu", False, 3),
        (False, "none", True, 1),
        (True, "none", False, 1),
        (True, "gelu", False, 1),
        (True, "none", True, 1),
    ],
)
def test_a_block_maps_the_distance_to_its_cube_without_skips_and_without_a_mask(skips, mlp, causal, order):
    """Dong et al. (arXiv 2103.03404): attention maps tokens at distance r to a distance of order r³, so r falls doubly exponentially with
    depth. An MLP changes the factor, not the order; a skip makes the order 1. The causal mask does too: uniform causal attention already
    has rows that differ, so a causal model without skips loses its distances only exponentially. [our derivation]"""
    made, common, own = model(skips=skips, mlp=mlp), torch.randn(1, 1, D), torch.randn(1, N, D)
    near = [through(made, common + e * own, causal)[-1] for e in (1e-2, 1e-3)]
    assert math.log10(near[0] / near[1]) == pytest.approx(order, abs=0.1)


def depths(layers, causal, **settings):
    made = model(layers, **settings)
    for block in made.transformer.h[1:]:
        block.load_state_dict(made.transformer.h[0].state_dict())
    return [-math.log(r) for r in through(made, torch.randn(1, 1, D) + 0.5 * torch.randn(1, N, D), causal)]


def test_the_distance_falls_doubly_exponentially_without_skips_and_mlp():
    """log r triples from block to block; with the causal mask it grows by a constant; with skips it stays."""
    lost = [x for x in depths(6, False, skips=False, mlp="none", scale=0.25) if x < 32]  # nats; float64 has 36
    growth = [(c - b) / (b - a) for a, b, c in zip(lost, lost[1:], lost[2:])]
    assert len(growth) >= 1 and growth[-1] == pytest.approx(3, abs=0.6)
    slower = depths(12, True, skips=False, mlp="none", scale=0.25)
    steps = [b - a for a, b in itertools.pairwise(slower[4:])]
    assert max(steps) < 3 * min(steps) and slower[-1] > slower[4] + 2
    kept = depths(12, False, skips=True, mlp="none", scale=0.25)
    assert kept[-1] < 3


def test_skips_obstruct_collapse_for_all_of_many_random_weights():
    """ "Generically": for almost all weights. Without MLP, the affine rank stays n - 1 at every depth; without skips it ends at 0."""
    for seed, skips in itertools.product(range(10), (True, False)):
        torch.manual_seed(seed)
        made, X = model(6, skips=skips, mlp="none", scale=0.2), torch.randn(1, N, D)
        mask = torch.ones(1, 1, N, N, dtype=torch.bool)
        with torch.no_grad():
            for block in made.transformer.h:
                X = block(X, None, mask)
        deviation = torch.linalg.svdvals((X - X.mean(1, keepdim=True))[0]) / torch.linalg.matrix_norm(X)
        assert (deviation > 1e-6).sum() == (N - 1 if skips else 0)


def test_an_mlp_can_give_back_distances_that_are_nearly_lost():
    """An MLP that subtracts the common token: equal in six digits before, not at all after."""
    mlp = model().transformer.h[0].mlp
    assert mlp is not None
    common, own = torch.randn(1, 1, D), torch.randn(1, N, D)
    with torch.no_grad():
        first = torch.eye(4 * D, D)
        mlp.c_fc.weight.copy_(first)
        mlp.c_proj.weight.copy_(first.T)
        mlp.c_fc.bias = nn.Parameter(-first @ common[0, 0])
        assert distance(common + 1e-6 * own) < 1e-5 and distance(mlp(common + 1e-6 * own)) > 0.5


# ---- directions outside of the embeddings' span ----


@torch.no_grad()
def with_values(made, W):
    """The model with W_V = W and W_O = 1."""
    for block in made.transformer.h:
        block.attn.c_attn.weight[2 * D :] = W
        block.attn.c_proj.weight.copy_(torch.eye(D))
    return made


@torch.no_grad()
def outside(made, E):
    """The share of the stream outside the span of its start E (1, n, d), after all blocks."""
    X = E
    for block in made.transformer.h:
        X = block(X)
    return outside_span(X, E).item()


def test_attention_stays_in_the_span_only_with_values_that_do_not_turn():
    """The claim that no stack of attention layers leaves the span of the embeddings needs W_O·W_V to be a multiple of the identity, hence a
    single head: then each output is a combination of tokens. Any other W_V leaves the span, and so do two heads that attend differently,
    each of which writes its own channels. The embeddings have no mean over channels here: LayerNorm removes it, which may leave the span too."""
    E, turned = centred(torch.randn(1, 6, D)[0])[None], torch.randn(D, D) / 4
    for skips in (True, False):
        made = [model(3, heads, skips=skips, mlp="none") for heads in (1, 1, 2)]
        for m, W in zip(made, (torch.eye(D), turned, torch.eye(D))):
            with_values(m, W)
        still, other_values, two_heads = (outside(m, E) for m in made)
        assert still < 1e-12 and other_values > 0.05 and two_heads > 0.01, skips


@torch.no_grad()
def test_a_head_cannot_raise_the_matrix_rank_and_an_mlp_can():
    """What holds for any weights: a head maps tokens of matrix rank r to rank r or less, H heads to rank H·r or less; an MLP has no bound."""
    X = torch.randn(1, N, 2) @ torch.randn(2, D)
    for heads in (1, 2):
        assert rank(model(heads=heads).transformer.h[0].attn(X)[0]) == 2 * heads
    assert rank(model().transformer.h[0].mlp(X)[0]) == N


def test_the_share_outside_the_span():
    E = torch.randn(2, 5, D)
    assert outside_span(torch.randn(2, 7, 5) @ E, E) < 1e-12
    assert outside_span(torch.randn(20, 300, D), torch.randn(20, 4, D)).item() == pytest.approx(1 - 4 / D, abs=0.02)
    seen = new_directions(model(2).float(), torch.randint(40, (2, N)))
    assert len(seen) == 3 and seen[0] < 1e-6 < 0.05 < seen[1] < seen[2] < 1


# ---- the head channel ----

H, W = 3, 2


def unknown_map(W_o, gates, h):
    """The matrix from the outputs of the other heads (n·(H-1)·w) and from what head h writes (n·d), to the sum (n·d)."""
    blocks = []
    for g in gates:  # of one token
        others = [g[k] * W_o[:, k * W : (k + 1) * W] for k in range(H) if k != h]
        blocks.append(torch.cat([*others, torch.eye(len(W_o))], 1))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("gated", [False, True])
def test_what_one_head_writes_is_ambiguous_in_as_many_dimensions_as_the_paper_counts(gated):
    """n(H-1)·d_k, for any W_O: each change of the other heads is undone by what head h writes. A gate of each token and head, not zero, only
    scales these columns, so PG-OP changes nothing of this count. [our reading of the count]"""
    n, W_o = 7, torch.randn(6, H * W)
    gates = 2 * torch.sigmoid(torch.randn(n, H)) if gated else torch.ones(n, H)
    mlp = nn.Sequential(
        nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6)
    )  # after the sum: it sees the sum alone, so it repairs nothing
    for h in range(H):
        A = unknown_map(W_o, gates, h)
        _, sigma, V = torch.linalg.svd(A)
        hidden = V[(sigma > 1e-9 * sigma[0]).sum() :]
        assert len(hidden) == ambiguous_dimensions(n, H, W) == n * (H - 1) * W
        unknown, change = torch.randn(A.size(1)), torch.randn(len(hidden)) @ hidden
        sums, other = ((A @ x).view(n, 6) for x in (unknown, unknown + change))
        assert change.norm() > 1 and torch.allclose(other, sums, atol=1e-12)
        assert torch.allclose(mlp(other), mlp(sums), atol=1e-12)


def test_nothing_is_ambiguous_if_the_projection_is_known_and_invertible():
    """The count is not about a known W_O (d, H·d_k): if that is invertible, the sum gives every head. If all heads write into the same d_k
    directions, (H-1)·d_k dimensions of each token are hidden, which is the count again."""
    assert null_space(torch.randn(H * W, H * W)) == 0
    shared = torch.randn(6, W)
    assert (
        7 * null_space(shared.repeat(1, H) * torch.rand(1, H * W)) == 7 * (H - 1) * W == ambiguous_dimensions(7, H, W)
    )


def left_with_gates(o, gates):
    """By brute force, the dimensions of the changes of each head by a mixing M near 1, of which a change of W_O = 1 undoes the effect on all
    sums: K·G·o + G·δM·o = 0 for every token, unknown K and δM. Changes of a head within its own span do not count."""
    n, size = len(o), H * W
    flat, G = o.flatten(1), gates.repeat_interleave(W, 1)
    rows = torch.eye(size)
    of_K = torch.einsum("ab,nc->nabc", rows, G * flat)  # (n, size of the sum, size, size)
    of_M = torch.einsum("na,ab,nc->nabc", G, rows, flat)
    A = torch.cat([of_K.reshape(n * size, -1), of_M.reshape(n * size, -1)], 1)
    _, sigma, V = torch.linalg.svd(A)
    solutions = V[(sigma > 1e-9 * sigma[0]).sum() :, size * size :].view(-1, size, size)  # δM
    found = []
    for h in range(H):
        changes = torch.einsum("sab,nb->sna", solutions[:, h * W : (h + 1) * W], flat)
        U = torch.linalg.qr(o[:, h]).Q
        beyond = changes - torch.einsum("nu,mu,sma->sna", U, U, changes)
        found.append((torch.linalg.svdvals(beyond.flatten(1)) > 1e-9).sum().item())
    return found


def test_gates_that_are_known_take_the_mixing_of_heads_away():
    """With one W_O for all tokens, (H-1)·d_k² dimensions of a head are ambiguous. Known gates that differ between heads from token to token
    leave none of them; gates that are equal leave all; two heads that share a gate may still be mixed with each other. [our derivation]"""
    o, own = torch.randn(40, H, W), torch.rand(40, H) + 0.5
    all_left = [(H - 1) * W * W] * H
    shared = torch.stack([own[:, 0], own[:, 0], own[:, 2]], 1)
    cases = [(own[:, :1].expand(-1, H), all_left), (own, [0] * H), (shared, [W * W, W * W, 0])]
    for gates, expected in cases:
        assert mixing_dimensions(o, gates).tolist() == left_with_gates(o, gates) == expected
    assert mixing_dimensions(o).tolist() == all_left


@pytest.mark.parametrize("kind", ["token", "position"])
def test_the_gates_of_a_model_take_away_its_mixing_once_they_differ(kind):
    made, x = model(head_gate=kind).float(), torch.randint(40, (8, N))  # 80 tokens, more than 2·H·w = 32
    before = head_mixing(made, x)
    assert torch.equal(before, head_mixing(made, x, known_gates=True)) and (before > 0).all()  # gates start at 1
    assert "gates known" in layer_table(made, x)[0] and "gates known" not in layer_table(model().float(), x)[0]
    with torch.no_grad():
        made.transformer.h[0].attn.head_gate.weight.normal_()
    assert (head_mixing(made, x) > 0).all() and head_mixing(made, x, known_gates=True).tolist() == [[0, 0]]


def test_a_profile_tells_the_mask_and_training_apart(monkeypatch, tmp_path):
    """Uniform attention alone makes all tokens equal in one block without a mask; the first token of a window stays itself with one."""
    settings = {
        "block_size": 8,
        "vocab_size": 32,
        "n_layer": 2,
        "n_head": 1,
        "n_embd": D,
        "mlp": "none",
        "skips": False,
    }
    start, trained = GPT(GPTConfig(**settings)), GPT(GPTConfig(**{**settings, "skips": True}))
    with torch.no_grad():
        for block in start.transformer.h:
            block.attn.c_attn.weight[: 2 * D].zero_()  # queries and keys
    np.random.default_rng(0).integers(32, size=100).astype(np.uint16).tofile(tmp_path / "text")
    config, val = compose(["data=stdlib"]).plain(), Split(tmp_path, (SimpleNamespace(file="text", tokens=100),))
    config["model"] = {**config["model"], "block_size": 8}
    monkeypatch.setattr(collapses, "load_model", lambda directory: (trained, settings_of(config), None))
    monkeypatch.setattr(collapses, "open_data", lambda cfg: SimpleNamespace(val=val))
    monkeypatch.setattr(collapses, "initial", lambda cfg, seed: start)
    found = collapses.profile(RecordedRun(Path("nowhere"), config, {}, {}, {}))
    assert found["unmasked"][-1] < 1e-14 < 0.1 < found["initial"][-1]
    assert found["unmasked"][0] == found["initial"][0] != found["trained"][0]
    x = torch.from_numpy(validation_windows(val, 8, collapses.WINDOWS)[:, :-1].astype("int64"))
    assert found["trained"] == collapses.distances(trained, x)
    assert (
        found["outside_initial"] == new_directions(start, x)[-1] and found["outside"] == new_directions(trained, x)[-1]
    )
