"""Compute the epochs at which a trial is scored and may be pruned, and its masking ratios."""

from __future__ import annotations

import math

from amlp_ray.config import PretrainConfig, PrunerConfig
from amlp_ray.method.masking_ratio import masking_ratio

# Steps of an epoch that are sampled if the ratio changes within it. Their mean is within 0.001 of
# the mean of all.
SAMPLED_STEPS = 16


def rung_epochs(epochs: int, pruner: PrunerConfig) -> tuple[int, ...]:
    """Return the epochs after which a trial is scored.

    Args:
        epochs: full length, which is the last rung.
        pruner: says how many rungs there are, evenly spaced or each a multiple of the one before.

    >>> rung_epochs(70, PrunerConfig(rungs=4))
    (18, 35, 52, 70)
    >>> rung_epochs(80, PrunerConfig(rungs=4, spacing="geometric"))
    (10, 20, 40, 80)
    """
    if pruner.spacing == "geometric":
        rungs = [epochs / pruner.reduction_factor**i for i in range(pruner.rungs)]
    else:
        rungs = [epochs * (i + 1) / pruner.rungs for i in range(pruner.rungs)]
    return tuple(sorted({max(1, round(rung)) for rung in rungs}))


def with_schedule(config: PretrainConfig, pruner: PrunerConfig) -> PretrainConfig:
    """Return a config whose ratio runs its whole schedule up to each rung, if the study says so."""
    if pruner.schedule == "fixed" or config.objective != "reconstruction":
        return config
    ratio = config.ratio.model_copy(update={"rungs": rung_epochs(config.epochs, pruner)})
    return config.model_copy(update={"ratio": ratio})


def first_prunable_epoch(config: PretrainConfig, pruner: PrunerConfig, images: int) -> int:
    """Return the first epoch after which at least `min_steps` optimizer steps are done.

    Args:
        images: number of training images.
    """
    steps_per_epoch = max(1, images // config.batch_size)
    return max(1, math.ceil(pruner.min_steps / steps_per_epoch))


def prunable_rungs(config: PretrainConfig, pruner: PrunerConfig, images: int) -> tuple[int, ...]:
    """Return the rungs at which a trial may be pruned: after `min_steps` and before its end.

    Args:
        images: number of training images.
    """
    if pruner.name == "none":
        return ()
    first = first_prunable_epoch(config, pruner, images)
    rungs = rung_epochs(config.epochs, pruner)
    return tuple(rung for rung in rungs if first <= rung < config.epochs)


def schedule(config: PretrainConfig) -> list[float]:
    """Return the masking ratios of a run by epoch, or by step if they change within an epoch."""
    steps = SAMPLED_STEPS if config.ratio.update_per == "step" else 1
    ratios = []
    for epoch in range(1, config.epochs + 1):
        for step in range(steps):
            ratio = masking_ratio(
                config.ratio, epoch, config.epochs, step=step, steps=steps, seed=config.seed
            )
            ratios.append(ratio)
    return ratios
