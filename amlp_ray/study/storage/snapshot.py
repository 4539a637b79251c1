"""A study store as it is at this moment, read in one go: for commands that look once, and at thousands of trials."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from amlp_ray.study.storage.study_store import StudyStore

RUNG = b'{"op_code":7,'  # how a line of a journal begins that stores an intermediate value


class StudySnapshot(StudyStore):
    """A store whose journal is read once and without intermediate values, which are more than half of its lines.

    What is stored later is not seen, and nothing must be written through it. A database is read as ever.
    """

    @classmethod
    def at(cls, store: StudyStore) -> StudySnapshot:
        return cls(store.folder, store.name)

    def storage(
        self, *, patience: float | None = None, notify: Callable[[str], None] = print
    ) -> BaseStorage:
        """The storage of all three studies, as it was when it was opened."""
        if self._storage is None and self._url is None:
            with in_haste():
                self._storage = JournalStorage(_Once(str(self.folder / "study.journal")))
        return super().storage()


class _Once(JournalFileBackend):
    """Gives a journal's lines at the first reading, and none later."""

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        if log_number_from:
            return
        with open(self._file_path, "rb") as file:  # noqa: PTH123 - the path is Optuna's, a text
            for line in file:
                if line.endswith(b"\n") and not line.startswith(
                    RUNG
                ):  # the last one may be half-written
                    yield json.loads(line)


@contextmanager
def in_haste() -> Iterator[None]:
    """Thousands of trials are read without the collector, which would look through all of them again and again."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
