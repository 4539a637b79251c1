"""What a decoder yields, and how it reads files."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from amlp_ray.data.decoders.mask_values import MaskValues
from amlp_ray.errors import DataError

# Of stored images; each holds those before it, but int16 does not hold uint16.
DTYPES = ("uint8", "uint16", "int16", "float32")
MAX_EXACT = 2**24  # up to here a float32 holds every whole number

ReadFile = Callable[[str], bytes]  # returns the content of a path or URI, or raises OSError


class Frame(NamedTuple):
    """One two-dimensional image, as stored in its file."""

    image: np.ndarray  # (H, W, C), of one of DTYPES, all finite
    mask: np.ndarray | None  # (H, W) uint8 of 0 and 1; None: unlabeled
    number: int = 0  # slice or frame of its item, from 0
    spacing: tuple[float, float] | None = None  # mm of a pixel, down and across; None: not known
    notes: tuple[str, ...] = ()  # repairs, as sentences without the file's name
    mask_values: tuple[MaskValues, ...] = ()  # of the files that a picture's mask was read from


def read_content(path: str, read: ReadFile) -> bytes:
    """Read a file. Raises DataError if that fails."""
    try:
        return read(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); check that it is there and yours."
        ) from None


def common_dtype(dtypes: set[str]) -> str:
    """Return the smallest of DTYPES that holds every value of all of `dtypes`.

    >>> common_dtype({"uint8", "int16"}), common_dtype({"uint16", "int16"})
    ('int16', 'float32')
    """
    if {"uint16", "int16"} <= dtypes:
        return "float32"  # holds both exactly
    return max(dtypes, key=DTYPES.index)
