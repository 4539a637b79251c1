from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amlp_ray.config import ImageSpec, SegmentConfig
from amlp_ray.method.augment import apply_crop, augment, jitter_intensity, normalize, random_crop
from amlp_ray.method.counter_rng import CROP, VIEW, uniform

KEYS = torch.arange(200)


def config_of(**overrides: Any) -> SegmentConfig:
    return SegmentConfig(**{"flip": False, "seed": 0, **overrides})


def coordinates(images: int = 200, side: int = 32) -> Tensor:
    """Images whose two channels hold x and y, from -1 to 1 over the pixel centers.

    A crop of them shows where it was cut.
    """
    at = (torch.arange(side) + 0.5) / side * 2 - 1
    x, y = at.expand(side, side), at[:, None].expand(side, side)
    return torch.stack([x, y]).expand(images, 2, side, side)


def crop(
    images: Tensor, *, min_crop_area: float, flip: bool, epoch: int = 1, keys: Tensor = KEYS
) -> Tensor:
    config = config_of(min_crop_area=min_crop_area, flip=flip)
    return apply_crop(images, random_crop(keys[: len(images)], config, epoch))


def sides(cut: Tensor) -> tuple[Tensor, Tensor]:
    """Width (negative where mirrored) and height of crops of `coordinates`, as image shares."""
    n = cut.shape[-1]
    inner = slice(4, n - 4)  # away from the padded rim
    step = 2 / n
    width = cut[:, 0, n // 2, inner].diff(dim=-1).mean(-1) / step
    height = cut[:, 1, inner, n // 2].diff(dim=-1).mean(-1) / step
    return width, height


def test_neither_crop_nor_flip_is_the_identity_to_the_bit() -> None:
    images = torch.rand(4, 3, 16, 24)
    assert random_crop(KEYS, config_of(), 1) is None
    assert torch.equal(crop(images, min_crop_area=1, flip=False), images)


def test_flip_alone_mirrors_about_half_of_the_images_and_leaves_the_rest() -> None:
    images = torch.rand(200, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    out = crop(images, min_crop_area=1, flip=True)
    same = (out - images).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (out - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-4
    assert (same ^ mirrored).all()
    assert 70 < int(mirrored.sum()) < 130


@pytest.mark.parametrize("min_crop_area", [0.2, 0.6, 0.9, 0.99])
def test_crops_cover_at_least_their_least_area_and_lie_inside_the_image(
    min_crop_area: float,
) -> None:
    cut = crop(coordinates(), min_crop_area=min_crop_area, flip=True)
    width, height = sides(cut)
    area = width.abs() * height
    assert area.min() >= min_crop_area - 1e-3
    assert area.max() <= 1 + 1e-3
    assert area.max() - area.min() > 0.4 * (1 - min_crop_area)  # most of the range is used
    assert cut.abs().max() <= 1
    assert (height > 0).all()  # never upside down: depth has a direction


def test_sides_stay_between_3_to_4_and_4_to_3() -> None:
    width, height = sides(crop(coordinates(), min_crop_area=0.3, flip=False))
    aspect = width / height
    assert aspect.min() > 3 / 4 - 0.01
    assert aspect.max() < 4 / 3 + 0.01
    assert (width > 0).all()
    assert aspect.min() < 0.85 < 1.15 < aspect.max()


def test_crops_lie_everywhere() -> None:
    center = crop(coordinates(), min_crop_area=0.3, flip=False).mean((2, 3))
    assert center.amin(0).max() < -0.15
    assert center.amax(0).min() > 0.15
    assert center.mean(0).abs().max() < 0.05


def test_a_crop_depends_on_its_key_and_epoch_and_not_on_the_batch() -> None:
    images = torch.rand(20, 1, 16, 16)
    whole = crop(images, min_crop_area=0.5, flip=True)
    rows = torch.tensor([7, 3, 19])
    torch.testing.assert_close(
        crop(images[rows], min_crop_area=0.5, flip=True, keys=KEYS[rows]), whole[rows]
    )
    assert torch.equal(whole, crop(images, min_crop_area=0.5, flip=True))
    assert not torch.allclose(whole, crop(images, min_crop_area=0.5, flip=True, epoch=2))


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (2, 3, 24, 40), (1, 2, 40, 8)])
def test_shape_and_range_of_values_are_kept(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape) * 7 - 3
    out = crop(images, min_crop_area=0.4, flip=True)
    assert out.shape == images.shape
    assert out.min() >= images.min() - 1e-5
    assert out.max() <= images.max() + 1e-5


def test_what_belongs_to_an_image_is_cut_where_the_image_is() -> None:
    """A map of patches, cut by the same crop, says of a place what the image there says."""
    blocks = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)).round()
    images = F.interpolate(blocks, scale_factor=8, mode="nearest")
    cut = random_crop(KEYS, config_of(min_crop_area=0.5, flip=True), 1)
    maps = apply_crop(blocks, cut, mode="nearest")
    assert set(maps.unique().tolist()) == {0, 1}
    middles = apply_crop(images, cut)[..., 4::8, 4::8]
    assert ((middles - maps).abs() < 0.5).float().mean() > 0.95
    unmoved = ((middles - blocks).abs() < 0.5).float().mean()
    assert unmoved < 0.75


