"""Pause a study while the disk of its trials is full or refuses them, for a bounded time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from amlp_ray.errors import StorageError
from amlp_ray.utils.files import atomic_write

FIRST_PAUSE_S = 15.0
LONGEST_PAUSE_S = 300.0
# Written to see whether the disk takes anything: more than the block in which a tiny file fits.
PROBE = bytes(1 << 20)
PROBE_FILE = ".space"

logger = logging.getLogger(__name__)


class StoragePause:
    """Whether trials wait because one could not write its folder.

    A pause ends when its time is over and the study's folder can be written. Pauses in a row, with
    no rung in between, grow. A checkpoint may not fit where the test file does.
    """

    def __init__(
        self, folder: Path, minutes: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Set up pauses.

        Args:
            folder: of the study.
            minutes: of all pauses in a row, after which `check` raises.
            clock: returns seconds.
        """
        self._folder = folder
        self._minutes = minutes
        self._clock = clock
        self._reason = ""
        self._length = FIRST_PAUSE_S
        self._next_probe = 0.0
        self._begun: float | None = None  # None while there is no pause
        self._paused = 0.0  # seconds of earlier pauses in a row

    def begin(self, reason: str) -> None:
        """Pause, because a trial could not write; `reason` is its message, with the path."""
        self._reason = reason.rstrip(".")
        if self._begun is not None:
            return  # one of several trials at the same time
        self._begun = self._clock()
        self._next_probe = self._begun + self._length
        logger.warning(
            "the study is paused: %s. It resumes when %s can be written, and ends after %g minutes",
            self._reason,
            self._folder,
            self._minutes,
        )

    def reset(self) -> None:
        """Count pauses anew: a trial has stored a rung."""
        if self._begun is None:
            self._length = FIRST_PAUSE_S
            self._paused = 0.0

    def is_on(self) -> bool:
        """Return whether trials wait; end the pause if its time is over and the disk takes data."""
        if self._begun is None:
            return False
        now = self._clock()
        if now < self._next_probe:
            return True
        if not self._is_writable():
            self._next_probe = now + FIRST_PAUSE_S
            return True
        self._paused += now - self._begun
        self._begun = None
        self._length = min(2 * self._length, LONGEST_PAUSE_S)
        logger.info("%s can be written again; the study resumes", self._folder)
        return False

    def check(self) -> None:
        """Raise StorageError if the pauses in a row have lasted too long."""
        if self._begun is None:
            return
        seconds = self._paused + self._clock() - self._begun
        if seconds > 60 * self._minutes:
            raise StorageError(
                f"{self._reason}. The study waited {self._minutes:g} minutes "
                f"(fault_tolerance.pause_minutes) for {self._folder} to take data; make room "
                f"there, and the same command resumes the study."
            )

    def _is_writable(self) -> bool:
        file = self._folder / PROBE_FILE
        try:
            atomic_write(file, PROBE)
            file.unlink()
        except OSError:
            return False
        return True
