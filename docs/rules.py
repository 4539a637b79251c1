"""Draw rules.png: what rules and scores take for the lesion on generated ultrasound, the true one outlined.

python docs/rules.py
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from amlp_ray.config import ImageSpec, SelectionConfig
from amlp_ray.data.phantoms import draw_phantom
from amlp_ray.method.augment import normalize
from amlp_ray.method.lesion_map import locate_lesion
from amlp_ray.method.patches import patchify
from amlp_ray.method.visualization import (
    RED,
    to_pixels,
    draw_heatmap,
    resize_map,
    draw_outline,
    draw_sheet,
    draw_strip,
    tint,
)

SIZE, PATCH, SHOWN, COUNT = 96, 8, (108, 108), 4
TITLE, GAP = 20, 32  # pixels: the empty row of titles, and between the halves
GRID = (SIZE // PATCH, SIZE // PATCH)
RAW = {"features": "raw", "clusters": 3}
RULES = {
    "rule smallest, 3 clusters of raw patches (mps-ams)": {"rule": "smallest", **RAW},
    "rule most_central, the same clusters": {"rule": "most_central", **RAW},
    "rule darkest, the same clusters": {"rule": "darkest", **RAW},
    "rule smallest, 6 clusters of context features": {"rule": "smallest"},
    "rule geodesic, the same clusters (amlp)": {"rule": "geodesic"},
    "score geodesic, probable lesion (amlp-soft)": {"mode": "soft", "score": "geodesic"},
}
SCORES = ("geodesic", "combined", "border_saliency", "row_contrast", "blob", "texture")


def main() -> None:
    drawn = [
        draw_phantom("ultrasound", SIZE, np.random.default_rng([1, i]), lesion=True)
        for i in range(COUNT)
    ]
    stored = torch.from_numpy(np.stack([image for image, _ in drawn]))[:, None]
    pixels = stored.double()
    spec = ImageSpec(
        channels=1,
        height=SIZE,
        width=SIZE,
        mean=(float(pixels.mean()),),
        std=(float(pixels.std()),),
    )
    images = normalize(stored, spec)
    inputs = to_pixels(images, images, spec, SHOWN)
    true = [resize_map(torch.from_numpy(mask), mask.shape, SHOWN) for _, mask in drawn]

    def row(title, panels):
        return title, draw_strip({" " * i: draw_outline(panel, true[i]) for i, panel in enumerate(panels)})

    def aim(given):
        config = SelectionConfig.model_validate(given)
        return locate_lesion(
            patchify(images, PATCH), torch.arange(COUNT), GRID, 1, config, seed=0, epoch=1
        )

    def lesions(given):
        maps = [resize_map(lesion, GRID, SHOWN) for lesion in aim(given).lesion]
        return [tint(image, where, RED) for image, where in zip(inputs, maps, strict=True)]

    def scores(name):
        values = aim({"mode": "soft", "score": name}).score
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        return [draw_heatmap(resize_map(share, GRID, SHOWN)) for share in (values - low) / (high - low)]

    left = [row("input", inputs)] + [row(title, lesions(given)) for title, given in RULES.items()]
    right = [row("input", inputs)] + [
        row(f"score {name.replace('_', ' ')}", scores(name)) for name in SCORES
    ]
    halves = [
        draw_sheet([each for _, each in rows], [title for title, _ in rows]) for rows in (left, right)
    ]
    width, height = halves[0].size
    both = Image.new("RGB", (2 * width + GAP, height - TITLE), "white")
    for i, half in enumerate(halves):
        both.paste(half, (i * (width + GAP), -TITLE))
    reduced = both.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    reduced.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
