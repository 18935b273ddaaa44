"""Start the ranks of a job. This process is the only rank, or one of the ranks of torchrun, or the parent of ranks that it starts.

The exit code says how a rank ended, because parents, torchrun and clusters see nothing else: 0 done, 2 an error of the user (the message
is on stderr), 128 + signal number saved and stopped, anything else a failure.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from data.parallel import available_cores
from training.checks import USER_ERRORS
from training.ranks import LostRanks
from training.settings import Settings
from training.signals import STOP_SIGNALS, Stopped, exit_now, exit_on_stop_signals, is_second_press, leave_at_once

Worker = Callable[[Settings, "Path | None"], float]
"""The function that each rank runs: (configuration, directory) → best validation loss. Spawned ranks import it by name."""

USER_ERROR = 2


class RankFailed(Exception):
    """A rank of this job failed; `exit_code` is the exit code of the job."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.exit_code)


def launch(worker: Worker, cfg: Settings, directory: Path | None) -> float:
    """Run a job on its ranks; returns the result of the worker on rank 0.

    Of an error in USER_ERRORS, a rank prints only the message; the exit code is its `exit_code`, or 2.

    Args:
        worker: run by every rank with `cfg` and `directory`.
        cfg: configuration; `launcher.nproc` ranks are started, unless this process is already a rank.
        directory: of the job; None if the worker chooses it.

    Raises:
        Stopped: a signal ended the run after a save. RankFailed: a rank that was started here failed. If the worker runs in this
        process: the exceptions of the worker.
    """
    if "RANK" in os.environ:
        return run_rank(worker, cfg, directory)
    try:
        if cfg.launcher.nproc == 1 and _slurm_nodes() == 1:
            return worker(cfg, directory)
        return _start_ranks(worker, cfg, directory)
    except Stopped as stopped:
        print(stopped.message, file=sys.stderr, flush=True)
        # The run has saved, so the previous handler is called now: that of submitit requeues the job.
        handler = signal.getsignal(stopped.signal)
        if callable(handler) and handler not in (signal.default_int_handler, exit_now):
            handler(stopped.signal, None)
        raise


def is_main_process() -> bool:
    """Whether this process prints for the job: it is rank 0, or not a rank."""
    return os.environ.get("RANK", "0") == "0"


# ---- a rank ----


def run_rank(worker: Worker, cfg: Settings, directory: Path | None, parent: Connection | None = None) -> float:
    """Run the worker as one of several ranks. Unless it succeeds, the process exits immediately with an exit code.

    Immediately, because the launcher kills a rank 30 s after a signal, and because after an error the destructor of a process group may
    wait forever for ranks that no longer exist. If a `parent` started this rank, the parent prints the messages: rank 0 sends it the
    one about a signal, and the first rank that exits passes on an error of the user, which is the same on all ranks.
    """
    if parent is not None:
        exit_on_stop_signals()
    try:
        return worker(cfg, directory)
    except Stopped as stopped:
        code = 128 + stopped.signal
        if is_main_process():
            print(stopped.message, file=sys.stderr) if parent is None else parent.send(stopped.what)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except USER_ERRORS as error:
        code = tell_user(error, has_parent=parent is not None)
    except LostRanks as error:
        code = 1
        print(error, file=sys.stderr)
    except Exception:
        code = 1
        print(f"rank {os.environ['RANK']} failed:\n{traceback.format_exc()}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tell_user(error: Exception, has_parent: bool = False) -> int:
    """Print the message of an error of the user, once for each node; returns the exit code.

    has_parent: the parent of this rank prints it. The message is written to the file in which torch's launcher looks for it.
    """
    code: int = getattr(error, "exit_code", USER_ERROR)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
    if code != USER_ERROR or (not has_parent and os.environ.get("LOCAL_RANK", "0") == "0"):
        print(error, file=sys.stderr)
    return code


# ---- the parent of ranks ----


def _start_ranks(worker: Worker, cfg: Settings, directory: Path | None) -> float:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    nproc, nodes = cfg.launcher.nproc, _slurm_nodes()
    endpoint, run_id, meeting = _slurm_rendezvous() if nodes > 1 else ("localhost:0", uuid.uuid4().hex, {})
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=nproc,
        run_id=run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs={"timeout": cfg.launcher.timeout_s, **meeting},
        max_restarts=0,
        start_method="spawn",
        signals_to_handle="SIGHUP,SIGQUIT",  # _signals_passed_on handles the others
    )
    _ignore_timers()
    for name in list(logging.root.manager.loggerDict):  # each has its own level
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing.spawn")):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the ranks and this process print all that matters
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    ending: BaseException
    with receiver, sender:
        try:
            with _signals_passed_on(), _cores_shared(nproc):
                results = elastic_launch(config, run_rank)(worker, cfg, directory, sender)
            return next(iter(results.values()))  # equal on all ranks
        except SignalException as caught:
            ending = Stopped(caught.sigval)
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            ending = _ending(rank, failure.exitcode, failure.message)
        if isinstance(ending, Stopped) and receiver.poll():
            ending = Stopped(ending.signal, receiver.recv())  # the message of rank 0
        raise ending


