"""Pass 2 of preparing: decode, resize and write every part, and sum up the statistics on the way.

Runs in Ray Data workers, one part each. A fault comes back as a sentence, as in pass 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amlp_ray.data.dataset import SPLITS, Part
from amlp_ray.data.decode import read_image, read_mask, resize_image, resize_mask, to_channels
from amlp_ray.data.parts import ROWS_PER_PART, write_part
from amlp_ray.data.scan import Scan, run_jobs
from amlp_ray.data.sources import Item
from amlp_ray.errors import DataError


@dataclass(frozen=True)
class Row:
    """All that is decided about one image before it is written."""

    item: Item
    scan: Scan
    group: str
    split: str


def write_rows(
    rows: Sequence[Row], folder: Path, size: int, channels: int, dtype: str
) -> tuple[dict[str, list[Part]], tuple[float, ...], tuple[float, ...]]:
    """Write all parts below `folder`; return them by split, with mean and SD per channel over the training split.

    Raises:
        DataError: a file changed since pass 1, or `folder` cannot be written or is not shared between nodes.
    """
    names, jobs = [], []
    for split in SPLITS:
        members = [row for row in rows if row.split == split]
        for number, start in enumerate(range(0, len(members), ROWS_PER_PART)):
            names.append((split, f"{split}/part-{number:05d}.parquet"))
            images = [_described(row) for row in members[start : start + ROWS_PER_PART]]
            jobs.append(
                {"path": str(folder / names[-1][1]), "shape": [channels, size, size], "dtype": dtype, "images": images}
            )
    folder.mkdir(parents=True)
    results = run_jobs(jobs, _write_job, rows_per_task=1)
    faults = [result["fault"] for result in results if result["fault"]]
    if faults:
        raise DataError(faults[0])
    parts: dict[str, list[Part]] = {split: [] for split in SPLITS}
    sums = np.zeros((2, channels), dtype=object)  # Python integers: exact, whatever the order of parts
    for (split, name), job, result in zip(names, jobs, results, strict=True):
        file = folder / name
        if not file.is_file():
            raise DataError(f"{file} was written by another node and is not visible here; choose a shared folder.")
        parts[split].append(Part(file=name, rows=len(job["images"]), bytes=file.stat().st_size))
        if split == "train":
            sums += np.array(result["sums"], dtype=object)
    return parts, *_moments(sums, size * size * sum(part.rows for part in parts["train"]))


def _moments(sums: np.ndarray, pixels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Turn sums of values and of squares (2, C) into mean and SD; a flat channel gets SD 1, to become 0 and not NaN."""
    mean = [total / pixels for total in sums[0]]
    variance = [(pixels * square - total * total) / pixels**2 for total, square in sums.T]
    return tuple(mean), tuple(value**0.5 or 1.0 for value in variance)


def _described(row: Row) -> dict[str, Any]:
    item, found = row.item, row.scan
    return {
        "id": item.id,
        "group": row.group,
        "image": item.image,
        "masks": item.masks,
        "height": found.height,
        "width": found.width,
        "source": item.source,
    }


def _write_job(job: dict[str, Any]) -> dict[str, Any]:
    """Write one part, in a worker. A fault comes back as a sentence."""
    shape = tuple(job["shape"])
    sums = np.zeros((2, shape[0]), dtype=object)
    try:
        write_part(Path(job["path"]), _encoded(job["images"], shape, sums), shape, job["dtype"])
    except DataError as error:
        return {"fault": str(error)}
    except OSError as error:
        return {"fault": f"{job['path']} cannot be written ({error.strerror or error}); check space and rights."}
    return {"fault": "", "sums": sums.tolist()}


def _encoded(images: list[dict[str, Any]], shape: tuple[int, int, int], sums: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yield the columns of each image, and add its values and squares to `sums` (2, C)."""
    channels, size, _ = shape
    for given in images:
        image = read_image(given["image"])
        mask = read_mask(given["masks"], image.shape[:2]) if given["masks"] else None
        stored = resize_image(to_channels(image, channels), size).transpose(2, 0, 1)
        wide = stored.reshape(channels, -1).astype(np.uint64)
        sums += np.array([wide.sum(axis=1).tolist(), (wide * wide).sum(axis=1).tolist()], dtype=object)
        yield {
            **{name: given[name] for name in ("id", "group", "height", "width", "source")},
            "image": stored.astype(stored.dtype.newbyteorder("<"), copy=False).tobytes(),
            "mask": None if mask is None else resize_mask(mask, size).tobytes(),
        }
