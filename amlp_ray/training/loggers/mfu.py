"""How well a worker is used: model FLOPs utilisation, and the most memory it held."""

from __future__ import annotations

import torch

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.method.precision import autocast_type
from amlp_ray.training.loggers.flops import mfu, peak_flops, peak_memory, trained_flops
from amlp_ray.training.loggers.metrics_file import Metrics


class MfuMeter:
    """Measures one worker of a run; the first one's figures stand for all."""

    def __init__(self, config: PretrainConfig, spec: ImageSpec, device: str) -> None:
        self.config, self.spec, self.device = config, spec, device
        self.peak = peak_flops(device, autocast_type(config, device) or torch.float32)

    def of(self, metrics: Metrics) -> Metrics:
        """`mfu` (none where the device's peak is not known) and `memory` in GB, from an epoch's metrics."""
        flops = trained_flops(self.config, self.spec, metrics["ratio"])
        used = mfu(metrics["images_per_second_per_worker"], flops, self.peak)
        return {"mfu": used, "memory": round(peak_memory(self.device), 3)}
