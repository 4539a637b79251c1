"""MPS, masked patch selection: which patches of an image are masked.

Every mode turns into one priority per patch; the m patches of highest priority are masked. Random masking is the
priority `noise`, so a neutral setting of any mode gives the masks of plain MAE to the bit.
Published: unsupervised clustering into lesion and background. All else is our reconstruction, or a relative's rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amlp_ray.config import SelectionConfig
from amlp_ray.method import counter_rng
from amlp_ray.method.lesion_map import LesionMap

HINTED = (
    0.1  # share of all patches, the most attended ones, among which `ranked` shows hints (AttMask)
)


class Selection(NamedTuple):
    """What is masked, and why.

    `masked` (B, m) and `visible` (B, N - m) are patch indices. `lesion` (B, N) bool is the probable lesion, `tissue`
    (B, N) bool all but the black border, `fallback` (B,) bool the images masked at random because nothing was found.
    """

    masked: Tensor
    visible: Tensor
    lesion: Tensor
    tissue: Tensor
    fallback: Tensor

    def rows(self, some: slice) -> Selection:
        """Of some of the images."""
        return Selection(*(field[some] for field in self))


@torch.no_grad()
def select_patches(
    aim: LesionMap,
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

    Args:
        aim: what is thought of every patch. tissue: (B, N) bool.
        keys: (B,) int64, one identity per image; masks depend on (seed, epoch, key) and the image alone.
        progress: share of training done, for modes that change over it.
        ratio_over: `tissue` masks as great a share of the tissue as of the border.
    """
    b, n = tissue.shape
    noise = counter_rng.uniform(keys, n, seed=seed, epoch=epoch, stream=counter_rng.MASK)
    lesion = (aim.lesion > 0.5) & tissue & config.names_lesion
    fallback = torch.zeros(b, dtype=torch.bool, device=tissue.device)
    if config.mode == "hard":
        fallback = ~lesion.any(1)
        priority = torch.where(
            fallback[:, None], noise, _tiers(lesion, tissue, noise, config.lesion_share) + noise
        )
    elif config.mode == "soft":
        fallback = _says_nothing(aim.score)
        priority = config.strength * aim.score - torch.log(
            -torch.log(noise)
        )  # Gumbel-top-m; monotone in noise at 0
    elif config.mode == "ranked":
        fallback = _says_nothing(aim.score)
        share = config.aim_start + (config.aim_end - config.aim_start) * progress
        hints = counter_rng.uniform(keys, n, seed=seed, epoch=epoch, stream=counter_rng.HINT)
        priority = _ranked(aim.score, noise, hints, count, share, config.lesion_share)
    elif config.mode == "parts":
        fallback = (aim.part < 0).all(1)
        order = counter_rng.uniform(
            keys, config.clusters, seed=seed, epoch=epoch, stream=counter_rng.PART
        )
        priority = torch.where(
            fallback[:, None], noise, -_part_order(aim.part, order, noise, 1 - progress**2)
        )
    else:
        priority = noise
    if ratio_over == "tissue":
        priority = _share_of_tissue(priority, tissue, count)
    ranked = priority.argsort(stable=True, dim=1, descending=True)
    return Selection(ranked[:, :count], ranked[:, count:], lesion, tissue, fallback)


def _says_nothing(score: Tensor) -> Tensor:
    """Images (B,) whose patches all have the same score, so that they are masked at random."""
    return score.amax(1) == score.amin(1)


def _rank(values: Tensor) -> Tensor:
    """Place of each value in its row, 0 for the highest."""
    return values.argsort(stable=True, dim=1, descending=True).argsort(1)


def _tiers(lesion: Tensor, tissue: Tensor, noise: Tensor, lesion_share: float) -> Tensor:
    """Order of masking: chosen lesion patches (2), other tissue (1), border (0), lesion patches kept as hints (-1)."""
    tier = tissue.to(noise.dtype)
    chosen = lesion & (
        _rank(noise.masked_fill(~lesion, -1.0))
        < torch.floor(lesion_share * lesion.sum(1, keepdim=True))
    )
    return torch.where(lesion, torch.where(chosen, 2.0, -1.0), tier)


def _ranked(
    score: Tensor, noise: Tensor, hints: Tensor, count: int, share: float, lesion_share: float
) -> Tensor:
    """The top `share` of `count` by score first, the rest at random (HPM); of the very top some are shown (AttMask).

    Equal scores are ordered by noise, so that a score that says nothing masks at random.
    """
    rank = noise.argsort(dim=1, descending=True)
    rank = rank.gather(
        1, score.gather(1, rank).argsort(stable=True, dim=1, descending=True)
    ).argsort(1)
    top = rank < int(share * count)
    hinted = top & (rank < HINTED * rank.shape[1]) & (hints > lesion_share)
    return torch.where(hinted, -1.0, top.to(noise.dtype)) + noise


def _part_order(part: Tensor, part_noise: Tensor, noise: Tensor, within: float) -> Tensor:
    """Order of masking (B, N), 0 first, between two extremes: SemMAE (Li et al. 2022).

    With `within` 1, a patch's place inside its own part: every part loses the same share. With 0, its place when parts
    are taken whole, one after the other in random order. The black border counts as one more part.
    """
    b, n = part.shape
    part_noise = torch.cat(
        [part_noise.new_full((b, 1), 2.0), part_noise], 1
    )  # the border comes last
    turn = _rank(-part_noise).gather(1, part.long() + 1)  # (B, N)
    whole = _rank(-(turn + noise) if within < 1 else noise).to(noise.dtype)
    same = part[:, :, None] == part[:, None]  # (B, N, N)
    place = (same & (noise[:, None] > noise[:, :, None])).sum(
        2
    )  # patches of the part that come earlier
    return within * (place + noise) / same.sum(2) + (1 - within) * whole / n


def _share_of_tissue(priority: Tensor, tissue: Tensor, count: int) -> Tensor:
    """Re-order so that the first `count` hold the same share of tissue as of border, each by its own priority."""
    n = tissue.shape[1]
    quota = torch.round(tissue.sum(1, keepdim=True) * (count / n))
    first = tissue & (_rank(priority.masked_fill(~tissue, -torch.inf)) < quota)
    order = -_rank(priority).to(torch.float32)
    return order + 2.0 * n * first + 1.0 * n * ~tissue


def selection_statistics(selection: Selection) -> dict[str, Tensor]:
    """Means over the batch: share of patches in the probable lesion, shares of it and of tissue that are masked,
    share of fallbacks."""
    lesion, tissue = selection.lesion.float(), selection.tissue.float()

    def masked_share(where: Tensor) -> Tensor:
        size = where.sum(1)
        hit = where.gather(1, selection.masked).sum(1)
        return (hit / size.clamp_min(1)).sum() / (size > 0).sum().clamp_min(1)

    return {
        "lesion_cluster_share": lesion.mean(),
        "lesion_masked_share": masked_share(lesion),
        "tissue_masked_share": masked_share(tissue),
        "fallback_share": selection.fallback.float().mean(),
    }
