"""Small folders of images in each layout, with the awkward cases of real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _picture(seed: int, height: int, width: int) -> Image.Image:
    """Make a gray RGB image as exported ultrasound is, of noise, so that no two look alike."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BILINEAR).convert("RGB")


def _disc(height: int, width: int, y: float, x: float, r: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.hypot(rows - y * height, columns - x * width) < r * min(height, width)


@pytest.fixture
def busi_folder(tmp_path: Path) -> Path:
    """Write 8 benign, 6 malignant and 4 normal images of differing sizes.

    `benign (1)` has three masks of differing modes.
    """
    folder = tmp_path / "busi [copy]"
    seed = 0
    for name, count in (("benign", 8), ("malignant", 6), ("normal", 4)):
        (folder / name).mkdir(parents=True)
        for i in range(1, count + 1):
            seed += 1
            height, width = 60 + seed, 90 - seed
            _picture(seed, height, width).save(folder / name / f"{name} ({i}).png")
            lesion = _disc(height, width, 0.4, 0.5, 0.2)
            mask = (
                Image.fromarray(lesion) if name != "normal" else Image.new("RGB", (width, height))
            )
            mask.save(folder / name / f"{name} ({i})_mask.png")
            if (name, i) == ("benign", 1):
                second = np.zeros((height, width, 4), np.uint8)
                second[..., 3] = 255  # opaque everywhere: alpha must not count as lesion
                second[_disc(height, width, 0.8, 0.2, 0.1), :3] = 255
                Image.fromarray(second, "RGBA").save(folder / name / f"{name} ({i})_mask_1.png")
                third = np.zeros((height, width, 3), np.uint8)
                third[_disc(height, width, 0.8, 0.8, 0.1), 2] = 7  # blue only, and faint
                Image.fromarray(third, "RGB").save(folder / name / f"{name} ({i})_mask_2.png")
    return folder


@pytest.fixture
def paired_folder(tmp_path: Path) -> Path:
    """Write color images `case_0` to `case_5`.

    0-3 have masks, each named by another rule. 4 and 5 have none.
    """
    folder = tmp_path / "paired"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"case_{i}.png")
    for i, ending in enumerate(("", "_segmentation", "_mask", "_seg")):
        Image.fromarray(_disc(40, 50, 0.5, 0.5, 0.3)).save(
            folder / "masks" / f"case_{i}{ending}.png"
        )
    return folder
