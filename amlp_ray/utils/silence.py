"""Keep C libraries from printing: they write to the file descriptor of stderr, past Python."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Discard what is written to file descriptor 2.

    One thread at a time: two that swap the descriptor would lose it.
    """
    with _lock:
        try:
            saved = os.dup(2)
        except OSError:  # a process without stderr
            yield
            return
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.close(null)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
