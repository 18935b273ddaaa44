"""Batches of windows. A batch is a pure function of (seed, step, rank), so a resumed run reads the same batches as an uninterrupted one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np

from data.shards import DataError, Split, Tokens

T = TypeVar("T")

ORDERS = ("replacement", "epoch")
PERIOD = 10_000
"""The corpora of a mixture take turns in a pattern of so many windows, in which each has its share."""
_ROUNDS = 6


class Loader:
    """The windows of each step: a pure function of the seed, the step and the settings, in one of two orders.

        replacement   as nanoGPT draws them: with replacement, at uniformly random offsets
        epoch         the split is cut into windows that overlap by one token, so that each token is an input once; each is read once an epoch, in
                      an order that the seed and the epoch decide

    Of a mixture, each corpus has its share of the windows, and its own epochs.

    windows: size of the global batch. Rank r of `world` receives its r-th contiguous part, so the global batch is the same for any
    number of ranks.

    Raises:
        DataError: a split is shorter than a window, or the weight of a corpus is too small. ValueError: `windows` is not a multiple of
            `world`, or the order is unknown.
    """

    def __init__(
        self,
        split: Tokens,
        block_size: int,
        seed: int,
        windows: int,
        rank: int = 0,
        world: int = 1,
        order: str = "replacement",
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} does not exist in a world of {world}; ranks go from 0 to {world - 1}")
        if windows < 1 or windows % world:
            raise ValueError(
                f"{windows} windows a step cannot be divided among {world} ranks; set global_batch_tokens to a multiple of "
                f"{world} x {block_size} tokens or change the number of ranks"
            )
        if order not in ORDERS:
            raise ValueError(f"there is no order {order!r}; choose {' or '.join(ORDERS)}")
        for part in split.parts:
            require_window(part, block_size)
        self.parts, self.block_size, self.seed = split.parts, block_size, seed
        self.windows, self.rank, self.world, self.order = windows, rank, world, order
        self._pattern = _pattern(split, seed)  # (PERIOD,): the part of each turn
        self._turns = np.bincount(self._pattern, minlength=len(self.parts))
        self._before = np.empty(PERIOD, dtype=np.int64)  # earlier turns of the same part
        for p, turns in enumerate(self._turns):
            self._before[self._pattern == p] = np.arange(turns)

    def places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The part of each of this rank's windows at `step`, and where it begins there: (windows // world,) int64 each."""
        share = self.windows // self.world
        mine = slice(self.rank * share, (self.rank + 1) * share)
        number = step * self.windows + np.arange(self.windows, dtype=np.int64)[mine]
        turn = number % PERIOD
        part = self._pattern[turn]
        if self.order == "replacement":
            return part, self._with_replacement(step, mine, part)
        return part, self._in_epochs(number, turn, part)

    def _with_replacement(self, step: int, mine: slice, part: np.ndarray) -> np.ndarray:
        # Philox is a function of (key, counter), so there is no state to save. NumPy guarantees a stable stream for bit generators
        # only, so we reduce the raw output ourselves; the bias, tokens / 2^64, is below 1e-9.
        key = np.array([self.seed % 2**64, step], dtype=np.uint64)
        places = np.array([split.tokens - self.block_size for split in self.parts], dtype=np.uint64)
        drawn = np.random.Philox(key=key).random_raw(self.windows)[mine] % places[part]
        return drawn.astype(np.int64)

    def _in_epochs(self, number: np.ndarray, turn: np.ndarray, part: np.ndarray) -> np.ndarray:
        nth = number // PERIOD * self._turns[part] + self._before[turn]  # the windows of this part before this one
        offset = np.empty_like(number)
        for p, split in enumerate(self.parts):
            count = (split.tokens - 1) // self.block_size
            for epoch in np.unique(nth[part == p] // count):
                here = (part == p) & (nth // count == epoch)
                raw = _random(self.seed, int(epoch), 1 + p, _ROUNDS + 1)
                # The tokens that do not fill a window are left out at the start or at the end.
                first = int(raw[-1] % np.uint64(split.tokens - count * self.block_size))
                offset[here] = first + self.block_size * shuffled(nth[here] % count, count, raw[:-1])
        return offset

    def batch(self, step: int) -> np.ndarray:
        """This rank's windows at `step`: (windows // world, block_size + 1) uint16; inputs and targets overlap."""
        length = self.block_size + 1
        places = zip(*(values.tolist() for values in self.places(step)))
        return np.stack([self.parts[part].read(offset, length) for part, offset in places])


def _random(seed: int, epoch: int, stream: int, count: int) -> np.ndarray:
    """Random numbers (count,) uint64 that depend on nothing else."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=[0, 0, 0, stream]).random_raw(count)


def shuffled(numbers: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """Where a random permutation of 0 .. count - 1, which `keys` (rounds,) uint64 decide, sends `numbers` (n,) int64.

    A Feistel network on the smallest even number of bits that `count` fits in; what falls outside is sent again until it is inside
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). No permutation of all windows is held in memory.
    """
    half = np.uint64(max(1, (int(count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = numbers.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # wraps, as a hash does
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        out[outside] = (left << half) | right
        outside &= out >= np.uint64(count)
    return out.astype(np.int64)


def _pattern(split: Tokens, seed: int) -> np.ndarray:
    """The part of each of PERIOD turns, (PERIOD,) int64, in a random order; each part has its share, rounded to a whole number."""
    if len(split.parts) == 1:
        return np.zeros(PERIOD, dtype=np.int64)
    turns = _shares(split.weights, PERIOD)
    if 0 in turns:
        raise DataError(
            f"the weight of {split.parts[turns.index(0)].directory} is less than 1/{PERIOD:,} of all weights; raise it, or leave the part out"
        )
    return np.repeat(np.arange(len(turns)), turns)[np.argsort(_random(seed, 0, 0, PERIOD), kind="stable")]


def _shares(weights: Sequence[float], whole: int) -> list[int]:
    """A whole number divided in proportion to weights; the largest remainders are rounded up."""
    exact = [whole * weight / sum(weights) for weight in weights]
    rounded = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: rounded[i] - exact[i])
    for i in by_remainder[: whole - sum(rounded)]:
        rounded[i] += 1
    return rounded


def validation_windows(split: Tokens, block_size: int, count: int | None = None) -> np.ndarray:
    """At most `count` windows, evenly spaced and without overlap, the same for every run: (n, block_size + 1) uint16.

    If fewer than `count` fit, or `count` is None, the windows cover the whole split. Of a mixture, each part has its share of `count`.
    DataError if not one fits.
    """
    if count is not None and count < 1:
        raise ValueError(f"{count} validation windows measure nothing; use at least 1")
    counts = [None] * len(split.parts) if count is None else _shares(split.weights, count)
    return np.concatenate([_spaced(part, block_size, n) for part, n in zip(split.parts, counts) if n != 0])


def _spaced(split: Split, block_size: int, count: int | None) -> np.ndarray:
    require_window(split, block_size)
    fitting = split.tokens // (block_size + 1)
    count = fitting if count is None else min(count, fitting)
    stride = split.tokens // count
    return np.stack([split.read(i * stride, block_size + 1) for i in range(count)])


class Prefetcher(Generic[T]):
    """Reads the batches of the next `depth` steps in a thread while the model trains on the current one.

    A thread is enough, because reading windows is cheap. Worker processes would also receive a SIGTERM and could prevent the save.

    read: the batch of a step, such as `Loader.batch`. It is called in the thread.
    """

    def __init__(self, read: Callable[[int], T], first_step: int, depth: int = 2):
        self.read, self.depth = read, depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._pending: deque[Future[T]] = deque()
        self._start(first_step)

    def _start(self, step: int) -> None:
        for future in self._pending:
            future.cancel()
        self._pending = deque(self._pool.submit(self.read, step + i) for i in range(self.depth))
        self._next = step

    def next(self, step: int) -> T:
        """`read(step)`. An error from reading it is raised here. If `step` is not the expected one, reading restarts there."""
        if step != self._next:
            self._start(step)
        batch = self._pending.popleft()
        self._pending.append(self._pool.submit(self.read, step + self.depth))
        self._next = step + 1
        return batch.result()

    def close(self) -> None:
        """Stop the thread and drop the batches it has read. A second call does nothing."""
        self._pool.shutdown(cancel_futures=True)


def require_window(split: Split, block_size: int) -> None:
    """Raise DataError if a split is shorter than a window of block_size + 1 tokens."""
    if split.tokens < block_size + 1:
        raise DataError(
            f"a context of {block_size} tokens is longer than the data in {split.directory} ({split.tokens} tokens, "
            f"{block_size + 1} needed); take a shorter context (of a new model: model.block_size) or prepare more text"
        )
