"""Rules that choose one cluster as the probable lesion.

No rule is right by construction: which cluster holds the lesion is not identifiable without a
prior. The rule is therefore a searched, logged setting.
"""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from amlp_ray.config import PatchScore, SelectionConfig
from amlp_ray.method.kmeans import Clusters
from amlp_ray.method.patch_features import center_distance


def choose_lesion_cluster(
    config: SelectionConfig,
    clusters: Clusters,
    x: Tensor,
    inside: Tensor,
    grid: tuple[int, int],
    *,
    brightness: Tensor,
    noise: Tensor,
    score: Tensor | None = None,
    truth: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the cluster of highest merit under `config.rule`.

    Only clusters of at least `min_patches` and at most `max_share` of the tissue qualify: smaller
    ones are outliers, larger ones are tissue.

    Args:
        x: (B, N, D), the clustered features.
        inside: (B, N) bool, the tissue, which was clustered; `clusters.labels` is -1 elsewhere.
        brightness: (B, N), mean of the normalized values of a patch, over channels.
        noise: (B, K), uniform numbers for `random`.
        score: (B, N), the patch score that the rule names, or the teacher's error.
        truth: (B, N), lesion share per patch, needed by `oracle`.

    Returns:
        Index of the cluster (B,) and whether any qualified (B,) bool.
    """
    merit = _merit(config.rule, clusters, x, inside, grid, brightness, noise, score, truth)
    largest = config.max_share * inside.sum(1, keepdim=True)
    qualifies = (clusters.sizes >= config.min_patches) & (clusters.sizes <= largest)
    if config.rule == "oracle":
        qualifies &= merit > 0
    merit = merit.masked_fill(~qualifies, -torch.inf)
    return merit.argmax(1), merit.isfinite().any(1)


def _merit(
    rule: str,
    clusters: Clusters,
    x: Tensor,
    inside: Tensor,
    grid: tuple[int, int],
    brightness: Tensor,
    noise: Tensor,
    score: Tensor | None,
    truth: Tensor | None,
) -> Tensor:
    """Return the merit of every cluster, (B, K).

    A merit of -inf means that a cluster cannot be the lesion. An image without a finite merit is
    masked at random, as all are while a rule has no score yet.

    - `smallest`: fewest patches (MPS of AMLP).
    - `distinct`: center farthest from the mean of all tissue.
    - `most_central`: patches nearest to the image center.
    - `darkest`, `brightest`: by mean brightness.
    - a patch score by name (see `patch_scores.py`), or `hardest`, the error of the teacher: highest
      mean.
    - `oracle`: best F1 against the true lesion patches, for diagnosis only.
    - `random`: the control.
    """
    one_hot = F.one_hot(clusters.labels.clamp_min(0), clusters.sizes.shape[1])
    one_hot = one_hot * inside[..., None]  # (B, N, K)
    sizes = clusters.sizes.to(x.dtype)

    def cluster_mean(values: Tensor) -> Tensor:
        return (one_hot * values[..., None]).sum(1) / sizes.clamp_min(1)

    if rule == "smallest":
        return -clusters.counts.to(x.dtype)
    if rule == "distinct":
        tissue_sum = (x * inside[..., None]).sum(1, keepdim=True)
        tissue_mean = tissue_sum / inside.sum(1)[:, None, None].clamp_min(1)
        return (clusters.centers - tissue_mean).square().sum(-1)
    if rule == "most_central":
        return -cluster_mean(center_distance(grid, x.device).expand(x.shape[0], -1))
    if rule == "darkest":
        return -cluster_mean(brightness)
    if rule == "brightest":
        return cluster_mean(brightness)
    if rule == "oracle":
        assert truth is not None
        lesion = true_lesion_patches(truth)
        hits = (one_hot * lesion[..., None]).sum(1)
        return 2 * hits / (sizes + lesion.sum(1, keepdim=True)).clamp_min(1)
    if rule == "random":
        return noise
    assert rule == "hardest" or rule in get_args(PatchScore), rule
    if score is None:
        return torch.full_like(sizes, -torch.inf)
    return cluster_mean(score)


def true_lesion_patches(share: Tensor) -> Tensor:
    """Return which patches count as lesion, (B, N) bool, from their lesion share (B, N).

    Those with a share of a quarter or more. In an image without any: all that the lesion touches.
    """
    quarter = share >= 0.25
    return torch.where(quarter.any(1, keepdim=True), quarter, share > 0)
