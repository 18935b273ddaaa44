"""Prepare a dataset once: python -m data.prepare data=openwebtext [data.key=value ...]"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.hub import Expected
from data.mix import NO_PARTS, Mix
from data.parallel import encoded, workers_for
from data.settings import Data, Source
from data.shards import FORMAT, TOKEN, DataError, Manifest, SplitInfo, open_dataset, require_name, write_manifest
from data.tokenizer import get_tokenizer
from data.writer import PROGRESS, Progress, sync_directory

log = logging.getLogger(__name__)


def prepare(cfg: Source, progress: bool = True, workers: int | None = None) -> Path:
    """Prepare the dataset that these settings describe; returns its directory.

    progress: whether it is shown. workers: processes that encode, 0 for this one; None: see `workers_for`.

    Does nothing if the directory already holds this dataset. Everything is written into a temporary directory beside it, which is
    renamed at the end. After an error, Ctrl-C, a full disk or a kill, the same call continues: no document is repeated or lost, and the shards
    are those of an uninterrupted preparation. If the settings or the input have changed, it starts again. If several processes prepare
    the same directory at the same time, the others wait for the first.

    Raises:
        DataError: the directory holds something else, the source or the tokenizer cannot be read, or the directory cannot be written.
    """
    require_name(cfg.name)
    directory = Path(cfg.dir)
    if _holds(directory, cfg):
        with contextlib.suppress(OSError):  # a killed process may have left it
            (directory / PROGRESS).unlink(missing_ok=True)
        return directory
    if directory.resolve() in (here := Path.cwd(), *here.parents):
        raise DataError(
            f"data.dir={directory} is, or contains, the current directory; set it to a folder of its own, such as data/prepared/mine"
        )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _require_space(directory, cfg, _published_bytes(cfg))
        with _temporary(directory) as temporary:
            if not _holds(directory, cfg):  # another process may have prepared it meanwhile
                with Progress(temporary, cfg) as work:
                    _require_space(directory, cfg, _estimated_bytes(work), work.tokens * TOKEN.itemsize)
                    manifest = _write(work, progress, workers)
                write_manifest(temporary, manifest)
                sync_directory(temporary)
                temporary.rename(directory)
                sync_directory(directory.parent)
                (directory / PROGRESS).unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(_disk_is_full(directory, cfg)) from error
        raise DataError(f"cannot write {directory} ({error}); set data.dir to a folder that can be written") from error
    return directory


def _holds(directory: Path, cfg: Source) -> bool:
    """Whether the directory holds the data of these settings; DataError if it holds anything else."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    manifest = open_dataset(directory, verify=False, settings=cfg).manifest
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


def _write(work: Progress, shown: bool, workers: int | None) -> Manifest:
    """Write the shards of both splits, after those that are there already; returns their manifest."""
    cfg, tokenizer = work.cfg, get_tokenizer(work.cfg.tokenizer)
    if workers is None:
        left = sum(file.size for file in work.files) - work.read if work.files else None
        workers = workers_for(cfg.tokenizer, left)
    chunks = cfg.chunks(work.files, work.position)
    with (
        contextlib.closing(encoded(cfg.tokenizer, chunks, workers)) as found,
        _shown(work, shown) as show,
    ):
        while not work.full and (part := next(found, None)) is not None:
            work.add(*part, tokenizer.eot)
            work.save(always=False)
            show()
    work.save()
    splits = {writer.split: writer.finish() for writer in (work.train, work.val)}
    for split, info in splits.items():
        if not info.tokens:
            raise DataError(_empty(split, splits, cfg))
    return Manifest(
        format=FORMAT,
        name=cfg.name,
        source=cfg.source,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        splits=splits,
        settings=cfg.content,
        inputs={file.path: file.size for file in work.files},
        expected=_compare(splits, cfg),
        made_by=_made_by(),
    )


def _empty(split: str, splits: Mapping[str, SplitInfo], cfg: Source) -> str:
    """Why a split has no documents, with the remedies that this source has."""
    total = sum(info.documents for info in splits.values())
    if not total and cfg.max_tokens is not None:
        return f"data.max_tokens={cfg.max_tokens} is less than the first document has; raise it"
    of_files, own_files = hasattr(cfg, "val_files"), bool(getattr(cfg, "val_files", None))
    remedies = []
    if of_files:
        remedies.append(
            "name other files for it (data.val_files)" if split == "val" else "name more files (data.files)"
        )
    if total != 1 and not own_files:  # no share divides one document
        remedies.append(f"{'raise' if split == 'val' else 'lower'} data.val_fraction")
    if cfg.max_tokens is not None:
        remedies.append("raise data.max_tokens")
    if split == "val" and of_files and getattr(cfg, "separator", None) != "":
        remedies.append("split the text into more documents (data.separator='' makes each paragraph one)")
    remedy = ", or ".join(remedies) or "choose a source with more documents"
    return f"none of the {total} documents fell into the split {split!r}; {remedy}"


def _compare(splits: Mapping[str, SplitInfo], cfg: Source) -> dict[str, Any]:
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


def _expected(cfg: Source) -> Expected | None:
    return getattr(cfg, "expected", None)


