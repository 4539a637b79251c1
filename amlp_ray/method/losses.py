"""Reconstruction loss, its weighting toward hard patches (ARL, RRL), ranking (HPM), and CCL.

Shapes: B images, m masked patches, P values per patch. All losses are means over the masked
patches, then over images.

Published of ARL, RRL and CCL: components, purpose, order. Each of their equations is our
reconstruction. Those of MAE and HPM follow their public code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amlp_ray.config import LossConfig
from amlp_ray.method.autoencoder import Prediction

EPSILON = 1e-6


class PatchErrors(NamedTuple):
    """Errors of the masked patches.

    Attributes:
        loss: (B, m), with gradient.
        difficulty: (B, m), detached: how hard a patch is.
    """

    loss: Tensor
    difficulty: Tensor


def patch_errors(prediction: Tensor, target: Tensor, config: LossConfig) -> PatchErrors:
    """Compute the mean squared (with `l1`: absolute) error of every masked patch.

    With `norm_pix` the target is standardized per patch. Difficulty is then that error too, or,
    with `difficulty: raw`, the error in the scale of the image: dividing by the patch's SD makes
    flat background as hard as a lesion.

    Args:
        prediction: (B, m, P).
        target: (B, m, P), in the scale of the image.

    Source: MAE (He et al. 2022), equal to its public code. `l1`: SimMIM (Xie et al. 2022).
    """
    scale = None
    if config.norm_pix:
        mean = target.mean(-1, keepdim=True)
        scale = (target.var(-1, keepdim=True) + EPSILON).sqrt()
        target = (target - mean) / scale
    difference = prediction - target
    value_errors = difference.square() if config.distance == "l2" else difference.abs()
    error = value_errors.mean(-1)
    difficulty = error.detach()
    if scale is not None and config.difficulty == "raw":
        unit = scale.square() if config.distance == "l2" else scale
        difficulty = difficulty * unit[..., 0]
    return PatchErrors(error, difficulty)


def hard_patch_weights(difficulty: Tensor, tissue: Tensor, config: LossConfig) -> Tensor:
    """Compute weights (B, m) with mean 1 per image that raise hard patches; no gradient.

    With e the difficulty (B, m):

    - `rrl`, relative reconstruction loss: clip((e / mean e)^gamma), scaled to mean 1. The mean of e
      is over `tissue` (B, m), so that a flat black border does not make all tissue hard. Free of
      scale over epochs and ratios. gamma = 0 gives 1.
    - `arl`, attention reconstruction loss: m softmax(e / (temperature * mean e)). A large
      temperature gives 1.

    Source: our reconstruction of ARL and RRL of AMLP.
    """
    relative = relative_difficulty(difficulty.detach(), tissue)
    if config.weighting == "arl":
        return difficulty.shape[1] * torch.softmax(relative / config.temperature, 1)
    weight = relative.pow(config.gamma).clamp(config.clip_min, config.clip_max)
    return weight / weight.mean(1, keepdim=True)


def relative_difficulty(difficulty: Tensor, tissue: Tensor) -> Tensor:
    """Divide errors (B, m) by the image's mean error over `tissue` (B, m).

    Over all masked patches where none of them is tissue.
    """
    inside = tissue | ~tissue.any(1, keepdim=True)
    mean = (difficulty * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True)
    return difficulty / (mean + EPSILON)


def category_consistency_loss(
    logits: Tensor, hard: Tensor, lesion: Tensor, config: LossConfig
) -> Tensor:
    """Compute CCL: a head learns which patches are hard and which the clustering called lesion.

    eta * BCE(q, hard) + (1 - eta) * BCE(q, lesion), a scalar, with eta = `ccl_difficulty_share`.
    Classes are weighted to equal mass within each image, since a lesion covers a few percent.
    Difficulty is a label without gradient: raising the error of lesion patches must not pay. An
    image whose labels are all alike contributes nothing to that term.

    Args:
        logits: (B, m) of the category head, q before the sigmoid.
        hard: (B, m) bool.
        lesion: (B, m) bool.

    Source: our reconstruction of CCL of AMLP.
    """
    eta = config.ccl_difficulty_share
    return eta * _balanced_bce(logits, hard) + (1 - eta) * _balanced_bce(logits, lesion)


def _balanced_bce(logits: Tensor, labels: Tensor) -> Tensor:
    positive = labels.to(logits.dtype)
    total = labels.shape[1]
    count = positive.sum(1, keepdim=True)
    positive_weight = total / (2 * count.clamp_min(1))
    negative_weight = total / (2 * (total - count).clamp_min(1))
    weight = torch.where(labels, positive_weight, negative_weight)
    is_mixed = (count > 0) & (count < total)
    loss = F.binary_cross_entropy_with_logits(logits, positive, reduction="none")
    return (loss * weight * is_mixed).mean()


def hard_labels(difficulty: Tensor, lesion: Tensor, tissue: Tensor, threshold: str) -> Tensor:
    """Return which masked patches count as hard, (B, m) bool.

    - `mean`: harder than the image's mean over tissue.
    - `quantile`: the hardest, as many as the lesion cluster holds. By `mean` in images without a
      cluster, such as all under random masking.
    - `otsu`: above the threshold that best splits the image's errors into two classes.

    Args:
        difficulty: (B, m).
        lesion: (B, m) bool.
        tissue: (B, m) bool.

    Source: our reconstruction; the split is that of Otsu 1979.
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
    """Return the index (B, 1) of the last of falling values (B, m) above Otsu's split."""
    m = ordered.shape[1]
    if m == 1:
        return ordered.new_zeros(len(ordered), 1)
    above = torch.arange(1, m, device=ordered.device)  # number of values above each split
    total = ordered.cumsum(1)
    mean_above = total[:, :-1] / above
    mean_below = (total[:, -1:] - total[:, :-1]) / (m - above)
    between = above * (m - above) * (mean_above - mean_below).square()
    return between.argmax(1, keepdim=True)


