"""All optimizers of a model as one, and the transfer of their state from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model.spectra import Distance
from model.unit_norm import UnitNorm
from optim.assignment import Row, folded
from optim.manifold_muon import ManifoldMuon
from optim.manifolds import distance_of
from optim.modular import Modular
from training.capture import CapturedUpdate, Record
from training.library import like_saved, settings_of_group, tensors_of


class Optimizers:
    """The optimizer of the matrices and AdamW (each if it has parameters) as one. After each step, unit vectors are normalised.

    Iterating yields the torch optimizers. `.named` has them by the names that tables, records and checkpoints use, `.peak_lr` the learning
    rates of their groups as configured, which ManifoldMuon rounds to float32. `.rows` is the assignment, `.muon` the ManifoldMuon or None.
    """

    def __init__(
        self,
        named: Mapping[str, torch.optim.Optimizer],
        peak_lr: Mapping[str, list[float]],
        rows: list[Row],
        unit_norm: UnitNorm,
    ) -> None:
        self.named, self.peak_lr, self.rows, self.unit_norm = dict(named), peak_lr, rows, unit_norm
        self.captured: CapturedUpdate | None = None

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.named.values())

    @property
    def muon(self) -> ManifoldMuon | None:
        """The ManifoldMuon; None if there is none."""
        return next((o for o in self if isinstance(o, ManifoldMuon)), None)

    def rates(self, multiplier: float) -> dict[str, float]:
        """The learning rate of the first group of each optimizer, by its name."""
        return {name: peaks[0] * multiplier for name, peaks in self.peak_lr.items()}

    def set_lr(self, multiplier: float) -> None:
        """Set the learning rate of every group to `multiplier` times its peak."""
        for name, optimizer in self.named.items():
            for group, peak in zip(optimizer.param_groups, self.peak_lr[name]):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(peak * multiplier)
                else:
                    group["lr"] = peak * multiplier

    def step(self, skip: Tensor | None = None) -> None:
        """One update by every optimizer; if `skip` (0-d bool, on the device, the same on all ranks) is true, none."""
        muon = self.muon
        if self.captured is not None and skip is not None:
            self.captured(skip, muon.highest_levels() if muon else (), plain=muon is not None and muon.watched)
            if muon is not None:
                muon.publish()
        else:
            self.update(skip)
            if muon is not None:
                muon.receive()
        self.unit_norm(skip)

    def update(self, skip: Tensor | None, levels: Sequence[int] | None = None) -> None:
        """A step before new weights of other ranks are received. With `levels`, of ManifoldMuon.highest_levels, only the part that is the
        device's alone, which can be captured; otherwise ManifoldMuon's weights are under way while AdamW steps.

        Our optimizers and fused ones of torch are given `skip` as `found_inf`, the attribute with which torch.amp.GradScaler makes them
        skip an update, without a host sync. Other optimizers do not know it, and their state may be of any type: numbers on the host,
        lists, counters in the groups. So their step is not called at all; for that, the host reads `skip` once.
        """
        for optimizer in self:
            if skips_on_device(optimizer):
                optimizer.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]  # as torch does
            elif skip is not None and skip.item():
                continue
            if isinstance(optimizer, ManifoldMuon):
                optimizer.step(wait=False) if levels is None else optimizer.update(levels)
            else:
                optimizer.step()

    def capture(self, record: Record) -> None:
        """From now on, replay `update` as `record` recorded it. Learning rates become 0-d tensors, so that a schedule reaches the replay."""
        params = [p for optimizer in self for group in optimizer.param_groups for p in group["params"]]
        for optimizer in self:
            for group in optimizer.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=params[0].device)
                if not isinstance(optimizer, ManifoldMuon):
                    group["capturable"] = True
            optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]  # the first updates are
        self.captured = CapturedUpdate(self.update, params, record)

    def bring_onto_manifold(self) -> None:
        """Put every matrix onto its manifold, and unit vectors to unit length, after the weights were replaced."""
        if self.muon is not None:
            self.muon.bring_onto_manifold()
        self.unit_norm()

    def watch(self, on: bool) -> None:
        """Whether ManifoldMuon keeps its next step for the certificates."""
        if self.muon is not None:
            self.muon.watched = on

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self:
            optimizer.zero_grad(set_to_none=True)

    def certificates(self, gather: Callable[[Any], list[Any]]) -> list[tuple[str, dict[str, float]]]:
        """(name, certificate) of each matrix whose last step was watched. `gather` collects an object of every rank; all ranks must call."""
        parts = gather(self.muon.certificates() if self.muon else {})
        found = {name: certificate for part in parts for name, certificate in part.items()}
        return [(row.name, found[row.name]) for row in self.rows if row.name in found]

    def fallbacks(self, sum_of_ranks: Callable[[Tensor], Tensor]) -> int | None:
        """Steps of all matrices of ManifoldMuon so far that were not the ordinary one, see Bucket; None without it.

        `sum_of_ranks` adds a 0-d tensor over the ranks; all must call. Waits for the device.
        """
        if self.muon is None:
            return None
        found = torch.zeros((), dtype=torch.float64, device=self.muon.param_groups[0]["params"][0].device)
        for bucket in self.muon.buckets:
            found += bucket.state["fallbacks"].sum()
        return int(sum_of_ranks(found))

    def ruled_matrices(self, params: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Distance | None, int]]:
        """Every matrix (of `params`, whole) that matches a rule of the assignment, by name: itself, the distance from its manifold, and its
        row blocks."""
        blocks = {n: group["blocks"] for group in (self.muon.param_groups if self.muon else ()) for n in group["names"]}
        return {
            row.name: (
                params[row.name],
                distance_of(row.manifold, row.radius) if row.manifold else None,
                blocks.get(row.name, 1),
            )
            for row in self.rows
            if row.ruled
        }

    def place(self, params: Mapping[str, Tensor], state_like: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Let AdamW update other tensors of the same names and shapes, such as split ones; ManifoldMuon's stay with their owners alone.

        `state_like(state, parameter)` returns the state (of the shape of the parameter) as the new parameter needs it.
        """
        if self.muon is not None:
            self.muon.owners_keep = True
        for optimizer in (o for o in self if o is not self.muon):
            for group in optimizer.param_groups:
                for i, (name, old) in enumerate(zip(group["names"], group["params"])):
                    new = group["params"][i] = params[name]
                    state = optimizer.state.pop(old, {})
                    if state:
                        optimizer.state[new] = {
                            k: state_like(v, new) if v.shape == new.shape else v for k, v in state.items()
                        }

    def state_bytes(self) -> dict[str, float]:
        """Bytes of state for each number in the parameters (8 for AdamW) whose state this rank holds, by the name of the optimizer.

        0 before there is state.
        """
        found = {}
        for name, optimizer in self.named.items():
            held = sum(t.numel() * t.element_size() for t in tensors_of(optimizer.state))
            found[name] = held / max(1, sum(p.numel() for p, state in optimizer.state.items() if state))
        return found

    def state_dict(self) -> dict[str, Any]:
        """One state dict for each optimizer, by name. Where it is not `_fixed_state`, also the shapes of the parameters."""
        return {name: self._state_of(o) for name, o in self.named.items()}

    @staticmethod
    def _state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        return state if _fixed_state(optimizer) else {**state, "shapes": _shapes(optimizer)}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Load what `state_dict` returned, where optimizer, name and shape are the same. All ranks must call.

        Settings and learning rates are those of the configuration. State that does not fit is left at its start. A weight whose manifold
        has changed is retracted onto the new one. The parameters must already have their saved values.

        Returns:
            One line for everything that was not loaded unchanged; empty for the same assignment.
        """
        missed = []
        for name, optimizer in self.named.items():
            take = _take_over if _fixed_state(optimizer) else _take_over_any
            missed += take(name, optimizer, state.get(name, {"state": {}, "param_groups": []}))
        if self.muon is None:
            return missed
        saved = [group for part in state.values() for group in part["param_groups"]]
        before = {name: (g.get("manifold"), g.get("blocks"), g.get("radius")) for g in saved for name in g["names"]}
        now = {name: (g["manifold"], g["blocks"], g["radius"]) for g in self.muon.param_groups for name in g["names"]}
        moved = [n for n, place in now.items() if n in before and before[n] != place and place[0] != "euclidean"]
        self.muon.bring_onto_manifold(moved)
        return missed + [f"{name}: brought onto its manifold" for name in folded(moved)]


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer skips its step where its `found_inf` is 1. torch marks those that do for its GradScaler."""
    return isinstance(optimizer, (ManifoldMuon, Modular)) or getattr(optimizer, "_step_supports_amp_scaling", False)


