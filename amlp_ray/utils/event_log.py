"""`events.jsonl`: what befell a run, a line each, so that what was lost and what it cost can be counted afterwards."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from amlp_ray.utils.files import append_line

Kind = Literal[
    "started",  # with how many workers, after which epoch, and how many ended epochs are done again
    "weights",  # what the encoder began with, and how it was adapted
    "worker lost",  # a process was killed or died
    "node lost",  # with all its workers
    "preempted",  # a node said that it will be taken away
    "error in code",  # would come again, so the run ends
    "loss not finite",  # the same
    "storage",  # the run's folder was full or away
    "damaged checkpoint",  # the one before was taken
]  # fmt: skip

logger = logging.getLogger("amlp_ray")


class EventLog:
    """Notes events of the run in `folder`, and says them as warnings. A line that its disk does not take is kept.

    The folder is not made here: one that is away would be in its own way when it comes back.
    """

    def __init__(self, folder: Path, *, aloud: bool = True) -> None:
        """`aloud`: false on workers and where `News` says what is noted."""
        self.path, self.aloud = folder / "events.jsonl", aloud
        self._waiting: list[str] = []

    def note(self, kind: Kind, text: str = "", **facts: Any) -> None:
        """Note an event; `text` is a sentence for people, empty where nothing need be said."""
        if text and self.aloud:
            logger.warning(text)
        self._waiting.append(
            json.dumps({"time": round(time.time(), 2), "event": kind, "text": text, **facts})
        )
        self.flush()

    def flush(self) -> None:
        """Write what the disk did not take before, as far as it does now."""
        with suppress(OSError):
            while self._waiting:
                append_line(self.path, self._waiting[0])
                del self._waiting[0]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All events of a run; [] where nothing was noted."""
    path = folder / "events.jsonl"
    if not path.is_file():
        return []
    events = []
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # cut short by a kill
            events.append(json.loads(line))
    return events


class EventTail:
    """Says what is noted by the workers of a run, from another process."""

    def __init__(self, folder: Path) -> None:
        """From now on."""
        self.folder, self.known = folder, len(read_events(folder))

    def say(self) -> None:
        """Say what has been noted since the last call; nothing while the folder is away."""
        try:
            events = read_events(self.folder)
        except OSError:
            return
        for event in events[self.known :]:
            if event["text"]:
                logger.warning(event["text"])
        self.known = max(self.known, len(events))


def count_events(folder: Path) -> Counter[str]:
    """How often each kind of event befell a run."""
    return Counter(event["event"] for event in read_events(folder))
