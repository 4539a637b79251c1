"""Write and read `metrics.jsonl`: a row per epoch, readable at any time and after a kill."""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from amlp_ray.utils.files import append_line, atomic_write
from amlp_ray.utils.json_files import iter_json_lines, read_json_lines

Metrics = dict[str, Any]
FIELDS = {"epoch": int}  # that every row has
CHECKSUM = "crc32"  # key of the checksum of a row's other values

logger = logging.getLogger(__name__)


def append_row(path: Path, metrics: Metrics) -> None:
    """Append the row of an epoch."""
    append_line(path, _to_line(metrics))


def read_rows(path: Path) -> list[Metrics]:
    """Read all complete rows, without one that a kill cut short; [] if there is no file.

    Lines that cannot be used are skipped with a warning: what is no JSON, differs from its
    checksum, has a text where a number belongs, or repeats an epoch.
    """
    rows: dict[int, Metrics] = {}
    for row in read_json_lines(path, FIELDS):
        epoch = row["epoch"]
        if row.pop(CHECKSUM, None) not in (None, _checksum(row)):
            _warn_once(f"{path}: the row of epoch {epoch} is skipped: it was changed.")
            continue
        wrong = [name for name, value in row.items() if isinstance(value, str | list | dict)]
        if wrong:
            _warn_once(f"{path}: the row of epoch {epoch} is skipped: its {wrong[0]} is no number.")
        elif epoch in rows:
            _warn_once(f"{path}: epoch {epoch} has two rows; the first is used.")
        else:
            rows[epoch] = row
    _warn_of_gaps(path, list(rows))
    return list(rows.values())


def _warn_of_gaps(path: Path, epochs: list[int]) -> None:
    """Warn of rows that are gone: a run writes one for every epoch from 1, or only one for 0."""
    missing = sorted(set(range(1, max(epochs, default=0) + 1)) - set(epochs))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        _warn_once(f"{path}: the row of epoch {missing[0]}{more} is missing.")


def to_text(rows: Iterable[Metrics]) -> str:
    """Return rows as they stand in the file."""
    return "".join(_to_line(row) + "\n" for row in rows)


def _to_line(row: Metrics) -> str:
    return json.dumps(row | {CHECKSUM: _checksum(row)})


def _checksum(row: Metrics) -> str:
    return f"{zlib.crc32(json.dumps(row).encode()):08x}"


def drop_after(path: Path, epoch: int) -> tuple[list[Metrics], list[Metrics]]:
    """Drop the rows after `epoch`, whose epochs are repeated; return the others and the dropped.

    Of a file with damaged lines a copy is kept.
    """
    rows = read_rows(path)
    if len(list(iter_json_lines(path, FIELDS))) != len(rows):
        copy = path.with_name(f"{path.name}.damaged-{zlib.crc32(path.read_bytes()):08x}")
        shutil.copyfile(path, copy)
        _warn_once(f"{path} is written anew without its damaged lines; {copy} is the old one.")
    remaining = [row for row in rows if row["epoch"] <= epoch]
    dropped = [row for row in rows if row["epoch"] > epoch]
    atomic_write(path, to_text(remaining))
    return remaining, dropped


def own_rows(rows: list[Metrics]) -> list[Metrics]:
    """Leave out the epochs of the run that this one was forked from.

    Their rows are marked `inherited`, so that a curve is complete. Their seconds, epochs and scores
    are not this run's.
    """
    return [row for row in rows if not row.get("inherited")]


@cache  # rows are read again and again while a run is watched
def _warn_once(message: str) -> None:
    logger.warning(message)


class RowTail:
    """Reports each row that other processes append to a file, once.

    Rows that are in the file already are not reported.
    """

    def __init__(self, path: Path, report: Callable[[Metrics], None]) -> None:
        """Start after the last row.

        Args:
            path: of the metrics file.
            report: takes the metrics of an epoch.
        """
        rows = read_rows(path)
        self.epoch = rows[-1]["epoch"] if rows else 0  # the last that was reported
        self._path = path
        self._report = report
        self._size = 0

    def poll(self) -> None:
        """Report what is new; nothing while the file is missing or unreachable."""
        try:
            size = self._path.stat().st_size
            if size == self._size:
                return
            rows = own_rows(read_rows(self._path))
        except OSError:  # the writers wait for the disk, and so does the reader
            return
        self._size = size
        for row in rows:
            if row["epoch"] > self.epoch:
                self._report(row)
                self.epoch = row["epoch"]
