"""Lock files, so that two processes do not write the same thing."""

from __future__ import annotations

import fcntl
import math
import os
import time
from pathlib import Path
from typing import TextIO

FIRST_POLL_S = 0.005  # short, because most holders need milliseconds
LONGEST_POLL_S = 0.1


def acquire_lock(path: Path, *, wait_s: float = 0.0, owner: str = "") -> TextIO:
    """Take an exclusive lock on a file; the kernel frees it when the process ends.

    Args:
        path: the lock file; it is created if it is missing.
        wait_s: how long to wait for another holder; `math.inf` waits without polling.
        owner: written into the file, for `lock_owner`.

    Returns:
        The open file. Closing it frees the lock, so use it in a `with` statement.

    Raises:
        BlockingIOError: another process holds the lock for longer than `wait_s`.
        FileNotFoundError: there is no folder, or it was deleted while the lock was waited for.
        OSError: the file system has no locks, or the folder cannot be written.
    """
    deadline = time.monotonic() + wait_s
    while True:
        file = path.open("a+")
        try:
            _lock(file, wait_s, deadline)
            if not _is_at(file, path):  # a holder has deleted or moved it
                file.close()
                continue
            if owner:
                file.truncate(0)
                file.write(owner)
                file.flush()
        except BaseException:
            file.close()
            raise
        return file


def _lock(file: TextIO, wait_s: float, deadline: float) -> None:
    if wait_s == math.inf:
        fcntl.flock(file, fcntl.LOCK_EX)
        return
    pause = FIRST_POLL_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise
        time.sleep(min(pause, remaining))
        pause = min(2 * pause, LONGEST_POLL_S)


def _is_at(file: TextIO, path: Path) -> bool:
    """Return whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def lock_owner(path: Path) -> str | None:
    """Return what the holder of a lock wrote as `owner`; None if nobody holds the lock.

    Readers share their lock, so that they do not take each other for a holder, and need no right
    to write. One who takes the lock at the same instant may be refused: wait a second for it.
    """
    try:
        file = path.open()
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read() or "another process"
    return None
