"""The precision in which models run: the student in its steps, and the teacher when it is asked."""

from __future__ import annotations

import torch

from amlp_ray.config import PretrainSettings


def autocast_type(settings: PretrainSettings, device: str) -> torch.dtype | None:
    """Type of autocast, or None for float32. On CPU small models are slower in bf16 (measured: 0.7x at width 96)."""
    if settings.precision == "auto":
        return torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if settings.precision == "bf16" else None


def autocast(settings: PretrainSettings, device: str) -> torch.autocast:
    """The context in which a model runs in the settings' precision."""
    low = autocast_type(settings, device)
    return torch.autocast(device.partition(":")[0], dtype=low, enabled=low is not None)
