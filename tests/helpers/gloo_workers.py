"""Real processes that share a training, without Ray.

Connected by gloo, and forked off one that has loaded torch.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes


def run_workers(world: int, work: Callable[..., None], meeting: Path, *arguments: object) -> None:
    """Run `work(rank, *arguments)` on `world` processes to their end; what one raises is raised.

    `work` is a function of a module. `meeting` is a file that is not there yet, by which they
    find each other.
    """
    multiprocessing.set_forkserver_preload(
        ["amlp_ray.training.pretrain", "amlp_ray.data.prepare.pipeline", "pytest"]
    )
    start_processes(
        _worker, (world, work, meeting, arguments), nprocs=world, start_method="forkserver"
    )


def _worker(
    rank: int, world: int, work: Callable[..., None], meeting: Path, arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=limit
    )
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()
