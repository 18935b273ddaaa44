"""ManifoldMuon: momentum, a step on the manifold, and nothing else; matrices of equal shape are updated in one batch.

A step rule decides what the step is: it is given stacks of tall weights and momenta, and returns new weights. optim/certified.py is our
rule, optim/published.py the paper's. The optimizer does the rest: which matrices go together, their orientation, their momentum, and, on
several ranks, who computes what.

On N ranks every matrix has one owner, which alone holds its state and computes its step. The new weights of a bucket are sent to all
ranks while the next bucket is computed. Gradients must be the same on all ranks (reduced and clipped), and so replicas stay bitwise equal.
With `owners_keep` nothing is sent: each rank holds only what it owns, and only owners need gradients. One rank is the case N = 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .certificate import certify
from .linalg import compiled_whole, exact_sums
from .manifolds import MANIFOLDS, is_wide, like
from .ownership import choose_owners, members_of_buckets, plan_messages
from .refine import Refine
from .stack import Bucket, OnHost, Stack, StepRule, divides, row_blocks, state_shapes, whole_shape

RECORDED = {
    "feas": torch.amin,
    "norm": torch.amax,
    "tangency": torch.amax,
    "fallbacks": torch.amax,
    "normal_share": torch.amax,
    "length_share": torch.amax,
    "size_share": torch.amax,
    "momentum_top": torch.amax,
    "momentum_rank": torch.amin,
    "step_rank": torch.amin,
}
"""What `ManifoldMuon.certificates` returns, in order; of a parameter in several blocks the least or the largest number."""

CONSTRUCTED = ("params", "names", "manifold", "blocks", "radius", "block_length", "row_beta")
"""Keys of a group that loading a state does not change: its matrices, and the form of their state."""


def _is_number(value: Any, below: float = math.inf) -> bool:
    return isinstance(value, (Real, Tensor)) and not isinstance(value, bool) and 0 <= float(value) < below


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_is_number, "a finite number from 0 on"),
    "momentum": (partial(_is_number, below=1), "a number from 0 to below 1"),
    "nesterov": (_is_flag, "True or False"),
    "weight_decay": (_is_number, "a finite number from 0 on"),
    "block_length": (("each", "whole").__contains__, "'each' or 'whole'"),
    "cautious": (_is_flag, "True or False"),
    "row_beta": (lambda value: value is None or _is_number(value, 1), "a number from 0 to below 1, or None"),
}
"""For each setting of a group: a test of its value, and that in words."""


def advance(g: Tensor, momentum: Tensor, factor: float, nesterov: bool, skip: Tensor) -> Tensor:
    """Take g into the momentum, in place, since the state of each parameter is a view of it; returns what is stepped along.

    Where `skip` (0-d or (k,) bool) is true the momentum stays, whatever g is.
    """
    skip = skip.view(-1, 1, 1)
    g = torch.where(skip, torch.zeros_like(g), g)  # what is not finite must not reach the arithmetic
    momentum.copy_(torch.where(skip, momentum, momentum * factor + g))
    return g + momentum * factor if nesterov else momentum.clone()


class ManifoldMuon(torch.optim.Optimizer):
    """Muon with a manifold for every parameter group (arXiv 2606.13276; `euclidean` is Muon itself).

    Args:
        groups: parameter groups, dicts of "params" (2-D tensors) and "manifold" (a name of MANIFOLDS). They may have "names" of the
            parameters, by default "group i, matrix j"; "blocks" (1), into how many matrices the rows of each parameter are cut; "radius" R
            (1), for manifolds of fixed size: W / R is on the manifold; and any of the settings below.
        rule: the step rule, called once for each bucket. At construction, its `init` brings every whole parameter onto its manifold, on
            each rank alike.
        lr: eta, the length of a step in spectral norm. Kept as a 0-d tensor on the device; a schedule fills it, or puts a number in its
            place, for which the host waits on a GPU.
        momentum, nesterov: buf = momentum·buf + g;  G = g + momentum·buf with Nesterov, else buf.
        weight_decay: decoupled, passed to the rule, which decides whether it applies.
        block_length: "each": every block's step has length lr; "whole": the parameter's step is as long, in root mean square, as it
            would be without the cut.
        cautious, row_beta: see optim/refine.py.

    Work is shared over the ranks of the default process group, if there is one. `owners` says which rank owns a parameter.

    To be set from outside: `found_inf` (0-d float, 1 for true, as torch.amp.GradScaler sets it): where true, a step changes nothing; while
    it is None, a matrix whose gradient is not finite keeps its weight and its momentum, and the step counts as one of its `fallbacks`.
    `watched`: whether a step keeps what `certificates` needs; `owners_keep`, see above; `around_exchange`: makes a context in which weights
    are sent and received. A copy, or what a pickle gives back, has them as they were at the start.

    Raises:
        ValueError: the rule is none; or with every problem: a parameter is not a matrix, has 16 bits, or cannot be cut into its blocks, a
            group has no matrices, a manifold is unknown, a radius does not fit it, or SETTINGS does not allow a value.
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
        block_length: str = "each",
        cautious: bool = False,
        row_beta: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "blocks": 1,
            "radius": 1.0,
            "block_length": block_length,
            "cautious": cautious,
            "row_beta": row_beta,
        }
        super().__init__(groups, defaults)
        if not callable(rule):
            raise ValueError(f"rule is {rule!r}; give a step rule, such as CertifiedStep() or PublishedStep(...)")
        if problems := list(dict.fromkeys(problem for group in self.param_groups for problem in _problems(group))):
            raise ValueError("\n".join(problems))
        for i, group in enumerate(self.param_groups):
            group.setdefault("names", [f"group {i}, matrix {j}" for j in range(len(group["params"]))])
            group["lr"] = torch.as_tensor(float(group["lr"]), dtype=torch.float32, device=group["params"][0].device)
        self.rule = rule
        self._make_buckets()
        self.bring_onto_manifold()

    def _make_buckets(self) -> None:
        """What follows from the groups and the rule: an owner for every matrix, and this rank's buckets with their state at the start."""
        self.found_inf: Tensor | None = None
        self.watched = self.owners_keep = False
        self.around_exchange: Callable[[], AbstractContextManager[None]] = nullcontext
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.owners = choose_owners(self.param_groups, self.rule, self.world)
        members = members_of_buckets(self.param_groups, self.owners, self.world)[self.rank]
        self.buckets = [self._bucket(group, params) for group, params in members]
        self.messages = plan_messages(self.param_groups, self.owners, self.world)
        self.under_way: list[tuple[list[Tensor], Tensor, Any]] = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, but only while the optimizer is constructed, which is when matrices get their owners and buckets.

        Raises:
            RuntimeError: it is called afterwards.
        """
        if hasattr(self, "buckets"):
            raise RuntimeError(
                "ManifoldMuon takes no further group; construct a new one with all groups, or a second one with this group"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles are made of. On several ranks all must call, as of `state_dict`."""
        groups = {"defaults": self.defaults, "param_groups": self.param_groups}
        return groups | {"rule": self.rule, "saved": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("saved")
        super().__setstate__(state | {"state": defaultdict(dict)})
        self._make_buckets()
        self.load_state_dict(saved)

    def describe(self, device: torch.device) -> str:
        """The step rule on this device, and the optimizer's options where they are not the usual ones; a group may have others. One line."""
        given, words = self.defaults, [self.rule.describe(device)]
        words += ["cautious"] if given["cautious"] else []
        words += [] if given["row_beta"] is None else [f"rows normalised by squares of decay {given['row_beta']:g}"]
        words += ["blocks step as far as the whole"] if given["block_length"] == "whole" else []
        return ", ".join(words)

    def _bucket(self, group: dict[str, Any], params: list[Tensor]) -> Bucket:
        """A bucket of this rank, with its state at the start."""
        blocks, shapes, device = group["blocks"], state_shapes(params[0], group), params[0].device
        state = {name: torch.zeros(len(params) * k, *size, device=device) for name, (k, *size) in shapes.items()}
        bucket = Bucket(params, blocks, group, state, is_wide(row_blocks(params[0], blocks)))
        for i, p in enumerate(params):  # views: batched arithmetic, and an ordinary state_dict
            self.state[p] = {name: whole[bucket.rows_of(i)] for name, whole in state.items()}
        return bucket

    @torch.no_grad()
    def bring_onto_manifold(self, names: Collection[str] | None = None) -> None:
        """Put whole parameters onto their manifold, on every rank alike: all, or those of these names."""
        names = [names] if isinstance(names, str) else names
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if names is None or group["names"][i] in names:
                    with exact_sums(p.device):
                        on = self.rule.init(row_blocks(p, group["blocks"]) / group["radius"], group["manifold"])
                    p.copy_((on * group["radius"]).reshape(p.shape))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, wait: bool = True) -> Any:  # type: ignore[override]  # `wait` is ours
        """One update of every matrix. Gradients of the owned ones must all be there; the host waits for nothing of this step.

        Args:
            closure: as in torch, called first: it computes the gradients and returns the loss, which is then returned.
            wait: if false, the new weights of other ranks are there only after `receive`.

        Raises:
            RuntimeError: a matrix that this rank owns has no gradient. Then nothing has moved.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self._require_gradients()
        highest = self.highest_levels()
        for i in range(len(self.messages)):
            if i < len(self.buckets):
                self._update(self.buckets[i], highest[i])
            self._send(i)  # under way while the next bucket is computed
        self._levels_to_host()
        if wait:
            self.receive()
        return loss

    def highest_levels(self) -> tuple[int, ...]:
        """Of each bucket, the largest level that its last step asked for, on the host; see Stack.highest."""
        for bucket in self.buckets:
            bucket.highest = bucket.highest or OnHost(bucket.state["level"].amax())
        return tuple(bucket.highest.read() for bucket in self.buckets if bucket.highest)

    @torch.no_grad()
    def update(self, highest: Sequence[int]) -> None:
        """The part of a step that is the device's alone, from `highest_levels` on: new weights of this rank's matrices, in place."""
        self._require_gradients()
        for bucket, level in zip(self.buckets, highest):
            self._update(bucket, level)

    @torch.no_grad()
    def publish(self) -> None:
        """The end of a step after `update`: the levels go to the host, and the weights to the other ranks."""
        for i in range(len(self.messages)):
            self._send(i)
        self._levels_to_host()
        self.receive()

    def _levels_to_host(self) -> None:
        for bucket in self.buckets:
            bucket.highest = OnHost(bucket.state["level"].amax())  # read when the next step begins

    def _require_gradients(self) -> None:
        """Raise RuntimeError unless all matrices of this rank have a gradient."""
        if without := [p for bucket in self.buckets for p in bucket.params if p.grad is None]:
            raise RuntimeError(
                f"{len(without)} matrices have no gradient, the first of shape {tuple(without[0].shape)}; a step needs all of them: give "
                "matrices that are not always used to AdamW, or leave them out with requires_grad_(False)"
            )

    def _update(self, bucket: Bucket, highest: int) -> None:
        """One update of the matrices of a bucket."""
        stack = self._advance(bucket, highest)
        moved = self.rule(stack)
        new, radius = moved.W, bucket.group["radius"]
        if radius != 1 or bucket.params[0].dtype != new.dtype:  # what did not move stays bitwise
            new = torch.where(new == stack.W, bucket.stack(bucket.params), new * radius)
        targets = [  # each in the orientation of its parameter
            like(new[bucket.rows_of(i)], row_blocks(p, bucket.blocks)).reshape(p.shape)
            for i, p in enumerate(bucket.params)
        ]
        torch._foreach_copy_(bucket.params, targets)  # one launch for all
        bucket.state["level"].copy_(moved.level)
        bucket.state["fallbacks"].add_(moved.fallback if self.found_inf is not None else moved.fallback | stack.skip)
        if moved.row_squares is not None:
            bucket.state["row_squares"].copy_(moved.row_squares)
        bucket.seen = (stack.W, stack.G, moved.direction) if self.watched else None  # else nothing is kept alive

    def _advance(self, bucket: Bucket, highest: int) -> Stack:
        """Take the gradients into the momenta and return what the step rule works on."""
        group, momentum = bucket.group, bucket.state["momentum"]
        g = bucket.stack(p.grad for p in bucket.params).float()  # (k, m, n)
        if self.found_inf is not None:
            skip = self.found_inf.bool()
        else:
            skip = ~torch.linalg.vector_norm(g, torch.inf, dim=(-2, -1)).isfinite()  # (k,)
        take = compiled_whole(advance) if g.is_cuda else advance  # compiled: one pass instead of five
        G = take(g, momentum, group["momentum"], group["nesterov"], skip)
        refine = None
        if group["cautious"] or group["row_beta"] is not None:
            row_squares = bucket.state.get("row_squares")
            refine = Refine(g if group["cautious"] else None, row_squares, group["row_beta"] or 0.0, bucket.wide)
        W, decay = bucket.stack(bucket.params).float(), group["weight_decay"]
        eta = torch.as_tensor(group["lr"], dtype=torch.float32, device=W.device)
        if (radius := group["radius"]) != 1:  # the step of W / R, whose length is eta / R, at the same decay
            W, eta, decay = W / radius, eta / radius, decay * radius
        level, whole = bucket.state["level"], whole_shape(bucket.params[0], group)
        return Stack(W, G, group["manifold"], eta, decay, skip, level, highest, whole, refine)

    def certificates(self) -> dict[str, dict[str, float]]:
        """How good the last step of this rank's matrices was, by name (optim/certificate.py); empty unless it was `watched`.

        Of a matrix in several blocks the least or the largest of each number, see RECORDED; NaN if it is NaN for a block. feas is below 0
        for a step that goes uphill. fallbacks: steps so far that were not the ordinary one. Waits for the device, and frees what was kept.
        """
        found: dict[str, dict[str, float]] = {}
        for bucket in self.buckets:
            if bucket.seen is None:
                continue
            values = certify(*bucket.seen, bucket.group["manifold"])._asdict() | {
                "fallbacks": bucket.state["fallbacks"]
            }
            bucket.seen = None
            worst = {name: of(values[name].view(-1, bucket.blocks), 1).tolist() for name, of in RECORDED.items()}
            names = dict(zip(bucket.group["params"], bucket.group["names"]))
            for i, p in enumerate(bucket.params):
                found[names[p]] = {name: numbers[i] for name, numbers in worst.items()}
        return found

    def _send(self, i: int) -> None:
        """Begin to send the new weights of the i-th buckets from their owners to all, one flat tensor for each owner."""
        if self.world == 1 or self.owners_keep:
            return
        with self.around_exchange():
            for owner, params in self.messages[i]:
                if owner == self.rank:
                    flat = torch.cat([p.reshape(-1) for p in params])
                else:
                    flat = params[0].new_empty(sum(p.numel() for p in params))
                self.under_way.append((params, flat, dist.broadcast(flat, src=owner, async_op=True)))

    @torch.no_grad()
    def receive(self) -> None:
        """Wait for the new weights of other ranks, and take them over."""
        if not self.under_way:
            return
        with self.around_exchange():
            for params, flat, work in self.under_way:
                work.wait()
                if self.owners[params[0]] != self.rank:
                    pieces = flat.split([p.numel() for p in params])
                    torch._foreach_copy_(params, [piece.view(p.shape) for p, piece in zip(params, pieces)])
        self.under_way.clear()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The whole optimizer's state on every rank, as one rank alone would have it; on several ranks, all must call.

        With `owners_keep`: the state of this rank's matrices.
        """
        if self.world == 1 or self.owners_keep:
            return super().state_dict()
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for p, owner in self.owners.items():
            for name, shape in state_shapes(p, groups[p]).items():
                whole = self.state[p][name].contiguous() if owner == self.rank else torch.empty(shape, device=p.device)
                dist.broadcast(whole, src=owner)
                if owner != self.rank:
                    self.state[p][name] = whole
        state = super().state_dict()
        for p, owner in self.owners.items():
            if owner != self.rank:  # its state was here for this call
                del self.state[p]
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of this rank's matrices, and as in torch the settings of their groups, such as the learning rate.

        Takes what `state_dict` returned on any number of ranks. What is not in it, such as another rule's levels, stays as it is, and so
        do the settings of CONSTRUCTED.

        Raises:
            ValueError: its groups are not as large as those of this optimizer, a state has another shape, or SETTINGS does not allow a
                value. Then nothing has changed.
        """
        saved_groups = deepcopy(state_dict["param_groups"])  # of a living optimizer it has the tensors themselves
        sizes, own = ([len(group["params"]) for group in groups] for groups in (saved_groups, self.param_groups))
        if sizes != own:
            raise ValueError(
                f"the state is of groups of {sizes} matrices, and this optimizer has {own}; construct it with the groups that were saved"
            )
        order = [p for group in self.param_groups for p in group["params"]]
        pairs = []  # what is taken over: ours, the saved one, its name
        for i, p in enumerate(order):
            if self.owners[p] == self.rank:
                own_state, saved_state = self.state[p], state_dict["state"].get(i, {})
                pairs += [(own_state[k], saved_state[k], f"{k} of matrix {i}") for k in own_state if k in saved_state]
        if unlike := [
            f"{where} is {tuple(s.shape)} and not {tuple(v.shape)}" for v, s, where in pairs if s.shape != v.shape
        ]:
            raise ValueError(
                f"the state is of other matrices: {'; '.join(unlike)}; construct the optimizer with the matrices and blocks that were saved"
            )
        taken = [{key: value for key, value in group.items() if key not in CONSTRUCTED} for group in saved_groups]
        if wrong := [
            problem for group, new in zip(self.param_groups, taken) for problem in _wrong_settings({**group, **new})
        ]:
            raise ValueError("the state has settings that no group may have: " + "; ".join(dict.fromkeys(wrong)))
        for value, saved, _ in pairs:
            value.copy_(saved)
        for bucket in self.buckets:
            bucket.highest = None
        for group, settings in zip(self.param_groups, taken):
            rate, new = group["lr"], float(settings["lr"])
            group.update(settings)
            group["lr"] = rate.fill_(new) if isinstance(rate, Tensor) else new


def _wrong_settings(group: dict[str, Any]) -> list[str]:
    """What SETTINGS does not allow in a parameter group; a tensor counts as its number."""
    values = {name: group[name].item() if isinstance(group[name], Tensor) else group[name] for name in SETTINGS}
    return [
        f"{name} is {values[name]!r}; give {words}"
        for name, (allows, words) in SETTINGS.items()
        if not allows(values[name])
    ]


def _problems(group: dict[str, Any]) -> list[str]:
    """What is wrong with a parameter group, each with its remedy."""
    if not group["params"]:
        return ["a parameter group has no matrices; leave it out"]
    problems = _wrong_settings(group)
    names = group.get("names")
    if names is not None and len(names) != len(group["params"]):
        problems.append(f"{len(names)} names for {len(group['params'])} matrices; give each its name")
    name, radius, blocks = group.get("manifold"), group["radius"], group["blocks"]
    if name is None:
        problems.append(
            f"a parameter group has no manifold; give {{'params': ..., 'manifold': ...}}, one of {', '.join(MANIFOLDS)}"
        )
    elif name not in MANIFOLDS:
        problems.append(f"unknown manifold {name!r}; choose one of {', '.join(MANIFOLDS)}")
    elif not (_is_number(radius) and radius > 0 and (radius == 1 or MANIFOLDS[name].sized)):
        problems.append(
            f"the radius of {name} is {radius!r}; give a number above 0, and 1 for a manifold without a fixed size"
        )
    for p in group["params"]:
        if p.ndim != 2:
            problems.append(f"ManifoldMuon takes matrices, not a tensor of shape {tuple(p.shape)}; give it to AdamW")
        elif not divides(blocks, p.size(0)):
            problems.append(f"{blocks!r} blocks do not divide the {p.size(0)} rows of a matrix; choose a divisor")
        if p.dtype not in (torch.float32, torch.float64):
            problems.append(
                f"ManifoldMuon takes no weights in {p.dtype}, which would round small steps away; keep them in float32"
            )
    return problems
