"""Optimizers of torch and of other libraries, named by their import path in the configuration (configs/optim/_library.yaml).

Before a run starts, `problems` tries the optimizer on a small matrix: settings that it refuses, a closure that it needs, and state that a
checkpoint cannot hold are errors of the configuration, not of the first step or of the first save.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

import torch
from torch import Tensor, nn

from training.checkpoint import CheckpointError, refuse_foreign
from training.settings import Library

KEY = "optim.library.optimizer"
EXTRA = "pip install -e '.[baselines]'"
_OURS = ("lr", "weight_decay", "params")  # have their own keys, or are given by the program


def display_name(library: Library) -> str:
    """What tables, records and checkpoints call the optimizer: the name of its class. AdamW is there already, for other parameters."""
    name = library.optimizer.rpartition(".")[2]
    return f"{name} of matrices" if name == "AdamW" else name


def find_class(library: Library) -> type[torch.optim.Optimizer]:
    """The class at the import path.

    Raises:
        LookupError: there is none; the message has the remedy.
    """
    module, _, name = library.optimizer.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None) if module else None
    except ModuleNotFoundError as error:
        remedy = f"{EXTRA} installs it" if error.name == "pytorch_optimizer" else "install it, or mend the path"
        raise LookupError(
            f"{KEY} is {library.optimizer}, but there is no module {error.name}; {remedy}, "
            "or choose an optimizer of torch, such as torch.optim.SGD"
        ) from None
    except Exception as error:  # of the library's own code
        raise LookupError(f"{KEY} is {library.optimizer}, which cannot be imported ({_told(error)})") from None
    if inspect.isclass(found) and issubclass(found, torch.optim.Optimizer):
        return found
    what = "names no class" if found is None else "is not a torch.optim.Optimizer"
    raise LookupError(f"{KEY} is {library.optimizer}, which {what}; give an import path such as torch.optim.SGD")


def parameters_of(cls: type[torch.optim.Optimizer]) -> Mapping[str, inspect.Parameter]:
    """The named parameters of a class's constructor, and of its parents' as far as it passes keywords on."""
    found: dict[str, inspect.Parameter] = {}
    for part in cls.__mro__:
        if part is torch.optim.Optimizer:
            break
        if "__init__" not in vars(part):
            continue
        here = inspect.signature(part.__init__).parameters  # type: ignore[misc]  # of a class, on purpose
        found = {**here, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in here.values()):
            break
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in found.items() if p.kind in named and name != "self"}


def make(library: Library, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of the configuration for parameter groups with "params" and "lr".

    Raises:
        LookupError: see `find_class`. Any error of the optimizer itself.
    """
    cls = find_class(library)
    settings = {"lr": library.lr, "weight_decay": library.weight_decay, **library.settings}
    if "weight_decay" not in parameters_of(cls):
        del settings["weight_decay"]
    make_it: Any = cls  # its arguments are checked by `problems`
    return make_it(groups, **settings)


def problems(library: Library) -> list[str]:
    """Reasons why the optimizer cannot be used as configured, with remedies."""
    try:
        cls = find_class(library)
    except LookupError as error:
        return [str(error)]
    name, known = library.optimizer, parameters_of(cls)
    found = []
    for key in library.settings:
        if key in _OURS:
            found.append(f"optim.library.settings.{key} has a key of its own; use optim.library.{key}")
        elif key not in known:
            near = get_close_matches(key, known, 1)
            remedy = (
                f"did you mean {near[0]}?" if near else f"choose of {', '.join(k for k in known if k not in _OURS)}"
            )
            found.append(f"optim.library.settings.{key} is no setting of {name}; {remedy}")
    if "lr" not in known:
        found.append(f"{KEY}={name} takes no learning rate lr, which the schedule changes; choose another optimizer")
    if library.weight_decay and "weight_decay" not in known:
        found.append(f"optim.library.weight_decay is {library.weight_decay:g}, but {name} has none; give 0")
    if not found:
        trouble = _trial(library)
        found = [f"{KEY}={name} cannot be used: {trouble}"] if trouble else []
    return found


def _trial(library: Library) -> str | None:
    """What is wrong when the optimizer takes two steps on a small matrix on the CPU; None if nothing is."""
    matrix = nn.Parameter(torch.full((8, 4), 0.5))
    given = ", ".join(f"optim.library.settings.{key}" for key in library.settings) or "optim.library.settings"
    remedy = f"change {given}, or choose another optimizer"
    try:
        with torch.random.fork_rng(devices=[]):
            optimizer = make(library, [{"params": [matrix], "names": ["matrix"], "lr": library.lr}])
            for _ in range(2):
                matrix.grad = torch.linspace(-1, 1, 32).reshape(8, 4).sin()
                optimizer.step()
            refuse_foreign(optimizer.state_dict(), "its state")
    except CheckpointError as error:
        return str(error)
    except Exception as error:  # of any kind: it is the library's
        return f"{_told(error)}; {remedy}"
    return None if matrix.isfinite().all() else f"a matrix is not finite after two steps; {remedy}"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def describe(library: Library) -> str:
    """The class, the version of its package, and its settings, in one line."""
    module = library.optimizer.partition(".")[0]
    try:
        [package, *_] = packages_distributions().get(module, [module])
        where = f"{package} {version(package)}"
    except PackageNotFoundError:
        where = "a module without a version"
    settings = ", ".join(f"{key} {_text(value)}" for key, value in library.settings.items()) or "its own defaults"
    return f"{library.optimizer} of {where}; {settings}"


def _text(value: Any) -> str:
    return f"({', '.join(map(_text, value))})" if isinstance(value, tuple) else f"{value}"


# ---- state of any type ----


def settings_of_group(optimizer: torch.optim.Optimizer) -> frozenset[str]:
    """The keys of a parameter group that are settings. All others are state: some libraries count their steps in the group."""
    return frozenset({*parameters_of(type(optimizer)), "params", "names"})


def like_saved(value: Any, saved: Any) -> Any:
    """State as torch loaded it, with the dtypes that were saved; torch turns all floats into the dtype of the parameter."""
    if isinstance(value, Tensor) and isinstance(saved, Tensor):
        return value if value.dtype == saved.dtype else saved.to(value.device, copy=True)
    if isinstance(value, dict):
        return {key: like_saved(item, saved[key]) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(like_saved(item, old) for item, old in zip(value, saved))
    return value


def tensors_of(state: Any) -> list[Tensor]:
    """All tensors in nested state."""
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]
