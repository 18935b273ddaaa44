"""ManifoldMuon: momentum, a step on the manifold, and nothing else; matrices of equal shape are updated in one batch.

What the step is, a rule decides (optim/published.py: the paper's, optim/certified.py: ours): it is given stacks of tall weights and
momenta and returns new weights. The optimizer owns the bookkeeping: which matrices go together, their orientation, their momentum,
and, on several ranks, who computes what.

On N ranks every matrix has one owner, which alone holds its state and computes its step; then every rank receives all new weights.
Gradients must be the same on all ranks (reduced and clipped), and so replicas stay bitwise equal. One rank is the case N = 1.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from optim.manifolds import MANIFOLDS, is_wide, tall


@dataclass(frozen=True)
class Stack:
    """What a step rule is given: equally shaped matrices of one parameter group.

    W, G: (k, m, n) tall, float32: the weights and their (Nesterov) momentum. manifold: a name of MANIFOLDS.
    eta: 0-d float32 on W's device, the step (the learning rate). weight_decay: decoupled, per unit of eta.
    dual: (k, n, n) float32 that the rule reads and overwrites for its next step, or None if it keeps none.
    """

    W: Tensor
    G: Tensor
    manifold: str
    eta: Tensor
    weight_decay: float
    dual: Tensor | None = None


class StepRule(Protocol):
    """What ManifoldMuon needs of a rule. certificates: of the last step, one Certificate (optim/lmo.py) a stack, if it `certifies`."""

    keeps_dual: bool
    certifies: bool
    certificates: Sequence[Any]

    def init(self, W: Tensor, manifold: str) -> Tensor:
        """W (..., m, n), any orientation, brought onto the manifold."""

    def flops(self, m: int, n: int, manifold: str) -> float:
        """Floating-point operations of one step of one tall (m, n) matrix."""

    def __call__(self, stacks: list[Stack]) -> list[Tensor]:
        """New weights, one (k, m, n) for each stack."""


@dataclass
class Bucket:
    """The matrices of one parameter group that have the same tall shape; `blocks` row blocks of each parameter stand in a row."""

    params: list[Tensor]
    blocks: int
    momentum: Tensor  # (k, m, n) tall, float32; each parameter's state is a view into it
    dual: Tensor | None  # (k, n, n) float32
    fallbacks: Tensor | None  # (k,) float32: on how many steps so far the rule's guard refused its answer
    group: dict[str, Any]

    def stack(self, tensors: Iterable[Tensor]) -> Tensor:
        """Parameters or gradients as one tall float32 (k, m, n) copy."""
        return torch.cat([tall(row_blocks(t, self.blocks)) for t in tensors]).float()

    def rows_of(self, i: int) -> slice:
        """Where the i-th parameter stands in the stack."""
        return slice(i * self.blocks, (i + 1) * self.blocks)


def row_blocks(t: Tensor, blocks: int) -> Tensor:
    """(m, n) as (blocks, m / blocks, n), a view where t is contiguous."""
    return t.reshape(blocks, t.size(0) // blocks, t.size(1))


def share_out(costs: Sequence[float], world: int) -> list[int]:
    """An owner (0..world-1) for each cost, greedily, largest first, so that the heaviest rank is as light as it can be made cheaply."""
    load = [(0.0, rank) for rank in range(world)]
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        total, rank = heapq.heappop(load)
        owners[i] = rank
        heapq.heappush(load, (total + costs[i], rank))
    return owners


class ManifoldMuon(torch.optim.Optimizer):
    """Muon with a manifold for every parameter group (arXiv 2606.13276; `euclidean` is Muon itself).

    Args:
        groups: parameter groups: dicts of "params" (2-D tensors) and "manifold" (a name of MANIFOLDS); any of the settings below
            may be given per group, and "blocks" (1): into how many matrices the rows of each parameter are cut, and "names" of the
            parameters, for `certificates`.
        rule: the step rule, called once a step with all stacks. Its `init` brings the weights onto their manifold here, at
            construction, by the whole parameter on every rank alike.
        lr: eta, the length of a step in spectral norm. Kept as a 0-d tensor, so that a schedule recompiles nothing.
        momentum, nesterov: buf = momentum·buf + g;  G = g + momentum·buf with Nesterov, else buf.
        weight_decay: decoupled, passed to the rule, which decides whom it concerns.

    Work is shared over the ranks of the default process group, if there is one.

    Raises:
        ValueError: a parameter is not a matrix or cannot be cut into its blocks, or a manifold is unknown.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        rule: StepRule,
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "blocks": 1}
        super().__init__(groups, defaults)
        self.rule = rule
        self.found_inf: Tensor | None = None
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        for group in self.param_groups:
            self._check(group)
            group["lr"] = torch.as_tensor(float(group["lr"]), dtype=torch.float32, device=group["params"][0].device)
        self.owners = self._choose_owners()
        self.buckets = [bucket for group in self.param_groups for bucket in self._buckets_of(group)]
        self._link_state()
        self._init_on_manifold()

    @staticmethod
    def _check(group: dict[str, Any]) -> None:
        if group.get("manifold") not in MANIFOLDS:
            raise ValueError(f"unknown manifold {group.get('manifold')!r}; choose one of {', '.join(MANIFOLDS)}")
        for p in group["params"]:
            if p.ndim != 2:
                raise ValueError(
                    f"ManifoldMuon takes matrices, not a tensor of shape {tuple(p.shape)}; give it to AdamW"
                )
            if p.size(0) % group["blocks"]:
                raise ValueError(
                    f"{group['blocks']} blocks do not divide the {p.size(0)} rows of a matrix; choose a divisor"
                )

    def _choose_owners(self) -> dict[Tensor, int]:
        """The rank that computes each parameter's step, balanced by counted operations."""
        params, costs = [], []
        for group in self.param_groups:
            for p in group["params"]:
                m, n = tall(row_blocks(p, group["blocks"])).shape[-2:]
                params.append(p)
                costs.append(group["blocks"] * self.rule.flops(m, n, group["manifold"]))
        return dict(zip(params, share_out(costs, self.world)))

    def _buckets_of(self, group: dict[str, Any]) -> list[Bucket]:
        """This rank's matrices of a group, by shape, with their state."""
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for p in group["params"]:
            if self.owners[p] == self.rank:
                by_shape.setdefault(tall(row_blocks(p, group["blocks"])).shape[-2:], []).append(p)
        buckets = []
        for (m, n), params in by_shape.items():
            k, device = len(params) * group["blocks"], params[0].device
            momentum = torch.zeros(k, m, n, device=device)
            dual = torch.zeros(k, n, n, device=device) if self.rule.keeps_dual else None
            fallbacks = torch.zeros(k, device=device) if self.rule.certifies else None
            buckets.append(Bucket(params, group["blocks"], momentum, dual, fallbacks, group))
        return buckets

    def _link_state(self) -> None:
        """Every parameter's state is a view into its bucket: batched arithmetic, and an ordinary state_dict."""
        for bucket in self.buckets:
            for i, p in enumerate(bucket.params):
                for name in ("momentum", "dual", "fallbacks"):
                    if (whole := getattr(bucket, name)) is not None:
                        self.state[p][name] = whole[bucket.rows_of(i)]

    @torch.no_grad()
    def _init_on_manifold(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.rule.init(row_blocks(p, group["blocks"]), group["manifold"]).reshape(p.shape))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every matrix. Gradients must all be there; nothing is read back to the host.

        Where `found_inf` (0-d float, 1 for true; see Optimizers.step) is set, weights and state stay as they are.
        """
        keep = None if self.found_inf is None else self.found_inf.bool()
        stacks = [self._advance(bucket, keep) for bucket in self.buckets]
        for bucket, stack, W in zip(self.buckets, stacks, self.rule(stacks)):
            W = W if keep is None else torch.where(keep, stack.W, W)
            if bucket.dual is not None:
                bucket.dual.copy_(stack.dual if keep is None else torch.where(keep, bucket.dual, stack.dual))
            targets = [W[bucket.rows_of(i)] for i in range(len(bucket.params))]
            targets = [
                (w.mT if is_wide(row_blocks(p, bucket.blocks)) else w).reshape(p.shape)
                for p, w in zip(bucket.params, targets)
            ]
            torch._foreach_copy_(bucket.params, targets)
        for bucket, certificate in zip(self.buckets, self.rule.certificates):
            bucket.fallbacks.add_(~certificate.ok if keep is None else ~certificate.ok & ~keep)
        if self.world > 1:
            self._exchange()

    def _advance(self, bucket: Bucket, keep: Tensor | None) -> Stack:
        """Take the gradients into the momenta and return what the step rule works on."""
        group, momentum = bucket.group, bucket.group["momentum"]
        g = bucket.stack(p.grad for p in bucket.params)
        if keep is not None:  # what is not finite must not reach the arithmetic: an SVD raises on it
            g = torch.where(keep, torch.zeros_like(g), g)
        advanced = torch.add(g, bucket.momentum, alpha=momentum)
        bucket.momentum.copy_(advanced if keep is None else torch.where(keep, bucket.momentum, advanced))
        G = torch.add(g, advanced, alpha=momentum) if group["nesterov"] else advanced
        dual = None if bucket.dual is None else bucket.dual.clone()
        return Stack(bucket.stack(bucket.params), G, group["manifold"], group["lr"], group["weight_decay"], dual)

    def certificates(self) -> dict[str, dict[str, float]]:
        """What the rule certifies of this rank's matrices at the last step, by name; empty for a rule that certifies nothing.

        Of a matrix in several blocks the worst. feas, eff: lower bounds of how near the step came to its optimum; frac: normal part of
        the matrix sign it came from; fallbacks: steps so far on which the guard stepped in. Reads back from the device.
        """
        found: dict[str, dict[str, float]] = {}
        for bucket, certificate in zip(self.buckets, self.rule.certificates):
            names = dict(zip(bucket.group["params"], bucket.group["names"]))
            fields = torch.stack([certificate.feas, certificate.eff, -certificate.frac, -bucket.fallbacks]).tolist()
            for i, p in enumerate(bucket.params):
                feas, eff, frac, stepped_in = (min(field[bucket.rows_of(i)]) for field in fields)
                found[names[p]] = {"feas": feas, "eff": eff, "frac": -frac, "fallbacks": -stepped_in}
        return found

    def _exchange(self) -> None:
        """Every owner sends its new weights to all, one flat message each, all under way at once."""
        owned: list[list[Tensor]] = [[] for _ in range(self.world)]
        for p, owner in self.owners.items():
            owned[owner].append(p)
        messages = []
        for rank, params in enumerate(owned):
            if not params:
                continue
            flat = (
                torch.cat([p.reshape(-1) for p in params])
                if rank == self.rank
                else params[0].new_empty(sum(p.numel() for p in params))
            )
            messages.append((rank, params, flat, dist.broadcast(flat, src=rank, async_op=True)))
        for rank, params, flat, work in messages:
            work.wait()
            if rank != self.rank:
                pieces = flat.split([p.numel() for p in params])
                torch._foreach_copy_(params, [piece.view(p.shape) for p, piece in zip(params, pieces)])

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The whole optimizer's state on every rank, as one rank alone would have it; on several ranks, all must call."""
        if self.world > 1:
            for p, owner in self.owners.items():
                for name, shape in self._state_shapes(p).items():
                    mine = self.state[p].get(name) if owner == self.rank else torch.empty(shape, device=p.device)
                    mine = mine.contiguous()
                    dist.broadcast(mine, src=owner)
                    self.state[p][name] = mine
        state = super().state_dict()
        if self.world > 1:
            for p, owner in self.owners.items():
                if owner != self.rank:
                    del self.state[p]
        return state

    def _state_shapes(self, p: Tensor) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a parameter's state."""
        blocks = next(g["blocks"] for g in self.param_groups if any(q is p for q in g["params"]))
        m, n = tall(row_blocks(p, blocks)).shape[-2:]
        shapes: dict[str, tuple[int, ...]] = {"momentum": (blocks, m, n)}
        if self.rule.keeps_dual:
            shapes["dual"] = (blocks, n, n)
        if self.rule.certifies:
            shapes["fallbacks"] = (blocks,)
        return shapes

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of this rank's matrices; settings and learning rates stay the configuration's.

        Takes what `state_dict` returned on any number of ranks. Of another rule's state the momentum is taken; what that rule did not
        keep starts at zero.
        """
        order = [p for group in self.param_groups for p in group["params"]]
        saved = state_dict["state"]
        for bucket in self.buckets:
            for p in bucket.params:
                index = next(i for i, q in enumerate(order) if q is p)
                for name, value in self.state[p].items():
                    value.copy_(saved[index].get(name, torch.zeros_like(value)))
