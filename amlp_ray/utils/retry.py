"""Retry writes while the run directory is full or unreachable."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from amlp_ray.errors import StorageError
from amlp_ray.utils.event_log import EventLog

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0

# A disk that is full, read-only, broken or away; in contrast to a path that is wrong.
DISK_ERRORS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EIO,
        errno.ESTALE,
        errno.ENODEV,
        errno.ENXIO,
        errno.ENOTCONN,
        errno.EREMOTEIO,
        errno.EHOSTDOWN,
        errno.ETIMEDOUT,
        errno.EFBIG,
    }
)
# Either; of a file inside the run's folder it is the disk.
REFUSALS = frozenset({errno.EACCES, errno.EPERM})

T = TypeVar("T")


def storage_failure(error: BaseException, folder: Path) -> str | None:
    """Return a sentence with the path if a run failed because its folder could not be written.

    Args:
        error: what the run raised.
        folder: of the run.

    Returns:
        None if something else failed.
    """
    if isinstance(error, StorageError):
        return str(error)
    if not isinstance(error, OSError):
        return None
    file = None if error.filename is None else Path(str(error.filename))
    is_refused = error.errno in REFUSALS and file is not None and file.is_relative_to(folder)
    if error.errno not in DISK_ERRORS and not is_refused:
        return None
    return f"Cannot read or write {file or folder} ({error.strerror})."


class RetryPolicy:
    """Retries what writes into the folder of a run, for some minutes, with growing pauses."""

    def __init__(self, folder: Path, *, minutes: float, events: EventLog | None = None) -> None:
        """Set up retries.

        Args:
            minutes: how long a write is retried.
            events: where the first failure of a write is recorded; None: the log in `folder`.
        """
        self.folder = folder
        self.minutes = minutes
        self.events = EventLog(folder) if events is None else events
        self._cancelled = threading.Event()

    def run(self, write: Callable[[], T], what: str) -> T:
        """Call `write` until it raises no OSError, and return what it returns.

        Args:
            write: may be called again after a failure.
            what: names what is written, such as "the checkpoint of epoch 3".

        Raises:
            StorageError: it still failed after `minutes`, or after `cancel`.
        """

        def record(error: OSError) -> None:
            self.events.record(
                "storage",
                f"Cannot write {what} to {self.folder} ({error.strerror or error}); retrying for "
                f"{self.minutes:g} minutes.",
            )

        try:
            return retry(write, 60 * self.minutes, record, self._cancelled)
        except OSError as error:
            raise StorageError(
                f"Could not write {what} to {self.folder} for {self.minutes:g} minutes "
                f"({error.strerror or error}); make room and run again: the run resumes from its "
                f"latest checkpoint."
            ) from error

    def cancel(self) -> None:
        """Give up at once what is being retried: the run has ended."""
        self._cancelled.set()


def retry(
    write: Callable[[], T],
    seconds: float,
    on_first_error: Callable[[OSError], None],
    cancelled: threading.Event | None = None,
) -> T:
    """Call `write` until it raises no OSError, at most for `seconds`; then raise its last error.

    Args:
        on_first_error: called once, with the first error.
        cancelled: set by another thread to give up at once.
    """
    cancelled = cancelled or threading.Event()
    deadline = time.monotonic() + seconds
    pause = FIRST_PAUSE_S
    has_failed = False
    while True:
        try:
            return write()
        except OSError as error:
            if not has_failed:
                on_first_error(error)
                has_failed = True
            if time.monotonic() + pause > deadline or cancelled.wait(pause):
                raise
        pause = min(2 * pause, LONGEST_PAUSE_S)
