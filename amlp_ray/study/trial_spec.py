"""Specification of one trial: everything that its process is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from amlp_ray.config import (
    FaultToleranceConfig,
    PretrainConfig,
    ProbeConfig,
    ResourceConfig,
    SegmentConfig,
    TrackingConfig,
)


@dataclass(frozen=True)
class TrialSpec:
    """What a trial is told. `kind` is `search`, `baseline` or `confirm`; `number` is Optuna's, within that kind."""

    study: str
    kind: str
    number: int
    label: str  # a short name: `trial 7`, `baseline mae-0`, `confirm trial-7-2`
    folder: str
    data: str
    config: PretrainConfig
    probe: ProbeConfig
    resources: ResourceConfig
    rungs: tuple[int, ...]
    eval_data: str | None = None  # where they are a data set apart
    until: int | None = None  # of a segment of population-based training: the epoch it ends after
    fork: str | None = None  # the folder whose checkpoint it begins with
    fault_tolerance: FaultToleranceConfig = field(default_factory=FaultToleranceConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    finetune: SegmentConfig | None = None  # of a confirmation: the second protocol

    @property
    def gpus(self) -> float:
        """GPUs that it holds in all."""
        return self.resources.gpus_per_worker * self.resources.most_workers

    def as_config(self) -> dict[str, Any]:
        """Plain values, which is what Tune shows and stores of a trial."""
        plain = {name: getattr(self, name) for name in _MODELS}
        return vars(self) | {
            name: value and value.model_dump(mode="json") for name, value in plain.items()
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TrialSpec:
        models = {
            name: config[name] and model.model_validate(config[name])
            for name, model in _MODELS.items()
        }
        return cls(**config | models | {"rungs": tuple(config["rungs"])})


_MODELS: dict[str, type[BaseModel]] = {
    "config": PretrainConfig,
    "probe": ProbeConfig,
    "resources": ResourceConfig,
    "fault_tolerance": FaultToleranceConfig,
    "tracking": TrackingConfig,
    "finetune": SegmentConfig,
}
