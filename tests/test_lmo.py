"""The certified step: its certificate against published numbers, its answers against bars and a float64 twin, its update on the manifold.

`oracles/lmo_problems.npz` holds three step problems taken from the training of a small GPT, rounded to float16: tall W and G, the
optimum of ⟨G, A⟩, and [frac, eff, ‖T‖₂, feas] of three known answers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from optim.gram import float32_products, inverse_sqrt, spectral_norm
from optim.gram_step import Update, gram_kernel, gram_step, rectangular_step, step_flops
from optim.lmo import SOLVERS, Solver, certify, solve
from optim.manifolds import MANIFOLDS, DGram, polar
from optim.reference_lmo import reference_direction

ORACLES = np.load(Path(__file__).parent / "oracles" / "lmo_problems.npz")
STIEFEL, DGRAM, SQUARE = "stiefel_102_blocks.3.c_attn", "dgram_295_blocks.0.c_attn", "stiefel_2_blocks.3.c_proj"
CONSTRAINED = ("stiefel", "dgram", "oblique")


def problem(name: str) -> tuple[Tensor, Tensor, str, float]:
    """W brought back onto the manifold that float16 left, G, the manifold, and the optimum."""
    manifold = name.split("_")[0]
    W, G = (torch.tensor(ORACLES[f"{name}/{key}"]).float() for key in "WG")
    c = W.norm(dim=0) if manifold == "dgram" else torch.ones(W.size(1))
    return polar(W / c) * c, G, manifold, float(ORACLES[f"{name}/optimum"])


def make(manifold: str, k: int = 2, m: int = 48, n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """k well-conditioned problems."""
    g = torch.Generator().manual_seed(seed)
    W = torch.linalg.qr(torch.randn(k, m, n, generator=g))[0]
    if manifold == "dgram":
        W = W * (0.5 + torch.rand(k, 1, n, generator=g))
    if manifold in ("oblique", "euclidean"):
        W = W + 0.1 * torch.randn(k, m, n, generator=g)
    if manifold == "oblique":
        W = W / W.norm(dim=-2, keepdim=True)
    return W.contiguous(), 1e-3 * torch.randn(k, m, n, generator=g)


def true_feas(A: Tensor, W: Tensor, G: Tensor, manifold: str, optimum: float) -> float:
    """feas of the answer A from its definition, in float64; A must be tangent."""
    A, W, G = A.double(), W.double(), G.double()
    C = W.T @ A
    H = MANIFOLDS[manifold].gram_project(C + C.T)
    assert H.norm() < 2e-3 * A.norm()
    return float((G * A).sum() / optimum / max(1.0, float(torch.linalg.matrix_norm(A, 2))))


# --- certificate -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [STIEFEL, DGRAM])
@pytest.mark.parametrize("answer", ["msign_G", "least_squares"])
def test_certificate_reproduces_known_answers(name: str, answer: str) -> None:
    W, G, manifold, optimum = problem(name)
    X = G
    if answer == "least_squares":
        C, d = W.T @ G, (W * W).sum(0)
        L = MANIFOLDS[manifold].gram_project(-(C + C.T) / (2 * (d[:, None] + d)))
        X = G + 2 * W @ L
    certificate = certify(W[None], G[None], polar(X)[None], manifold, torch.tensor([optimum]))
    ours = [float(x) for x in (certificate.frac, certificate.eff, certificate.norm, certificate.feas)]
    assert ours == pytest.approx(ORACLES[f"{name}/{answer}"], abs=5e-3)


@pytest.mark.parametrize("name", [STIEFEL, DGRAM, SQUARE])
def test_certificate_is_a_lower_bound(name: str) -> None:
    W, G, manifold, optimum = problem(name)
    for calls in (1, 3):
        step = solve(W, G, manifold, calls=calls)
        assert step.certificate.feas.item() <= true_feas(step.direction, W, G, manifold, optimum) + 2e-3
        assert step.certificate.bound.item() >= 0.998 * optimum
        assert step.certificate.ok.all()


# --- bars ------------------------------------------------------------------------------------------------------------------

BARS = [  # problem, settings, the least feas
    (STIEFEL, {"solver": "least_squares", "calls": 1, "cap": 1}, 0.955),
    (STIEFEL, {"calls": 6, "cap": 3}, 0.988),
    (STIEFEL, {"solver": "su_anderson", "calls": 24, "cap": 1}, 0.99),
    (SQUARE, {"solver": "least_squares", "calls": 1}, 0.998),
    (DGRAM, {"calls": 2, "cap": 1}, 0.96),
    (DGRAM, {"calls": 3, "cap": 1}, 0.97),
    (DGRAM, {"calls": 6, "cap": 2}, 0.99),
    (DGRAM, {"solver": "su_anderson", "calls": 24, "cap": 1}, 0.99),
]


@pytest.mark.parametrize(("name", "settings", "bar"), BARS)
def test_bars(name: str, settings: dict, bar: float) -> None:
    W, G, manifold, optimum = problem(name)
    feas = true_feas(solve(W, G, manifold, **settings).direction, W, G, manifold, optimum)
    assert feas >= bar
    assert feas > ORACLES[f"{name}/published"][3] + 0.1


SHARED = Path(__file__).parents[2] / "shared" / "oracles" / "lmo_problems.npz"


@pytest.mark.skipif(not SHARED.exists(), reason="the full problem set is not on this machine")
def test_every_known_problem_within_six_calls() -> None:
    problems = np.load(SHARED)
    for name in sorted({key.rsplit("/", 1)[0] for key in problems}):
        W, G = (torch.tensor(problems[f"{name}/{key}"]) for key in "WG")
        manifold = name.split("_")[0]
        A = solve(W, G, manifold, calls=6, cap=3).direction
        assert true_feas(A, W, G, manifold, float(problems[f"{name}/optimum"])) >= 0.989, name


# --- the float64 twin ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifold", [*CONSTRAINED, "euclidean"])
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_agrees_with_reference(manifold: str, solver: str) -> None:
    calls = 1 if solver == "least_squares" else 4
    settings = {"cap": 2, "conjugate_gradients": 60, "root_steps": 8, "lanczos": 24}
    W, G = make(manifold)
    step = solve(W, G, manifold, solver, calls, **settings)
    for i in range(len(W)):
        A, certificate = reference_direction(W[i], G[i], manifold, Solver(solver, calls, **settings))
        assert (step.direction[i] - A).norm() < 1e-4 * A.norm()
        for key, value in certificate.items():
            assert float(getattr(step.certificate, key)[i]) == pytest.approx(value, rel=2e-4, abs=2e-4), key


def test_square_stiefel_agrees_with_reference() -> None:
    W, G = make("stiefel", m=12)
    step = solve(W, G, "stiefel", "least_squares", 1)
    A, certificate = reference_direction(W[0], G[0], "stiefel", Solver("least_squares", 1))
    assert (step.direction[0] - A).norm() < 1e-4 * A.norm()
    assert float(step.certificate.bound[0]) == pytest.approx(certificate["bound"], rel=1e-4)


# --- invariances and bad gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifold", CONSTRAINED)
def test_scale_of_the_gradient_does_not_matter(manifold: str) -> None:
    W, G = make(manifold)
    A = solve(W, G, manifold).direction
    for c in (1e-6, 1e-3, 1e6):
        assert (solve(W, c * G, manifold).direction - A).norm() < 1e-4 * A.norm()


@pytest.mark.parametrize("manifold", CONSTRAINED)
def test_batched_is_single_and_wide_is_transposed(manifold: str) -> None:
    W, G = make(manifold, k=3)
    A = solve(W, G, manifold).direction
    for i in range(3):
        single = solve(W[i], G[i], manifold).direction
        assert single.shape == W[i].shape
        torch.testing.assert_close(single, A[i], rtol=0, atol=2e-5)
    wide = solve(W.mT, G.mT, manifold).direction
    torch.testing.assert_close(wide.mT, A, rtol=0, atol=2e-5)


def test_any_float_dtype() -> None:
    W, G = make("stiefel")
    for dtype in (torch.bfloat16, torch.float64):
        assert solve(W.to(dtype), G.to(dtype), "stiefel").direction.dtype == dtype


@pytest.mark.parametrize("manifold", [*CONSTRAINED, "euclidean"])
def test_zero_nan_and_rank_deficient_gradients(manifold: str) -> None:
    W, G = make(manifold, k=4)
    G[0] = 0
    G[1, 3, 4] = torch.nan
    G[2] = G[2, :, :1] @ torch.ones(1, G.size(-1))  # rank one
    step = solve(W, G, manifold)
    assert step.certificate.finite.tolist() == [True, False, True, True]
    assert step.direction[:2].abs().max() == 0
    assert step.direction.isfinite().all()
    assert (step.direction[2:].norm(dim=(-2, -1)) > 0.1).all()
    assert step.certificate.feas[[0, 3]].isfinite().all() and step.certificate.feas[0] == 1
    solvers = {manifold: Solver(calls=2)}
    new = gram_step([W], [G], [manifold], [torch.tensor(0.1)], solvers, Update(decay=0.1)).weights[0]
    assert torch.equal(new[:2], W[:2])  # bitwise
    assert new.isfinite().all() and not torch.equal(new[2], W[2])


def test_ill_conditioned_gradient_is_certified_or_guarded() -> None:
    W, G = make("stiefel", k=3, m=64, n=32)
    G = (W + G) * 0 + torch.linalg.qr(G)[0] * torch.logspace(0, -9, 32)
    step = solve(W, G, "stiefel", calls=3)
    assert step.direction.isfinite().all()
    assert (torch.linalg.matrix_norm(step.direction, 2) < 1.01).all()
    assert ((step.direction * G).sum((-2, -1)) > 0).all()


# --- the update ------------------------------------------------------------------------------------------------------------


def run(manifold: str, steps: int, update: Update, eta: float = 0.05, shape: tuple[int, int] = (48, 12)) -> Tensor:
    """A weight after a number of steps along fresh random momenta."""
    W, _ = make(manifold, k=1, m=shape[0], n=shape[1])
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        G = torch.randn(W.shape, generator=g)
        W = gram_step(
            [W], [G], [manifold], [torch.tensor(eta)], {manifold: Solver("least_squares", 1, 1, lanczos=6)}, update
        ).weights[0]
    return W


@pytest.mark.parametrize("manifold", CONSTRAINED)
@pytest.mark.parametrize("shape", [(48, 12), (16, 16)])
def test_residual_does_not_grow_with_steps(manifold: str, shape: tuple[int, int]) -> None:
    residual = [float(MANIFOLDS[manifold].residual(run(manifold, steps, Update(), shape=shape))) for steps in (1, 100)]
    assert max(residual) < 1e-5


def test_decay_and_cap_of_dgram_column_norms() -> None:
    free, decayed, capped = (
        run("dgram", 60, update, eta=0.2) for update in (Update(), Update(decay=0.5), Update(norm_cap=1.2))
    )
    for W in (free, decayed, capped):
        assert MANIFOLDS["dgram"].residual(W).item() < 1e-5
    assert decayed.norm() < 0.9 * free.norm()
    assert capped.norm(dim=-2).max() < 1.2 + 1e-5 < free.norm(dim=-2).max()


@pytest.mark.parametrize("manifold", CONSTRAINED)
def test_update_is_the_retraction_of_the_step(manifold: str) -> None:
    W, G = make(manifold)
    eta = torch.tensor(0.05)
    solver = Solver(calls=2)
    A = solve(W, G, manifold, calls=2).direction
    retraction = DGram("column_norms") if manifold == "dgram" else MANIFOLDS[manifold]
    result = gram_step([W], [G], [manifold], [eta], {manifold: solver}, Update())
    torch.testing.assert_close(result.weights[0], retraction.retract(W - eta * A), rtol=0, atol=2e-6)


def test_rms_length_and_small_steps_are_not_rounding_noise() -> None:
    W, G = make("stiefel", m=48, n=12)
    A = solve(W, G, "stiefel", calls=2).direction
    for length, factor in (("spectral", 1.0), ("rms", 0.2 * 48**0.5)):
        moved = gram_step(
            [W], [G], ["stiefel"], [torch.tensor(1e-4)], {"stiefel": Solver(calls=2)}, Update(length=length)
        )
        realised = moved.weights[0] - W
        assert (realised + 1e-4 * factor * A).norm() < 2e-2 * realised.norm()


def test_rectangular_step_goes_the_same_way() -> None:
    for manifold in CONSTRAINED:
        W, G = make(manifold)
        gram = gram_step(
            [W], [G], [manifold], [torch.tensor(0.05)], {manifold: Solver("least_squares", 1, 0)}, Update()
        )
        rectangular = rectangular_step(W, G, manifold, torch.tensor(0.05), Update())
        torch.testing.assert_close(rectangular, gram.weights[0], rtol=0, atol=1e-4)


def stacks() -> tuple[list[Tensor], list[Tensor], list[str], dict[str, Solver]]:
    """Every manifold, tall and square, of one n."""
    manifolds = ["stiefel", "stiefel", "stiefel", "dgram", "oblique"]
    made = [make(manifold, k=2, m=m, n=16, seed=m) for manifold, m in zip(manifolds, (48, 64, 16, 48, 32))]
    solvers = {name: Solver(calls=2, conjugate_gradients=3, lanczos=4) for name in CONSTRAINED}
    return [W for W, _ in made], [G for _, G in made], manifolds, solvers


def test_one_batch_for_all_shapes_and_warm_starts() -> None:
    Ws, Gs, manifolds, solvers = stacks()
    etas = [torch.tensor(0.02)] * len(Ws)
    together = gram_step(Ws, Gs, manifolds, etas, solvers, Update())
    for i in range(len(Ws)):
        alone = gram_step([Ws[i]], [Gs[i]], [manifolds[i]], etas[:1], solvers, Update())
        torch.testing.assert_close(together.weights[i], alone.weights[0], rtol=0, atol=1e-5)
    warm = gram_step(Ws, [10 * G for G in Gs], manifolds, etas, solvers, Update(), warm=together.warm)
    for i in (0, 1, 3, 4):  # the square Stiefel problem is closed
        assert (warm.certificates[i].bound <= 10 * together.certificates[i].bound * (1 + 1e-4)).all()
    cold = gram_step(Ws, Gs, manifolds, etas, solvers, Update(), warm=[torch.zeros_like(L) for L in together.warm])
    for a, b in zip(cold.weights, together.weights):
        assert torch.equal(a, b)  # a zero state is no start


def test_compiles_without_a_graph_break() -> None:
    Ws, Gs, manifolds, solvers = (x[3:4] if isinstance(x, list) else x for x in stacks())
    etas = [torch.tensor(0.02)]
    kernel = torch.compile(gram_kernel, fullgraph=True, backend="eager")
    compiled = gram_step(Ws, Gs, manifolds, etas, solvers, Update(), kernel=kernel)
    plain = gram_step(Ws, Gs, manifolds, etas, solvers, Update())
    for a, b in zip(compiled.weights, plain.weights):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    with torch.compiler.set_stance("fail_on_recompile"):  # another learning rate is not another program
        gram_step(Ws, Gs, manifolds, [torch.tensor(0.01)], solvers, Update(), kernel=kernel)


def test_flops_are_those_that_are_done() -> None:
    Ws, Gs, manifolds, solvers = stacks()
    solvers = {name: Solver(calls=2, lanczos=2) for name in CONSTRAINED}
    with FlopCounterMode(display=False) as counter:
        gram_step(Ws, Gs, manifolds, [torch.tensor(0.02)] * len(Ws), solvers, Update())
    counted = step_flops([tuple(W.shape) for W in Ws], manifolds, solvers)
    # The counter also sees products with a vector, which at n = 16 are a few per cent.
    assert counted <= counter.get_total_flops() < 1.15 * counted


def test_flops_at_gpt2_124m() -> None:
    shapes, manifolds = [(12, 2304, 768), (12, 768, 768), (24, 3072, 768)], ["stiefel", "stiefel", "dgram"]
    one = Solver("least_squares", 1, 0)
    assert step_flops(shapes, manifolds, {"stiefel": one, "dgram": one}) <= 2.5e12
    default = {"stiefel": Solver("least_squares", 1, 1), "dgram": Solver("su", 3, 1)}
    assert step_flops(shapes, manifolds, default) <= 6e12


# --- arithmetic ------------------------------------------------------------------------------------------------------------


def test_inverse_sqrt_at_the_condition_number_of_the_ridge() -> None:
    g = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(2, 64, 64, generator=g).double())[0]
    S = U @ torch.diag(torch.logspace(0, -7, 64).double()) @ U.mT
    ridge = 1e-6 * S.norm(dim=(-2, -1), keepdim=True) * torch.eye(64)
    exact = torch.linalg.inv(torch.linalg.cholesky(S + ridge))
    exact = U @ torch.diag_embed((torch.logspace(0, -7, 64) + torch.diagonal(ridge, dim1=-2, dim2=-1)) ** -0.5) @ U.mT
    Z = inverse_sqrt(S.float(), 1e-6, 7)
    assert (Z - exact).norm() < 0.03 * exact.norm()


def test_spectral_norm_is_a_close_lower_bound() -> None:
    g = torch.Generator().manual_seed(0)
    X = torch.randn(3, 200, 100, generator=g)
    ours, exact = spectral_norm(X.mT @ X, 24).flatten(), torch.linalg.matrix_norm(X, 2)
    assert (ours <= exact * (1 + 1e-5)).all() and (ours >= 0.995 * exact).all()


def test_float32_products_restores_the_setting() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16), float32_products(torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"manifold": "sphere"}, "unknown manifold 'sphere'; choose one of"),
        ({"solver": "newton"}, "unknown solver 'newton'; choose one of"),
        ({"calls": 0}, "set calls >= 1"),
        ({"solver": "least_squares", "calls": 3}, "set calls=1"),
    ],
)
def test_refusals_name_the_remedy(arguments: dict, message: str) -> None:
    W, G = make("stiefel")
    with pytest.raises(ValueError, match=message):
        solve(W, G, **{"manifold": "stiefel", **arguments})
