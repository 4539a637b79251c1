"""Epochs at which a trial is scored and may be pruned, and its masking ratios by epoch."""

from __future__ import annotations

import math

from amlp_ray.config import (
    PretrainSettings,
    PrunerSettings,
)
from amlp_ray.method.masking_ratio import masking_ratio

STEPS_SEEN = (
    16  # of an epoch, where the ratio moves within it: their mean is within 0.001 of that of all
)


def rung_epochs(epochs: int, pruner: PrunerSettings) -> tuple[int, ...]:
    """Epochs after which a trial is scored, the last at full length: evenly apart, or each `reduction` times the other.

    >>> rung_epochs(70, PrunerSettings(rungs=4))
    (18, 35, 52, 70)
    >>> rung_epochs(80, PrunerSettings(rungs=4, spacing="geometric"))
    (10, 20, 40, 80)
    """
    if pruner.spacing == "geometric":
        at = [epochs / pruner.reduction**i for i in range(pruner.rungs)]
    else:
        at = [epochs * (i + 1) / pruner.rungs for i in range(pruner.rungs)]
    return tuple(sorted({max(1, round(epoch)) for epoch in at}))


def with_schedule(settings: PretrainSettings, pruner: PrunerSettings) -> PretrainSettings:
    """Settings of a trial or an arm whose ratio runs its whole course up to each rung, where the study says so."""
    if pruner.schedule == "fixed" or settings.objective != "reconstruction":
        return settings
    ratio = settings.ratio.model_copy(update={"rungs": rung_epochs(settings.epochs, pruner)})
    return settings.model_copy(update={"ratio": ratio})


def first_prunable_epoch(settings: PretrainSettings, pruner: PrunerSettings, images: int) -> int:
    """First epoch at which at least `min_steps` optimiser steps are done."""
    return max(1, math.ceil(pruner.min_steps / max(1, images // settings.batch_size)))


def prunable_rungs(
    settings: PretrainSettings, pruner: PrunerSettings, images: int
) -> tuple[int, ...]:
    """Rungs at which a trial may be pruned: past `min_steps` and before its end."""
    first = first_prunable_epoch(settings, pruner, images)
    rungs = rung_epochs(settings.epochs, pruner) if pruner.name != "none" else ()
    return tuple(rung for rung in rungs if first <= rung < settings.epochs)


def schedule(settings: PretrainSettings) -> list[float]:
    """The masking ratios of a run, epoch by epoch, or finer where they change within an epoch."""
    steps = STEPS_SEEN if settings.ratio.per == "step" else 1
    moments = [(epoch, step) for epoch in range(1, settings.epochs + 1) for step in range(steps)]
    s = settings
    return [
        masking_ratio(s.ratio, e, s.epochs, step=i, steps=steps, seed=s.seed) for e, i in moments
    ]
