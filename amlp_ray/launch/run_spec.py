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
    """Describe one pretraining run by plain values, so that it travels to other processes.

    Args:
        data: path or URI of the patch dataset to train on.
        folder: where the run writes its files.
        probe: how the encoder is scored; None scores nothing.
        rungs: epochs after which the probe scores the encoder.
        study, label: names of the study and of the run within it, for metrics and logs.
        eval_data: another dataset whose labeled images are scored and shown instead.
        until: epoch after which a part of a longer run returns.
        fork: folder of the run whose checkpoint this one starts from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: PretrainConfig
    data: str
    folder: Path
    probe: ProbeConfig | None = None
    rungs: tuple[int, ...] = ()
    resources: ResourceConfig = Field(default_factory=ResourceConfig)
    fault_tolerance: FaultToleranceConfig = Field(default_factory=FaultToleranceConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    study: str = ""
    label: str = ""
    eval_data: str | None = None
    until: int | None = None
    fork: Path | None = None

    @property
    def threads(self) -> int:
        """CPU threads of each worker."""
        return max(1, int(self.resources.cpus_per_worker))

    @property
    def gpus(self) -> float:
        """GPUs that all workers hold together."""
        return self.resources.gpus_per_worker * self.resources.max_workers

    @property
    def last_epoch(self) -> int:
        """Epoch after which the run returns."""
        return self.config.epochs if self.until is None else self.until
