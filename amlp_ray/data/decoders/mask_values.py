"""Values of a mask file, from which a set's lesion values are chosen.

A mask file has up to three planes that may mark a lesion: its colors, the indices of its palette,
and its alpha. Which of them does, and above which value, is decided for a whole set: see
`mask_rule`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

MAX_VALUES = 32  # that are listed; label maps have fewer, and blurred masks more
# From here to one minus it, as a share of the highest value, a value is neither dark nor bright.
DARK = 0.25

Plane = Literal["colors", "indices", "alpha"]
# unused: opaque everywhere, no alpha, or it marks what the colors mark. only: the colors are above
# zero everywhere or nowhere. conflict: alpha and colors mark different pixels.
AlphaUse = Literal["unused", "only", "conflict"]


class PlaneValues(NamedTuple):
    """Values of one plane of a mask."""

    values: tuple[float, ...]  # all, in order; empty if there are more than MAX_VALUES
    num_values: int
    lowest: float
    highest: float
    middle: float  # share of pixels that are neither dark nor bright, of those that are not dark
    is_whole: bool  # no value has a fraction

    @property
    def is_exact(self) -> bool:
        """Whether there is background 0 and at most one value above it."""
        return self.lowest == 0 and self.num_values <= 2


class MaskValues(NamedTuple):
    """Values of a mask file; plain, as they travel from workers."""

    path: str
    colors: PlaneValues  # of the brightest channel
    num_colors: int  # counted up to 8; 0 if gray
    is_colored: bool  # channels differ, and there is no palette
    lossy_kind: str  # such as "a JPEG", if its compression blurs values
    is_one_bit: bool
    palette: tuple[tuple[int, int], ...] = ()  # the used indices, each with its color 0xRRGGBB
    has_gray_palette: bool = False
    indices: PlaneValues | None = None
    alpha: PlaneValues | None = None
    alpha_use: AlphaUse = "unused"


def plane_values(plane: np.ndarray) -> PlaneValues:
    """Sum up the values of a plane (H, W)."""
    if plane.dtype == np.uint8:
        counts = np.bincount(plane.ravel(), minlength=256)
        values = np.flatnonzero(counts)
        counts = counts[values]
    else:
        values, counts = np.unique(plane, return_counts=True)
    lowest = float(values[0])
    highest = float(values[-1])
    is_dark = values < DARK * highest
    is_middle = ~is_dark & (values < (1 - DARK) * highest)
    num_not_dark = int(counts[~is_dark].sum())
    middle = float(counts[is_middle].sum()) / num_not_dark if num_not_dark else 0.0
    return PlaneValues(
        values=tuple(map(float, values.tolist())) if len(values) <= MAX_VALUES else (),
        num_values=len(values),
        lowest=lowest,
        highest=highest,
        middle=round(middle, 6),
        is_whole=values.dtype.kind != "f" or bool((values == np.rint(values)).all()),
    )
