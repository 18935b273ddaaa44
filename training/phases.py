"""How long each phase of training takes, without a wait for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.profiler import record_function


class Phases:
    """Seconds of every phase, summed between two readings. An instance is called as a context:

        with phase("optimizer"):
            ...

    A phase within another interrupts it, so no second counts twice. On CUDA, the seconds are those of the device: from the moment at which
    it comes to the beginning of the phase until it comes to the end. If the device has nothing to do while the host prepares a
    batch, it waits within that phase, so the wait counts. Events of the current stream give these moments, and they are read in `read` only. On a
    CPU, the seconds are those of the clock. A trace of the profiler shows the phases by name.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._last: float = 0.0
        # On CUDA: moments, and the phase that begins at each (None: none does).
        self._marks: list[tuple[str | None, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A context that is the phase `name`."""
        self._pass_to([*self._open, name])
        try:
            with record_function(name):
                yield
        finally:
            self._pass_to(self._open[:-1])

    def _pass_to(self, phases: list[str]) -> None:
        """From now on, the last of `phases` is under way."""
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phases[-1] if phases else None, event))
        else:
            now = time.perf_counter()
            if self._open:
                self._add(self._open[-1], now - self._last)
            self._last = now
        self._open = phases

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """Phase → seconds since the last reading. Waits for the device to come to the end of the last phase. Not to be called within a phase."""
        if self._marks:
            self._marks[-1][1].synchronize()
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:]):
            if name is not None:
                self._add(name, begin.elapsed_time(end) / 1e3)
        found, self._seconds, self._marks = self._seconds, {}, []
        return found


def as_phase(name: str) -> Callable[[Callable], Callable]:
    """A decorator: every call of a method is the phase `name` of its object's `phase`, a Phases."""

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return method(self, *args, **kwargs)

        return timed

    return decorate
