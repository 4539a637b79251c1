"""What a preparation has done so far, kept inside the dataset's folder until it is whole, so that a killed one goes on.

.preparing/plan.json            what is being prepared; another preparation may not go on with it
.preparing/looked-00000.json    results of pass 1, some jobs in each
.preparing/train-00000.json     a part that is complete
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from amlp_ray.data.manifest import MANIFEST, SPLITS, UNFINISHED
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError
from amlp_ray.utils.locks import acquire_lock
from amlp_ray.utils.run_dir import OtherRunError, RunDir

FLUSH_JOBS = 32  # results of pass 1 written at a time: a killed run looks again at what came after


class ResumableError(DataError):
    """What was done so far is good: the same command goes on once the cause is gone."""


class Unfinished:
    """The state of one preparation of `out`, as files."""

    def __init__(self, out: DataPath, key: str) -> None:
        self.out, self.key = out, key
        self.place = out / UNFINISHED
        self._files = 0
        self._pending: dict[int, Any] = {}

    def begin(self) -> dict[int, Any]:
        """Start, or go on with what is there; return the results of pass 1 so far by job.

        Raises:
            DataError: the place holds an unfinished preparation of other files or settings.
        """
        run_dir = RunDir(self.place, "plan.json", write=DataPath.atomic_write)
        try:
            is_resumed = run_dir.claim({"key": self.key})
        except OtherRunError:
            raise DataError(
                f"{self.out} holds an unfinished dataset of other files or settings; delete it or "
                f"choose another folder."
            ) from None
        if not is_resumed:
            return {}
        looked: dict[int, Any] = {}
        for name in sorted(
            entry.name for entry in self.place.entries() if entry.name.startswith("looked-")
        ):
            looked |= {int(number): result for number, result in _read(self.place / name).items()}
            self._files = int(name[7:12]) + 1
        return looked

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second preparation of the same folder out, on this machine. Raises DataError where one is running."""
        if not self.out.is_local:
            yield
            return
        self.place.local.mkdir(parents=True, exist_ok=True)
        try:
            lock = acquire_lock(self.place.local / ".lock")
        except BlockingIOError:
            raise DataError(
                f"{self.out} is being prepared by another process; wait for it or stop it."
            ) from None
        with lock:
            if (self.out / MANIFEST).is_file():  # it ended between our look and our lock
                self._clear()
                raise ResumableError(
                    f"{self.out} was finished by another process meanwhile; look at what it made."
                )
            yield

    def add_looked(self, number: int, result: Any) -> None:
        """Keep the result of a job of pass 1; written with some others, or by `flush`."""
        self._pending[number] = result
        if len(self._pending) >= FLUSH_JOBS:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            (self.place / f"looked-{self._files:05d}.json").atomic_write(json.dumps(self._pending))
            self._files, self._pending = self._files + 1, {}

    def part(self, name: str) -> dict[str, Any] | None:
        """What is known of a complete part; None where it has to be written."""
        note = self.place / f"{name}.json"
        if not note.is_file():
            return None
        known = _read(note)
        file = (self.out / known.get("file", "")).info()
        return known if file.size == known.get("bytes") else None

    def add_part(self, name: str, known: dict[str, Any]) -> None:
        (self.place / f"{name}.json").atomic_write(json.dumps(known))

    def discard(self) -> None:
        """Forget all, parts included: the files have changed or cannot be used. Nothing else is deleted."""
        for split in SPLITS:
            folder = self.out / split
            for entry in list(folder.entries(deep=False)) if folder.is_folder() else []:
                if entry.name.startswith("part-"):
                    (folder / entry.name).delete()
        self._clear()
        for folder in (*(self.out / split for split in SPLITS), self.out):
            if folder.is_empty():
                folder.delete()

    def finish(self) -> None:
        """Clear away all but the dataset."""
        self._clear()

    def _clear(self) -> None:
        self.place.delete()
        if self.out.is_local:
            for left in self.out.local.glob("*/.*.partial"):  # of a run that was killed
                left.unlink(missing_ok=True)


def _read(place: DataPath) -> dict[str, Any]:
    """JSON of a file; a file cut short, which only an object store can leave, holds nothing."""
    try:
        values = json.loads(place.read_bytes())
    except (ValueError, OSError):
        return {}
    return values if isinstance(values, dict) else {}
