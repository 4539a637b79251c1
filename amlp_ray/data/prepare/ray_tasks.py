"""Running many small jobs in a Ray Data pipeline, with results as they come."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MAX_TASKS = 512

RunSpec = dict[str, Any]


def run_jobs(
    jobs: Sequence[tuple[int, RunSpec]], work: Callable[[RunSpec], Any], *, per_task: int = 1
) -> Iterator[tuple[int, Any]]:
    """Run `work` on every numbered job on the cluster; yield (number, result) in the order they end.

    Uses Ray as it is initialised, or lets Ray Data start a local one. Jobs and results travel as JSON: lists of any
    length and big numbers survive, which Arrow's guessed types would not all allow.
    """
    if not jobs:
        return
    import ray.data

    from amlp_ray.data.ray_silence import silence_ray_data

    silence_ray_data()
    rows = [{"number": number, "job": json.dumps(run_spec)} for number, run_spec in jobs]
    tasks = min(MAX_TASKS, math.ceil(len(rows) / per_task))
    dataset = ray.data.from_items(rows, override_num_blocks=tasks).map(
        _run_row, fn_kwargs={"work": work}
    )
    for row in dataset.iter_rows():
        yield row["number"], json.loads(row["result"])


def _run_row(row: dict[str, Any], work: Callable[[RunSpec], Any]) -> dict[str, Any]:
    return {"number": row["number"], "result": json.dumps(work(json.loads(row["job"])))}
