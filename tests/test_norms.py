"""Every norm and its dual map, in float64, against the definition; and what steps they give."""

import pytest
import torch

from optim.manifolds import polar
from optim.norms import (
    FEATURES,
    PAIRS,
    Columns,
    Entries2,
    EntriesInf,
    Rows,
    Schatten,
    Spectral,
    operator_norm,
    vector_norm,
)

SHAPES = [(7, 4), (4, 7), (5, 5), (2, 9, 6)]
NORMS = {
    "entries_2": lambda m, n: Entries2(),
    "entries_inf": lambda m, n: EntriesInf(),
    "rows": lambda m, n: Rows(),
    "columns": lambda m, n: Columns(),
    "schatten_1.2": lambda m, n: Schatten(p=1.2),
    "schatten_3": lambda m, n: Schatten(p=3.0),
    "spectral": lambda m, n: Spectral(),
    **{f"{i} to {o}": lambda m, n, i=i, o=o: operator_norm(i, o, m, n) for i, o in PAIRS},
}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", ["full", "deficient"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NORMS)
def test_the_steepest_direction_has_norm_one_and_attains_the_dual_norm(name, shape, rank):
    norm = NORMS[name](*shape[-2:])
    g = gaussian(*shape) if rank == "full" else gaussian(*shape[:-1], 2) @ gaussian(2, shape[-1], seed=1)
    d = norm.steepest(g)
    assert d.shape == g.shape and torch.allclose(norm.size(d), torch.ones((), dtype=torch.float64))
    assert torch.allclose((g * d).sum((-2, -1)), norm.dual(g))
    others = gaussian(200, *shape, seed=2)
    others = others / norm.size(others)[..., None, None]
    assert ((g * others).sum((-2, -1)) <= norm.dual(g) + 1e-12).all()  # no other direction of norm 1 does better


@pytest.mark.parametrize("pair", PAIRS)
def test_an_operator_norm_is_the_largest_change_of_a_feature(pair):
    """No input of size 1 gives a larger output than the norm, and some input gives it."""
    source, target = (FEATURES[name] for name in pair)
    W = gaussian(6, 4)
    size = operator_norm(*pair, 6, 4).size(W)
    extreme = torch.cat([torch.eye(4, dtype=torch.float64), torch.linalg.svd(W)[2], W])  # units, singular vectors, rows
    x = torch.cat([gaussian(500, 4, seed=3), extreme])
    gain = target(x @ W.T) / source(x)
    assert gain.max() <= size * (1 + 1e-12) and gain.max() == pytest.approx(size.item())


def test_schatten_is_the_gradient_at_two_and_the_matrix_sign_at_large_p():
    g = gaussian(8, 5)
    assert torch.allclose(Schatten(p=2.0).steepest(g), g / g.norm())
    assert torch.allclose(Schatten(p=1e7).steepest(g), polar(g), atol=1e-5)
    deficient = gaussian(8, 2) @ gaussian(2, 5)
    U, _, Vh = torch.linalg.svd(deficient)
    assert torch.allclose(Schatten(p=1e7).steepest(deficient), U[:, :2] @ Vh[:2], atol=1e-5)  # rounding is no direction
    for size in (1e-3, 1e3):  # powers of such singular values leave float32's range
        many = Schatten(p=32.0).size(torch.full((4,), size).diag())
        assert many.item() == pytest.approx(size * 4 ** (1 / 32), rel=1e-5)
    for p in (1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="finite number above 1"):
            Schatten(p=p)


def test_the_factors_are_those_of_the_spectral_condition():
    g = gaussian(12, 3)
    assert torch.allclose(operator_norm("rms", "rms", 12, 3).steepest(g), 2 * polar(g))  # √(fan_out / fan_in)
    rows = operator_norm("one", "rms", 3, 12).steepest(g.T)  # a table of twelve tokens, transposed
    assert torch.allclose(rows.square().mean(-2).sqrt(), torch.ones(12, dtype=torch.float64))


@pytest.mark.parametrize("pair", [("one", "rms"), ("one", "l2"), ("one", "max"), ("rms", "rms"), ("l2", "l2")])
def test_vectors_have_norms_too(pair):
    number = gaussian(1)[0]
    assert vector_norm(*pair, 1).steepest(number) == number.sign()
    g, norm = gaussian(9), vector_norm(*pair, 9)
    d = norm.steepest(g)
    assert norm.size(d) == pytest.approx(1.0) and (g * d).sum() == pytest.approx(norm.dual(g).item())
    largest = FEATURES[pair[1]](g) if pair[0] == "one" else g.abs().max()  # of a bias, and of a gain of each feature
    assert norm.size(g) == pytest.approx(largest.item())


@pytest.mark.parametrize("norm", [Entries2(), Rows(), Columns(), Schatten(p=3.0)])
def test_a_direction_has_length_one_at_any_scale(norm):
    g = gaussian(6, 4).float()
    for scale in (1e-35, 1e-23, 1.0, 1e30):
        torch.testing.assert_close(norm.steepest(scale * g), norm.steepest(g), rtol=1e-4, atol=1e-6)


def test_zero_has_no_direction_and_unknown_pairs_are_refused():
    for norm in (Entries2(), EntriesInf(), Rows(), Columns(), Schatten(p=3.0)):
        assert not norm.steepest(torch.zeros(4, 3)).any()
    with pytest.raises(ValueError, match="there is no norm max → rms; choose one of one → l2"):
        operator_norm("max", "rms", 3, 4)
    for pair in (("rms", "max"), ("one", "one")):
        with pytest.raises(ValueError, match="of a vector; choose"):
            vector_norm(*pair, 4)
