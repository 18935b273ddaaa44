"""Being asked to stop: a signal on any rank ends the run on all of them, between two steps, with a checkpoint.

A handler only notes the signal. Once a step the loop asks `requested`, where the ranks agree: whoever is asked alone could neither
save what is spread over ranks nor leave without hanging the others.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # torch takes seconds to import, and a signal may come before
    from training.ranks import Ranks

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers and people send; SIGUSR2 is what submitit sends before a job's time is up."""


class Stopped(SystemExit):
    """A run has saved and ends because of a signal: with 128 + its number, as a shell reports it; `message` says so in words.

    No Exception: whoever goes on to the next job after one that failed must not go on after this.
    """

    def __init__(self, signum: int, what: str = "stopped; resume=auto goes on from the last checkpoint") -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)
        self.what = what

    @property
    def message(self) -> str:
        """One line for a person."""
        return f"{self.signal.name}: {self.what}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (int(self.signal), self.what)


def leave_at_once() -> None:
    """From now on a stop signal ends this process at once, with one message and 128 + its number; for while no run is under way.

    A run handles them by a StopSignal. Once the process has done its work and Python is taken down, they are ignored. A rank leaves
    without a word, since its parent speaks; the parent has started it deaf to signals, and here it begins to hear them.
    """
    is_child = multiprocessing.parent_process() is not None
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_DFL if is_child else leave)
    if is_child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    else:
        atexit.register(_ignore)


def leave(signum: int, _: FrameType | None) -> NoReturn:
    """The handler of `leave_at_once`. Not by an exception, which whatever is being imported could swallow or decorate."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{signal.Signals(signum).name}: stopped while no run was under way\n".encode())
    os._exit(128 + signum)


def _ignore() -> None:
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class StopSignal:
    """Notes the stop signals while it is entered; the handlers that were there before come back afterwards.

    Leaving it raises Stopped if a signal came too late for the run, which then is finished.
    """

    def __init__(self) -> None:
        self._noted = 0  # the last signal that this rank received; written by the handler alone
        self._agreed = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
        late = self._agreed or self._noted
        if kind is None and late:  # too late to interrupt the run, but what follows is to stop too
            raise Stopped(late, "stopped; the run had come to its end")

    def _note(self, signum: int, _: FrameType | None) -> None:
        self._noted = signum

    @property
    def noted(self) -> int:
        """The last signal that this process received; 0 for none."""
        return self._noted

    def requested(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop. All ranks call it at the same step, and all get the same answer.

        On one rank it costs nothing; on several one number over gloo, which takes the device no time.
        """
        self._agreed = ranks.max(self._noted)  # kept apart: a signal may be noted while the ranks are agreeing
        return self._agreed != 0

    def leave(self, ranks: Ranks, step: int) -> NoReturn:
        """End a run that has been saved.

        Waits for all ranks first: a launcher kills the others soon after the first has left, and rank 0 may still be saving.

        Raises:
            Stopped: always.
        """
        ranks.barrier()
        raise Stopped(self._agreed, f"stopped at step {step}; go on with resume=auto")
