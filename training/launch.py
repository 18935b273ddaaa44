"""From one job to its ranks: this process alone, one rank among those that torchrun started, or the parent of ranks of its own.

How a process ended is said by its exit code alone, since that is what crosses from a rank to its parent, to torchrun and to a
cluster: 0 done, 2 a user's mistake (its message is on stderr), 128 + signal saved and stopped, anything else a failure.
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
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from training.ranks import LostRanks
from training.settings import Settings
from training.signals import STOP_SIGNALS, Stopped, leave, leave_at_once

Worker = Callable[[Settings, "Path | None"], float]
"""What a rank does: a configuration and a directory become the best validation loss. Importable by name, for spawned ranks."""

USER_ERROR = 2


class RankFailed(Exception):
    """A rank of this job failed, and the job with it; `exit_code` is what the job should end with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.exit_code)


def launch(
    worker: Worker, cfg: Settings, directory: Path | None, user_errors: tuple[type[Exception], ...] = ()
) -> float:
    """Run a job on its ranks; returns what rank 0's worker returns.

    Args:
        worker: run by every rank with `cfg` and `directory`.
        cfg: configuration; `launcher.nproc` ranks are started unless this process is a rank already.
        directory: of the job, or None where the worker is to choose.
        user_errors: exceptions whose message is all that a rank prints; with exit code 2, or their own `exit_code`.

    Raises:
        Stopped: a signal ended the run, which has saved. RankFailed: a rank that was started here failed. Whatever the worker
        raises, where it runs in this process.
    """
    if "RANK" in os.environ:
        return run_rank(worker, cfg, directory, user_errors)
    try:
        if cfg.launcher.nproc == 1 and _slurm_nodes() == 1:
            return worker(cfg, directory)
        return _start_ranks(worker, cfg, directory, user_errors)
    except Stopped as stopped:
        print(stopped.message, file=sys.stderr, flush=True)
        # Who handled this signal before us learns of it now that the run has saved: submitit requeues the job.
        handler = signal.getsignal(stopped.signal)
        if callable(handler) and handler not in (signal.default_int_handler, leave):
            handler(stopped.signal, None)
        raise


def is_main_process() -> bool:
    """Whether this process speaks for the job: not a rank, or rank 0."""
    return os.environ.get("RANK", "0") == "0"


# ---- a rank ----


def run_rank(
    worker: Worker,
    cfg: Settings,
    directory: Path | None,
    user_errors: tuple[type[Exception], ...],
    parent: Connection | None = None,
) -> float:
    """Run the worker as one of several ranks. Anything but success leaves the process at once, by its exit code.

    At once, because a rank that lingers after a signal is killed after 30 s, and one that unwinds after an error may wait forever
    in the destructor of a process group whose other ranks are gone. A `parent` that started this rank is left to speak: it hears
    from rank 0 where a signal stopped it, and of a user's mistake, which all ranks make, from the first that leaves.
    """
    if parent is not None:
        leave_at_once()
    try:
        return worker(cfg, directory)
    except Stopped as stopped:
        code = 128 + stopped.signal
        if is_main_process():
            print(stopped.message, file=sys.stderr) if parent is None else parent.send(stopped.what)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except user_errors as error:
        code = tell_user(error, heard=parent is not None)
    except LostRanks as error:
        code = 1
        print(error, file=sys.stderr)
    except Exception:
        code = 1
        print(f"rank {os.environ['RANK']} failed:\n{traceback.format_exc()}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tell_user(error: Exception, heard: bool = False) -> int:
    """Print what a user can mend, once a node where all ranks meet the same; the exit code that belongs to it.

    heard: a parent of this rank hears it, where torch's launcher, which named the file, looks for the first failure's message.
    """
    code: int = getattr(error, "exit_code", USER_ERROR)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
    if code != USER_ERROR or (not heard and os.environ.get("LOCAL_RANK", "0") == "0"):
        print(error, file=sys.stderr)
    return code


# ---- the parent of ranks ----


def _start_ranks(
    worker: Worker, cfg: Settings, directory: Path | None, user_errors: tuple[type[Exception], ...]
) -> float:
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
        signals_to_handle="SIGHUP,SIGQUIT",  # the others are ours
    )
    sys.unraisablehook = _without_timers(sys.unraisablehook)
    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing.spawn")):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what there is to say, the ranks and we say
    ear, mouth = multiprocessing.get_context("spawn").Pipe(duplex=False)
    ending: BaseException
    with ear, mouth:
        try:
            with _signals_passed_on(), _cores_shared(nproc):
                results = elastic_launch(config, run_rank)(worker, cfg, directory, user_errors, mouth)
            return next(iter(results.values()))  # the same on every rank; rank 0's where it is among this node's
        except SignalException as caught:
            ending = Stopped(caught.sigval)
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            ending = _ending(rank, failure.exitcode, failure.message)
        if isinstance(ending, Stopped) and ear.poll():
            ending = Stopped(ending.signal, ear.recv())  # in the words of rank 0
        raise ending


