"""Batches are a pure function of (seed, step, rank); validation windows are the same for every run."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from data.loader import PERIOD, Loader, Prefetcher, shuffled, validation_windows
from data.shards import DataError, Mixture, Split
from data.writer import ShardWriter

TOKENS = 1000
GOLDEN = [[953, 803, 526, 325], [346, 818, 778, 115]]  # steps 0 and 7
GOLDEN_EPOCHS = [[790, 278, 662, 854], [629, 869, 245, 277]]  # steps 0 and 20, in the second epoch
GOLDEN_PARTS = [[0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]]  # of a mixture, steps 0 and 7


def write_split(directory, ids: np.ndarray, shard_tokens: int) -> Split:
    with closing(ShardWriter(directory, "train", shard_tokens)) as writer:
        writer.write(ids.astype(np.uint16), documents=1)
        return Split(directory, writer.finish().shards)


@pytest.fixture
def split(tmp_path) -> Split:
    """Token i is i, in shards of 64: a window says where it came from."""
    return write_split(tmp_path, np.arange(TOKENS), shard_tokens=64)


def test_windows_are_consecutive_tokens_from_the_offsets(split):
    loader = Loader(split, block_size=100, seed=1, windows=8)
    batch = loader.batch(3)
    assert batch.shape == (8, 101)
    assert batch.dtype == np.uint16
    np.testing.assert_array_equal(batch, loader.places(3)[1][:, None] + np.arange(101))


def test_batch_depends_on_seed_and_step_and_nothing_else(split):
    loader = Loader(split, block_size=16, seed=1, windows=8)
    first = loader.batch(5)
    loader.batch(0)
    np.testing.assert_array_equal(first, loader.batch(5))
    np.testing.assert_array_equal(first, Loader(split, 16, seed=1, windows=8).batch(5))
    assert (first != loader.batch(6)).any()
    assert (first != Loader(split, 16, seed=2, windows=8).batch(5)).any()


def test_offsets_are_philox_keyed_by_seed_and_step(split):
    """Golden numbers: a change here would silently change what every resumed run reads."""
    loader = Loader(split, block_size=16, seed=1337, windows=4)
    assert [loader.places(step)[1].tolist() for step in (0, 7)] == GOLDEN
    epochs = Loader(split, block_size=16, seed=1337, windows=4, order="epoch")
    assert [epochs.places(step)[1].tolist() for step in (0, 20)] == GOLDEN_EPOCHS
    mixture = Loader(Mixture((split, split), (3.0, 1.0)), block_size=16, seed=1337, windows=8)
    assert [mixture.places(step)[0].tolist() for step in (0, 7)] == GOLDEN_PARTS
    other = Loader(Mixture((split, split), (3.0, 1.0)), block_size=16, seed=1, windows=8)
    assert any((other.places(step)[0] != mixture.places(step)[0]).any() for step in range(4))


@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_together_read_the_batch_of_one(split, world):
    whole = Loader(split, 16, seed=1, windows=12).batch(4)
    parts = [Loader(split, 16, seed=1, windows=12, rank=rank, world=world).batch(4) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_offsets_are_uniform_and_reach_both_ends(tmp_path):
    split = write_split(tmp_path, np.arange(20), shard_tokens=20)
    loader = Loader(split, block_size=15, seed=0, windows=500)  # 5 places: 0 to 4
    counts = np.bincount(np.concatenate([loader.places(step)[1] for step in range(20)]), minlength=5)
    assert len(counts) == 5
    assert np.abs(counts - 2000).max() < 200  # five standard deviations of a binomial


def test_a_split_of_exactly_one_window(tmp_path):
    split = write_split(tmp_path, np.arange(17), shard_tokens=5)
    assert (Loader(split, 16, seed=0, windows=3).batch(0) == np.arange(17)).all()
    assert (validation_windows(split, 16, 9) == np.arange(17)).all()


def test_a_context_longer_than_the_data_is_refused(split):
    for use in (lambda: Loader(split, TOKENS, 0, 1), lambda: validation_windows(split, TOKENS, 1)):
        with pytest.raises(DataError, match=r"longer than the data.*take a shorter context"):
            use()


def test_windows_that_ranks_cannot_share_are_refused(split):
    with pytest.raises(ValueError, match="8 windows a step cannot be divided among 3 ranks; set global_batch_tokens"):
        Loader(split, 16, 0, windows=8, rank=0, world=3)
    with pytest.raises(ValueError, match="rank 2 does not exist"):
        Loader(split, 16, 0, windows=8, rank=2, world=2)


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_validation_windows_are_spread_and_do_not_overlap(split, count):
    windows = validation_windows(split, block_size=16, count=count).astype(int)
    assert windows.shape == (min(count, TOKENS // 17), 17)
    starts = windows[:, 0]
    np.testing.assert_array_equal(windows, starts[:, None] + np.arange(17))
    gaps = np.diff(starts)
    assert (gaps >= 17).all()
    assert len(set(gaps)) <= 1
    assert starts[0] == 0
    assert TOKENS - windows[-1, -1] <= TOKENS // len(windows) + len(windows)  # the end is not left out


@pytest.mark.parametrize(("weights", "count", "expected"), [((2.0, 1.0), 5, [3, 2]), ((9.0, 1.0), 1, [1, 0])])
def test_validation_windows_of_a_mixture_are_shared_out_by_weight(tmp_path, weights, count, expected):
    parts = []
    for first in (0, TOKENS):
        (tmp_path / str(first)).mkdir()
        parts.append(write_split(tmp_path / str(first), first + np.arange(TOKENS), shard_tokens=64))
    windows = validation_windows(Mixture(tuple(parts), weights), 16, count)
    assert np.bincount(windows[:, 0] // TOKENS, minlength=2).tolist() == expected


def test_prefetcher_gives_the_loaders_batches_from_any_step(split):
    loader = Loader(split, 16, seed=3, windows=4)
    prefetcher = Prefetcher(loader.batch, first_step=10)
    try:
        for step in (10, 11, 12, 5, 6, 6, 100):
            np.testing.assert_array_equal(prefetcher.next(step), loader.batch(step))
    finally:
        prefetcher.close()
        prefetcher.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_prefetcher_works_ahead_but_not_further_than_its_depth(split):
    loader = Loader(split, 16, seed=3, windows=4)
    asked = []
    batch = loader.batch
    loader.batch = lambda step: asked.append(step) or batch(step)
    prefetcher = Prefetcher(loader.batch, first_step=0, depth=3)
    prefetcher.next(0)
    prefetcher.next(1)
    prefetcher._pool.shutdown(wait=True)
    assert asked == [0, 1, 2, 3, 4]


def test_prefetcher_raises_in_the_caller(split):
    loader = Loader(split, 16, seed=3, windows=4)
    prefetcher = Prefetcher(loader.batch, first_step=0, depth=1)
    for shard in split.shards:
        os.truncate(split.directory / shard.file, 0)
    with pytest.raises(DataError, match="was truncated while it was used"):
        for step in range(3):
            prefetcher.next(step)
    prefetcher.close()


# --- every window once an epoch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000, 4097])
def test_the_shuffle_is_a_permutation_that_depends_on_its_keys(count):
    keys = np.random.Philox(key=1).random_raw(6)
    found = shuffled(np.arange(count), count, keys)
    assert sorted(found) == list(range(count))
    if count > 100:
        assert (found != shuffled(np.arange(count), count, np.random.Philox(key=2).random_raw(6))).mean() > 0.9
        assert abs(np.corrcoef(np.arange(count), found)[0, 1]) < 0.1
        assert abs(np.corrcoef(np.arange(count - 1), np.diff(found))[0, 1]) < 0.1


def test_the_shuffle_of_a_huge_corpus_needs_no_memory():
    count = 10**13 + 7
    found = shuffled(np.arange(10**12, 10**12 + 1000), count, np.random.Philox(key=1).random_raw(6))
    assert len(set(found.tolist())) == 1000
    assert found.min() >= 0 and found.max() < count
    assert np.abs(np.histogram(found, 10, (0, count))[0] - 100).max() < 50


@pytest.mark.parametrize(("world", "windows"), [(1, 4), (2, 6), (3, 9)])
def test_an_epoch_reads_every_window_once(split, world, windows):
    """1000 tokens have 62 windows of 16 tokens with one more as a target, and 7 tokens that are left out at one end or the other."""
    loaders = [Loader(split, 16, 5, windows, rank, world, "epoch") for rank in range(world)]
    steps = range(62 * 3 // windows + 1)
    offsets = np.concatenate([loader.places(step)[1] for step in steps for loader in loaders])
    firsts = set()
    for epoch in range(3):
        part = np.sort(offsets[62 * epoch : 62 * (epoch + 1)])
        assert set(np.diff(part)) == {16}
        assert 0 <= part[0] <= 7
        firsts.add(tuple(offsets[62 * epoch : 62 * epoch + 8]))
    assert len(firsts) == 3
    whole = Loader(split, 16, 5, windows, order="epoch")
    np.testing.assert_array_equal(whole.batch(2), whole.places(2)[1][:, None] + np.arange(17))
    assert (whole.places(1)[1] != Loader(split, 16, 6, windows, order="epoch").places(1)[1]).any()


def test_a_split_of_one_window_is_read_every_time(tmp_path):
    loader = Loader(write_split(tmp_path, np.arange(17), 5), 16, seed=0, windows=3, order="epoch")
    assert (loader.batch(9) == np.arange(17)).all()


def test_an_unknown_order_is_refused(split):
    with pytest.raises(ValueError, match="no order 'random'; choose replacement or epoch"):
        Loader(split, 16, 0, windows=8, order="random")


def resident() -> int:
    """The resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow_over_ten_thousand_batches(tmp_path):
    """The data has 20 MB, which a memory map would add to the resident memory."""
    loader = Loader(write_split(tmp_path, np.arange(10_000_000), 1_000_000), 64, 0, windows=2, order="epoch")
    prefetcher = Prefetcher(loader.batch, first_step=0)
    used = []
    try:
        for step in range(10_000):
            prefetcher.next(step)
            if step in (1000, 9_999):
                used.append(resident())
    finally:
        prefetcher.close()
    assert used[1] - used[0] < 3_000_000


