"""`metrics.jsonl`: one line of figures per epoch, readable while it is written and after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from amlp_ray.files import write_whole

Metrics = dict[str, Any]


def append_row(path: Path, metrics: Metrics) -> None:
    """Add an epoch's line."""
    with path.open("a") as file:
        file.write(json.dumps(metrics) + "\n")


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


def drop_after(path: Path, epoch: int) -> list[Metrics]:
    """Keep and return the lines up to `epoch`: later ones were written after the checkpoint and are done again."""
    kept = [row for row in read_rows(path) if row["epoch"] <= epoch]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def own_rows(rows: list[Metrics]) -> list[Metrics]:
    """Leave out the epochs that another run trained, before this one went on from its checkpoint.

    Their lines are there, marked `inherited`, so that a curve is whole; their seconds, epochs and scores are not this
    run's.
    """
    return [row for row in rows if not row.get("inherited")]
