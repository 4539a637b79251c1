"""What a decoder yields."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DTYPES = (
    "uint8",
    "uint16",
    "int16",
    "float32",
)  # of stored images; each holds those before it but int16 for uint16


class Frame(NamedTuple):
    """One two-dimensional image, as stored in its file."""

    image: np.ndarray  # (H, W, C), of one of DTYPES, all finite
    mask: np.ndarray | None  # (H, W) uint8 of 0 and 1; None: unlabelled
    number: int = 0  # slice or frame of its item, from 0
    spacing: tuple[float, float] | None = None  # mm of a pixel, down and across; None: not known
    notes: tuple[str, ...] = ()  # repairs, as sentences without the file's name


def holding_all(dtypes: set[str]) -> str:
    """The smallest of the stored types that holds every value of all of `dtypes`.

    >>> holding_all({"uint8", "int16"}), holding_all({"uint16", "int16"})
    ('int16', 'float32')
    """
    if {"uint16", "int16"} <= dtypes:
        return "float32"  # holds both exactly
    return max(dtypes, key=DTYPES.index)
