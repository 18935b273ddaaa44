"""Batches of windows. A batch is a pure function of (seed, step, rank), so a resumed run reads the same batches as an uninterrupted one."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from data.shards import DataError, Split


class Loader:
    """Random windows of a split, as nanoGPT draws them: with replacement, at uniformly random offsets.

    windows: size of the global batch. Rank r of `world` receives its r-th contiguous part, so the global batch is the same for any
    number of ranks.

    Raises:
        DataError: the split is shorter than a window. ValueError: `windows` is not a multiple of `world`.
    """

    def __init__(self, split: Split, block_size: int, seed: int, windows: int, rank: int = 0, world: int = 1):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} does not exist in a world of {world}; ranks go from 0 to {world - 1}")
        if windows < 1 or windows % world:
            raise ValueError(
                f"{windows} windows a step cannot be divided among {world} ranks; set global_batch_tokens to a multiple of "
                f"{world} x {block_size} tokens or change the number of ranks"
            )
        _require_window(split, block_size)
        self.split, self.block_size, self.seed = split, block_size, seed
        self.windows, self.rank, self.world = windows, rank, world

    def offsets(self, step: int) -> np.ndarray:
        """Where this rank's windows begin at `step`: (windows // world,) int64."""
        # Philox is a function of (key, counter), so there is no state to save. NumPy guarantees a stable stream for bit generators
        # only, so we reduce the raw output ourselves; the bias, tokens / 2^64, is below 1e-9.
        key = np.array([self.seed % 2**64, step], dtype=np.uint64)
        places = np.uint64(self.split.tokens - self.block_size)
        drawn = np.random.Philox(key=key).random_raw(self.windows) % places
        share = self.windows // self.world
        return drawn[self.rank * share : (self.rank + 1) * share].astype(np.int64)

    def batch(self, step: int) -> np.ndarray:
        """This rank's windows at `step`: (windows // world, block_size + 1) uint16; inputs and targets overlap."""
        return np.stack([self.split.read(int(offset), self.block_size + 1) for offset in self.offsets(step)])


def validation_windows(split: Split, block_size: int, count: int | None = None) -> np.ndarray:
    """At most `count` windows, evenly spaced and without overlap, the same for every run: (n, block_size + 1) uint16.

    If fewer than `count` fit, or `count` is None, the windows cover the whole split. DataError if not one fits.
    """
    if count is not None and count < 1:
        raise ValueError(f"{count} validation windows measure nothing; use at least 1")
    _require_window(split, block_size)
    fitting = split.tokens // (block_size + 1)
    count = fitting if count is None else min(count, fitting)
    stride = split.tokens // count
    return np.stack([split.read(i * stride, block_size + 1) for i in range(count)])


class Prefetcher:
    """Reads the next `depth` batches of `loader` in a thread while the model trains on the current one.

    A thread is enough, because reading windows is cheap. Worker processes would also receive a SIGTERM and could prevent the save.
    """

    def __init__(self, loader: Loader, first_step: int, depth: int = 2):
        if depth < 1:
            raise ValueError(f"a depth of {depth} reads no batch; use 1 or more")
        self.loader, self.depth = loader, depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._pending: deque[Future] = deque()
        self._start(first_step)

    def _start(self, step: int) -> None:
        for future in self._pending:
            future.cancel()
        self._pending = deque(self._pool.submit(self.loader.batch, step + i) for i in range(self.depth))
        self._next = step

    def next(self, step: int) -> np.ndarray:
        """`loader.batch(step)`. An error from reading it is raised here. If `step` is not the expected one, reading restarts there."""
        if step != self._next:
            self._start(step)
        batch = self._pending.popleft()
        self._pending.append(self._pool.submit(self.loader.batch, step + self.depth))
        self._next = step + 1
        return batch.result()

    def close(self) -> None:
        """Stop the thread and drop the batches it has read. A second call does nothing."""
        self._pool.shutdown(cancel_futures=True)


def _require_window(split: Split, block_size: int) -> None:
    if split.tokens < block_size + 1:
        raise DataError(
            f"a context of {block_size} tokens is longer than the data in {split.directory} ({split.tokens} tokens, "
            f"{block_size + 1} needed); shorten the context (block_size) or prepare more text"
        )
