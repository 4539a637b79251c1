"""Specification of one pretraining run; imports neither torch nor Ray."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from amlp_ray.config import (
    FaultToleranceConfig,
    PretrainConfig,
    ProbeConfig,
    ResourceConfig,
    TrackingConfig,
)


class RunSpec(BaseModel):
    """Describe one pretraining run by plain values, so that it travels to other processes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: PretrainConfig
    data: str  # path or URI of the patch dataset to train on
    folder: Path  # where the run writes its files
    probe: ProbeConfig | None = None  # None: the encoder is not scored
    rungs: tuple[int, ...] = ()  # epochs after which the probe scores the encoder
    resources: ResourceConfig = Field(default_factory=ResourceConfig)
    fault_tolerance: FaultToleranceConfig = Field(default_factory=FaultToleranceConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    study: str = ""  # its name, for metrics and logs
    label: str = ""  # name of the run within the study, for metrics and logs
    eval_data: str | None = None  # another dataset, whose labeled images are scored and shown
    until: int | None = None  # epoch after which a part of a longer run returns
    fork: Path | None = None  # folder of the run whose checkpoint this one starts from

    @property
    def gpus(self) -> float:
        """GPUs that all workers hold together."""
        return self.resources.gpus_per_worker * self.resources.max_workers

    @property
    def last_epoch(self) -> int:
        """Epoch after which the run returns."""
        return self.config.epochs if self.until is None else self.until
