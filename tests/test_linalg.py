"""Products at a named precision and what is made of them, against float64 and singular value decompositions."""

import math
from contextlib import nullcontext

import pytest
import torch
from device_checks import LOW_PRECISION, float32_precisions, low_precision_products
from torch.utils.flop_counter import FlopCounterMode

from optim import linalg
from optim.linalg import Products, exact_sums, gram_stage, largest_eigenvalue, matrix_sign, skew_sign, su_step

EPS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_condition(k, m, n, condition, seed=0):
    """k matrices with singular values from 1 down to 1 / condition."""
    U, V = (torch.linalg.qr(random(k, size, n, seed=seed + i).double())[0] for i, size in enumerate((m, n)))
    return (
        (U * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)) @ V.mT
    ).float()


@pytest.mark.parametrize("precision", EPS)
def test_products_round_their_operands_and_nothing_else(precision):
    X, Y, mm = random(2, 40, 30), random(2, 30, 20, seed=1), Products(precision)
    exact = X.double() @ Y.double()
    error = ((mm.in_float32(X, Y) - exact).norm() / exact.norm()).item()
    assert 0.05 * EPS[precision] < error < 2 * EPS[precision]
    rounded = X.to(mm.dtype).double() @ Y.to(mm.dtype).double()  # what is left is float32's sum
    assert (mm.in_float32(X, Y) - rounded).norm() < 1e-6 * exact.norm()
    assert mm(X, Y).dtype == mm.dtype and torch.equal(mm(X, Y), mm.in_float32(X, Y).to(mm.dtype))
    C = random(2, 40, 20, seed=2).to(mm.dtype)
    sum_of_both = (0.5 * C.double() - 2 * rounded).to(mm.dtype)  # rounded once
    torch.testing.assert_close(mm.add(C, 0.5, X, Y, alpha=-2.0), sum_of_both, rtol=2 * EPS[precision], atol=1e-5)


@pytest.mark.parametrize("precision", EPS)
def test_a_gram_matrix_is_exact_at_any_precision(precision):
    X = random(2, 200, 30)
    X = X / X.norm(dim=-2, keepdim=True)
    error = (Products(precision).gram(X)[0] - X.double().mT @ X.double()).abs().max().item()
    assert error < (1e-5 if precision == "bfloat16" else 5e-7)  # two halves of bfloat16 have 16 bits between them


@pytest.mark.parametrize("precision", EPS)
def test_a_product_with_nearly_the_identity_is_as_exact_as_the_increment_is_small(precision):
    X, Y = random(2, 50, 20), 1e-3 * random(2, 20, 20, seed=1)
    exact = X.double() @ (torch.eye(20) + Y.double())
    mm = Products(precision)
    assert (mm.times_near_identity(X, X.to(mm.dtype), Y) - exact).norm() < 1e-2 * EPS[precision] * exact.norm() + 4e-6


def test_gram_stage_is_the_polynomial_of_the_singular_values():
    X = of_condition(2, 40, 16, 100.0).double()
    coefficients = linalg.sign_coefficients(3, 1e-2)
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    mm = Products("float32")
    mm.dtype = torch.float64
    Q = gram_stage(X.mT @ X, coefficients, mm)
    torch.testing.assert_close(X @ Q, (U * s[:, None, :]) @ Vh, rtol=0, atol=1e-11)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("stages", [(2, 2), (2, 3), (3, 3)])
def test_matrix_sign_brings_the_singular_values_it_was_made_for_near_one(precision, stages):
    mm, lower = Products(precision), 1e-2
    X = (1e-3 if precision == "float32" else 1.0) * of_condition(2, 60, 20, 40.0)
    A, gram_of_A = matrix_sign(X, stages, lower, mm)
    A = A.float()
    sigma = torch.linalg.svdvals(A)
    assert sigma.max() < 1.2 and sigma.min() > 0.8
    torch.testing.assert_close(gram_of_A().float(), A.mT @ A, rtol=0, atol=5e-3 if precision == "float16" else 5e-4)
    again, _ = matrix_sign(X, stages, lower, mm, X.mT @ X)
    torch.testing.assert_close(again.float(), A, rtol=0, atol=2e-2 if precision == "float16" else 5e-4)
    assert matrix_sign(torch.zeros_like(X), stages, lower, mm)[0].abs().max() == 0


def test_skew_sign_is_skew_and_orthogonal():
    K = random(2, 16, 16)
    K = K - K.mT
    O = skew_sign(K, 9, 1e-4, Products("float32"))
    assert torch.equal(O, -O.mT)
    torch.testing.assert_close(O.mT @ O, torch.eye(16).expand(2, -1, -1), rtol=0, atol=1e-3)
    assert ((K * O).sum((-2, -1)) > 0.999 * torch.linalg.svdvals(K).sum(-1)).all()


