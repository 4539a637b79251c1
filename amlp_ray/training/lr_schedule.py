"""Learning rate by step: linear warm-up, then cosine to zero."""

from __future__ import annotations

import math

from amlp_ray.config import PretrainConfig, SegmentConfig


def learning_rate(config: PretrainConfig | SegmentConfig, step: int, steps: int) -> float:
    """Linear warm-up to the highest rate over the share `warmup` of all steps, then cosine to zero; `step` from 0."""
    highest = config.scaled_lr if isinstance(config, PretrainConfig) else config.lr
    warmup = config.warmup * steps
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    return highest * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
