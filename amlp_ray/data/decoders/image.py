"""Pictures (PNG, JPEG, TIFF, .npy, ...) with masks or outlines -> one frame each.

Images come as (H, W, C) in the values of the file: uint8, uint16, int16 or float32; masks as (H, W) uint8 of 0 and 1.
Orientation tags are not applied, so that an image fits its mask pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.coco_polygons import draw_outlines
from amlp_ray.data.decoders.frame import DTYPES, Frame
from amlp_ray.data.decoders.image_file import Raster, read_raster
from amlp_ray.data.decoders.intensity import percentile_range, to_bytes
from amlp_ray.data.decoders.masks import lesion_of
from amlp_ray.data.layouts.item import SourceImage
from amlp_ray.errors import DataError

COLOURED = (
    32 / 255
)  # a pixel whose channels differ by a larger share of the range has a colour; JPEG stays below
GREY_SHARE = 0.01  # coloured share up to which an image is grey: exported ultrasound has coloured callipers and logos
EXACT = 2**24  # up to here a float32 holds every whole number
LUMA = (0.299, 0.587, 0.114)  # what Pillow weighs red, green and blue with
JPEGS = ("JPEG", "MPO")


def read_picture(
    item: SourceImage, config: PrepareConfig, read: Callable[[str], bytes]
) -> Iterator[Frame]:
    """Yield the one frame of a picture with the union of its masks and outlines; no mask where it has neither.

    Raises:
        DataError: the image or a mask cannot be read, or they differ in size.
    """
    path = item.images[0]
    raster = read_raster(path, read)
    image, notes = _in_stored_type(path, raster.pixels), list(raster.notes)
    shape = (image.shape[0], image.shape[1])
    mask: np.ndarray | None = None
    if item.masks or item.outlines:
        mask = np.zeros(shape, np.uint8)
    for mask_path in item.masks:
        lesion, mask_notes = _read_mask(mask_path, shape, config.lesion_labels, read)
        mask |= lesion
        notes += [f"its mask {PurePosixPath(mask_path).name} {note}" for note in mask_notes]
    if item.outlines:
        mask |= draw_outlines(item.outlines, shape, path)
    yield Frame(_valued(path, image, config), mask, notes=tuple(notes))


def is_gray(image: np.ndarray) -> bool:
    """Say whether an (H, W, C) image is grey, up to a share `GREY_SHARE` of coloured pixels such as callipers.

    Only three channels can be colours: any other number but one is not grey.
    """
    if image.shape[2] != 3:
        return image.shape[2] == 1
    highest, lowest = image.max(axis=2), image.min(axis=2)
    if image.dtype == np.uint8:
        spread, full = highest - lowest, 255.0
    else:
        spread = highest.astype(np.float32) - lowest.astype(np.float32)
        full = float(highest.max()) - float(lowest.min())
    return float((spread > COLOURED * full).mean()) <= GREY_SHARE


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Bring an (H, W, C) image to another number of channels, keeping its type: 3 to 1 by luma, 1 to 3 by copies.

    Raises:
        DataError: any other change; the sentence does not know the file.
    """
    if image.shape[2] == channels:
        return image
    if (image.shape[2], channels) == (1, 3):
        return np.repeat(image, 3, axis=2)
    if (image.shape[2], channels) != (3, 1):
        raise DataError(
            f"An image of {image.shape[2]} channels cannot become one of {channels}: only 1 to 3 and 3 to 1 can; set "
            f"channels={image.shape[2]} or convert it."
        )
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
    luma = image.astype(np.float64) @ np.array(LUMA)
    return (luma if image.dtype.kind == "f" else np.rint(luma)).astype(image.dtype)[:, :, None]


def _valued(path: str, image: np.ndarray, config: PrepareConfig) -> np.ndarray:
    """Bring values to 0-255 where asked: one range for all channels of a colour, a range for each of any others."""
    if config.values == "keep":
        return image
    if config.values == "window":
        if config.window is None:
            raise DataError(
                f"{path} is a picture, which names no window, so values=window needs one to be given: add --window "
                f"LOW,HIGH in the values of the pictures, or take values=percentile."
            )
        return to_bytes(image, *config.window)
    if image.shape[2] == 3:
        return to_bytes(image, *percentile_range(image))
    planes = [image[..., c] for c in range(image.shape[2])]
    return np.stack([to_bytes(plane, *percentile_range(plane)) for plane in planes], axis=-1)


def _in_stored_type(path: str, pixels: np.ndarray) -> np.ndarray:
    """Bring pixels to one of DTYPES: as they are, or the smallest that holds all values exactly."""
    if pixels.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what overflows is infinite, and refused below
            pixels = pixels.astype(np.float32, copy=False)
        bad = int((~np.isfinite(pixels)).any(axis=2).sum())
        if bad:
            raise DataError(
                f"{path} has NaN or infinite values in {bad} of {pixels.shape[0] * pixels.shape[1]} pixels, but all "
                f"must be finite; replace the values or remove the file."
            )
        return pixels
    if pixels.dtype.name in DTYPES:
        return pixels
    lowest, highest = int(pixels.min()), int(pixels.max())
    for name in ("uint8", "uint16", "int16"):
        if np.iinfo(name).min <= lowest and highest <= np.iinfo(name).max:
            return pixels.astype(name)
    if max(-lowest, highest) <= EXACT:
        return pixels.astype(np.float32)
    raise DataError(
        f"{path} holds whole numbers from {lowest} to {highest}, but at most {EXACT} can be stored exactly; scale them."
    )


def _read_mask(
    path: str, shape: tuple[int, int], wanted: tuple[int, ...], read: Callable[[str], bytes]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read a mask of an image of `shape` (H, W): 1 where any colour channel is above zero (above half in a JPEG), or
    has a wanted value; with notes.

    Alpha is ignored: RGBA masks are opaque everywhere, so counting it would mark the whole image.
    """
    raster = read_raster(path, read, labels=bool(wanted))
    labels = raster.pixels
    if labels.shape[:2] != shape:
        raise DataError(
            f"{path} is a mask of {labels.shape[1]}x{labels.shape[0]} pixels, but its image has "
            f"{shape[1]}x{shape[0]}; both must have the same size, so export the mask again."
        )
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise DataError(
            f"{path} is a mask with NaN or infinite values, but labels are numbers; export it again."
        )
    if raster.kind in JPEGS:
        if wanted not in ((), (255,)):
            raise DataError(
                f"{path} is a JPEG, which blurs label values, so lesion_labels {', '.join(map(str, wanted))} cannot be "
                f"told apart; export the mask as PNG."
            )
        # Masks of 0 and 1 exist, so anything counts; but JPEG leaves faint noise around and in empty masks.
        return np.asarray((labels > 127).any(axis=2), np.uint8), raster.notes
    if not wanted:
        return np.asarray((labels > 0).any(axis=2), np.uint8), raster.notes
    lesion, more = lesion_of(_one_channel(path, raster, wanted), wanted)
    return lesion, raster.notes + more


def _one_channel(path: str, raster: Raster, wanted: tuple[int, ...]) -> np.ndarray:
    """The labels (H, W) of a mask whose colour channels are equal."""
    labels = raster.pixels[:, :, 0]
    if not (raster.pixels == labels[:, :, None]).all():
        raise DataError(
            f"{path} is a mask in colours, but lesion_labels need one value a pixel; export it as grey or with a "
            f"palette."
        )
    # What is set in a 1-bit mask is 1 in arrays and 255 in viewers, and BUSI mixes such with 8-bit masks.
    return labels * np.uint8(255) if raster.is_bit and 255 in wanted and 1 not in wanted else labels
