from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits
from torch import Tensor

from amlp_ray.config import SelectionConfig
from amlp_ray.method.counter_rng import CLUSTER, uniform
from amlp_ray.method.kmeans import Clusters, DatasetClusters, assign, kmeans, log_membership
from amlp_ray.method.patch_features import cluster_features, tissue_mask
from amlp_ray.method.patches import patchify


@pytest.fixture(autouse=True)
def _one_blas_thread() -> Iterator[None]:
    with threadpool_limits(1):  # more threads than cores wait for each other
        yield


def seeds(images: int, count: int, *, seed: int = 0) -> Tensor:
    return uniform(torch.arange(images), count, seed=seed, epoch=1, stream=CLUSTER)


def blobs(images: int, patches: int, clusters: int) -> tuple[Tensor, Tensor]:
    """Points around `clusters` centers per image; a quarter are outside and must not count."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(images, clusters, 6, generator=generator) * 4
    labels = torch.randint(clusters, (images, patches), generator=generator)
    x = centers.gather(1, labels[..., None].expand(-1, -1, 6)) + torch.randn(
        images, patches, 6, generator=generator
    )
    inside = torch.rand(images, patches, generator=generator) < 0.75
    return torch.where(inside[..., None], x, x + 100), inside


def ratios(x: Tensor, inside: Tensor, clusters: int, *, n_init: int, sklearn_n_init: int) -> Tensor:
    """Our inertia over scikit-learn's, per image; `sklearn_n_init` is its number of starts."""
    inertia = kmeans(x, inside, clusters, seeds(len(x), n_init * clusters)).inertia
    sklearn = [
        KMeans(clusters, n_init=sklearn_n_init, random_state=0).fit(rows[where].numpy()).inertia_
        for rows, where in zip(x, inside, strict=True)
    ]
    return inertia / torch.tensor(sklearn)


def features_of(images: Tensor, kind: str, p: int = 8) -> tuple[Tensor, Tensor]:
    patches = patchify(images, p)
    tissue = tissue_mask(patches, SelectionConfig())
    grid = (images.shape[2] // p, images.shape[3] // p)
    return cluster_features(patches, tissue, grid, images.shape[1], kind), tissue


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_inertia_of_separate_groups_is_within_1_percent_of_scikit_learn(clusters: int) -> None:
    x, inside = blobs(6, 144, clusters)
    assert ratios(x, inside, clusters, n_init=8, sklearn_n_init=8).max() <= 1.01


@pytest.mark.parametrize("kind", ["raw", "stats", "context"])
def test_inertia_on_phantoms_is_within_1_percent_of_scikit_learn(
    ultrasound: tuple[Tensor, Tensor, Tensor], kind: str
) -> None:
    ratio = ratios(*features_of(ultrasound[0], kind), 3, n_init=4, sklearn_n_init=4)
    assert ratio.mean() <= 1.01
    assert ratio.max() <= 1.08


@pytest.mark.real
@pytest.mark.parametrize(
    ("clusters", "n_init", "mean", "worst"),
    [
        (3, 8, 1.005, 1.03),
        (6, 4, 1.03, 1.2),  # too few starts: seen are 1.027 and 1.18, of dermoscopy by its pixels
        (6, 8, 1.01, 1.08),
    ],
)
@pytest.mark.parametrize("kind", ["raw", "stats", "context"])
@pytest.mark.parametrize("source", ["busi", "isic"])
def test_inertia_on_real_images_comes_close_to_the_best_of_ten_starts_of_scikit_learn(
    real_images: dict[str, Tensor],
    source: str,
    kind: str,
    clusters: int,
    n_init: int,
    mean: float,
    worst: float,
) -> None:
    """A start of scikit-learn tries several candidates per center, so it is worth more."""
    ratio = ratios(
        *features_of(real_images[source], kind), clusters, n_init=n_init, sklearn_n_init=10
    )
    assert ratio.mean() <= mean
    assert ratio.max() <= worst


def test_more_starts_never_give_a_worse_inertia() -> None:
    x, inside = features_of(
        torch.rand(8, 1, 64, 64, generator=torch.Generator().manual_seed(0)), "stats"
    )
    noise = seeds(8, 8 * 5)
    inertias = [kmeans(x, inside, 5, noise[:, : s * 5]).inertia for s in (1, 2, 4, 8)]
    for fewer, more in itertools.pairwise(inertias):
        assert (more <= fewer).all()
    assert (inertias[-1] < inertias[0]).any()


def test_every_patch_has_its_nearest_center_and_sizes_and_inertia_count_the_inside() -> None:
    x, inside = blobs(4, 100, 3)
    clusters = kmeans(x, inside, 3, seeds(4, 6))
    nearest, label = torch.cdist(x, clusters.centers).min(-1)
    assert torch.equal(clusters.labels[inside], label[inside])
    assert torch.equal(clusters.labels == -1, ~inside)
    assert torch.equal(clusters.sizes.sum(1), inside.sum(1))
    assert torch.equal(clusters.counts, clusters.sizes)
    torch.testing.assert_close(
        clusters.inertia, (nearest.square() * inside).sum(1), rtol=1e-4, atol=1e-3
    )
    for k in range(3):
        assert torch.equal(clusters.sizes[:, k], (clusters.labels == k).sum(1))


def test_centers_are_the_means_of_their_patches() -> None:
    x, inside = blobs(4, 100, 3)
    clusters = kmeans(x, inside, 3, seeds(4, 6))
    for i in range(4):
        for k in range(3):
            torch.testing.assert_close(
                clusters.centers[i, k], x[i, clusters.labels[i] == k].mean(0), atol=1e-4, rtol=1e-4
            )


def test_what_lies_outside_never_changes_the_clusters() -> None:
    x, inside = blobs(4, 100, 3)
    moved = torch.where(inside[..., None], x, torch.full_like(x, -777.0))
    a, b = kmeans(x, inside, 3, seeds(4, 6)), kmeans(moved, inside, 3, seeds(4, 6))
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.centers, b.centers)


