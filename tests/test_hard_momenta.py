"""The certified step where the momentum leaves it little: mostly normal to the manifold, of no size that 16 bits hold, or not finite."""

import pytest
import torch
from test_certified import stack_of

from optim import certified
from optim.certificate import certify
from optim.certified import CertifiedStep, direction
from optim.linalg import top_pair
from optim.manifolds import MANIFOLDS

SHAPES = {"stiefel": (96, 32), "dgram": (64, 64), "oblique": (96, 32), "hyperball": (96, 32)}


def mostly_normal(name, tangent, k=4):
    """W, and G whose normal part has rank one and norm 1, and whose other part has norm `tangent` and singular values from 1 to 1e-3."""
    torch.manual_seed(3)
    m, n = SHAPES[name]
    manifold, W = MANIFOLDS[name], MANIFOLDS[name].retract(torch.randn(k, m, n))
    a = torch.randn(k, n, 1)
    normal = W @ manifold.normal(manifold.project(a @ a.mT), W.square().sum(-2))
    left, right = (torch.linalg.qr(torch.randn(k, size, n))[0] for size in (m, n))
    rest = left * torch.logspace(0, -3, n) @ right.mT
    unit = [X / torch.linalg.matrix_norm(X, keepdim=True) for X in (normal, rest)]
    return W, unit[0] + tangent * unit[1]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("products", "tangent"), [("float32", 1e-4), ("float32", 0.01), ("float16", 0.1), ("bfloat16", 0.8)]
)
def test_the_step_is_good_though_the_momentum_is_mostly_normal(name, products, tangent):
    W, G = mostly_normal(name, tangent)
    seen = certify(W, G, direction(W, G, name, products), name)
    assert seen.normal_share.min() > 0.59 and seen.feas.min() > 0.85
    if products != "bfloat16":
        assert certify(W, G, direction(W, G, name, products, "high"), name).feas.min() > 0.85


@pytest.mark.parametrize("name", SHAPES)
def test_the_least_share_of_what_is_tangent_has_room(name, monkeypatch):
    """In float16, at a third of it, directions are good still; a hundred momenta, since it is the worst of them that fails."""
    W, G = mostly_normal(name, 16 * torch.finfo(torch.float16).eps, k=100)
    assert not direction(W, G, name, "float16").any()
    monkeypatch.setattr(certified, "TANGENT_SHARE", 1.0)
    assert certify(W, G, direction(W, G, name, "float16"), name).feas.min() > 0.85


def square_and_skew(n, k=4):
    """W on Stiefel and a skew matrix of norm 1 (k, n, n)."""
    torch.manual_seed(0)
    W, S = (torch.randn(k, n, n) for _ in range(2))
    skew = S - S.mT
    return MANIFOLDS["stiefel"].retract(W), skew / torch.linalg.matrix_norm(skew, keepdim=True)


def test_a_square_stiefel_matrix_bears_more():
    W, skew = square_and_skew(32)
    S = torch.randn_like(W)
    G = W @ ((S + S.mT) / torch.linalg.matrix_norm(S + S.mT, keepdim=True) + 0.1 * skew)
    assert certify(W, G, direction(W, G, "stiefel", "bfloat16"), "stiefel").feas.min() > 0.95


@pytest.mark.parametrize(("turned", "share"), [(True, 0.005), (True, 0.02), (False, 0.01)])
def test_one_large_entry_of_a_square_momentum_hides_nothing(turned, share):
    """What is tangent beside it is so small that its squares leave float16."""
    W, skew = square_and_skew(64)
    W = W if turned else torch.eye(64).expand_as(W).contiguous()
    normal = torch.zeros_like(W)
    normal[:, 0, 0] = 1
    G = W @ (normal + share * skew)
    assert certify(W, G, direction(W, G, "stiefel", "float16"), "stiefel").feas.min() > 0.95


@pytest.mark.parametrize("name", SHAPES)
def test_what_16_bits_cannot_resolve_is_stepped_in_float32(name):
    """The first time the weight stays; from then on every step is made, as long as the momentum is of that kind."""
    W, G = mostly_normal(name, 0.02)
    rule = CertifiedStep(products="float16")
    first = rule(stack_of(W, G, name, 0.01, 0.0, [0] * 4))
    assert torch.equal(first.W, W) and first.fallback.all() and first.level.eq(2).all()
    for _ in range(2):
        moved = rule(stack_of(W, G, name, 0.01, 0.0, [2] * 4))
        assert certify(W, G, moved.direction, name).feas.min() > 0.85 and not torch.equal(moved.W, W)
        assert moved.fallback.all() and moved.level.eq(2).all()
    healthy = rule(stack_of(W, torch.randn_like(G), name, 0.01, 0.0, [2] * 4))
    assert healthy.level.max() < 2


def test_a_momentum_without_a_tangent_part_is_tried_in_float32_every_other_time():
    W = MANIFOLDS["oblique"].retract(torch.randn(1, 48, 16))
    rule, level = CertifiedStep(products="float16"), [0]
    for expected in (2, 0, 2):
        moved = rule(stack_of(W, 3 * W, "oblique", 0.01, 0.0, level))
        level = [int(moved.level)]
        assert level == [expected] and moved.fallback.all() and torch.equal(moved.W, W)


@pytest.mark.parametrize("length", [1e-8, 1e-3, 1e5])
def test_gains_of_any_size_step_in_float16(length):
    torch.manual_seed(0)
    W, G = length * torch.randn(2, 96, 32), torch.randn(2, 96, 32)
    assert certify(W, G, direction(W, G, "oblique_gain", "float16"), "oblique_gain").feas.min() > 0.97


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_the_largest_singular_value_of_any_size(size):
    torch.manual_seed(0)
    W = torch.randn(3, 24, 8)
    sigma = top_pair(size * W)[1].flatten() / size
    torch.testing.assert_close(sigma, torch.linalg.matrix_norm(W, 2), rtol=1e-4, atol=0)
    assert top_pair(torch.zeros(1, 4, 2))[1] == 0 and top_pair(torch.full((1, 4, 2), 1e-40))[1] > 0


@pytest.mark.parametrize("name", ["stiefel", "dgram", "oblique"])
def test_high_quality_is_better_at_full_rank_and_on_stiefel_worse_at_low_rank(name):
    generator = torch.Generator().manual_seed(0)
    W = MANIFOLDS[name].retract(torch.randn(8, 96, 32, generator=generator))
    left, right = (torch.randn(8, size, 32, generator=generator) for size in (96, 32))
    gain = {}
    for rank in (1, 4, 32):
        G = left[:, :, :rank] @ right[:, :, :rank].mT
        default, high = (certify(W, G, direction(W, G, name, quality=q), name).feas.mean() for q in ("default", "high"))
        gain[rank] = high - default
    assert gain[32] > 0
    if name == "stiefel":
        assert max(gain[1], gain[4]) < -0.01
