"""How fast text becomes tokens, and batches are read: python -m data.bench <file of text> ...

Prints the tokens a second, by the clock and of CPU time, of a preparation in one process and with more workers; the memory of all of its
processes; the tokens a second of plain tiktoken; and the milliseconds of a batch of 480 windows of 1,024 tokens, 491,520 tokens a step as
for GPT-2 124M.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data.files import Rows
from data.loader import ORDERS, Loader
from data.parallel import available_cores
from data.prepare import prepare
from data.shards import DataError, open_dataset
from data.sources import TextFiles

_PAGE = os.sysconf("SC_PAGE_SIZE")


def settings(files: Sequence[str], folder: str) -> TextFiles:
    """Those of data=text."""
    return TextFiles(
        name="bench",
        source="text",
        dir=folder,
        tokenizer="gpt2",
        auto_prepare=False,
        shard_tokens=100_000_000,
        val_fraction=0.5,
        max_tokens=None,
        files=tuple(files),
        val_files=None,
        split_seed=2357,
        separator="<|endoftext|>",
        column="text",
    )


def plain_tiktoken(cfg: TextFiles) -> float:
    """Tokens a second of CPU of tiktoken's encode_ordinary on the documents, without reading them."""
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    parts = [chunk.texts for chunk in cfg.chunks(cfg.inputs(), (0, 0))]
    texts = [text for part in parts for text in (part.read() if isinstance(part, Rows) else part)]
    start = time.process_time()
    tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
    return tokens / (time.process_time() - start)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The largest sum of the resident memory of this process and of its children, in bytes, in a list."""
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], sum(map(_resident, [os.getpid(), *_children(os.getpid())])))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def _children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE
    except OSError:
        return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    files = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(files):
        print(__doc__)
        return 0
    if not files:
        print(__doc__, file=sys.stderr)
        return 2
    if missing := [file for file in files if not Path(file).is_file()]:
        print("\n".join(f"there is no file {file}; name text files" for file in missing), file=sys.stderr)
        return 2
    cores = available_cores()
    with tempfile.TemporaryDirectory() as folder:
        for workers in (0, *(n for n in (1, 2, 4, 8, 16) if n <= cores)):
            cfg = settings(files, f"{folder}/{workers}")
            start, cpu = time.perf_counter(), os.times()
            with peak_memory() as most:
                try:
                    prepare(cfg, progress=False, workers=workers)
                except DataError as error:
                    print(f"{error} (this command takes files only, and no settings)", file=sys.stderr)
                    return 2
            seconds, after = time.perf_counter() - start, os.times()
            used = sum(after[:4]) - sum(cpu[:4])
            dataset = open_dataset(cfg.dir, verify=False)
            tokens = dataset.train.tokens + dataset.val.tokens
            print(
                f"{workers or 'no'} workers: {tokens / seconds / 1e6:.2f}M tokens/s, {tokens / used / 1e6:.2f}M a second of CPU, "
                f"{most[0] / 2**20:,.0f} MiB in all processes"
            )
        print(f"plain tiktoken: {plain_tiktoken(cfg) / 1e6:.2f}M tokens a second of CPU")
        for order in ORDERS:
            loader = Loader(dataset.train, 1024, 0, 480, order=order)
            times = []
            for step in range(30):
                start = time.perf_counter()
                loader.batch(step)
                times.append(time.perf_counter() - start)
            print(
                f"batch of 480 x 1,024 tokens, {order}: {1e3 * np.min(times):.1f} ms at best, {1e3 * np.median(times):.1f} median"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
