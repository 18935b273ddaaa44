"""The certified step said as the mathematics says it: one matrix, float64, eigendecompositions. The oracle of tests/test_lmo.py.

Slow by design (the Lyapunov equation of Su's step is solved as a dense linear system): for n up to about 20. Formulas as in
optim/lmo.py; functions of matrices act on singular values here, and nothing is kept in Gram form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optim.gram import CAP, SIGN
from optim.lmo import Solver
from optim.manifolds import MANIFOLDS


def basis(n: int, manifold: str) -> list[Tensor]:
    """A basis of the symmetric n × n matrices in the range of P."""
    matrices = []
    for i in range(n):
        for j in range(i, n):
            E = torch.zeros(n, n, dtype=torch.float64)
            E[i, j] = E[j, i] = 1
            if MANIFOLDS[manifold].gram_project(E).any():
                matrices.append(E)
    return matrices


def solve_symmetric(operator, rhs: Tensor, manifold: str) -> Tensor:
    """The symmetric L = P(L) with operator(L) = rhs, by dense least squares over a basis; zero where P = 0."""
    matrices = basis(rhs.size(-1), manifold)
    if not matrices:
        return torch.zeros_like(rhs)
    columns = torch.stack([operator(E).flatten() for E in matrices], dim=1)
    weights = torch.linalg.lstsq(columns, rhs.flatten()[:, None], driver="gelsd").solution[:, 0]
    return sum(w * E for w, E in zip(weights, matrices))


class ReferenceProblem:
    """One step problem: W (m, n) on the manifold, G (m, n) scaled to Frobenius norm 1, both tall float64."""

    def __init__(self, W: Tensor, G: Tensor, manifold: str, solver: Solver) -> None:
        self.W, self.G = W.double(), G.double() / torch.linalg.matrix_norm(G.double())
        self.scale = torch.linalg.matrix_norm(G.double())
        self.D = self.W.T @ self.W
        self.manifold, self.solver = manifold, solver

    def project(self, X: Tensor) -> Tensor:
        """P(X + Xᵀ)."""
        return MANIFOLDS[self.manifold].gram_project(X + X.T)

    def normal_part(self, A: Tensor) -> Tensor:
        """W K, with K from the least-squares conditions."""
        return self.W @ solve_symmetric(lambda K: self.project(self.D @ K), self.project(self.W.T @ A), self.manifold)

    def matrix_sign(self, L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A = X Z and Z = (XᵀX + r)^(-1/2) for X = G + 2WL, and the dual bound."""
        X = self.G + 2 * self.W @ L
        _, s, Vh = torch.linalg.svd(X, full_matrices=False)
        r = self.solver.ridge * (s**4).sum().sqrt()
        z = (s**2 + r) ** -0.5
        Z = Vh.T @ torch.diag(z) @ Vh
        return X @ Z, Z, (s**2 * z).sum() + 0.5 * r * z.sum()

    def least_squares(self) -> Tensor:
        """L that makes G + 2WL tangent."""
        return solve_symmetric(lambda L: self.project(2 * self.D @ L), -self.project(self.W.T @ self.G), self.manifold)

    def su(self, A: Tensor, Z: Tensor) -> Tensor:
        """dL with P(D dL Z + Z dL D) = -H/2."""
        H = self.project(self.W.T @ A)
        return solve_symmetric(lambda L: self.project(self.D @ L @ Z), -H / 2, self.manifold)


def cap(T: Tensor, frac: float, solver: Solver) -> Tensor:
    """Singular values of T above 1 lowered as optim.lmo.cap lowers them, without the projection that follows."""
    U, s, Vh = torch.linalg.svd(T, full_matrices=False)
    E = s**2 - 1
    x = E / max(1.05 * float(s[0]) ** 2 - 1, 1.1)
    for a, b, c in SIGN:
        x = a * x + b * x**3 + c * x**5
    excess = (E + E * x) / 2
    c1, c2, c3 = CAP
    lower = excess * (c1 + c2 * excess + c3 * excess**2)
    return U @ torch.diag(s * (1 + (solver.cap_relaxation - frac) * lower)) @ Vh


def anderson(history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The next multiplier from pairs (L, f) of iterates and Su steps: their best affine combination, moved by its step."""
    L, f = history[-1]
    if len(history) == 1:
        return L + f
    dF = torch.stack([(f - g).flatten() for _, g in history[:-1]], dim=1)
    normal = dF.T @ dF
    normal = normal + 1e-6 * torch.trace(normal) * torch.eye(len(normal), dtype=torch.float64)
    normal = normal + torch.finfo(torch.float32).tiny * torch.eye(len(normal), dtype=torch.float64)
    weights = torch.linalg.solve(normal, dF.T @ f.flatten())
    return L + f - sum(w * (L + f - M - g) for w, (M, g) in zip(weights, history[:-1]))


def reference_direction(W: Tensor, G: Tensor, manifold: str, solver: Solver) -> tuple[Tensor, dict[str, float]]:
    """The feasible direction (m, n) float64 of tall W, G, and its frac, feas, norm and bound, as optim.lmo.solve gives them."""
    problem = ReferenceProblem(W, G, manifold, solver)
    n = W.size(-1)
    if manifold == "stiefel" and W.size(-2) == n and solver.name != "dual_ascent":
        K = problem.W.T @ problem.G
        U, s, Vh = torch.linalg.svd((K - K.T) / 2)
        return problem.W @ U @ Vh, {"frac": 0.0, "feas": 1.0, "norm": 1.0, "bound": float(s.sum() * problem.scale)}
    L = problem.least_squares()
    if solver.name == "dual_ascent":
        L = -0.25 * problem.project(problem.W.T @ problem.G)
    history: list[tuple[Tensor, Tensor]] = []
    candidates: list[tuple[float, float, float, Tensor]] = []  # feasible value, norm, frac, T
    bound = torch.inf

    def offer(A: Tensor, frac: float | None = None) -> tuple[Tensor, float]:
        normal = problem.normal_part(A)
        frac = float(torch.linalg.matrix_norm(normal) / torch.linalg.matrix_norm(A)) if frac is None else frac
        norm = float(torch.linalg.matrix_norm(A - normal, 2))
        candidates.append((float((problem.G * (A - normal)).sum()) / max(1, norm), norm, frac, A - normal))
        return A - normal, frac

    for k in range(solver.calls):
        A, Z, dual = problem.matrix_sign(L)
        bound = min(bound, float(dual))
        T, frac = offer(A)
        if solver.name == "dual_ascent":
            candidates = candidates[-1:]  # as published: the last, not the best
            H = problem.project(problem.W.T @ A)
            L = L - solver.alpha * (1 - k / solver.calls) / problem.scale * H
        elif solver.name == "su":
            L = L + min(1.2 + 0.2 * k, solver.relaxation) * problem.su(A, Z)
        elif solver.name == "su_anderson":
            history = [*history, (L, problem.su(A, Z))][-(solver.memory + 1) :]
            L = anderson(history)
    for _ in range(solver.cap):
        T, _ = offer(cap(T, frac, solver), frac)
    value, norm, frac, T = max(candidates, key=lambda c: c[0])
    certificate = {"frac": frac, "feas": value / bound, "norm": norm, "bound": bound * float(problem.scale)}
    return T / max(1.0, norm), certificate
