"""Images with known lesions, as tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from amlp_ray.data.phantoms import draw_phantom


@pytest.fixture(scope="session")
def ultrasound() -> tuple[Tensor, Tensor, Tensor]:
    """16 ultrasound phantoms with one dark lesion each: images (B, 1, 64, 64) of SD 1, masks (B, 64, 64), keys (B,)."""
    drawn = [draw_phantom("ultrasound", 64, np.random.default_rng([7, i]), lesion=True) for i in range(16)]
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).float()[:, None]
    masks = torch.from_numpy(np.stack([mask for _, mask in drawn]))
    return (images - images.mean()) / images.std(), masks, torch.arange(16) * 7919 + 3
