"""Check everything in a folder of tokens: sizes, checksums, the range of the tokens, the fingerprint.

    python -m data.verify <folder>                      a prepared folder, or the .bin files of nanoGPT or the speedruns
    python -m data.verify <folder> vocab_size=65        .bin files of another vocabulary than GPT-2's

Prints one line for each file, with the cause where it is damaged. The exit code is 1 if anything is, and 2 if there is nothing to check.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data.bin import bin_of, layout
from data.shards import MANIFEST, DataError, hash_file, read_manifest, size_problem

Finding = tuple[str, str, str]
"""A file, what was found, and what is wrong with it ("" if nothing is)."""


def verify(folder: Path, vocab_size: int | None = None) -> Iterator[Finding]:
    """Check every file of a folder; reads all tokens. `vocab_size` is that of .bin files without a manifest; None for GPT-2's.

    Raises:
        DataError: the folder holds no tokens, or its manifest is damaged, or tells the vocabulary beside `vocab_size`.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; name one that was prepared, or one of .bin files")
    if vocab_size is not None and (folder / MANIFEST).exists():
        raise DataError(f"vocab_size={vocab_size} is for .bin files; {folder} has its own in {MANIFEST}: leave it out")
    return _prepared(folder) if (folder / MANIFEST).exists() else _bin(folder, vocab_size)


def _prepared(folder: Path) -> Iterator[Finding]:
    manifest = read_manifest(folder)
    known = {MANIFEST}
    for shard in (shard for info in manifest.splits.values() for shard in info.shards):
        known.add(shard.file)
        wrong = size_problem(folder / shard.file, shard)
        if not wrong:
            digest, largest = hash_file(folder / shard.file)
            if digest != shard.sha256:
                wrong = "altered: its SHA-256 is not the recorded one"
            elif largest >= manifest.vocab_size:
                wrong = f"outside the vocabulary: it holds token {largest}, and the vocabulary is {manifest.vocab_size}"
        yield shard.file, f"{shard.tokens:,} tokens", wrong
    for path in sorted(folder.glob("*.bin")):
        if path.name not in known:
            yield path.name, "", f"not in {MANIFEST}"
    yield MANIFEST, f"fingerprint {manifest.fingerprint}", ""


def _bin(folder: Path, vocab_size: int | None) -> Iterator[Finding]:
    cfg = bin_of(folder, **({"vocab_size": vocab_size} if vocab_size else {}))
    paths = sorted({path for pattern in (*cfg.train, *cfg.val) for path in folder.glob(pattern)})
    if not paths:
        raise DataError(f"{folder} has neither a {MANIFEST} nor files such as train.bin; name another folder")
    most, sound = cfg.vocab_size, True
    for path in paths:
        found = wrong = ""
        try:
            header, tokens = layout(path)
            found = f"{tokens:,} tokens{', header' if header else ''}"
            largest = hash_file(path, skip=header)[1]
            if largest >= most:
                wrong = f"outside the vocabulary: it holds token {largest}, and the vocabulary is {most}"
        except DataError as error:
            wrong = str(error)
        sound = sound and not wrong
        yield path.name, found, wrong
    if sound:  # what concerns several files
        try:
            yield "", f"fingerprint {cfg.open().fingerprint}", ""
        except DataError as error:
            yield "", "", str(error)


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = dict(word.split("=", 1) for word in words if "=" in word)
    folders = [word for word in words if "=" not in word]
    if {"-h", "--help"} & set(words):
        show(__doc__ or "")
        return 0
    vocabulary = options.pop("vocab_size", None)
    mistakes = [f"{key}= is no option; the only one is vocab_size=" for key in options]
    if len(folders) != 1:
        mistakes.append(f"name one folder instead of {len(folders)}, such as data/prepared/books")
    if vocabulary is not None and not (vocabulary.isdecimal() and int(vocabulary)):
        mistakes.append(f"vocab_size={vocabulary} is not a whole number above 0; give one, such as vocab_size=65")
    if mistakes:
        print("\n".join(mistakes), file=sys.stderr)
        return 2
    damaged = 0
    try:
        for file, found, wrong in verify(Path(folders[0]), int(vocabulary) if vocabulary else None):
            damaged += bool(wrong)
            show(
                "  ".join(filter(None, [f"{file:<26}", found, f"DAMAGED: {wrong}" if wrong else "ok" if file else ""]))
            )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(f"{folders[0]}: {_said(damaged)}")
    return 1 if damaged else 0


def _said(damaged: int) -> str:
    return f"{damaged} file{' is' if damaged == 1 else 's are'} damaged" if damaged else "everything is in order"


if __name__ == "__main__":
    sys.exit(main())
