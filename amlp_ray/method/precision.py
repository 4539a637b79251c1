"""The number format in which models run: the student in its steps, and the teacher."""

from __future__ import annotations

import torch

from amlp_ray.config import PretrainConfig, SegmentConfig


def autocast_type(config: PretrainConfig | SegmentConfig, device: str) -> torch.dtype | None:
    """Return the type of autocast, or None for float32.

    On CPU small models are slower in bf16 (measured: 0.7x at width 96), and its digits differ
    between CPUs, so `auto` is float32 there.
    """
    if config.precision == "auto":
        has_bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)


def autocast(config: PretrainConfig | SegmentConfig, device: str) -> torch.autocast:
    """Return the context in which a model runs in the configured precision."""
    dtype = autocast_type(config, device)
    return torch.autocast(device.partition(":")[0], dtype=dtype, enabled=dtype is not None)
