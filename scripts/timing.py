"""Clocks and memory for the benchmarks: contestants that take turns, and the most memory that one of them needs."""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from training.run import device_name

# Dense bfloat16 peak of one device, in FLOP/s, by a part of its name (vendors' data sheets).
PEAK = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}

NOT_MEASURED = "not measured"


def device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_folder() -> str:
    """The name of the device as that of a folder of results."""
    return re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds from the call until the device is done with it."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def measure(
    contestants: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1, limit_s: float = 0
) -> dict[str, list[float]]:
    """Seconds of every call, contestants taking turns so that a drifting machine is fair to all.

    limit_s: after so many seconds no further call is made, and who has not had a turn has no seconds; 0: no limit.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + (limit_s or float("inf"))
    for turn in range(warmup + repeats):
        for name, call in contestants.items():
            if time.perf_counter() > end:
                return times
            seconds = seconds_of(call)
            if turn >= warmup:
                times[name].append(seconds)
    return times


def median(seconds: list[float]) -> float | str:
    """The median, or "not measured"."""
    return statistics.median(seconds) if seconds else NOT_MEASURED


def peak_bytes(call: Callable[[], object], own: Iterable[Tensor]) -> int | None:
    """The most memory that a call needs: the tensors it works on (`own`), and what it allocates beside them while it runs.

    What others hold at the same time is not counted: in one process every contestant of a table would have the largest one's peak. On
    CUDA by the allocator's count; on the CPU by the resident memory of the process, which the kernel counts (Linux only; elsewhere None).
    """
    resident = sum(t.numel() * t.element_size() for t in own)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return resident + torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, or it would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    call()
    return resident + max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")
