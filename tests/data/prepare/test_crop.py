from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from amlp_ray.config import PrepareConfig
from amlp_ray.data.prepare.crop import (
    background_of,
    cut,
    iter_crops,
    origins,
    pixel_spacing,
    resize_image,
    resize_mask,
    scaled,
)


def _settings(**values: Any) -> PrepareConfig:
    return PrepareConfig.model_validate({"size": 32} | values)


def _noise(
    height: int, width: int, channels: int = 1, dtype: str = "uint8", seed: int = 0
) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(dtype)


def test_stretch_is_exactly_pillows_bicubic() -> None:
    image = _noise(50, 70, 3)
    expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
    stored, mask = cut(image, None, 0, 0, _settings(fit="stretch"))
    np.testing.assert_array_equal(stored.transpose(1, 2, 0), expected)
    assert mask is None


def test_pad_keeps_the_aspect_and_fills_borders_with_the_minimum() -> None:
    image = _noise(40, 80) // 2 + 100
    lesion = np.zeros((40, 80), np.uint8)
    lesion[10:30, 20:60] = 1
    stored, mask = cut(image, lesion, 0, 0, _settings(fit="pad"))
    inner = np.asarray(Image.fromarray(image[..., 0]).resize((32, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(stored[0, 8:24], inner)
    assert (stored[0, :8] == image.min()).all()
    assert (stored[0, 24:] == image.min()).all()
    assert mask is not None
    assert mask[8:24].any()
    assert not mask[:8].any()
    assert not mask[24:].any()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_tiles_put_together_are_the_image_to_the_bit(dtype: str, overlap: float) -> None:
    image = (
        _noise(75, 100, 2).astype(np.float32) * 3 - (300 if dtype in ("int16", "float32") else 0)
    ).astype(dtype)
    lesion = (_noise(75, 100)[..., 0] > 200).astype(np.uint8)
    config = _settings(fit="tiles", overlap=overlap)
    whole, whole_mask = np.full_like(image, 1), np.full_like(lesion, 7)
    for crop in iter_crops(image, lesion, config):
        stored, mask = cut(image, lesion, crop.y, crop.x, config)
        assert stored.dtype == image.dtype
        assert stored.shape == (2, 32, 32)
        at = slice(crop.y, crop.y + 32), slice(crop.x, crop.x + 32)
        whole[at] = stored.transpose(1, 2, 0)
        whole_mask[at] = mask
        assert crop.lesion == bool(lesion[at].any())
    np.testing.assert_array_equal(whole, image)
    np.testing.assert_array_equal(whole_mask, lesion)


def test_a_frame_smaller_than_a_tile_is_padded_at_its_lower_right() -> None:
    image = _noise(20, 10, dtype="int16") - 1000
    (crop,) = iter_crops(image, None, _settings(fit="tiles"))
    stored, _ = cut(image, None, crop.y, crop.x, _settings(fit="tiles"))
    np.testing.assert_array_equal(stored[0, :20, :10], image[..., 0])
    assert (stored[0, 20:] == image.min()).all()
    assert crop.background >= 1 - 200 / 32**2


@pytest.mark.parametrize(
    ("length", "overlap"), [(32, 0.0), (33, 0.0), (64, 0.0), (100, 0.3), (1000, 0.9), (7, 0.5)]
)
def test_tiles_cover_every_pixel_and_stay_inside(length: int, overlap: float) -> None:
    starts = origins(length, 32, overlap)
    covered = np.zeros(max(length, 32), bool)
    for start in starts:
        assert start + 32 <= max(length, 32)
        covered[start : start + 32] = True
    assert covered.all()
    assert len(set(starts)) == len(starts)


def test_background_is_what_is_dark_and_hangs_on_the_edge() -> None:
    image = np.full((60, 60, 1), 120, np.uint8)
    image[:10] = 2  # a black border with a little noise
    image[0, ::2] = 0
    image[30:40, 30:40] = 1  # a dark lesion inside
    air = background_of(image)
    assert air[:10].all()
    assert not air[10:].any()


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_background_does_not_depend_on_the_scale(dtype: str) -> None:
    image = np.full((60, 60, 2), 120, np.uint8)
    image[:, :15] = 0
    other = image.astype(dtype) * 7 - (1000 if dtype != "uint16" else 0)
    np.testing.assert_array_equal(background_of(other.astype(dtype)), background_of(image))


def test_constant_images_are_all_background_and_bright_edges_are_none() -> None:
    assert background_of(np.full((9, 9, 1), 50, np.uint8)).all()
    assert (
        not background_of(_noise(50, 50) // 4 + 190).any()
        or background_of(_noise(50, 50) // 4 + 190).mean() < 0.1
    )


def test_one_bright_pixel_does_not_hide_behind_the_percentile() -> None:
    image = np.zeros((50, 50, 1), np.uint8)
    image[25, 25] = 200
    air = background_of(image)
    assert not air[25, 25]
    assert air.sum() == 2499


def test_scale_shrinks_image_and_mask_before_tiles_are_cut() -> None:
    image, lesion = _noise(100, 200, 3), np.ones((100, 200), np.uint8)
    small, small_lesion = scaled(image, lesion, _settings(fit="tiles", scale=0.25))
    assert small.shape == (25, 50, 3)
    assert small_lesion is not None
    assert small_lesion.shape == (25, 50)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"fit": "stretch"}, (2.0 * 64 / 32, 1.0 * 16 / 32)),
        ({"fit": "pad"}, (2.0 * 2, 1.0 * 2)),
        ({"fit": "tiles"}, (2.0, 1.0)),
        ({"fit": "tiles", "scale": 0.5}, (4.0, 2.0)),
    ],
)
def test_spacing_follows_the_pixels(values: dict[str, Any], expected: tuple[float, float]) -> None:
    assert pixel_spacing((2.0, 1.0), 64, 16, _settings(**values)) == expected
    assert pixel_spacing(None, 64, 16, _settings(**values)) is None


def test_resize_of_16_bits_keeps_type_and_agrees_with_8_bits() -> None:
    image = _noise(50, 70)
    wide = resize_image(image.astype(np.uint16) * 257, 32, 32)
    assert wide.dtype == np.uint16
    assert (
        np.abs(wide / 257 - resize_image(image, 32, 32)).max() < 4
    )  # 8 bits are rounded between two passes
    below = resize_image(image.astype(np.int16) - 500, 32, 32)
    assert below.dtype == np.int16
    assert (
        np.abs(below + 500 - resize_image(image, 32, 32).astype(int)).max() < 30
    )  # 8 bits clip what overshoots


def test_mask_keeps_pixels_covered_at_least_by_half() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:2, :1] = 1  # half of the first 2x2 block
    mask[4, 4] = 1  # a quarter of another
    assert np.argwhere(resize_mask(mask, 4, 4)).tolist() == [[0, 0]]


def test_tiny_lesion_does_not_vanish() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[50, 50] = 1
    assert resize_mask(mask, 10, 10).sum() == 1
    assert resize_mask(np.zeros((100, 100), np.uint8), 10, 10).sum() == 0