def ranking_loss(predicted: Tensor, difficulty: Tensor) -> Tensor:
    """Compute HPM's loss: of every two masked patches, the harder is to get the higher prediction.

    Cross entropy of sigmoid(d_i - d_j) against e_i > e_j over all pairs of unequal error in the
    whole batch, a scalar.

    Args:
        predicted: (B, m), d of the ranking decoder.
        difficulty: (B, m), e, detached here.

    Source: HPM (Wang et al. 2023), the relative form of its public code.
    """
    e = difficulty.detach()
    harder = (e[:, :, None] > e[:, None]).to(predicted.dtype)
    easier = harder.mT
    probability = torch.sigmoid(predicted[:, :, None] - predicted[:, None])
    log_harder = torch.log(probability + EPSILON)
    log_easier = torch.log(1 - probability + EPSILON)
    loss = -harder * log_harder - easier * log_easier
    return loss.sum() / (harder.sum() + easier.sum()).clamp_min(1)


def cohens_kappa(first: Tensor, second: Tensor) -> Tensor:
    """Compute Cohen's kappa of two labelings (B, m) bool over a batch: 1 agrees, 0 is chance.

    Source: Cohen 1960.
    """
    a = first.float()
    b = second.float()
    observed = (a == b).float().mean()
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return (observed - chance) / (1 - chance).clamp_min(EPSILON)


class Losses(NamedTuple):
    """Scalars of one step.

    Attributes:
        total: the loss that is trained.
        reconstruction: unweighted, comparable between weightings.
        ccl: category consistency loss.
        ranking: HPM's loss.
        effective_patches: share of masked patches that carry the weighted loss,
            (sum w)^2 / (m sum w^2).
        agreement: Cohen's kappa of lesion and difficulty: is what is called lesion what is hard?
    """

    total: Tensor
    reconstruction: Tensor
    ccl: Tensor
    ranking: Tensor
    effective_patches: Tensor
    agreement: Tensor


def pretraining_loss(
    prediction: Prediction,
    target: Tensor,
    lesion: Tensor,
    tissue: Tensor,
    config: LossConfig,
    *,
    warming_up: bool,
) -> Losses:
    """Compute (1 - mix) * plain + mix * weighted + ranking_weight * ranking + ccl_weight * CCL.

    While warming up: the plain loss and the ranking alone.

    Args:
        prediction: of the masked patches.
        target: (B, m, P).
        lesion: (B, m) bool of the masked patches.
        tissue: (B, m) bool of the masked patches.

    Source: our reconstruction of the total loss of AMLP.
    """
    errors = patch_errors(prediction.pixels.float(), target.float(), config)
    plain = errors.loss.mean()
    total = plain
    effective_patches = plain.new_ones(())
    ccl = ranking = agreement = plain.new_zeros(())
    if config.weighting != "none" and config.mix > 0 and not warming_up:
        weight = hard_patch_weights(errors.difficulty, tissue, config)
        weighted = (weight * errors.loss).mean()
        total = (1 - config.mix) * plain + config.mix * weighted
        effective_patches = weight.sum(1).square() / weight.square().sum(1)
        effective_patches = effective_patches.mean() / weight.shape[1]
    if prediction.difficulty is not None:
        ranking = ranking_loss(prediction.difficulty.float(), errors.difficulty)
        total = total + config.ranking_weight * ranking
    if prediction.category is not None:
        hard = hard_labels(errors.difficulty, lesion, tissue, config.ccl_threshold)
        ccl = category_consistency_loss(prediction.category.float(), hard, lesion, config)
        # Zero while warming up, but part of the graph: data-parallel training waits for every
        # parameter's gradient.
        total = total + (0.0 if warming_up else config.ccl_weight) * ccl
        agreement = cohens_kappa(hard, lesion)
    return Losses(total, plain, ccl, ranking, effective_patches, agreement)
