"""What Ray Train starts on each worker of a group.

Ray Train's controller loads this module too, and has no use for torch models: so the work comes as bytes, which only
workers unpack, and nothing heavy is imported here. That spares seconds at each start.
"""

from __future__ import annotations

from typing import Any


def run_member(config: dict[str, Any]) -> None:
    """Do `config["work"]`, a pickled callable, given this worker's rank, the number of all, and its device."""
    from ray import cloudpickle, train
    from ray.train.torch import get_device

    context = train.get_context()
    work = cloudpickle.loads(config["work"])
    work(context.get_world_rank(), context.get_world_size(), str(get_device()))
