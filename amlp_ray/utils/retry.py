"""What a run does while its folder is full or away: it says so, and tries again for some minutes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from amlp_ray.config import FaultToleranceConfig
from amlp_ray.errors import StorageError
from amlp_ray.utils.event_log import EventLog
from amlp_ray.utils.files import retry

T = TypeVar("T")


class RetryPolicy:
    """Writes for the run in `folder`: called with some work, it does that until it is done or patience has run out."""

    def __init__(
        self, folder: Path, fault_tolerance: FaultToleranceConfig, trouble: Callable[[str], None]
    ) -> None:
        """`trouble` is told, in a sentence, of a disk that does not take something."""
        self.folder, self.fault_tolerance, self.trouble = folder, fault_tolerance, trouble
        self._ended = threading.Event()

    @classmethod
    def of(
        cls, folder: Path, fault_tolerance: FaultToleranceConfig, events: EventLog
    ) -> RetryPolicy:
        """One that notes trouble as an event."""
        return cls(folder, fault_tolerance, lambda text: events.note("storage", text))

    def __call__(self, work: Callable[[], T], what: str) -> T:
        """Do `work`, which writes `what`, and return what it returns.

        Raises:
            StorageError: its disk did not take it for `fault_tolerance.storage_minutes`.
        """
        minutes = f"{self.fault_tolerance.storage_minutes:g} minutes"

        def told(error: OSError) -> None:
            self.trouble(
                f"{self.folder} does not take {what} ({error.strerror or error}); trying again for {minutes}."
            )

        try:
            return retry(work, 60 * self.fault_tolerance.storage_minutes, told, self._ended)
        except OSError as error:
            raise StorageError(
                f"{self.folder} took nothing for {minutes}, {what} is not written ({error.strerror or error}); make "
                f"room and run again: it goes on from its latest checkpoint."
            ) from error

    def end(self) -> None:
        """Give up at once what is being tried again: the run has ended."""
        self._ended.set()
