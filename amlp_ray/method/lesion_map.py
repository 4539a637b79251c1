"""Compute a lesion map: lesion, score and cluster id per patch, from which masks are sampled.

Analyzing an image costs more than sampling a mask. Whole images are therefore analyzed every
`selection.analysis_interval` epochs and their maps are cropped along with them.

Source: MPS of AMLP. Published is the unsupervised clustering into lesion and background, and in the
second version a probability of a lesion; the rest is our reconstruction.

Shapes: B images, N patches, P values per patch, D features, K clusters, h x w the patch grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amlp_ray.config import SelectionConfig
from amlp_ray.method import counter_rng
from amlp_ray.method.cluster_rules import choose_lesion_cluster
from amlp_ray.method.kmeans import Clusters, DatasetClusters, kmeans, log_membership
from amlp_ray.method.patch_features import cluster_features, dilate, tissue_mask
from amlp_ray.method.patch_scores import PATCH_SCORES, patch_score, z_score
from amlp_ray.method.patches import descending_ranks

LOG_FLOOR = -20.0  # of log probabilities; also the score of border patches


class LesionMap(NamedTuple):
    """Lesion, score and cluster of every patch, (B, N) floats each.

    Attributes:
        lesion: 1 in the probable lesion, else 0.
        score: rank order of the patches; the higher, the earlier it is masked. 0 where unused.
        cluster: cluster id, -1 off tissue or where unused.
    """

    lesion: Tensor
    score: Tensor
    cluster: Tensor

    @classmethod
    def empty(cls, patches: Tensor) -> LesionMap:
        """Return the map of patches (B, N, P) about which nothing is known."""
        zero = torch.zeros_like(patches[..., 0])
        return cls(zero, zero, zero - 1)

    @classmethod
    def from_images(cls, images: Tensor) -> LesionMap:
        """Return the map of images (B, 3, h, w); the inverse of `to_images`."""
        return cls(*images.flatten(2).unbind(1))

    def to_images(self, grid: tuple[int, int]) -> Tensor:
        """Return one image of three channels per image, (B, 3, h, w), to crop and to store."""
        return torch.stack(self, 1).unflatten(2, grid)


class TeacherView(NamedTuple):
    """Outputs of the teacher, an average of the model's weights; None where unused.

    Attributes:
        tokens: (B, N, D).
        attention: (B, N), attention of the class token to each patch.
        difficulty: (B, N), reconstruction error.
        category: (B, N), probability that a patch is a lesion (CCL).
    """

    tokens: Tensor | None = None
    attention: Tensor | None = None
    difficulty: Tensor | None = None
    category: Tensor | None = None


@torch.no_grad()
def locate_lesion(
    patches: Tensor,
    keys: Tensor,
    grid: tuple[int, int],
    channels: int,
    config: SelectionConfig,
    *,
    seed: int,
    epoch: int,
    teacher: TeacherView | None = None,
    feedback: float = 0.0,
    truth: Tensor | None = None,
    centroids: DatasetClusters | None = None,
    learn: bool = False,
) -> LesionMap:
    """Find the probable lesion and score every patch (B, N, P), all images in one pass.

    Args:
        keys: (B,) int64, identities. The map depends on (seed, epoch, key) and the image alone.
        teacher: None while warming up. Features are then raw, and rules that need it find nothing.
        feedback: share of the teacher's category in the lesion; see `selection.feedback`.
        truth: (B, N) lesion share per patch, for oracles.
        centroids: of the dataset, with `scope: dataset`; `learn` also updates them.
    """
    tissue = tissue_mask(patches, config)
    teacher = teacher or TeacherView()
    lesion = torch.zeros_like(tissue)
    score = torch.zeros_like(patches[..., 0])
    cluster = score - 1
    if config.uses_score and config.score != "cluster":
        named_score = _named_score(config.score, patches, tissue, grid, config, teacher, truth)
        score = score if named_score is None else named_score
    if config.uses_clusters:
        x = cluster_features(patches, tissue, grid, channels, config.features, teacher.tokens)
        clusters, rule_noise = _cluster(x, tissue, keys, config, seed, epoch, centroids, learn)
        chosen, is_found = choose_lesion_cluster(
            config,
            clusters,
            x,
            tissue,
            grid,
            brightness=patches.mean(-1),
            noise=rule_noise,
            score=_named_score(config.rule, patches, tissue, grid, config, teacher, truth),
            truth=truth,
        )
        lesion = (clusters.labels == chosen[:, None]) & is_found[:, None]
        cluster = clusters.labels.to(score.dtype)
        if config.score == "cluster" and config.mode in ("soft", "ranked"):
            log_probability = log_membership(x, clusters, chosen, config.temperature)
            score = torch.where(tissue, log_probability.clamp_min(LOG_FLOOR), LOG_FLOOR)
            score = torch.where(is_found[:, None], score, 0.0)
        elif feedback > 0 and teacher.category is not None:
            membership = log_membership(x, clusters, chosen, config.temperature).exp()
            probability = (1 - feedback) * membership + feedback * teacher.category
            lesion = _most_probable(lesion, tissue, probability)
    elif config.uses_score:
        lesion = (score > 1) & tissue  # one SD above the image's mean
    lesion = dilate(lesion, grid, config.dilate) & tissue
    return LesionMap(lesion.to(score.dtype), score, cluster)


def _named_score(
    name: str,
    patches: Tensor,
    tissue: Tensor,
    grid: tuple[int, int],
    config: SelectionConfig,
    teacher: TeacherView,
    truth: Tensor | None,
) -> Tensor | None:
    """Return the score of a setting `score` or `rule`, (B, N), standardized over tissue.

    None where the rule uses no score, or where the teacher has none yet.
    """
    if name in PATCH_SCORES:
        return patch_score(
            patches,
            tissue,
            grid,
            score=name,
            sign=config.lesion_sign,
            center_prior=config.center_prior,
        )
    values = {
        "difficulty": teacher.difficulty,
        "hardest": teacher.difficulty,
        "attention": teacher.attention,
        "oracle": truth,
    }
    value = values.get(name)
    return None if value is None else z_score(value.float(), tissue)


def _cluster(
    x: Tensor,
    tissue: Tensor,
    keys: Tensor,
    config: SelectionConfig,
    seed: int,
    epoch: int,
    centroids: DatasetClusters | None,
    learn: bool,
) -> tuple[Clusters, Tensor]:
    """Cluster features (B, N, D); also return uniform numbers (B, K) for the random rule."""
    k = config.clusters
    count = (config.n_init + 1) * k
    noise = counter_rng.uniform(keys, count, seed=seed, epoch=epoch, stream=counter_rng.CLUSTER)
    rule_noise = noise[:, :k]
    seeding_noise = noise[:, k:]
    if centroids is None:
        return kmeans(x, tissue, k, seeding_noise), rule_noise
    return centroids.assign(x, tissue, seeding_noise, learn=learn), rule_noise


def _most_probable(lesion: Tensor, tissue: Tensor, probability: Tensor) -> Tensor:
    """Return as many tissue patches as `lesion` (B, N) has, those of highest probability.

    The size of the lesion stays, its position moves. Source: our reconstruction of CCL's purpose,
    a categorization that is changed by reconstruction difficulty.
    """
    ranks = descending_ranks(probability.masked_fill(~tissue, -torch.inf))
    return ranks < lesion.sum(1, keepdim=True)
