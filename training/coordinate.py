"""The coordinate check: how far a step moved each parameter, and the features behind it, each in its own norm.

A step of size eta in the norm input → output of a parameter changes no feature by more than eta times the size of its input. Here that is
measured: the same inputs go through each module twice, with the parameter before and after the step; what lies before the module is as it is
after the step. It is asked of any optimizer, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        change of the module's output, over tokens. input_max: the largest size of its input (1 for tokens, as one-hot vectors; of a gain,
        what it multiplies). The last three are None for a parameter whose module is not called, such as a head that the loss uses by itself.
        """
        features = self._features(x)
        for name, old in self.before.items():
            p, (source, target) = self.params[name], self.pairs[name]
            size = norm_of(p, source, target, exact=True).size(as_operator(p - old, source))
            unknown = dict.fromkeys(("change_max", "change_mean", "input_max"))
            yield name, {"input": source, "output": target, "size": size.item(), **features.get(name, unknown)}

    def _features(self, x: Tensor) -> dict[str, dict[str, float]]:
        """The measured features of every parameter whose module is called with one tensor."""
        found: dict[str, dict[str, float]] = {}
        busy = False

        def measure(module: nn.Module, inputs: tuple[Any, ...], after: Any, own: dict[str, str]) -> None:
            nonlocal busy
            if busy or len(inputs) != 1 or not isinstance(after, Tensor):
                return
            busy = True  # a module may call others
            for leaf, name in own.items():
                p, (source, target) = self.params[name], self.pairs[name]
                given = inputs[0]
                change = FEATURES[target]((after - _output_with(module, given, p, self.before[name])).float())
                if p.ndim < 2 and leaf != "bias":  # a gain multiplies what its module has made of the input
                    ones, zeros = torch.ones_like(p), torch.zeros_like(p)
                    given = _output_with(module, given, p, ones) - _output_with(module, given, p, zeros)
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


def _output_with(module: nn.Module, x: Tensor, p: Tensor, value: Tensor) -> Any:
    """What a module gives for x with another value of its parameter p, which is then as it was."""
    own, p.data = p.data, value
    try:
        return module.forward(x)
    finally:
        p.data = own
