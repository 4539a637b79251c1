"""Reconstruction loss, its weighting towards hard patches (ARL, RRL), and CCL.

Shapes: B images, m masked patches, P values per patch; all losses are means over the masked patches, then over images.
Published: components, purpose, order. Every equation here is our reconstruction.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amlp_ray.config import LossSettings

_EPS = 1e-6


class PatchErrors(NamedTuple):
    """Errors of the masked patches, (B, m): `loss` is trained; `difficulty`, detached, is what hard means."""

    loss: Tensor
    difficulty: Tensor


def patch_errors(prediction: Tensor, target: Tensor, *, norm_pix: bool) -> PatchErrors:
    """Mean squared error of every masked patch; prediction and target are (B, m, P).

    With `norm_pix` the target is standardised per patch (MAE, He et al. 2022). Difficulty is always the error on the
    raw target: dividing by the patch's variance makes flat background as hard as a lesion.
    """
    if not norm_pix:
        error = (prediction - target).square().mean(-1)
        return PatchErrors(error, error.detach())
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    error = (prediction - (target - mean) / (var + _EPS).sqrt()).square().mean(-1)
    return PatchErrors(error, (error * (var[..., 0] + _EPS)).detach())


def hard_patch_weights(difficulty: Tensor, tissue: Tensor, settings: LossSettings) -> Tensor:
    """Weights (B, m) with mean 1 per image that raise hard patches; no gradient.

    - `rrl`, relative reconstruction loss: clip((e / mean e)^gamma), mean over tissue, so that a flat black border does
      not make all tissue hard. Scale-free over epochs and ratios. gamma = 0 gives 1.
    - `arl`, attention reconstruction loss: softmax(e / (temperature * mean e)). A large temperature gives 1.
    """
    e = difficulty.detach()
    relative = relative_difficulty(e, tissue)
    if settings.weighting == "arl":
        return e.shape[1] * torch.softmax(relative / settings.temperature, 1)
    weight = relative.pow(settings.gamma).clamp(settings.clip_min, settings.clip_max)
    return weight / weight.mean(1, keepdim=True)


def relative_difficulty(difficulty: Tensor, tissue: Tensor) -> Tensor:
    """Error over the image's mean error on tissue, (B, m); on all patches where none of the masked ones is tissue."""
    inside = tissue | ~tissue.any(1, keepdim=True)
    mean = (difficulty * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True)
    return difficulty / (mean + _EPS)


def category_consistency_loss(
    logits: Tensor, difficulty: Tensor, lesion: Tensor, tissue: Tensor, settings: LossSettings
) -> Tensor:
    """CCL: a head learns, from the decoder's tokens, which patches are hard and which the clustering called lesion.

    eta * BCE(q, hard) + (1 - eta) * BCE(q, lesion), classes weighted to equal mass within each image, since a lesion
    covers a few percent. Difficulty is a label without gradient: raising the error of lesion patches must not pay.
    An image whose labels are all alike contributes nothing to that term.

    Args:
        logits: (B, m) of the category head. lesion, tissue: (B, m) bool of the masked patches.
    """
    hard = hard_labels(difficulty.detach(), lesion, tissue, settings.ccl_threshold)
    eta = settings.ccl_difficulty_share
    return eta * _balanced_bce(logits, hard) + (1 - eta) * _balanced_bce(logits, lesion)


def hard_labels(difficulty: Tensor, lesion: Tensor, tissue: Tensor, threshold: str) -> Tensor:
    """Which masked patches count as hard, (B, m) bool.

    `mean`: harder than the image's mean over tissue. `quantile`: as many as the lesion cluster holds, the hardest ones;
    by `mean` in images without a cluster, such as all under random masking.
    """
    above_mean = relative_difficulty(difficulty, tissue) > 1
    if threshold == "mean":
        return above_mean
    rank = difficulty.argsort(stable=True, dim=1, descending=True).argsort(1)
    count = lesion.sum(1, keepdim=True)
    return torch.where(count > 0, rank < count, above_mean)


def _balanced_bce(logits: Tensor, labels: Tensor) -> Tensor:
    positive = labels.to(logits.dtype)
    total = labels.shape[1]
    count = positive.sum(1, keepdim=True)
    weight = torch.where(labels, total / (2 * count.clamp_min(1)), total / (2 * (total - count).clamp_min(1)))
    mixed = (count > 0) & (count < total)
    loss = F.binary_cross_entropy_with_logits(logits, positive, reduction="none")
    return (loss * weight * mixed).mean()


class Losses(NamedTuple):
    """Scalars of one step: `total` is trained; `reconstruction` is unweighted and comparable between weightings."""

    total: Tensor
    reconstruction: Tensor
    ccl: Tensor
    effective_patches: Tensor  # share of masked patches that carry the weighted loss: (sum w)^2 / (m sum w^2)


def pretraining_loss(
    prediction: Tensor,
    target: Tensor,
    category_logits: Tensor | None,
    lesion: Tensor,
    tissue: Tensor,
    settings: LossSettings,
    *,
    warming_up: bool,
) -> Losses:
    """Total loss: (1 - mix) * plain + mix * weighted + ccl_weight * CCL; while warming up the plain loss alone.

    Args:
        prediction, target: (B, m, P). category_logits: (B, m), or None where CCL is off.
        lesion, tissue: (B, m) bool of the masked patches.
    """
    errors = patch_errors(prediction.float(), target.float(), norm_pix=settings.norm_pix)
    plain = errors.loss.mean()
    total, effective = plain, plain.new_ones(())
    if settings.weighting != "none" and settings.mix > 0 and not warming_up:
        weight = hard_patch_weights(errors.difficulty, tissue, settings)
        total = (1 - settings.mix) * plain + settings.mix * (weight * errors.loss).mean()
        effective = (weight.sum(1).square() / weight.square().sum(1)).mean() / weight.shape[1]
    ccl = plain.new_zeros(())
    if category_logits is not None:
        ccl = category_consistency_loss(category_logits.float(), errors.difficulty, lesion, tissue, settings)
        # Zero while warming up, but part of the graph: data-parallel training waits for every parameter's gradient.
        total = total + (0.0 if warming_up else settings.ccl_weight) * ccl
    return Losses(total, plain, ccl, effective)
