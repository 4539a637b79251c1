"""Pretrain AMLP on unlabelled medical images and search its settings on a Ray cluster.

The public names are loaded when first used, so that `import amlp_ray` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amlp_ray.config import PrepareSettings, PretrainSettings, SegmentSettings, StudySettings
    from amlp_ray.data.check import check_dataset
    from amlp_ray.data.dataset import PatchDataset
    from amlp_ray.data.preparing.prepare import prepare
    from amlp_ray.study.study import Study
    from amlp_ray.training.checkpoint import load_encoder
    from amlp_ray.training.runners import pretrain_dataset as pretrain
    from amlp_ray.training.segment import segment

__all__ = [
    "PatchDataset",
    "PrepareSettings",
    "PretrainSettings",
    "SegmentSettings",
    "Study",
    "StudySettings",
    "check_dataset",
    "load_encoder",
    "prepare",
    "pretrain",
    "segment",
]

_HOMES = {
    "PatchDataset": "amlp_ray.data.dataset.PatchDataset",
    "PrepareSettings": "amlp_ray.config.PrepareSettings",
    "PretrainSettings": "amlp_ray.config.PretrainSettings",
    "SegmentSettings": "amlp_ray.config.SegmentSettings",
    "Study": "amlp_ray.study.study.Study",
    "StudySettings": "amlp_ray.config.StudySettings",
    "check_dataset": "amlp_ray.data.check.check_dataset",
    "load_encoder": "amlp_ray.training.checkpoint.load_encoder",
    "prepare": "amlp_ray.data.preparing.prepare.prepare",
    "pretrain": "amlp_ray.training.runners.pretrain_dataset",
    "segment": "amlp_ray.training.segment.segment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'amlp_ray' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)
