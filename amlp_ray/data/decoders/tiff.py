"""Read from a TIFF's tags what Pillow does not heed: planes without a directory, and polarity."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from PIL import ImageFile

BITS_PER_SAMPLE = 258
COMPRESSION = 259
PHOTOMETRIC = 262
DESCRIPTION = 270
STRIP_OFFSETS = 273
SAMPLES_PER_PIXEL = 277
STRIP_BYTES = 279
IMAGE_DEPTH = 32997
METAMORPH_PLANES = 33629  # a value per plane
UNCOMPRESSED = 1
WHITE_IS_ZERO = 0

# ImageJ writes a line `images=10`, and tifffile `{"shape": [10, 32, 32]}` or `shape=(10, 32, 32)`.
IMAGEJ_COUNT = re.compile(r"\AImageJ=.*?^images=(\d{1,9})$", re.DOTALL | re.MULTILINE)
TIFFFILE_SHAPE = re.compile(r"\A\{?\"?shape\"?\s*[:=]\s*[\[(]([\d,\s]{1,200})[\])]")


def count_planes(image: ImageFile.ImageFile, file_size: int) -> int:
    """Count the images that the first directory of a TIFF stands for.

    Large stacks have one directory, and their planes follow one another without compression. A
    description alone counts for nothing: pages cut out of a stack keep it.
    """
    tags: Any = getattr(image, "tag_v2", {})
    depth = _number(tags.get(IMAGE_DEPTH, 1))
    if depth > 1:
        return depth
    if _number(tags.get(COMPRESSION, UNCOMPRESSED)) != UNCOMPRESSED:
        return 1
    samples = _number(tags.get(SAMPLES_PER_PIXEL, 1))
    row_bits = image.width * samples * _number(tags.get(BITS_PER_SAMPLE, 1))
    plane_bytes = image.height * math.ceil(row_bits / 8)
    described = _described_planes(tags, image.width * image.height * samples)
    start = _number(tags.get(STRIP_OFFSETS, file_size))
    if described > 1 and file_size - start >= described * plane_bytes:
        return described
    strip_bytes = tags.get(STRIP_BYTES, 0)
    stored_bytes = sum(strip_bytes) if isinstance(strip_bytes, tuple) else strip_bytes
    return max(1, int(stored_bytes) // plane_bytes)


def is_inverted(image: ImageFile.ImageFile) -> bool:
    """Return whether small values are white, and Pillow will not turn them around.

    It does for up to 8 bits; its name of such pixels has an `I` for "inverted", as in `L;4IR`.
    Called before loading.
    """
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(PHOTOMETRIC) != WHITE_IS_ZERO or not image.tile:
        return False
    arguments = image.tile[0].args
    raw_mode = arguments[0] if isinstance(arguments, tuple) else arguments
    return "I" not in str(raw_mode).partition(";")[2]


def invert(array: np.ndarray) -> np.ndarray:
    """Swap black and white of whole numbers over the full range of their type."""
    limits = np.iinfo(array.dtype)
    return (limits.max + limits.min - array.astype(np.int64)).astype(array.dtype)


def _described_planes(tags: Any, plane_values: int) -> int:
    """Return the number of planes that the description or MetaMorph's tag claims."""
    metamorph = tags.get(METAMORPH_PLANES, ())
    if isinstance(metamorph, tuple) and metamorph:
        return len(metamorph)
    description = str(tags.get(DESCRIPTION, ""))
    if match := IMAGEJ_COUNT.match(description):
        return int(match[1])
    if match := TIFFFILE_SHAPE.match(description):
        sizes = [int(size) for size in match[1].split(",") if size.strip()]
        return math.prod(sizes) // plane_values
    return 1


def _number(value: Any) -> int:
    """Return a tag's value, or the first of several."""
    return int(value[0] if isinstance(value, tuple) else value)
