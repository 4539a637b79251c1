"""Segmentation scores of single images: DSC, PPV, sensitivity, IoU, HD95, and the rule for empty masks.

An image with a lesion is scored by DSC = 2TP / (2TP + FP + FN), PPV = TP / (TP + FP), sensitivity = TP / (TP + FN),
IoU = TP / (TP + FP + FN), and HD95, the 95th percentile of the distances between the outlines, the larger of the two
ways. The rule for empty masks:

- Nothing is predicted where there is a lesion: it is missed. DSC, PPV, sensitivity and IoU are 0, and HD95, which has
  no outline to go to, is the diagonal of the image, the most it can be: predicting nothing never pays.
- There is no lesion: none of the five is defined, and the image counts in none of their means. Averaged in, each would
  count 0 or 1 and drown the rest. For such images only the share with an empty prediction is reported.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("dsc", "ppv", "sensitivity", "iou", "hd95")

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class ImageScores:
    """Scores of n images, each (n,) float; NaN where the true mask is empty."""

    dsc: FloatArray
    ppv: FloatArray
    sensitivity: FloatArray
    iou: FloatArray
    empty_correct: FloatArray  # 1 or 0 where the true mask is empty, else NaN


def score_images(predicted: BoolArray, truth: BoolArray) -> ImageScores:
    """Score predicted masks (n, H, W) against true ones (n, H, W), image by image."""
    axes = (1, 2)
    hit = (predicted & truth).sum(axes).astype(float)
    said, there = predicted.sum(axes).astype(float), truth.sum(axes).astype(float)
    lesion = there > 0
    none = np.full(len(hit), np.nan)
    return ImageScores(
        dsc=np.where(lesion, 2 * hit / np.maximum(said + there, 1), none),
        ppv=np.where(lesion, hit / np.maximum(said, 1), none),
        sensitivity=np.where(lesion, hit / np.maximum(there, 1), none),
        iou=np.where(lesion, hit / np.maximum(said + there - hit, 1), none),
        empty_correct=np.where(lesion, none, said == 0),
    )


def hausdorff95(
    predicted: BoolArray, truth: BoolArray, spacing: FloatArray | None = None
) -> FloatArray:
    """HD95 (n,) of predicted masks (n, H, W) against true ones; NaN where the true mask is empty.

    Args:
        spacing: (n, 2) millimetres of a pixel, down and across, for distances in millimetres; None: in pixels.
    """
    from monai.metrics import compute_hausdorff_distance  # takes seconds to import

    each = np.ones((len(truth), 2)) if spacing is None else spacing
    lesion, said = truth.any((1, 2)), predicted.any((1, 2))
    found = np.where(lesion, np.hypot(*(each * truth.shape[1:]).T), np.nan)  # the diagonal
    both = np.flatnonzero(lesion & said)
    if len(both):
        masks = (torch.from_numpy(m[both][:, None]) for m in (predicted, truth))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of MONAI's about a call of its own
            distances = compute_hausdorff_distance(
                *masks,
                include_background=True,
                percentile=95,
                spacing=[tuple(row) for row in each[both].tolist()],
            )
        found[both] = distances[:, 0].numpy()
    return found


def summary(table: pd.DataFrame, sizes: tuple[float, float]) -> dict[str, Any]:
    """Scores of a split by its images, a row each: means over images with a lesion, and over groups (patients).

    A group's score is the mean over its images with a lesion, so that a patient with many images counts once.

    Args:
        table: columns id, group, share (of the lesion in the image), missed, and those of `METRICS` and
            `empty_correct`, NaN where they are not defined.
    """
    lesion = table[table["dsc"].notna()]
    groups = lesion.groupby("group")[list(METRICS)].mean()
    empty = table["empty_correct"].dropna()
    return {
        **{name: float(lesion[name].mean()) for name in METRICS},
        "missed": int(lesion["missed"].sum()),
        "empty_correct": float(empty.mean()) if len(empty) else None,
        "images": len(lesion),
        "groups": len(groups),
        **{f"{name}_per_group": float(groups[name].mean()) for name in METRICS},
        **by_size(lesion["dsc"].to_numpy(), lesion["share"].to_numpy(), sizes),
        "per_image": dict(zip(lesion["id"], lesion["dsc"].round(6).tolist(), strict=True)),
        "per_group": dict(zip(groups.index, groups["dsc"].round(6).tolist(), strict=True)),
    }


def best_threshold(
    probability: FloatArray, truth: BoolArray, candidates: FloatArray
) -> tuple[float, float]:
    """Threshold with the highest mean DSC over images with a lesion, and that DSC; use training labels only."""
    means = [float(np.nanmean(score_images(probability > t, truth).dsc)) for t in candidates]
    best = int(np.argmax(means))
    return float(candidates[best]), means[best]


THRESHOLDS = np.linspace(0.05, 0.95, 19)


def mean_mask(train: NDArray[np.uint8]) -> BoolArray:
    """Where the mean of training masks (N, H, W) exceeds the threshold that is best on those masks, (H, W)."""
    mean = train.mean(0, keepdims=True)
    threshold, _ = best_threshold(np.broadcast_to(mean, train.shape), train > 0, THRESHOLDS)
    return np.asarray(mean[0] > threshold)


def mean_mask_floor(train: NDArray[np.uint8], scored: NDArray[np.uint8]) -> FloatArray:
    """DSC (n,) of predicting the mean training mask for every image: what a score is worth without any image."""
    return score_images(np.broadcast_to(mean_mask(train), scored.shape), scored > 0).dsc


def by_size(
    dsc: FloatArray, share: FloatArray, sizes: tuple[float, float]
) -> dict[str, float | None]:
    """Mean DSC by how large lesions are, see `sizes_of`; None where no image has one of that size.

    Args:
        dsc: (n,), NaN where there is no lesion, which counts nowhere.
    """
    found: dict[str, float | None] = {}
    for name, chosen in sizes_of(share, sizes).items():
        values = dsc[chosen & np.isfinite(dsc)]
        found[f"dsc_{name}"] = float(values.mean()) if len(values) else None
    return found


def sizes_of(share: FloatArray, sizes: tuple[float, float]) -> dict[str, BoolArray]:
    """Which images (n,) have a small, a medium and a large lesion, by its share (n,) of the image.

    >>> {name: int(chosen.sum()) for name, chosen in sizes_of(np.array([0.0, 0.01, 0.1, 0.2]), (0.02, 0.1)).items()}
    {'small': 1, 'medium': 1, 'large': 1}
    """
    low, high = sizes
    small, large = (share > 0) & (share < low), share > high
    return {"small": small, "medium": (share > 0) & ~small & ~large, "large": large}


@dataclass(frozen=True)
class ProbeScore:
    """Segmentation score of an encoder. All but `mean_mask_dsc`, a floor, and counts are means over images."""

    dsc: float
    ppv: float
    sensitivity: float
    ap: float  # average precision of the patch logits over all scored patches; positive: more than half lesion
    dsc_sd: float  # over label subsets; 0 with one
    empty_correct: (
        float | None
    )  # share of images without a lesion where none is predicted; None without such images
    images: int  # scored images with a lesion
    scoring: str
    mean_mask_dsc: float  # floor: the mean training mask predicted for every image
    dsc_small: (
        float | None
    )  # of images with a small lesion, see `probe.sizes`; None without such images
    dsc_medium: float | None
    dsc_large: float | None
    per_image: dict[str, float]  # DSC by image id, for paired comparison

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
