"""Errors of the machine: if memory or disk runs out, one message with a remedy replaces the traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from training.files import FULL_DISK, NOT_ALLOWED, remedy
from training.settings import Settings

# Only the CUDA allocator of torch has its own class of error; the others raise RuntimeError.
_NO_MEMORY = re.compile(
    r"out of memory|(can't|cannot|could not) allocate|not enough memory|ALLOC_FAILED", re.IGNORECASE
)


class MachineError(Exception):
    """Memory or disk ran out, or the run may not write; the message names the cause and the remedy."""

    exit_code = 1


@contextmanager
def machine_limits(cfg: Settings) -> Iterator[None]:
    """A context in which errors of memory and disk become MachineError; other errors are unchanged."""
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
            f"{where} could not be written ({error.strerror}); {remedy(error)}, then continue with resume=auto: the checkpoints are complete"
        ) from error


def _out_of_memory(cfg: Settings, error: BaseException) -> str:
    model = cfg.model
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"out of memory with {model.n_layer} layers of width {model.n_embd}, a vocabulary of {model.vocab_size}, and "
        f"micro_batch_size={cfg.micro_batch_size} windows of {model.block_size} tokens; lower micro_batch_size (gradients are "
        f"accumulated, so only the last bits change) and continue with resume=auto allow_changes=true, or choose a smaller model ({cause})"
    )
