"""Options that `pretrain` and `segment` share: what a run holds, and what it bears."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from amlp_ray.config import FaultToleranceConfig, ResourceConfig
from amlp_ray.config.base import build
from amlp_ray.errors import ConfigError

Workers = Annotated[
    str,
    typer.Option(
        help="Ray Train workers, such as 4; 2-8 follows nodes that come and go; 1: in this process."
    ),
]
CpusPerWorker = Annotated[
    float | None, typer.Option(help="None: all cores, shared by the workers.")
]
GpusPerWorker = Annotated[
    float, typer.Option(help="With several workers or --address; else a GPU it sees is taken.")
]
Accelerator = Annotated[
    str | None, typer.Option(help="Kind of GPU, as Ray names it: A100, H100, ...")
]
Placement = Annotated[
    str, typer.Option(help="Workers on nodes: pack, spread, strict-pack, strict-spread.")
]
MicroBatch = Annotated[
    int | None, typer.Option(help="Images a worker holds at once; gradients are added up.")
]
Retries = Annotated[
    int, typer.Option(help="Lost workers or nodes in a row, without an epoch in between, to bear.")
]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to run on, such as auto; none: this machine.")
]


def workers_of(text: str) -> int | list[int]:
    """Read `4` or `2-8`. Raises ConfigError for anything else."""
    parts = text.split("-")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise ConfigError(
            f"--workers {text!r} is neither a number, such as 4, nor a range, such as 2-8."
        )
    return int(parts[0]) if len(parts) == 1 else [int(part) for part in parts]


def resources_of(
    workers: str,
    cpus_per_worker: float | None,
    gpus_per_worker: float,
    *,
    accelerator: str | None = None,
    placement: str = "pack",
    micro_batch: int | None = None,
    sharding: str = "auto",
    address: str | None = None,
) -> ResourceConfig:
    """Settings from options; without `cpus_per_worker`, this machine's cores are shared by the workers."""
    number = workers_of(workers)
    if cpus_per_worker is None:
        cores, most = os.cpu_count() or 1, max(1, number if isinstance(number, int) else number[-1])
        # Below whole cores for a group: its controller needs a sliver too.
        cpus_per_worker = cores if most == 1 and address is None else 0.9 * cores / most
    given = {
        "workers": number,
        "cpus_per_worker": cpus_per_worker,
        "gpus_per_worker": gpus_per_worker,
        "accelerator": accelerator,
        "placement": placement,
        "micro_batch": micro_batch,
        "sharding": sharding,
    }
    return build(ResourceConfig, given, "options")


def fault_tolerance_from(max_failures: int) -> FaultToleranceConfig:
    return build(FaultToleranceConfig, {"max_failures": max_failures}, "options")
