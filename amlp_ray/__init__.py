"""Pretrain AMLP on unlabelled medical images and search its settings on a Ray cluster.

The public names are loaded when first used, so that `import amlp_ray` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amlp_ray.config import (
        FaultToleranceConfig,
        PredictConfig,
        PrepareConfig,
        PretrainConfig,
        ResourceConfig,
        SegmentConfig,
        StudyConfig,
        TrackingConfig,
    )
    from amlp_ray.data.check import check_dataset
    from amlp_ray.data.dataset import PatchDataset
    from amlp_ray.data.prepare.pipeline import prepare
    from amlp_ray.evaluation.segmentation import segment
    from amlp_ray.inference.predict import predict
    from amlp_ray.launch.launcher import pretrain_dataset as pretrain
    from amlp_ray.study.study import Study
    from amlp_ray.training.checkpoint.export import load_encoder

__all__ = [
    "FaultToleranceConfig",
    "PatchDataset",
    "PredictConfig",
    "PrepareConfig",
    "PretrainConfig",
    "ResourceConfig",
    "SegmentConfig",
    "Study",
    "StudyConfig",
    "TrackingConfig",
    "check_dataset",
    "load_encoder",
    "predict",
    "prepare",
    "pretrain",
    "segment",
]

_HOMES = {
    "FaultToleranceConfig": "amlp_ray.config.FaultToleranceConfig",
    "PatchDataset": "amlp_ray.data.dataset.PatchDataset",
    "PredictConfig": "amlp_ray.config.PredictConfig",
    "PrepareConfig": "amlp_ray.config.PrepareConfig",
    "PretrainConfig": "amlp_ray.config.PretrainConfig",
    "ResourceConfig": "amlp_ray.config.ResourceConfig",
    "SegmentConfig": "amlp_ray.config.SegmentConfig",
    "Study": "amlp_ray.study.study.Study",
    "StudyConfig": "amlp_ray.config.StudyConfig",
    "TrackingConfig": "amlp_ray.config.TrackingConfig",
    "check_dataset": "amlp_ray.data.check.check_dataset",
    "load_encoder": "amlp_ray.training.checkpoint.export.load_encoder",
    "predict": "amlp_ray.inference.predict.predict",
    "prepare": "amlp_ray.data.prepare.pipeline.prepare",
    "pretrain": "amlp_ray.launch.launcher.pretrain_dataset",
    "segment": "amlp_ray.evaluation.segmentation.segment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'amlp_ray' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)
