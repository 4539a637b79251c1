"""Run many small jobs on Ray Data, and yield results as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MAX_TASKS = 512

Job = dict[str, Any]


def run_jobs(
    jobs: Sequence[tuple[int, Job]], work: Callable[[Job], Any]
) -> Iterator[tuple[int, Any]]:
    """Run `work` on every numbered job; yield (number, result) in the order in which they end.

    Uses Ray as it is initialized, or lets Ray Data start a local one. Jobs and results travel as
    JSON, because Arrow's guessed types would not allow lists of any length and big numbers.
    """
    if not jobs:
        return
    import ray.data

    from amlp_ray.data.ray_silence import silence_ray_data

    silence_ray_data()
    rows = [{"number": number, "job": json.dumps(job)} for number, job in jobs]
    tasks = min(MAX_TASKS, len(rows))
    dataset = ray.data.from_items(rows, override_num_blocks=tasks).map(
        _run_row, fn_kwargs={"work": work}
    )
    for row in dataset.iter_rows():
        yield row["number"], json.loads(row["result"])


def _run_row(row: dict[str, Any], work: Callable[[Job], Any]) -> dict[str, Any]:
    result = work(json.loads(row["job"]))
    return {"number": row["number"], "result": json.dumps(result)}
