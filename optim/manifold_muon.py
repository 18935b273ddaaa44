"""ManifoldMuon: momentum, a step on the manifold, and nothing else; matrices of equal shape are updated in one batch.

What the step is, a rule decides (optim/published.py: the paper's): it is given stacks of tall weights and momenta and returns new
weights. The optimizer owns the bookkeeping: which matrices go together, their orientation, their momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.manifolds import MANIFOLDS, is_wide, tall
from optim.published import Stack

StepRule = Callable[[list[Stack]], list[Tensor]]


@dataclass
class Bucket:
    """The matrices of one parameter group that have the same tall shape."""

    params: list[Tensor]
    momentum: Tensor  # (k, m, n) tall, float32; each parameter's state is a view into it
    group: dict[str, Any]

    def stack(self, tensors: Iterable[Tensor]) -> Tensor:
        """Parameters or gradients as one tall float32 (k, m, n) copy."""
        return torch.stack([tall(t) for t in tensors]).float()


class ManifoldMuon(torch.optim.Optimizer):
    """Muon with a manifold for every parameter group (arXiv 2606.13276; `euclidean` is Muon itself).

    Args:
        groups: parameter groups: dicts of "params" (2-D tensors) and "manifold" (a name of MANIFOLDS); any of the settings below
            may be given per group.
        rule: the step rule, called once a step with all stacks. Its `init(W, manifold)` brings the weights onto their manifold
            here, at construction.
        lr: eta, the length of a step in spectral norm. Kept as a 0-d tensor, so that a schedule recompiles nothing.
        momentum, nesterov: buf = momentum·buf + g;  G = g + momentum·buf with Nesterov, else buf.
        weight_decay: decoupled, passed to the rule, which decides whom it concerns.

    Raises:
        ValueError: a parameter is not a matrix, or a manifold is unknown.
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
        super().__init__(groups, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})
        self.rule = rule
        self.found_inf: Tensor | None = None
        self.buckets: list[Bucket] = []
        for group in self.param_groups:
            self._check(group)
            device = group["params"][0].device
            group["lr"] = torch.as_tensor(float(group["lr"]), dtype=torch.float32, device=device)
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(tall(p).shape, []).append(p)
            for shape, params in by_shape.items():
                momentum_buffer = torch.zeros(len(params), *shape, dtype=torch.float32, device=device)
                self.buckets.append(Bucket(params, momentum_buffer, group))
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

    def _link_state(self) -> None:
        """Every parameter's momentum is a view into its bucket: batched arithmetic, and an ordinary state_dict."""
        for bucket in self.buckets:
            for p, buffer in zip(bucket.params, bucket.momentum):
                self.state[p]["momentum"] = buffer

    @torch.no_grad()
    def _init_on_manifold(self) -> None:
        for bucket in self.buckets:
            for p in bucket.params:
                p.copy_(self.rule.init(p, bucket.group["manifold"]))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every matrix. Gradients must all be there; nothing is read back to the host.

        Where `found_inf` (0-d float, 1 for true; see Optimizers.step) is set, weights and momenta stay as they are.
        """
        keep = None if self.found_inf is None else self.found_inf.bool()
        stacks = [self._advance(bucket, keep) for bucket in self.buckets]
        for bucket, stack, W in zip(self.buckets, stacks, self.rule(stacks)):
            W = W if keep is None else torch.where(keep, stack.W, W)
            torch._foreach_copy_(bucket.params, [w.mT if is_wide(p) else w for p, w in zip(bucket.params, W)])

    def _advance(self, bucket: Bucket, keep: Tensor | None) -> Stack:
        """Take the gradients into the momenta and return what the step rule works on."""
        group, momentum = bucket.group, bucket.group["momentum"]
        g = bucket.stack(p.grad for p in bucket.params)
        if keep is not None:  # what is not finite must not reach the arithmetic: an SVD raises on it
            g = torch.where(keep, torch.zeros_like(g), g)
        advanced = torch.add(g, bucket.momentum, alpha=momentum)
        bucket.momentum.copy_(advanced if keep is None else torch.where(keep, bucket.momentum, advanced))
        G = torch.add(g, advanced, alpha=momentum) if group["nesterov"] else advanced
        return Stack(bucket.stack(bucket.params), G, group["manifold"], group["lr"], group["weight_decay"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore momenta in place; learning rates are the schedule's, and settings the configuration's, not the checkpoint's."""
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, settings):
            group.update(kept)
        for bucket in self.buckets:
            for p, buffer in zip(bucket.params, bucket.momentum):
                buffer.copy_(self.state[p]["momentum"])
        self._link_state()
        self._relink_groups()

    def _relink_groups(self) -> None:
        """Optimizer.load_state_dict replaces the group dicts; buckets must see the live ones."""
        owner = {id(p): group for group in self.param_groups for p in group["params"]}
        for bucket in self.buckets:
            bucket.group = owner[id(bucket.params[0])]
