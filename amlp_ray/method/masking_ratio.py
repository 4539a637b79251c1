"""AMR: the masking ratio over training.

Published: the ratio rises gradually. Start, end, shape and duration are our reconstruction.
"""

import math
from bisect import bisect_right

import torch

from amlp_ray.config import RatioConfig
from amlp_ray.method import counter_rng


def masking_ratio(
    config: RatioConfig,
    epoch: int,
    epochs: int,
    *,
    step: int = 0,
    steps: int = 1,
    seed: int = 0,
) -> float:
    """Return the masking ratio of `epoch` (1-based) of `epochs`: `start` in the first, `end` in the last.

    r(t) = start + (end - start) g(min(1, t / T_r)), with T_r = duration * epochs. With `per: step`, t counts the steps
    (`step` from 0, of `steps` an epoch). `exponential` is start (end / start)^u; `fixed` keeps `start`; `random` draws
    uniformly between start and end, from `seed`; `points` interpolates between given ones. `rungs` end a schedule each:
    up to the first of them the whole of it is run, up to the second it is run as slowly as that needs, and so on.

    >>> [masking_ratio(RatioConfig(start=0.25, end=0.75), epoch, 3) for epoch in (1, 2, 3)]
    [0.25, 0.5, 0.75]
    """
    if config.rungs:
        epochs = next((rung for rung in config.rungs if rung >= epoch), epochs)
    if config.update_per == "epoch":
        step, steps = 0, 1
    now, total = (epoch - 1) * steps + step, epochs * steps
    if config.shape == "fixed":
        return config.start
    if config.shape == "random":
        u = counter_rng.uniform(
            torch.zeros(1, dtype=torch.int64), 1, seed=seed, epoch=now, stream=counter_rng.RATIO
        ).item()
        return config.start + (config.end - config.start) * u
    if config.shape == "points":
        return _interpolate(config.points, now / max(1, total - 1))
    u = min(1.0, now / max(1, round(config.duration * total) - 1))
    if config.shape == "exponential":
        return config.start * (config.end / config.start) ** u
    return config.start + (config.end - config.start) * _progress(config, u)


def _progress(config: RatioConfig, u: float) -> float:
    if config.shape == "cosine":
        return (1 - math.cos(math.pi * u)) / 2
    if config.shape == "power":
        return u**config.power
    if config.shape == "step":
        return min(config.levels - 1, math.floor(u * config.levels)) / (config.levels - 1)
    return u


def _interpolate(points: tuple[tuple[float, float], ...], t: float) -> float:
    """Piecewise linear; level before the first and after the last point."""
    if t <= points[0][0]:
        return points[0][1]
    if t >= points[-1][0]:
        return points[-1][1]
    i = bisect_right([x for x, _ in points], t)
    (t0, r0), (t1, r1) = points[i - 1], points[i]
    return r0 + (r1 - r0) * (t - t0) / (t1 - t0)


def masked_count(ratio: float, patches: int, round_to: int = 1) -> int:
    """Return how many of `patches` are masked: one number for a whole batch, so that every row has equal length.

    The nearest multiple of `quantum`; at least one patch is masked and at least one stays visible.

    >>> masked_count(0.4, 196, round_to=28)
    84
    """
    return min(max(round_to * round(ratio * patches / round_to), 1), patches - 1)
