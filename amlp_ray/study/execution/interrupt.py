"""End Tune's loop early: because of a request, an error, Ctrl-C or a scheduler's SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from ray.tune import Stopper

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptTune(Stopper):
    """Make Tune return after its current step, whatever still runs.

    Tune asks `stop_all` in every step of its loop. Trials that still run are killed.

    Attributes:
        is_requested: whether Tune should return.
    """

    def __init__(self) -> None:
        self.is_requested = False

    def request(self) -> None:
        """Ask Tune to return; callable from any thread."""
        self.is_requested = True

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never stop a single trial: it is asked by its stop flag."""
        return False

    def stop_all(self) -> bool:
        """Return whether Tune should return."""
        return self.is_requested


@contextmanager
def interrupt_on_signals(interrupt: InterruptTune) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM interrupt Tune; a second one acts as it did before.

    Signals that the process ignores, or that would end it at once, are left as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def handle(number: int, frame: FrameType | None) -> None:
        interrupt.request()
        _set_handlers(handlers)
        handler = handlers[signal.Signals(number)]
        # The command line takes note of which signal it was.
        with suppress(KeyboardInterrupt):
            if callable(handler):
                handler(number, frame)

    _set_handlers({number: handle for number, handler in handlers.items() if callable(handler)})
    try:
        yield
    finally:
        _set_handlers(handlers)


def _set_handlers(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
