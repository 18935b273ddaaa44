"""Stop signals: a signal on any rank ends the run on all ranks, with a checkpoint of the last finished step. A second Ctrl-C ends it at once.

A handler only records the signal. In every step the loop calls `requested`, in which the ranks agree: one rank alone could not save the
state of the others, and they would wait for it. Between two micro-batches it calls `interrupts`: a step of many micro-batches can take
minutes, and a cluster waits half a minute. One rank only looks at its own signal. Several ranks agree once more, which costs a fraction of
a millisecond, and only if their last step was long; a short step is finished first.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # torch takes seconds to import, and a signal may come before
    from training.ranks import Ranks

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Sent by schedulers and users; submitit sends SIGUSR2 before the time of a job is over."""

LONG_STEP_S = 2.0
"""Several ranks ask each other for signals between micro-batches only if the last step took at least so many seconds."""
_SAME_PRESS_S = 0.2  # a program that passes signals on repeats what the terminal sent already


class Stopped(SystemExit):
    """A run has saved and ends because of a signal; the exit code is 128 + the number of the signal.

    Not a subclass of Exception, because after a failed job the next one is started, but not after this.
    """

    def __init__(self, signum: int, what: str = "stopped; continue from the last checkpoint with resume=auto") -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)
        self.what = what

    @property
    def message(self) -> str:
        """One line of text."""
        return f"{self.signal.name}: {self.what}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (int(self.signal), self.what)


def exit_on_stop_signals() -> None:
    """From now on, a stop signal ends this process immediately, with one message and the exit code 128 + its number.

    For the time when no run is active: a run has its own handlers (StopSignal). While Python shuts down, the signals are ignored. A spawned rank
    prints no message, because its parent does; its parent started it with these signals blocked, and here they are unblocked.
    """
    is_child = multiprocessing.parent_process() is not None
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_DFL if is_child else exit_now)
    if is_child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    else:
        atexit.register(_ignore)


def exit_now(signum: int, _: FrameType | None) -> NoReturn:
    """The handler of `exit_on_stop_signals`. It raises no exception, which a module that is being imported could catch."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{signal.Signals(signum).name}: stopped while no run was active\n".encode())
    os._exit(128 + signum)


def leave_at_once() -> NoReturn:
    """End this process without a save, after a second Ctrl-C."""
    os.write(2, b"SIGINT again: left without a save; resume=auto continues from the last checkpoint\n")
    os._exit(128 + signal.SIGINT)


def is_second_press(signum: int, first_at: float) -> bool:
    """Whether a signal is another Ctrl-C than that of the time `first_at` (of time.monotonic(), in seconds; 0 for none)."""
    return signum == signal.SIGINT and 0 < first_at < time.monotonic() - _SAME_PRESS_S


def _ignore() -> None:
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class StopSignal:
    """A context that records stop signals; at its end, the previous handlers are restored.

    Its end raises Stopped if a signal came after the last step of the run.
    """

    def __init__(self) -> None:
        self.noted = 0  # the last signal that this process received, 0 for none; only the handler writes it
        self._agreed = 0
        self._interrupted_at = 0.0  # when the first Ctrl-C came
        self._asked_at = 0.0  # when the ranks last agreed before a step
        self._long_steps = True  # the first step may compile
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # only the main thread can set handlers
            self._previous = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
        late = self._agreed or self.noted
        if kind is None and late:  # the run has finished, but later jobs must not start
            raise Stopped(late, "stopped; the run was finished")

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.noted = signum
        # A rank may get one Ctrl-C twice, from the terminal and from its parent; the parent counts them.
        if signum != signal.SIGINT or "RANK" in os.environ:
            return
        if is_second_press(signum, self._interrupted_at):
            leave_at_once()
        if not self._interrupted_at:
            self._interrupted_at = time.monotonic()
            os.write(2, b"\nstopping with a save; another Ctrl-C leaves at once\n")

    def requested(self, ranks: Ranks) -> bool:
        """Whether any rank received a signal. All ranks must call it at the same step, and get the same answer.

        On several ranks, it sends two numbers with gloo, which does not use the device.
        """
        now, first = time.monotonic(), self._asked_at == 0
        milliseconds = int(1000 * (now - self._asked_at))
        # A separate variable: a signal may arrive while the ranks agree.
        self._agreed, slowest = ranks.largest(self.noted, milliseconds)
        self._asked_at, self._long_steps = now, first or slowest >= 1000 * LONG_STEP_S
        return self._agreed != 0

    def interrupts(self, ranks: Ranks) -> bool:
        """Whether a signal ends this step, which is then not applied. All ranks must call it between the same micro-batches."""
        if ranks.world == 1:
            self._agreed = self.noted
        elif self._long_steps:
            self._agreed = ranks.max(self.noted)
        return self._agreed != 0

    def end(self, ranks: Ranks, step: int) -> NoReturn:
        """End a run that has been saved.

        Waits for all ranks first: after the first rank has ended, the launcher kills the others, and rank 0 may still be saving.

        Raises:
            Stopped: always.
        """
        ranks.barrier()
        raise Stopped(self._agreed, f"stopped at step {step}; continue with resume=auto")
