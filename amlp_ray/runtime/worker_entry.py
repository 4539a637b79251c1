"""The function that Ray Train starts on each worker of a group.

Ray Train's controller imports this module too, and needs no torch. So nothing heavy is imported
here, and the task comes as bytes that only workers unpickle. That saves seconds at each start.
"""

from __future__ import annotations

from typing import Any

from amlp_ray.runtime.worker_context import WorkerContext, WorkerTask


def run_worker(config: dict[str, Any]) -> None:
    """Unpickle `config["task"]` and call it with this worker's context."""
    from ray import cloudpickle, train
    from ray.train.torch import get_device

    context = train.get_context()
    task: WorkerTask = cloudpickle.loads(config["task"])
    worker = WorkerContext(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=str(get_device()),
    )
    task(worker)
