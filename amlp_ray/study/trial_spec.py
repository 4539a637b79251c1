"""Specification of one trial: everything that its process is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from amlp_ray.config import (
    FaultSettings,
    PretrainSettings,
    ProbeSettings,
    ResourceSettings,
    SegmentSettings,
    TrackingSettings,
)


@dataclass(frozen=True)
class Task:
    """What a trial is told. `kind` is `search`, `arm` or `confirm`; `number` is Optuna's, within that kind."""

    study: str
    kind: str
    number: int
    label: str  # a short name: `trial 7`, `arm mae-0`, `confirm trial-7-2`
    folder: str
    data: str
    settings: PretrainSettings
    probe: ProbeSettings
    resources: ResourceSettings
    rungs: tuple[int, ...]
    labels: str | None = None  # where they are a data set apart
    until: int | None = None  # of a segment of population-based training: the epoch it ends after
    fork: str | None = None  # the folder whose checkpoint it begins with
    faults: FaultSettings = field(default_factory=FaultSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    finetune: SegmentSettings | None = None  # of a confirmation: the second protocol

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
    def from_config(cls, config: dict[str, Any]) -> Task:
        models = {
            name: config[name] and model.model_validate(config[name])
            for name, model in _MODELS.items()
        }
        return cls(**config | models | {"rungs": tuple(config["rungs"])})


_MODELS: dict[str, type[BaseModel]] = {
    "settings": PretrainSettings,
    "probe": ProbeSettings,
    "resources": ResourceSettings,
    "faults": FaultSettings,
    "tracking": TrackingSettings,
    "finetune": SegmentSettings,
}
