"""What the device itself can do, for comparison with every other number: copies, products, decompositions, attention kernels.

`scripts/bench.py ceilings` runs it. All operands are random, because products of zeros can run faster. If this device or this version of
torch cannot compute something, its row says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import BACKENDS, computed_by
from scripts.timing import NOT_MEASURED, Rows, device, seconds_of, several
from training.signals import Stopped

CEILING_SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"copy": 2**25, "product": 512, "batch": (2, 128), "matrix": (256, 64)} | {"attention": (1, 2, 128, 32)},
    "cuda": {"copy": 2**31, "product": 8192, "batch": (24, 768), "matrix": (3072, 768)}
    | {"attention": (16, 12, 1024, 64)},
}
"""copy: bytes. product: n of n × n. batch: matrices, n. matrix: (m, n). attention: (batch, heads, tokens, width)."""

# Several calls are timed together, so that the time to start them and to wait for the last does not count:
# calls of about _SAMPLE_S seconds, and at most _MOST_TOGETHER.
_SAMPLE_S, _MOST_TOGETHER = 0.01, 100


@dataclass(frozen=True)
class Ceiling:
    """A call, and the amount of its work: `unit` is work per second. `work` is 0 where only the time is of interest.

    make: returns the call, which `what` describes.
    """

    what: str
    make: Callable[[], Callable[[], object]]
    work: float = 0.0
    unit: str = ""


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in float32 products within the block."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def ceilings(sizes: dict[str, Any], where: torch.device) -> Iterator[Ceiling]:
    """Everything that is measured."""

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=where).to(dtype)

    def copy() -> Callable[[], object]:
        a = torch.randint(256, (sizes["copy"],), dtype=torch.uint8, device=where)
        b = torch.empty_like(a)
        return lambda: b.copy_(a)

    yield Ceiling("copy, bytes read and written", copy, 2e-9 * sizes["copy"], "GB/s")

    n = sizes["product"]
    for name, dtype, rounded in (
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
        ("float32", torch.float32, False),
        ("TF32", torch.float32, True),
    ):

        def product(dtype: torch.dtype = dtype, rounded: bool = rounded) -> Callable[[], object]:
            a, b = random(n, n, dtype=dtype), random(n, n, dtype=dtype)

            def call() -> None:
                with tf32(rounded):
                    a @ b

            return call

        yield Ceiling(f"product {n}³, {name}", product, 2e-12 * n**3, "TFLOP/s")

    k, n = sizes["batch"]
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):

        def batched(dtype: torch.dtype = dtype) -> Callable[[], object]:
            a, b = random(k, n, n, dtype=dtype), random(k, n, n, dtype=dtype)
            if dtype == torch.float32:
                return lambda: torch.bmm(a, b)
            return lambda: torch.bmm(a, b, out_dtype=torch.float32)

        yield Ceiling(f"{k} products {n}³, {name} to float32", batched, 2e-12 * k * n**3, "TFLOP/s")

    yield from decompositions(sizes["matrix"], random)
    yield from attention(sizes["attention"], random)


def decompositions(size: tuple[int, int], random: Callable[..., Tensor]) -> Iterator[Ceiling]:
    """Decompositions of an m × n matrix, of its Gram matrix, which has the same singular values, and of 12 Gram matrices at once."""
    m, n = size

    def gram(dtype: torch.dtype, count: int) -> Tensor:
        X = random(count, m, n).to(dtype)
        return X.mT @ X

    def call(function: Callable[..., object], X: Callable[[], Tensor], **options: Any) -> Callable[[], Callable]:
        def make() -> Callable[[], object]:
            made = X()
            return lambda: function(made, **options)

        return make

    shape = f"{m} × {n}"
    yield Ceiling(f"svd of {shape}, float32", call(torch.linalg.svd, lambda: random(m, n), full_matrices=False))
    yield Ceiling(f"svdvals of {shape}, float32", call(torch.linalg.svdvals, lambda: random(m, n)))
    yield Ceiling("eigh of its Gram matrix, float32", call(torch.linalg.eigh, lambda: gram(torch.float32, 1)))
    for count in (1, 12):
        what = f"eigvalsh of {count} Gram {'matrix' if count == 1 else 'matrices'}, float64"
        yield Ceiling(what, call(torch.linalg.eigvalsh, partial(gram, torch.float64, count)))


def attention(size: tuple[int, int, int, int], random: Callable[..., Tensor]) -> Iterator[Ceiling]:
    """Causal attention in bfloat16 by each backend of scaled_dot_product_attention. The work is counted without the mask, as is usual."""
    B, H, T, w = size
    forward = 4e-12 * B * H * T * T * w
    for name in BACKENDS:
        for backward in (False, True):

            def make(name: str = name, backward: bool = backward) -> Callable[[], object]:
                q, k, v = (random(B, H, T, w, dtype=torch.bfloat16).requires_grad_(backward) for _ in range(3))
                out = random(B, H, T, w, dtype=torch.bfloat16)

                def call() -> None:
                    with computed_by(name):
                        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                    if backward:
                        torch.autograd.grad(y, (q, k, v), out)

                return call

            what = f"attention {B}·{H}·{T}·{w}, {name}, {'forward and backward' if backward else 'forward'}"
            yield Ceiling(what, make, forward * (3.5 if backward else 1), "TFLOP/s")


def ceiling_row(ceiling: Ceiling, repeats: int) -> dict[str, Any]:
    """Median seconds of a call, and its work per second."""
    row: dict[str, Any] = {"what": ceiling.what, "median s": NOT_MEASURED, "rate": "", "unit": "", "note": ""}
    try:
        call = ceiling.make()
        call()
        together = min(_MOST_TOGETHER, 1 + int(_SAMPLE_S / seconds_of(call)))
        seconds = [seconds_of(partial(several, call, together)) / together for _ in range(repeats)]
        row |= {"median s": statistics.median(seconds), "all s": seconds}
        if ceiling.work:
            row |= {"rate": ceiling.work / row["median s"], "unit": ceiling.unit}
    except (RuntimeError, TypeError, NotImplementedError) as error:  # no such kernel, dtype or argument here
        row["note"] = " ".join(str(error).split())[:80]
    return row


def ceiling_rows(options: dict[str, Any]) -> Rows:
    """One row for each ceiling."""
    where, rows = device(), []
    with suppress(Stopped):
        for ceiling in ceilings(CEILING_SIZES[where.type], where):
            rows.append(ceiling_row(ceiling, options["repeats"] or 10))
            if where.type == "cuda":
                torch.cuda.empty_cache()
    return rows
