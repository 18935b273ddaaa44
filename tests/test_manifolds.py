"""One suite of axioms for every manifold, tall, wide and square; and the published retractions for what they do."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from device_checks import LOW_PRECISION, low_precision_products, require_low_precision

from optim.manifolds import MANIFOLDS, is_wide, like, polar, tall
from optim.msign import msign
from optim.published import PublishedStep, sorted_by_eigenvalues, sorted_svd

ORACLE = np.load(Path(__file__).parent / "oracles" / "published_step.npz")
SHAPES = [(40, 16), (16, 40), (24, 24), (3, 40, 16)]
GRAM_SPACE = [M for M in MANIFOLDS.values() if M.gram_space]
ids = [M.name for M in GRAM_SPACE]
every = pytest.mark.parametrize("M", MANIFOLDS.values(), ids=list(MANIFOLDS))


def gaussian(shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def symmetric(n, seed=0):
    S = gaussian((n, n), seed, torch.float64)
    return S + S.mT


@pytest.mark.parametrize("name", MANIFOLDS)
def test_projector_is_linear_idempotent_and_self_adjoint(name):
    P = MANIFOLDS[name].project
    A, B = symmetric(9, 1), symmetric(9, 2)
    assert torch.equal(P(P(A)), P(A))
    assert torch.allclose(P(2 * A - B), 2 * P(A) - P(B))
    assert torch.allclose((P(A) * B).sum(), (A * P(B)).sum())
    assert torch.equal(P(A), P(A).mT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every
def test_retraction_lands_on_the_manifold(M, shape, dtype):
    W = M.retract(gaussian(shape, dtype=dtype))
    assert W.shape == torch.Size(shape) and W.dtype == dtype
    moved = M.retract(W + 0.05 * gaussian(shape, 1, dtype))
    bound = 2e-6 if dtype == torch.float32 else 2e-2
    assert M.distance(W).max() < bound and M.distance(moved).max() < bound


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_published_stiefel_retraction_is_orthonormal_to_bfloat16(shape, dtype):
    W = MANIFOLDS["stiefel"].retract(gaussian(shape, dtype=dtype), partial(msign, steps=10, dtype=torch.bfloat16))
    assert W.dtype == dtype
    sigma = torch.linalg.svdvals(W.float())
    # The square Gaussian has singular values below 1e-3 of its norm, which ten steps do not bring to 1.
    assert sigma.max() < 1.02 and (shape[-1] == shape[-2] or sigma.min() > 0.98)


@pytest.mark.parametrize("shape", SHAPES)
@every
def test_retraction_is_the_identity_on_the_manifold(M, shape):
    W = M.retract(gaussian(shape, dtype=torch.float64) * torch.linspace(0.5, 2, shape[-1], dtype=torch.float64))
    assert torch.allclose(M.retract(W), W, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("M", GRAM_SPACE, ids=ids)
def test_retraction_follows_tangents_to_first_order(M, shape):
    W = M.retract(gaussian(shape, dtype=torch.float64))
    A = M.tangent(W, gaussian(shape, 3, torch.float64))
    assert torch.linalg.matrix_norm(M.tangency(W, A)).max() < 1e-10
    errors = [torch.linalg.norm(M.retract(W + t * A) - W - t * A).item() for t in (1e-3, 5e-4)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)  # second order: halving t quarters the error


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("M", MANIFOLDS.values(), ids=MANIFOLDS)
def test_what_is_tangent_is_told_by_the_tangent_part_and_by_tangency_alike(M, shape):
    W, A = M.retract(gaussian(shape, dtype=torch.float64)), gaussian(shape, 3, torch.float64)
    tangent = M.tangent(W, A)
    assert torch.allclose(M.tangent(W, tangent), tangent, atol=1e-10)
    assert torch.linalg.matrix_norm(M.tangency(W, tangent)).max() < 1e-9
    moved, violated = torch.linalg.matrix_norm(A - tangent), torch.linalg.matrix_norm(M.tangency(W, A))
    assert bool((moved > 1e-3).all()) == bool((violated > 1e-3).all()) == M.conditioned


def test_published_dgram_retraction_sorts_the_column_norms():
    W = sorted_svd(gaussian((40, 16))[None])[0]
    norms = torch.linalg.vector_norm(W, dim=0)
    assert torch.all(norms[:-1] >= norms[1:] - 1e-6)
    assert torch.allclose(norms, torch.linalg.svdvals(gaussian((40, 16))), rtol=1e-5)


def test_published_dgram_retraction_moves_a_point_of_the_manifold():
    scale = torch.linspace(0.55, 1.66, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    W = polar(gaussian((64, 32))) * scale
    moved = (torch.linalg.norm(sorted_svd(W[None])[0] - W) / W.norm()).item()
    kept = (torch.linalg.norm(MANIFOLDS["dgram"].retract(W) - W) / W.norm()).item()
    assert moved > 0.3 and kept < 1e-5


def test_zero_columns_stay_finite():
    W = gaussian((12, 6))
    W[:, 2] = 0
    for M in (MANIFOLDS["oblique"], MANIFOLDS["dgram"]):
        retracted = M.retract(W)
        assert retracted.isfinite().all() and retracted[:, 2].abs().max() < 1e-6


@pytest.mark.parametrize("condition", [1.0, 4.0, 5.0])
def test_the_sorted_retraction_is_that_of_an_svd(condition):
    U, V = (torch.linalg.qr(gaussian((size, 16), i, torch.float64))[0] for i, size in enumerate((40, 16)))
    W = ((U * torch.logspace(0, -condition, 16, dtype=torch.float64)) @ V.T).float()
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    expected = (U @ Vh) * S
    assert relative(sorted_by_eigenvalues(W[None])[0], expected) < 1e-5
    assert relative(sorted_svd(W[None])[0], expected) < 1e-8 * 10**condition + 1e-6  # an SVD in float32


@pytest.mark.parametrize("M", GRAM_SPACE, ids=ids)
def test_the_small_factor_is_a_retraction(M):
    """V (I + defect(VᵀV))^(-1/2) lands on the manifold; with free lengths at unit columns."""
    W = M.retract(gaussian((40, 16), dtype=torch.float64))
    V = W + 0.02 * gaussian((40, 16), 1, torch.float64) / 6
    c = torch.linalg.vector_norm(V, dim=0) if M.free_lengths else 1.0
    values, vectors = torch.linalg.eigh(torch.eye(16, dtype=torch.float64) + M.defect((V / c).T @ (V / c)))
    R = V / c @ (vectors * values**-0.5) @ vectors.T * c
    assert M.distance(R) < 1e-12 and torch.linalg.norm(R - V) < 2 * torch.linalg.norm(V - M.retract(V))


def test_tall_and_back():
    for shape in SHAPES:
        W = gaussian(shape)
        assert not is_wide(tall(W)) and torch.equal(like(tall(W), W), W)


@pytest.mark.parametrize("shape", ["64x32", "48x48"])
@pytest.mark.parametrize("name", ["stiefel", "dgram", "oblique"])
def test_published_outputs(shape, name):
    M, oracle = MANIFOLDS[name], {k: torch.from_numpy(ORACLE[f"{shape}/{k}"]).float() for k in ("in/G", "in/W0")}
    recorded = {
        k: torch.from_numpy(ORACLE[f"{shape}/{k}/{name}"]) for k in ("gram_project", "init", "retract_in", "retract")
    }
    tolerance = 2e-2 if name == "stiefel" else 1e-5
    G = oracle["in/G"] / (1.01 * oracle["in/G"].norm())  # see tests/oracles/README.md
    assert relative(M.project(G.T @ G / G.size(1)), recorded["gram_project"]) < 1e-5
    rule = PublishedStep(20, 0.1, 10, torch.bfloat16)
    assert relative(rule.init(oracle["in/W0"], name), recorded["init"]) < tolerance
    assert relative(rule.retract(recorded["retract_in"][None], M)[0], recorded["retract"]) < tolerance


def relative(a, b):
    return (torch.linalg.norm(a - b) / torch.linalg.norm(b)).item()


def test_zero_on_stiefel_becomes_the_identity_whatever_makes_the_polar_factor():
    for shape in ((2, 6, 6), (6, 4), (4, 6)):
        for polar_of in (polar, partial(msign, steps=10, dtype=torch.bfloat16)):
            W = MANIFOLDS["stiefel"].retract(torch.zeros(shape), polar_of)
            torch.testing.assert_close(W, torch.eye(*shape[-2:]).expand(shape), rtol=0, atol=0.02)


def test_zero_is_on_the_manifolds_that_contain_it():
    distance = {name: M.distance(torch.zeros(2, 6, 4)) for name, M in MANIFOLDS.items()}
    assert {name for name, d in distance.items() if not d.any()} == {
        "euclidean",
        "dgram",
        "spectral_ball",
        "oblique_gain",
    }
    torch.testing.assert_close(distance["stiefel"], torch.full((2,), 2.0))  # ‖I‖_F


def test_the_distance_ignores_the_precision_of_other_products():
    require_low_precision("cpu")
    W = MANIFOLDS["stiefel"].retract(torch.randn(256, 128, generator=torch.Generator().manual_seed(0)))
    expected = MANIFOLDS["stiefel"].distance(W)
    for lower in LOW_PRECISION.values():
        with low_precision_products(lower):
            assert MANIFOLDS["stiefel"].distance(W) == expected
