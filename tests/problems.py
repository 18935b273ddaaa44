"""Step problems for the tests: recorded ones with their optimum, and well-conditioned random ones."""

from pathlib import Path

import numpy as np
import torch

from optim.manifolds import MANIFOLDS, polar

ORACLES = np.load(Path(__file__).parent / "oracles" / "lmo_problems.npz")
STIEFEL, DGRAM, SQUARE = "stiefel_102_blocks.3.c_attn", "dgram_295_blocks.0.c_attn", "stiefel_2_blocks.3.c_proj"


def problem(name):
    """W brought back onto the manifold that float16 left, G, the manifold, the optimum, and the known answers by name."""
    manifold = name.split("_")[0]
    W, G = (torch.tensor(ORACLES[f"{name}/{key}"]).float() for key in "WG")
    c = W.norm(dim=0) if MANIFOLDS[manifold].free_lengths else torch.ones(W.size(1))
    known = {key: ORACLES[f"{name}/{key}"] for key in ("msign_G", "least_squares", "published")}
    return polar(W / c) * c, G, manifold, float(ORACLES[f"{name}/optimum"]), known


def recorded(path):
    """Every problem of a file, as (name, W, G, manifold, optimum)."""
    data = np.load(path)
    for name in sorted({key.rpartition("/")[0] for key in data.files}):
        W, G = (torch.tensor(data[f"{name}/{key}"]).float() for key in "WG")
        yield name, W, G, name.split("_")[0], float(data[f"{name}/optimum"])


def make(manifold, k=2, m=48, n=12, seed=0):
    """k well-conditioned problems: W on the manifold, and a small random G."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(k, m, n, generator=g)
    if MANIFOLDS[manifold].free_lengths:
        W = torch.linalg.qr(W)[0] * (0.5 + torch.rand(k, 1, n, generator=g))
    return MANIFOLDS[manifold].retract(W).contiguous(), 1e-3 * torch.randn(k, m, n, generator=g)


def true_feas(T, W, G, manifold, optimum):
    """The share of the optimum that T achieves, from its definition, in float64; T must be tangent."""
    T, W, G = T.double(), W.double(), G.double()
    assert MANIFOLDS[manifold].tangency(W, T).norm() < 2e-3 * T.norm()
    return float((G * T).sum() / optimum / max(1.0, float(torch.linalg.matrix_norm(T, 2))))
