"""Windows in the order of the tokens, without shuffling, as the public speedruns read them (github.com/KellerJordan/modded-nanogpt)."""

from __future__ import annotations

import numpy as np

from data.loader import Loader, require_window
from data.shards import DataError, Split


class InOrder(Loader):
    """The windows of a step follow each other in one shard, and those of the next step follow them; each token is an input at most once in a pass.

    What is left of a shard, too little for a batch, is left out. After the last shard, reading starts again at the first. Rank r
    receives its r-th contiguous part of a batch. The seed does not matter.

    Raises:
        DataError: no shard holds a batch. ValueError: see Loader.
    """

    def __init__(self, split: Split, block_size: int, seed: int, windows: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(split, block_size, seed, windows, rank, world)
        size = windows * block_size
        starts = np.cumsum([0, *(shard.tokens for shard in split.shards)])
        # A token behind a batch must not be the last of the shard.
        batches = [max(0, shard.tokens - 2) // size for shard in split.shards]
        self._source = split
        self._starts = np.concatenate([start + size * np.arange(n) for start, n in zip(starts, batches)]).astype(int)
        if not len(self._starts):
            raise DataError(
                f"a batch has {size} tokens, more than any shard of the training split; use a smaller global_batch_tokens"
            )

    def batch(self, step: int) -> np.ndarray:
        """This rank's windows at `step`: (windows // world, block_size + 1) uint16; a window overlaps the next by one token."""
        share = self.windows // self.world
        start = int(self._starts[step % len(self._starts)]) + self.rank * share * self.block_size
        return _windows(self._source, start, share, self.block_size)


def first_windows(split: Split, block_size: int, count: int) -> np.ndarray:
    """The first windows of a split, at most `count`; each overlaps the next by one token: (n, block_size + 1) uint16.

    Raises:
        DataError: the split is shorter than a window.
    """
    require_window(split, block_size)
    return _windows(split, 0, min(count, (split.tokens - 1) // block_size), block_size)


def _windows(split: Split, start: int, count: int, block_size: int) -> np.ndarray:
    tokens = split.read(start, count * block_size + 1)
    return np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)[::block_size]
