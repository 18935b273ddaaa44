"""Step problems for the tests: recorded ones with their optimum, and well-conditioned random ones; and the step's slow twin."""

from pathlib import Path

import numpy as np
import torch

from optim.certified import SKEW_LOWER, SKEW_STEPS, cap_polynomial
from optim.linalg import sign_coefficients, su_step
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


def reference(W, G, manifold, effort):
    """T / max(1, ‖T‖₂) of one tall W, G (m, n), in float64 and by singular value decompositions: what the batched step must agree with."""

    def smoothed(s, X, steps, lower):
        """What `steps` quintics, fitted for [lower, 1], make of the singular values s of X / ‖XᵀX‖_F^½."""
        s = s / torch.linalg.matrix_norm(X.T @ X).sqrt()
        for a, b, c in sign_coefficients(steps, lower):
            s = a * s + b * s**3 + c * s**5
        return s

    W, G = W.double(), G.double() / torch.linalg.matrix_norm(G.double())
    if manifold.closed_form(W):
        K = 0.5 * (W.T @ G - G.T @ W)
        Q, s, Rt = torch.linalg.svd(K)
        return W @ (Q * smoothed(s, K, SKEW_STEPS, SKEW_LOWER)) @ Rt
    d = (W * W).sum(0)
    L = -0.5 * manifold.normal(manifold.tangency(W, G), d)
    for _ in range(effort.su):
        X = G + 2 * W @ L
        Q, s, Rt = torch.linalg.svd(X, full_matrices=False)
        f = smoothed(s, X, effort.su_steps, effort.su_lower)
        H, Z = manifold.tangency(W, (Q * f) @ Rt), (Rt.T * (f / s)) @ Rt
        dL = su_step(manifold.project, (W.T @ W).matmul, H[None], Z[None], d, effort.conjugate_gradients)
        L = L + effort.relaxation * dL[0]
    X = G + 2 * W @ L
    Q, s, Rt = torch.linalg.svd(X, full_matrices=False)
    T = manifold.tangent(W, (Q * smoothed(s, X, sum(effort.stages), effort.lower)) @ Rt)
    for _ in range(effort.caps if manifold.conditioned else 0):
        Q, s, Rt = torch.linalg.svd(T, full_matrices=False)
        p = cap_polynomial(s[:1].view(1, 1, 1), effort).flatten()
        powers = torch.stack([(s / s[0]) ** (2 * j) for j in range(len(p))])
        T = manifold.tangent(W, (Q * (s * (p @ powers))) @ Rt)
    return T / torch.linalg.matrix_norm(T, 2).clamp_min(1)
