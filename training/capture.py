"""The update of all optimizers as a CUDA graph: one launch instead of some hundreds.

A graph repeats the recorded kernels on the recorded addresses. So weights, states, learning rates and the flag of a refused update stay
where they are, and only their contents change; gradients are copied to where the graph reads them. What the host decides is not in a
graph: the rounds of the retraction, which follow from the levels of the last step. Each choice has its own graph. A step that is watched
for certificates, and one that needs an exact retraction, is made without a graph, on the same tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.stack import EXACTLY

WARM_UP = 3
"""Updates that are made without a graph before one is recorded: they create states, compile, and choose kernels."""

Update = Callable[[Tensor, Sequence[int]], None]
Record = Callable[[Callable[[], None]], Callable[[], None]]


class CapturedUpdate:
    """`update(skip, levels)` of Optimizers, replayed from a graph where that is possible.

    Args:
        update: what is recorded, from the gradients of `params` on. It must not wait for the device.
        record: records a call, without making it, and returns its replay. On a GPU: CudaGraphs.
    """

    def __init__(self, update: Update, params: Sequence[Tensor], record: Record) -> None:
        self.update, self.params, self.record = update, params, record
        self.skip = torch.zeros((), dtype=torch.bool, device=params[0].device)
        self.gradients: list[Tensor] = []  # where the graphs read them
        self.made: Counter[tuple[int, ...]] = Counter()
        self.graphs: dict[tuple[int, ...], Callable[[], None]] = {}

    def __call__(self, skip: Tensor, levels: Sequence[int], plain: bool) -> None:
        """One update; `plain`: without a graph. Every parameter must have a gradient."""
        self.skip.copy_(skip)
        key = tuple(levels)
        if plain or max(key, default=0) >= EXACTLY or self.made[key] < WARM_UP:
            self.made[key] += 1
            self.update(self.skip, key)
            return
        given: Any = [p.grad for p in self.params]
        self.gradients = self.gradients or [torch.empty_like(g) for g in given]
        torch._foreach_copy_(self.gradients, given)
        if key not in self.graphs:
            self._set(self.gradients)
            try:
                self.graphs[key] = self.record(lambda: self.update(self.skip, key))
            finally:
                self._set(given)
        self.graphs[key]()

    def _set(self, gradients: Sequence[Tensor]) -> None:
        for p, g in zip(self.params, gradients):
            p.grad = g


class CudaGraphs:
    """Records calls as CUDA graphs. They share their memory, because one is replayed at a time and leaves nothing there that is read later."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        """Record a call, without making it; returns its replay."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's, may call CUDA meanwhile.
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            call()
        replay: Callable[[], None] = graph.replay
        return replay
