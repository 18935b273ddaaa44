"""How a sublayer's output joins the residual stream: one small class a rule, chosen by `residual=`.

A rule owns whatever norm it needs and knows nothing of the sublayer, which is any map (B, T, d) → (B, T, d). The rules of a block are
named `ln_1` and `ln_2`, so that pre-norm keeps nanoGPT's parameter names.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Sublayer = Callable[[Tensor], Tensor]


class PreNorm(nn.LayerNorm):
    """x + f(LayerNorm(x)): GPT-2's rule."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__(width, bias=bias)

    def join(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """The stream (B, T, d) after the sublayer."""
        return x + sublayer(self(x))


RESIDUAL_RULES: dict[str, type[nn.Module]] = {"pre_norm": PreNorm}
"""Residual rules by the name that `residual=` gives."""
