"""Every setting of amlp_ray: its name, unit, range, default, and why that default.

A setting has one name everywhere. `ratio.start` below is `ratio.start` in a YAML file, in `--set ratio.start=0.3`,
in a study's search space, as an Optuna parameter, and in the report. Unknown names are errors.
Values come from small trials on breast ultrasound and dermoscopy unless a comment says otherwise.
"""

from __future__ import annotations

from amlp_ray.config.data import ImageSpec, PrepareSettings
from amlp_ray.config.method import (
    LossSettings,
    ModelSettings,
    PatchScore,
    RatioSettings,
    SelectionSettings,
    Share,
    architecture,
)
from amlp_ray.config.pretrain import VARIANTS, PretrainSettings, Variant
from amlp_ray.config.scoring import ProbeSettings, SegmentSettings
from amlp_ray.config.study import (
    BudgetSettings,
    Choice,
    Parameter,
    PrunerSettings,
    Range,
    ResourceSettings,
    SamplerSettings,
    StudySettings,
)

__all__ = [
    "VARIANTS",
    "BudgetSettings",
    "Choice",
    "ImageSpec",
    "LossSettings",
    "ModelSettings",
    "Parameter",
    "PatchScore",
    "PrepareSettings",
    "PretrainSettings",
    "ProbeSettings",
    "PrunerSettings",
    "Range",
    "RatioSettings",
    "ResourceSettings",
    "SamplerSettings",
    "SegmentSettings",
    "SelectionSettings",
    "Share",
    "StudySettings",
    "Variant",
    "architecture",
]
