"""Features of patches, batched k-means per image, and the rules that name one cluster the lesion.

No rule is right by construction: which cluster holds the lesion is not identifiable without a prior.
The rule is therefore a searched, logged setting.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amlp_ray.method.patches import standardise


def cluster_features(patches: Tensor, tissue: Tensor, grid: tuple[int, int], channels: int, kind: str) -> Tensor:
    """Describe patches (B, N, P) for clustering, standardised per image over `tissue`.

    - `raw`: the pixels, (B, N, P), one mean and SD per image, so that contrast between patches is kept.
    - `stats`: mean, SD and mean absolute gradient per channel, (B, N, 3 C).
    - `context`: mean, its 5x5 neighbourhood mean, their difference, and SD, (B, N, 4).
    """
    if kind == "raw":
        b, n, values = patches.shape
        inside = tissue[..., None].expand(-1, -1, values).reshape(b, n * values)
        return standardise(patches.reshape(b, n * values, 1), inside).reshape(b, n, values)
    if kind == "stats":
        side = math.isqrt(patches.shape[-1] // channels)
        pixels = patches.unflatten(-1, (channels, side, side))
        gradient = (pixels.diff(dim=-1).abs().mean((-2, -1)) + pixels.diff(dim=-2).abs().mean((-2, -1))) / 2
        return standardise(torch.cat([pixels.mean((-2, -1)), pixels.std((-2, -1), correction=0), gradient], -1), tissue)
    mean, std = patches.mean(-1), patches.std(-1, correction=0)
    around = neighbourhood_mean(mean, grid, 5)
    return standardise(torch.stack([mean, around, mean - around, std], -1), tissue)


def neighbourhood_mean(values: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Average values (B, N) over `side` x `side` patches; at the border over those that exist."""
    image = values.reshape(-1, 1, *grid)
    return F.avg_pool2d(image, side, 1, side // 2, count_include_pad=False).reshape(values.shape)


class Clusters(NamedTuple):
    """Result of `kmeans`: `labels` (B, N), -1 off tissue; `centres` (B, K, D); `sizes` (B, K) in patches."""

    labels: Tensor
    centres: Tensor
    sizes: Tensor


def kmeans(x: Tensor, inside: Tensor, clusters: int, noise: Tensor, *, iterations: int = 10) -> Clusters:
    """Cluster the patches `inside` (B, N) of every image on its own, all images in one batched pass.

    Args:
        x: (B, N, D) features.
        noise: (B, clusters) uniform numbers for the k-means++ seeding; equal noise gives equal clusters.

    An image with fewer than `clusters` distinct patches leaves clusters empty (size 0).
    Source: Lloyd's algorithm with k-means++ seeding (Arthur and Vassilvitskii 2007).
    """
    centres = _seed_centres(x, inside, clusters, noise)
    norms = x.square().sum(-1, keepdim=True)  # (B, N, 1)
    weight = inside.to(x.dtype)
    for _ in range(iterations):
        member = F.one_hot(_distances(x, norms, centres).argmin(-1), clusters) * weight[..., None]  # (B, N, K)
        sizes = member.sum(1)  # (B, K)
        means = member.mT @ x / sizes[..., None].clamp_min(1)
        centres = torch.where(sizes[..., None] > 0, means, centres)  # an emptied cluster keeps its centre
    nearest = _distances(x, norms, centres).argmin(-1)
    sizes = (F.one_hot(nearest, clusters) * inside[..., None]).sum(1)
    return Clusters(nearest.masked_fill(~inside, -1), centres, sizes)


def _distances(x: Tensor, norms: Tensor, centres: Tensor) -> Tensor:
    """Squared distances (B, N, K) as |x|^2 - 2xc + |c|^2: a matrix product, twice as fast as `cdist`."""
    return norms - 2 * x @ centres.mT + centres.square().sum(-1)[:, None]


def _seed_centres(x: Tensor, inside: Tensor, clusters: int, noise: Tensor) -> Tensor:
    weight = inside.to(x.dtype)
    closest = weight  # the first centre is uniform over tissue
    centres: list[Tensor] = []
    for k in range(clusters):
        total = closest.cumsum(1)
        # The last patch whose cumulative weight does not reach the draw; clamped where all weight is zero.
        chosen = (total < noise[:, k : k + 1] * total[:, -1:]).sum(1).clamp_max(x.shape[1] - 1)
        centre = x.gather(1, chosen[:, None, None].expand(-1, 1, x.shape[2]))  # (B, 1, D)
        centres.append(centre)
        distance = (x - centre).square().sum(-1) * weight
        closest = distance if k == 0 else torch.minimum(closest, distance)
    return torch.cat(centres, 1)


def name_lesion_cluster(
    rule: str,
    clusters: Clusters,
    x: Tensor,
    inside: Tensor,
    brightness: Tensor,
    grid: tuple[int, int],
    noise: Tensor,
    *,
    min_patches: int,
    max_share: float,
) -> tuple[Tensor, Tensor]:
    """Choose the cluster that is taken for the lesion.

    Only clusters of at least `min_patches` and at most `max_share` of the tissue qualify: smaller ones are outliers,
    larger ones tissue.

    - `smallest`: fewest patches. `distinct`: centre farthest from the mean of all tissue.
    - `most_central`: patches nearest to the image centre. `darkest`, `brightest`: by mean brightness.
    - `random`: the control.

    Args:
        brightness: (B, N) mean value per patch.
        noise: (B, K) uniform numbers for `random`.

    Returns:
        Index of the cluster (B,) and whether any qualified (B,) bool.
    """
    member = F.one_hot(clusters.labels.clamp_min(0), clusters.sizes.shape[1]) * inside[..., None]  # (B, N, K)
    sizes = clusters.sizes.to(x.dtype)

    def mean_of(values: Tensor) -> Tensor:
        return (member * values[..., None]).sum(1) / sizes.clamp_min(1)

    if rule == "smallest":
        score = -sizes
    elif rule == "distinct":
        tissue_mean = (x * inside[..., None]).sum(1, keepdim=True) / inside.sum(1)[:, None, None].clamp_min(1)
        score = (clusters.centres - tissue_mean).square().sum(-1)
    elif rule == "most_central":
        score = -mean_of(centre_distance(grid, x.device).expand(x.shape[0], -1))
    elif rule in ("darkest", "brightest"):
        score = mean_of(brightness) * (1 if rule == "brightest" else -1)
    else:
        score = noise
    tissue = inside.sum(1, keepdim=True)
    qualifies = (sizes >= min_patches) & (sizes <= max_share * tissue)
    return score.masked_fill(~qualifies, -torch.inf).argmax(1), qualifies.any(1)


def centre_distance(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Distance of every patch from the image centre in half sides, (N,): 1 is the middle of an edge."""
    h, w = grid
    y = (torch.arange(h, device=device) + 0.5) / h * 2 - 1
    x = (torch.arange(w, device=device) + 0.5) / w * 2 - 1
    return (y[:, None].square() + x.square()).sqrt().flatten()
