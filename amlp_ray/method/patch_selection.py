"""MPS, masked patch selection: choose which patches of an image are masked.

Every mode computes one priority per patch; the m patches of highest priority are masked. Random
masking has uniform noise as priority, so a neutral setting of any mode gives the masks of plain MAE
to the bit.

Source: published is that probable lesions are masked first; the priorities of `hard` and `soft` are
our reconstruction.

Shapes: B images, N patches, m masked patches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amlp_ray.config import SelectionConfig
from amlp_ray.method import counter_rng
from amlp_ray.method.lesion_map import LesionMap
from amlp_ray.method.patches import descending_ranks

HINT_SHARE = 0.1  # of all patches, the most attended: among them `ranked` shows hints (AttMask)


class Selection(NamedTuple):
    """Masked and visible patches, and the reason.

    Attributes:
        masked: (B, m) patch indices.
        visible: (B, N - m) patch indices.
        lesion: (B, N) bool, the probable lesion.
        tissue: (B, N) bool, all but the black border.
        fallback: (B,) bool, images masked at random because no lesion was found.
    """

    masked: Tensor
    visible: Tensor
    lesion: Tensor
    tissue: Tensor
    fallback: Tensor

    def rows(self, images: slice) -> Selection:
        """Return the selection of some of the images."""
        return Selection(*(field[images] for field in self))


@torch.no_grad()
def select_patches(
    lesion_map: LesionMap,
    tissue: Tensor,
    keys: Tensor,
    count: int,
    config: SelectionConfig,
    *,
    seed: int,
    epoch: int,
    progress: float = 1.0,
    ratio_over: str = "all",
) -> Selection:
    """Choose exactly `count` patches per image to mask.

    - `hard`: lesion first, then other tissue, then border.
    - `soft`: sampled by exp(strength * score) without replacement (Gumbel-top-m, Kool et al. 2019).
    - `ranked`: the top scores first, the rest at random (HPM, AttMask).
    - `parts`: from a share of every cluster to whole clusters (SemMAE).
    - `random`: uniform (MAE).

    Args:
        tissue: (B, N) bool.
        keys: (B,) int64, identities. Masks depend on (seed, epoch, key) and the image alone.
        progress: share of training done, 0-1, for modes that change over it.
        ratio_over: `tissue` masks the same share of tissue as of border.
    """

    def uniform(count: int, stream: int) -> Tensor:
        return counter_rng.uniform(keys, count, seed=seed, epoch=epoch, stream=stream)

    n = tissue.shape[1]
    noise = uniform(n, counter_rng.MASK)
    lesion = (lesion_map.lesion > 0.5) & tissue & config.names_lesion
    fallback = torch.zeros_like(tissue[:, 0])
    if config.mode == "hard":
        fallback = ~lesion.any(1)
        tiers = _tiers(lesion, tissue, noise, config.lesion_share)
        priority = torch.where(fallback[:, None], noise, tiers + noise)
    elif config.mode == "soft":
        fallback = _is_constant(lesion_map.score)
        # Monotone in noise at strength 0, which therefore is random masking.
        gumbel = torch.log(-torch.log(noise))
        priority = config.strength * lesion_map.score - gumbel
    elif config.mode == "ranked":
        fallback = _is_constant(lesion_map.score)
        start = config.score_share_start
        share = start + (config.score_share_end - start) * progress
        may_be_hint = uniform(n, counter_rng.HINT) > config.lesion_share
        priority = _top_scores_first(lesion_map.score, noise, may_be_hint, int(share * count))
    elif config.mode == "parts":
        fallback = (lesion_map.cluster < 0).all(1)
        cluster_noise = uniform(config.clusters, counter_rng.PART)
        order = _cluster_order(lesion_map.cluster, cluster_noise, noise, 1 - progress**2)
        priority = torch.where(fallback[:, None], noise, -order)
    else:
        priority = noise
    if ratio_over == "tissue":
        priority = _same_share_of_tissue(priority, tissue, count)
    order = priority.argsort(stable=True, dim=1, descending=True)
    return Selection(order[:, :count], order[:, count:], lesion, tissue, fallback)


def _is_constant(score: Tensor) -> Tensor:
    """Return which images (B,) have equal scores (B, N), so that they are masked at random."""
    return score.amax(1) == score.amin(1)


def _tiers(lesion: Tensor, tissue: Tensor, noise: Tensor, lesion_share: float) -> Tensor:
    """Return tiers (B, N): a share of the lesion 2, other tissue 1, border 0, hints -1.

    Hints are the lesion patches that are to stay visible.
    """
    rank_in_lesion = descending_ranks(noise.masked_fill(~lesion, -1.0))
    quota = torch.floor(lesion_share * lesion.sum(1, keepdim=True))
    is_masked_first = lesion & (rank_in_lesion < quota)
    lesion_tier = torch.where(is_masked_first, 2.0, -1.0)
    return torch.where(lesion, lesion_tier, tissue.to(noise.dtype))


def _top_scores_first(score: Tensor, noise: Tensor, may_be_hint: Tensor, count: int) -> Tensor:
    """Return priorities (B, N): the top `count` by score first, the rest at random.

    Of the very top, those that `may_be_hint` are shown. Equal scores are ordered by noise, so that
    a score that is constant masks at random.

    Source: the top share after HPM (Wang et al. 2023), the hints after AttMask (Kakogeorgiou et al.
    2022).
    """
    order = noise.argsort(dim=1, descending=True)
    by_score = score.gather(1, order).argsort(stable=True, dim=1, descending=True)
    rank = order.gather(1, by_score).argsort(1)
    is_top = rank < count
    is_hint = is_top & (rank < HINT_SHARE * rank.shape[1]) & may_be_hint
    return torch.where(is_hint, -1.0, is_top.to(noise.dtype)) + noise


def _cluster_order(cluster: Tensor, cluster_noise: Tensor, noise: Tensor, within: float) -> Tensor:
    """Return the order of masking (B, N), 0 first, between two extremes.

    With `within` 1 it is a patch's position inside its own cluster: every cluster loses the same
    share. With 0 it is the position when clusters are masked whole, in random order. The black
    border (-1 in `cluster`) counts as one more cluster.

    Source: SemMAE (Li et al. 2022), with our clusters in place of learned parts.
    """
    b, n = cluster.shape
    border_noise = cluster_noise.new_full((b, 1), 2.0)  # so that the border comes last
    cluster_noise = torch.cat([border_noise, cluster_noise], 1)
    turn = descending_ranks(-cluster_noise).gather(1, cluster.long() + 1)  # (B, N)
    whole_clusters = descending_ranks(-(turn + noise) if within < 1 else noise).to(noise.dtype)
    is_same = cluster[:, :, None] == cluster[:, None]  # (B, N, N)
    is_earlier = noise[:, None] > noise[:, :, None]
    position = (is_same & is_earlier).sum(2)  # inside its cluster
    share = within * (position + noise) / is_same.sum(2)
    return share + (1 - within) * whole_clusters / n


def _same_share_of_tissue(priority: Tensor, tissue: Tensor, count: int) -> Tensor:
    """Reorder so that the first `count` hold the same share of tissue as of border.

    Within tissue and within border the given priority (B, N) decides.
    """
    n = tissue.shape[1]
    quota = torch.round(tissue.sum(1, keepdim=True) * (count / n))
    is_first = tissue & (descending_ranks(priority.masked_fill(~tissue, -torch.inf)) < quota)
    order = -descending_ranks(priority).to(torch.float32)
    return order + 2.0 * n * is_first + 1.0 * n * ~tissue


def selection_statistics(selection: Selection) -> dict[str, Tensor]:
    """Compute scalar metrics of a batch.

    - `lesion_cluster_share`: share of patches in the probable lesion.
    - `lesion_masked_share`, `tissue_masked_share`: share of the lesion and of tissue that is
      masked, mean over images that have any.
    - `fallback_share`: share of images masked at random.
    """
    lesion = selection.lesion.float()
    tissue = selection.tissue.float()

    def masked_share(where: Tensor) -> Tensor:
        size = where.sum(1)
        masked = where.gather(1, selection.masked).sum(1)
        return (masked / size.clamp_min(1)).sum() / (size > 0).sum().clamp_min(1)

    return {
        "lesion_cluster_share": lesion.mean(),
        "lesion_masked_share": masked_share(lesion),
        "tissue_masked_share": masked_share(tissue),
        "fallback_share": selection.fallback.float().mean(),
    }
