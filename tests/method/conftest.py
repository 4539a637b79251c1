"""Images with known lesions, and real ones, as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from amlp_ray.data.phantoms import draw_phantom


@pytest.fixture(scope="session")
def ultrasound() -> tuple[Tensor, Tensor, Tensor]:
    """16 ultrasound phantoms with one dark lesion each.

    Images (B, 1, 64, 64) of SD 1, masks (B, 64, 64), keys (B,).
    """
    drawn = [
        draw_phantom("ultrasound", 64, np.random.default_rng([7, i]), lesion=True)
        for i in range(16)
    ]
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).float()[:, None]
    masks = torch.from_numpy(np.stack([mask for _, mask in drawn]))
    return (images - images.mean()) / images.std(), masks, torch.arange(16) * 7919 + 3


@pytest.fixture(scope="session")
def real_images(real_data: Path) -> dict[str, Tensor]:
    """30 gray breast ultrasound and 30 color dermoscopy images, (30, C, 96, 96) of SD 1."""
    busi = sorted((real_data / "busi").glob("*/[bm]*/*).png"))
    isic = sorted((real_data / "isic2017" / "images").iterdir())
    return {"busi": _read(busi, "L"), "isic": _read(isic, "RGB")}


def _read(paths: list[Path], mode: str) -> Tensor:
    chosen = [paths[round(i)] for i in np.linspace(0, len(paths) - 1, 30)]
    pixels = [
        np.asarray(Image.open(path).convert(mode).resize((96, 96), 2), np.float32)
        for path in chosen
    ]
    images = (
        torch.from_numpy(np.stack(pixels).reshape(30, 96, 96, -1)).permute(0, 3, 1, 2).contiguous()
    )
    return (images - images.mean()) / images.std()
