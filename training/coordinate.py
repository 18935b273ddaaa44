"""The coordinate check: how far a step moved each parameter, and the features behind it, each in its own norm.

A step of size eta in the norm input → output of a parameter changes no feature by more than eta times the size of its input. Here that is
measured: the same inputs go through each module twice, with the parameter before and after the step; what lies before the module is as it is
after the step. It is asked of any optimizer, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optim.modular import as_operator, norm_of
from optim.norms import FEATURES
from training.groups import norm_pairs
from training.settings import Settings

Pairs = Mapping[str, tuple[str, str]]
"""Parameter name → the names of the norms of its input and output."""


def coordinate_check(model: nn.Module, cfg: Settings) -> CoordinateCheck:
    """The check that a configuration asks for; of no parameters, if log.interval_updates is null."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return CoordinateCheck(model, {} if cfg.log.interval_updates is None else norm_pairs(shapes, cfg.optim.norms))


class CoordinateCheck:
    """Keeps the parameters of one step, and measures what the step did.

    Args:
        model: whose parameters step. pairs: of the parameters to measure.
    """

    def __init__(self, model: nn.Module, pairs: Pairs) -> None:
        self.model = model
        self.params = {name: p for name, p in model.named_parameters() if name in pairs}
        self.pairs = pairs
        self.before: dict[str, Tensor] = {}

    def watch(self, on: bool) -> None:
        """Keep a copy of the parameters for the step that comes, or drop it."""
        self.before = {name: p.detach().clone() for name, p in self.params.items()} if on else {}

    @torch.no_grad()
    def records(self, x: Tensor) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each parameter's name, and what the watched step did, for tokens x (B, T) int64; nothing if none was watched.

        input, output: the names of the norms. size: of the parameter's change, weight decay included. change_max, change_mean: of the
        change of the module's output, over tokens; of a norm before a sublayer, of what the sublayer is given.
        input_max: the largest size of its input (1 for tokens, as one-hot vectors; of a gain, what it multiplies). The last three are None
        for a parameter whose module is not called with features alone, such as a learned scale that multiplies weights.
        """
        features = self._features(x)
        for name, old in self.before.items():
            p, (source, target) = self.params[name], self.pairs[name]
            size = norm_of(p, source, target, exact=True).size(as_operator(p - old, source))
            unknown = dict.fromkeys(("change_max", "change_mean", "input_max"))
            yield name, {"input": source, "output": target, "size": size.item(), **features.get(name, unknown)}

    def _features(self, x: Tensor) -> dict[str, dict[str, float]]:
        """The measured features of every parameter whose module is called with a tensor; with a sublayer too, if it is a joint."""
        found: dict[str, dict[str, float]] = {}
        busy = False

        def measure(module: nn.Module, inputs: tuple[Any, ...], after: Any, own: dict[str, str]) -> None:
            nonlocal busy
            if busy or not inputs or not all(map(callable, inputs[1:])) or not isinstance(after, Tensor):
                return
            busy = True  # a module may call others
            sublayers = [_Once(sublayer) for sublayer in inputs[1:]]
            for leaf, name in own.items():
                p, (source, target) = self.params[name], self.pairs[name]
                feature = _feature(module, inputs[0], sublayers, p)
                now = feature(p.data) if sublayers else after
                change = FEATURES[target]((now - feature(self.before[name])).float())
                # A gain multiplies what its module has made of the input.
                gain = p.ndim < 2 and leaf != "bias"
                given = feature(torch.ones_like(p)) - feature(torch.zeros_like(p)) if gain else inputs[0]
                numbers = given.is_floating_point() and leaf != "bias"
                size = FEATURES[source](given.float()) if numbers else torch.ones(())
                found[name] = {"change_max": change.max().item(), "change_mean": change.mean().item()}
                found[name]["input_max"] = size.max().item()
            busy = False

        modules: dict[str, dict[str, str]] = {}
        for name in self.before:
            path, _, leaf = name.rpartition(".")
            modules.setdefault(path, {})[leaf] = name

        def hook(own: dict[str, str]) -> Any:
            return lambda module, inputs, after: measure(module, inputs, after, own)

        handles = [self.model.get_submodule(path).register_forward_hook(hook(own)) for path, own in modules.items()]
        was_training = self.model.training
        self.model.eval()
        try:
            if handles:
                self.model(x)
        finally:
            self.model.train(was_training)
            for handle in handles:
                handle.remove()
        return found


class _Once:
    """A sublayer that computes once and then answers the same again. handed: what it was given last."""

    def __init__(self, sublayer: Callable[[Tensor], Tensor]) -> None:
        self.sublayer = sublayer
        self.handed: Any = None
        self.written: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        self.handed = x
        if self.written is None:
            self.written = self.sublayer(x)
        return self.written


def _feature(module: nn.Module, x: Tensor, sublayers: Sequence[_Once], p: Tensor) -> Callable[[Tensor], Tensor]:
    """What a module makes of x with a value of its parameter p, as a function of the value.

    It is the module's output; or what a sublayer is handed, where that depends on p, because a joint may use p before the sublayer.
    """

    def outputs(value: Tensor) -> list[Any]:
        own, p.data = p.data, value
        try:
            written = module.forward(x, *sublayers)
        finally:
            p.data = own
        return [*(sublayer.handed for sublayer in sublayers), written]

    place = -1
    if sublayers:
        pairs = zip(outputs(torch.ones_like(p)), outputs(torch.zeros_like(p)))
        place = next((i for i, (one, none) in enumerate(pairs) if not torch.equal(one, none)), -1)
    return lambda value: outputs(value)[place]
