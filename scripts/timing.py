"""Time and memory for the benchmarks: seconds of several calls made by turns, and the peak memory of one call."""

from __future__ import annotations

import ctypes
import random
import re
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from training.machine import device_name, wait_for
from training.signals import Stopped

NOT_MEASURED = "not measured"

Rows = list[dict[str, Any]]
"""The lines of a benchmark's table: heading → value."""

Key = TypeVar("Key")

failures: list[str] = []
"""What failed and was left out, see `note_failure`."""

# The share of a time limit after which nothing more is compiled.
_TO_COMPILE = 0.8


def device() -> torch.device:
    """The current CUDA device if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_folder() -> str:
    """The device's name in the form of a folder's name, for results/."""
    return re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")


def steps_together() -> int:
    """How many training steps are timed as one.

    A single step on a GPU begins with an idle device and ends with a wait; those of training do not.
    """
    return 4 if torch.cuda.is_available() else 1


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds from the call until the device is done with it."""
    wait_for(device())
    start = time.perf_counter()
    call()
    wait_for(device())
    return time.perf_counter() - start


def several(call: Callable[[], object], times: int) -> None:
    """Make the same call several times."""
    for _ in range(times):
        call()


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """Within this context, the first SIGTERM raises Stopped, and the list has its number from then on.

    What measures catches it and returns what it has, so that a benchmark that is stopped loses nothing.
    """
    came: list[int] = []

    def stop(signum: int, _: object) -> None:
        signal.signal(signum, before)
        came.append(signum)
        raise Stopped(signum, "stopped outside of a measurement")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def note_failure(name: object) -> None:
    """Of an exception that is being handled: print it, name it in `failures`, and free what it held, so that the others can go on."""
    print(f"{name} failed:", file=sys.stderr)
    traceback.print_exc()
    failures.append(str(name))
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # after some errors of a GPU no call of it works
            torch.cuda.empty_cache()


def take_turns(
    calls: Mapping[Key, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    limit_s: float = 0,
    shuffled: bool = False,
    together: int = 1,
) -> dict[Key, list[float]]:
    """Seconds of every call. Each turn makes every call once, so that a machine whose speed drifts is fair to all.

    A stop signal ends it as the limit does, see `stoppable`. A call that fails is not made again, see `note_failure`; it has the seconds of
    the turns before.

    Args:
        repeats, warmup: turns that are timed, after calls that are not: these compile.
        limit_s: after this time no further call is made, and after a share of it no further call is compiled: then the others are timed,
            each once at least. A call without a turn has no seconds. 0: no limit.
        shuffled: whether each turn has a new random order (of a fixed seed).
        together: a turn makes each call so many times, without a wait between them, and its seconds are those of one.
    """
    times: dict[Key, list[float]] = {name: [] for name in calls}
    start, limit = time.perf_counter(), limit_s or float("inf")
    order: list[Key] = []
    shuffle = random.Random(0).shuffle
    try:
        for name, call in calls.items():
            if time.perf_counter() > start + _TO_COMPILE * limit:
                break
            try:
                for _ in range(warmup):
                    seconds_of(call)
            except Exception:
                note_failure(name)
            else:
                order.append(name)
    except Stopped:
        limit = 0
    with suppress(Stopped):
        for turn in range(repeats):
            if shuffled:
                shuffle(order)
            for name in tuple(order):
                if turn and time.perf_counter() > start + limit:
                    return times
                try:
                    times[name].append(seconds_of(partial(several, calls[name], together)) / together)
                except Exception:
                    note_failure(name)
                    order.remove(name)
    return times


def median(seconds: list[float]) -> float | str:
    """The median, or "not measured"."""
    return statistics.median(seconds) if seconds else NOT_MEASURED


def peak_bytes(call: Callable[[], object], own: Iterable[Tensor]) -> int | None:
    """The peak memory of a call: the tensors that it works on (`own`), and what it allocates while it runs.

    Memory that the process holds for other purposes is not counted, so that each row of a table has its own peak. CUDA's allocator counts
    it; on a CPU the kernel does, as the resident memory of the process (Linux only; None elsewhere). There, memory that the process has freed
    but still holds is not counted, so measure in a process that did little before.
    """
    parts = [t.untyped_storage() for t in own]
    storages = {part.data_ptr(): part.nbytes() for part in parts}  # several tensors may be parts of one
    resident = sum(storages.values())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return resident + torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system; used again, it would not be counted
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    call()
    return resident + max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    """The value of a line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")
