"""Segmentation metrics of single images: DSC, PPV, sensitivity, IoU, HD95, and empty masks.

An image with a lesion is scored by DSC = 2TP / (2TP + FP + FN), PPV = TP / (TP + FP), sensitivity =
TP / (TP + FN), IoU = TP / (TP + FP + FN), and HD95, the 95th percentile of the distances between
the outlines, the larger of both directions. The rules for empty masks:

- Nothing is predicted where there is a lesion: it is missed. DSC, PPV, sensitivity and IoU are 0.
  HD95 lacks an outline and is the diagonal of the image, the most it can be: predicting nothing
  never pays.
- There is no lesion: none of the five is defined, and the image counts in none of their means. It
  would count 0 or 1 and drown the rest. Only the share of such images with an empty prediction is
  reported.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from amlp_ray.data.manifest import GroupUnit

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("dsc", "ppv", "sensitivity", "iou", "hd95")
THRESHOLDS = np.linspace(0.05, 0.95, 19)

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class ImageScores:
    """Scores of n images, each (n,) float; NaN if the true mask is empty.

    `empty_correct` is 1 or 0 if the true mask is empty, else NaN.
    """

    dsc: FloatArray
    ppv: FloatArray
    sensitivity: FloatArray
    iou: FloatArray
    empty_correct: FloatArray


def score_images(predicted: BoolArray, truth: BoolArray) -> ImageScores:
    """Score predicted masks (n, H, W) against true ones (n, H, W), image by image."""
    axes = (1, 2)
    hits = (predicted & truth).sum(axes).astype(float)
    n_predicted = predicted.sum(axes).astype(float)
    n_true = truth.sum(axes).astype(float)
    has_lesion = n_true > 0
    # A denominator of 0 comes with 0 hits.
    return ImageScores(
        dsc=np.where(has_lesion, 2 * hits / np.maximum(n_predicted + n_true, 1), np.nan),
        ppv=np.where(has_lesion, hits / np.maximum(n_predicted, 1), np.nan),
        sensitivity=np.where(has_lesion, hits / np.maximum(n_true, 1), np.nan),
        iou=np.where(has_lesion, hits / np.maximum(n_predicted + n_true - hits, 1), np.nan),
        empty_correct=np.where(has_lesion, np.nan, n_predicted == 0),
    )


def hausdorff95(
    predicted: BoolArray, truth: BoolArray, spacing: FloatArray | None = None
) -> FloatArray:
    """Compute the HD95 (n,) of predicted masks (n, H, W); NaN if the true mask is empty.

    Args:
        predicted: masks (n, H, W).
        truth: true masks (n, H, W).
        spacing: (n, 2) millimeters per pixel, down and across; None: distances in pixels.
    """
    from monai.metrics import compute_hausdorff_distance  # takes seconds to import

    if spacing is None:
        spacing = np.ones((len(truth), 2))
    has_lesion = truth.any((1, 2))
    diagonal = np.hypot(*(spacing * truth.shape[1:]).T)
    distances = np.where(has_lesion, diagonal, np.nan)
    both = np.flatnonzero(has_lesion & predicted.any((1, 2)))
    if len(both):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of MONAI's about a call of its own
            measured = compute_hausdorff_distance(
                torch.from_numpy(predicted[both][:, None]),
                torch.from_numpy(truth[both][:, None]),
                include_background=True,
                percentile=95,
                spacing=[tuple(row) for row in spacing[both].tolist()],
            )
        distances[both] = measured[:, 0].numpy()
    return distances


def summarize_scores(table: pd.DataFrame, sizes: tuple[float, float]) -> dict[str, Any]:
    """Average the scores of a split over its images with a lesion, and over groups (patients).

    A group's score is the mean over its images with a lesion, so a patient with many images counts
    once. Images without a lesion are averaged apart, likewise.

    Args:
        table: a row per image, with columns id, group, share (of the lesion in the image), missed,
            those of `METRICS` and `empty_correct`, NaN if they are not defined.
        sizes: what is a small and a large lesion, see `size_classes`.
    """
    lesion = table[table["dsc"].notna()]
    groups = lesion.groupby("group")[list(METRICS)].mean()
    empty = table["empty_correct"].dropna()
    empty_groups = empty.groupby(table["group"]).mean()
    image_means = {name: float(lesion[name].mean()) for name in METRICS}
    group_means = {f"{name}_per_group": float(groups[name].mean()) for name in METRICS}
    return {
        "dsc": image_means["dsc"],
        "empty_correct": float(empty.mean()) if len(empty) else None,
        **image_means,
        "missed": int(lesion["missed"].sum()),
        "images": len(lesion),
        "images_without_lesion": len(empty),
        "groups": len(groups),
        "dsc_per_group": group_means["dsc_per_group"],
        "empty_correct_per_group": float(empty_groups.mean()) if len(empty) else None,
        **group_means,
        **dsc_by_size(lesion["dsc"].to_numpy(), lesion["share"].to_numpy(), sizes),
        "per_image": dict(zip(lesion["id"], lesion["dsc"].round(6).tolist(), strict=True)),
        "per_group": dict(zip(groups.index, groups["dsc"].round(6).tolist(), strict=True)),
    }


def best_threshold(
    probability: FloatArray, truth: BoolArray, candidates: FloatArray
) -> tuple[float, float]:
    """Find the threshold with the highest mean DSC over images with a lesion; return both.

    Use training labels only.

    Args:
        probability: (n, H, W) of a lesion.
        truth: true masks (n, H, W).
        candidates: thresholds to try.
    """
    means = []
    for threshold in candidates:
        dsc = score_images(probability > threshold, truth).dsc
        means.append(float(np.nanmean(dsc)))
    best = int(np.argmax(means))
    return float(candidates[best]), means[best]


def mean_mask(train: NDArray[np.uint8]) -> BoolArray:
    """Compute where the mean of masks (N, H, W) exceeds its best threshold on them: (H, W)."""
    mean = train.mean(0, keepdims=True)
    threshold, _ = best_threshold(np.broadcast_to(mean, train.shape), train > 0, THRESHOLDS)
    return np.asarray(mean[0] > threshold)


def mean_mask_floor(train: NDArray[np.uint8], scored: NDArray[np.uint8]) -> FloatArray:
    """Compute the DSC (n,) of predicting the mean training mask: a score without any image."""
    return score_images(np.broadcast_to(mean_mask(train), scored.shape), scored > 0).dsc


def dsc_by_size(
    dsc: FloatArray, share: FloatArray, sizes: tuple[float, float]
) -> dict[str, float | None]:
    """Average the DSC by size of lesion, see `size_classes`; None without images of a size.

    Args:
        dsc: (n,), NaN without a lesion.
        share: (n,) of the lesion in the image.
        sizes: bounds of the classes.
    """
    means: dict[str, float | None] = {}
    for name, selected in size_classes(share, sizes).items():
        values = dsc[selected & np.isfinite(dsc)]
        means[f"dsc_{name}"] = float(values.mean()) if len(values) else None
    return means


def size_classes(share: FloatArray, sizes: tuple[float, float]) -> dict[str, BoolArray]:
    """Return which images (n,) have a small, a medium and a large lesion.

    Args:
        share: (n,) of the lesion in the image.
        sizes: shares below the first are small, above the second large.

    >>> classes = size_classes(np.array([0.0, 0.01, 0.1, 0.2]), (0.02, 0.1))
    >>> {name: int(selected.sum()) for name, selected in classes.items()}
    {'small': 1, 'medium': 1, 'large': 1}
    """
    low, high = sizes
    small = (share > 0) & (share < low)
    large = share > high
    return {"small": small, "medium": (share > 0) & ~small & ~large, "large": large}


@dataclass(frozen=True)
class ProbeScore:
    """Segmentation score of an encoder. Scores are means over images; None without such images."""

    dsc: float
    ppv: float
    sensitivity: float
    ap: float
    """Average precision of patch logits; a patch is positive if more than half of it is lesion."""
    dsc_sd: float | None
    """Standard deviation over label subsets; None with one subset."""
    empty_correct: float | None
    """Share of images without a lesion for which none is predicted."""
    images: int
    """Number of scored images with a lesion."""
    scoring: str
    """What was scored: val, cross-validation or test."""
    mean_mask_dsc: float
    """DSC of the mean training mask, predicted for every image: a floor."""
    dsc_small: float | None
    """DSC by size of the lesion, see `probe.sizes`."""
    dsc_medium: float | None
    dsc_large: float | None
    per_image: dict[str, float]
    """DSC by image id."""
    per_group: dict[str, float]
    """Mean DSC of a group's images, for paired comparison."""
    unit: GroupUnit
    """What a group is."""
