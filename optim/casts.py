"""Casts that return the tensor itself where there is nothing to cast.

`x.to(x.dtype)` returns an alias of x, and torch 2.11 compiles an autograd.Function whose output is such an alias with a gradient of zero,
without a word. What is compiled casts by these two functions only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; x itself where it has it."""
    return x if x.dtype == dtype else x.to(dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32; x itself where it is that or finer."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
