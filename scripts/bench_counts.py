"""What one step of Hetero at GPT-2 124M consists of, counted on tensors without storage: products, launches and bytes.

Nothing is timed. The prediction divides operations and bytes by what an H200-class device was seen to reach elsewhere; the first
measurement (`bench.py optimizer` on a GPU) is there to judge it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from optim.certified import CertifiedStep, effort_of, step
from optim.linalg import Products
from optim.manifolds import MANIFOLDS

GROUPS = [(12, 2304, 768, "stiefel"), (12, 768, 768, "stiefel"), (24, 3072, 768, "dgram")]  # k, m, n of Hetero
PRODUCTS_PER_S, BYTES_PER_S = 700e12, 3.8e12  # 16-bit products with float32 sums, and memory, of an H200-class device
_PRODUCTS = ("bmm", "baddbmm", "mm", "addmm")
_VIEWS = (
    "view",
    "transpose",
    "expand",
    "unsqueeze",
    "squeeze",
    "select",
    "slice",
    "detach",
    "diagonal",
    "alias",
    "permute",
)


class _Traffic(TorchDispatchMode):
    """Counts launches, and the bytes that everything but products reads and writes if every operation is a launch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not name.strip("_").startswith(_VIEWS):
            self.launches += 1
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            if name not in _PRODUCTS or any(
                1 in t.shape[-2:] for t in tensors
            ):  # a product with a vector is all memory
                self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


def measure() -> list[dict[str, Any]]:
    """A row for each quality: TFLOP in 16-bit products; launches and elementwise GB of the float32 form, operation by operation; predictions."""
    rows = []
    for quality in ("default", "high"):
        rule = CertifiedStep(quality=quality)
        flops = sum(k * rule.flops(m, n, manifold) for k, m, n, manifold in GROUPS)
        traffic, counter = _Traffic(), FlopCounterMode(display=False)
        with traffic, counter, torch.no_grad():
            for k, m, n, manifold in GROUPS:
                W, G = (torch.empty(k, m, n, device="meta") for _ in range(2))
                M = MANIFOLDS[manifold]
                step(W, G, torch.empty((), device="meta"), M, effort_of(M, quality), Products("float32"), decay=0.1)
        rows.append(
            {
                "quality": quality,
                "TFLOP, 16-bit products": flops / 1e12,
                "launches, float32 form": traffic.launches,
                "elementwise GB, float32 form, unfused": traffic.bytes / 1e9,
                "products ms, predicted": 1e3 * flops / PRODUCTS_PER_S,
                "elementwise ms, unfused, predicted": 1e3 * traffic.bytes / BYTES_PER_S,
            }
        )
    return rows
