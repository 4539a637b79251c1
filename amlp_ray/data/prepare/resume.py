"""Store the state of a preparation until the dataset is complete, so that the next run resumes.

.preparing/plan.json            what is being prepared; no other preparation may resume it
.preparing/scanned-00000.json   results of pass 1, some jobs in each
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

FLUSH_JOBS = 32  # results of pass 1 in a file: a killed run repeats what was not written yet


class ResumableError(DataError):
    """What was done so far is good: the same command resumes once the cause is gone."""


class PreparationState:
    """State of one preparation, in files inside the dataset's folder."""

    def __init__(self, out: DataPath, key: str) -> None:
        """Describe the preparation of `out`; `key` is a hash of all that decides its result."""
        self.out = out
        self.key = key
        self.folder = out / UNFINISHED
        self._num_files = 0
        self._pending: dict[int, Any] = {}  # results of pass 1 that are not written yet

    def begin(self) -> dict[int, Any]:
        """Start or resume; return the results of pass 1 so far, by job.

        Raises:
            DataError: the folder holds an unfinished preparation of other files or settings.
        """
        run_dir = RunDir(self.folder, "plan.json", write=DataPath.atomic_write)
        try:
            is_resumed = run_dir.claim({"key": self.key})
        except OtherRunError:
            raise DataError(
                f"{self.out} holds an unfinished dataset of other files or settings; delete it or "
                f"choose another folder."
            ) from None
        if not is_resumed:
            return {}
        results: dict[int, Any] = {}
        for name in self.folder.names():
            if name.startswith("scanned-"):
                for number, result in _read(self.folder / name).items():
                    results[int(number)] = result
                self._num_files = int(name[len("scanned-") : -len(".json")]) + 1
        return results

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second preparation of the same folder out, on this machine.

        Raises:
            DataError: another one is running.
        """
        if not self.out.is_local:
            yield
            return
        self.folder.local.mkdir(parents=True, exist_ok=True)
        try:
            lock = acquire_lock(self.folder.local / ".lock")
        except BlockingIOError:
            raise DataError(
                f"{self.out} is being prepared by another process; wait for it or stop it."
            ) from None
        with lock:
            if (self.out / MANIFEST).is_file():  # it appeared before the lock was taken
                self.finish()
                raise ResumableError(
                    f"{self.out} was finished by another process meanwhile; look at what it made."
                )
            yield

    def add_scans(self, number: int, result: Any) -> None:
        """Store the result of a job of pass 1; it is written with some others, or by `flush`."""
        self._pending[number] = result
        if len(self._pending) >= FLUSH_JOBS:
            self.flush()

    def flush(self) -> None:
        """Write the results of pass 1 that are not written yet."""
        if self._pending:
            file = self.folder / f"scanned-{self._num_files:05d}.json"
            file.atomic_write(json.dumps(self._pending))
            self._num_files += 1
            self._pending = {}

    def part(self, name: str) -> dict[str, Any] | None:
        """Return what is stored about a complete part; None if it has to be written."""
        file = self.folder / f"{name}.json"
        if not file.is_file():
            return None
        values = _read(file)
        size = (self.out / values.get("file", "")).info().size
        return values if size == values.get("bytes") else None

    def add_part(self, name: str, values: dict[str, Any]) -> None:
        """Store that a part is complete."""
        (self.folder / f"{name}.json").atomic_write(json.dumps(values))

    def discard(self) -> None:
        """Delete the state and all parts: the files have changed or cannot be used."""
        folders = [self.out / split for split in SPLITS]
        for folder in folders:
            names = folder.names() if folder.is_folder() else []
            for name in names:
                if name.startswith("part-"):
                    (folder / name).delete()
        self.finish()
        for folder in (*folders, self.out):
            if folder.is_empty():
                folder.delete()

    def finish(self) -> None:
        """Delete the state; the dataset is complete."""
        self.folder.delete()
        if self.out.is_local:
            for partial in self.out.local.glob("*/.*.partial"):  # of a run that was killed
                partial.unlink(missing_ok=True)


def _read(file: DataPath) -> dict[str, Any]:
    """Read a JSON mapping; a file cut short, which an object store can leave, holds nothing."""
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, OSError):
        return {}
    return values if isinstance(values, dict) else {}
