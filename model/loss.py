"""Cross entropy of a linear head, without the full matrix of logits where that would be too large.

For GPT-2 124M, the logits of 16 windows of 1024 tokens take 3.3 GB in float32. Only a few rows of them are needed at a time. But
torch.compile unrolls a loop, so every chunk of rows makes the graph longer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from optim.linalg import cast, first_derivative_only

# Up to this many logits (256 MiB in float32) one product is faster than chunks of _CHUNK_LOGITS.
_FULL_LOGITS = 2**26
_CHUNK_LOGITS = 2**25
# On CUDA a chunk has this many rows: they fill the device, and there are few chunks to compile (8 for 65,536 tokens).
_CUDA_ROWS = 8192
# Bytes for each logit in a compiled head, which keeps 16-bit logits and their gradients, and the largest share of the memory for them.
_COMPILED_BYTES = 4
_SHARE = 0.25


def capped(z: Tensor, cap: float | None) -> Tensor:
    """c·z/√(z² + c²), which stays within ±c, as in the public speedruns (github.com/KellerJordan/modded-nanogpt); None: z itself."""
    return z if cap is None else cap * z * torch.rsqrt(z.square() + cap**2)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of the logits, a chunk of rows at a time. The forward pass also computes the gradient, so that no logit is kept."""

    @staticmethod
    def forward(ctx, h: Tensor, W: Tensor, y: Tensor, rows: int, b: Tensor | None, cap: float | None) -> Tensor:
        need = any(ctx.needs_input_grad)
        ctx.biased = b is not None
        loss = torch.zeros((), dtype=torch.float32, device=h.device)
        grad_h = torch.empty_like(h) if need else None
        grad_W = torch.zeros_like(W, dtype=torch.float32) if need else None
        grad_b = torch.zeros(W.size(0), dtype=torch.float32, device=W.device) if need else None
        for start in range(0, h.size(0), rows):
            part = slice(start, start + rows)
            z = cast(h[part] @ W.T if b is None else F.linear(h[part], W, b), torch.float32)
            logits = capped(z, cap)
            loss += F.cross_entropy(logits, y[part], reduction="sum")
            if grad_h is not None and grad_W is not None and grad_b is not None:
                probs = torch.softmax(logits, dim=-1)
                probs.scatter_add_(1, y[part, None], torch.full_like(probs[:, :1], -1.0))
                if cap is not None:
                    probs *= (1 + (z / cap).square()) ** -1.5  # the derivative of capped
                grad_b += probs.sum(0) / h.size(0) if ctx.biased else 0
                probs = cast(probs / h.size(0), h.dtype)
                grad_h[part] = probs @ W
                grad_W += probs.T @ h[part]
        if grad_h is not None and grad_W is not None and grad_b is not None:
            ctx.save_for_backward(grad_h, cast(grad_W, W.dtype), cast(grad_b, W.dtype))
        return loss / h.size(0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only()
        grad_h, grad_W, grad_b = (g * cast(grad, g.dtype) for g in ctx.saved_tensors)
        return grad_h, grad_W, None, None, grad_b if ctx.biased else None, None


def _device_bytes(index: int) -> int:
    """Total memory of a CUDA device; see `mark_constants`."""
    return torch.cuda.get_device_properties(index).total_memory


def mark_constants() -> None:
    """Make `_device_bytes` a constant for torch.compile. Call it before a model is compiled; it imports torch._dynamo, which takes seconds."""
    torch.compiler.assume_constant_result(_device_bytes)


def rows_at_once(rows: int, vocab: int, device: torch.device) -> int:
    """How many rows of h are multiplied by the head at a time; all `rows` means full logits."""
    if rows * vocab <= _FULL_LOGITS:
        return rows
    if device.type != "cuda":
        return max(1, _CHUNK_LOGITS // vocab)
    # Without torch.compile, the float32 logits, their softmax and its gradient are kept too: five times as much.
    fits = torch.compiler.is_compiling() and rows * vocab * _COMPILED_BYTES <= _SHARE * _device_bytes(device.index)
    return rows if fits else _CUDA_ROWS


def linear_cross_entropy(h: Tensor, W: Tensor, y: Tensor, b: Tensor | None = None, cap: float | None = None) -> Tensor:
    """Mean cross entropy in nats (0-d float32) of the logits h Wᵀ + b, capped unless `cap` is None, against y.

    Args:
        h: (N, d) in the dtype of the matrix products.
        y: (N,) int64, in [0, V): no value means "ignore".
        b: (V,), cast to h's dtype; None: no bias.
    """
    W, b = cast(W, h.dtype), None if b is None else cast(b, h.dtype)
    if not torch.is_grad_enabled():  # otherwise the forward pass would compute their gradients
        h, W, b = h.detach(), W.detach(), None if b is None else b.detach()
    rows = rows_at_once(h.size(0), W.size(0), h.device)
    if rows >= h.size(0):
        return F.cross_entropy(capped(cast(h @ W.T if b is None else F.linear(h, W, b), torch.float32), cap), y)
    return _ChunkedCrossEntropy.apply(h, W, y, rows, b, cap)
