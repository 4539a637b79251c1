"""JSON-lines log of run events: starts, worker losses, preemptions, storage errors.

`events.jsonl` has a line per event, so that losses and what they cost can be counted afterwards.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from amlp_ray.utils.files import append_line
from amlp_ray.utils.json_files import read_json_lines

EventKind = Literal[
    # with how many workers, after which epoch, and how many finished epochs are repeated
    "started",
    # which weights the encoder began with, and how they were adapted
    "weights",
    # a process was killed or died
    "worker lost",
    # a node was lost with all its workers
    "node lost",
    # a node announced that it will be taken away
    "preempted",
    # the error would come again, so the run ends
    "error in code",
    # the same
    "loss not finite",
    # the run's folder was full or unreachable
    "storage",
    # the checkpoint before it was taken
    "damaged checkpoint",
]
FILE = "events.jsonl"

logger = logging.getLogger(__name__)


class EventLog:
    """Records events of the run in `folder`, and logs those with a message as warnings.

    A line that the disk does not take is kept and written with the next one. The folder is not
    created here: if it is unreachable, a new one would hide its return.
    """

    def __init__(self, folder: Path, *, log_messages: bool = True) -> None:
        """Open the log of a run.

        Args:
            log_messages: False on workers, whose events another process logs with `EventTail`.
        """
        self.path = folder / FILE
        self.log_messages = log_messages
        self._unwritten: list[str] = []

    def record(self, kind: EventKind, message: str = "", **fields: Any) -> None:
        """Record an event.

        Args:
            kind: what happened.
            message: a sentence for users; empty if there is nothing to tell them.
            **fields: figures of this kind of event.
        """
        if message and self.log_messages:
            logger.warning(message)
        event = {"time": round(time.time(), 2), "event": kind, "text": message, **fields}
        self._unwritten.append(json.dumps(event))
        self.flush()

    def flush(self) -> None:
        """Write the events that the disk did not take before."""
        with suppress(OSError):
            while self._unwritten:
                append_line(self.path, self._unwritten[0])
                del self._unwritten[0]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Read all events of a run; [] if none was recorded."""
    return read_json_lines(folder / FILE, {"event": str, "text": str})


def count_events(folder: Path) -> Counter[str]:
    """Count the events of a run by kind."""
    return Counter(event["event"] for event in read_events(folder))


class EventTail:
    """Logs the events that other processes record, such as the workers of a run."""

    def __init__(self, folder: Path) -> None:
        """Start after the events that are in the file now."""
        self.folder = folder
        self._n_logged = len(read_events(folder))

    def log_new(self) -> None:
        """Log what was recorded since the last call; nothing while the folder is unreachable."""
        try:
            events = read_events(self.folder)
        except OSError:
            return
        for event in events[self._n_logged :]:
            if event["text"]:
                logger.warning(event["text"])
        self._n_logged = max(self._n_logged, len(events))
