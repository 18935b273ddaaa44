"""Encode chunks of documents in several processes, in order and in bounded memory.

A worker reads its tasks from standard input and ends with it: if the preparing process is killed, no worker is left.

    python -m data.parallel gpt2        a worker; only `encoded` starts it
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from data.settings import Chunk
from data.shards import DataError
from data.tokenizer import Tokenizer, get_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MOST_WORKERS = 16
"""More encode faster than one process can write, and would need more memory."""


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_for(tokenizer: str, size: int | None) -> int:
    """The number of processes that encode: one for each core; 0, for this process, if `size` bytes of input are not worth starting them."""
    cores = available_cores()
    if tokenizer == "bytes" or cores == 1 or (size is not None and size < 1 << 22):  # bytes cost nothing
        return 0
    return min(cores, MOST_WORKERS)


def encode_texts(tokenizer: Tokenizer, texts: Any) -> tuple[np.ndarray, np.ndarray]:
    """The ids (n,) uint16 of a chunk's texts, each followed by `eot`, and the number of ids of each document (d,) int64."""
    eot = np.array([tokenizer.eot], dtype=np.uint16)
    texts = texts if isinstance(texts, list) else texts.read()
    parts = [part for text in texts for part in (tokenizer.encode(text), eot)]
    lengths = np.array([len(part) for part in parts], dtype=np.int64).reshape(-1, 2).sum(1)
    return np.concatenate(parts) if parts else eot[:0], lengths


Encoded = tuple[Chunk, np.ndarray, np.ndarray]


def encoded(tokenizer: str, chunks: Iterable[Chunk], workers: int) -> Generator[Encoded, None, None]:
    """Each chunk with what `encode_texts` returns for it, in order. At most two chunks for each worker are read ahead.

    Raises:
        DataError: a text cannot be read, or a worker was killed.
    """
    if not workers:
        here = get_tokenizer(tokenizer)
        yield from ((chunk, *encode_texts(here, chunk.texts)) for chunk in chunks)
        return
    idle: SimpleQueue[_Worker] = SimpleQueue()
    processes = [_Worker(tokenizer) for _ in range(workers)]
    for worker in processes:
        idle.put(worker)

    def encode(texts: Any) -> tuple[np.ndarray, np.ndarray]:
        worker = idle.get()
        try:
            return worker.encode(texts)
        finally:
            idle.put(worker)

    pending: deque[tuple[Chunk, Any]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for chunk in chunks:
            pending.append((chunk, pool.submit(encode, chunk.texts)))
            if len(pending) > 2 * workers:
                chunk, found = pending.popleft()
                yield (chunk, *found.result())
        while pending:
            chunk, found = pending.popleft()
            yield (chunk, *found.result())
    finally:
        for worker in processes:
            worker.end()
        pool.shutdown(cancel_futures=True)


class _Worker:
    """A process that encodes one chunk at a time."""

    def __init__(self, tokenizer: str) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "data.parallel", tokenizer],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )

    def encode(self, texts: Any) -> tuple[np.ndarray, np.ndarray]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None  # they are pipes
        try:
            pickle.dump(texts, stdin, pickle.HIGHEST_PROTOCOL)
            stdin.flush()
            found = pickle.load(stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            code = self.process.wait()
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise DataError(
                f"a process that encodes text was {how} (SIGKILL often means that memory ran out); free some memory, and give "
                "the same command again: it continues where this one stopped"
            ) from error
        if isinstance(found, Exception):
            raise found
        return found

    def end(self) -> None:
        """Kill the process, if it has not ended."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was left in the buffer of a killed worker
                    pipe.close()


def work(tokenizer: str) -> None:
    """Encode what comes from standard input, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    found: Any
    while True:
        try:
            texts = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            found = encode_texts(get_tokenizer(tokenizer), texts)
        except DataError as error:
            found = error
        pickle.dump(found, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    work(sys.argv[1])
