"""Write the messages of a running study to its `events.log`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PACKAGE_LOGGER = "amlp_ray"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S"


class _EventsFile(logging.Handler):
    """Append every message with its time. A full disk loses it; only the storage waits."""

    def __init__(self, file: Path) -> None:
        super().__init__(logging.INFO)
        self._file = file
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", TIME_FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError), self._file.open("a") as file:
            file.write(f"{self.format(record)}\n")


@contextmanager
def log_events(folder: Path) -> Iterator[None]:
    """Write this package's messages to `events.log` of a study's folder.

    Without any logging handler, as in a notebook, they are also printed.
    """
    logger = logging.getLogger(PACKAGE_LOGGER)
    level = logger.level
    handlers: list[logging.Handler] = [_EventsFile(folder / "events.log")]
    if not logger.hasHandlers():
        handlers.append(logging.StreamHandler(sys.stdout))
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
        logger.setLevel(level)
