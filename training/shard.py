"""Parameters of which every number lies on one rank only, for models that do not fit one device (`launcher.shard=fsdp`).

    owned    a matrix of ManifoldMuon lies whole on the rank that computes its step, since a constraint needs all of it (training/loans.py)
    split    what AdamW updates is split by rows over the ranks, by torch's FSDP2 (`fully_shard`)
    scalar   a single number, which FSDP2 does not split, is on every rank

A run starts and is resumed whole, and is sharded then. Gradients are summed after every micro-batch, so none is ever kept whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.checkpoint import save_sharded
from training.loans import Lender
from training.machine import compiled
from training.optimizers import Optimizers
from training.ranks import Ranks
from training.settings import Settings


class Sharded:
    """Parameters and the state of their optimizers, without copies; see Placement. A block is a member of a ModuleList."""

    def __init__(self, model: nn.Module, optimizers: Optimizers, ranks: Ranks, cfg: Settings) -> None:
        self.model, self.ranks = model, ranks
        self.replica = self.evaluated = model
        self.lends = True
        blocks = [block for part in model.modules() if isinstance(part, nn.ModuleList) for block in part]
        for block in blocks:  # each is compiled alone, without the communication before and after it
            block.forward = compiled(cast(nn.Module, block.forward), cfg, ranks.device)
        self.owners = optimizers.muon.owners if optimizers.muon else {}
        self.lender = Lender(model, blocks, self.owners, ranks)
        self.scalars = {name: p for name, p in model.named_parameters() if p.ndim == 0}
        unsplit = cast(set[nn.Parameter], {*self.owners, *self.scalars.values()})
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        for block in blocks:
            if any(p not in unsplit for p in block.parameters()):
                fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=unsplit)
        fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=unsplit)
        self.params = dict(model.named_parameters())
        optimizers.place(self.params, _split_like)
        split = [isinstance(p, DTensor) for p in self.params.values()]
        counted = [s or self.owner_of(p) == ranks.rank for s, p in zip(split, self.params.values())]
        self.split = torch.tensor(split, device=ranks.device)  # (N,)
        self.counted = torch.tensor(counted, device=ranks.device)  # (N,): whether the norm of this rank's part counts

    def owner_of(self, p: Tensor) -> int:
        """The rank that holds a parameter which is not split; rank 0 stands for all that hold a scalar."""
        return self.owners.get(p, 0)

    def gradients(self) -> list[Tensor]:
        for p in self.scalars.values():
            self.ranks.all_reduce_mean(cast(Tensor, p.grad))
        return [self._part(p) for p in self.params.values()]

    def _part(self, p: Tensor) -> Tensor:
        """This rank's part of the gradient of a parameter; no numbers, of a matrix of another rank."""
        if isinstance(p.grad, DTensor):
            return p.grad.to_local()
        return torch.empty(0, device=p.device) if p.grad is None else p.grad

    def whole_norms(self, norms: Tensor) -> Tensor:
        norms = norms.double()
        parts = torch.where(self.counted, torch.where(self.split, norms.square(), norms), 0)
        sums = self.ranks.sum(parts)
        return torch.where(self.split, sums.sqrt(), sums).float()

    @contextmanager
    def whole(self) -> Iterator[Mapping[str, Tensor]]:
        parts = [part for part in self.model.modules() if isinstance(part, FSDPModule)]
        with self.lender.all_spread():
            for part in parts:
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()
            try:
                yield dict(self.model.named_parameters())
            finally:
                for part in parts:
                    part.reshard()
                    part.set_reshard_after_forward(part is not self.model, recurse=False)

    def check(self) -> None:
        if self.scalars:
            self.ranks.require_equal(self.scalars)

    def save(self, directory: Path, step: int, state: dict[str, Any], keep: int, metric: float | None) -> None:
        names = {name for name, p in self.params.items() if self.owners.get(p, self.ranks.rank) == self.ranks.rank}
        names |= {name for name, _ in self.model.named_buffers()}
        held = {name: t for name, t in state["model"].items() if name in names}  # without second names of tied weights
        save_sharded(directory, step, {**state, "model": held}, self.ranks, keep=keep, metric=metric)


def _split_like(state: Tensor, param: Tensor) -> Tensor:
    """The state (of the shape of the parameter) split as the parameter is, from a whole state on every rank."""
    if not isinstance(param, DTensor):
        return state
    return distribute_tensor(state, param.device_mesh, param.placements, src_data_rank=None)
