"""Image and mask files -> arrays of the size a network wants.

Images come as (H, W, C), C 1 or 3, uint8 or uint16 as stored: nothing is windowed or rescaled in value.
Masks come as (H, W) uint8 of 0 and 1. Orientation tags are not applied, so that an image fits its mask pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from amlp_ray.errors import DataError

COLOUR_MODES = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV")
THUMBNAIL = 48  # pixels a side; enough to tell copies from neighbours of one video, small enough to compare all pairs
COLOURED = 32  # a pixel whose channels differ by more has a colour; JPEG rounding stays below
GREY_SHARE = 0.01  # coloured share up to which an image is grey: exported ultrasound has coloured callipers and logos


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as (H, W, 1) or (H, W, 3), uint8, or uint16 where it has 16 bits a pixel. Alpha is dropped.

    Raises:
        DataError: the file cannot be read, holds several frames, or pixels that fit neither type.
    """
    image = _open(path)
    if image.mode in ("1", "L", "LA", "La"):
        array = np.asarray(image.convert("L"))
    elif image.mode.startswith("I;16"):
        array = np.asarray(image).astype(np.uint16)
    elif image.mode == "I":
        array = np.asarray(image)
        if array.min() < 0 or array.max() > np.iinfo(np.uint16).max:
            raise DataError(
                f"{path} holds values from {array.min()} to {array.max()}, but 8 or 16 bits without sign are accepted; "
                f"convert it."
            )
        array = array.astype(np.uint16)
    elif image.mode in COLOUR_MODES:
        array = np.asarray(image.convert("RGB"))
    else:
        raise DataError(f"{path} has pixels of kind {image.mode!r}, but grey and RGB are accepted; convert it.")
    return array.reshape(*array.shape[:2], -1)


def read_mask(paths: Sequence[str | Path], shape: tuple[int, int]) -> np.ndarray:
    """Read the masks of one image of `shape` (H, W) and unite them: 1 where any colour channel of any is above zero,
    or above half where the file is a JPEG.

    Alpha is ignored: RGBA masks are opaque everywhere, so counting it would mark the whole image.

    Raises:
        DataError: a file cannot be read, or has another size than the image.
    """
    union = np.zeros(shape, np.uint8)
    for path in paths:
        mask = read_image(path)
        if mask.shape[:2] != tuple(shape):
            raise DataError(
                f"{path} is a mask of {mask.shape[1]}x{mask.shape[0]} pixels, but its image has "
                f"{shape[1]}x{shape[0]}; both must have the same size, so export the mask again."
            )
        # Masks of 0 and 1 exist, so anything counts; but JPEG leaves faint noise around and in empty masks.
        level = 127 if Path(path).suffix.lower() in (".jpg", ".jpeg") else 0
        union |= (mask > level).any(axis=2).astype(np.uint8)
    return union


def is_grey(image: np.ndarray) -> bool:
    """Say whether an (H, W, C) image is grey, up to a share `GREY_SHARE` of coloured pixels such as callipers."""
    if image.shape[2] == 1:
        return True
    spread = image.max(axis=2) - image.min(axis=2)
    return float((spread > COLOURED).mean()) <= GREY_SHARE


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Bring an (H, W, C) image to 1 (luma) or 3 (copies) channels."""
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]  # only 8-bit images have colour here


def _open(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1) if image.format in ("TIFF", "GIF") else 1
            if frames == 1:
                image.load()
                return image
    except Exception as error:  # Pillow's readers raise many types on damaged files, and all mean the same here
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(f"{path} cannot be read as an image ({reason}); replace or remove it.") from None
    raise DataError(f"{path} holds {frames} frames, but one is accepted; export each frame as an image of its own.")
