"""Certificates and the solvers for study, against recorded optima and against the step problem's own definition.

`oracles/lmo_problems.npz` holds three step problems taken from the training of a small GPT, rounded to float16: tall W and G, the
optimum of ⟨G, T⟩, and [frac, eff, ‖T‖₂, feas] of three known answers.
"""

import pytest
import torch
from problems import DGRAM, SQUARE, STIEFEL, make, problem, true_feas

from optim.certificate import certify
from optim.certified import direction
from optim.manifolds import MANIFOLDS, polar
from scripts.analysis.solvers import DIRECT, METHODS, optimum, solve


@pytest.mark.parametrize("name", [STIEFEL, DGRAM])
@pytest.mark.parametrize("answer", ["msign_G", "least_squares"])
def test_certificates_of_known_answers(name, answer):
    """Their feas was computed with the optimum; ours has a dual value instead, a little above it."""
    W, G, manifold, best, known = problem(name)
    X = G
    if answer == "least_squares":
        X = MANIFOLDS[manifold].tangent(W, G)
    certificate = certify(W, G, polar(X), manifold)
    frac, _, norm, feas = known[answer]
    assert certificate.tangency.item() == pytest.approx(frac, abs=5e-3)
    assert certificate.norm.item() == pytest.approx(norm, abs=5e-3)
    assert certificate.feas.item() == pytest.approx(feas * best / certificate.bound.item(), abs=5e-3)


@pytest.mark.parametrize("name", [STIEFEL, DGRAM, SQUARE])
def test_feas_is_a_close_lower_bound(name):
    W, G, manifold, best, _ = problem(name)
    for quality in ("default", "high"):
        T = direction(W, G, manifold, quality=quality)
        certificate = certify(W, G, T, manifold)
        true = true_feas(T, W, G, manifold, best)
        assert true - 0.01 < certificate.feas.item() <= true + 1e-4
        assert 0.9999 * best < certificate.bound.item() < 1.01 * best
        assert certificate.tangency.item() < 1e-5


@pytest.mark.parametrize("manifold", ["stiefel", "dgram", "oblique", "euclidean"])
def test_no_direction_beats_the_dual_value(manifold):
    W, G = make(manifold, k=3)
    for method in (*METHODS, "alternating", *(["intrinsic"] if manifold == "stiefel" else [])):
        answer = solve(W, G, manifold, method, 1 if method == "least_squares" else 8)
        certificate = certify(W, G, answer.T, manifold)
        assert ((certificate.feas > 0) & (certificate.feas <= 1 + 1e-9)).all()
        assert (torch.linalg.matrix_norm(answer.T, 2) <= 1 + 1e-9).all()
        assert (answer.feas <= 1 + 1e-9).all() and (method not in DIRECT or certificate.tangency.max() < 1e-5)


def test_methods_without_a_multiplier_agree_with_those_that_have_one():
    """One sign of the tangent part is least squares; on a square matrix the intrinsic metric has the closed form of Stiefel."""
    W, G = make("dgram", k=2)
    torch.testing.assert_close(solve(W, G, "dgram", "alternating", 1).T, solve(W, G, "dgram", "least_squares", 1).T)
    torch.manual_seed(0)
    W, G = torch.linalg.qr(torch.randn(2, 16, 16))[0], torch.randn(2, 16, 16)
    assert solve(W, G, "stiefel", "intrinsic", 1).feas.min() > 1 - 1e-6
    with pytest.raises(ValueError, match="choose another method for dgram"):
        solve(W, G, "dgram", "intrinsic", 1)


def test_orientation_scale_and_units():
    W, G = make("dgram")
    T = direction(W, G, "dgram")
    tall, wide, scaled = certify(W, G, T, "dgram"), certify(W.mT, G.mT, T.mT, "dgram"), certify(W, 1e12 * G, T, "dgram")
    for field, other in zip(tall, wide):
        torch.testing.assert_close(field, other)
    torch.testing.assert_close(scaled.feas, tall.feas)
    torch.testing.assert_close(scaled.bound, 1e12 * tall.bound)


def test_what_is_not_tangent_is_seen():
    W, G = make("stiefel")
    certificate = certify(W, G, W, "stiefel")  # W itself is normal
    assert (certificate.tangency > 0.999).all() and (certificate.feas.abs() < 1e-6).all()


def test_broken_weights_and_steps_are_not_certified_and_do_not_stop_the_others():
    W, G = make("stiefel", k=3)
    T = MANIFOLDS["stiefel"].tangent(W, G)
    W[0, 1, 2], T[1, 2, 3] = torch.nan, torch.inf
    for field in certify(W, G, T, "stiefel"):
        assert field[:2].isnan().all() and field[2].isfinite()


def test_zero_and_broken_gradients():
    W, G = make("stiefel", k=3)
    G[0], G[1, 2, 3] = 0, torch.nan
    certificate = certify(W, G, torch.where(G.isfinite(), G, 0), "stiefel")
    feas = certificate.feas
    assert feas[0] == 1 and feas[1].isnan() and 0 < feas[2] < 1
    for field in (*SHARES, "momentum_top", "momentum_rank"):
        zero, broken, sound = getattr(certificate, field)
        assert zero == 0 and broken.isnan() and sound > 0, field
    assert certificate.bound[1].isnan() and certificate.bound[2] > 0
    assert certificate.step_rank[0] == 0 and (certificate.step_rank[1:] >= 1).all()


