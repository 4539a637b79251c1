"""Draw rules.png: the probable lesion of rules and scores on phantoms, the true one outlined.

python docs/rules.py
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from amlp_ray.config import ImageSpec, SelectionConfig
from amlp_ray.data.phantoms import draw_phantom
from amlp_ray.method.augment import normalize
from amlp_ray.method.lesion_map import LesionMap, locate_lesion
from amlp_ray.method.patches import patchify
from amlp_ray.method.visualization import (
    RED,
    Pixels,
    draw_heatmap,
    draw_outline,
    draw_sheet,
    draw_strip,
    resize_map,
    tint,
    to_pixels,
)

Panel = NDArray[np.float32]

IMAGES = 4
# In pixels.
SIDE = 96
PATCH_SIDE = 8
PANEL = (108, 108)
TITLE_HEIGHT = 20  # the empty row of titles
GAP = 32  # between the halves
GRID = (SIDE // PATCH_SIDE, SIDE // PATCH_SIDE)
RAW = {"features": "raw", "clusters": 3}
RULES: dict[str, dict[str, object]] = {
    "rule smallest, 3 clusters of raw patches (mps-ams)": {"rule": "smallest", **RAW},
    "rule most_central, the same clusters": {"rule": "most_central", **RAW},
    "rule darkest, the same clusters": {"rule": "darkest", **RAW},
    "rule smallest, 6 clusters of context features": {"rule": "smallest"},
    "rule geodesic, the same clusters (amlp)": {"rule": "geodesic"},
    "score geodesic, probable lesion (amlp-soft)": {"mode": "soft", "score": "geodesic"},
}
SCORES = ("geodesic", "combined", "border_saliency", "row_contrast", "blob", "texture")


def main() -> None:
    stored, masks = draw_phantoms()
    mean = float(stored.double().mean())
    std = float(stored.double().std())
    spec = ImageSpec(channels=1, height=SIDE, width=SIDE, mean=(mean,), std=(std,))
    images = normalize(stored, spec)
    inputs = to_pixels(images, images, spec, PANEL)
    left: dict[str, Iterable[Pixels]] = {"input": inputs}
    for title, settings in RULES.items():
        left[title] = draw_lesions(images, inputs, settings)
    right: dict[str, Iterable[Pixels]] = {"input": inputs}
    for name in SCORES:
        right[f"score {name.replace('_', ' ')}"] = draw_scores(images, name)
    halves = [draw_half(left, masks), draw_half(right, masks)]
    width, height = halves[0].size
    picture = Image.new("RGB", (2 * width + GAP, height - TITLE_HEIGHT), "white")
    for i, half in enumerate(halves):
        picture.paste(half, (i * (width + GAP), -TITLE_HEIGHT))
    reduced = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    reduced.save(Path(__file__).with_suffix(".png"), optimize=True)


def draw_phantoms() -> tuple[Tensor, list[Panel]]:
    """Return stored images (B, 1, H, W) and true lesions, one map per image."""
    images = []
    masks = []
    for i in range(IMAGES):
        rng = np.random.default_rng([1, i])
        image, mask = draw_phantom("ultrasound", SIDE, rng, lesion=True)
        images.append(image)
        masks.append(resize_map(torch.from_numpy(mask).flatten(), mask.shape, PANEL))
    return torch.from_numpy(np.stack(images))[:, None], masks


def lesion_map(images: Tensor, settings: Mapping[str, object]) -> LesionMap:
    config = SelectionConfig.model_validate(settings)
    patches = patchify(images, PATCH_SIDE)
    return locate_lesion(patches, torch.arange(IMAGES), GRID, 1, config, seed=0, epoch=1)


def draw_lesions(
    images: Tensor, inputs: Iterable[Pixels], settings: Mapping[str, object]
) -> list[Pixels]:
    """Lay the probable lesion over every image."""
    panels = []
    lesions = lesion_map(images, settings).lesion
    for image, lesion in zip(inputs, lesions, strict=True):
        panels.append(tint(image, resize_map(lesion, GRID, PANEL), RED))
    return panels


def draw_scores(images: Tensor, name: str) -> list[Pixels]:
    """Draw the score of every image, scaled to its own range."""
    score = lesion_map(images, {"mode": "soft", "score": name}).score
    low = score.amin(1, keepdim=True)
    high = score.amax(1, keepdim=True)
    return [draw_heatmap(resize_map(row, GRID, PANEL)) for row in (score - low) / (high - low)]


def draw_half(rows: Mapping[str, Iterable[Pixels]], masks: list[Panel]) -> Image.Image:
    """Draw rows of panels by title, with the true lesions outlined."""
    strips = []
    for panels in rows.values():
        # Titles of panels are empty, and as keys they must differ.
        titled = {}
        for i, (panel, mask) in enumerate(zip(panels, masks, strict=True)):
            titled[" " * i] = draw_outline(panel, mask)
        strips.append(draw_strip(titled))
    return draw_sheet(strips, list(rows))


if __name__ == "__main__":
    main()