def test_equal_noise_gives_equal_clusters_and_a_permuted_batch_permuted_ones() -> None:
    x, inside = blobs(7, 64, 4)
    noise = seeds(7, 3 * 4)
    whole, again = kmeans(x, inside, 4, noise), kmeans(x, inside, 4, noise)
    order = torch.tensor([4, 0, 6, 1])
    part = kmeans(x[order], inside[order], 4, noise[order])
    for one, other, rows in zip(whole, again, part, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(rows, one[order])


def test_fewer_distinct_patches_than_clusters_leaves_clusters_empty_and_splits_no_group() -> None:
    x = torch.tensor([0.0, 0, 0, 5, 5, 5, 5, 0])[None, :, None].repeat(1, 1, 3)
    clusters = kmeans(x, torch.ones(1, 8, dtype=torch.bool), 4, seeds(1, 8))
    assert sorted(clusters.sizes[0].tolist()) == [0, 0, 4, 4]
    assert len(clusters.labels[0, x[0, :, 0] == 5].unique()) == 1
    assert clusters.centers.isfinite().all()
    assert float(clusters.inertia[0]) == 0


def test_a_constant_image_and_one_without_tissue_give_finite_clusters() -> None:
    inside = torch.tensor([[True], [False]]).expand(2, 16)
    clusters = kmeans(torch.zeros(2, 16, 5), inside, 3, seeds(2, 6))
    assert sorted(clusters.sizes[0].tolist()) == [0, 0, 16]
    assert clusters.sizes[1].tolist() == [0, 0, 0]
    assert (clusters.labels[1] == -1).all()
    assert clusters.centers.isfinite().all()
    assert not clusters.inertia.any()


# Membership


def test_membership_is_a_distribution_over_clusters_that_names_the_own_one() -> None:
    x, inside = blobs(4, 100, 3)
    clusters = kmeans(x, inside, 3, seeds(4, 12))
    logs = torch.stack(
        [log_membership(x, clusters, torch.full((4,), k), 1.0) for k in range(3)], -1
    )
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(4, 100))
    assert torch.equal(logs.argmax(-1)[inside], clusters.labels[inside])


def test_membership_has_its_formula_and_nears_the_uniform_one_with_a_large_temperature() -> None:
    x = torch.tensor([0.0, 1.0, 4.0, 6.0])[None, :, None]
    clusters = assign(x, torch.ones(1, 4, dtype=torch.bool), torch.tensor([[[0.5], [5.0]]]))
    spread = (0.25 + 0.25 + 1 + 1) / 4
    for temperature in (0.5, 2.0):
        scaled = -torch.tensor([[0.25, 25], [0.25, 16], [12.25, 1], [30.25, 1]]) / (
            temperature * spread
        )
        expected = torch.log_softmax(scaled, -1)[:, 1]
        torch.testing.assert_close(
            log_membership(x, clusters, torch.tensor([1]), temperature)[0], expected
        )
    flat = log_membership(x, clusters, torch.tensor([0]), 1e6).exp()
    torch.testing.assert_close(flat, torch.full((1, 4), 0.5), atol=1e-3, rtol=0)


def test_membership_of_a_constant_image_is_finite() -> None:
    x, inside = torch.zeros(1, 9, 2), torch.ones(1, 9, dtype=torch.bool)
    assert (
        log_membership(x, kmeans(x, inside, 3, seeds(1, 6)), torch.tensor([0]), 1.0)
        .isfinite()
        .all()
    )


# Clusters of a dataset


def assign_batches(
    centroids: DatasetClusters, x: Tensor, inside: Tensor, batches: list[Tensor]
) -> list[Clusters]:
    """One pass over all images, batch by batch; clusters in the order of `batches`."""
    centroids.commit()
    noise, clusters = seeds(len(x), 4 * len(centroids.counts)), []
    for rows in batches:
        part = centroids.assign(x[rows], inside[rows], noise[rows], learn=True)
        clusters.append(part._replace(counts=part.counts.clone()))
    return clusters