SHARES = ("normal_share", "length_share", "size_share")


@pytest.mark.parametrize("manifold", ["stiefel", "dgram", "oblique", "hyperball"])
def test_shares_of_the_momentum_are_0_where_it_is_tangent_and_1_where_it_is_normal(manifold):
    W, G = make(manifold, k=3)
    W, G, M = W.double(), G.double(), MANIFOLDS[manifold]
    S = torch.randn(3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert certify(W, M.tangent(W, G), G, manifold).normal_share.max() < 1e-10
    normal = M.normal(M.project(S + S.mT), (W * W).sum(-2))
    assert certify(W, W @ normal, G, manifold).normal_share.numpy() == pytest.approx([1] * 3, abs=1e-5)
    wide = certify(W.mT, 1e-9 * G.mT, G.mT, manifold)
    torch.testing.assert_close(wide.normal_share, certify(W, G, G, manifold).normal_share)


def test_shares_of_a_momentum_along_columns_and_along_the_matrix():
    W, G = make("dgram", k=3)
    stretched, turned = W * torch.linspace(-1, 2, 12), W @ torch.eye(12).flip(0)
    for G, length, size in (
        (W, 1, 1),
        (stretched, 1, None),
        (turned, 0, 0),
    ):  # another size, other lengths, other angles
        certificate = certify(W, G, W, "dgram")
        assert certificate.length_share.numpy() == pytest.approx([length] * 3, abs=1e-6)
        assert size is None or certificate.size_share.numpy() == pytest.approx([size] * 3, abs=1e-6)
        assert (certificate.size_share <= certificate.length_share + 1e-9).all()
    assert certify(W, stretched, W, "dgram").normal_share.max() < 1e-6  # DGram's lengths are free, Stiefel's are not
    W = make("stiefel", k=3)[0]
    assert certify(W, W * torch.linspace(-1, 2, 12), W, "stiefel").normal_share.min() > 1 - 1e-6


@pytest.mark.parametrize(("manifold", "sign"), [("stiefel", 1), ("dgram", -1)])
def test_a_random_momentum_has_its_shares_by_dimension(manifold, sign):
    W, G = make(manifold, k=600)
    certificate = certify(W, G, G, manifold)
    assert certificate.normal_share.mean().item() == pytest.approx((12 + sign) / (2 * 48), rel=0.05)
    assert certificate.length_share.mean().item() == pytest.approx(1 / 48, rel=0.15)
    assert certificate.size_share.mean().item() == pytest.approx(1 / (48 * 12), rel=0.15)


def test_spectra_of_momentum_and_step():
    W, G = make("stiefel", k=2)
    one = torch.ones(2, 48, 1) @ torch.ones(2, 1, 12)
    certificate = certify(W, one, MANIFOLDS["stiefel"].tangent(W, G), "stiefel")
    assert certificate.momentum_top.numpy() == pytest.approx([1, 1])
    assert certificate.momentum_rank.numpy() == pytest.approx([1, 1], abs=1e-5)
    flat = certify(W, W, W, "euclidean")
    assert flat.momentum_top.numpy() == pytest.approx([1 / 12] * 2, rel=1e-5)
    assert flat.momentum_rank.numpy() == pytest.approx([12, 12]) and flat.step_rank.numpy() == pytest.approx([12, 12])


@pytest.mark.parametrize(("name", "calls", "bar"), [(STIEFEL, 24, 0.995), (DGRAM, 24, 0.995), (SQUARE, 1, 0.9999)])
def test_su_with_anderson_reaches_the_optimum(name, calls, bar):
    W, G, manifold, best, _ = problem(name)
    answer = solve(W, G, manifold, "su_anderson", calls)
    assert true_feas(answer.T, W, G, manifold, best) > bar
    assert answer.feas.item() <= true_feas(answer.T, W, G, manifold, best) + 1e-6


def test_the_optimum_lies_between_its_bounds():
    W, G = make("dgram", k=1)
    upper, lower = optimum(W[0], G[0], "dgram", 200)
    assert 0 < upper - lower < 2e-3 * upper
    step = (direction(W[0], G[0], "dgram").double() * G[0].double()).sum()
    assert step < upper


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda W, G: certify(W, G, W, "sphere"), "unknown manifold 'sphere'; choose one of"),
        (lambda W, G: certify(W, G[0], W, "stiefel"), "must be equally shaped"),
        (lambda W, G: certify(W[0, 0], G[0, 0], G[0, 0], "stiefel"), r"equally shaped \(m, n\)"),
        (lambda W, G: solve(W, G, "stiefel", "newton"), "choose a method among least_squares"),
        (lambda W, G: solve(W, G, "stiefel", "su", 0), "calls of 1 or more"),
    ],
)
def test_refusals_name_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call(*make("stiefel"))
