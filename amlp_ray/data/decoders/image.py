"""Decode pictures (PNG, JPEG, TIFF, .npy, ...) with masks or outlines to one frame each.

Images come as (H, W, C) in the values of the file: uint8, uint16, int16 or float32. Masks come as
(H, W) uint8 of 0 and 1. Orientation tags are not applied, so an image fits its mask pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.coco_polygons import draw_outlines
from amlp_ray.data.decoders.frame import DTYPES, MAX_EXACT, Frame, ReadFile
from amlp_ray.data.decoders.image_file import decode_image_file
from amlp_ray.data.decoders.intensity import percentile_range, smallest_exact, to_bytes
from amlp_ray.data.decoders.mask_file import decode_mask_file
from amlp_ray.data.decoders.mask_rule import MaskRule, choose_rule, find_lesion
from amlp_ray.data.layouts.item import SourceImage
from amlp_ray.errors import DataError

# A pixel has a color if its channels differ by a larger share of the range; JPEG stays below.
COLORED = 32 / 255
# Share of colored pixels up to which an image is gray: exported ultrasound has calipers and logos.
GRAY_SHARE = 0.01
LUMA = (0.299, 0.587, 0.114)  # Pillow's weights of red, green and blue


def read_image(
    item: SourceImage, config: PrepareConfig, read: ReadFile, rule: MaskRule | None = None
) -> Iterator[Frame]:
    """Yield the one frame of a picture, with the union of its masks and outlines.

    Without these there is no mask.

    Args:
        item: a picture.
        config: which values are wanted.
        read: returns the content of a file.
        rule: how the masks of the set are read; None: as those of this picture alone suggest.

    Raises:
        DataError: the image or a mask cannot be read, or they differ in size.
    """
    path = item.images[0]
    decoded = decode_image_file(path, read)
    image = _to_stored_dtype(path, decoded.pixels)
    notes = list(decoded.notes)
    shape = (image.shape[0], image.shape[1])
    mask = None
    files = [decode_mask_file(mask_path, shape, read) for mask_path in item.masks]
    mask_values = tuple(file.values for file in files)
    if item.is_labeled:
        mask = np.zeros(shape, np.uint8)
        rule = rule or choose_rule(mask_values, config)
        for file in files:
            lesion, mask_notes = find_lesion(file, rule, config)
            mask |= lesion
            mask_name = PurePosixPath(file.values.path).name
            notes += [f"its mask {mask_name} {note}" for note in mask_notes]
        if item.outlines:
            mask |= draw_outlines(item.outlines, shape, path)
    yield Frame(_map_values(path, image, config), mask, notes=tuple(notes), mask_values=mask_values)


def is_gray(image: np.ndarray) -> bool:
    """Return whether an image (H, W, C) is gray, but for a few pixels such as calipers.

    Only three channels can be colors: any other number but one is not gray.
    """
    if image.shape[2] != 3:
        return image.shape[2] == 1
    highest = image.max(axis=2)
    lowest = image.min(axis=2)
    if image.dtype == np.uint8:
        spread = highest - lowest
        value_range = 255.0
    else:
        spread = highest.astype(np.float32) - lowest.astype(np.float32)
        value_range = float(highest.max()) - float(lowest.min())
    return float((spread > COLORED * value_range).mean()) <= GRAY_SHARE


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Bring an image (H, W, C) to another number of channels, keeping its type.

    Three become one by luma, and one becomes three by copies.

    Raises:
        DataError: any other change; the sentence does not name the file.
    """
    if image.shape[2] == channels:
        return image
    if (image.shape[2], channels) == (1, 3):
        return np.repeat(image, 3, axis=2)
    if (image.shape[2], channels) != (3, 1):
        raise DataError(
            f"An image of {image.shape[2]} channels cannot become one of {channels}: only 1 to 3 "
            f"and 3 to 1 can; set channels={image.shape[2]} or convert it."
        )
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
    luma = image.astype(np.float64) @ np.array(LUMA)
    if image.dtype.kind != "f":
        luma = np.rint(luma)
    return luma.astype(image.dtype)[:, :, None]


def _map_values(path: str, image: np.ndarray, config: PrepareConfig) -> np.ndarray:
    """Bring values to 0-255 if the config says so; colors by one range for all channels."""
    if config.values == "keep":
        return image
    if config.values == "window":
        if config.window is None:
            raise DataError(
                f"{path} is a picture, which names no window, so values=window needs one to be "
                "given: add --window LOW,HIGH in the values of the pictures, or take "
                "values=percentile."
            )
        return to_bytes(image, *config.window)
    if image.shape[2] == 3:
        return to_bytes(image, *percentile_range(image))
    planes = np.moveaxis(image, -1, 0)
    return np.stack([to_bytes(plane, *percentile_range(plane)) for plane in planes], axis=-1)


def _to_stored_dtype(path: str, pixels: np.ndarray) -> np.ndarray:
    """Bring pixels to one of DTYPES: as they are, or the smallest that holds all values exactly."""
    if pixels.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what overflows is infinite, and refused below
            pixels = pixels.astype(np.float32, copy=False)
        bad_pixels = int((~np.isfinite(pixels)).any(axis=2).sum())
        if bad_pixels:
            total = pixels.shape[0] * pixels.shape[1]
            raise DataError(
                f"{path} has NaN or infinite values in {bad_pixels} of {total} pixels, but all "
                "must be finite; replace the values or remove the file."
            )
        return pixels
    if pixels.dtype.name in DTYPES:
        return pixels
    lowest = int(pixels.min())
    highest = int(pixels.max())
    small = smallest_exact(pixels, lowest, highest)
    if small.dtype.kind != "f" or max(-lowest, highest) <= MAX_EXACT:
        return small
    raise DataError(
        f"{path} holds whole numbers from {lowest} to {highest}, but at most {MAX_EXACT} can be "
        "stored exactly; scale them."
    )