def _fixed_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all state is tensors of known shapes: of ManifoldMuon and of torch's AdamW, but not of Modular and of other optimizers."""
    return isinstance(optimizer, ManifoldMuon) or type(optimizer) is torch.optim.AdamW


# ---- taking over state ----


def _take_over(kind: str, optimizer: torch.optim.Optimizer, saved_state: Mapping[str, Any]) -> list[str]:
    """Load the saved state that fits into an optimizer, by parameter name; returns a line for everything left at its start."""
    fresh = optimizer.state_dict()
    params = _by_name(optimizer)
    saved = _state_by_name(saved_state)
    taken: dict[int, dict[str, Tensor]] = {}
    missed: dict[str, list[str]] = {}
    for index, (name, p) in enumerate(params.items()):
        old, start = saved.get(name, {}), fresh["state"].get(index)
        # AdamW creates its state in its first step: numbers, and tensors of the shape of the parameter.
        wanted = start or {key: value if value.ndim == 0 else p for key, value in old.items()}
        fits = {key: old[key] for key, value in wanted.items() if key in old and old[key].shape == value.shape}
        lost = [key for key in wanted if key not in fits]
        if lost or name not in saved:
            missed.setdefault(", ".join(lost) or "state", []).append(name)
        taken[index] = fits if start or not lost else {}
    optimizer.load_state_dict({"state": taken, "param_groups": fresh["param_groups"]})
    return _lines(kind, missed)


