"""Writing files so that a reader, or a run after a kill, finds the old content or the new, never half of it."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

LONGEST_PAUSE_S = 15.0  # between tries on a disk that is full or away

T = TypeVar("T")


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace the content of `path` in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # a full disk needs the room
        raise


def append_line(path: Path, line: str) -> None:
    """Add a line, whole or not at all: what a full disk took of it is cut off again."""
    content = f"{line}\n".encode()
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            written = file.write(content)
            if written != len(content):
                raise OSError(f"{path}: only {written} of {len(content)} bytes were written")
        except OSError:
            file.truncate(size)
            raise


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON mapping; None where the file is missing, half-written or something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def retry(
    work: Callable[[], T],
    seconds: float,
    told: Callable[[OSError], None],
    ended: threading.Event | None = None,
) -> T:
    """Do `work` again and again while its disk is full or away, for `seconds`; then let its OSError through.

    Args:
        told: called with the first error, once.
        ended: set by another thread to have it give up at once.
    """
    ended = ended or threading.Event()
    deadline, pause, first = time.monotonic() + seconds, 0.5, True
    while True:
        try:
            return work()
        except OSError as error:
            if first:
                told(error)
                first = False
            if time.monotonic() + pause > deadline or ended.wait(pause):
                raise
        pause = min(2 * pause, LONGEST_PAUSE_S)
