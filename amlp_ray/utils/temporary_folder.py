"""Temporary folders that are removed at the end, or by a later run if the process was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from amlp_ray.utils.locks import acquire_lock

PREFIX = "amlp-ray-run-"
LOCK = "owner.lock"
# A younger folder may be one whose owner has not taken its lock yet.
MIN_AGE_S = 60.0


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new temporary folder, and first remove those of processes that were killed.

    Its owner holds a lock in it, which the kernel frees when the process dies, however it dies, and
    also where processes do not see each other, as in containers.
    """
    parent = Path(tempfile.gettempdir())
    remove_abandoned(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with acquire_lock(folder / LOCK):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path) -> list[Path]:
    """Remove the temporary folders of this user whose owner is dead, and return them.

    A folder is left alone if anything about it is in doubt.
    """
    removed = []
    for folder in parent.glob(f"{PREFIX}*"):
        # Another user's folder, or one that another process removes at the same time.
        with suppress(OSError):
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


def _is_abandoned(folder: Path) -> bool:
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid():
        return False
    lock = folder / LOCK
    if not lock.is_file() or time.time() - lock.stat().st_mtime < MIN_AGE_S:
        return False
    try:
        acquire_lock(lock).close()
    except BlockingIOError:
        return False
    return True
