from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from amlp_ray.method.clustering import (
    Clusters,
    centre_distance,
    cluster_features,
    kmeans,
    name_lesion_cluster,
    neighbourhood_mean,
)
from amlp_ray.method.noise import CLUSTER, uniform
from amlp_ray.method.patches import patchify


def seeds(images: int, count: int, *, seed: int = 0) -> Tensor:
    return uniform(torch.arange(images), count, seed=seed, epoch=1, purpose=CLUSTER)


def inertia(x: Tensor, inside: Tensor, clusters: Clusters) -> Tensor:
    own = clusters.centres.gather(1, clusters.labels.clamp_min(0)[..., None].expand_as(x))
    return ((x - own).square().sum(-1) * inside).sum(1)


def blobs(images: int, patches: int, clusters: int) -> tuple[Tensor, Tensor]:
    """Points around `clusters` centres per image, and a quarter of them outside, where they must not count."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(images, clusters, 6, generator=generator) * 4
    member = torch.randint(clusters, (images, patches), generator=generator)
    x = centres.gather(1, member[..., None].expand(-1, -1, 6)) + torch.randn(images, patches, 6, generator=generator)
    inside = torch.rand(images, patches, generator=generator) < 0.75
    return torch.where(inside[..., None], x, x + 100), inside


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_inertia_is_within_1_percent_of_scikit_learn(clusters: int) -> None:
    """Lloyd's algorithm ends in a local optimum, so the best of several seedings stands on both sides."""
    x, inside = blobs(6, 144, clusters)
    ours = torch.stack([inertia(x, inside, kmeans(x, inside, clusters, seeds(6, clusters, seed=s))) for s in range(8)])
    for i in range(6):
        with threadpool_limits(1):  # more threads than cores wait for each other
            theirs = KMeans(clusters, n_init=8, random_state=0).fit(x[i, inside[i]].numpy()).inertia_
        assert float(ours[:, i].min()) <= 1.01 * theirs


def test_on_image_patches_one_seeding_comes_close_to_scikit_learn_s_single_one(
    ultrasound: tuple[Tensor, Tensor, Tensor],
) -> None:
    patches = patchify(ultrasound[0], 8)
    inside = torch.ones(patches.shape[:2], dtype=torch.bool)
    x = cluster_features(patches, inside, (8, 8), 1, "raw")
    ours = float(inertia(x, inside, kmeans(x, inside, 3, seeds(16, 3))).sum())
    with threadpool_limits(1):
        theirs = sum(KMeans(3, n_init=1, random_state=0).fit(x[i].numpy()).inertia_ for i in range(16))
    assert ours <= 1.05 * theirs


def test_every_patch_has_its_nearest_centre_and_sizes_count_the_inside() -> None:
    x, inside = blobs(4, 100, 3)
    found = kmeans(x, inside, 3, seeds(4, 3))
    nearest = torch.cdist(x, found.centres).argmin(-1)
    assert torch.equal(found.labels[inside], nearest[inside])
    assert torch.equal(found.labels == -1, ~inside)
    assert torch.equal(found.sizes.sum(1), inside.sum(1))
    for k in range(3):
        assert torch.equal(found.sizes[:, k], (found.labels == k).sum(1))


def test_what_lies_outside_never_changes_the_clusters() -> None:
    x, inside = blobs(4, 100, 3)
    moved = torch.where(inside[..., None], x, torch.full_like(x, -777.0))
    a, b = kmeans(x, inside, 3, seeds(4, 3)), kmeans(moved, inside, 3, seeds(4, 3))
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.centres, b.centres)


def test_equal_noise_gives_equal_clusters_and_a_permuted_batch_permuted_ones() -> None:
    x, inside = blobs(7, 64, 4)
    noise = seeds(7, 4)
    whole, again = kmeans(x, inside, 4, noise), kmeans(x, inside, 4, noise)
    order = torch.tensor([4, 0, 6, 1])
    part = kmeans(x[order], inside[order], 4, noise[order])
    assert torch.equal(whole.labels, again.labels)
    assert torch.equal(part.labels, whole.labels[order])
    assert torch.equal(part.sizes, whole.sizes[order])


