from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import PatchEmbed

from amlp_ray.method.patches import gather, patchify, standardize, tissue_patches, unpatchify


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.sampled_from([2, 3, 8]))
def test_unpatchify_undoes_patchify_for_any_channels_and_sides(
    channels: int, h: int, w: int, p: int
) -> None:
    images = torch.arange(2 * channels * h * w * p * p).float().view(2, channels, h * p, w * p)
    patches = patchify(images, p)
    assert patches.shape == (2, h * w, channels * p * p)
    assert torch.equal(unpatchify(patches, p, (h, w)), images)


def test_patches_run_row_by_row_and_hold_one_channel_after_the_other() -> None:
    image = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    patches = patchify(image, 2)
    assert patches[0, 1].tolist() == image[0, :, 0:2, 2:4].flatten().tolist()
    assert patches[0, 3].tolist() == image[0, :, 2:4, 0:2].flatten().tolist()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_order_is_that_of_timm_s_patch_embedding(channels: int) -> None:
    embed = PatchEmbed(img_size=(24, 40), patch_size=8, in_chans=channels, embed_dim=12)
    images = torch.randn(3, channels, 24, 40, generator=torch.Generator().manual_seed(0))
    embedded = torch.nn.functional.linear(
        patchify(images, 8), embed.proj.weight.flatten(1), embed.proj.bias
    )
    torch.testing.assert_close(embedded, embed(images), atol=1e-5, rtol=1e-5)


def test_gather_picks_rows_of_patches_and_of_maps_alike() -> None:
    patches = torch.arange(24.0).view(2, 4, 3)
    ids = torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(gather(patches, ids), torch.stack([patches[0, [3, 0]], patches[1, [1, 1]]]))
    assert torch.equal(gather(patches[..., 0], ids), gather(patches, ids)[..., 0])


@pytest.mark.parametrize("lowest", [0.0, -2.5, 100.0])
def test_a_flat_black_border_is_no_tissue_wherever_black_lies(lowest: float) -> None:
    image = torch.full((1, 1, 32, 32), lowest)
    image[..., 8:24, 8:24] += 1 + torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    tissue = tissue_patches(patchify(image, 8), mean_above=0.02, std_above=0.01)[0].view(4, 4)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1:3, 1:3] = True
    assert torch.equal(tissue, expected)


def test_bright_flat_and_dark_textured_patches_are_tissue() -> None:
    image = torch.zeros(1, 1, 8, 24)
    image[..., 8:16] = 1.0  # flat, but far above black
    image[..., 16:24] = 0.03 * (torch.arange(64).view(8, 8) % 2)  # mean 0.015, SD 0.015
    assert tissue_patches(patchify(image, 8), mean_above=0.02, std_above=0.01).tolist() == [
        [False, True, True]
    ]


def test_an_image_of_one_value_has_no_tissue() -> None:
    patches = patchify(torch.stack([torch.zeros(1, 16, 16), torch.full((1, 16, 16), 7.0)]), 8)
    assert not tissue_patches(patches, mean_above=0.02, std_above=0.01).any()


@pytest.mark.parametrize(("scale", "shift"), [(1e-6, 0.0), (1e6, 0.0), (3.0, -50.0)])
def test_tissue_does_not_depend_on_the_units_of_the_image(scale: float, shift: float) -> None:
    image = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    image[:, :, :, :8] = 0
    thresholds = {"mean_above": 0.02, "std_above": 0.01}
    expected = tissue_patches(patchify(image, 8), **thresholds)
    assert not expected.all()
    assert torch.equal(tissue_patches(patchify(image * scale + shift, 8), **thresholds), expected)


def test_standardize_gives_mean_0_and_sd_1_over_what_is_inside_only() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 50, 4, generator=generator) * torch.tensor([0.1, 1, 10, 1000]) + 5
    inside = torch.rand(3, 50, generator=generator) < 0.6
    x[~inside] += 1e4  # must not count
    z = standardize(x, inside)
    for i in range(3):
        rows = z[i, inside[i]]
        torch.testing.assert_close(rows.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(rows.std(0, correction=0), torch.ones(4), atol=1e-3, rtol=0)


def test_standardize_turns_flat_columns_and_empty_images_into_zeros() -> None:
    x = torch.full((2, 6, 2), 3.0)
    x[:, :, 1] = torch.arange(6.0)
    z = standardize(x, torch.tensor([[True] * 6, [False] * 6]))
    assert not z[0, :, 0].any()
    assert not z[1, :, 0].any()
    assert z[0, :, 1].std() > 0.9
    assert z.isfinite().all()
