"""Reconstruction loss, its weighting towards hard patches (ARL, RRL), ranking (HPM), and CCL.

Shapes: B images, m masked patches, P values per patch; all losses are means over the masked patches, then over images.
Published: components, purpose, order. Every equation of ARL, RRL and CCL is our reconstruction; MAE's and HPM's are
those of their public code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amlp_ray.config import LossConfig

if TYPE_CHECKING:
    from amlp_ray.method.autoencoder import Prediction

_EPS = 1e-6


class PatchErrors(NamedTuple):
    """Errors of the masked patches, (B, m): `loss` is trained; `difficulty`, detached, is what hard means."""

    loss: Tensor
    difficulty: Tensor


def patch_errors(prediction: Tensor, target: Tensor, config: LossConfig) -> PatchErrors:
    """Mean squared (or, `l1`, absolute) error of every masked patch; prediction and target are (B, m, P).

    With `norm_pix` the target is standardised per patch (MAE, He et al. 2022). Difficulty is then that error too, or,
    with `difficulty: raw`, the error in the scale of the image: dividing by the patch's SD makes flat background as
    hard as a lesion.
    """
    scale = None
    if config.norm_pix:
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        scale = (var + _EPS).sqrt()
        target = (target - mean) / scale
    off = prediction - target
    error = off.square().mean(-1) if config.distance == "l2" else off.abs().mean(-1)
    difficulty = error.detach()
    if scale is not None and config.difficulty == "raw":
        difficulty = difficulty * (scale.square() if config.distance == "l2" else scale)[..., 0]
    return PatchErrors(error, difficulty)


def hard_patch_weights(difficulty: Tensor, tissue: Tensor, config: LossConfig) -> Tensor:
    """Weights (B, m) with mean 1 per image that raise hard patches; no gradient.

    - `rrl`, relative reconstruction loss: clip((e / mean e)^gamma), mean over tissue, so that a flat black border does
      not make all tissue hard. Scale-free over epochs and ratios. gamma = 0 gives 1.
    - `arl`, attention reconstruction loss: softmax(e / (temperature * mean e)). A large temperature gives 1.
    """
    e = difficulty.detach()
    relative = relative_difficulty(e, tissue)
    if config.weighting == "arl":
        return e.shape[1] * torch.softmax(relative / config.temperature, 1)
    weight = relative.pow(config.gamma).clamp(config.clip_min, config.clip_max)
    return weight / weight.mean(1, keepdim=True)


def relative_difficulty(difficulty: Tensor, tissue: Tensor) -> Tensor:
    """Error over the image's mean error on tissue, (B, m); on all patches where none of the masked ones is tissue."""
    inside = tissue | ~tissue.any(1, keepdim=True)
    mean = (difficulty * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True)
    return difficulty / (mean + _EPS)


def category_consistency_loss(
    logits: Tensor, hard: Tensor, lesion: Tensor, config: LossConfig
) -> Tensor:
    """CCL: a head learns, from the decoder's tokens, which patches are hard and which the clustering called lesion.

    eta * BCE(q, hard) + (1 - eta) * BCE(q, lesion), classes weighted to equal mass within each image, since a lesion
    covers a few percent. Difficulty is a label without gradient: raising the error of lesion patches must not pay.
    An image whose labels are all alike contributes nothing to that term.

    Args:
        logits: (B, m) of the category head. hard, lesion: (B, m) bool of the masked patches.
    """
    eta = config.ccl_difficulty_share
    return eta * _balanced_bce(logits, hard) + (1 - eta) * _balanced_bce(logits, lesion)


def hard_labels(difficulty: Tensor, lesion: Tensor, tissue: Tensor, threshold: str) -> Tensor:
    """Which masked patches count as hard, (B, m) bool.

    `mean`: harder than the image's mean over tissue. `quantile`: as many as the lesion cluster holds, the hardest ones;
    by `mean` in images without a cluster, such as all under random masking. `otsu`: above the threshold that parts the
    image's errors best into two classes (Otsu 1979).
    """
    above_mean = relative_difficulty(difficulty, tissue) > 1
    if threshold == "mean":
        return above_mean
    ordered, order = difficulty.sort(stable=True, dim=1, descending=True)
    rank = order.argsort(1)
    if threshold == "otsu":
        return rank <= _otsu_split(ordered)
    count = lesion.sum(1, keepdim=True)
    return torch.where(count > 0, rank < count, above_mean)


