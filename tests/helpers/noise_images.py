"""Patch datasets of noise, for tests that look at how images are read and not at what they show."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.parquet import Shape
from helpers.datasets import made_dataset


def noise_dataset(
    folder: Path,
    count: int,
    *,
    shape: Shape = (1, 8, 8),
    dtype: str = "uint8",
    part: int = 40,
    seed: int = 0,
) -> PatchDataset:
    """`count` training images in parts of `part` rows."""
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(dtype)
    return made_dataset(folder, images, rows_per_part=part, hash=0, background=0.0)
