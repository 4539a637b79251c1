"""Ray actor that holds the stop requests of running trials, and which trials have started."""

from __future__ import annotations

from typing import Literal

StopWhen = Literal["now", "rung"]


class StopFlags:
    """Stop requests that the searcher leaves and trials read.

    Tune would stop a trial by killing its process, and a killed process leaks the placement group
    of an inner Train run until the cluster is full. A trial that is asked returns by itself, with
    everything saved.
    """

    def __init__(self) -> None:
        self._requests: dict[str, StopWhen] = {}
        self._started: list[str] = []

    def request(self, folder: str, when: StopWhen) -> None:
        """Ask a trial to return.

        Args:
            folder: of the trial.
            when: `now` is after its current epoch, `rung` after its next rung.
        """
        self._requests[folder] = when

    def requested(self, folder: str) -> StopWhen | None:
        """Return when a trial was asked to return; None if it was not."""
        return self._requests.get(folder)

    def mark_started(self, folder: str) -> None:
        """Record that a trial has its resources and runs."""
        self._started.append(folder)

    def started_since(self, count: int) -> list[str]:
        """Return the folders of the trials that have started, without the first `count`."""
        return self._started[count:]
