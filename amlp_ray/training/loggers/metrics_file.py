"""`metrics.jsonl`: one line of figures per epoch, readable while it is written and after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amlp_ray.utils.files import append_line, atomic_write

Metrics = dict[str, Any]


def append_row(path: Path, metrics: Metrics) -> None:
    """Add an epoch's line."""
    append_line(path, json.dumps(metrics))


def read_rows(path: Path) -> list[Metrics]:
    """Read all whole lines; [] where there is no file. A line cut short by a kill is left out."""
    if not path.is_file():
        return []
    rows: list[Metrics] = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def drop_after(path: Path, epoch: int) -> tuple[list[Metrics], list[Metrics]]:
    """Drop the lines after `epoch`: these epochs are done again. Return the kept and the dropped ones."""
    rows = read_rows(path)
    kept, dropped = (
        [row for row in rows if (row["epoch"] <= epoch) == keep] for keep in (True, False)
    )
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept, dropped


def own_rows(rows: list[Metrics]) -> list[Metrics]:
    """Leave out the epochs that another run trained, before this one went on from its checkpoint.

    Their lines are there, marked `inherited`, so that a curve is whole; their seconds, epochs and scores are not this
    run's.
    """
    return [row for row in rows if not row.get("inherited")]


class NewRows:
    """Hands on the epochs that other processes add to a file, each once. Lines that are there already are old."""

    def __init__(self, path: Path, report: Callable[[Metrics], None]) -> None:
        rows = read_rows(path)
        self.epoch = rows[-1]["epoch"] if rows else 0  # the last that was handed on
        self._path, self._report, self._seen = path, report, 0

    def look(self) -> None:
        try:
            size = self._path.stat().st_size
            rows = own_rows(read_rows(self._path)) if size != self._seen else []
        except (
            OSError
        ):  # not there yet, or its disk is away: those who write wait, and so does the reader
            return
        self._seen = size
        for row in rows:
            if row["epoch"] > self.epoch:
                self._report(row)
                self.epoch = row["epoch"]
