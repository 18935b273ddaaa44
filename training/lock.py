"""Only one process at a time writes into the directory of a run: it holds a lock on a file there.

The kernel releases the lock when the process ends, even if it is killed. The file names the process that holds the lock; `release`
removes the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

from training.validate import ConfigError

LOCK_FILE = ".lock"

TRIES = 1000  # to create the lock while others remove its directory
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems have no locks


class InUse(ConfigError):
    """Another process writes into the directory; the message names it and the remedy."""


class DirectoryLock:
    """A lock on `directory`, which is created if it does not exist; `release` releases it.

    With `new`, the directory must not exist: of several processes that try this, one succeeds.

    Raises:
        InUse: another process holds the lock; nothing in the directory was changed. FileExistsError: the directory is not new. OSError: it
        cannot be created or written to.
    """

    def __init__(self, directory: Path, new: bool = False) -> None:
        self.directory, self._path = directory, directory / LOCK_FILE
        self._made: list[Path] = []
        self._descriptor: int | None = None
        try:
            tries = 0
            while self._descriptor is None:
                tries += 1
                try:
                    self._try(new)
                except FileNotFoundError:  # a previous holder removes the file or the directory at the same moment
                    if tries == TRIES:
                        raise
            about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(about).encode(), 0)
        except BaseException:
            self.release()
            raise

    def _try(self, new: bool) -> None:
        """Try once to take the lock; without success if its previous holder removes the file at the same moment."""
        _make(self.directory, new, self._made)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, self.directory)
            if self._is(descriptor):
                self._descriptor = descriptor
        finally:
            if self._descriptor is None:
                os.close(descriptor)

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock, and remove directories that were created for it and are empty. A second call does nothing."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                if self._is(self._descriptor):
                    self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = None
        with contextlib.suppress(OSError):  # stops at the first that is not empty
            while self._made:
                self._made.pop().rmdir()

    def _is(self, descriptor: int) -> bool:
        """Whether the open file is still the one at the path of the lock file, which may have been replaced."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False


def _make(directory: Path, new: bool, made: list[Path]) -> None:
    """Create a directory and its parents; append those that were created to `made`."""
    for path in (*reversed(directory.parents), directory):
        try:
            if (new and path == directory) or not path.is_dir():
                path.mkdir()
                made.append(path)
        except FileExistsError:
            if new and path == directory:
                raise
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None


def _lock(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUse([_who(os.pread(descriptor, 4096, 0), directory)]) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        print(f"{directory} is on a file system without locks: do not start a second run in it", file=sys.stderr)


def _who(content: bytes, directory: Path) -> str:
    remedy = "or choose another directory for this one"
    try:
        about = json.loads(content)
        who = f"process {about['pid']} on {about['host']}, since {about['since']}"
        return f"{directory} is in use by {who}; wait until it ends, or stop it (kill {about['pid']}), {remedy}"
    except (ValueError, KeyError, TypeError):
        return f"{directory} is in use by another process; wait until it ends, {remedy}"
