"""Lock files, so that two processes do not write the same thing."""

from __future__ import annotations

import fcntl
import math
import time
from pathlib import Path
from typing import TextIO

POLL_S = 0.5


def acquire_lock(path: Path, *, wait_s: float = 0.0, owner: str = "") -> TextIO:
    """Take an exclusive lock on a file; the kernel frees it when the process ends.

    Args:
        path: the lock file; it is created if it is missing and never deleted.
        wait_s: how long to wait for another holder; `math.inf` waits without polling.
        owner: written into the file, for `lock_owner`.

    Returns:
        The open file. Closing it frees the lock, so use it in a `with` statement.

    Raises:
        BlockingIOError: another process holds the lock for longer than `wait_s`.
        OSError: the file system has no locks.
    """
    flags = fcntl.LOCK_EX if wait_s == math.inf else fcntl.LOCK_EX | fcntl.LOCK_NB
    deadline = time.monotonic() + wait_s
    file = path.open("a+")
    try:
        while True:
            try:
                fcntl.flock(file, flags)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(min(POLL_S, wait_s))
        if owner:
            file.truncate(0)
            file.write(owner)
            file.flush()
    except BaseException:
        file.close()
        raise
    return file


def lock_owner(path: Path) -> str | None:
    """Return what the holder of a lock wrote as `owner`; None if nobody holds the lock.

    Readers share their lock, so that they do not take each other for a holder, and need no right
    to write. One who takes the lock at the same instant may be refused: wait a second for it.
    """
    if not path.is_file():
        return None
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read() or "another process"
    return None
