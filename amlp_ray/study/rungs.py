"""Epochs at which a trial is scored and may be pruned, and its masking ratios by epoch."""

from __future__ import annotations

import math

from amlp_ray.config import (
    PretrainConfig,
    PrunerConfig,
)
from amlp_ray.method.masking_ratio import masking_ratio

STEPS_SEEN = (
    16  # of an epoch, where the ratio moves within it: their mean is within 0.001 of that of all
)


def rung_epochs(epochs: int, pruner: PrunerConfig) -> tuple[int, ...]:
    """Epochs after which a trial is scored, the last at full length: evenly apart, or each `reduction` times the other.

    >>> rung_epochs(70, PrunerConfig(rungs=4))
    (18, 35, 52, 70)
    >>> rung_epochs(80, PrunerConfig(rungs=4, spacing="geometric"))
    (10, 20, 40, 80)
    """
    if pruner.spacing == "geometric":
        at = [epochs / pruner.reduction_factor**i for i in range(pruner.rungs)]
    else:
        at = [epochs * (i + 1) / pruner.rungs for i in range(pruner.rungs)]
    return tuple(sorted({max(1, round(epoch)) for epoch in at}))


def with_schedule(config: PretrainConfig, pruner: PrunerConfig) -> PretrainConfig:
    """Settings of a trial or a baseline whose ratio runs its whole course up to each rung, where the study says so."""
    if pruner.schedule == "fixed" or config.objective != "reconstruction":
        return config
    ratio = config.ratio.model_copy(update={"rungs": rung_epochs(config.epochs, pruner)})
    return config.model_copy(update={"ratio": ratio})


def first_prunable_epoch(config: PretrainConfig, pruner: PrunerConfig, images: int) -> int:
    """First epoch at which at least `min_steps` optimiser steps are done."""
    return max(1, math.ceil(pruner.min_steps / max(1, images // config.batch_size)))


def prunable_rungs(config: PretrainConfig, pruner: PrunerConfig, images: int) -> tuple[int, ...]:
    """Rungs at which a trial may be pruned: past `min_steps` and before its end."""
    first = first_prunable_epoch(config, pruner, images)
    rungs = rung_epochs(config.epochs, pruner) if pruner.name != "none" else ()
    return tuple(rung for rung in rungs if first <= rung < config.epochs)


def schedule(config: PretrainConfig) -> list[float]:
    """The masking ratios of a run, epoch by epoch, or finer where they change within an epoch."""
    steps = STEPS_SEEN if config.ratio.update_per == "step" else 1
    moments = [(epoch, step) for epoch in range(1, config.epochs + 1) for step in range(steps)]
    s = config
    return [
        masking_ratio(s.ratio, e, s.epochs, step=i, steps=steps, seed=s.seed) for e, i in moments
    ]