def _take_over_any(kind: str, optimizer: torch.optim.Optimizer, saved_state: Mapping[str, Any]) -> list[str]:
    """The same for any other optimizer, whose state may be of any type, in the groups too.

    A parameter's state fits if the parameter has the same name and shape. A group takes the state of the saved group of its first
    parameter.
    """
    fresh, shapes, params = optimizer.state_dict(), saved_state.get("shapes", {}), _by_name(optimizer)
    saved = _state_by_name(saved_state)
    fits = {name: saved[name] for name, p in params.items() if name in saved and shapes.get(name) == list(p.shape)}
    taken = {index: fits[name] for index, name in enumerate(params) if name in fits}
    settings = settings_of_group(optimizer)
    for group in fresh["param_groups"]:
        twin: Mapping[str, Any] = next(
            (old for old in saved_state["param_groups"] if group["names"][0] in old["names"]), {}
        )
        group.update({key: value for key, value in twin.items() if key not in settings})
    optimizer.load_state_dict({"state": taken, "param_groups": fresh["param_groups"]})
    for name, state in fits.items():
        optimizer.state[params[name]] = like_saved(optimizer.state[params[name]], state)
    return _lines(kind, {"state": lost} if (lost := [name for name in params if name not in fits]) else {})


def _lines(kind: str, missed: Mapping[str, Sequence[str]]) -> list[str]:
    return [
        f"{kind}'s {what} of {name}: starts from scratch" for what, names in missed.items() for name in folded(names)
    ]


def _by_name(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {n: p for group in optimizer.param_groups for n, p in zip(group["names"], group["params"])}


def _shapes(optimizer: torch.optim.Optimizer) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in _by_name(optimizer).items()}


def _state_by_name(saved: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
    """Parameter name → its state."""
    groups = saved["param_groups"]
    return {name: saved["state"].get(i, {}) for group in groups for name, i in zip(group["names"], group["params"])}
