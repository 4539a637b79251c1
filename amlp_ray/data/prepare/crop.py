"""Turn a frame of any size into images of the size a network wants: stretched, padded, or tiles.

Pixel values keep their type and scale. Where nothing is resized (tiles without `scale`), they are
the source's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from amlp_ray.config import PrepareConfig

# Share of the range, from the minimum up to the 99.5th percentile, that still counts as air or
# black border.
AIR = 0.04
# Pixels sampled for a percentile: exact enough for AIR, and no sort of a large photograph.
PIXEL_SAMPLE = 1 << 16


class Crop(NamedTuple):
    """Where an image of the dataset lies in its frame, and what is known of it before cutting."""

    y: int  # upper left pixel in the (scaled) frame; 0 if the whole frame is taken
    x: int
    background: float  # share of air, black border and padding, 0 to 1
    foreground: float  # share of tissue, padding not counted, 0 to 1
    lesion: bool


def iter_crops(image: np.ndarray, mask: np.ndarray | None, config: PrepareConfig) -> Iterator[Crop]:
    """Yield what is cut from a frame: the frame itself, or its tiles in rows from the upper left.

    Tiles start every `size * (1 - overlap)` pixels. The last of a row or column ends at the frame's
    edge, so that all is covered. A frame smaller than a tile is padded at its lower and right edge.

    Args:
        image: (H, W, C).
        mask: (H, W), or None if unlabeled.
        config: gives `fit`, `size` and `overlap`.
    """
    size = config.size
    air = background_of(image)
    height, width = air.shape
    if config.fit != "tiles":
        inner_height, inner_width = _inner_size(height, width, config)
        filled = inner_height * inner_width / size**2
        tissue = 1 - float(air.mean())
        yield Crop(0, 0, 1 - filled * tissue, tissue, _has_lesion(mask))
        return
    for y in origins(height, size, config.overlap):
        for x in origins(width, size, config.overlap):
            tile = slice(y, y + size), slice(x, x + size)
            tile_mask = None if mask is None else mask[tile]
            num_pixels = air[tile].size
            num_tissue = num_pixels - np.count_nonzero(air[tile])
            background = 1 - num_tissue / size**2
            yield Crop(y, x, background, num_tissue / num_pixels, _has_lesion(tile_mask))


def cut(
    image: np.ndarray, mask: np.ndarray | None, y: int, x: int, config: PrepareConfig
) -> tuple[np.ndarray, np.ndarray | None]:
    """Bring what lies at (y, x) of a frame to the size of the dataset.

    - `stretch`: to a square, bicubic with antialiasing.
    - `pad`: the longer side becomes `size`, the shorter keeps the aspect and is centered; borders
      are the frame's minimum.
    - `tiles`: cut as it is; what lies beyond the frame is its minimum.

    Borders hold no lesion.

    Args:
        image: (H, W, C).
        mask: (H, W), or None if unlabeled.
        y: upper edge of a tile.
        x: left edge of a tile.
        config: gives `fit` and `size`.

    Returns:
        The image (C, size, size), and its mask (size, size).
    """
    size = config.size
    top = left = 0
    if config.fit == "tiles":
        tile = slice(y, y + size), slice(x, x + size)
        inner = image[tile]
        inner_mask = None if mask is None else mask[tile]
        height, width = inner.shape[:2]
    else:
        height, width = _inner_size(image.shape[0], image.shape[1], config)
        top = (size - height) // 2
        left = (size - width) // 2
        inner, inner_mask = _resize(image, mask, height, width)
    if height == width == size:
        return _channels_first(inner), inner_mask
    target = slice(top, top + height), slice(left, left + width)
    padded = np.empty((size, size, image.shape[2]), image.dtype)
    padded[:] = image.min(axis=(0, 1))
    padded[target] = inner
    if inner_mask is None:
        return _channels_first(padded), None
    padded_mask = np.zeros((size, size), np.uint8)
    padded_mask[target] = inner_mask
    return _channels_first(padded), padded_mask


def scaled(
    image: np.ndarray, mask: np.ndarray | None, config: PrepareConfig
) -> tuple[np.ndarray, np.ndarray | None]:
    """Shrink a frame (H, W, C) and its mask (H, W) by `config.scale`, before tiles are cut."""
    if config.scale == 1:
        return image, mask
    height, width = (max(1, round(side * config.scale)) for side in image.shape[:2])
    return _resize(image, mask, height, width)


def pixel_spacing(
    spacing: tuple[float, float] | None, height: int, width: int, config: PrepareConfig
) -> tuple[float, float] | None:
    """Return the millimeters of a stored pixel, down and across; None: not known.

    Args:
        spacing: the same of a pixel of the frame.
        height: of the frame, in pixels.
        width: of the frame, in pixels.
        config: gives `fit`, `size` and `scale`.
    """
    if spacing is None:
        return None
    if config.fit == "tiles":
        return spacing[0] * (1 / config.scale), spacing[1] * (1 / config.scale)
    inner_height, inner_width = _inner_size(height, width, config)
    return spacing[0] * (height / inner_height), spacing[1] * (width / inner_width)


def origins(length: int, size: int, overlap: float) -> list[int]:
    """Return where tiles of `size` begin along a side of `length` pixels.

    >>> origins(250, 100, 0.0), origins(250, 100, 0.5), origins(60, 100, 0.0)
    ([0, 100, 150], [0, 50, 100, 150], [0])
    """
    if length <= size:
        return [0]
    step = max(1, round(size * (1 - overlap)))
    return [*range(0, length - size, step), length - size]


def background_of(image: np.ndarray) -> np.ndarray:
    """Mark air and black border of an image (H, W, C): (H, W) bool.

    This is a rule of ours: pixels that are dark in all channels (`AIR` of the range from the
    minimum) and connected with the image's edge. So a dark lesion within tissue is no background. A
    constant image is all background.
    """
    brightest = image.max(axis=2)
    flat = brightest.ravel()
    low = brightest.min()
    high = np.percentile(flat[:: max(1, len(flat) // PIXEL_SAMPLE)], 99.5)
    if high <= low:
        high = brightest.max()
    if high <= low:
        return np.ones(brightest.shape, bool)
    dark = brightest <= low + AIR * (float(high) - float(low))
    if not _edge(dark).any():  # spares the labels
        return np.zeros(dark.shape, bool)
    components, count = ndimage.label(dark)
    is_background = np.zeros(count + 1, bool)
    is_background[_edge(components)] = True
    is_background[0] = False  # label of what is not dark
    return np.asarray(is_background[components])


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Stretch an (H, W, C) image, bicubic with antialiasing; type and value range stay."""
    if image.shape[:2] == (height, width):
        return image
    channels = image.shape[2]
    if image.dtype == np.uint8 and channels in (1, 3):
        pixels = _resize_bicubic(image[:, :, 0] if channels == 1 else image, height, width)
        return pixels.reshape(height, width, -1)
    # Pillow resizes other types by nearest neighbor only, but 32-bit floats properly.
    planes = np.moveaxis(image.astype(np.float32), 2, 0)
    resized = np.stack([_resize_bicubic(plane, height, width) for plane in planes], axis=2)
    if image.dtype == np.float32:
        return resized
    limits = np.iinfo(image.dtype)
    return resized.round().clip(limits.min, limits.max).astype(image.dtype)


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Stretch an (H, W) mask of 0 and 1: 1 where lesion covers at least half of a new pixel.

    Half keeps the area unbiased, unlike nearest neighbor or "any". A lesion too small to reach half
    anywhere keeps its most covered pixels, so that no lesion image turns into a normal one.
    """
    if mask.shape == (height, width):
        return mask
    if not mask.any():
        return np.zeros((height, width), np.uint8)
    picture = Image.fromarray(mask.astype(np.float32))
    share = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
    return (share >= min(0.5, share.max())).astype(np.uint8)


def _resize(
    image: np.ndarray, mask: np.ndarray | None, height: int, width: int
) -> tuple[np.ndarray, np.ndarray | None]:
    resized_mask = None if mask is None else resize_mask(mask, height, width)
    return resize_image(image, height, width), resized_mask


def _resize_bicubic(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def _edge(image: np.ndarray) -> np.ndarray:
    """Return the pixels of the four sides of an image (H, W)."""
    return np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])


def _has_lesion(mask: np.ndarray | None) -> bool:
    return mask is not None and bool(mask.any())


def _inner_size(height: int, width: int, config: PrepareConfig) -> tuple[int, int]:
    """Return height and width of a whole frame in its image: less than the image's if padded."""
    size = config.size
    if config.fit == "stretch":
        return size, size
    longer = max(height, width)
    return max(1, round(height * size / longer)), max(1, round(width * size / longer))


def _channels_first(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1))
