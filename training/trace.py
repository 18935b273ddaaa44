"""A trace of some updates by torch's profiler, with the phases of a step by name, and a short table of it.

The trace is `profile/trace.json.gz` in the directory of the run; chrome://tracing and ui.perfetto.dev show it. `profile/table.txt` has the
phases and the longest operations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAITED = 4
"""Updates before the trace: the first ones compile and create states; one more warms the profiler up."""

_OPERATIONS = 12  # how many a table names


class Trace:
    """Traces `steps` updates from the one after WAITED on; `step` must be called after every update. With None, nothing is done."""

    def __init__(self, steps: int | None, directory: Path, device: torch.device) -> None:
        self.steps, self.folder, self.device = steps, directory / "profile", device
        self.updates = 0
        self.profiler: profile | None = None
        if steps is not None:
            plan = schedule(wait=WAITED - 1, warmup=1, active=steps, repeat=1)
            self.profiler = profile(activities=activities(device), schedule=plan, on_trace_ready=self._write)
            self.profiler.start()

    def step(self) -> None:
        """An update is done."""
        self.updates += 1
        if self.profiler is not None:
            self.profiler.step()

    @property
    def traced(self) -> int:
        """How many updates the trace has so far."""
        return max(0, min(self.steps or 0, self.updates - WAITED))

    def close(self) -> None:
        """End the trace; if fewer updates were made than it was to have, it has those."""
        if self.profiler is not None:
            profiler, self.profiler = self.profiler, None
            profiler.stop()
            if self.traced < (self.steps or 0):
                made = f"of the {self.updates} that were made it has {self.traced}"
                print(f"profile={self.steps}: a trace begins after {WAITED} updates; {made}", flush=True)

    def _write(self, profiler: profile) -> None:
        if not self.traced:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        text = table(profiler, self.traced, self.device)
        (self.folder / "table.txt").write_text(text)
        print(f"{text}written: {self.folder / 'trace.json.gz'}", flush=True)


def activities(device: torch.device) -> list[ProfilerActivity]:
    """What the profiler watches: the host, and the GPU if it is the device."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def longest_operations(profiler: profile, steps: int, device: torch.device) -> list[dict[str, Any]]:
    """The operations that take longest on the device: their name, calls a step, milliseconds a step, and share of all operations."""
    events = sorted(_events(profiler, device, named=False), key=lambda pair: -pair[1])
    total = sum(spent for _, spent in events) or 1
    rows = []
    for event, spent in events[:_OPERATIONS]:
        row = {"operation": event.key[:70], "calls a step": event.count / steps, "ms a step": spent / 1e3 / steps}
        rows.append({**row, "share": spent / total})
    return rows


def phase_times(profiler: profile, steps: int, device: torch.device) -> dict[str, float]:
    """Milliseconds a step of every named phase on the device, those of phases within it included."""
    events = _events(profiler, device, named=True)
    theirs = ("ProfilerStep", "Optimizer.")  # torch names some parts itself
    return {event.key: spent / 1e3 / steps for event, spent in events if not event.key.startswith(theirs)}


def _events(profiler: profile, device: torch.device, named: bool) -> list[tuple[Any, float]]:
    """The named phases, or else the operations, on the device, and the microseconds of each; an operation's are without those of the operations in it."""
    on_cuda = device.type == "cuda"
    kind = torch.autograd.DeviceType.CUDA if on_cuda else torch.autograd.DeviceType.CPU
    key = f"{'' if named else 'self_'}{'device' if on_cuda else 'cpu'}_time_total"
    found = (e for e in profiler.key_averages() if e.device_type == kind and bool(e.is_user_annotation) == named)
    return [(event, getattr(event, key)) for event in found]


def table(profiler: profile, steps: int, device: torch.device) -> str:
    """Phases and longest operations as lines of text."""
    lines = [f"{'phase':<50}{'ms a step':>12}"]
    lines += [f"{name[:48]:<50}{ms:>12.3f}" for name, ms in phase_times(profiler, steps, device).items()]
    lines += ["", f"{'operation':<50}{'ms a step':>12}{'calls':>10}{'share':>8}"]
    for row in longest_operations(profiler, steps, device):
        lines.append(
            f"{row['operation'][:48]:<50}{row['ms a step']:>12.3f}{row['calls a step']:>10.1f}{row['share']:>8.1%}"
        )
    return "\n".join(lines) + "\n"
