"""Settings of where a run is computed and how many failures it survives. None changes a result."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    field_validator,
    model_validator,
)

from amlp_ray.config.base import Config, Count
from amlp_ray.errors import ConfigError


class ResourceConfig(Config):
    """What one run holds: a pretraining, a fine-tuning, a trial. One worker runs in its own
    process, several on Ray Train.

    The batch belongs to the run, whatever the number of workers: each takes its share of it,
    `micro_batch` images at a time.
    """

    workers: int | tuple[int, int] = 1
    """Number of workers; or [min, max] for a run outside a study, whose workers follow the nodes
    that join and leave."""
    cpus_per_worker: PositiveFloat = 1
    """CPUs of a worker, and its number of threads, rounded down."""
    gpus_per_worker: NonNegativeFloat = 0
    """GPUs of a worker. Below 1, trials share a GPU, each with that share of its memory."""
    memory_per_worker: PositiveFloat | None = None
    """GB of memory reserved on a node for each worker. null: not counted."""
    accelerator: str | None = None
    """Type of GPU, by Ray's name, such as A100 or H100. null: any."""
    placement: Literal["pack", "spread", "strict-pack", "strict-spread"] = "pack"
    """Several workers. pack: on few nodes, for the fastest communication. spread: on many, for
    their memory and disks. strict-pack: on one node or not at all. strict-spread: each on its own
    node."""
    micro_batch: Count | None = None
    """Images that a worker processes at once. null: its whole share of a batch."""
    sharding: Literal["auto", "ddp", "fsdp"] = "auto"
    """Several workers. ddp: each holds the model. fsdp: its blocks are sharded among them (FSDP2),
    which pays where a model with its optimizer state is large compared with a GPU's memory. auto:
    fsdp from ViT-L on, on GPUs."""
    concurrency: Count | None = None
    """Trials that run at the same time. null: as many as the cluster holds."""
    wait_minutes: PositiveFloat = 10
    """Minutes to wait for resources that others hold, before it gives up."""

    @field_validator("workers")
    @classmethod
    def _check_workers(cls, workers: Any) -> Any:
        low, high = workers if isinstance(workers, tuple) else (workers, workers)
        if not 1 <= low <= high:
            shown = f"{low}-{high}" if isinstance(workers, tuple) else workers
            raise ValueError(
                f"a number from 1 on, or the least and the most, such as 2-8 ([2, 8] in a file), "
                f"not {shown}"
            )
        return workers

    @model_validator(mode="after")
    def _check_gpus(self) -> ResourceConfig:
        if self.accelerator is not None and not self.gpus_per_worker:
            raise ValueError(
                f"accelerator {self.accelerator} is a kind of GPU; set gpus_per_worker too"
            )
        if self.gpus_per_worker % 1 and self.max_workers > 1:
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g} is for one worker; several cannot share "
                f"a GPU: give each 1"
            )
        return self

    @property
    def threads(self) -> int:
        """CPU threads of each worker."""
        return max(1, int(self.cpus_per_worker))

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers follows the nodes."""
        return isinstance(self.workers, tuple)

    @property
    def min_workers(self) -> int:
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def max_workers(self) -> int:
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    def check_batch_size(self, batch_size: int) -> None:
        """Raise ConfigError if the workers cannot share a batch."""
        if batch_size < self.max_workers:
            raise ConfigError(
                f"batch_size {batch_size} is less than resources.workers {self.max_workers}; "
                f"raise it, or use fewer workers."
            )

    @property
    def is_single_worker(self) -> bool:
        """Whether it runs in one process, without Ray Train."""
        return self.workers == 1


class FaultToleranceConfig(Config):
    """How many failures a run survives."""

    max_failures: NonNegativeInt = 3
    """Losses of a process or node, after each of which the run resumes from its checkpoint. A study
    counts all losses of a trial's process. A run outside a study, and the workers of a trial, count
    losses in a row, without a complete epoch in between. Errors in the code and non-finite losses
    would occur again, so they end it at once."""
    checkpoints: Count = 2
    """Checkpoints that a run keeps. If the newest is damaged, the one before is used."""
    storage_minutes: PositiveFloat = 10
    """Minutes that the run's folder or a database may be unreachable. It trains on meanwhile."""
