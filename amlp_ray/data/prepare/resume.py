"""Store the state of a preparation until the dataset is complete, so that the next run resumes.

.preparing/plan.json            what is being prepared; no other preparation may resume it
.preparing/scanned-00000.json   results of pass 1, some jobs in each
.preparing/train-00000.json     a part that is complete

Every file holds a digest of itself. What a damaged one told is made anew.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from amlp_ray.data.manifest import MANIFEST, SPLITS, UNFINISHED
from amlp_ray.data.parquet import footer_digest
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError
from amlp_ray.utils.json_files import JsonError, parse_json_mapping, seal_json, unseal
from amlp_ray.utils.locks import acquire_lock

PLAN = "plan.json"
SCANNED = re.compile(r"scanned-(\d+)\.json")
FLUSH_JOBS = 32  # results of pass 1 in a file: a killed run repeats what was not written yet


logger = logging.getLogger(__name__)


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
        file = self.folder / PLAN
        is_resumed = file.is_file()
        plan = _read(file, "the dataset is made anew") if is_resumed else None
        if is_resumed and plan is None:  # nobody knows what the rest belongs to
            self._delete_parts()
            for name in self.folder.names():
                (self.folder / name).delete()
        elif plan is not None and plan.get("key") != self.key:
            raise DataError(
                f"{self.out} holds an unfinished dataset of other files or settings; delete it or "
                f"choose another folder."
            )
        if plan is None:
            file.atomic_write(seal_json({"key": self.key}))
            return {}
        results: dict[int, Any] = {}
        for name in self.folder.names():
            if match := SCANNED.fullmatch(name):
                self._num_files = int(match[1]) + 1
                scanned = _read(self.folder / name, "its images are scanned again") or {}
                results |= {int(number): result for number, result in scanned.items()}
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
            scanned = {str(number): result for number, result in self._pending.items()}
            file.atomic_write(seal_json(scanned))
            self._num_files += 1
            self._pending = {}

    def part(self, name: str) -> dict[str, Any] | None:
        """Return what is stored about a complete part; None if it has to be written."""
        file = self.folder / f"{name}.json"
        if not file.is_file():
            return None
        values = _read(file, "its part is written again")
        if values is None:
            return None
        part = self.out / values["file"]
        if not part.is_file() or footer_digest(part) != values["footer"]:
            logger.warning("%s is damaged; it is written again.", part)
            return None
        return values

    def add_part(self, name: str, values: dict[str, Any]) -> None:
        """Store that a part is complete."""
        (self.folder / f"{name}.json").atomic_write(seal_json(values))

    def discard(self) -> None:
        """Delete the state and all parts: the files have changed or cannot be used."""
        self._delete_parts()
        self.finish()
        for folder in (*self._split_folders, self.out):
            if folder.is_empty():
                folder.delete()

    @property
    def _split_folders(self) -> list[DataPath]:
        return [self.out / split for split in SPLITS]

    def _delete_parts(self) -> None:
        for folder in self._split_folders:
            names = folder.names() if folder.is_folder() else []
            for name in names:
                if name.startswith("part-"):
                    (folder / name).delete()

    def finish(self) -> None:
        """Delete the state; the dataset is complete."""
        self.folder.delete()
        if self.out.is_local:
            for partial in self.out.local.glob("*/.*.partial"):  # of a run that was killed
                partial.unlink(missing_ok=True)


def _read(file: DataPath, consequence: str) -> dict[str, Any] | None:
    """Read a file of the state; None, with a warning, for a damaged one."""
    try:
        return unseal(parse_json_mapping(file.read_bytes()))
    except JsonError as error:
        logger.warning("%s %s; %s.", file, error, consequence)
    except OSError as error:
        logger.warning("%s cannot be read (%s); %s.", file, error.strerror or error, consequence)
    return None
