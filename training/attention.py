"""Which backend of torch computes attention: the fastest one on this device, by a measurement before the first step.

The choice is part of a run: its checkpoints hold it, and a resumed run keeps it, since backends round differently.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import computed_by
from training.machine import resolve_device, wait_for
from training.settings import Settings
from training.validate import ConfigError

MEASURED = ("flash", "cudnn", "efficient")
"""What is measured. `math` computes all B·H·T² logits, so it is never the fastest, and may need more memory than there is."""

# Calls before the first measurement, calls that are timed together, and how often; of these the fastest counts.
_BEFORE, _TOGETHER, _TIMES = 2, 5, 4


@dataclass(frozen=True)
class Backend:
    """The backend, None for torch's own choice, and the dtype of the queries for which it is used.

    seconds: of forward and backward with each backend that was measured; None for a backend that refused this shape.
    """

    backend: str | None
    dtype: torch.dtype
    seconds: dict[str, float | None] = field(default_factory=dict)

    def describe(self) -> str:
        """What computes attention, as text."""
        return f"attention by {self.backend or 'the choice of torch'}"

    def record(self) -> dict[str, Any]:
        """The fields of the `attention` event."""
        times = (f"{name} {'refused' if s is None else f'{1e3 * s:.3g} ms'}" for name, s in self.seconds.items())
        message = f"{self.describe()} (a layer takes: {', '.join(times)})"
        return {"backend": self.backend, "seconds": self.seconds, "message": message}


def choose(cfg: Settings, device: torch.device, micro_batch: int, kept: Backend | None = None) -> Backend:
    """The backend for the attention of a run in training; `kept`: that of the run that is resumed.

    It is measured with `attention_backend=auto` on CUDA. There is nothing to choose on a CPU, and where attention is explicit or masked.

    Args:
        micro_batch: windows of a forward pass.

    Raises:
        ConfigError: the backend that is asked for does not accept queries of this shape and dtype here.
    """
    asked: str | None = cfg.attention_backend
    dtype, model = resolve_device(cfg)[1], cfg.model
    shape = (micro_batch, model.block_size, model.n_head, model.n_embd // model.n_head)
    remedy = "use attention_backend=auto"
    if asked == "auto" and kept is not None:
        asked = kept.backend
        remedy = "the run began with it; continue it where it began, or with allow_changes=true, which chooses again and changes the last bits"
    if asked == "auto":
        explicit = cfg.attention.logit_cap is not None or cfg.batches.documents
        nothing = device.type != "cuda" or explicit
        return Backend(None, dtype) if nothing else measured(shape, dtype, model.dropout, device)
    why = None if asked is None else refusal(asked, shape, dtype, model.dropout, device)
    if why is not None and kept is not None and cfg.allow_changes:
        return choose(cfg, device, micro_batch)
    if why is not None:
        raise ConfigError([f"the backend {asked} does not accept the attention of this run here ({why}); {remedy}"])
    return Backend(asked, dtype)


@cache  # the runs of one process share the choice, and so their compiled programs
def measured(shape: tuple[int, int, int, int], dtype: torch.dtype, dropout: float, device: torch.device) -> Backend:
    """The backend that is fastest for the shape (B, T, H, w)."""
    accepted = [name for name in MEASURED if refusal(name, shape, dtype, dropout, device) is None]
    calls = {name: partial(_call, name, *_inputs(shape, dtype, device), dropout) for name in accepted}
    fastest = {name: min(times) for name, times in _seconds(calls, device).items()}
    seconds = {name: fastest.get(name) for name in MEASURED}
    return Backend(min(fastest, key=fastest.__getitem__, default=None), dtype, seconds)


def refusal(name: str, shape: tuple[int, ...], dtype: torch.dtype, dropout: float, device: torch.device) -> str | None:
    """Why a backend does not accept the shape, in the words of torch; None if it does."""
    # `said` is the reasons, and the names of the backends that are switched off.
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            _call(name, *_inputs(shape, dtype, device), dropout)
        except RuntimeError as error:
            texts = [str(w.message) for w in said]
            reasons = [t for t in texts if "because" not in t and "disabled" not in t] or [str(error)]
            return " ".join(reasons[0].partition("(Triggered")[0].split())
    return None


def _seconds(calls: Mapping[str, Callable[[], None]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, several times. They take turns, so that a device whose clock still rises is fair to all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn, count in enumerate((_BEFORE, *[_TOGETHER] * _TIMES)):
        for name, call in calls.items():
            wait_for(device)
            start = time.perf_counter()
            for _ in range(count):
                call()
            wait_for(device)
            if turn:
                times[name].append((time.perf_counter() - start) / count)
    return times


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Queries, keys and values in one tensor (3, B, H, T, w) as the model has them, and a gradient (B, H, T, w) for their output."""
    B, T, H, w = shape
    draw: Any = {"generator": torch.Generator(device).manual_seed(0), "device": device, "dtype": dtype}
    fused = torch.randn(B, T, 3, H, w, **draw).requires_grad_()
    return fused, torch.randn(B, T, H, w, **draw).transpose(1, 2)


@torch.enable_grad()
def _call(name: str, fused: Tensor, gradient: Tensor, dropout: float) -> None:
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    with computed_by(name):
        y = F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True)
    torch.autograd.grad(y, fused, gradient)
