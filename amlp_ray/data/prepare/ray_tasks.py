"""Run many small jobs on Ray Data, and yield results as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

MAX_TASKS = 512

Job = dict[str, Any]
K = TypeVar("K", int, str)


def run_jobs(jobs: Mapping[K, Job], work: Callable[[Job], Any]) -> Iterator[tuple[K, Any]]:
    """Run `work` on every job; yield (key, result) in the order in which they end.

    Uses Ray as it is initialized, or lets Ray Data start a local one. Jobs and results travel as
    JSON, because Arrow's guessed types would not allow lists of any length and big numbers.
    """
    if not jobs:
        return
    import ray.data

    from amlp_ray.data.ray_silence import silence_ray_data

    silence_ray_data()
    rows = [{"key": key, "job": json.dumps(job)} for key, job in jobs.items()]
    tasks = min(MAX_TASKS, len(rows))
    dataset = ray.data.from_items(rows, override_num_blocks=tasks).map(
        _run_row, fn_kwargs={"work": work}
    )
    for row in dataset.iter_rows():
        yield row["key"], json.loads(row["result"])


def _run_row(row: dict[str, Any], work: Callable[[Job], Any]) -> dict[str, Any]:
    return {"key": row["key"], "result": json.dumps(work(json.loads(row["job"])))}
