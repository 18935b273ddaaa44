"""The layer map of the paper's model, against a direct simulation of that model and against what is known by hand."""

import math

import pytest
import torch

from model.exponents import measured_exponents, near_collapse
from model.gpt import GPT, GPTConfig
from model.layer_map import LayerMap, exponents_of, layer_maps, meeting, tanh_moments, tanh_slope

WIDTH, DRAWS = 192, 8


def normed(X):
    return math.sqrt(WIDTH) * X / torch.linalg.vector_norm(X, dim=1, keepdim=True)


def overlaps(X):
    """The mean square of a row's coordinates, and the mean product of those of two rows."""
    C, n = X @ X.T / X.size(1), len(X)
    return torch.stack([C.trace() / n, (C.sum() - C.trace()) / (n * (n - 1))])


def simulated(m, q, p, seed):
    """One block of the paper's model with random weights, in float64: (q, p) after it, and (own, mutual) of the gradient before it and after
    it, if the gradients after it are independent, and if half of each is the same for all tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows, columns, deviation=1.0):
        return deviation * torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    directions = torch.linalg.qr(normal(WIDTH, m.tokens + 1))[0].T * math.sqrt(WIDTH)  # so that X has exactly (q, p)
    X = (math.sqrt(p) * directions[:1] + math.sqrt(q - p) * directions[1:]).requires_grad_()
    entry, keep = WIDTH**-0.5, math.sqrt(m.skip)
    x = normed(X)
    logits = x @ normal(WIDTH, WIDTH, m.sigma_a * entry) @ x.T * entry
    Y = keep * X + m.attention * torch.softmax(logits, -1) @ x @ normal(WIDTH, WIDTH, entry)
    hidden = torch.tanh(normed(Y) @ normal(WIDTH, 4 * WIDTH, m.sigma_w * entry))
    Z = keep * Y + m.mlp * hidden @ normal(4 * WIDTH, WIDTH, entry / 2)
    R = normal(m.tokens, WIDTH)
    found = [overlaps(Z.detach())]
    for after in (R, math.sqrt(0.5) * (R + normal(1, WIDTH))):
        (before,) = torch.autograd.grad(Z, X, after, retain_graph=True)
        found += [overlaps(before), overlaps(after)]
    return found


@pytest.mark.parametrize(
    ("m", "q", "p"),
    [
        (LayerMap(16, 2.0, 0.7, 1.5, 0.8, 0.5), 1.0, 0.3),
        (LayerMap(16, 1.0, 0.5, 2.0, 0.5, 0.75), 0.8, 0.79),
        (LayerMap(16, 5.0, 1.0, 1.0, 1.0), 1.0, 0.9),
    ],
)
def test_the_map_is_what_random_weights_do_on_average(m, q, p):
    after, *gradients = (torch.stack(each) for each in zip(*(simulated(m, q, p, s) for s in range(DRAWS))))
    error = after.std(0) / math.sqrt(DRAWS)
    new_q, apart = m.step(q, q - p)
    derived = torch.tensor([new_q, new_q - apart])
    assert ((after.mean(0) - derived).abs() < 4 * error).all(), (after.mean(0), derived, error)
    own, own_after, alike, alike_after = (each.mean(0).tolist() for each in gradients)
    assert m.gradient(q, q - p, *own_after)[0] == pytest.approx(own[0], rel=0.15)
    assert m.gradient(q, q - p, *alike_after)[1] == pytest.approx(alike[1], rel=0.15)


def test_rows_of_attention_meet_as_often_as_sampled():
    generator = torch.Generator().manual_seed(0)
    for sigma, correlation, tokens in ((1.0, 0.5, 64), (3.0, 0.2, 16), (2.0, 1.0, 16)):
        shared, own = (torch.randn(4000, k, tokens, generator=generator, dtype=torch.float64) for k in (1, 2))
        a = torch.softmax(sigma * (math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own), -1)
        squares = a.square().sum(-1, keepdim=True)
        change = (a.square() * (1 - 2 * a + squares)).sum(-1).mean(1)
        sampled = (squares.mean((1, 2)), (a[:, 0] * a[:, 1]).sum(-1), change)
        for found, known in zip(sampled, meeting(sigma, correlation, tokens)):
            assert abs(found.mean() - known) < 4 * found.std() / math.sqrt(4000)
    assert meeting(0.0, 0.5, 32) == pytest.approx((1 / 32, 1 / 32, 31 / 32**2))  # uniform attention


def test_moments_of_tanh():
    step = 1e-4
    (_, less), (_, more) = (tanh_moments(1.5, 0.4 + shift) for shift in (-step, step))
    assert tanh_slope(1.5, 0.4) == pytest.approx((more - less) / (2 * step), rel=1e-6)
    assert tanh_moments(1e-3, 0.25) == pytest.approx((1e-6, 0.25e-6), rel=1e-4)  # linear
    assert tanh_moments(1.0, 1e-20)[1] == pytest.approx(1e-20 * tanh_slope(1.0, 0.0), rel=1e-6)
    assert tanh_moments(10.0, 0.0)[0] == pytest.approx(1 - 0.2 / math.sqrt(2 * math.pi), abs=1e-3)  # nearly a sign


def test_without_an_mlp_uniform_attention_divides_and_without_branches_nothing_happens():
    still = exponents_of([LayerMap(32, 1.0, 0.0, 1.0, 0.0)] * 3, 0.5, 0.9)
    assert still.angles == pytest.approx([0] * 3) and still.gradients == pytest.approx([0] * 3)
    # Every token gets the same, so q - p is kept, and q grows from 1 by 2² times the mean of a row: c + (1 - c)/n.
    c, n = 0.9, 32
    found = exponents_of([LayerMap(n, 0.0, 2.0, 1.0, 0.0)], 1.0, c)
    assert found.angle == pytest.approx(-math.log(1 + 4 * (c + (1 - c) / n)))
    assert found.gradient == pytest.approx(math.log(1 + 4 / n))


def block(strength, sigma_w=2.0, attention=True, mlp=True):
    """A block whose stream keeps a share of itself such that branches of variance one leave its size as it is."""
    return LayerMap(32, 1.0, strength * attention, sigma_w, strength * mlp, 1 - strength**2)


def near_the_line(m):
    """The exponents of a block for tokens that are nearly equal, in a stream whose size no longer changes."""
    once, twice = (m.step(q, 1e-9 * q)[0] for q in (1.0, 2.0))  # the new size is linear in the old one
    settled = (2 * once - twice) / (1 + once - twice)
    return exponents_of([m], math.sqrt(settled), 1 - 1e-6)


@pytest.mark.parametrize("strength", [0.3, 0.6])
@pytest.mark.parametrize("sigma_a", [0.0, 4.0])
def test_without_an_mlp_tokens_always_become_alike(strength, sigma_a):
    """arXiv 2403.02579: attention alone collapses, at every strength."""
    found = exponents_of([LayerMap(32, sigma_a, strength, 1.0, 0.0, 1 - strength**2)] * 60, 1.0, 0.5)
    assert max(found.angles) < 0 and sum(found.angles) < -10


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_attention_separates_the_two_lines_which_an_mlp_alone_has_as_one(strength):
    """arXiv 2403.02579: λ_a = 0 and λ_g = 0 are one line for MLPs, and two with attention."""
    for sigma_w in (0.5, 2.0, 8.0):
        alone = near_the_line(block(strength, sigma_w, attention=False))
        assert alone.angle == pytest.approx(alone.gradient, rel=1e-4)
    low, high = 1.0, 30.0
    for _ in range(20):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if near_the_line(block(strength, middle)).angle > 0 else (middle, high)
    at_zero = near_the_line(block(strength, low))
    assert abs(at_zero.angle) < 1e-4 < 1e-3 < at_zero.gradient


def test_branches_of_one_over_the_root_of_the_depth_reach_a_limit():
    """arXiv 2403.02579 finds α ~ 1/√L: then all blocks together change the angles of tokens by as much in a deeper network, and do not at a
    fixed strength."""
    scaled, fixed = (
        [sum(exponents_of([block(strength(n))] * n, 1.0, 0.99).angles) for n in (8, 32, 128)]
        for strength in (lambda n: n**-0.5, lambda n: 0.5)
    )
    assert scaled[2] == pytest.approx(scaled[0], rel=0.1) and scaled[2] == pytest.approx(scaled[1], rel=0.03)
    assert fixed[1] / fixed[0] > 3.5 and fixed[2] / fixed[1] > 3.5  # in proportion to the depth


def test_near_collapse_the_map_is_its_closed_form():
    """To first order in 1 - p/q, λ_a is log of a²q/(a²q + α_A²) · (m²q' + k₁)/(m²q' + k₀), k₀ = α_M²σ_2² E[φ²], k₁ its slope."""
    q = 1.3**2
    for m in (LayerMap(64, 2.0, 0.3, 3.0, 0.8, 0.7), LayerMap(64, 1.0, 0.8, 0.5, 0.5)):
        after = m.skip * q + m.attention**2
        k0, k1 = m.mlp**2 * tanh_moments(m.sigma_w, 0.0)[0], m.mlp**2 * tanh_slope(m.sigma_w, 0.0)
        closed = math.log(m.skip * q / after * (m.skip * after + k1) / (m.skip * after + k0))
        assert exponents_of([m], 1.3, 1 - 1e-6).angle == pytest.approx(closed, abs=1e-4)


def test_a_gpt_with_small_branches_is_nearly_the_papers_model():
    """Attention averages over all tokens, not over earlier ones, and tanh bends more than GELU; the scales are those of the weights."""
    settings = {"block_size": 64, "vocab_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 128, "attention_scale": 20.0}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**settings))
    maps = layer_maps(model, 64)
    assert maps[0].sigma_a == pytest.approx(20 * 0.02**2 * 128, rel=0.05)
    assert maps[0].sigma_w == pytest.approx(0.02 * math.sqrt(128), rel=0.05)
    assert maps[0].mlp == pytest.approx(0.02 * math.sqrt(4 * 128 / 4), rel=0.05)
    generator = torch.Generator().manual_seed(0)
    x = near_collapse(model, 4, 64, 0.99, generator)
    seen, derived = measured_exponents(model, x, generator), exponents_of(maps, x.square().mean().sqrt().item(), 0.99)
    assert derived.angle < 0 and seen.angle < 0 and abs(derived.angle - seen.angle) < 0.5 * abs(seen.angle)