def test_the_largest_eigenvalue_is_a_close_lower_bound():
    X = random(3, 200, 100)
    exact = torch.linalg.matrix_norm(X, 2)
    for iterations, share in ((8, 0.97), (24, 0.995)):
        ours = largest_eigenvalue(lambda v: X.mT @ (X @ v), X, iterations).sqrt().flatten()
        assert (ours <= exact * (1 + 1e-5)).all() and (ours >= share * exact).all()
    assert largest_eigenvalue(lambda v: 0 * v, X, 4).flatten().tolist() == [0, 0, 0]


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_the_halves_of_a_number_are_compiled_as_written(precision):
    """torch.compile leaves out casts to 16 bits and back: a low half made by them would be zero."""
    mm = Products(precision)
    X = random(2, 300, 40) * torch.logspace(-6, 3, 40)
    X[0, :3, 0] = torch.tensor([math.nan, math.inf, -math.inf])
    high, low = mm.halves(X)
    compiled = torch.compile(mm.halves, fullgraph=True, dynamic=False)(X)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip((high, low), compiled))
    finite = X.isfinite()
    assert (low[finite] != 0).float().mean() > 0.9
    bits, smallest = (11, 2.0**-14) if precision == "float16" else (8, 0.0)
    assert ((high.float() - X).abs() <= X.abs().clamp_min(smallest) * 2.0**-bits)[finite].all()
    error = (high.float() + low.to(mm.dtype).float() / 2**11 - X).abs()
    assert (error <= X.abs().clamp_min(smallest) * 2.0 ** (-2 * bits))[finite].all()
    assert not (high + low)[0, :3, 0].isfinite().any()


def test_eigenvalues_of_both_signs_do_not_cancel():
    """Symmetric E without diagonal, as DGram's: nearly as far below zero as above, and with u vᵀ + v uᵀ exactly so for orthogonal u, v."""
    X = random(50, 64, 64)
    u, v = torch.linalg.qr(random(50, 64, 2, seed=1))[0].split(1, dim=-1)
    for E in (X + X.mT - torch.diag_embed(2 * X.diagonal(dim1=-2, dim2=-1)), u @ v.mT + v @ u.mT):
        exact = torch.linalg.eigvalsh(E.double()).abs().amax(-1)
        ours = largest_eigenvalue(E.matmul, E, 4).flatten()
        assert (ours <= exact * (1 + 1e-5)).all() and (ours >= 0.6 * exact).all()


def test_su_step_solves_its_equation():
    """Against the equation itself, for a diagonal metric, a mask as P, and enough iterations."""

    def project(S):
        return S - torch.diag_embed(torch.diagonal(S, dim1=-2, dim2=-1))

    Z = random(2, 10, 10).double()
    Z = Z @ Z.mT + torch.eye(10)
    H = project(random(2, 10, 10, seed=1).double())
    H = H + H.mT
    d = 0.5 + torch.rand(2, 10, generator=torch.Generator().manual_seed(2)).double()
    dL = linalg.su_step(project, lambda L: d[:, :, None] * L, H, Z, d, 200)
    left = d[:, :, None] * dL @ Z
    assert (project(left + left.mT) + 0.5 * H).norm() < 1e-8 * H.norm()


@pytest.mark.parametrize("name", [None, *LOW_PRECISION])
def test_exact_sums_restores_the_setting(name):
    """Whichever of torch's settings it was, and that a setting around it still counts."""
    with low_precision_products(LOW_PRECISION[name]) if name else nullcontext():
        before = float32_precisions()
        with torch.autocast("cpu", torch.bfloat16), exact_sums(torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert float32_precisions() == before
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if name in ("word", "matmul") else "ieee")
        torch.backends.fp32_precision = "none"


def test_unknown_precision_names_the_choices():
    with pytest.raises(ValueError, match="choose one of float32, float16, bfloat16"):
        Products("float8")


def test_gram_stage_makes_the_products_it_says():
    S = torch.eye(16)[None]
    for steps in (1, 2, 3):
        with FlopCounterMode(display=False) as counter:
            gram_stage(S, linalg.sign_coefficients(steps, 1e-2), Products("float16"))
        assert counter.get_total_flops() == (4 * steps - 3) * 2 * 16**3


def test_one_iteration_of_the_su_step_is_exact_for_diagonal_matrices():
    torch.manual_seed(0)
    d, z, H = torch.rand(1, 6) * 5 + 0.1, torch.rand(1, 6) * 5 + 0.1, torch.randn(1, 6, 6)
    H = H + H.mT
    found = su_step(lambda S: S, lambda X: torch.diag_embed(d) @ X, H, torch.diag_embed(z), d, 1)
    torch.testing.assert_close(found, -0.5 * H / (d[:, :, None] * z[:, None, :] + z[:, :, None] * d[:, None, :]))
