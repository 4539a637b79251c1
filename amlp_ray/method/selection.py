"""MPS, masked patch selection: which patches of an image are masked.

Every mode turns into one priority per patch; the m patches of highest priority are masked. Random masking is the
priority `noise`, so a neutral setting of any mode gives the masks of plain MAE to the bit.
Published: unsupervised clustering into lesion and background. All else is our reconstruction.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from amlp_ray.config import ImageSpec, PretrainSettings, SelectionSettings
from amlp_ray.method import noise as draw
from amlp_ray.method.clustering import cluster_features, kmeans, name_lesion_cluster
from amlp_ray.method.patches import tissue_patches
from amlp_ray.method.ratio import masked_count, masking_ratio
from amlp_ray.method.scores import patch_score


class Selection(NamedTuple):
    """What is masked, and why.

    `masked` (B, m) and `visible` (B, N - m) are patch indices. `lesion` (B, N) bool is the probable lesion, `tissue`
    (B, N) bool all but the black border, `fallback` (B,) bool the images masked at random because no cluster qualified.
    """

    masked: Tensor
    visible: Tensor
    lesion: Tensor
    tissue: Tensor
    fallback: Tensor


def select_for_epoch(
    patches: Tensor, keys: Tensor, settings: PretrainSettings, spec: ImageSpec, epoch: int
) -> Selection:
    """Choose the patches that a run of `settings` masks in `epoch`; arguments as in `select_patches`."""
    p = settings.model.patch_size
    ratio = masking_ratio(settings.ratio, epoch, settings.epochs)
    return select_patches(
        patches,
        keys,
        masked_count(ratio, patches.shape[1]),
        (spec.height // p, spec.width // p),
        spec.channels,
        settings.selection,
        seed=settings.seed,
        epoch=epoch,
    )


@torch.no_grad()
def select_patches(
    patches: Tensor,
    keys: Tensor,
    count: int,
    grid: tuple[int, int],
    channels: int,
    settings: SelectionSettings,
    *,
    seed: int,
    epoch: int,
) -> Selection:
    """Choose exactly `count` patches per image to mask.

    Args:
        patches: (B, N, P) float, already augmented.
        keys: (B,) int64, one identity per image; masks depend on (seed, epoch, key) and the image alone.
        grid: patches per column and row, N = h * w.
        channels: of the image; P = channels * p * p.
    """
    b, n, _ = patches.shape
    noise = draw.uniform(keys, n, seed=seed, epoch=epoch, purpose=draw.MASK)
    if settings.background_filter:
        tissue = tissue_patches(patches, mean_above=settings.background_mean, std_above=settings.background_std)
    else:
        tissue = patches.new_ones(b, n, dtype=torch.bool)

    lesion = torch.zeros_like(tissue)
    fallback = torch.zeros(b, dtype=torch.bool, device=patches.device)
    priority = noise
    if settings.mode == "hard":
        lesion, found = _lesion_cluster(patches, tissue, keys, grid, channels, settings, seed, epoch)
        fallback = ~found
        lesion = lesion & found[:, None]
        priority = torch.where(found[:, None], _tiers(lesion, tissue, noise, settings.lesion_share) + noise, noise)
    elif settings.mode == "soft":
        score = patch_score(
            patches,
            tissue,
            grid,
            score=settings.score,
            sign=settings.lesion_sign,
            centre_prior=settings.centre_prior,
        )
        lesion = (score > 1) & tissue  # one SD above the image's mean: the probable lesion for CCL and the pictures
        priority = settings.strength * score - torch.log(-torch.log(noise))  # Gumbel-top-m; monotone in noise at 0
    order = priority.argsort(stable=True, dim=1, descending=True)
    return Selection(order[:, :count], order[:, count:], lesion, tissue, fallback)


def _lesion_cluster(
    patches: Tensor,
    tissue: Tensor,
    keys: Tensor,
    grid: tuple[int, int],
    channels: int,
    settings: SelectionSettings,
    seed: int,
    epoch: int,
) -> tuple[Tensor, Tensor]:
    """Patches of the cluster taken for the lesion (B, N) bool, and whether one was found (B,) bool."""
    x = cluster_features(patches, tissue, grid, channels, settings.features)
    k = settings.clusters
    seeds = draw.uniform(keys, 2 * k, seed=seed, epoch=epoch, purpose=draw.CLUSTER)
    clusters = kmeans(x, tissue, k, seeds[:, :k])
    chosen, found = name_lesion_cluster(
        settings.rule,
        clusters,
        x,
        tissue,
        patches.mean(-1),
        grid,
        seeds[:, k:],
        min_patches=settings.min_patches,
        max_share=settings.max_share,
    )
    return clusters.labels == chosen[:, None], found


def _tiers(lesion: Tensor, tissue: Tensor, noise: Tensor, lesion_share: float) -> Tensor:
    """Order of masking: chosen lesion patches (2), other tissue (1), border (0), lesion patches kept as hints (-1)."""
    tier = tissue.to(noise.dtype)
    rank = noise.masked_fill(~lesion, -torch.inf).argsort(stable=True, dim=1, descending=True).argsort(1)
    chosen = lesion & (rank < torch.floor(lesion_share * lesion.sum(1, keepdim=True)))
    return torch.where(lesion, torch.where(chosen, 2.0, -1.0), tier)


def selection_statistics(selection: Selection) -> dict[str, Tensor]:
    """Means over the batch: share of patches in the probable lesion, share of those masked, share of fallbacks."""
    lesion = selection.lesion.float()
    hit = lesion.gather(1, selection.masked).sum(1)
    size = lesion.sum(1)
    any_lesion = size > 0
    return {
        "lesion_cluster_share": lesion.mean(),
        "lesion_masked_share": (hit / size.clamp_min(1) * any_lesion).sum() / any_lesion.sum().clamp_min(1),
        "fallback_share": selection.fallback.float().mean(),
    }
