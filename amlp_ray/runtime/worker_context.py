"""Rank, world size and device of one worker of a group.

Nothing heavy is imported here, since Ray Train's controller imports it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerContext:
    """One worker of a group of `world`, and the device that it computes on."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """Whether this worker writes the run's files."""
        return self.rank == 0


WorkerTask = Callable[[WorkerContext], None]  # picklable; called on each worker
SINGLE_WORKER = WorkerContext()
