"""Where the mask is aimed: what is thought of every patch before a mask is drawn.

Looking at an image costs more than drawing a mask, so whole images are looked at every `selection.analysis_interval` epochs, and
what was found is cropped along with them. Steps in between pay for a crop of three small maps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amlp_ray.config import SelectionConfig
from amlp_ray.method import counter_rng
from amlp_ray.method.cluster_rules import name_lesion_cluster
from amlp_ray.method.kmeans import Clusters, DatasetClusters, kmeans, membership
from amlp_ray.method.patch_features import cluster_features, dilated, tissue_of
from amlp_ray.method.patch_scores import PATCH_SCORES, patch_score, z_score


class LesionMap(NamedTuple):
    """What is thought of every patch; all (B, N).

    `lesion` is 1 in the probable lesion, else 0. `score` ranks patches, higher is masked first. `part` is the cluster,
    -1 off tissue. Where a setting does not use one of them it is 0 (`part`: -1).
    """

    lesion: Tensor
    score: Tensor
    part: Tensor

    def maps(self, grid: tuple[int, int]) -> Tensor:
        """One image of three channels per image, (B, 3, h, w), to crop and to keep."""
        return torch.stack(self, 1).unflatten(2, grid)

    @classmethod
    def of(cls, maps: Tensor) -> LesionMap:
        """The inverse of `maps`."""
        return cls(*maps.flatten(2).unbind(1))


class TeacherView(NamedTuple):
    """What the teacher, a moving average of the model, sees in a batch; None where a setting does not ask for it.

    `tokens` (B, N, D); `attention`, `difficulty` and `category` (B, N).
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
    """Look at patches (B, N, P): find the probable lesion and score every patch, all images in one pass.

    Args:
        keys: (B,) int64, one identity per image; what is found depends on (seed, epoch, key) and the image alone.
        teacher: None while warming up: features are then raw, and rules that ask it find nothing.
        feedback: share of the teacher's category in what counts as lesion; see `settings.feedback`.
        truth: (B, N) lesion share of every patch, for oracles.
        centroids: of the data set, with `scope: dataset`; they take in what they see where `learn` is set.
    """
    tissue = tissue_of(patches, config)
    teacher = teacher or TeacherView()
    lesion = torch.zeros_like(tissue)
    score = torch.zeros_like(patches[..., 0])
    part = score - 1
    if config.uses_score and config.score != "cluster":
        asked = _score(config.score, patches, tissue, grid, config, teacher, truth)
        score = score if asked is None else asked
    if config.uses_clusters:
        x = cluster_features(patches, tissue, grid, channels, config.features, teacher.tokens)
        clusters, rule_noise = _clusters(x, tissue, keys, config, seed, epoch, centroids, learn)
        chosen, found = name_lesion_cluster(
            config,
            clusters,
            x,
            tissue,
            grid,
            brightness=patches.mean(-1),
            noise=rule_noise,
            score=_score(config.rule, patches, tissue, grid, config, teacher, truth),
            truth=truth,
        )
        lesion = (clusters.labels == chosen[:, None]) & found[:, None]
        part = clusters.labels.to(score.dtype)
        if config.score == "cluster" and config.mode in ("soft", "ranked"):
            log = membership(x, clusters, chosen, config.temperature).clamp_min(-20)
            score = torch.where(found[:, None], torch.where(tissue, log, -20.0), 0.0)
        elif feedback > 0 and teacher.category is not None:
            probability = membership(x, clusters, chosen, config.temperature).exp()
            lesion = _corrected(
                lesion, tissue, (1 - feedback) * probability + feedback * teacher.category
            )
    elif config.uses_score:
        lesion = (score > 1) & tissue  # one SD above the image's mean
    lesion = dilated(lesion, grid, config.dilate) & tissue
    return LesionMap(lesion.to(score.dtype), score, part)


def _score(
    name: str,
    patches: Tensor,
    tissue: Tensor,
    grid: tuple[int, int],
    config: SelectionConfig,
    teacher: TeacherView,
    truth: Tensor | None,
) -> Tensor | None:
    """The score `name`, or that of the rule `name`, standardised over tissue; None where there is none (yet)."""
    if name in PATCH_SCORES:
        sign, prior = config.lesion_sign, config.center_prior
        return patch_score(patches, tissue, grid, score=name, sign=sign, center_prior=prior)
    told = {
        "difficulty": teacher.difficulty,
        "hardest": teacher.difficulty,
        "attention": teacher.attention,
        "oracle": truth,
    }
    value = told.get(name)
    return None if value is None else z_score(value.float(), tissue)


def _clusters(
    x: Tensor,
    tissue: Tensor,
    keys: Tensor,
    config: SelectionConfig,
    seed: int,
    epoch: int,
    centroids: DatasetClusters | None,
    learn: bool,
) -> tuple[Clusters, Tensor]:
    """Clusters of the patches, and (B, K) uniform numbers for a random rule."""
    k = config.clusters
    noise = counter_rng.uniform(
        keys, (config.n_init + 1) * k, seed=seed, epoch=epoch, stream=counter_rng.CLUSTER
    )
    if centroids is None:
        return kmeans(x, tissue, k, noise[:, k:]), noise[:, :k]
    return centroids.assign(x, tissue, noise[:, k:], learn=learn), noise[:, :k]


def _corrected(lesion: Tensor, tissue: Tensor, probability: Tensor) -> Tensor:
    """As many patches as the cluster has, those of highest probability: the share of the lesion stays, its place moves.

    Our reconstruction of CCL's purpose: categorisation is changed by reconstruction difficulty.
    """
    rank = (
        probability.masked_fill(~tissue, -torch.inf)
        .argsort(stable=True, dim=1, descending=True)
        .argsort(1)
    )
    return rank < lesion.sum(1, keepdim=True)