@pytest.mark.parametrize("flip", [True, False])
def test_a_map_that_is_only_mirrored_keeps_its_values_to_the_bit(flip: bool) -> None:
    maps = torch.randn(200, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    crop_all = random_crop(KEYS, config_of(flip=flip), 1)
    out = apply_crop(maps, crop_all, mode="nearest")
    same, mirrored = ((out == other).all(-1).all(-1).all(-1) for other in (maps, maps.flip(-1)))
    assert (same | mirrored).all()
    assert bool(mirrored.any()) is flip


def test_another_purpose_is_another_crop() -> None:
    one, other = (
        random_crop(KEYS, config_of(min_crop_area=0.5, flip=True), 1, p) for p in (CROP, VIEW)
    )
    assert one is not None
    assert other is not None
    assert one.shape == (200, 2, 3)
    assert not (one == other).all(-1).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32])
def test_normalize_scales_every_channel_by_its_own_mean_and_sd(dtype: torch.dtype) -> None:
    spec = ImageSpec(channels=2, height=8, width=8, mean=(10, 100), std=(2, 50))
    images = torch.tensor([[10, 14], [100, 0]]).repeat_interleave(32, 1).view(1, 2, 8, 8).to(dtype)
    before = images.clone()
    out = normalize(images, spec)
    assert out.dtype == torch.float32
    assert out[0, 0].unique().tolist() == [0, 2]
    assert out[0, 1].unique().tolist() == [-2, 0]
    assert torch.equal(images, before), "a float image is not normalized in place"


@pytest.mark.parametrize(
    ("dtype", "lowest"), [(torch.int16, -32768), (torch.uint16, 0), (torch.float32, -1e6)]
)
def test_the_ends_of_a_dtype_are_exact(dtype: torch.dtype, lowest: float) -> None:
    highest = {torch.int16: 32767, torch.uint16: 65535, torch.float32: 1e6}[dtype]
    spec = ImageSpec(channels=1, height=8, width=8, mean=(-500.0,), std=(250.0,))
    images = torch.tensor([lowest, highest]).repeat_interleave(32).view(1, 1, 8, 8).to(dtype)
    actual = normalize(images, spec).unique().tolist()
    assert actual == pytest.approx([(lowest + 500) / 250, (highest + 500) / 250], rel=1e-7)


def test_what_is_kept_for_normalizing_can_be_trained_through_though_it_was_made_at_inference() -> (
    None
):
    spec = ImageSpec(channels=1, height=8, width=8, mean=(7.25,), std=(3.5,))
    with torch.inference_mode():
        normalize(torch.zeros(1, 1, 8, 8), spec)
    weight = torch.ones(1, requires_grad=True)
    (normalize(torch.ones(1, 1, 8, 8), spec) * weight).sum().backward()
    assert weight.grad is not None


# Everything at once: crops, flips, intensity, on images with a mask.

ALL: dict[str, Any] = {
    "min_crop_area": 0.5,
    "flip": True,
    "flip_vertical": True,
    "intensity_jitter": 1.0,
}


