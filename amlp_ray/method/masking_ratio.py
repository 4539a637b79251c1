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
    """Return the masking ratio of `epoch` (1-based) of `epochs`.

    r(t) = start + (end - start) g(min(1, t / T)), with T = duration * epochs. It is `start` in the
    first epoch and `end` in the last. By `shape`:

    - `linear`, `cosine`, `power`, `step`: the curve g.
    - `exponential`: start (end / start)^(t / T).
    - `fixed`: `start` throughout.
    - `random`: uniform between start and end, from `seed`.
    - `points`: interpolated between the given (share of training, ratio).

    With `rungs`, each ends a schedule: up to the first rung the whole schedule is run, up to the
    second it is run again as slowly as that needs, and so on.

    Args:
        step: step within the epoch, from 0; used with `update_per: step`.
        steps: steps per epoch.

    >>> [masking_ratio(RatioConfig(start=0.25, end=0.75), epoch, 3) for epoch in (1, 2, 3)]
    [0.25, 0.5, 0.75]
    """
    if config.rungs:
        epochs = next((rung for rung in config.rungs if rung >= epoch), epochs)
    if config.update_per == "epoch":
        step = 0
        steps = 1
    time = (epoch - 1) * steps + step
    total = epochs * steps
    if config.shape == "fixed":
        return config.start
    if config.shape == "points":
        return _interpolate(config.points, time / max(1, total - 1))
    u = min(1.0, time / max(1, round(config.duration * total) - 1))
    if config.shape == "exponential":
        return config.start * (config.end / config.start) ** u
    if config.shape == "random":
        key = torch.zeros(1, dtype=torch.int64)
        u = counter_rng.uniform(key, 1, seed=seed, epoch=time, stream=counter_rng.RATIO).item()
    elif config.shape == "cosine":
        u = (1 - math.cos(math.pi * u)) / 2
    elif config.shape == "power":
        u = u**config.power
    elif config.shape == "step":
        u = min(config.levels - 1, math.floor(u * config.levels)) / (config.levels - 1)
    return config.start + (config.end - config.start) * u


def _interpolate(points: tuple[tuple[float, float], ...], t: float) -> float:
    """Interpolate piecewise linearly; constant before the first and after the last point."""
    if t <= points[0][0]:
        return points[0][1]
    if t >= points[-1][0]:
        return points[-1][1]
    i = bisect_right(points, t, key=lambda point: point[0])
    t0, r0 = points[i - 1]
    t1, r1 = points[i]
    return r0 + (r1 - r0) * (t - t0) / (t1 - t0)


def masked_count(ratio: float, patches: int, round_to: int = 1) -> int:
    """Return how many of `patches` are masked: one number for a whole batch, so that rows align.

    The nearest multiple of `round_to`; at least one patch is masked and at least one stays visible.

    >>> masked_count(0.4, 196, round_to=28)
    84
    """
    return min(max(round_to * round(ratio * patches / round_to), 1), patches - 1)
