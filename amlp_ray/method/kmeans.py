"""Batched k-means: every image of a batch on its own, or all images of a dataset together.

Shapes: B images, N patches, D features per patch, S starts, K clusters.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amlp_ray.utils.distributed import broadcast_tensors_from_rank0, gather_rows, sum_over_workers

ITERATIONS = 20


class Clusters(NamedTuple):
    """Patches by cluster.

    Attributes:
        labels: (B, N) int64, -1 off tissue.
        centers: (B, K, D).
        sizes: (B, K), patches of the image per cluster.
        inertia: (B,), sum of squared distances to the own center.
        counts: (B, K), the size by which clusters are compared: patches of the image, or of the
            whole dataset.
    """

    labels: Tensor
    centers: Tensor
    sizes: Tensor
    inertia: Tensor
    counts: Tensor


def kmeans(x: Tensor, inside: Tensor, clusters: int, noise: Tensor) -> Clusters:
    """Cluster the patches of every image on its own, all images and starts in one batched pass.

    An image with fewer than `clusters` distinct patches leaves clusters empty (size 0).

    Args:
        x: (B, N, D) features.
        inside: (B, N) bool, the patches to cluster.
        noise: (B, S * K) uniform numbers for the seeding of S starts, of which the one of least
            inertia is returned. Equal noise gives equal clusters.

    Source: Lloyd's algorithm with k-means++ seeding (Arthur and Vassilvitskii 2007), as in
    scikit-learn.
    """
    b, _, d = x.shape
    starts = noise.shape[1] // clusters
    norms = x.square().sum(-1)  # (B, N)
    weight = inside.to(x.dtype)
    centers = _seed_centers(x, norms, weight, noise.reshape(b, starts, clusters))  # (B, S, K, D)
    for _ in range(ITERATIONS):
        nearest = _squared_distances(x, norms, centers).argmin(-1)  # (B, N, S)
        one_hot = F.one_hot(nearest, clusters) * weight[..., None, None]  # (B, N, S, K)
        sizes = one_hot.sum(1)[..., None]  # (B, S, K, 1)
        sums = (one_hot.flatten(2).mT @ x).reshape(b, starts, clusters, d)
        # A cluster that lost all its patches keeps its center.
        centers = torch.where(sizes > 0, sums / sizes.clamp_min(1), centers)
    distance = _squared_distances(x, norms, centers).amin(-1)  # (B, N, S)
    inertia = (distance * weight[..., None]).sum(1)  # (B, S)
    best_start = inertia.argmin(1)
    return assign(x, inside, centers[torch.arange(b, device=x.device), best_start])


def assign(x: Tensor, inside: Tensor, centers: Tensor) -> Clusters:
    """Assign every patch `inside` (B, N) of x (B, N, D) to the nearest of its centers (B, K, D)."""
    distances = _squared_distances(x, x.square().sum(-1), centers[:, None])[:, :, 0]
    nearest_distance, nearest = distances.min(-1)
    sizes = (F.one_hot(nearest, centers.shape[1]) * inside[..., None]).sum(1)
    inertia = (nearest_distance * inside).sum(1)
    return Clusters(nearest.masked_fill(~inside, -1), centers, sizes, inertia, sizes)


def log_membership(x: Tensor, clusters: Clusters, chosen: Tensor, temperature: float) -> Tensor:
    """Return the log probability (B, N) that a patch belongs to the cluster `chosen` (B,).

    Log softmax over clusters of -|x - center|^2 / (temperature * s), where s is the mean squared
    distance of the image's patches to their own center. Source: our reconstruction.
    """
    distance = _squared_distances(x, x.square().sum(-1), clusters.centers[:, None])[:, :, 0]
    patches = (clusters.labels >= 0).sum(1).clamp_min(1)
    spread = (clusters.inertia / patches).clamp_min(1e-6)[:, None, None]
    log_probability = torch.log_softmax(-distance / (temperature * spread), -1)  # (B, N, K)
    index = chosen[:, None, None].expand(-1, x.shape[1], 1)
    return log_probability.gather(2, index)[..., 0]


def _squared_distances(x: Tensor, norms: Tensor, centers: Tensor) -> Tensor:
    """Return squared distances (B, N, S, K) of x (B, N, D) to centers (B, S, K, D).

    Computed as |x|^2 - 2xc + |c|^2: a matrix product is twice as fast as `cdist`. Values below
    the rounding error of that difference count as 0.
    """
    b, s, k, _ = centers.shape
    product = (x @ centers.flatten(1, 2).mT).reshape(b, x.shape[1], s, k)
    center_norms = centers.square().sum(-1)[:, None]  # (B, 1, S, K)
    norms = norms[..., None, None]
    distance = norms - 2 * product + center_norms
    return torch.where(distance > 1e-6 * (norms + center_norms), distance, 0.0)


def _seed_centers(x: Tensor, norms: Tensor, weight: Tensor, noise: Tensor) -> Tensor:
    """Return k-means++ seeds (B, S, K, D) for every start; `noise` (B, S, K) is uniform."""
    _, starts, clusters = noise.shape
    # The first center is drawn uniformly over tissue.
    closest = weight[:, None].expand(-1, starts, -1)  # (B, S, N)
    centers: list[Tensor] = []
    for k in range(clusters):
        cumulative = closest.cumsum(-1)
        threshold = noise[..., k : k + 1] * cumulative[..., -1:]
        # Inverse transform sampling. Where all weight is zero, the clamp keeps the index valid.
        index = (cumulative < threshold).sum(-1).clamp_max(x.shape[1] - 1)  # (B, S)
        center = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))  # (B, S, D)
        centers.append(center)
        distance = _squared_distances(x, norms, center[:, :, None])[..., 0].mT  # (B, S, N)
        distance = distance * weight[:, None]
        closest = distance if k == 0 else torch.minimum(closest, distance)
    return torch.stack(centers, 2)


class DatasetClusters(nn.Module):
    """Centroids of a whole dataset, updated from batch to batch; saved with the model.

    Each centroid is the running mean of all patches that it was nearest to. The very first batch
    seeds the centroids. During one analysis of the data, patches are assigned to the centroids and
    clusters are compared by the counts as they stood when that analysis began (`commit`). So
    neither the order of later batches nor a resume changes the clusters that are found.
    Workers share their sums and so hold the same centroids.

    Buffers: `centers`, `running_centers` (K, D); `sizes`, `counts` (K,).

    Source: mini-batch k-means (Sculley 2010).
    """

    def __init__(self, clusters: int, dimensions: int) -> None:
        super().__init__()
        self.centers: Tensor
        self.sizes: Tensor
        self.running_centers: Tensor
        self.counts: Tensor
        self.register_buffer("centers", torch.zeros(clusters, dimensions))
        self.register_buffer("sizes", torch.zeros(clusters))
        self.register_buffer("running_centers", torch.zeros(clusters, dimensions))
        self.register_buffer("counts", torch.zeros(clusters))

    def commit(self) -> None:
        """Begin an analysis: what the last one learned is used from now on."""
        self.centers.copy_(self.running_centers)
        self.sizes.copy_(self.counts)

    @torch.no_grad()
    def assign(self, x: Tensor, inside: Tensor, noise: Tensor, *, learn: bool) -> Clusters:
        """Assign the patches of a batch to the committed centroids.

        Args:
            x: (B, N, D) features.
            inside: (B, N) bool, the patches to cluster.
            noise: (B, S * K) uniform, as for `kmeans`. Its first row seeds the very first batch.
            learn: also update the running centroids.
        """
        # Analyses are rare, and so is this wait for the device.
        if not self.centers.any():
            self._seed(x, inside, noise)
        clusters = assign(x, inside, self.centers.expand(len(x), -1, -1))
        if learn:
            self._update(x, inside, clusters.labels)
        return clusters._replace(counts=self.sizes.expand(len(x), -1))

    def _seed(self, x: Tensor, inside: Tensor, noise: Tensor) -> None:
        """Cluster the patches of the global batch together, as if they were one image."""
        k, d = self.centers.shape
        all_features = gather_rows(x).reshape(1, -1, d)
        all_inside = gather_rows(inside).reshape(1, -1)
        all_noise = gather_rows(noise[:1])
        seeded = kmeans(all_features, all_inside, k, all_noise[:1])
        self.centers.copy_(seeded.centers[0])
        self.sizes.copy_(seeded.sizes[0])
        broadcast_tensors_from_rank0(self.centers, self.sizes)
        self.running_centers.copy_(self.centers)

    def _update(self, x: Tensor, inside: Tensor, labels: Tensor) -> None:
        """Move the running centroids toward the patches (B, N, D) assigned to them."""
        one_hot = F.one_hot(labels.clamp_min(0), len(self.centers))
        one_hot = one_hot * inside[..., None].to(x.dtype)  # (B, N, K)
        sums = (one_hot.mT @ x).sum(0)
        counts = one_hot.sum((0, 1))
        sum_over_workers(sums, counts)
        self.counts += counts
        shift = sums - counts[:, None] * self.running_centers
        self.running_centers += shift / self.counts[:, None].clamp_min(1)