def noise(shape: tuple[int, ...] = (40, 2, 24, 32), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def discs(count: int, height: int, width: int) -> Tensor:
    """Masks (N, H, W) uint8, no two alike."""
    y, x = torch.arange(height)[:, None], torch.arange(width)
    at = torch.rand(count, 3, generator=torch.Generator().manual_seed(1))
    distance = ((y - at[:, :1, None] * height) ** 2 + (x - at[:, 1:2, None] * width) ** 2).sqrt()
    return (distance < 3 + 6 * at[:, 2:, None]).to(torch.uint8)


@pytest.mark.parametrize(
    "overrides",
    [
        {"min_crop_area": 0.5},
        {"flip": True},
        {"flip_vertical": True},
        {"intensity_jitter": 1.0},
        ALL,
    ],
    ids=str,
)
def test_a_mask_lies_where_its_image_lies_after_any_augmentation(overrides: dict[str, Any]) -> None:
    """The mask as a channel of the image is cut as the mask itself.

    Intensity changes its values but cannot shift it.
    """
    masks, keys = discs(40, 24, 32), KEYS[:40]
    images = torch.cat([noise(), masks[:, None].float()], 1)
    augmented, cut = augment(images, masks, keys, config_of(seed=3, **overrides), 2)
    assert cut.dtype == torch.uint8
    assert set(cut.unique().tolist()) <= {0, 1}
    drawn = augmented[:, 2]
    low, high = drawn.amin((1, 2), keepdim=True), drawn.amax((1, 2), keepdim=True)
    inside = (drawn - low) / (high - low).clamp_min(1e-6) > 0.5
    has_lesion = (masks > 0).any(2).any(1) & (cut > 0).any(2).any(1)
    agreed = (inside == (cut > 0)).float().mean((1, 2))[has_lesion]
    assert agreed.min() > 0.93, "bilinear against nearest at the rim, and gamma's shift of one half"
    maps = random_crop(keys, config_of(seed=3, **overrides), 2)
    assert torch.equal(apply_crop(masks[:, None].float(), maps, "nearest")[:, 0], cut.float())


def test_without_any_of_it_image_and_mask_are_handed_back_as_they_are() -> None:
    images, masks = noise(), discs(40, 24, 32)
    augmented, cut = augment(images, masks, KEYS[:40], config_of(), 1)
    assert augmented is images
    assert cut is masks
    assert augment(images, None, KEYS[:40], config_of(), 1)[1] is None


def test_an_image_s_augmentation_depends_on_seed_epoch_and_key_and_not_on_its_batch() -> None:
    images, masks, keys = noise(), discs(40, 24, 32), KEYS[:40]
    whole = augment(images, masks, keys, config_of(**ALL), 1)
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:11]
    some = augment(images[rows], masks[rows], keys[rows], config_of(**ALL), 1)
    torch.testing.assert_close(some[0], whole[0][rows])
    assert torch.equal(some[1], whole[1][rows])
    for seed, epoch in ((1, 1), (0, 2)):
        other = augment(images, masks, keys, config_of(seed=seed, **ALL), epoch)
        assert not torch.allclose(other[0], whole[0])
        assert not torch.equal(other[1], whole[1])
    other_keys = augment(images, masks, keys + 1000, config_of(**ALL), 1)
    assert not torch.allclose(other_keys[0], whole[0])


def test_upside_down_turns_about_half_of_the_images_and_only_where_it_is_asked_for() -> None:
    images = noise((200, 1, 16, 24))
    out, _ = augment(images, None, KEYS, config_of(flip_vertical=True), 1)
    same = (out - images).abs().amax((1, 2, 3)) < 1e-4
    turned = (out - images.flip(-2)).abs().amax((1, 2, 3)) < 1e-4
    assert (same ^ turned).all()
    assert 70 < int(turned.sum()) < 130
    mirrored, _ = augment(images, None, KEYS, config_of(flip=True), 1)
    assert 0.3 < float(((mirrored == images).flatten(1).all(1) == same).float().mean()) < 0.7, (
        "drawn by itself"
    )


