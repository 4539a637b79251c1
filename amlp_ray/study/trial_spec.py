"""Specification of one trial: everything that its process is told."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from amlp_ray.config import SegmentConfig
from amlp_ray.launch.run_spec import RunSpec

TrialKind = Literal["search", "baseline", "confirm"]


class TrialSpec(BaseModel):
    """Describe one trial; Tune shows and stores it as the plain values of `model_dump`.

    Args:
        kind: which of the study's three Optuna studies the trial belongs to.
        number: Optuna's number, within that study.
        run: the pretraining; its `label` is a short name such as `trial 7` or `baseline mae-0`.
        finetune: settings of the second protocol, which a confirmation adds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: TrialKind
    number: int
    run: RunSpec
    finetune: SegmentConfig | None = None
