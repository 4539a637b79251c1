"""From values in any unit to 0-255, for the settings `values=window` and `values=percentile`."""

from __future__ import annotations

import numpy as np

PERCENTILES = (0.5, 99.5)  # what becomes 0 and 255


def to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map `low` to 0 and `high` to 255, linearly, clipped and rounded to uint8; a step where both are one.

    >>> to_bytes(np.array([-2000, -1000, -300, 400, 3000]), -1000, 400)
    array([  0,   0, 128, 255, 255], dtype=uint8)
    """
    if high <= low:
        return np.where(values > low, 255, 0).astype(np.uint8)
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def percentile_range(values: np.ndarray) -> tuple[float, float]:
    """Return the values, of any shape, that become 0 and 255 under `values=percentile`.

    Only what lies above the minimum counts: of most scans more than half is air, all of one value.

    >>> percentile_range(np.array([0] * 1000 + list(range(1, 202))))
    (2.0, 200.0)
    """
    lowest = values.min()
    inside = values[values > lowest]
    if not inside.size:
        return float(lowest), float(lowest)
    low, high = np.percentile(inside, PERCENTILES)
    return float(low), float(high)


def smallest_exact(values: np.ndarray, low: int, high: int) -> np.ndarray:
    """Return whole numbers as the smallest of uint8, uint16 and int16 that holds them, else as float32.

    `low` and `high` are what a header says is possible. They decide where they can, so that the slices of a series
    agree; a range wider than 16 bits (16-bit CT with a rescale intercept) leaves it to the values found.
    """
    found_low, found_high = int(values.min()), int(values.max())
    kinds = (np.uint8, np.uint16, np.int16)
    declared = [kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max]
    for kind in declared or [np.int16 if low < 0 else np.uint16]:
        if np.iinfo(kind).min <= found_low and found_high <= np.iinfo(kind).max:
            return values.astype(kind)
    return values.astype(np.float32)
