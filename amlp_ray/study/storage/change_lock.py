"""Lock a study's folder while the study is changed, so that changes of several processes add up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from amlp_ray.errors import StudyError
from amlp_ray.study.storage.lease import here
from amlp_ray.utils.locks import acquire_lock, lock_owner

LOCK_FILE = "change.lock"
# A change takes milliseconds, an import or another space with thousands of trials a minute.
WAIT_S = 300.0


class BusyStudyError(StudyError):
    """Another process changes the study for longer than was waited."""


class ChangeLock:
    """A lock that one thread of one process holds at a time, as often as it needs to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads = threading.RLock()
        self._depth = 0
        self._file: TextIO | None = None

    @property
    def is_held(self) -> bool:
        """Return whether a thread of this process holds the lock."""
        return self._depth > 0

    @contextmanager
    def hold(self, wait_s: float = WAIT_S) -> Iterator[None]:
        """Hold the lock; the kernel frees it when the process dies, however it dies.

        Raises:
            BusyStudyError: others hold it for longer than `wait_s`.
            StudyError: there is no such folder, or it cannot be written.
        """
        if not self._threads.acquire(timeout=max(wait_s, 0.0)):
            raise self._busy()
        try:
            if self._depth == 0:
                self._file = self._acquire(wait_s)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0 and self._file is not None:
                    self._file.close()
        finally:
            self._threads.release()

    def _acquire(self, wait_s: float) -> TextIO:
        try:
            return acquire_lock(self._folder / LOCK_FILE, wait_s=wait_s, owner=here())
        except BlockingIOError:
            raise self._busy() from None
        except FileNotFoundError:
            raise StudyError(
                f"There is no folder {self._folder}; its study was deleted or moved meanwhile."
            ) from None
        except OSError as error:
            raise StudyError(
                f"{self._folder} cannot be changed ({error.strerror}): it must be writable and its "
                f"file system have locks (Lustre: flock)."
            ) from None

    def _busy(self) -> BusyStudyError:
        holder = lock_owner(self._folder / LOCK_FILE) or "another thread"
        return BusyStudyError(
            f"The study in {self._folder} is being changed by {holder}; try again when it is done."
        )