@cache
def _ignore_timers() -> None:
    """Make `sys.unraisablehook` ignore an error of the rendezvous timer of torch, from now on.

    If the timer is garbage-collected in its own thread, its finalizer cannot join that thread. The error has no effect.
    """
    hook = sys.unraisablehook

    def report(unraisable: Any) -> None:
        if "cannot join current thread" not in str(unraisable.exc_value):
            hook(unraisable)

    sys.unraisablehook = report


def _ending(rank: int, code: int, message: str) -> BaseException:
    """The exception for the job, from the exit code of the first rank that failed."""
    signum = code - 128 if code > 128 else -code
    if signum in STOP_SIGNALS:
        return Stopped(signum)
    if code == USER_ERROR:
        return RankFailed(message, code)
    if code < 0:
        name = signal.Signals(-code).name
        return RankFailed(
            f"rank {rank} was killed by {name} (for SIGKILL, check whether memory ran out); continue with resume=auto",
            1,
        )
    return RankFailed(f"rank {rank} failed with exit code {code}; its message is above", 1)


@contextmanager
def _signals_passed_on() -> Iterator[None]:
    """Pass stop signals on to the ranks; at the end, restore the previous handlers.

    For a SignalException, the launcher of torch sends the signal to the ranks and waits until they have saved; a second signal changes
    nothing, but a second Ctrl-C kills them. This thread blocks the signals, and a new rank inherits that, until it can handle them
    (`exit_on_stop_signals`): so a signal neither ends it with a traceback while Python starts, nor gets lost. Another thread receives
    the signals; Python still runs the handlers in this one.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    passed_on_at = 0.0

    def pass_on(signum: int, frame: FrameType | None) -> None:
        nonlocal passed_on_at
        if is_second_press(signum, passed_on_at):
            for rank in multiprocessing.active_children():
                rank.kill()
            leave_at_once()
        if passed_on_at:
            return
        if _starts_ranks(frame):  # a rank that is being started cannot receive it yet; try again soon
            threading.Timer(0.1, os.kill, (os.getpid(), signum)).start()
            return
        passed_on_at = time.monotonic()
        raise SignalException(f"signal {signum}", sigval=signal.Signals(signum))

    before = {s: signal.getsignal(s) for s in (*STOP_SIGNALS, signal.SIGHUP, signal.SIGQUIT)}
    for signum in STOP_SIGNALS:
        signal.signal(signum, pass_on)
    resource_tracker.ensure_running()  # if it started later, it would unblock the signals
    done = threading.Event()
    threading.Thread(target=done.wait, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        done.set()


def _starts_ranks(frame: FrameType | None) -> bool:
    """Whether torch's launcher is starting processes in this frame or in one that called it."""
    while frame is not None and frame.f_code.co_name != "_start_workers":
        frame = frame.f_back
    return frame is not None


@contextmanager
def _cores_shared(nproc: int) -> Iterator[None]:
    """Give each rank its share of the cores of this machine, unless OMP_NUM_THREADS is set."""
    name = "OMP_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(max(1, available_cores() // nproc))
    try:
        yield
    finally:
        del os.environ[name]


# ---- Slurm, by submitit: one task a node ----


def _slurm_nodes() -> int:
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" else 1


def _slurm_rendezvous() -> tuple[str, str, dict[str, Any]]:
    """Endpoint and id of the rendezvous, equal on all nodes of this job, and which node is the host. A requeued job has a new id."""
    import submitit

    job = submitit.JobEnvironment()
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    # Ports from 20000 on: Linux uses 32768 and above for outgoing connections.
    endpoint = f"{job.hostnames[0]}:{20_000 + int(job.raw_job_id) % 10_000}"
    return endpoint, f"{job.job_id}.{restarts}", {"is_host": job.node == 0}
