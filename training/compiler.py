"""torch's compiler during a run: whether the run uses it, and how long the run waited for it."""

from __future__ import annotations

import time
from typing import Any

import torch

from training.settings import Settings


def uses_compiler(cfg: Settings, device: torch.device, has_muon: bool) -> bool:
    """Whether the model or the certified step is compiled; by default, both are on CUDA."""
    rule = cfg.optim.muon.rule
    asked = [cfg.compile if cfg.compile != "auto" else None]
    asked += [rule.compile] if has_muon and rule.kind == "certified" else []
    return any(device.type == "cuda" if word is None else word for word in asked)


class CompilerWatch:
    """Counts the programs that this process compiles until `close`, and the seconds that it takes. Without `active` it counts nothing.

    Seconds in which a kernel's variants are timed, when a program runs for the first time on a GPU, are not among them.
    """

    def __init__(self, active: bool) -> None:
        self.active, self.seconds = active, 0.0
        if active:
            from torch._dynamo.callback import callback_handler  # here, because it takes seconds
            from torch._dynamo.utils import counters

            self._handler, self._counters = callback_handler, counters
            self._seen = self._counted()
            self._handler.register_start_callback(self._start)
            self._handler.register_end_callback(self._end)

    def _start(self, _: Any) -> None:
        self._started = time.perf_counter()

    def _end(self, _: Any) -> None:
        self.seconds += time.perf_counter() - self._started

    def _counted(self) -> tuple[int, int]:
        """Programs of this process so far, and how many of them came from the compiler's cache."""
        found = self._counters["inductor"]  # not kept: the compiler replaces it
        cached = found["fxgraph_cache_hit"]
        return cached + found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"], cached

    def read(self) -> dict[str, Any] | None:
        """The fields of an event about the programs since the last call; None if there are none."""
        if not self.active:
            return None
        (programs, cached), (programs_before, cached_before) = self._counted(), self._seen
        self._seen = programs, cached
        new, from_cache, seconds = programs - programs_before, cached - cached_before, self.seconds
        self.seconds = 0.0
        if not new:
            return None
        message = (
            f"compiled {new} program{'s' if new > 1 else ''} in {seconds:.0f} s, {from_cache} from the compiler's cache"
        )
        return {"event": "compiled", "message": message, "programs": new, "cached": from_cache, "seconds": seconds}

    def close(self) -> None:
        """Stop counting."""
        if self.active:
            self.active = False
            self._handler.remove_start_callback(self._start)
            self._handler.remove_end_callback(self._end)