def _made_by() -> dict[str, str]:
    return {
        "command": "python -m data.prepare",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@contextlib.contextmanager
def _shown(work: Progress, shown: bool) -> Iterator[Any]:
    """A function that updates a progress bar: percent and time left if the size of the input is known, documents, tokens, tokens/s."""
    from tqdm import tqdm

    known = work.share is not None
    layout = (
        "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
        if known
        else "{desc} {elapsed}{postfix}"
    )
    first, before = 100 * (work.share or 0), work.tokens
    if before and shown:
        print(f"{work.cfg.name}: continues after {work.documents:,} documents, {before:,} tokens", file=sys.stderr)
    with tqdm(
        total=100 if known else None, initial=first, desc=work.cfg.name, bar_format=layout, disable=not shown
    ) as bar:

        def show() -> None:
            if shown:
                rate = (work.tokens - before) / max(bar.format_dict["elapsed"], 1e-3)
                counts = f"{work.documents:,} documents, {work.tokens / 1e6:,.1f}M tokens, {rate / 1e6:.2f}M tokens/s"
                bar.set_postfix_str(counts, refresh=False)
                bar.update(100 * (work.share or 0) - bar.n)

        yield show


@contextlib.contextmanager
def _temporary(directory: Path) -> Iterator[Path]:
    """A directory beside `directory`, locked by this process. At the end it is removed, unless it was renamed or holds a saved progress.

    The lock is on the directory itself, so no lock file is left behind. The kernel releases it when the process ends.
    """
    path = _temporary_name(directory)
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
        yield path
    finally:
        if _is_same(path, lock) and not (path / PROGRESS).exists():
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _temporary_name(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.partial")


def _is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _published_bytes(cfg: Source) -> int:
    """The size of all shards, if published counts tell it; otherwise 0."""
    expected = _expected(cfg)
    if expected is None or expected.tokenizer != cfg.tokenizer:
        return 0
    return TOKEN.itemsize * (min(expected.train_tokens, cfg.max_tokens or expected.train_tokens) + expected.val_tokens)


# Bytes of text a token: more than the text of most languages has, so that the estimate is low.
_BYTES_A_TOKEN = {"bytes": 1.0, "gpt2": 5.0}


def _estimated_bytes(work: Progress) -> int:
    """The least that the shards will need, from the size of the input; 0 if that is not known.

    Of plain text, which compressed files have more of. How much of other formats is text, is not known.
    """
    cfg = work.cfg
    text = sum(file.size for file in work.files if ".txt" in Path(file.path).suffixes)
    tokens = text / _BYTES_A_TOKEN[cfg.tokenizer]
    return _published_bytes(cfg) or TOKEN.itemsize * int(min(tokens, cfg.max_tokens or tokens))


def _require_space(directory: Path, cfg: Source, needed: int, there: int = 0) -> None:
    """Raise DataError before anything is written if the disk is known to be too small for `needed` bytes, of which `there` are written."""
    if shutil.disk_usage(directory.parent).free < needed - there:
        raise DataError(_disk_is_full(directory, cfg, needed))


def _disk_is_full(directory: Path, cfg: Source, needed: int = 0) -> str:
    temporary = _temporary_name(directory)
    written = sum(file.stat().st_size for file in temporary.iterdir()) if temporary.exists() else 0
    needed = needed or _published_bytes(cfg)
    needs = f"at least {_size(needed)}" if needed else f"more than the {_size(written)} written so far"
    kept = f"; {_size(written)} are kept in {temporary}, and the same command continues" if written else ""
    return (
        f"the disk of {directory.parent.resolve()} is too small: {cfg.name} needs {needs} and "
        f"{_size(shutil.disk_usage(directory.parent).free)} are free; free some space, or set data.dir to a folder on a larger disk{kept}"
    )


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 if the configuration or the data has a problem."""
    from omegaconf import OmegaConf

    from training.help import help_text
    from training.overrides import REFUSALS, composed, problems_of_words

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        print(help_text(__doc__ or "", ["data", *arguments]))
        return 0
    from training.checks import read_data
    from training.validate import ConfigError

    try:
        cfg = read_data(OmegaConf.to_container(composed(arguments).data, resolve=True))
        if idle := [word for word in arguments if not _is_of_data(word)]:
            raise ConfigError(f"{word} has no effect on a preparation; leave it out" for word in idle)
        if isinstance(cfg, Mix) and not cfg.parts:
            raise DataError(NO_PARTS)
        if not isinstance(cfg, Source):
            print(f"data={cfg.source} reads tokens that are there already; check them with: {_check_of(cfg)}")
            return 2
        directory = prepare(cfg)
        print(_counts(directory, cfg))
    except REFUSALS as error:
        problems, rest = problems_of_words(arguments, sweeps=False)
        if problems:
            with contextlib.suppress(*REFUSALS):
                try:  # wrong values among the other words
                    read_data(OmegaConf.to_container(composed(rest).data, resolve=True))
                except ConfigError as wrong:
                    problems += wrong.problems
        print(ConfigError(problems or [str(error)]), file=sys.stderr)
        return 2
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def _is_of_data(word: str) -> bool:
    """Whether a word of the command line decides the data: an experiment may choose one, and hydra.searchpath says where its file lies."""
    key = word.partition("=")[0].lstrip("+~")
    return key in ("data", "experiment", "hydra.searchpath") or key.startswith("data.")


def _check_of(cfg: Data) -> str:
    """The command that checks tokens that are there already; of a mixture, one for each part."""
    folders = [Path(cfg.dir) / part for part in cfg.parts] if isinstance(cfg, Mix) else [Path(cfg.dir)]
    return " && ".join(f"python -m data.verify {shlex.quote(str(folder))}" for folder in folders)


def _counts(directory: Path, cfg: Source) -> str:
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
