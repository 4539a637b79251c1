"""Score a segmenter on the labeled images of a split."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from amlp_ray.config import ImageSpec, ProbeConfig
from amlp_ray.data.dataset import PatchDataset, Split
from amlp_ray.evaluation.labels import by_part, check_fits, labeled_rows, train_rows
from amlp_ray.evaluation.metrics import hausdorff95, mean_mask, score_images, summarize_scores
from amlp_ray.evaluation.segmenter import Segmenter, load_segmenter
from amlp_ray.method.augment import normalize

SIZES = ProbeConfig().sizes
BATCH_SIZE = 32


def score_segmenter(
    dataset: PatchDataset,
    folder: Path,
    split: Literal["val", "test"],
    *,
    sizes: tuple[float, float] = SIZES,
    device: str = "cpu",
) -> dict[str, Any]:
    """Score a segmenter that `segment` left in `folder`; nothing is trained.

    Args:
        sizes: what is a small and a large lesion, see `probe.sizes`.

    Raises:
        DataError: the split has no lesion.
        CheckpointError: the segmenter is missing or damaged.
        ConfigError: it was made for other images.
    """
    loaded = load_segmenter(folder)
    check_fits(dataset, loaded.spec, f"{folder} was trained on")
    floor = mean_mask(dataset.load("train", train_rows(dataset, loaded.config)).masks)
    score, _ = evaluate(loaded.model.to(device), dataset, split, floor, loaded.spec, sizes)
    return score


@torch.inference_mode()
def evaluate(
    model: Segmenter,
    dataset: PatchDataset,
    split: str,
    floor: np.ndarray,
    spec: ImageSpec,
    sizes: tuple[float, float],
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Score the labeled images of a split, in float32.

    Args:
        floor: (H, W) bool, predicted for every image to score without any image; see `mean_mask`.
        spec: how images are normalized.
        sizes: what is a small and a large lesion, see `probe.sizes`.

    Returns:
        The score, and a table with a row per image.

    Raises:
        DataError: the split has no lesion.
    """
    rows = labeled_rows(dataset, split)
    model.eval()
    columns = ["spacing_y", "spacing_x"]
    spacing = dataset.table(split, columns=columns)[columns].to_numpy(float)
    # Unless it is known for all images, their mean would have no unit.
    in_mm = bool(np.isfinite(spacing[rows]).all())
    tables = []
    floors = []
    for part_rows in by_part(dataset, split, rows):
        part = dataset.load(split, part_rows)
        predicted = _predict(model, part.images, spec)
        part_spacing = spacing[part_rows] if in_mm else None
        tables.append(_score_table(part, predicted, part_spacing))
        truth = part.masks > 0
        floors.append(score_images(np.broadcast_to(floor, truth.shape), truth).dsc)
    table = pd.concat(tables, ignore_index=True)
    table["missed"] = (table["lesion_pixels"] > 0) & (table["predicted_pixels"] == 0)
    shares = table.assign(share=table["lesion_pixels"] / (spec.height * spec.width))
    score = summarize_scores(shares, sizes) | {
        "unit": dataset.manifest.group_unit,
        "hd95_unit": "mm" if in_mm else "pixels",
        "mean_mask_dsc": float(np.nanmean(np.concatenate(floors))),
    }
    return score, table


def _predict(model: Segmenter, images: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Predict masks (n, H, W) bool of images (n, C, H, W), at the threshold 0.5."""
    device = next(model.parameters()).device
    logits = []
    for batch in torch.from_numpy(images).split(BATCH_SIZE):
        logits.append(model(normalize(batch.to(device), spec)).cpu())
    return (torch.cat(logits)[:, 0] > 0).numpy()


def _score_table(part: Split, predicted: np.ndarray, spacing: np.ndarray | None) -> pd.DataFrame:
    """Score predicted masks (n, H, W) in a table with a row per image."""
    truth = part.masks > 0
    scores = score_images(predicted, truth)
    return pd.DataFrame(
        {
            "id": part.ids,
            "group": part.groups,
            "dsc": scores.dsc,
            "ppv": scores.ppv,
            "sensitivity": scores.sensitivity,
            "iou": scores.iou,
            "hd95": hausdorff95(predicted, truth, spacing),
            "empty_correct": scores.empty_correct,
            "lesion_pixels": truth.sum((1, 2)),
            "predicted_pixels": predicted.sum((1, 2)),
        }
    )