def test_fewer_distinct_patches_than_clusters_leaves_clusters_empty_and_splits_no_group() -> None:
    x = torch.tensor([0.0, 0, 0, 5, 5, 5, 5, 0])[None, :, None].repeat(1, 1, 3)
    found = kmeans(x, torch.ones(1, 8, dtype=torch.bool), 4, seeds(1, 4))
    assert sorted(found.sizes[0].tolist()) == [0, 0, 4, 4]
    assert len(found.labels[0, x[0, :, 0] == 5].unique()) == 1
    assert found.centres.isfinite().all()


@pytest.mark.parametrize("kind", ["raw", "stats", "context"])
def test_a_constant_image_and_one_without_tissue_give_finite_clusters(kind: str) -> None:
    patches = patchify(torch.full((2, 2, 32, 32), 3.0), 8)
    inside = torch.tensor([[True], [False]]).expand(2, 16)
    x = cluster_features(patches, inside, (4, 4), 2, kind)
    found = kmeans(x, inside, 3, seeds(2, 3))
    assert not x.any()
    assert sorted(found.sizes[0].tolist()) == [0, 0, 16]
    assert found.sizes[1].tolist() == [0, 0, 0]
    assert (found.labels[1] == -1).all()
    assert found.centres.isfinite().all()


def test_raw_features_keep_contrast_between_patches_and_ignore_the_image_s_units() -> None:
    patches = torch.rand(2, 16, 64, generator=torch.Generator().manual_seed(0))
    inside = torch.ones(2, 16, dtype=torch.bool)
    x = cluster_features(patches, inside, (4, 4), 1, "raw")
    torch.testing.assert_close(x, cluster_features(patches * 50 - 9, inside, (4, 4), 1, "raw"), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x.mean((1, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((1, 2), correction=0), torch.ones(2), atol=1e-4, rtol=0)


def test_stats_are_mean_sd_and_gradient_of_each_channel() -> None:
    flat, ramp, checker = torch.zeros(8, 8), torch.arange(8.0).expand(8, 8), torch.arange(8).view(8, 1) % 2 * 2.0
    image = torch.cat([flat, ramp, checker.expand(8, 8)], 1)[None]  # one channel, 3 patches
    two = torch.cat([image, image.flip(-1)])[None]
    x = cluster_features(patchify(two, 8), torch.ones(1, 3, dtype=torch.bool), (1, 3), 2, "stats")
    assert x.shape == (1, 3, 6)
    raw = torch.tensor([[0, 3.5, 1], [0, 5.25**0.5, 1], [0, 0.5, 1]])  # gradient: mean of both directions
    expected = (raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(x[0, :, [0, 2, 4]].T, expected)
    torch.testing.assert_close(x[0, :, 1], x[0, :, 0].flip(0))


def test_context_tells_a_dark_patch_from_a_dark_neighbourhood() -> None:
    patches = torch.ones(1, 49, 64)
    patches[0, 24] = 0
    x = cluster_features(patches, torch.ones(1, 49, dtype=torch.bool), (7, 7), 1, "context")
    assert x.shape == (1, 49, 4)
    assert x[0, :, 0].argmin() == 24
    assert x[0, :, 2].argmin() == 24
    assert x[0, 25, 1] < x[0, 0, 1]  # its neighbour has dark surroundings, the corner has not


def test_neighbourhood_mean_averages_what_exists() -> None:
    values = torch.arange(12.0)[None]
    mean = neighbourhood_mean(values, (3, 4), 3)[0].view(3, 4)
    image = values.view(3, 4)
    assert float(mean[0, 0]) == pytest.approx(float(image[:2, :2].mean()))
    assert float(mean[1, 2]) == pytest.approx(float(image[:, 1:].mean()))


@pytest.mark.parametrize("grid", [(8, 8), (4, 6), (5, 3)])
def test_centre_distance_is_0_in_the_middle_1_at_the_edges_and_symmetric(grid: tuple[int, int]) -> None:
    distance = centre_distance(grid, torch.device("cpu")).view(grid)
    torch.testing.assert_close(distance, distance.flip(0))
    torch.testing.assert_close(distance, distance.flip(1))
    h, w = grid
    assert float(distance[0, 0]) == pytest.approx(((1 - 1 / h) ** 2 + (1 - 1 / w) ** 2) ** 0.5)


# An image of 8x8 patches whose regions each answer another rule; the background is more than half of it.
BACKGROUND, CORNER, DARK, BRIGHT, MIDDLE, TEXTURED = range(6)
LEVELS = (0.5, 0.4, 0.1, 0.9, 0.6, 0.5)


def known_clusters(images: int = 1) -> tuple[Clusters, Tensor, Tensor, Tensor]:
    """(clusters, features, inside, brightness) of an image whose regions are known."""
    regions = torch.zeros(8, 8, dtype=torch.int64)
    regions[0, :3] = CORNER  # 3 patches: the fewest
    regions[6, :6] = DARK
    regions[7, 2:7] = BRIGHT
    regions[3:5, 3:5] = MIDDLE
    regions[1, :7] = TEXTURED
    labels = regions.flatten()
    x = torch.tensor(LEVELS)[labels][:, None].repeat(1, 16)
    x += 0.8 * (labels == TEXTURED)[:, None] * (torch.arange(16) % 2 * 2 - 1)  # far off, yet no brighter or darker
    centres = torch.stack([x[labels == k].mean(0) for k in range(6)])
    found = Clusters(labels[None], centres[None], labels.bincount()[None])
    inside = torch.ones(1, 64, dtype=torch.bool)
    batch = [t.expand(images, *t.shape[1:]) for t in (*found, x[None], inside, x.mean(-1)[None])]
    return Clusters(*batch[:3]), batch[3], batch[4], batch[5]


def named(rule: str, *, noise: Tensor | None = None, min_patches: int = 2, max_share: float = 0.5) -> tuple[int, bool]:
    clusters, x, inside, brightness = known_clusters()
    noise = seeds(1, 6) if noise is None else noise
    bounds = {"min_patches": min_patches, "max_share": max_share}
    chosen, found = name_lesion_cluster(rule, clusters, x, inside, brightness, (8, 8), noise, **bounds)
    return int(chosen[0]), bool(found[0])


@pytest.mark.parametrize(
    ("rule", "answer"),
    [
        ("smallest", CORNER),
        ("darkest", DARK),
        ("brightest", BRIGHT),
        ("most_central", MIDDLE),
        ("distinct", TEXTURED),
    ],
)
def test_each_rule_names_the_region_it_is_called_after(rule: str, answer: int) -> None:
    assert named(rule) == (answer, True)


def test_the_random_rule_names_every_qualified_cluster_about_equally_often_and_no_other() -> None:
    clusters, x, inside, brightness = known_clusters(images=2000)
    bounds = {"min_patches": 2, "max_share": 0.5}
    chosen, _ = name_lesion_cluster("random", clusters, x, inside, brightness, (8, 8), seeds(2000, 6), **bounds)
    counts = chosen.bincount(minlength=6).tolist()
    assert counts[BACKGROUND] == 0  # more than half of the tissue
    assert all(330 < count < 470 for count in counts[1:])  # 400 expected, SD 18


def test_clusters_below_the_least_number_of_patches_are_passed_over() -> None:
    assert named("smallest", min_patches=3) == (CORNER, True)
    assert named("smallest", min_patches=4) == (MIDDLE, True)
    assert named("smallest", min_patches=5) == (BRIGHT, True)


def test_clusters_above_the_largest_share_are_passed_over() -> None:
    assert named("darkest", max_share=6 / 64) == (DARK, True)
    assert named("darkest", max_share=5 / 64)[0] == CORNER
    assert named("smallest", min_patches=30, max_share=1.0) == (BACKGROUND, True)


def test_no_qualified_cluster_is_said() -> None:
    assert named("smallest", min_patches=30, max_share=0.5)[1] is False


def test_the_largest_share_is_of_tissue_and_border_brightness_does_not_count() -> None:
    labels = torch.tensor([[0, 0, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1]])
    inside = labels >= 0
    x = torch.tensor([3.0, 3, 1, 1, 1, 1, -9, -9, -9, -9, -9, -9])[None, :, None]
    clusters = Clusters(labels, torch.tensor([[[3.0], [1.0]]]), torch.tensor([[2, 4]]))
    bounds = {"min_patches": 2, "max_share": 0.5}  # 4 of 6 tissue patches are too many, though 4 of 12 were not
    for rule in ("darkest", "brightest", "most_central", "distinct"):
        chosen, found = name_lesion_cluster(rule, clusters, x, inside, x[..., 0], (3, 4), seeds(1, 2), **bounds)
        assert (int(chosen[0]), bool(found[0])) == (0, True)
    bounds["max_share"] = 1.0
    chosen, _ = name_lesion_cluster("darkest", clusters, x, inside, x[..., 0], (3, 4), seeds(1, 2), **bounds)
    assert int(chosen[0]) == 1
