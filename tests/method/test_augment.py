from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amlp_ray.config import ImageSpec
from amlp_ray.method.augment import cropped, normalise, random_crop
from amlp_ray.method.noise import CROP, VIEW

KEYS = torch.arange(200)


def coordinates(images: int = 200, side: int = 32) -> Tensor:
    """Images whose two channels hold x and y, from -1 to 1 over the pixel centres: a crop shows where it was cut."""
    at = (torch.arange(side) + 0.5) / side * 2 - 1
    x, y = at.expand(side, side), at[:, None].expand(side, side)
    return torch.stack([x, y]).expand(images, 2, side, side)


def crop(images: Tensor, *, crop_min: float, flip: bool, epoch: int = 1, keys: Tensor = KEYS) -> Tensor:
    return cropped(images, random_crop(keys[: len(images)], crop_min=crop_min, flip=flip, seed=0, epoch=epoch))


def sides(cut: Tensor) -> tuple[Tensor, Tensor]:
    """Width (negative where mirrored) and height of the crops of `coordinates`, as shares of the image."""
    n = cut.shape[-1]
    inner = slice(4, n - 4)  # away from the padded rim
    step = 2 / n
    width = cut[:, 0, n // 2, inner].diff(dim=-1).mean(-1) / step
    height = cut[:, 1, inner, n // 2].diff(dim=-1).mean(-1) / step
    return width, height


def test_neither_crop_nor_flip_is_the_identity_to_the_bit() -> None:
    images = torch.rand(4, 3, 16, 24)
    assert random_crop(KEYS, crop_min=1, flip=False, seed=0, epoch=1) is None
    assert torch.equal(crop(images, crop_min=1, flip=False), images)


def test_flip_alone_mirrors_about_half_of_the_images_and_leaves_the_rest() -> None:
    images = torch.rand(200, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    out = crop(images, crop_min=1, flip=True)
    same = (out - images).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (out - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-4
    assert (same ^ mirrored).all()
    assert 70 < int(mirrored.sum()) < 130


@pytest.mark.parametrize("crop_min", [0.2, 0.6, 0.9, 0.99])
def test_crops_cover_at_least_their_least_area_and_lie_inside_the_image(crop_min: float) -> None:
    cut = crop(coordinates(), crop_min=crop_min, flip=True)
    width, height = sides(cut)
    area = width.abs() * height
    assert area.min() >= crop_min - 1e-3
    assert area.max() <= 1 + 1e-3
    assert area.max() - area.min() > 0.4 * (1 - crop_min)  # most of the range is used
    assert cut.abs().max() <= 1
    assert (height > 0).all()  # never upside down: depth has a direction


def test_sides_stay_between_3_to_4_and_4_to_3() -> None:
    width, height = sides(crop(coordinates(), crop_min=0.3, flip=False))
    aspect = width / height
    assert aspect.min() > 3 / 4 - 0.01
    assert aspect.max() < 4 / 3 + 0.01
    assert (width > 0).all()
    assert aspect.min() < 0.85 < 1.15 < aspect.max()


def test_crops_lie_everywhere() -> None:
    centre = crop(coordinates(), crop_min=0.3, flip=False).mean((2, 3))
    assert centre.amin(0).max() < -0.15
    assert centre.amax(0).min() > 0.15
    assert centre.mean(0).abs().max() < 0.05


def test_a_crop_depends_on_its_key_and_epoch_and_not_on_the_batch() -> None:
    images = torch.rand(20, 1, 16, 16)
    whole = crop(images, crop_min=0.5, flip=True)
    rows = torch.tensor([7, 3, 19])
    torch.testing.assert_close(crop(images[rows], crop_min=0.5, flip=True, keys=KEYS[rows]), whole[rows])
    assert torch.equal(whole, crop(images, crop_min=0.5, flip=True))
    assert not torch.allclose(whole, crop(images, crop_min=0.5, flip=True, epoch=2))


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (2, 3, 24, 40), (1, 2, 40, 8)])
def test_shape_and_range_of_values_are_kept(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape) * 7 - 3
    out = crop(images, crop_min=0.4, flip=True)
    assert out.shape == images.shape
    assert out.min() >= images.min() - 1e-5
    assert out.max() <= images.max() + 1e-5


def test_what_belongs_to_an_image_is_cut_where_the_image_is() -> None:
    """A map of patches, cut by the same crop, says of a place what the image there says."""
    blocks = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)).round()
    images = F.interpolate(blocks, scale_factor=8, mode="nearest")
    cut = random_crop(KEYS, crop_min=0.5, flip=True, seed=0, epoch=1)
    maps = cropped(blocks, cut, mode="nearest")
    assert set(maps.unique().tolist()) == {0, 1}
    middles = cropped(images, cut)[..., 4::8, 4::8]
    assert ((middles - maps).abs() < 0.5).float().mean() > 0.95
    unmoved = ((middles - blocks).abs() < 0.5).float().mean()
    assert unmoved < 0.75


@pytest.mark.parametrize("flip", [True, False])
def test_a_map_that_is_only_mirrored_keeps_its_values_to_the_bit(flip: bool) -> None:
    maps = torch.randn(200, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    crop_all = random_crop(KEYS, crop_min=1.0, flip=flip, seed=0, epoch=1)
    out = cropped(maps, crop_all, mode="nearest")
    same, mirrored = ((out == other).all(-1).all(-1).all(-1) for other in (maps, maps.flip(-1)))
    assert (same | mirrored).all()
    assert bool(mirrored.any()) is flip


def test_another_purpose_is_another_crop() -> None:
    one, other = (random_crop(KEYS, crop_min=0.5, flip=True, seed=0, epoch=1, purpose=p) for p in (CROP, VIEW))
    assert one is not None
    assert other is not None
    assert one.shape == (200, 2, 3)
    assert not (one == other).all(-1).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_normalise_scales_every_channel_by_its_own_mean_and_sd(dtype: torch.dtype) -> None:
    spec = ImageSpec(channels=2, height=8, width=8, mean=(10, 100), std=(2, 50))
    images = torch.tensor([[10, 14], [100, 0]]).repeat_interleave(32, 1).view(1, 2, 8, 8).to(dtype)
    out = normalise(images, spec)
    assert out.dtype == torch.float32
    assert out[0, 0].unique().tolist() == [0, 2]
    assert out[0, 1].unique().tolist() == [-2, 0]
