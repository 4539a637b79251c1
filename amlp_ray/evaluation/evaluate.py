"""Score a segmenter on the labelled images of a split: as fine-tuning ends, or as `segment` left it in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from amlp_ray.config import ImageSpec, ProbeConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.evaluation.labels import Rows, by_part, check_fits, labeled_rows, train_rows
from amlp_ray.evaluation.metrics import hausdorff95, mean_mask, score_images, summary
from amlp_ray.evaluation.segmenter import Segmenter, load_segmenter
from amlp_ray.method.augment import normalize

SIZES = ProbeConfig().sizes
CHUNK = 32  # images that are scored at once


def score_segmenter(
    dataset: PatchDataset,
    folder: Path,
    split: Literal["val", "test"],
    *,
    sizes: tuple[float, float] = SIZES,
    device: str = "cpu",
) -> dict[str, Any]:
    """Score a segmenter that `segment` left in `folder`, on the labelled images of a split; nothing is trained.

    Raises:
        DataError: the split has no lesion. CheckpointError: the segmenter is missing or damaged. ConfigError: it is
        made for other images.
    """
    loaded = load_segmenter(folder)
    check_fits(dataset, loaded.spec, f"{folder} was trained on")
    rows = labeled_rows(dataset, split)
    floor = mean_mask(dataset.load("train", train_rows(dataset, loaded.config)).masks)
    return evaluate(
        loaded.model.to(device), dataset, split, rows, floor, loaded.spec, sizes, device
    )[0]


@torch.inference_mode()
def evaluate(
    model: Segmenter,
    dataset: PatchDataset,
    split: str,
    rows: Rows,
    floor: np.ndarray,
    spec: ImageSpec,
    sizes: tuple[float, float],
    device: str,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Score images of a split by row, in float32; return the score, and a table with a row per image.

    Args:
        floor: (H, W) bool, what the score of no image at all is measured with, see `mean_mask`.
    """
    model.eval()
    spacing = dataset.table(split, columns=["spacing_y", "spacing_x"])[
        ["spacing_y", "spacing_x"]
    ].to_numpy(float)
    in_mm = bool(
        np.isfinite(spacing[rows]).all()
    )  # where it is not known of all, their mean would have no unit
    parts, floors = [], []
    for some in by_part(dataset, split, rows):
        part = dataset.load(split, some)
        chunks = torch.from_numpy(part.images).split(CHUNK)
        logits = torch.cat([model(normalize(chunk.to(device), spec)).cpu() for chunk in chunks])
        said, there = (logits[:, 0] > 0).numpy(), part.masks > 0
        s = score_images(said, there)
        parts.append(
            pd.DataFrame(
                {
                    "id": part.ids,
                    "group": part.groups,
                    "dsc": s.dsc,
                    "ppv": s.ppv,
                    "sensitivity": s.sensitivity,
                    "iou": s.iou,
                    "hd95": hausdorff95(said, there, spacing[some] if in_mm else None),
                    "empty_correct": s.empty_correct,
                    "lesion_pixels": there.sum((1, 2)),
                    "predicted_pixels": said.sum((1, 2)),
                }
            )
        )
        floors.append(score_images(np.broadcast_to(floor, there.shape), there).dsc)
    table = pd.concat(parts, ignore_index=True)
    table["missed"] = (table["lesion_pixels"] > 0) & (table["predicted_pixels"] == 0)
    shares = table.assign(share=table["lesion_pixels"] / (spec.height * spec.width))
    score = summary(shares, sizes) | {
        "hd95_unit": "mm" if in_mm else "pixels",
        "mean_mask_dsc": float(np.nanmean(np.concatenate(floors))),
    }
    return score, table
