"""Batched k-means: every image of a batch on its own, or all images of a data set together."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Clusters(NamedTuple):
    """Patches by cluster: `labels` (B, N), -1 off tissue; `centres` (B, K, D); `sizes` (B, K) in patches.

    `inertia` (B,) is the sum of squared distances to the own centre; `mass` (B, K) is what counts as a cluster's size
    when clusters are compared: patches of the image, or of the whole data set.
    """

    labels: Tensor
    centers: Tensor
    sizes: Tensor
    inertia: Tensor
    counts: Tensor


def kmeans(
    x: Tensor, inside: Tensor, clusters: int, noise: Tensor, *, iterations: int = 20
) -> Clusters:
    """Cluster the patches `inside` (B, N) of every image on its own, all images and starts in one batched pass.

    Args:
        x: (B, N, D) features.
        noise: (B, S * clusters) uniform numbers for the k-means++ seeding of S starts, of which the one of least
            inertia is kept; equal noise gives equal clusters.

    An image with fewer than `clusters` distinct patches leaves clusters empty (size 0).
    Source: Lloyd's algorithm with k-means++ seeding (Arthur and Vassilvitskii 2007), as in scikit-learn.
    """
    b, _, d = x.shape
    starts = noise.shape[1] // clusters
    norms = x.square().sum(-1)  # (B, N)
    weight = inside.to(x.dtype)
    centers = _seed_centers(x, norms, weight, noise.reshape(b, starts, clusters))  # (B, S, K, D)
    for _ in range(iterations):
        nearest = _distances(x, norms, centers).argmin(-1)  # (B, N, S)
        member = F.one_hot(nearest, clusters) * weight[..., None, None]  # (B, N, S, K)
        sizes = member.sum(1)  # (B, S, K)
        means = (member.flatten(2).mT @ x).reshape(b, starts, clusters, d) / sizes[
            ..., None
        ].clamp_min(1)
        centers = torch.where(
            sizes[..., None] > 0, means, centers
        )  # an emptied cluster keeps its centre
    inertia = (_distances(x, norms, centers).amin(-1) * weight[..., None]).sum(1)  # (B, S)
    best = inertia.argmin(1)
    return assign(x, inside, centers[torch.arange(b, device=x.device), best])


def assign(x: Tensor, inside: Tensor, centers: Tensor) -> Clusters:
    """Put every patch `inside` (B, N) to the nearest of the centres (B, K, D)."""
    nearest_distance, nearest = _distances(x, x.square().sum(-1), centers[:, None])[:, :, 0].min(-1)
    sizes = (F.one_hot(nearest, centers.shape[1]) * inside[..., None]).sum(1)
    inertia = (nearest_distance * inside).sum(1)
    return Clusters(nearest.masked_fill(~inside, -1), centers, sizes, inertia, sizes)


def _of_all_workers(rows: Tensor) -> Tensor:
    """The rows of all workers one after another, which are those of the global batch; they may differ in number."""
    if not dist.is_initialized():
        return rows
    parts: list[Tensor] = [rows] * dist.get_world_size()
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)


def membership(x: Tensor, clusters: Clusters, chosen: Tensor, temperature: float) -> Tensor:
    """Log probability (B, N) that a patch belongs to the cluster `chosen` (B,).

    log softmax over clusters of -|x - centre|^2 / (temperature * mean squared distance to the own centre).
    """
    distance = _distances(x, x.square().sum(-1), clusters.centers[:, None])[:, :, 0]  # (B, N, K)
    patches = (clusters.labels >= 0).sum(1).clamp_min(1)
    spread = (clusters.inertia / patches).clamp_min(1e-6)[:, None, None]
    log = torch.log_softmax(-distance / (temperature * spread), -1)
    return log.gather(2, chosen[:, None, None].expand(-1, x.shape[1], 1))[..., 0]


def _distances(x: Tensor, norms: Tensor, centers: Tensor) -> Tensor:
    """Squared distances (B, N, S, K) of x (B, N, D) to centres (B, S, K, D), as |x|^2 - 2xc + |c|^2.

    A matrix product, twice as fast as `cdist`; what is below its rounding error counts as 0.
    """
    b, s, k, _ = centers.shape
    product = (x @ centers.flatten(1, 2).mT).reshape(b, x.shape[1], s, k)
    squares = centers.square().sum(-1)[:, None]  # (B, 1, S, K)
    norms = norms[..., None, None]
    distance = norms - 2 * product + squares
    return torch.where(distance > 1e-6 * (norms + squares), distance, 0.0)


def _seed_centers(x: Tensor, norms: Tensor, weight: Tensor, noise: Tensor) -> Tensor:
    """k-means++ seeding of every start: (B, S, K, D); noise (B, S, K)."""
    _, starts, clusters = noise.shape
    closest = weight[:, None].expand(
        -1, starts, -1
    )  # (B, S, N): the first centre is uniform over tissue
    centers: list[Tensor] = []
    for k in range(clusters):
        total = closest.cumsum(-1)
        # The last patch whose cumulative weight does not reach the draw; clamped where all weight is zero.
        chosen = (
            (total < noise[..., k : k + 1] * total[..., -1:]).sum(-1).clamp_max(x.shape[1] - 1)
        )  # (B, S)
        center = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))  # (B, S, D)
        centers.append(center)
        distance = (
            _distances(x, norms, center[:, :, None])[..., 0].mT * weight[:, None]
        )  # (B, S, N)
        closest = distance if k == 0 else torch.minimum(closest, distance)
    return torch.stack(centers, 2)


class DatasetClusters(nn.Module):
    """Centroids of a whole data set, carried along from batch to batch and from look to look; saved with the model.

    Mini-batch k-means (Sculley 2010): each centroid is the running mean of all patches it was nearest to; the very
    first batch seeds them. Patches are assigned to the centroids, and clusters compared by their sizes, as they stood
    when a look at the data began (`settle`), so that neither the order of later batches nor a resume changes what is
    found. Workers share their sums and so hold the same centroids.
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
        """Begin a look: what was learnt during the last one holds from now on."""
        self.centers.copy_(self.running_centers)
        self.sizes.copy_(self.counts)

    @torch.no_grad()
    def assign(self, x: Tensor, inside: Tensor, noise: Tensor, *, learn: bool) -> Clusters:
        """Assign the patches of a batch, and, to `learn`, carry the centroids along.

        Args:
            x: (B, N, D). inside: (B, N). noise: (B, S * K) as for `kmeans`; its first row seeds the very first batch.
        """
        b, (k, d) = len(x), self.centers.shape
        if not self.centers.any():  # looks are rare, so this wait for the device is too
            everywhere = [_of_all_workers(part) for part in (x, inside, noise[:1])]
            first = kmeans(
                everywhere[0].reshape(1, -1, d), everywhere[1].reshape(1, -1), k, everywhere[2][:1]
            )
            self.centers.copy_(first.centers[0])
            self.sizes.copy_(first.sizes[0])
            if dist.is_initialized():
                dist.broadcast(self.centers, src=0)
                dist.broadcast(self.sizes, src=0)
            self.running_centers.copy_(self.centers)
        found = assign(x, inside, self.centers.expand(b, -1, -1))
        if learn:
            member = F.one_hot(found.labels.clamp_min(0), k) * inside[..., None].to(
                x.dtype
            )  # (B, N, K)
            sums, counts = (member.mT @ x).sum(0), member.sum((0, 1))
            if dist.is_initialized():
                dist.all_reduce(sums)
                dist.all_reduce(counts)
            self.counts += counts
            self.running_centers += (sums - counts[:, None] * self.running_centers) / self.counts[
                :, None
            ].clamp_min(1)
        return found._replace(counts=self.sizes.expand(b, -1))
