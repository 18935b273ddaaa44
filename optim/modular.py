"""Steepest descent in the norm that each parameter names: `optim=modular`.

    buf ← momentum·buf + g;   G = g + momentum·buf with Nesterov, else buf;   W ← (1 - lr·decay) W - lr·steepest(G)

steepest is that of optim/norms.py: every parameter moves by lr in its own norm, so no feature of an input of size 1 changes by more. A
tied table moves as an embedding, and changes logits by more.
Source: the modular norm (arXiv 2405.14813, 2410.21265) without its masses: all modules have the same share of the step, as in Scion
(arXiv 2502.07529). [our choice]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .linalg import exact_sums
from .manifolds import polar
from .msign import msign
from .norms import Norm, operator_norm, vector_norm

SIGN_STEPS = 8  # Polar Express steps; singular values from 1e-3 of ‖G‖_F up come to 1 within .1% in float32, .5% in bfloat16 (CUDA)


def as_operator(p: Tensor, input: str) -> Tensor:
    """A parameter as a map (fan_out, fan_in), a view: tables, whose input is `one`, keep the output of each input in a row."""
    return p.mT if p.ndim == 2 and input == "one" else p


def norm_of(p: Tensor, input: str, output: str, exact: bool = False) -> Norm:
    """The norm of a parameter (at most 2-D; a number is a vector of one) as `as_operator` gives it.

    Its matrix sign is made by SVD if `exact`, else by an iteration.

    Raises:
        ValueError: there is no such norm, or the parameter has more dimensions.
    """
    if p.ndim < 2:
        return vector_norm(input, output, p.numel())
    if p.ndim > 2:
        raise ValueError(f"Modular takes numbers, vectors and matrices, not a tensor of shape {tuple(p.shape)}")
    dtype = torch.bfloat16 if p.is_cuda else torch.float32
    sign = polar if exact else partial(msign, steps=SIGN_STEPS, dtype=dtype)
    fan_out, fan_in = as_operator(p, input).shape
    return operator_norm(input, output, fan_out, fan_in, sign)


class Modular(torch.optim.Optimizer):
    """Momentum and steepest descent, each parameter in its own norm.

    Args:
        groups: dicts of "params" (at most 2-D), "input" and "output", names of FEATURES (optim/norms.py); any of the settings below may
            be given per group.
        lr: the size of a step in the parameter's norm.
        momentum, nesterov, weight_decay: see above; the decay is decoupled, per unit of lr.

    All ranks compute all steps alike. Raises ValueError where a parameter has no such norm.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, momentum: float, nesterov: bool, weight_decay: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                norm_of(p, group["input"], group["output"])  # refuses what has none
                self.state[p] = {"momentum": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # one signature for both forms
        """One update of every parameter that has a gradient; none where `found_inf` (0-d float, 1 for true) is set.

        closure: as in torch, called first: it computes the gradients and returns the loss, which is then returned.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buf, factor = self.state[p]["momentum"], group["momentum"]
                advanced = p.grad + factor * buf
                G = p.grad + factor * advanced if group["nesterov"] else advanced
                norm = norm_of(p, group["input"], group["output"])
                with exact_sums(p.device):
                    d = as_operator(norm.steepest(as_operator(G, group["input"])), group["input"])
                new = p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * d.to(p.dtype)
                if self.found_inf is not None:
                    skip = self.found_inf.bool()
                    new, advanced = torch.where(skip, p, new), torch.where(skip, buf, advanced)
                p.copy_(new)
                buf.copy_(advanced)
        return loss
