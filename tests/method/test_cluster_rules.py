from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from amlp_ray.config import SelectionConfig
from amlp_ray.method.cluster_rules import choose_lesion_cluster, true_lesion_patches
from amlp_ray.method.counter_rng import CLUSTER, uniform
from amlp_ray.method.kmeans import Clusters
from amlp_ray.method.patch_scores import PATCH_SCORES

# An image of 8x8 patches whose regions each answer another rule; the background is more than half.
BACKGROUND, CORNER, DARK, BRIGHT, MIDDLE, TEXTURED = range(6)
LEVELS = (0.5, 0.4, 0.1, 0.9, 0.6, 0.5)


def clusters_of(labels: Tensor, centers: Tensor, sizes: Tensor) -> Clusters:
    return Clusters(labels, centers, sizes, torch.zeros(len(labels)), sizes)


def known_clusters() -> tuple[Clusters, Tensor]:
    """Clusters and features (1, 64, 16) of an image whose regions are known."""
    regions = torch.zeros(8, 8, dtype=torch.int64)
    regions[0, :3] = CORNER  # 3 patches: the fewest
    regions[6, :6] = DARK
    regions[7, 2:7] = BRIGHT
    regions[3:5, 3:5] = MIDDLE
    regions[1, :7] = TEXTURED
    labels = regions.flatten()
    x = torch.tensor(LEVELS)[labels][:, None].repeat(1, 16)
    x += (
        0.8 * (labels == TEXTURED)[:, None] * (torch.arange(16) % 2 * 2 - 1)
    )  # far off, yet no brighter or darker
    centers = torch.stack([x[labels == k].mean(0) for k in range(6)])
    return clusters_of(labels[None], centers[None], labels.bincount()[None]), x[None]


def name(
    images: int = 1, *, rule: str, min_patches: int = 2, max_share: float = 0.5, **options: Any
) -> tuple[Any, Any]:
    """The chosen cluster of each of `images` copies and whether one was found.

    Plain numbers for a single image.
    """
    clusters, x = known_clusters()
    clusters = Clusters(*(part.expand(images, *part.shape[1:]) for part in clusters))
    x = x.expand(images, -1, -1)
    noise = uniform(torch.arange(images), 6, seed=0, epoch=1, stream=CLUSTER)
    config = SelectionConfig(rule=rule, min_patches=min_patches, max_share=max_share)
    inside = torch.ones(images, 64, dtype=torch.bool)
    chosen, has_lesion = choose_lesion_cluster(
        config, clusters, x, inside, (8, 8), brightness=x.mean(-1), noise=noise, **options
    )
    return (int(chosen[0]), bool(has_lesion[0])) if images == 1 else (chosen, has_lesion)


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
    assert name(rule=rule) == (answer, True)


@pytest.mark.parametrize("rule", [*PATCH_SCORES, "hardest"])
@pytest.mark.parametrize("region", [CORNER, DARK, BRIGHT, MIDDLE, TEXTURED])
def test_a_score_s_rule_and_hardest_name_the_region_of_the_highest_mean(
    rule: str, region: int
) -> None:
    labels = known_clusters()[0].labels
    value = (labels == region).float()
    value[0, 0 if region != CORNER else 60] = 2  # one patch alone does not decide
    assert name(rule=rule, score=value) == (region, True)


def test_the_highest_mean_of_a_cluster_too_large_does_not_count() -> None:
    value = torch.where(known_clusters()[0].labels == BACKGROUND, 9.0, 0.0)
    value[0, 8:15] = 1
    assert name(rule="hardest", score=value) == (TEXTURED, True)


def test_without_difficulties_hardest_finds_nothing() -> None:
    assert name(rule="hardest")[1] is False


@pytest.mark.parametrize("region", [CORNER, DARK, BRIGHT, MIDDLE, TEXTURED])
def test_the_oracle_names_the_cluster_that_covers_the_truth_best(region: int) -> None:
    share = (known_clusters()[0].labels == region).float()
    share[0, 20] = 1  # a bit of background
    assert name(rule="oracle", truth=share) == (region, True)


def test_the_oracle_finds_nothing_without_a_lesion_or_where_too_large_a_cluster_holds_it() -> None:
    labels = known_clusters()[0].labels
    assert name(rule="oracle", truth=torch.zeros(1, 64))[1] is False
    assert name(rule="oracle", truth=(labels == BACKGROUND).float())[1] is False


def test_the_random_rule_names_every_qualified_cluster_about_equally_often_and_no_other() -> None:
    chosen, has_lesion = name(2000, rule="random")
    counts = chosen.bincount(minlength=6).tolist()
    assert has_lesion.all()
    assert counts[BACKGROUND] == 0  # more than half of the tissue
    assert all(330 < count < 470 for count in counts[1:])  # 400 expected, SD 18


def test_clusters_below_the_least_number_of_patches_are_passed_over() -> None:
    assert name(rule="smallest", min_patches=3) == (CORNER, True)
    assert name(rule="smallest", min_patches=4) == (MIDDLE, True)
    assert name(rule="smallest", min_patches=5) == (BRIGHT, True)


def test_clusters_above_the_largest_share_are_passed_over() -> None:
    assert name(rule="darkest", max_share=6 / 64) == (DARK, True)
    assert name(rule="darkest", max_share=5 / 64)[0] == CORNER
    assert name(rule="smallest", min_patches=30, max_share=1.0) == (BACKGROUND, True)


def test_no_qualified_cluster_is_said() -> None:
    assert name(rule="smallest", min_patches=30)[1] is False


def test_smallest_goes_by_the_mass_over_the_data_set_and_what_qualifies_by_the_image() -> None:
    clusters, x = known_clusters()
    mass = torch.tensor(
        [[1.0, 500, 400, 300, 200, 100]]
    )  # the background is rare elsewhere, but too large here
    chosen, has_lesion = choose_lesion_cluster(
        SelectionConfig(rule="smallest"),
        clusters._replace(counts=mass),
        x,
        torch.ones(1, 64, dtype=torch.bool),
        (8, 8),
        brightness=x.mean(-1),
        noise=torch.zeros(1, 6),
    )
    assert (int(chosen), bool(has_lesion)) == (TEXTURED, True)


def test_the_largest_share_is_of_tissue_and_border_brightness_does_not_count() -> None:
    labels = torch.tensor([[0, 0, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1]])
    x = torch.tensor([3.0, 3, 1, 1, 1, 1, -9, -9, -9, -9, -9, -9])[None, :, None]
    clusters = clusters_of(labels, torch.tensor([[[3.0], [1.0]]]), torch.tensor([[2, 4]]))

    def named(rule: str, max_share: float) -> int:
        chosen, has_lesion = choose_lesion_cluster(
            SelectionConfig(rule=rule, max_share=max_share),
            clusters,
            x,
            labels >= 0,
            (3, 4),
            brightness=x[..., 0],
            noise=torch.zeros(1, 2),
        )
        assert has_lesion.all()
        return int(chosen[0])

    for rule in ("darkest", "brightest", "most_central", "distinct"):
        assert named(rule, 0.5) == 0  # 4 of 6 tissue patches are too many, though 4 of 12 were not
    assert named("darkest", 1.0) == 1


def test_true_patches_hold_a_quarter_of_lesion_or_where_none_does_any() -> None:
    share = torch.tensor([[0.25, 0.24, 0.9, 0.0], [0.1, 0.0, 0.24, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert true_lesion_patches(share).tolist() == [
        [True, False, True, False],
        [True, False, True, False],
        [False] * 4,
    ]
