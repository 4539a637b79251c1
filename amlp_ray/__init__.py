"""Pretrain AMLP on unlabeled medical images and search its settings on a Ray cluster.

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

_HOMES = {  # of those that are not in `config`
    "PatchDataset": "amlp_ray.data.dataset.PatchDataset",
    "Study": "amlp_ray.study.study.Study",
    "check_dataset": "amlp_ray.data.check.check_dataset",
    "load_encoder": "amlp_ray.training.checkpoint.export.load_encoder",
    "predict": "amlp_ray.inference.predict.predict",
    "prepare": "amlp_ray.data.prepare.pipeline.prepare",
    "pretrain": "amlp_ray.launch.launcher.pretrain_dataset",
    "segment": "amlp_ray.evaluation.segmentation.segment",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'amlp_ray' has no attribute {name!r}")
    home = _HOMES.get(name, f"amlp_ray.config.{name}")
    module, _, attribute = home.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
