from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amlp_ray.data.decode import is_grey, read_image, read_mask, resize_image, resize_mask, thumbnail, to_channels
from amlp_ray.errors import DataError

RAMP = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("L", 1), ("1", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("I;16", 1)],
)
def test_every_mode_becomes_height_width_channels(mode: str, channels: int, tmp_path: Path) -> None:
    path = tmp_path / "a [1] (x).png"
    picture = Image.fromarray(RAMP.astype(np.uint16) * 256) if mode == "I;16" else Image.fromarray(RAMP).convert(mode)
    picture.save(path)
    image = read_image(path)
    assert image.shape == (4, 6, channels)
    assert image.dtype == (np.uint16 if mode == "I;16" else np.uint8)
    if mode != "1":
        np.testing.assert_array_equal(image[..., 0] // (256 if mode == "I;16" else 1), RAMP)


def test_32_bit_integers_that_fit_are_16_bit(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.int32) * 100).save(tmp_path / "a.tif")
    image = read_image(tmp_path / "a.tif")
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image[..., 0], RAMP.astype(int) * 100)


def _tiff(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


def test_pixels_of_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    _tiff(tmp_path / "signed.tif", RAMP.astype(np.int32) - 100)
    with pytest.raises(DataError, match=r"signed\.tif holds values from -100 to 130"):
        read_image(tmp_path / "signed.tif")
    _tiff(tmp_path / "float.tif", RAMP.astype(np.float32))
    with pytest.raises(DataError, match=r"float\.tif has pixels of kind 'F'"):
        read_image(tmp_path / "float.tif")


def test_several_frames_are_refused_by_name(tmp_path: Path) -> None:
    first = Image.fromarray(RAMP)
    first.save(tmp_path / "stack.tif", save_all=True, append_images=[first, first])
    with pytest.raises(DataError, match=r"stack\.tif holds 3 frames, but one is accepted"):
        read_image(tmp_path / "stack.tif")


@pytest.mark.parametrize("damage", ["text", "cut", "gone"])
def test_unreadable_image_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8)).save(path)
    if damage == "text":
        path.write_text("not an image")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:900])
    else:
        path.unlink()
    with pytest.raises(DataError, match=re.escape(f"{path} cannot be read as an image")):
        read_image(path)


def test_masks_are_united_and_alpha_ignored(tmp_path: Path) -> None:
    bit = np.zeros((4, 6), bool)
    bit[0, 0] = True
    opaque = np.zeros((4, 6, 4), np.uint8)
    opaque[..., 3] = 255
    opaque[3, 5, 1] = 1
    Image.fromarray(bit).save(tmp_path / "bit.png")
    Image.fromarray(opaque).save(tmp_path / "rgba.png")
    mask = read_mask([tmp_path / "bit.png", tmp_path / "rgba.png"], (4, 6))
    assert mask.dtype == np.uint8
    assert np.argwhere(mask).tolist() == [[0, 0], [3, 5]]
    assert mask.max() == 1


def test_jpeg_noise_is_no_lesion(tmp_path: Path) -> None:
    lesion = np.zeros((64, 64), np.uint8)
    lesion[20:45, 13:50] = 255
    Image.fromarray(lesion).save(tmp_path / "m.jpg", quality=50)
    assert ((read_image(tmp_path / "m.jpg") > 0).sum()) > 1.05 * (lesion > 0).sum()
    np.testing.assert_array_equal(read_mask([tmp_path / "m.jpg"], (64, 64)), lesion > 0)


def test_mask_of_other_size_is_named(tmp_path: Path) -> None:
    Image.new("1", (7, 4)).save(tmp_path / "wide.png")
    with pytest.raises(DataError, match=r"wide\.png is a mask of 7x4 pixels, but its image has 6x4"):
        read_mask([tmp_path / "wide.png"], (4, 6))


def test_grey_allows_small_coloured_marks_only() -> None:
    image = np.repeat(np.random.default_rng(0).integers(0, 200, (100, 100, 1), dtype=np.uint8), 3, axis=2)
    assert is_grey(image)
    image[:10, :9, 0] = 255
    image[:10, :9, 1:] = 0
    assert is_grey(image)  # 0.9 %: callipers
    image[:10, :12, 0] = 255
    image[:10, :12, 1:] = 0
    assert not is_grey(image)  # 1.2 %


def test_grey_survives_the_way_to_one_channel_and_back() -> None:
    grey = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    single = to_channels(grey, 1)
    np.testing.assert_array_equal(single, grey[..., :1])
    np.testing.assert_array_equal(to_channels(single, 3), grey)


def test_resize_is_exactly_pillows_bicubic() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize_image(image, 32), expected)


def test_resize_of_16_bits_keeps_type_and_agrees_with_8_bits() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 1), dtype=np.uint8)
    wide = resize_image(image.astype(np.uint16) * 257, 32)
    assert wide.dtype == np.uint16
    assert np.abs(wide / 257 - resize_image(image, 32)).max() < 1.5


def test_mask_keeps_pixels_covered_at_least_by_half() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:2, :1] = 1  # half of the first 2x2 block
    mask[4, 4] = 1  # a quarter of another
    assert np.argwhere(resize_mask(mask, 4)).tolist() == [[0, 0]]


def test_tiny_lesion_does_not_vanish() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[50, 50] = 1
    assert resize_mask(mask, 10).sum() == 1
    assert resize_mask(np.zeros((100, 100), np.uint8), 10).sum() == 0


def test_thumbnail_of_16_bits_uses_the_whole_range() -> None:
    image = np.linspace(1000, 1400, 100 * 100).reshape(100, 100, 1).astype(np.uint16)
    small = thumbnail(image)
    assert small.shape == (48, 48)
    assert small.min() < 5
    assert small.max() > 250