def test_each_corpus_of_a_mixture_has_its_own_epochs(tmp_path):
    """Two corpora of equal length, over more windows than the pattern of turns has."""
    for name in "ab":
        (tmp_path / name).mkdir()
    parts = tuple(write_split(tmp_path / name, np.arange(TOKENS), shard_tokens=64) for name in "ab")
    loader = Loader(Mixture(parts, (3.0, 1.0)), 16, 5, windows=1000, order="epoch")
    part, offset = (np.concatenate(x) for x in zip(*(loader.places(step) for step in range(2 * PERIOD // 1000))))
    orders = []
    for p in (0, 1):
        mine = offset[part == p]
        epochs = mine[: len(mine) // 62 * 62].reshape(-1, 62)  # 62 windows of 16 tokens
        assert all(len(set(epoch)) == 62 for epoch in epochs.tolist())
        orders.append((epochs[0] // 16).tolist())
    assert orders[0] != orders[1]


def test_an_epoch_begins_anywhere_in_what_is_left_over(tmp_path):
    loader = Loader(write_split(tmp_path, np.arange(TOKENS), 64), 16, 5, windows=62, order="epoch")
    assert {int(loader.places(epoch)[1].min()) for epoch in range(60)} == set(range(8))


def test_windows_reach_both_ends_of_every_corpus_of_a_mixture(tmp_path):
    lengths, parts = (20, 24), []
    for name, tokens in zip("ab", lengths):
        (tmp_path / name).mkdir()
        parts.append(write_split(tmp_path / name, np.arange(tokens), shard_tokens=64))
    for order in (parts, parts[::-1]):
        loader = Loader(Mixture(tuple(order), (1.0, 1.0)), 15, 0, windows=1000)
        part, offset = loader.places(0)
        found = [set(offset[part == p].tolist()) for p in (0, 1)]
        assert found == [set(range(split.tokens - 15)) for split in order]
