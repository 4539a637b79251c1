"""The precision in which models run: the student in its steps, and the teacher when it is asked."""

from __future__ import annotations

from typing import Protocol

import torch


class HasPrecision(Protocol):
    """Settings with a `precision`: of pretraining, or of fine-tuning."""

    @property
    def precision(self) -> str: ...


def autocast_type(config: HasPrecision, device: str) -> torch.dtype | None:
    """Type of autocast, or None for float32.

    On CPU small models are slower in bf16 (measured: 0.7x at width 96), and its digits differ between CPUs, so `auto`
    is float32 there.
    """
    if config.precision == "auto":
        return (
            torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported() else None
        )
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)


def autocast(config: HasPrecision, device: str) -> torch.autocast:
    """The context in which a model runs in the settings' precision."""
    low = autocast_type(config, device)
    return torch.autocast(device.partition(":")[0], dtype=low, enabled=low is not None)
