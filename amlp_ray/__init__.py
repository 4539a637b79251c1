"""Pretrain AMLP on unlabelled medical images and search its settings on a Ray cluster.

The public names are loaded when first used, so that `import amlp_ray` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amlp_ray.config import PretrainSettings, SegmentSettings, StudySettings
    from amlp_ray.data.dataset import PatchDataset
    from amlp_ray.study.study import Study
    from amlp_ray.training.checkpoint import load_encoder
    from amlp_ray.training.pretrain import pretrain
    from amlp_ray.training.segment import segment

__all__ = [
    "PatchDataset",
    "PretrainSettings",
    "SegmentSettings",
    "Study",
    "StudySettings",
    "load_encoder",
    "pretrain",
    "segment",
]

_HOMES = {
    "PatchDataset": "amlp_ray.data.dataset",
    "PretrainSettings": "amlp_ray.config",
    "SegmentSettings": "amlp_ray.config",
    "Study": "amlp_ray.study.study",
    "StudySettings": "amlp_ray.config",
    "load_encoder": "amlp_ray.training.checkpoint",
    "pretrain": "amlp_ray.training.pretrain",
    "segment": "amlp_ray.training.segment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'amlp_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
