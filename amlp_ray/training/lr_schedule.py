"""The learning rate of a step."""

from __future__ import annotations

import math

from amlp_ray.config import PretrainConfig, SegmentConfig


def learning_rate(config: PretrainConfig | SegmentConfig, step: int, steps: int) -> float:
    """Compute the learning rate: linear warm-up to its peak, then cosine to zero.

    Args:
        config: with the peak `lr` and `warmup`, its share of all steps.
        step: counted from 0 over the whole run.
        steps: of the whole run.
    """
    peak = config.scaled_lr if isinstance(config, PretrainConfig) else config.lr
    warmup_steps = config.warmup * steps
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    angle = math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (1 + math.cos(angle)) / 2