def batches_of(count: int, size: int, seed: int | None = None) -> list[Tensor]:
    order = torch.arange(count)
    if seed is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return list(order.split(size))


def dataset_inertia(clusters: list[Clusters]) -> float:
    return float(torch.cat([part.inertia for part in clusters]).sum())


def seeded(x: Tensor, inside: Tensor, clusters: int) -> DatasetClusters:
    """Centroids after a first pass."""
    centroids = DatasetClusters(clusters, x.shape[-1])
    assign_batches(centroids, x, inside, batches_of(len(x), 4))
    return centroids


def test_within_a_pass_neither_the_order_nor_the_size_of_batches_changes_what_is_found() -> None:
    x, inside = features_of(
        torch.rand(16, 1, 64, 64, generator=torch.Generator().manual_seed(0)), "stats"
    )
    start = {name: value.clone() for name, value in seeded(x, inside, 4).state_dict().items()}
    results = []
    for batches in (batches_of(16, 4), batches_of(16, 4, seed=1), batches_of(16, 16, seed=2)):
        centroids = DatasetClusters(4, x.shape[-1])
        centroids.load_state_dict(start)
        clusters = assign_batches(centroids, x, inside, batches)
        order = torch.cat(batches).argsort()
        labels = torch.cat([part.labels for part in clusters])[order]
        masses = torch.cat([part.counts for part in clusters]).unique(dim=0)
        assert torch.equal(masses, start["counts"][None])
        results.append((labels, centroids.running_centers, centroids.counts))
    for labels, moving, learned in results[1:]:
        assert torch.equal(labels, results[0][0])
        assert torch.equal(learned, results[0][2])
        torch.testing.assert_close(moving, results[0][1], atol=1e-4, rtol=1e-4)


def test_what_was_learned_holds_from_the_next_pass_on() -> None:
    x, inside = blobs(8, 64, 3)
    centroids = seeded(x, inside, 3)
    before = centroids.centers.clone(), centroids.sizes.clone()
    assert not torch.equal(centroids.running_centers, before[0])
    clusters = centroids.assign(x, inside, seeds(8, 12), learn=False)
    assert torch.equal(clusters.centers[5], before[0])
    assert torch.equal(clusters.counts[5], before[1])
    centroids.commit()
    assert torch.equal(centroids.centers, centroids.running_centers)
    assert torch.equal(centroids.sizes, centroids.counts)


def test_looking_without_learning_moves_nothing() -> None:
    x, inside = blobs(8, 64, 3)
    centroids = seeded(x, inside, 3)
    before = {name: value.clone() for name, value in centroids.state_dict().items()}
    centroids.assign(x * 3, inside, seeds(8, 12), learn=False)
    assert all(torch.equal(value, before[name]) for name, value in centroids.state_dict().items())


def test_centroids_are_the_running_means_of_the_patches_they_were_nearest_to() -> None:
    x, inside = blobs(8, 64, 3)
    centroids = DatasetClusters(3, 6)
    clusters = assign_batches(centroids, x, inside, batches_of(8, 2))
    labels = torch.cat([part.labels for part in clusters])
    for k in range(3):
        torch.testing.assert_close(
            centroids.running_centers[k], x[labels == k].mean(0), atol=1e-4, rtol=1e-4
        )
        assert float(centroids.counts[k]) == int((labels == k).sum())


def test_the_clusters_are_those_of_the_data_set_whatever_an_image_holds() -> None:
    """An image of one group alone keeps its label, where clusters of its own would split it."""
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    x = (
        torch.randn(6, 30, 2, generator=generator)
        + 20 * torch.stack([group, group.square()], 1)[:, None]
    )
    inside = torch.ones(6, 30, dtype=torch.bool)
    centroids = DatasetClusters(3, 2)
    for _ in range(3):
        clusters = assign_batches(centroids, x, inside, [torch.arange(6)])[0]
    assert all(len(row.unique()) == 1 for row in clusters.labels)
    assert adjusted_rand_score(group.repeat_interleave(30), clusters.labels.flatten()) == 1


@pytest.mark.real
@pytest.mark.parametrize("clusters", [3, 6])
@pytest.mark.parametrize("kind", ["raw", "context"])
def test_inertia_over_all_real_images_comes_close_to_scikit_learn_s_mini_batch_k_means(
    real_images: dict[str, Tensor], kind: str, clusters: int
) -> None:
    x, inside = features_of(real_images["busi"], kind)
    centroids = DatasetClusters(clusters, x.shape[-1])
    course = [
        dataset_inertia(assign_batches(centroids, x, inside, batches_of(30, 6, seed=seed)))
        for seed in range(6)
    ]
    flat = x[inside].numpy().astype(np.float64)
    reference = (
        MiniBatchKMeans(clusters, batch_size=6 * 144, n_init=4, random_state=0).fit(flat).inertia_
    )
    assert course[-1] <= 1.03 * reference
    assert course[-1] < course[0]
