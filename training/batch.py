"""The size of a micro-batch."""

from __future__ import annotations


def micro_batch_size(windows: int, wanted: int) -> int:
    """Windows of a micro-batch, for a rank that has `windows` windows in an update; at most `wanted`.

    The largest divisor of `windows` up to `wanted`, if it is at least half of min(windows, wanted): then all micro-batches have one shape.
    Otherwise min(windows, wanted), and the last micro-batch is smaller.

    >>> micro_batch_size(8, 64), micro_batch_size(12, 5), micro_batch_size(7, 4)
    (8, 4, 4)
    """
    most = min(windows, wanted)
    even = next(size for size in range(most, 0, -1) if windows % size == 0)
    return even if 2 * even >= most else most
