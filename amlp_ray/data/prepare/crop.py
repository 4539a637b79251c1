"""From a frame of any size to images of the size a network wants: stretched, padded, or cut into tiles.

Pixel values keep their type and scale. Where nothing is resized (tiles without `scale`), they are the source's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from amlp_ray.config import PrepareConfig

AIR = 0.04  # share of the range, from the minimum up to the 99.5th percentile, that still counts as air or black border
PIXEL_SAMPLE = (
    1 << 16
)  # pixels looked at for a percentile: exact enough for AIR, and no sort of a large photograph


class Cutting(NamedTuple):
    """Where an image of the dataset lies in its frame, and what is known of it before it is cut."""

    y: int  # of the upper left pixel, in the (scaled) frame; 0 where the whole frame is taken
    x: int
    background: float  # share of air, black border and padding, 0 to 1
    foreground: float  # share of tissue where padding is not counted, 0 to 1
    lesion: bool


def cuttings(
    image: np.ndarray, mask: np.ndarray | None, config: PrepareConfig
) -> Iterator[Cutting]:
    """List what is cut from a frame (H, W, C): the frame itself, or its tiles in rows from the upper left.

    Tiles start every `size * (1 - overlap)` pixels; the last of a row or column ends at the frame's edge, so that all
    is covered. A frame smaller than a tile is padded at its lower and right edge.
    """
    size = config.size
    air = background_of(image)
    height, width = air.shape
    if config.fit != "tiles":
        filled = 1.0
        if config.fit == "pad":
            inner = _inner(height, width, size)
            filled = inner[0] * inner[1] / size**2
        tissue = 1 - float(air.mean())
        yield Cutting(0, 0, 1 - filled * tissue, tissue, mask is not None and bool(mask.any()))
        return
    for y in origins(height, size, config.overlap):
        for x in origins(width, size, config.overlap):
            inside = air[y : y + size, x : x + size]
            pixels = inside.size - np.count_nonzero(inside)
            lesion = mask is not None and bool(mask[y : y + size, x : x + size].any())
            yield Cutting(y, x, 1 - pixels / size**2, pixels / inside.size, lesion)


def cut(
    image: np.ndarray, mask: np.ndarray | None, y: int, x: int, config: PrepareConfig
) -> tuple[np.ndarray, np.ndarray | None]:
    """Bring what lies at (y, x) of a frame (H, W, C) to (C, size, size), and its mask (H, W) to (size, size).

    - `stretch`: to a square, bicubic with antialiasing.
    - `pad`: the longer side becomes `size`, the shorter keeps the aspect, centred; borders are the frame's minimum.
    - `tiles`: cut as it is; what lies beyond the frame is its minimum.

    Borders hold no lesion.
    """
    size = config.size
    if config.fit == "stretch":
        fitted = resize_image(image, size, size)
        return _channels_first(fitted), None if mask is None else resize_mask(mask, size, size)
    if config.fit == "pad":
        height, width = _inner(image.shape[0], image.shape[1], size)
        top, left = (size - height) // 2, (size - width) // 2
        inner, inner_mask = (
            resize_image(image, height, width),
            None if mask is None else resize_mask(mask, height, width),
        )
    else:
        top = left = 0
        inner = image[y : y + size, x : x + size]
        inner_mask = None if mask is None else mask[y : y + size, x : x + size]
    height, width = inner.shape[:2]
    out = np.empty((size, size, image.shape[2]), image.dtype)
    out[:] = image.min(axis=(0, 1))
    out[top : top + height, left : left + width] = inner
    if inner_mask is None:
        return _channels_first(out), None
    out_mask = np.zeros((size, size), np.uint8)
    out_mask[top : top + height, left : left + width] = inner_mask
    return _channels_first(out), out_mask


def scaled(
    image: np.ndarray, mask: np.ndarray | None, config: PrepareConfig
) -> tuple[np.ndarray, np.ndarray | None]:
    """Shrink a frame by `settings.scale` before its tiles are cut."""
    if config.scale == 1:
        return image, mask
    height, width = (max(1, round(side * config.scale)) for side in image.shape[:2])
    return resize_image(image, height, width), None if mask is None else resize_mask(
        mask, height, width
    )


def pixel_spacing(
    spacing: tuple[float, float] | None, height: int, width: int, config: PrepareConfig
) -> tuple[float, float] | None:
    """Millimetres of a stored pixel, down and across, from those of the frame of `height` x `width` pixels."""
    if spacing is None:
        return None
    if config.fit == "stretch":
        factors = height / config.size, width / config.size
    elif config.fit == "pad":
        inner = _inner(height, width, config.size)
        factors = height / inner[0], width / inner[1]
    else:
        factors = 1 / config.scale, 1 / config.scale
    return spacing[0] * factors[0], spacing[1] * factors[1]


def origins(length: int, size: int, overlap: float) -> list[int]:
    """Where tiles of `size` begin along a side of `length` pixels.

    >>> origins(250, 100, 0.0), origins(250, 100, 0.5), origins(60, 100, 0.0)
    ([0, 100, 150], [0, 50, 100, 150], [0])
    """
    if length <= size:
        return [0]
    step = max(1, round(size * (1 - overlap)))
    return [*range(0, length - size, step), length - size]


def background_of(image: np.ndarray) -> np.ndarray:
    """Mark air and black border of an image (H, W, C): (H, W) bool.

    Our rule: pixels that are dark in all channels (`AIR` of the range from the minimum) and hang together with the
    image's edge, so that a dark lesion within tissue is none. A constant image is all background.
    """
    brightest = image.max(axis=2)
    low, flat = brightest.min(), brightest.ravel()
    high = np.percentile(flat[:: max(1, len(flat) // PIXEL_SAMPLE)], 99.5)
    if high <= low:
        high = brightest.max()
    if high <= low:
        return np.ones(brightest.shape, bool)
    dark = brightest <= low + AIR * (float(high) - float(low))
    edge = np.concatenate([dark[0], dark[-1], dark[:, 0], dark[:, -1]])
    if not edge.any():
        return np.zeros(dark.shape, bool)
    parts, count = ndimage.label(dark)
    touching = np.zeros(count + 1, bool)
    touching[np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])] = True
    touching[0] = False
    return np.asarray(touching[parts])


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Stretch an (H, W, C) image, bicubic with antialiasing; type and value range are kept."""
    if image.shape[:2] == (height, width):
        return image
    size = (width, height)
    if image.dtype == np.uint8 and image.shape[2] in (1, 3):
        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        return np.asarray(picture.resize(size, Image.Resampling.BICUBIC)).reshape(height, width, -1)
    planes = [  # Pillow resizes other types by nearest neighbour only, but 32-bit floats properly
        np.asarray(
            Image.fromarray(image[:, :, c].astype(np.float32)).resize(
                size, Image.Resampling.BICUBIC
            )
        )
        for c in range(image.shape[2])
    ]
    out = np.stack(planes, axis=2)
    if image.dtype == np.float32:
        return out
    limits = np.iinfo(image.dtype)
    return out.round().clip(limits.min, limits.max).astype(image.dtype)


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Stretch an (H, W) mask of 0 and 1: 1 where lesion covers at least half of a new pixel.

    Half keeps the area unbiased, unlike nearest neighbour or "any". A lesion too small to reach half anywhere keeps
    its most covered pixels, so that no lesion image turns into a normal one.
    """
    if mask.shape == (height, width):
        return mask
    if not mask.any():
        return np.zeros((height, width), np.uint8)
    share = np.asarray(
        Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    )
    return (share >= min(0.5, share.max())).astype(np.uint8)


def _inner(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of an image whose longer side becomes `size`."""
    longer = max(height, width)
    return max(1, round(height * size / longer)), max(1, round(width * size / longer))


def _channels_first(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1))
