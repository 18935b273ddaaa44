"""Where the machine ends: memory and disk that run out become one message with a remedy in place of a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from training.files import FULL_DISK, NOT_ALLOWED, remedy
from training.settings import Settings

# torch has a class of its own for CUDA's memory alone; what its other allocators say is a RuntimeError.
_NO_MEMORY = re.compile(
    r"out of memory|(can't|cannot|could not) allocate|not enough memory|ALLOC_FAILED", re.IGNORECASE
)


class MachineError(Exception):
    """The machine ran out of memory or disk, or does not let the run write; the message names cause and remedy. The settings may be good."""

    exit_code = 1


@contextmanager
def machine_limits(cfg: Settings) -> Iterator[None]:
    """A context in which want of memory or disk becomes MachineError; every other error passes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
            raise
        raise MachineError(_out_of_memory(cfg, error)) from error
    except OSError as error:
        if error.errno not in (*FULL_DISK, *NOT_ALLOWED):
            raise
        where = error.filename or "a file"
        raise MachineError(
            f"{where} could not be written ({error.strerror}); {remedy(error)}. What was saved is whole: then go on with resume=auto"
        ) from error


def _out_of_memory(cfg: Settings, error: BaseException) -> str:
    model = cfg.model
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"out of memory with {model.n_layer} layers of width {model.n_embd}, a vocabulary of {model.vocab_size}, and "
        f"micro_batch_size={cfg.micro_batch_size} windows of {model.block_size} tokens; lower micro_batch_size (an update stays the "
        f"same: the rest is accumulated) or take a smaller model, then go on with resume=auto ({cause})"
    )
