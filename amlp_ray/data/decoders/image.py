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
from amlp_ray.data.decoders.image_file import DecodedImage, decode_image_file
from amlp_ray.data.decoders.intensity import percentile_range, smallest_exact, to_bytes
from amlp_ray.data.decoders.masks import select_lesion
from amlp_ray.data.layouts.item import SourceImage
from amlp_ray.errors import DataError

# A pixel has a color if its channels differ by a larger share of the range; JPEG stays below.
COLORED = 32 / 255
# Share of colored pixels up to which an image is gray: exported ultrasound has calipers and logos.
GRAY_SHARE = 0.01
LUMA = (0.299, 0.587, 0.114)  # Pillow's weights of red, green and blue
JPEGS = ("JPEG", "MPO")


def read_image(item: SourceImage, config: PrepareConfig, read: ReadFile) -> Iterator[Frame]:
    """Yield the one frame of a picture, with the union of its masks and outlines.

    Without these there is no mask.

    Raises:
        DataError: the image or a mask cannot be read, or they differ in size.
    """
    path = item.images[0]
    decoded = decode_image_file(path, read)
    image = _to_stored_dtype(path, decoded.pixels)
    notes = list(decoded.notes)
    shape = (image.shape[0], image.shape[1])
    mask = None
    if item.masks or item.outlines:
        mask = np.zeros(shape, np.uint8)
        for mask_path in item.masks:
            lesion, mask_notes = _read_mask(mask_path, shape, config.lesion_labels, read)
            mask |= lesion
            mask_name = PurePosixPath(mask_path).name
            notes += [f"its mask {mask_name} {note}" for note in mask_notes]
        if item.outlines:
            mask |= draw_outlines(item.outlines, shape, path)
    yield Frame(_map_values(path, image, config), mask, notes=tuple(notes))


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


def _read_mask(
    path: str, shape: tuple[int, int], lesion_labels: tuple[int, ...], read: ReadFile
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the mask (H, W) of an image of `shape`, uint8 of 0 and 1, and notes.

    A pixel is lesion if any color channel is above zero, above half in a JPEG, or has one of
    `lesion_labels`. Alpha is ignored: RGBA masks are opaque everywhere, so counting it would mark
    the whole image.
    """
    decoded = decode_image_file(path, read, is_mask=bool(lesion_labels))
    labels = decoded.pixels
    if labels.shape[:2] != shape:
        raise DataError(
            f"{path} is a mask of {labels.shape[1]}x{labels.shape[0]} pixels, but its image has "
            f"{shape[1]}x{shape[0]}; both must have the same size, so export the mask again."
        )
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise DataError(
            f"{path} is a mask with NaN or infinite values, but labels are numbers; "
            "export it again."
        )
    is_jpeg = decoded.file_format in JPEGS
    if is_jpeg and lesion_labels not in ((), (255,)):
        raise DataError(
            f"{path} is a JPEG, which blurs label values, so lesion_labels "
            f"{', '.join(map(str, lesion_labels))} cannot be told apart; export the mask as PNG."
        )
    if lesion_labels and not is_jpeg:
        lesion, label_notes = select_lesion(_labels_of(path, decoded, lesion_labels), lesion_labels)
        return lesion, decoded.notes + label_notes
    # Masks of 0 and 1 exist, so anything counts. But JPEG leaves faint noise in empty masks.
    threshold = 127 if is_jpeg else 0
    return np.asarray((labels > threshold).any(axis=2), np.uint8), decoded.notes


def _labels_of(path: str, decoded: DecodedImage, lesion_labels: tuple[int, ...]) -> np.ndarray:
    """Return the labels (H, W) of a mask whose color channels are equal."""
    labels = decoded.pixels[:, :, 0]
    if not (decoded.pixels == labels[:, :, None]).all():
        raise DataError(
            f"{path} is a mask in colors, but lesion_labels need one value a pixel; "
            "export it as gray or with a palette."
        )
    # What is set in a 1-bit mask is 1 in arrays and 255 in viewers, and BUSI mixes such masks with
    # 8-bit ones.
    if decoded.is_one_bit and 255 in lesion_labels and 1 not in lesion_labels:
        return labels * np.uint8(255)
    return labels
