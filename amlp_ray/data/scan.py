"""Pass 1 of preparing: look at every file once, and find all faults before anything is written.

Runs in Ray Data workers. A fault comes back as a sentence, since an exception would reach the user as Ray's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from amlp_ray.data.decode import THUMBNAIL, is_grey, read_image, read_mask, thumbnail
from amlp_ray.data.ray_data import quieten
from amlp_ray.data.sources import Item
from amlp_ray.errors import DataError

ROWS_PER_TASK = 16  # some 50 ms of decoding, ten times what a task costs
MAX_TASKS = 256


@dataclass(frozen=True)
class Scan:
    """What pass 1 learns of one image."""

    height: int
    width: int
    dtype: str
    grey: bool
    lesion: bool  # False as well where unlabelled
    digest: str  # SHA-256 of the image's and masks' files
    thumbnail: np.ndarray  # (48, 48) uint8


def scan(items: Sequence[Item]) -> list[Scan]:
    """Look at every item, in parallel; results in the order of `items`.

    Raises:
        DataError: files that cannot be used; the first is named, the others counted.
    """
    rows = run_jobs([asdict(item) for item in items], _scan_row, rows_per_task=ROWS_PER_TASK)
    faults = [row["fault"] for row in rows if row["fault"]]
    if faults:
        more = f" ({len(faults) - 1} more files have faults.)" if len(faults) > 1 else ""
        raise DataError(faults[0] + more)
    return [_scan_of(row) for row in rows]


def run_jobs(
    jobs: Sequence[dict[str, Any]], work: Callable[[dict[str, Any]], dict[str, Any]], *, rows_per_task: int
) -> list[dict[str, Any]]:
    """Run `work` on every job in a Ray Data pipeline; results in the order of `jobs`.

    Jobs travel as JSON: lists of any length and big numbers survive, which Arrow's guessed types would not all allow.
    """
    quieten()
    rows = [{"index": index, "job": json.dumps(job)} for index, job in enumerate(jobs)]
    tasks = min(MAX_TASKS, math.ceil(len(rows) / rows_per_task))
    dataset = ray.data.from_items(rows, override_num_blocks=tasks).map(_run_row, fn_kwargs={"work": work})
    results = sorted(dataset.iter_rows(), key=lambda row: row["index"])
    return [json.loads(row["result"]) for row in results]


def _run_row(row: dict[str, Any], work: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    return {"index": row["index"], "result": json.dumps(work(json.loads(row["job"])))}


def _scan_row(job: dict[str, Any]) -> dict[str, Any]:
    try:
        image = read_image(job["image"])
        mask = read_mask(job["masks"], image.shape[:2])
        digest = hashlib.sha256()
        for path in (job["image"], *job["masks"]):
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    except DataError as error:
        return {"fault": str(error)}
    except OSError as error:
        return {"fault": f"{job['image']} cannot be read ({error.strerror}); check that every node sees it."}
    return {
        "fault": "",
        "height": image.shape[0],
        "width": image.shape[1],
        "dtype": image.dtype.name,
        "grey": is_grey(image),
        "lesion": bool(mask.any()),
        "digest": digest.hexdigest(),
        "thumbnail": thumbnail(image).tobytes().hex(),
    }


def _scan_of(row: dict[str, Any]) -> Scan:
    del row["fault"]
    pixels = np.frombuffer(bytes.fromhex(row.pop("thumbnail")), np.uint8)
    return Scan(thumbnail=pixels.reshape(THUMBNAIL, THUMBNAIL), **row)
