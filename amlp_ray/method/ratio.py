"""AMR: the masking ratio of an epoch.

Published: the ratio rises gradually during training. Start, end, shape and duration are our reconstruction.
"""

import math

from amlp_ray.config import RatioSettings


def masking_ratio(settings: RatioSettings, epoch: int, epochs: int) -> float:
    """Return the masking ratio of `epoch` (1-based) of `epochs`: `start` in the first, `end` in the last.

    r(t) = start + (end - start) g(min(1, t / T_r)), with T_r = duration * epochs.

    >>> [masking_ratio(RatioSettings(start=0.25, end=0.75), epoch, 3) for epoch in (1, 2, 3)]
    [0.25, 0.5, 0.75]
    """
    last = max(1, round(settings.duration * epochs) - 1)
    u = min(1.0, (epoch - 1) / last)
    return settings.start + (settings.end - settings.start) * _progress(settings, u)


def _progress(settings: RatioSettings, u: float) -> float:
    if settings.shape == "cosine":
        return (1 - math.cos(math.pi * u)) / 2
    if settings.shape == "power":
        return u**settings.power
    if settings.shape == "step":
        return min(settings.levels - 1, math.floor(u * settings.levels)) / (settings.levels - 1)
    return u


def masked_count(ratio: float, patches: int) -> int:
    """Return how many of `patches` are masked: one number per epoch, so that every row of a batch has equal length.

    At least one patch is masked and at least one stays visible.
    """
    return min(max(round(ratio * patches), 1), patches - 1)
