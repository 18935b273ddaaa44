"""Prepare a dataset once: python -m data.prepare data=openwebtext [data.key=value ...]"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.command import CONFIGS
from data.settings import Data
from data.shards import (
    FORMAT,
    TOKEN,
    DataError,
    Manifest,
    ShardWriter,
    SplitInfo,
    open_dataset,
    require_name,
    write_manifest,
)
from data.sources import Expected, OpenWebText
from data.tokenizer import encode_documents, get_tokenizer

log = logging.getLogger(__name__)


def prepare(cfg: Data, progress: bool = True) -> Path:
    """Prepare the dataset that these settings describe; returns its directory.

    Does nothing if the directory already holds this dataset. Everything is written into a temporary directory beside it, which is
    renamed at the end: an error, Ctrl-C or a full disk leaves nothing behind, and the next call removes what a killed process left. If
    several processes prepare the same directory at the same time, the others wait for the first.

    Raises:
        DataError: the directory holds something else, the source or the tokenizer cannot be read, or the directory cannot be written.
    """
    require_name(cfg.name)
    directory = Path(cfg.dir).expanduser()
    if _holds(directory, cfg):
        return directory
    if directory.resolve() in (here := Path.cwd(), *here.parents):
        raise DataError(
            f"data.dir={directory} is, or contains, the current directory; set it to a folder of its own, such as data/prepared/mine"
        )
    written = 0
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _require_space(directory, cfg)
        with _temporary(directory) as temporary:
            if not _holds(directory, cfg):  # another process may have prepared it meanwhile
                try:
                    write_manifest(temporary, _write(temporary, cfg, progress))
                    _sync(temporary)
                except OSError:
                    written = sum(file.stat().st_size for file in temporary.iterdir())
                    raise
                temporary.rename(directory)
                _sync(directory.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(_disk_is_full(directory, cfg, written)) from error
        raise DataError(f"cannot write {directory} ({error}); set data.dir to a folder that can be written") from error
    return directory


def _holds(directory: Path, cfg: Data) -> bool:
    """Whether the directory holds the data of these settings; DataError if it holds anything else."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    manifest = open_dataset(directory, verify=False, settings=replace(cfg, dir=str(directory))).manifest
    settings = cfg.content
    remedy = f"move {directory} elsewhere to prepare it again, or set data.dir to another folder"
    keys = sorted(settings.keys() | manifest.settings.keys())
    differing = [key for key in keys if settings.get(key) != manifest.settings.get(key)]
    if differing:
        changes = ", ".join(
            f"{key}: {manifest.settings.get(key)!r} there, {settings.get(key)!r} asked" for key in differing
        )
        raise DataError(f"{directory} was prepared with other settings ({changes}); {remedy}")
    inputs = cfg.input_files()
    if inputs and inputs != manifest.inputs:  # if there are none, the original files may have been removed
        changed = sorted({file for file, _ in inputs.items() ^ manifest.inputs.items()})
        raise DataError(
            f"the files that {directory} was prepared from have changed ({', '.join(changed[:3])}); {remedy}"
        )
    return True


def _write(directory: Path, cfg: Data, progress: bool) -> Manifest:
    """Write the shards of both splits; returns their manifest."""
    tokenizer = get_tokenizer(cfg.tokenizer)
    threads = len(os.sched_getaffinity(0)) if tokenizer.name == "gpt2" else 1  # encoding bytes costs nothing
    encoded = encode_documents(tokenizer, cfg.documents(), threads)
    inputs = cfg.input_files()
    shard_tokens, cap = cfg.shard_tokens, cfg.max_tokens
    with (
        ShardWriter(directory, "train", shard_tokens) as train,
        ShardWriter(directory, "val", shard_tokens) as val,
        contextlib.closing(encoded),
        _progress(cfg, progress) as report,
    ):
        writers = {"train": train, "val": val}
        for split, ids in encoded:
            if split == "train" and cap is not None:
                ids = ids[: cap - train.tokens]
            documents = int(np.count_nonzero(ids == tokenizer.eot))  # complete ones only: the cap may cut the last
            writers[split].write(ids, documents)
            report(documents, train.tokens + val.tokens)
            if cap is not None and train.tokens >= cap and val.tokens:
                break
        splits = {split: writer.finish() for split, writer in writers.items()}
    for split, info in splits.items():
        if not info.tokens:
            raise DataError(_empty(split, splits))
    expected = _compare(splits, cfg)
    return Manifest(
        format=FORMAT,
        name=cfg.name,
        source=cfg.source,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        splits=splits,
        settings=cfg.content,
        inputs=inputs,
        expected=expected,
        made_by=_made_by(),
    )


def _empty(split: str, splits: Mapping[str, SplitInfo]) -> str:
    total = sum(info.documents for info in splits.values())
    remedy = (
        "name other files for it (data.val_files), raise data.val_fraction, or split the text into more documents "
        "(data.separator='' makes each paragraph one)"
        if split == "val"
        else "name more files (data.files) or lower data.val_fraction"
    )
    return f"none of the {total} documents fell into the split {split!r}; {remedy}"


