"""Norms of steps and their dual maps: steepest descent under a norm takes the d that maximises ⟨g, d⟩ with ‖d‖ = 1.

Every norm here gives three things: `size`, ‖d‖; `dual`, ‖g‖_* = max ⟨g, d⟩ over ‖d‖ ≤ 1; and `steepest`, the d that attains it. A
loss falls fastest, for a step of size eta, along -eta·steepest(g).

    Entries2       ‖d‖₂ of all entries               g / ‖g‖₂
    EntriesInf     largest entry; ℓ1 → ℓ∞            sign g
    Rows           longest row; ℓ2 → ℓ∞              rows to length 1
    Columns        longest column; ℓ1 → ℓ2           columns to length 1
    Schatten(p)    (Σ σᵖ)^(1/p)                      U diag(σ^(q-1)) Vᵀ / ‖σ‖_q^(q-1),  1/p + 1/q = 1
    Spectral       largest σ; ℓ2 → ℓ2                U Vᵀ

`operator_norm(input, output)` is the norm of a weight W (fan_out, fan_in) as a map between features: the largest ‖W x‖_output with
‖x‖_input ≤ 1. A step of size eta under it changes no feature of an input of size 1 by more than eta. With root mean squares the factors
are those of the spectral condition: a step RMS → RMS is √(fan_out/fan_in)·U Vᵀ.

Sources: Bernstein and Newhouse, Old optimizer, new norm (arXiv 2409.20325) and modular duality (arXiv 2410.21265); Large et al., the modular
norm (arXiv 2405.14813); Yang, Simon, Bernstein, the spectral condition (arXiv 2310.17813). The table of pairs is ours.

Shapes: (..., m, n) for matrices, (..., n) for vectors, float32 or float64; sizes are (...,). Zero has the direction zero, but for Spectral with an
exact polar factor, where any isometry will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linalg import ratio
from .manifolds import Polar, polar


def _unit(g: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """g over its length ‖g‖₂ along dim; zero stays zero. Scaled by a power of 2 first, exactly: squares of small entries would vanish."""
    exponent = torch.frexp(g.abs().amax(dim, keepdim=True)).exponent.clamp(-100, 100)
    g = torch.ldexp(g, -exponent)
    return ratio(g, torch.linalg.vector_norm(g, dim=dim, keepdim=True))


class Norm:
    """A norm of matrices or vectors. A subclass gives the three functions."""

    def size(self, d: Tensor) -> Tensor:
        """‖d‖ (...,)."""
        raise NotImplementedError

    def dual(self, g: Tensor) -> Tensor:
        """‖g‖_* (...,)."""
        raise NotImplementedError

    def steepest(self, g: Tensor) -> Tensor:
        """The d with ‖d‖ = 1 and ⟨g, d⟩ = ‖g‖_*, shaped like g."""
        raise NotImplementedError


@dataclass(frozen=True)
class Entries(Norm):
    """A norm of entries, of a matrix or, with dim = (-1,), of a vector."""

    dim: tuple[int, ...] = (-2, -1)


class Entries2(Entries):
    """‖d‖₂ of all entries: the length of a vector, the Frobenius norm of a matrix. It is its own dual."""

    def size(self, d: Tensor) -> Tensor:
        return torch.linalg.vector_norm(d, dim=self.dim)

    def dual(self, g: Tensor) -> Tensor:
        return self.size(g)

    def steepest(self, g: Tensor) -> Tensor:
        return _unit(g, self.dim)


class EntriesInf(Entries):
    """The largest entry; of a matrix it is the operator norm ℓ1 → ℓ∞. The dual is the sum of all entries' sizes."""

    def size(self, d: Tensor) -> Tensor:
        return d.abs().amax(self.dim)

    def dual(self, g: Tensor) -> Tensor:
        return g.abs().sum(self.dim)

    def steepest(self, g: Tensor) -> Tensor:
        return g.sign()


class Rows(Norm):
    """The longest row: the operator norm ℓ2 → ℓ∞. The dual is the sum of the lengths."""

    along = -1

    def size(self, d: Tensor) -> Tensor:
        return torch.linalg.vector_norm(d, dim=self.along).amax(-1)

    def dual(self, g: Tensor) -> Tensor:
        return torch.linalg.vector_norm(g, dim=self.along).sum(-1)

    def steepest(self, g: Tensor) -> Tensor:
        return _unit(g, self.along)


class Columns(Rows):
    """The longest column: the operator norm ℓ1 → ℓ2. The dual is the sum of the lengths."""

    along = -2