def test_a_new_kind_of_augmentation_moves_no_earlier_draw() -> None:
    """Crops and left-right flips use the first five numbers, as before the others existed."""
    plain = random_crop(KEYS, config_of(min_crop_area=0.5, flip=True), 1)
    combined = random_crop(KEYS, config_of(min_crop_area=0.5, flip=True, flip_vertical=True), 1)
    assert plain is not None
    assert combined is not None
    assert torch.equal(plain[:, 0], combined[:, 0])
    assert torch.equal(plain[:, 1].abs(), combined[:, 1].abs())
    few, many = (uniform(KEYS, count, seed=0, epoch=1, stream=CROP) for count in (5, 11))
    assert torch.equal(few, many[:, :5])


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_intensity_changes_brightness_and_contrast_within_its_range(strength: float) -> None:
    images = noise((200, 1, 32, 32))
    out = jitter_intensity(images, KEYS, config_of(intensity_jitter=strength), 1)
    shift = (out.mean((1, 2, 3)) - images.mean((1, 2, 3))).abs()
    ratio = out.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 0.4 * strength < shift.max() <= 0.5 * strength + 1e-4
    assert 1.6**-strength - 1e-3 < ratio.min() < 1.5**-strength
    assert 1.5**strength < ratio.max() < 1.6**strength + 1e-3
    # Gamma alone bends: the middle of the range moves against its ends.
    middle = (out.flatten(1).median(1).values - out.mean((1, 2, 3))) / out.std((1, 2, 3))
    assert middle.min() < -0.1 * strength < 0.1 * strength < middle.max()
    ranks = [torch.argsort(x.flatten(1), dim=1, stable=True) for x in (images, out)]
    assert (ranks[0] == ranks[1]).float().mean() > 0.999, (
        "no pixel becomes brighter than one that was brighter"
    )


def test_channels_of_an_image_change_alike_so_that_colors_stay() -> None:
    images = noise((50, 1, 16, 16)).expand(-1, 3, -1, -1)
    out = jitter_intensity(images, KEYS[:50], config_of(intensity_jitter=1.0), 1)
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(out[:, 0], out[:, 2])


@pytest.mark.parametrize("value", [-1000.0, 0.0, 3.2])
def test_a_constant_image_stays_constant_and_finite(value: float) -> None:
    out, _ = augment(torch.full((20, 2, 16, 16), value), None, KEYS[:20], config_of(**ALL), 1)
    spread = out.amax((2, 3)) - out.amin((2, 3))
    assert out.isfinite().all()
    assert float(spread.max()) <= 1e-3 * max(1.0, abs(value))
    assert float((out - value).abs().max()) <= 0.5 + 1e-3 * abs(value)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0, 1e6, 1e20])
def test_no_scale_of_values_makes_a_number_that_is_none(scale: float) -> None:
    images = noise((20, 2, 16, 16)) * scale
    images[0, 0, 0, 0] *= 1000  # metal in CT, a hot pixel
    out, _ = augment(images, None, KEYS[:20], config_of(**ALL), 1)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [("uint8", 90, 60), ("uint16", 3e4, 2e4), ("int16", -500, 400), ("float32", 0.4, 0.1)],
)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_stored_images_of_any_dtype_and_channels_are_augmented(
    dtype: str, mean: float, std: float, channels: int
) -> None:
    spec = ImageSpec(
        channels=channels, height=16, width=24, mean=(mean,) * channels, std=(std,) * channels
    )
    values = noise((12, channels, 16, 24)) * std + mean
    low, high = {
        "uint8": (0, 255),
        "uint16": (0, 65535),
        "int16": (-1024, 3071),
        "float32": (-9e9, 9e9),
    }[dtype]
    stored = values.clamp(low, high).to(getattr(torch, dtype))
    masks = discs(12, 16, 24)
    out, cut = augment(normalize(stored, spec), masks, KEYS[:12], config_of(**ALL), 1)
    assert out.dtype == torch.float32
    assert out.shape == stored.shape
    assert out.isfinite().all()
    assert out.abs().max() < 20
    assert cut.shape == masks.shape
