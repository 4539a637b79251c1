"""Every setting of amlp_ray: its name, unit, range, default, and why that default.

A setting has one name everywhere. `ratio.start` below is `ratio.start` in a YAML file, in `--set ratio.start=0.3`,
in a study's search space, as an Optuna parameter, and in the report. Unknown names are errors.
Values come from small trials on breast ultrasound and dermoscopy unless a comment says otherwise.
"""

from __future__ import annotations

from amlp_ray.config.baselines import ABOUT, CONTROLS, GROUPS, STEPS, arm_names
from amlp_ray.config.data import ImageSpec, PrepareSettings
from amlp_ray.config.evaluation import ProbeSettings, SegmentSettings
from amlp_ray.config.inference import PredictSettings
from amlp_ray.config.method import (
    LossSettings,
    ModelSettings,
    PatchScore,
    RatioSettings,
    SelectionSettings,
    Share,
    architecture,
)
from amlp_ray.config.optimization import (
    BudgetSettings,
    Direction,
    Objective,
    PrunerSettings,
    SamplerSettings,
    StudyFaultSettings,
)
from amlp_ray.config.pretrain import VARIANTS, PretrainSettings, Variant
from amlp_ray.config.resources import FaultSettings, ResourceSettings
from amlp_ray.config.search_space import Choice, Derived, Fixed, Parameter, Range
from amlp_ray.config.study import COSTS, ConfirmSettings, StudySettings
from amlp_ray.config.tracking import TrackingSettings

__all__ = [
    "ABOUT",
    "CONTROLS",
    "COSTS",
    "GROUPS",
    "STEPS",
    "VARIANTS",
    "BudgetSettings",
    "Choice",
    "ConfirmSettings",
    "Derived",
    "Direction",
    "FaultSettings",
    "Fixed",
    "ImageSpec",
    "LossSettings",
    "ModelSettings",
    "Objective",
    "Parameter",
    "PatchScore",
    "PredictSettings",
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
    "StudyFaultSettings",
    "StudySettings",
    "TrackingSettings",
    "Variant",
    "architecture",
    "arm_names",
]
