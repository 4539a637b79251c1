"""What a study consists of, before Ray or Optuna: seeds, rungs, and the settings of its arms."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from amlp_ray.config import PretrainSettings, PrunerSettings, StudySettings
from amlp_ray.settings import build


def derived_seed(*parts: Any) -> int:
    """A 31-bit seed that follows from its parts, such as (study seed, trial number)."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1


def rung_epochs(epochs: int, rungs: int) -> tuple[int, ...]:
    """Epochs after which a trial is scored: evenly spaced, the last at full length.

    >>> rung_epochs(70, 4)
    (18, 35, 52, 70)
    """
    return tuple(sorted({max(1, round(epochs * (i + 1) / rungs)) for i in range(rungs)}))


def first_prunable_epoch(settings: PretrainSettings, pruner: PrunerSettings, images: int) -> int:
    """First epoch at which at least `min_steps` optimiser steps are done."""
    return max(1, math.ceil(pruner.min_steps / max(1, images // settings.batch_size)))


def prunable_rungs(settings: PretrainSettings, pruner: PrunerSettings, images: int) -> tuple[int, ...]:
    """Rungs at which a trial may be pruned: past `min_steps` and before its end."""
    first = first_prunable_epoch(settings, pruner, images)
    rungs = rung_epochs(settings.epochs, pruner.rungs) if pruner.name != "none" else ()
    return tuple(rung for rung in rungs if first <= rung < settings.epochs)


def arm_settings(settings: StudySettings, arm: str, *, seed: int) -> PretrainSettings:
    """Settings of an arm: the study's model, optimiser and length, but the arm's own method.

    What the study fixes of objective, ratio, selection, loss and `model.encode` belongs to the searched method and
    would change what `mae` means.

    Raises:
        SettingsError: where the arm cannot be had with the study's model.
    """
    method = ("variant", "objective", "ratio", "selection", "loss")
    shared = {k: v for k, v in settings.pretrain.items() if k not in method}
    if isinstance(model := shared.get("model"), Mapping):
        # SimMIM's linear head is its method; the others need a decoder, as deep as the study says.
        own = ("encode", "decoder_depth") if arm == "simmim" or model.get("decoder_depth") == 0 else ("encode",)
        shared["model"] = {k: v for k, v in model.items() if k not in own}
    return build(PretrainSettings, {**shared, "variant": arm, "seed": seed}, f"{settings.name}, arm {arm}")
