"""Measures of how well patches that a rule chooses agree with the true lesion.

Shapes: B images, N patches.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from amlp_ray.method import counter_rng


def top_patches(score: Tensor, share: float, keys: Tensor) -> Tensor:
    """Return the `share` of patches of highest score, (B, N) bool; equal ones in random order."""
    noise = counter_rng.uniform(keys, score.shape[1], seed=0, epoch=0, stream=counter_rng.HINT)
    order = noise.argsort(1)
    by_score = score.gather(1, order).argsort(stable=True, dim=1, descending=True)
    order = order.gather(1, by_score)
    count = max(1, round(share * score.shape[1]))
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order[:, :count], True)


def overlap(lesion: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Return precision, recall and F1 (B,) of lesion against truth, (B, N) bool each."""
    hits = (lesion & truth).sum(1)
    n_predicted = lesion.sum(1)
    true = truth.sum(1)
    return {
        "precision": hits / n_predicted.clamp_min(1),
        "recall": hits / true.clamp_min(1),
        "f1": 2 * hits / (n_predicted + true).clamp_min(1),
    }


def per_image(measure: Callable[..., float], truth: Tensor, score: Tensor) -> Tensor:
    """Compute a ranking measure of every image, (B,); NaN where all patches are lesion."""
    values = []
    for image_truth, image_score in zip(truth.numpy(), score.numpy(), strict=True):
        values.append(np.nan if image_truth.all() else measure(image_truth, image_score))
    return torch.tensor(values)


def standard_error(values: np.ndarray, groups: np.ndarray) -> float | None:
    """Return the standard error of the mean over images that are alike within groups.

    That of groups of one image is the usual one. Source: Liang and Zeger 1986, the sandwich
    estimator for a mean.
    """
    is_known = np.isfinite(values)
    errors = values[is_known] - values[is_known].mean()
    _, group_of = np.unique(groups[is_known].astype(str), return_inverse=True)
    totals = np.bincount(group_of, weights=errors)
    count = len(totals)
    if count < 2:
        return None
    return float(np.sqrt((totals**2).sum() * count / (count - 1)) / len(errors))