def _otsu_split(ordered: Tensor) -> Tensor:
    """Index (B, 1) of the last falling value (B, m) above the split with the most variance between classes."""
    m = ordered.shape[1]
    above = torch.arange(1, m, device=ordered.device)  # how many lie above each split
    total = ordered.cumsum(1)
    mean_above = total[:, :-1] / above
    mean_below = (total[:, -1:] - total[:, :-1]) / (m - above)
    between = above * (m - above) * (mean_above - mean_below).square()
    return between.argmax(1, keepdim=True) if m > 1 else ordered.new_zeros(len(ordered), 1)


def ranking_loss(predicted: Tensor, difficulty: Tensor) -> Tensor:
    """HPM (Wang et al. 2023): of every two masked patches, the harder one should have the higher prediction.

    Args:
        predicted: (B, m), of the ranking decoder. difficulty: (B, m), detached here.

    Source: the relative form of HPM's public code: cross entropy over all pairs of unequal error, in the whole batch.
    """
    e = difficulty.detach()
    harder = (e[:, :, None] > e[:, None]).to(predicted.dtype)
    easier = harder.mT
    sure = torch.sigmoid(predicted[:, :, None] - predicted[:, None])
    loss = -harder * torch.log(sure + _EPS) - easier * torch.log(1 - sure + _EPS)
    return loss.sum() / (harder.sum() + easier.sum()).clamp_min(1)


def agreement(one: Tensor, other: Tensor) -> Tensor:
    """Cohen's kappa of two labellings (B, m) bool over a batch: 1 agrees, 0 is chance."""
    a, b = one.float(), other.float()
    seen = (a == b).float().mean()
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return (seen - chance) / (1 - chance).clamp_min(_EPS)


def _balanced_bce(logits: Tensor, labels: Tensor) -> Tensor:
    positive = labels.to(logits.dtype)
    total = labels.shape[1]
    count = positive.sum(1, keepdim=True)
    weight = torch.where(
        labels, total / (2 * count.clamp_min(1)), total / (2 * (total - count).clamp_min(1))
    )
    mixed = (count > 0) & (count < total)
    loss = F.binary_cross_entropy_with_logits(logits, positive, reduction="none")
    return (loss * weight * mixed).mean()


class Losses(NamedTuple):
    """Scalars of one step: `total` is trained; `reconstruction` is unweighted and comparable between weightings."""

    total: Tensor
    reconstruction: Tensor
    ccl: Tensor
    ranking: Tensor
    effective_patches: (
        Tensor  # share of masked patches that carry the weighted loss: (sum w)^2 / (m sum w^2)
    )
    agreement: Tensor  # kappa of category and difficulty: is what is called lesion what is hard?


def pretraining_loss(
    prediction: Prediction,
    target: Tensor,
    lesion: Tensor,
    tissue: Tensor,
    config: LossConfig,
    *,
    warming_up: bool,
) -> Losses:
    """Total loss: (1 - mix) * plain + mix * weighted + ranking_weight * ranking + ccl_weight * CCL.

    While warming up, the plain loss and the ranking alone.

    Args:
        prediction: of the masked patches. target: (B, m, P).
        lesion, tissue: (B, m) bool of the masked patches.
    """
    errors = patch_errors(prediction.pixels.float(), target.float(), config)
    plain = errors.loss.mean()
    zero = plain.new_zeros(())
    total, effective, ccl, ranking, kappa = plain, plain.new_ones(()), zero, zero, zero
    if config.weighting != "none" and config.mix > 0 and not warming_up:
        weight = hard_patch_weights(errors.difficulty, tissue, config)
        total = (1 - config.mix) * plain + config.mix * (weight * errors.loss).mean()
        effective = (weight.sum(1).square() / weight.square().sum(1)).mean() / weight.shape[1]
    if prediction.difficulty is not None:
        ranking = ranking_loss(prediction.difficulty.float(), errors.difficulty)
        total = total + config.ranking_weight * ranking
    if prediction.category is not None:
        hard = hard_labels(errors.difficulty, lesion, tissue, config.ccl_threshold)
        ccl = category_consistency_loss(prediction.category.float(), hard, lesion, config)
        # Zero while warming up, but part of the graph: data-parallel training waits for every parameter's gradient.
        total = total + (0.0 if warming_up else config.ccl_weight) * ccl
        kappa = agreement(hard, lesion)
    return Losses(total, plain, ccl, ranking, effective, kappa)
