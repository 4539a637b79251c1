"""The journal file of a study, read past damaged lines and appended to whole or not at all."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from optuna.storages.journal import BaseJournalBackend

from amlp_ray.errors import StudyError
from amlp_ray.study.storage.journal_lines import (
    LINE,
    JournalReader,
    LineProblem,
    Log,
    decode,
    encode,
)
from amlp_ray.study.storage.optuna_internals import RUNNING_TRIAL_OPERATIONS
from amlp_ray.utils.files import open_regular
from amlp_ray.utils.json_files import JsonError
from amlp_ray.utils.locks import acquire_lock
from amlp_ray.utils.text import counted

LISTED = 5  # damaged lines that a message describes

logger = logging.getLogger(__name__)


class Journal(BaseJournalBackend):
    """Journal file for Optuna's `JournalStorage`.

    It is safe against writers that are killed or run out of disk in the middle of a line. Lines
    that cannot be used are skipped and named in a warning. They stay in the file: whoever has it
    open goes on reading where it was. Before something is appended, a damaged file is copied.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, which is created if it is missing."""
        self.path = path
        if not path.exists():
            path.open("ab").close()
        self._start_over()

    def _start_over(self) -> None:
        self.reader = JournalReader()
        self._position = 0  # after the last whole line that was read
        self._identity = (0, 0)  # device and inode of the file that was read
        self._first = 0  # number of `_logs[0]`
        self._logs: list[Log] = []

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """Return the logs from a number on; lines that were skipped have none.

        Raises:
            StudyError: the file is gone, was cut short since, or does not say which trial is which.
        """
        if log_number_from < self._first:
            self._start_over()
        try:
            with open_regular(self.path) as file:
                self._read_new_lines(file)
        except FileNotFoundError:
            raise self._gone() from None
        self._logs = self._logs[log_number_from - self._first :]
        self._first = log_number_from
        return list(self._logs)

    def _read_new_lines(self, file: BinaryIO | Any) -> bytes:
        """Read what was appended; return the last line if it has no end yet."""
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        if self._position and identity != self._identity:
            raise StudyError(
                f"{self.path} was replaced while it was in use; run the command again."
            )
        self._identity = identity
        if file.seek(0, os.SEEK_END) < self._position:
            raise StudyError(
                f"{self.path} was cut short while it was in use; run the command again."
            )
        file.seek(self._position)
        n_problems = len(self.reader.problems)
        tail = b""
        for line in file:
            if not line.endswith(b"\n"):
                tail = line
                break
            self._position += len(line)
            self._logs += self.reader.read(line)
        if len(self.reader.problems) > n_problems:
            _warn_once(_describe(self.path, self.reader.problems))
        if self.reader.disorder:
            raise StudyError(
                f"{self.path} is damaged so that trials cannot be told apart "
                f"({self.reader.disorder}); `amlp-ray study repair {self.path.parent.name}` "
                f"rebuilds it from the trial folders, and keeps a copy."
            )
        return tail

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append one line per log, whole or not at all.

        Logs of a trial that runs are not waited for until they are on the disk: it would hold up
        all other trials. If a power cut loses them it loses the trial's end too, so the next run
        resumes the trial and stores them again.
        """
        try:
            self._append(logs)
        except FileNotFoundError:
            raise self._gone() from None

    def _append(self, logs: list[dict[str, Any]]) -> None:
        with self.lock(), self.path.open("r+b", buffering=0) as file:
            with open_regular(self.path) as readable:
                tail = self._read_new_lines(readable)
            if self.reader.problems:
                self._keep_copy()
            end = self._end_last_line(file, tail)
            # Optuna appends one by one. Of several, each would need the numbers of those before.
            numbered = [self.reader.number(log) for log in logs] if len(logs) == 1 else logs
            first = self.reader.n_lines + self.reader.n_missing + 1
            lines = b"".join(encode(log | {LINE: n}) for n, log in enumerate(numbered, first))
            try:
                left = memoryview(lines)
                while left:
                    left = left[file.write(left) :]
                if any(log["op_code"] not in RUNNING_TRIAL_OPERATIONS for log in logs):
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, end)  # frees what the half-written lines take
                raise

    def _gone(self) -> StudyError:
        return StudyError(
            f"{self.path} is gone; `amlp-ray study repair {self.path.parent.name}` rebuilds it "
            f"from the trial folders."
        )

    def _end_last_line(self, file: Any, tail: bytes) -> int:
        """Deal with a line that a killed writer left without its end; return where to append.

        It is ended if it lacks nothing else, and cut off otherwise: a line after half a line would
        spoil both.
        """
        end = self._position
        file.seek(end)
        if tail and _is_whole(tail):
            file.seek(end + len(tail))
            if file.write(b"\n") != 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self._logs += self.reader.read(tail + b"\n")
            self._position = end = end + len(tail) + 1
        elif tail:
            if not tail.startswith(b'{"op_code":'):
                self._keep_copy()
            file.truncate(end)
        return end

    def _keep_copy(self) -> None:
        """Copy a damaged file once for each damage."""
        text = repr(self.reader.problems).encode()
        copy = self.path.with_name(f"{self.path.name}.damaged-{zlib.crc32(text):08x}")
        if not copy.exists():
            shutil.copyfile(self.path, copy)
            logger.warning("a copy of the damaged journal is kept as %s", copy)

    def lock(self) -> Any:
        """Lock the journal in a `with` statement.

        Optuna's own lock is a link that outlives its holder: after a kill all writers wait 30 s.
        """
        return acquire_lock(self.path.with_name(f".{self.path.name}.lock"), wait_s=math.inf)


def _is_whole(line: bytes) -> bool:
    try:
        decode(line)
    except JsonError:
        return False
    return True


def _describe(path: Path, problems: list[LineProblem]) -> str:
    described = [f"line {problem.number} {problem.reason}" for problem in problems[:LISTED]]
    more = f", and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    places = counted(len(problems), "damaged place")
    return (
        f"{path} has {places} ({'; '.join(described)}{more}), and what cannot be used is skipped; "
        f"`amlp-ray study repair {path.parent.name}` restores what was lost from the trial folders"
    )


@cache  # a study is read again and again
def _warn_once(message: str) -> None:
    logger.warning(message)
