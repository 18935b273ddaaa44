"""The matrix sign: the published coefficients, the published outputs, and what a polar factor is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from reference_published import reference_msign

from optim.iterators import SAFETY, polar_express_coefficients
from optim.msign import msign
from optim.published import published_sign

ORACLE = np.load(Path(__file__).parent / "oracles" / "published_step.npz")

# The authors' list, before the safety factor (arXiv 2505.16932).
PUBLISHED_LIST = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]


def random_matrix(*shape: int, condition: float = 100.0, seed: int = 0) -> torch.Tensor:
    """A (..., m, n) float64 matrix with singular values spaced geometrically over `condition`."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(*shape, dtype=torch.float64, generator=generator)
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    S = torch.logspace(0, -float(np.log10(condition)), min(shape[-2:]), dtype=torch.float64)
    return U @ (S.unsqueeze(-1) * Vh)


def test_generator_gives_the_published_list():
    for ours, theirs in zip(polar_express_coefficients(8, safety=1.0), PUBLISHED_LIST, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-8)


def test_the_list_is_widened_up_to_its_last_entry_which_is_repeated():
    listed = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in PUBLISHED_LIST[:7]] + PUBLISHED_LIST[7:] * 2
    for ours, theirs in zip(polar_express_coefficients(9), listed, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-8)


def test_the_listed_range_is_reached():
    # papers: five steps with safety 1.01 bring [1e-3, 1] into [.846, 1.124].
    x = torch.logspace(-3, 0, 20_001, dtype=torch.float64)
    for a, b, c in polar_express_coefficients(5):
        x = a * x + b * x**3 + c * x**5
    assert x.min() == pytest.approx(0.846, abs=2e-3)
    assert x.max() == pytest.approx(1.124, abs=2e-3)


@pytest.mark.parametrize("shape", ["64x32", "48x48"])
def test_published_output(shape):
    G = torch.from_numpy(ORACLE[f"{shape}/in/G"]).float()
    exact = torch.from_numpy(ORACLE[f"{shape}/msign_fp32"])
    rounded = torch.from_numpy(ORACLE[f"{shape}/msign"])
    assert torch.linalg.norm(msign(G, 10, torch.float32) - exact) / exact.norm() < 1e-5
    ours = msign(G, 10, torch.bfloat16).float()
    assert torch.linalg.norm(ours - rounded) / rounded.norm() < 3e-2
    sigma = torch.linalg.svdvals(ours)
    assert sigma.min() > 0.99 and sigma.max() < 1.01


@pytest.mark.parametrize("shape", [(64, 32), (48, 48), (256, 64), (512, 128)])
def test_fewer_roundings_halve_the_error_in_bfloat16(shape):
    X = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    ours, theirs = ((sign(X, 10, torch.bfloat16).double() - U @ Vh).norm() for sign in (msign, published_sign))
    assert 0.4 < ours / theirs < 0.75


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32), (3, 40, 24), (2, 3, 16, 24)])
def test_is_the_polar_factor(shape):
    X = random_matrix(*shape)
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    assert torch.allclose(msign(X, 12, torch.float64), U @ Vh, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("steps", [1, 5, 10])
def test_agrees_with_the_scalar_map_on_singular_values(shape, steps):
    X = random_matrix(*shape)
    assert torch.allclose(msign(X, steps, torch.float64), reference_msign(X, steps), atol=1e-9)


def test_scale_transpose_and_zero():
    X = random_matrix(20, 12).float()
    assert torch.allclose(msign(1e4 * X, 10, torch.float32), msign(X, 10, torch.float32), atol=1e-5)
    assert torch.allclose(msign(X.T, 10, torch.float32), msign(X, 10, torch.float32).T, atol=1e-6)
    assert torch.allclose(msign(1e-15 * X, 10, torch.float32), msign(X, 10, torch.float32), atol=1e-5)
    for sign in (msign, published_sign):
        assert torch.equal(sign(torch.zeros(5, 3), 10, torch.float32), torch.zeros(5, 3))
