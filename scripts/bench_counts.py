"""The work of one step of Hetero at GPT-2 124M, counted on tensors without storage: operations in products, kernels, bytes.

Nothing is timed. The bytes are those of all kernels except the products, after torch.compile has fused them, each buffer of a kernel counted
once. The fusion is that for a CPU; a GPU's may differ. The prediction is the time of the products plus the time of the bytes, at rates that
others measured on an H200-class device. `bench.py optimizer` on a GPU measures the same step.
"""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from optim import linalg
from optim.certified import CertifiedStep, effort_of, step
from optim.linalg import Products, exact_sums
from optim.manifolds import MANIFOLDS
from optim.ownership import step_flops
from scripts.timing import Rows

GROUPS = [(12, 2304, 768, "stiefel"), (12, 768, 768, "stiefel"), (24, 3072, 768, "dgram")]  # k, m, n of Hetero
PRODUCT_RATES = (650e12, 750e12)  # operations in 16-bit products with float32 sums, of an H200-class device
BYTES_PER_S = 3.8e12  # of its memory


class _OnDevice(Products):
    """float16 products as a GPU computes them. A CPU only emulates them."""

    def __init__(self) -> None:
        super().__init__("float16")

    def __call__(self, X: Tensor, Y: Tensor) -> Tensor:
        return X.to(self.dtype) @ Y.to(self.dtype)

    def add(self, C: Tensor, beta: float, X: Tensor, Y: Tensor, alpha: float = 1.0) -> Tensor:
        return torch.baddbmm(*(Z.to(self.dtype) for Z in (C, X, Y)), beta=beta, alpha=alpha)

    def in_float32(self, X: Tensor, Y: Tensor) -> Tensor:
        return self(X, Y).float()


class _Counted(Exception):
    """Raised after counting, before code is generated."""


def fused(k: int, m: int, n: int, manifold: str, quality: str) -> tuple[int, int]:
    """How many kernels other than products torch.compile launches in one step of k tall (m, n) matrices, and their bytes."""
    found = [0, 0]

    def count(graph: GraphLowering) -> None:
        graph.init_wrapper_code()
        graph._update_scheduler()
        for node in graph.scheduler.nodes:
            if not isinstance(node, (ExternKernelSchedulerNode, NopKernelSchedulerNode)):
                found[0] += 1
                found[1] += node.get_read_write_buffers_sizes()
        raise _Counted

    def one(W: Tensor, G: Tensor, eta: Tensor, level: Tensor, skip: Tensor) -> tuple[Tensor, ...]:
        M = MANIFOLDS[manifold]
        return tuple(
            x for x in step(W, G, eta, level, skip, M, effort_of(M, quality), _OnDevice(), decay=0.1) if x is not None
        )

    linalg._cap_fit.cache_clear()  # it may hold tensors with storage
    with (
        FakeTensorMode(),
        torch.no_grad(),
        exact_sums(torch.device("cpu")),
        patch.object(GraphLowering, "codegen", count),
    ):
        given = [torch.empty(k, m, n), torch.empty(k, m, n), torch.empty(()), torch.empty(k), torch.empty(()).bool()]
        program = make_fx(one, decomposition_table=select_decomp_table())(*given)
        try:
            compile_fx(program, given)
        except Exception as error:
            if "_Counted" not in repr(error):
                raise
    linalg._cap_fit.cache_clear()
    return found[0], found[1]


def counted_steps() -> Rows:
    """A row for each quality of the step."""
    rows = []
    for quality in ("default", "high"):
        rule = CertifiedStep(quality=quality, products="float16")
        flops = sum(k * step_flops(rule, m, n, manifold) for k, m, n, manifold in GROUPS)
        kernels, size = (sum(values) for values in zip(*(fused(*group, quality) for group in GROUPS)))
        slow, fast = (1e3 * (flops / rate + size / BYTES_PER_S) for rate in PRODUCT_RATES)
        rows.append(
            {
                "quality": quality,
                "TFLOP in products": flops / 1e12,
                "kernels beside them": kernels,
                "their GB": size / 1e9,
                "ms, predicted, at 650 TFLOP/s": slow,
                "ms, predicted, at 750 TFLOP/s": fast,
            }
        )
    return rows