def _without_timers(hook: Callable[[Any], None]) -> Callable[[Any], None]:
    """A `sys.unraisablehook` that is silent about torch's timer of the rendezvous, which may be collected in a thread of its own.

    Its finalizer then tries to join that thread and fails, after everything has been said.
    """

    def hear(unraisable: Any) -> None:
        if "cannot join current thread" not in str(unraisable.exc_value):
            hook(unraisable)

    return hear


def _ending(rank: int, code: int, message: str) -> BaseException:
    """What the end of the first rank that failed means for the job."""
    signum = code - 128 if code > 128 else -code
    if signum in STOP_SIGNALS:
        return Stopped(signum)
    if code == USER_ERROR:
        return RankFailed(message, code)
    if code < 0:
        name = signal.Signals(-code).name
        return RankFailed(
            f"rank {rank} was killed by {name} (for SIGKILL, look for want of memory); continue with resume=auto", 1
        )
    return RankFailed(f"rank {rank} failed with exit code {code}; its message stands above", 1)


@contextmanager
def _signals_passed_on() -> Iterator[None]:
    """Let a stop signal reach the ranks, and give the handlers back that were there before.

    The launcher sends on what is raised as SignalException, and waits for the ranks to save; a second signal does not hurry it.
    A rank inherits which signals this thread is deaf to, and stays so until it can handle them (`leave_at_once`): it neither dies
    with a traceback while Python starts nor misses one. Another thread hears them meanwhile; Python runs the handlers in this one all the same.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    passed_on = False

    def pass_on(signum: int, frame: FrameType | None) -> None:
        nonlocal passed_on
        if passed_on:
            return
        if _starts_ranks(frame):  # one that is half started could not be told; ask again soon
            threading.Timer(0.1, os.kill, (os.getpid(), signum)).start()
            return
        passed_on = True
        raise SignalException(f"signal {signum}", sigval=signal.Signals(signum))

    before = {s: signal.getsignal(s) for s in (*STOP_SIGNALS, signal.SIGHUP, signal.SIGQUIT)}
    for signum in STOP_SIGNALS:
        signal.signal(signum, pass_on)
    resource_tracker.ensure_running()  # which would open this thread's ears again if it started later
    over = threading.Event()
    threading.Thread(target=over.wait, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        over.set()


def _starts_ranks(frame: FrameType | None) -> bool:
    """Whether torch's launcher is starting processes in this frame or in one that called it."""
    while frame is not None and frame.f_code.co_name != "_start_workers":
        frame = frame.f_back
    return frame is not None


@contextmanager
def _cores_shared(nproc: int) -> Iterator[None]:
    """Give each rank its part of this machine's cores, unless the user has decided; all of them each would only get in the way."""
    name = "OMP_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(max(1, len(os.sched_getaffinity(0)) // nproc))
    try:
        yield
    finally:
        del os.environ[name]


# ---- Slurm, by submitit: one task a node ----


def _slurm_nodes() -> int:
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" else 1


def _slurm_rendezvous() -> tuple[str, str, dict[str, Any]]:
    """Where the nodes of this job meet, its id, both the same on all of them, and who is the host; a requeued job is a new one."""
    import submitit

    job = submitit.JobEnvironment()
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    # Ports from 20000 on, away from those that Linux gives to outgoing connections (32768 and up).
    endpoint = f"{job.hostnames[0]}:{20_000 + int(job.raw_job_id) % 10_000}"
    return endpoint, f"{job.job_id}.{restarts}", {"is_host": job.node == 0}
