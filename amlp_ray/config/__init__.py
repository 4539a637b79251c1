"""Every setting of amlp_ray: its name, unit, range, default, and why that default.

A setting has one name everywhere. `ratio.start` below is `ratio.start` in a YAML file, in
`--set ratio.start=0.3`, in a study's search space, as an Optuna parameter, and in the report.
Unknown names are errors. Defaults come from small trials on breast ultrasound and dermoscopy unless
a description says otherwise.
"""

from __future__ import annotations

from amlp_ray.config.baselines import (
    ABLATION_STEPS,
    ABLATIONS,
    BASELINE_DESCRIPTIONS,
    BASELINE_GROUPS,
    baseline_names,
)
from amlp_ray.config.data import ImageSpec, PrepareConfig
from amlp_ray.config.evaluation import ProbeConfig, SegmentConfig
from amlp_ray.config.inference import PredictConfig
from amlp_ray.config.method import (
    LossConfig,
    ModelConfig,
    PatchScore,
    RatioConfig,
    SelectionConfig,
    architecture,
)
from amlp_ray.config.optimization import (
    COST_OBJECTIVES,
    BudgetConfig,
    Direction,
    PrunerConfig,
    SamplerConfig,
    StudyFaultToleranceConfig,
    StudyObjective,
)
from amlp_ray.config.pretrain import VARIANTS, PretrainConfig, Variant
from amlp_ray.config.resources import FaultToleranceConfig, ResourceConfig
from amlp_ray.config.search_space import Choice, Derived, Fixed, Parameter, Range
from amlp_ray.config.study import ConfirmConfig, StudyConfig
from amlp_ray.config.tracking import TrackingConfig

__all__ = [
    "ABLATIONS",
    "ABLATION_STEPS",
    "BASELINE_DESCRIPTIONS",
    "BASELINE_GROUPS",
    "COST_OBJECTIVES",
    "VARIANTS",
    "BudgetConfig",
    "Choice",
    "ConfirmConfig",
    "Derived",
    "Direction",
    "FaultToleranceConfig",
    "Fixed",
    "ImageSpec",
    "LossConfig",
    "ModelConfig",
    "Parameter",
    "PatchScore",
    "PredictConfig",
    "PrepareConfig",
    "PretrainConfig",
    "ProbeConfig",
    "PrunerConfig",
    "Range",
    "RatioConfig",
    "ResourceConfig",
    "SamplerConfig",
    "SegmentConfig",
    "SelectionConfig",
    "StudyConfig",
    "StudyFaultToleranceConfig",
    "StudyObjective",
    "TrackingConfig",
    "Variant",
    "architecture",
    "baseline_names",
]