def _compare(splits: Mapping[str, SplitInfo], cfg: Data) -> dict[str, Any]:
    """The published counts, and whether ours are equal; a difference is logged as a warning with both numbers."""
    expected = _expected(cfg)
    if expected is None or expected.tokenizer != cfg.tokenizer or cfg.max_tokens is not None:
        return {}
    found = {
        "documents": sum(info.documents for info in splits.values()),
        "train_tokens": splits["train"].tokens,
        "val_tokens": splits["val"].tokens,
    }
    published = {key: getattr(expected, key) for key in found}
    different = [key for key in found if found[key] != published[key]]
    for key in different:
        log.warning("%s: %s %s prepared, %s expected", cfg.name, f"{found[key]:,}", key, f"{published[key]:,}")
    return {**published, "met": not different}


def _expected(cfg: Data) -> Expected | None:
    return cfg.expected if isinstance(cfg, OpenWebText) else None


def _made_by() -> dict[str, str]:
    return {
        "command": "python -m data.prepare",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@contextlib.contextmanager
def _progress(cfg: Data, shown: bool) -> Iterator[Any]:
    """A function of (new documents, tokens so far) that updates a progress bar: documents, documents/s, tokens, tokens/s."""
    from tqdm import tqdm

    expected = _expected(cfg)
    total = expected and expected.documents
    with tqdm(total=total, desc=cfg.name, unit=" documents", unit_scale=True, disable=not shown) as bar:

        def report(documents: int, tokens: int) -> None:
            bar.update(documents)
            if shown:
                rate = tokens / max(bar.format_dict["elapsed"], 1e-3)
                bar.set_postfix_str(f"{tokens / 1e6:,.1f}M tokens, {rate / 1e6:.2f}M tokens/s", refresh=False)

        yield report


@contextlib.contextmanager
def _temporary(directory: Path) -> Iterator[Path]:
    """An empty directory beside `directory`, locked by this process; removed at the end unless it was renamed.

    The lock is on the directory itself, so no lock file is left behind. The kernel releases it when the process ends.
    """
    path = directory.with_name(f".{directory.name}.partial")
    while True:
        path.mkdir(exist_ok=True)
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except FileNotFoundError:
            continue  # the process that held it finished between the two lines
        if _is_same(path, lock):
            break
        os.close(lock)  # it was renamed or removed while we waited
    try:
        for stale in path.iterdir():  # left by a killed process
            stale.unlink()
        yield path
    finally:
        if _is_same(path, lock):
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sync(directory: Path) -> None:
    """Write the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _needed_bytes(cfg: Data) -> int | None:
    """The size of all shards, if published counts tell it."""
    expected = _expected(cfg)
    if expected is None or expected.tokenizer != cfg.tokenizer:
        return None
    return TOKEN.itemsize * (min(expected.train_tokens, cfg.max_tokens or expected.train_tokens) + expected.val_tokens)


def _require_space(directory: Path, cfg: Data) -> None:
    """Raise DataError before anything is written if the disk is known to be too small."""
    needed = _needed_bytes(cfg)
    if needed is not None and shutil.disk_usage(directory.parent).free < needed:
        raise DataError(_disk_is_full(directory, cfg, written=0))


def _disk_is_full(directory: Path, cfg: Data, written: int) -> str:
    needed = _needed_bytes(cfg)
    needs = f"more than the {_size(written)} written so far" if needed is None else _size(needed)
    free = _size(shutil.disk_usage(directory.parent).free)  # what was written has already been removed
    return (
        f"the disk of {directory.parent.resolve()} is too small: {cfg.name} needs {needs} and {free} are free; "
        "free some space, or set data.dir to a folder on a larger disk (no files were left behind)"
    )


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def main(arguments: Sequence[str] | None = None, configs: Path = CONFIGS) -> int:
    """The command; returns its exit code: 2 if the configuration or the data has a problem."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from training.help import help_text
    from training.overrides import REFUSALS, problems_of_words

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        print(help_text(__doc__ or "", ["data", *arguments]))
        return 0
    from training.checks import read_data
    from training.validate import ConfigError

    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            cfg = read_data(OmegaConf.to_container(compose("config", overrides=arguments).data, resolve=True))
        directory = prepare(cfg)
        print(_counts(directory, cfg))
    except REFUSALS as error:
        print(ConfigError(problems_of_words(arguments, configs=configs)[0] or [str(error)]), file=sys.stderr)
        return 2
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; no files were left behind", file=sys.stderr)
        return 130
    return 0


def _counts(directory: Path, cfg: Data) -> str:
    """The counts of a prepared directory, as text."""
    manifest = open_dataset(directory, verify=False, settings=cfg).manifest
    lines = [f"{cfg.name} in {directory}: tokenizer {manifest.tokenizer}, vocabulary {manifest.vocab_size:,}"]
    for split, info in manifest.splits.items():
        shards = f"{len(info.shards)} shard{'s' * (len(info.shards) != 1)}"
        lines.append(f"  {split:<5} {info.tokens:>14,} tokens {info.documents:>10,} documents  {shards}")
    if manifest.expected:
        counts = ", ".join(f"{manifest.expected[key]:,} {key}" for key in ("documents", "train_tokens", "val_tokens"))
        lines.append(f"  expected {counts}: {'equal' if manifest.expected['met'] else 'NOT equal'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
