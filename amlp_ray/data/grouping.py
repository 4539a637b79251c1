"""Which images belong together: near-copies found by their thumbnails, or a file that says so.

Splits never cut a group, since a copy of a training image in the test split would be scored from memory.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from amlp_ray.errors import DataError

SAME = 0.90  # correlation of thumbnails above which two images count as one; found by eye on breast ultrasound
CHUNK_VALUES = 1 << 24  # correlations held at a time, 64 MiB: all pairs of 100,000 images would be 40 GB


def near_duplicate_groups(ids: Sequence[str], thumbnails: np.ndarray, *, same: float = SAME) -> list[str]:
    """Name the group of each image: the first id among all that are linked by a chain of near-copies.

    Args:
        ids: N names, in the order that decides which is first.
        thumbnails: (N, H, W) or (N, values), any range.
        same: thumbnails that correlate above this are linked; flat ones are linked to nothing.
    """
    count = len(ids)
    values = thumbnails.reshape(count, -1).astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    np.divide(values, norm, out=values, where=norm > 1e-3)
    labels = np.arange(count)
    rows = max(1, CHUNK_VALUES // max(count, 1))
    for start in range(0, count, rows):
        linked = values[start : start + rows] @ values[start:].T > same
        above, below = np.nonzero(linked)
        # Merging after each chunk keeps memory bounded even where every image resembles every other.
        ends = np.concatenate([start + above, np.arange(count)]), np.concatenate([start + below, labels])
        graph = sparse.coo_matrix((np.ones(len(ends[0]), np.int8), ends), shape=(count, count))
        labels = _first_of_each(connected_components(graph, directed=False)[1])
    return [ids[label] for label in labels.tolist()]


def read_group_file(path: str | Path, ids: Sequence[str]) -> list[str]:
    """Read the group of each of `ids` from a CSV with columns id and group; other columns and ids are ignored.

    Raises:
        DataError: the file is missing or no such CSV, gives an id two groups, or leaves one of `ids` out.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no group file {path}; check the path.")
    groups: dict[str, str] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte-order mark
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not {"id", "group"} <= set(columns):
                raise DataError(
                    f"{path} has the columns {', '.join(columns) or 'none'}, but id and group are needed; rename them."
                )
            for row in reader:
                if not row["id"] or not row["group"]:
                    raise DataError(f"{path} line {reader.line_num} lacks an id or a group; complete it.")
                if groups.setdefault(row["id"], row["group"]) != row["group"]:
                    raise DataError(f"{path} gives {row['id']!r} two groups; keep one line for each id.")
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV text file ({error}); export it as CSV in UTF-8.") from None
    missing = [name for name in ids if name not in groups]
    if missing:
        raise DataError(
            f"{path} has no group for {len(missing)} of {len(ids)} images, such as {missing[0]!r}; add a line for each."
        )
    return [groups[name] for name in ids]


def _first_of_each(labels: np.ndarray) -> np.ndarray:
    """Replace component numbers by the position of the component's first member."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse]
