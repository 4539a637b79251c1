"""Measure how well a worker is used: model FLOPs utilization, and its peak memory."""

from __future__ import annotations

from functools import cached_property

import torch

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.method.precision import autocast_type
from amlp_ray.training.loggers.flops import mfu, peak_flops, peak_memory, trained_flops
from amlp_ray.training.loggers.metrics_file import Metrics


class MfuMeter:
    """Measures one worker of a run; the first one's figures stand for all."""

    def __init__(self, config: PretrainConfig, spec: ImageSpec, device: str) -> None:
        self.config = config
        self.spec = spec
        self.device = device

    @cached_property
    def peak(self) -> float | None:
        """Peak FLOP/s of the device; None if it is not known."""
        return peak_flops(self.device, autocast_type(self.config, self.device) or torch.float32)

    def measure(self, metrics: Metrics) -> Metrics:
        """Return `mfu` (None if the device's peak is not known) and `memory` in GB.

        Args:
            metrics: of the epoch.
        """
        flops = trained_flops(self.config, self.spec, metrics["ratio"])
        used = mfu(metrics["images_per_second_per_worker"], flops, self.peak)
        return {"mfu": used, "memory": round(peak_memory(self.device), 3)}