@dataclass(frozen=True)
class Schatten(Norm):
    """(Σ σᵖ)^(1/p) of the singular values, for a finite p above 1; by singular value decompositions.

    At p = 2 it is the Frobenius norm, and for large p the direction tends to U Vᵀ, that of Spectral. Singular values below the rounding of
    the largest count as 0: their small power q - 1 would be near 1.
    """

    p: float

    def __post_init__(self) -> None:
        if not 1 < self.p < float("inf"):
            raise ValueError(f"Schatten's p is {self.p}; give a finite number above 1, or take Spectral")

    @property
    def q(self) -> float:
        """The dual exponent."""
        return self.p / (self.p - 1)

    def size(self, d: Tensor) -> Tensor:
        return self._norm(d, self.p)

    def dual(self, g: Tensor) -> Tensor:
        return self._norm(g, self.q)

    @staticmethod
    def _norm(d: Tensor, p: float) -> Tensor:
        s = torch.linalg.svdvals(d)
        return s[..., 0] * torch.linalg.vector_norm(ratio(s, s[..., :1]), p, dim=-1)  # no power overflows

    def steepest(self, g: Tensor) -> Tensor:
        U, s, Vh = torch.linalg.svd(g, full_matrices=False)
        s = ratio(s, s[..., :1])  # no power overflows
        s = s.pow(self.q - 1) * s.gt(max(g.shape[-2:]) * torch.finfo(s.dtype).eps)
        s = ratio(s, torch.linalg.vector_norm(s, self.p, dim=-1, keepdim=True))  # ‖σ^(q-1)‖_p = ‖σ‖_q^(q-1)
        return (U * s[..., None, :]) @ Vh


@dataclass(frozen=True)
class Spectral(Norm):
    """The largest singular value: the operator norm ℓ2 → ℓ2. The dual is the sum of the singular values.

    sign: (..., m, n) → the polar factor; exact by default, an iteration where steps are many.
    """

    sign: Polar = polar

    def size(self, d: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(d, 2)

    def dual(self, g: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(g, "nuc")

    def steepest(self, g: Tensor) -> Tensor:
        return self.sign(g)


@dataclass(frozen=True)
class Multiple(Norm):
    """factor·‖d‖ for a norm of the same space."""

    norm: Norm
    factor: float

    def size(self, d: Tensor) -> Tensor:
        return self.factor * self.norm.size(d)

    def dual(self, g: Tensor) -> Tensor:
        return self.norm.dual(g) / self.factor

    def steepest(self, g: Tensor) -> Tensor:
        return self.norm.steepest(g) / self.factor


# ---- norms of features, and of weights as maps between them ----

FEATURES = {
    "one": lambda x: x.abs().sum(-1),
    "l2": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "rms": lambda x: x.square().mean(-1).sqrt(),
    "max": lambda x: x.abs().amax(-1),
}
"""Norms of features x (..., n) by name. `one`: the sum of entries, 1 for a token as a one-hot vector; `max`: ℓ∞."""

_OPERATORS: dict[str, dict[str, type[Norm]]] = {
    "one": {"l2": Columns, "max": EntriesInf},
    "l2": {"l2": Spectral, "max": Rows},
}
PAIRS = tuple((i, o) for i in ("one", "l2", "rms") for o in ("l2", "rms", "max"))
"""The (input, output) for which `operator_norm` has a norm: others have no dual map in closed form."""


def operator_norm(input: str, output: str, fan_out: int, fan_in: int, sign: Polar = polar) -> Norm:
    """The norm of W (fan_out, fan_in) as a map of features, by the names of their norms; `rms` is l2 / √n on either side.

    Raises:
        ValueError: a pair that is not in PAIRS.
    """
    if (input, output) not in PAIRS:
        known = ", ".join(f"{i} → {o}" for i, o in PAIRS)
        raise ValueError(f"there is no norm {input} → {output}; choose one of {known}")
    factor = (fan_in**0.5 if input == "rms" else 1.0) / (fan_out**0.5 if output == "rms" else 1.0)
    kind = _OPERATORS["l2" if input == "rms" else input]["l2" if output == "rms" else output]
    return Multiple(Spectral(sign) if kind is Spectral else kind(), factor)


def vector_norm(input: str, output: str, length: int) -> Norm:
    """The norm of a vector v (length,): of a bias, if the input is `one`, the constant 1, else of diag(v), a gain of each feature.

    Raises:
        ValueError: a bias into features measured by `one`, or a gain whose norm depends on more than its largest entry.
    """
    if input == "one" and output in ("l2", "rms"):
        return Multiple(Entries2((-1,)), 1.0 if output == "l2" else length**-0.5)
    if (input, output) == ("one", "max") or input == output != "one":
        return EntriesInf((-1,))
    raise ValueError(f"there is no norm {input} → {output} of a vector; choose one → l2, rms or max, or two equal ones")
