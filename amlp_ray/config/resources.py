"""Settings of where a run is computed, and of what it bears. None of them changes what is learnt."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from amlp_ray.config.base import Config


class ResourceConfig(Config):
    """What one run holds: a pretraining, a fine-tuning, a trial. One worker runs in its own process, more on Ray Train.

    The batch is the run's, whatever the number of workers: each takes its share of it, `micro_batch` images at a time.
    """

    # a number, or [least, most] for a run outside a study, whose workers follow the nodes that join and leave
    workers: int | tuple[int, int] = 1
    cpus_per_worker: float = Field(1, gt=0)  # threads of a worker too, rounded down
    gpus_per_worker: float = Field(
        0, ge=0
    )  # below 1: trials share a GPU, each with that share of its memory
    memory_per_worker: float | None = Field(
        None, gt=0
    )  # GB that are set aside on a node; none: not counted
    accelerator: str | None = (
        None  # the kind of GPU, as Ray names it, such as A100 or H100; none: any
    )
    # of several workers. pack: on few nodes, for the fastest exchange; spread: on many, for their memory and disks;
    # strict-pack: on one node or not at all; strict-spread: each on a node of its own
    placement: Literal["pack", "spread", "strict-pack", "strict-spread"] = "pack"
    micro_batch: int | None = Field(
        None, ge=1
    )  # images that a worker holds at once; none: its whole share of a batch
    # of several workers. ddp: each holds the model; fsdp: its blocks are cut among them (FSDP2), which pays where a
    # model with its optimiser state is large beside a GPU's memory; auto: fsdp from ViT-L on, on GPUs
    sharding: Literal["auto", "ddp", "fsdp"] = "auto"
    concurrency: int | None = Field(
        None, ge=1
    )  # trials side by side; none: as many as the cluster holds
    wait_minutes: float = Field(10, gt=0)  # for resources that others hold, before it gives up

    @field_validator("workers")
    @classmethod
    def _check_workers(cls, given: Any) -> Any:
        least, most = given if isinstance(given, tuple) else (given, given)
        if not 1 <= least <= most:
            raise ValueError(
                f"a number from 1 on, or the least and the most, such as 2-8 ([2, 8] in a file), not "
                f"{f'{least}-{most}' if isinstance(given, tuple) else given}"
            )
        return given

    @model_validator(mode="after")
    def _check_gpus(self) -> ResourceConfig:
        if self.accelerator is not None and not self.gpus_per_worker:
            raise ValueError(
                f"accelerator {self.accelerator} is a kind of GPU; set gpus_per_worker too"
            )
        if self.gpus_per_worker % 1 and self.most_workers > 1:
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g} is for one worker; several cannot share a GPU: give each 1"
            )
        return self

    @property
    def elastic(self) -> bool:
        """Whether the number of workers follows the nodes."""
        return isinstance(self.workers, tuple)

    @property
    def least_workers(self) -> int:
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most_workers(self) -> int:
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @property
    def alone(self) -> bool:
        """Whether it runs in one process, without Ray Train."""
        return self.workers == 1


class FaultToleranceConfig(Config):
    """What a run bears before it gives up."""

    # of a run whose process or node was lost, with no epoch ended in between; it goes on from its checkpoint. Errors in
    # the code and losses that are not finite would come again, so they end it at once
    max_failures: int = Field(3, ge=0)
    checkpoints: int = Field(
        2, ge=1
    )  # kept of a run; the newest may be damaged, and then the one before is taken
    storage_minutes: float = Field(
        10, gt=0
    )  # that its folder or a database may be gone; it trains on meanwhile
