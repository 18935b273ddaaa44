"""Who computes what: one owner for every matrix, the buckets of each rank, and what is sent after each.

`groups` are parameter groups of ManifoldMuon, `world` is the number of ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .manifolds import is_wide, tall
from .stack import Stack, StepRule, row_blocks, whole_shape


@cache
def step_flops(rule: StepRule, m: int, n: int, manifold: str) -> int:
    """Operations (two a multiply-add) in the products of one step of one tall (m, n) matrix, counted on tensors without storage."""
    W, eta = torch.empty(1, m, n, device="meta"), torch.empty((), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rule(Stack(W, W, manifold, eta, 0.0, eta.bool(), W[:, 0, 0], 0))
    return counter.get_total_flops()


def share_out(costs: Sequence[float], world: int) -> list[int]:
    """An owner (0..world-1) for each cost, greedily, largest first, so that the heaviest rank is as light as it can be made cheaply."""
    load = [(0.0, rank) for rank in range(world)]
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        total, rank = heapq.heappop(load)
        owners[i] = rank
        heapq.heappush(load, (total + costs[i], rank))
    return owners


def choose_owners(groups: Iterable[dict[str, Any]], rule: StepRule, world: int) -> dict[Tensor, int]:
    """The rank that computes each parameter's step, balanced by counted operations. `groups`: see ManifoldMuon."""
    params = [(p, group) for group in groups for p in group["params"]]
    if world == 1:
        return {p: 0 for p, _ in params}
    shapes = [(*tall(row_blocks(p, group["blocks"])).shape[-2:], group["manifold"]) for p, group in params]
    costs = [group["blocks"] * step_flops(rule, *shape) for shape, (_, group) in zip(shapes, params)]
    return dict(zip((p for p, _ in params), share_out(costs, world)))


def members_of_buckets(
    groups: Iterable[dict[str, Any]], owners: Mapping[Tensor, int], world: int
) -> list[list[tuple[dict[str, Any], list[Tensor]]]]:
    """For each rank its buckets: (group, parameters of it that the rank owns and that have one tall shape and dtype)."""
    buckets: list[list[tuple[dict[str, Any], list[Tensor]]]] = [[] for _ in range(world)]
    for group in groups:
        alike: dict[tuple[Any, ...], list[Tensor]] = {}
        for p in group["params"]:
            cut = row_blocks(p, group["blocks"])
            # Where mean squares of rows are kept, each orientation has a bucket of its own; where blocks share a length, each whole shape.
            apart = (is_wide(cut) and group["row_beta"] is not None, whole_shape(p, group))
            key = (owners[p], *tall(cut).shape[-2:], p.dtype, apart)
            if key not in alike:
                alike[key] = []
                buckets[owners[p]].append((group, alike[key]))
            alike[key].append(p)
    return buckets


def plan_messages(
    groups: Iterable[dict[str, Any]], owners: Mapping[Tensor, int], world: int
) -> list[list[tuple[int, list[Tensor]]]]:
    """What is sent after the i-th bucket of every rank: (owner, parameters). All ranks must send and receive in one order."""
    buckets = members_of_buckets(groups, owners, world)
    return [
        [(rank, own[i][1]) for rank, own in enumerate(buckets) if i < len(own)] for i in range(max(map(len, buckets)))
    ]
