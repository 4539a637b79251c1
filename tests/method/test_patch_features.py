from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from amlp_ray.config import SelectionConfig
from amlp_ray.method.patch_features import (
    center_distance,
    cluster_features,
    dilate,
    neighborhood_mean,
    tissue_mask,
)
from amlp_ray.method.patches import patchify, tissue_patches


@pytest.mark.parametrize("kind", ["raw", "stats", "context"])
def test_a_constant_image_and_one_without_tissue_have_features_of_0(kind: str) -> None:
    patches = patchify(torch.full((2, 2, 32, 32), 3.0), 8)
    inside = torch.tensor([[True], [False]]).expand(2, 16)
    assert not cluster_features(patches, inside, (4, 4), 2, kind).any()


def test_raw_features_keep_contrast_between_patches_and_ignore_the_image_s_units() -> None:
    patches = torch.rand(2, 16, 64, generator=torch.Generator().manual_seed(0))
    inside = torch.ones(2, 16, dtype=torch.bool)
    x = cluster_features(patches, inside, (4, 4), 1, "raw")
    torch.testing.assert_close(
        x, cluster_features(patches * 50 - 9, inside, (4, 4), 1, "raw"), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(x.mean((1, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((1, 2), correction=0), torch.ones(2), atol=1e-4, rtol=0)


def test_raw_features_have_mean_0_and_sd_1_in_every_channel_over_tissue_alone() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[[1.0]], [[9]], [[99]]]
    )
    inside = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)) < 0.6
    patches = torch.where(inside[..., None], patchify(images, 8), -1e4)
    x = cluster_features(patches, inside, (4, 4), 3, "raw")
    for i in range(2):
        channels = x[i, inside[i]].reshape(-1, 3)  # the channels of a pixel stand together
        torch.testing.assert_close(channels.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(channels.std(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)


def test_stats_are_mean_sd_and_gradient_of_each_channel() -> None:
    flat, ramp, checker = (
        torch.zeros(8, 8),
        torch.arange(8.0).expand(8, 8),
        torch.arange(8).view(8, 1) % 2 * 2.0,
    )
    image = torch.cat([flat, ramp, checker.expand(8, 8)], 1)[None]  # one channel, 3 patches
    two = torch.cat([image, image.flip(-1)])[None]
    x = cluster_features(patchify(two, 8), torch.ones(1, 3, dtype=torch.bool), (1, 3), 2, "stats")
    assert x.shape == (1, 3, 6)
    raw = torch.tensor(
        [[0, 3.5, 1], [0, 5.25**0.5, 1], [0, 0.5, 1]]
    )  # gradient: mean of both directions
    expected = (raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(x[0, :, [0, 2, 4]].T, expected)
    torch.testing.assert_close(x[0, :, 1], x[0, :, 0].flip(0))


def test_context_tells_a_dark_patch_from_a_dark_neighborhood() -> None:
    patches = torch.ones(1, 49, 64)
    patches[0, 24] = 0
    x = cluster_features(patches, torch.ones(1, 49, dtype=torch.bool), (7, 7), 1, "context")
    assert x.shape == (1, 49, 4)
    assert x[0, :, 0].argmin() == 24
    assert x[0, :, 2].argmin() == 24
    assert x[0, 25, 1] < x[0, 0, 1]  # its neighbor has dark surroundings, the corner has not


def test_token_features_ignore_the_length_of_tokens_and_are_raw_where_there_are_none() -> None:
    generator = torch.Generator().manual_seed(0)
    patches, tokens = (
        torch.rand(2, 16, 64, generator=generator),
        torch.randn(2, 16, 5, generator=generator),
    )
    inside = torch.rand(2, 16, generator=generator) < 0.7
    x = cluster_features(patches, inside, (4, 4), 1, "tokens", tokens)
    lengths = torch.rand(2, 16, 1, generator=generator) + 0.5
    torch.testing.assert_close(
        x, cluster_features(patches, inside, (4, 4), 1, "tokens", tokens * lengths)
    )
    torch.testing.assert_close(x[0, inside[0]].mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    raw = cluster_features(patches, inside, (4, 4), 1, "raw")
    assert torch.equal(cluster_features(patches, inside, (4, 4), 1, "tokens"), raw)
    assert torch.equal(cluster_features(patches, inside, (4, 4), 1, "raw", tokens), raw)


def test_tissue_is_told_by_the_settings_thresholds_and_is_everything_without_the_filter() -> None:
    image = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    image[..., :8] *= 0.03
    patches = patchify(image, 8)
    chosen = SelectionConfig(background_mean=0.02, background_std=0.02)
    tissue = tissue_mask(patches, chosen)
    assert torch.equal(tissue, tissue_patches(patches, mean_above=0.02, std_above=0.02))
    assert 0 < int((~tissue).sum()) < 16
    assert tissue_mask(patches, SelectionConfig(background_filter=False)).all()


def test_neighborhood_mean_averages_what_exists() -> None:
    values = torch.arange(12.0)[None]
    mean = neighborhood_mean(values, (3, 4), 3)[0].view(3, 4)
    image = values.view(3, 4)
    assert float(mean[0, 0]) == pytest.approx(float(image[:2, :2].mean()))
    assert float(mean[1, 2]) == pytest.approx(float(image[:, 1:].mean()))


@pytest.mark.parametrize("by", [0, 1, 2])
@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (1, 6)])
def test_dilation_is_that_of_scipy_and_by_0_none(by: int, grid: tuple[int, int]) -> None:
    where = torch.rand(4, grid[0] * grid[1], generator=torch.Generator().manual_seed(0)) < 0.1
    grown = dilate(where, grid, by)
    square = np.ones((2 * by + 1, 2 * by + 1))
    for actual, before in zip(grown, where, strict=True):
        assert np.array_equal(
            actual.view(grid), ndimage.binary_dilation(before.view(grid).numpy(), square)
        )


@pytest.mark.parametrize("grid", [(8, 8), (4, 6), (5, 3)])
def test_center_distance_is_0_in_the_middle_1_at_the_edges_and_symmetric(
    grid: tuple[int, int],
) -> None:
    distance = center_distance(grid, torch.device("cpu")).view(grid)
    torch.testing.assert_close(distance, distance.flip(0))
    torch.testing.assert_close(distance, distance.flip(1))
    h, w = grid
    assert float(distance[0, 0]) == pytest.approx(((1 - 1 / h) ** 2 + (1 - 1 / w) ** 2) ** 0.5)
