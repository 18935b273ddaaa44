"""Cross entropy of a linear head without the full matrix of logits.

At 124M parameters the logits of 16 windows of 1024 tokens are 3.3 GB in float32, more than all weights and activations of a small
run; they are only ever needed a few rows at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Above this many logits (256 MiB in float32) the head is computed in chunks; below, one product is faster.
_FULL_LOGITS = 2**26
_CHUNK_LOGITS = 2**25


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of h Wᵀ, a chunk of rows at a time; the gradient is computed with the forward, so no logit is kept or redone."""

    @staticmethod
    def forward(ctx, h: Tensor, W: Tensor, y: Tensor, rows: int) -> Tensor:
        need = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=torch.float32, device=h.device)
        grad_h = torch.empty_like(h) if need else None
        grad_W = torch.zeros_like(W, dtype=torch.float32) if need else None
        for start in range(0, h.size(0), rows):
            part = slice(start, start + rows)
            logits = (h[part] @ W.T).float()
            loss += F.cross_entropy(logits, y[part], reduction="sum")
            if need:
                probs = torch.softmax(logits, dim=-1)
                probs.scatter_add_(1, y[part, None], torch.full_like(probs[:, :1], -1.0))
                probs = (probs / h.size(0)).to(h.dtype)
                grad_h[part] = probs @ W
                grad_W += probs.T @ h[part]
        if need:
            ctx.save_for_backward(grad_h, grad_W.to(W.dtype))
        return loss / h.size(0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_W = ctx.saved_tensors
        return grad_h * grad.to(grad_h.dtype), grad_W * grad.to(grad_W.dtype), None, None


def linear_cross_entropy(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """Mean cross entropy in nats (0-d float32) of the logits h Wᵀ against y.

    Args:
        h: (N, d) in the dtype of the matrix products.
        W: (V, d), any float dtype; cast to h's.
        y: (N,) int64.
    """
    W = W.to(h.dtype)
    if h.size(0) * W.size(0) <= _FULL_LOGITS:
        return F.cross_entropy((h @ W.T).float(), y)
    return _ChunkedCrossEntropy.apply(h, W, y, max(1, _CHUNK_LOGITS // W.size(0)))
