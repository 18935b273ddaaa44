"""The progress bar: a sink that shows the records of a run on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column


class ProgressSink:
    """On a terminal, a live bar. Elsewhere, a line at each evaluation, and between evaluations at most one every ``interval_s`` seconds.
    Each step has one line: if an evaluation follows a training record, the line is printed with the evaluation.

    ``hetero   ━━━━━━━━━━━━━━━━╸━━━━━━  182/250   train 2.31  val 2.40  41k tokens/s  0:18 left``

    Of each type of event, only the first is shown. ``eval_interval`` is the number of steps between evaluations; the last step is
    evaluated too. ``first_step`` is the step at which a resumed run starts. ``clock`` returns seconds.
    """

    def __init__(
        self,
        name: str,
        total_steps: int,
        *,
        eval_interval: int,
        first_step: int = 0,
        stream: TextIO | None = None,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name = name
        self.total_steps = total_steps
        self.eval_interval = eval_interval
        self._stream = sys.stderr if stream is None else stream
        self._interval_s = interval_s
        self._clock = clock
        self._step = first_step
        self._train: float | None = None
        self._val: float | None = None
        self._tokens_per_s: float | None = None
        # Step and time of the first training record; before it, the model may be compiled.
        self._start: tuple[int, float] | None = None
        self._last_line = clock()
        self._events_shown: set[str] = set()
        self._bar: Progress | None = None
        if self._stream.isatty():
            self._open_bar()

    def record(self, rec: dict[str, Any]) -> None:
        """Show the numbers of train and eval records, the loss on the whole validation split, events, and at the end whether the run became unstable."""
        if rec["kind"] == "event":
            self._show_event(rec)
        elif rec["kind"] == "full_eval":
            self._print(f"{self.name:<13} step {rec['step']}: loss on the whole validation split {rec['loss']:.4f}")
        elif rec["kind"] in ("train", "eval"):
            self._show_numbers(rec)
        elif rec["kind"] == "end" and rec["unstable_step"] is not None:
            self._print(f"{self.name:<13} unstable at step {rec['unstable_step']}: {rec['reason']}")

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def _show_numbers(self, rec: dict[str, Any]) -> None:
        self._step = rec["step"]
        if rec["kind"] == "eval":
            self._val = rec.get("loss", self._val)
        else:
            self._train = rec.get("loss", self._train)
            self._tokens_per_s = rec.get("tokens_per_s", self._tokens_per_s)
            if self._start is None:
                self._start = (self._step, self._clock())
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step, status=self._status())
        elif rec["kind"] == "eval" or (
            not self._evaluated_next() and self._clock() - self._last_line >= self._interval_s
        ):
            self._print(f"{self.name:<13} {self._step}/{self.total_steps}   {self._status()}")
            self._last_line = self._clock()

    def _evaluated_next(self) -> bool:
        """Whether the next record of this step is its evaluation."""
        return self._step % self.eval_interval == 0 or self._step == self.total_steps

    def _open_bar(self) -> None:
        self._bar = Progress(
            TextColumn("  {task.description:<12}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(table_column=Column(min_width=2 * len(str(self.total_steps)) + 1)),
            TextColumn(" {task.fields[status]}", markup=False),
            console=Console(file=self._stream, force_terminal=True),
            redirect_stdout=sys.stdout.isatty(),  # output that goes to a file must not get the codes of the bar
        )
        self._task = self._bar.add_task(self.name, total=self.total_steps, completed=self._step, status="")
        self._bar.start()

    def _show_event(self, rec: dict[str, Any]) -> None:
        event = str(rec.get("event", ""))
        if "message" in rec and event not in self._events_shown:
            self._events_shown.add(event)
            self._print(f"{self.name:<13} step {rec['step']}: {rec['message']}")

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def _status(self) -> str:
        parts = []
        if self._train is not None:
            parts.append(f"train {self._train:.2f}")
        if self._val is not None:
            parts.append(f"val {self._val:.2f}")
        if self._tokens_per_s is not None:
            parts.append(f"{_short(self._tokens_per_s)} tokens/s")
        if (left := self._seconds_left()) is not None:
            parts.append(f"{_duration(left)} left")
        return "  ".join(parts)

    def _seconds_left(self) -> float | None:
        """From the average speed since the first training record, evaluations included."""
        if self._start is None or self._step <= self._start[0]:
            return None
        step, since = self._start
        return (self.total_steps - self._step) * (self._clock() - since) / (self._step - step)


def _short(number: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            scaled = number / limit
            return f"{scaled:.1f}{unit}" if scaled < 10 else f"{scaled:.0f}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
