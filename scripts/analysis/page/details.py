"""The tables below the charts: cost, geometry of the parameters, settings that differ, machines."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Sequence
from datetime import timedelta

from scripts.analysis.page.verdict import Setting
from scripts.analysis.runs import RecordedRun, text_at
from scripts.analysis.tables import Table, different, known_columns
from training.files import PARAMETERS_FILE

_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28}\b")  # of a commit, of which twelve digits are enough


def costs(settings: Sequence[Setting]) -> Table:
    """Speed, MFU, memory, time, and the share of every phase, a line a setting: medians and means over its runs."""
    times = [[_seconds(r) for r in s.runs] for s in settings]
    phases = list(dict.fromkeys(name for row in times for seconds in row for name in seconds))
    headings = ["setting", "tokens a second", "MFU", "peak memory (GiB)", "time", *phases]
    lines = []
    for s, row in zip(settings, times):
        rates = [v for r in s.runs for v in _numbers(r, "train", "tokens_per_s")]
        shares = [v for r in s.runs for v in _numbers(r, "train", "mfu")]
        peaks = [v for r in s.runs for v in (*_numbers(r, "train", "peak_device_bytes"), *_host_bytes(r))]
        spent = [v for r in s.runs for v in _numbers(r, "end", "train_seconds")]
        known = [seconds for seconds in row if seconds]
        parts = [
            statistics.fmean(seconds.get(name, 0.0) / sum(seconds.values()) for seconds in known) if known else None
            for name in phases
        ]
        lines.append(
            [
                s.label,
                f"{statistics.median(rates):,.0f}" if rates else "",
                f"{statistics.median(shares):.1%}" if shares else "",
                f"{max(peaks) / 2**30:.2f}" if peaks else "",
                str(timedelta(seconds=round(statistics.fmean(spent)))) if spent else "",
                *("" if part is None else f"{part:.1%}" for part in parts),
            ]
        )
    return known_columns(Table(headings, lines, [False] + [True] * (len(headings) - 1)))


def _seconds(run: RecordedRun) -> dict[str, float]:
    """Phase → its seconds in all of training; empty if the run did not record them."""
    total: dict[str, float] = {}
    for kind in ("train", "end"):
        for record in run.records.get(kind, []):
            for name, seconds in (record.get("time") or {}).items():
                total[name] = total.get(name, 0.0) + seconds
    return total if sum(total.values()) > 0 else {}


def _numbers(run: RecordedRun, kind: str, key: str) -> list[float]:
    values = [record.get(key) for record in run.records.get(kind, [])]
    return [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]


def _host_bytes(run: RecordedRun) -> list[float]:
    """The peak memory of the host, which counts only on a CPU."""
    peak = run.cost.get("peak_bytes")
    return [peak] if isinstance(peak, (int, float)) and run.environment.get("device", "").startswith("CPU") else []


def geometries(settings: Sequence[Setting]) -> list[tuple[str, str]]:
    """(settings, the table parameter → optimizer and manifold that the run printed); settings with the same table share it."""
    found: dict[str, list[str]] = {}
    for s in settings:
        path = s.runs[0].directory / PARAMETERS_FILE
        if path.exists():
            found.setdefault(path.read_text(errors="replace"), []).append(s.label)
    return [(", ".join(labels), text) for text, labels in found.items()]


def settings_table(settings: Sequence[Setting]) -> Table | None:
    """The values of all settings in which the configurations differ, a line a key; None if there is none."""
    first = settings[0].runs[0].config
    keys = dict.fromkeys(key for s in settings for key in different(first, s.runs[0].config))
    if not keys:
        return None
    lines = [[key, *(text_at(s.runs[0].config, key) or "–" for s in settings)] for key in keys]
    return Table(["setting of the configuration", *(s.label for s in settings)], lines, [False] * (1 + len(settings)))


def _all_of(run: RecordedRun, key: str) -> str:
    """What the environments of a run say of a key, each once, in order."""
    return "; then ".join(dict.fromkeys(str(found.get(key, "")) for found in run.environments))


def machines(settings: Sequence[Setting]) -> Table:
    """Where every run is, its state, the versions and the device that it ran on, and the command that was typed."""
    keys = {"code": "commit", "device": "device", "python": "Python", "torch": "torch", "platform": "platform"}
    lines = [
        [
            s.label,
            str(r.config["seed"]),
            f"{r.step:,} of {r.config['max_steps']:,}",
            r.status,
            *(_HASH.sub(r"\1", _all_of(r, key)) for key in keys),
            os.path.relpath(r.directory),
            _all_of(r, "command"),
        ]
        for s in settings
        for r in s.runs
    ]
    headings = ["setting", "seed", "steps", "state", *keys.values(), "directory", "command"]
    return known_columns(Table(headings, lines, [False, True, True, *[False] * 8]))
