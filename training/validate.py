"""Every problem of a configuration at once, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import torch

from training.stability import Stability


class ConfigError(Exception):
    """A configuration that cannot run; the message lists every problem, each with its remedy."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__(
            "\n".join([f"the configuration has {count}; nothing was written:", *(f"  - {p}" for p in self.problems)])
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)  # the message alone could not be turned back into problems


_CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"),
    "compile": ("auto", True, False),
    "logger.mode": ("online", "offline", "disabled"),
    "optim.muon.rule.msign_dtype": ("float32", "bfloat16"),
}
_POSITIVE = (
    *("max_steps", "global_batch_tokens", "micro_batch_size", "eval_interval", "eval_windows", "log.interval"),
    *(
        "log.interval_spectra",
        "checkpoint.interval",
        "checkpoint.keep",
        "log.interval_certificate",
        "launcher.nproc",
        "schedule.decay_steps",
    ),
    "probe.windows",
    *("optim.muon.rule.dual_steps", "optim.muon.rule.msign_steps"),
)
_NOT_NEGATIVE = (
    *(
        "seed",
        "probe.interval",
        "schedule.warmup_steps",
        "grad_clip",
        "optim.muon.lr",
        "optim.muon.weight_decay",
        "optim.adamw.lr",
    ),
    *("optim.adamw.weight_decay", "optim.adamw.eps", "schedule.floor"),
)
_FRACTIONS = ("optim.muon.momentum",)


def get(cfg: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    value: Any = cfg
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def missing(cfg: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys whose value is still to be given."""
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            yield from missing(value, f"{prefix}{key}.")
        elif value == "???":
            yield prefix + key


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def problems_of_values(cfg: Mapping[str, Any]) -> list[str]:
    """What is wrong with single values: a missing one, one of the wrong kind, one out of range."""
    found = []
    for key, choices in _CHOICES.items():
        value = get(cfg, key)
        if value is not None and value not in choices:
            near = get_close_matches(str(value), [str(c) for c in choices], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            found.append(f"{key} is {value!r}; choose one of {', '.join(str(c).lower() for c in choices)}{hint}")
    for key in _POSITIVE:
        value = get(cfg, key)
        if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            found.append(f"{key} is {value!r}; it must be a positive whole number")
    for key in _NOT_NEGATIVE:
        value = get(cfg, key)
        if value is not None and not (_is_number(value) and value >= 0):
            found.append(f"{key} is {value!r}; it must be a number, at least 0")
    for key in _FRACTIONS:
        value = get(cfg, key)
        if value is not None and not (_is_number(value) and 0 <= value < 1):
            found.append(f"{key} is {value!r}; it must lie in [0, 1)")
    if cfg.get("device") == "cuda" and not torch.cuda.is_available():
        found.append("device=cuda, but torch finds no CUDA device; use device=auto or device=cpu")
    return found


def problems_of_batch(cfg: Mapping[str, Any], world: int) -> list[str]:
    """Whether the global batch can be cut into whole micro-batches on every rank."""
    windows_of_all, block, micro = cfg["global_batch_tokens"], cfg["model"]["block_size"], cfg["micro_batch_size"]
    if not all(isinstance(v, int) and v > 0 for v in (windows_of_all, block, micro)):
        return []  # reported by problems_of_values
    share = block * micro * world
    if windows_of_all % share == 0:
        return []
    ranks = f" x {world} ranks" if world > 1 else ""
    low = max(share, windows_of_all // share * share)
    return [
        f"global_batch_tokens={windows_of_all} is not a multiple of block_size {block} x micro_batch_size {micro}{ranks} = {share}; "
        f"use global_batch_tokens={low} or a micro_batch_size that divides it"
    ]


def problems_of_schedule(cfg: Mapping[str, Any], kinds: Iterable[str]) -> list[str]:
    """Whether the schedule exists and ends after its warm-up."""
    schedule, kinds = cfg["schedule"], list(kinds)
    found = []
    if schedule["kind"] not in kinds:
        found.append(f"schedule.kind is {schedule['kind']!r}; choose one of {', '.join(kinds)}")
    warmup, decay = schedule["warmup_steps"], schedule["decay_steps"]
    if all(_is_number(v) for v in (warmup, decay)) and warmup >= decay:
        found.append(
            f"schedule.warmup_steps={warmup} leaves nothing of schedule.decay_steps={decay}; lower it or raise max_steps"
        )
    return found


def problems_of_stability(cfg: Mapping[str, Any]) -> list[str]:
    """Whether the thresholds of instability and of its warning make sense."""
    try:
        Stability(**cfg["stability"])
    except (TypeError, ValueError) as error:
        return [str(error)]
    return []


def problems_of_clip(cfg: Mapping[str, Any], rows: Iterable[Any]) -> list[str]:
    """Whether QK-clip would take the fused matrices of a manifold, named in `rows` (optim.groups.Row), off it."""
    attention = cfg["attention"]
    if not attention["qk_clip"] or attention["qk_clip_on"] != "weights":
        return []
    held = [row.name for row in rows if row.manifold not in (None, "euclidean") and "c_attn" in row.name.split(".")]
    if not held:
        return []
    return [
        f"attention.qk_clip_on=weights would take {len(held)} matrices such as '{held[0]}' off their manifold; "
        "use attention.qk_clip_on=gain"
    ]
