"""Generation: how a token is drawn from logits, and a stream of tokens with or without a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.gpt import GPT


def possible_temperature(temperature: float) -> bool:
    """Whether logits can be divided by it in float32; 0 stands for the most likely token."""
    return temperature == 0 or 1e-6 <= temperature <= 1e6


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    temperature: divides the logits, from 1e-6 to 1e6; 0 takes the most likely token. top_k: only the k most likely tokens; None: all.
    top_p: of those, only the most likely ones, until their probability reaches p (nucleus sampling, arXiv 1904.09751); 1: all.

    Raises:
        ValueError: a number is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if (
            not possible_temperature(self.temperature)
            or (self.top_k is not None and self.top_k < 1)
            or not 0 < self.top_p <= 1
        ):
            raise ValueError(
                f"temperature={self.temperature} must be 0, or from 1e-6 to 1e6, top_k={self.top_k} at least 1, and top_p={self.top_p} "
                "above 0 and at most 1"
            )

    def draw(self, logits: Tensor) -> Tensor:
        """A token (B, 1) int64 for each row of logits (B, V) float32, from torch's global generator."""
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        if self.top_k is not None:
            kth = torch.topk(logits, min(self.top_k, logits.size(-1))).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        probs = torch.softmax(logits / self.temperature, -1)
        if self.top_p < 1:
            ordered, order = probs.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # of all more likely tokens; 0 for the first, which always stays
            probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(before >= self.top_p, 0))
        return torch.multinomial(probs, 1)


@torch.no_grad()
def sampled_tokens(model: GPT, x: Tensor, new_tokens: int, sampling: Sampling, cached: bool = True) -> Iterator[Tensor]:
    """Yield the next `new_tokens` tokens (B, 1) after x (B, T) int64, one at a time; the model should be in eval mode.

    The model sees the last block_size tokens. With the cache, a token costs one token's forward pass while all tokens fit into the
    window; afterwards, every token has a new position, and the window is computed again for each new token.
    """
    block = model.config.block_size
    caches = model.new_caches()
    for _ in range(new_tokens):
        if cached and x.size(1) <= block:
            h = model.features(x[:, caches[0].length :], caches)  # the prompt first, then one token
        else:
            h = model.features(x[:, -block:])
        token = sampling.draw(model.logits(h[:, -1]).float())
        yield token
        x = torch.cat([x, token], 1)
