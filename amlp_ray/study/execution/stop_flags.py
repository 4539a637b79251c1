"""Ray actor that holds the stop requests of running trials."""

from __future__ import annotations

from typing import Literal

When = Literal["now", "rung"]


class StopFlags:
    """Where the searcher leaves word that a trial should return; an actor of its own.

    Tune would end a trial by killing its process, and a killed process leaks the placement group of an inner Train run
    until the cluster is full. A trial that is asked returns by itself, with everything saved.
    """

    def __init__(self) -> None:
        self._asked: dict[str, When] = {}
        self._begun: set[str] = set()

    def ask(self, folder: str, when: When) -> None:
        """Ask the trial that writes into `folder` to return after this epoch (`now`) or its next rung."""
        self._asked[folder] = when

    def asked(self, folder: str) -> When | None:
        return self._asked.get(folder)

    def begin(self, folder: str) -> None:
        """A trial has what it needs and runs."""
        self._begun.add(folder)

    def waiting(self, folders: list[str]) -> list[str]:
        """Those that have not begun: the cluster has no room for them."""
        return [folder for folder in folders if folder not in self._begun]
