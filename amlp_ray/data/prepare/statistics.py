"""Sum up mean and standard deviation per channel, the same in any order of the parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


class Statistics:
    """Running statistics of images, per channel.

    Integers: pixel count and the exact sums of values and of squares. Floats: pixel count, mean and
    sum of squared deviations from it, because squares of floats far from zero would lose a small
    spread (Chan, Golub and LeVeque 1983).
    """

    def __init__(self, channels: int, dtype: str) -> None:
        """Start without images."""
        self.is_exact = dtype != "float32"
        # (3, channels): the rows named above
        self._rows: np.ndarray = np.zeros((3, channels), object if self.is_exact else np.float64)

    def add(self, image: np.ndarray) -> None:
        """Add an image (C, H, W)."""
        flat = image.reshape(len(image), -1)
        channels, pixels = flat.shape
        if self.is_exact:
            values = flat.astype(np.int64)  # below 2^63 for up to 2^31 pixels of 16 bits
            sums = values.sum(axis=1).tolist()
            squares = (values * values).sum(axis=1).tolist()
            self.add_rows([[pixels] * channels, sums, squares])
            return
        mean = flat.mean(axis=1, dtype=np.float64)
        deviations = ((flat - mean[:, None]) ** 2).sum(axis=1)
        self._merge(np.stack([np.full(channels, float(pixels)), mean, deviations]))

    def add_rows(self, rows: Sequence[Sequence[Any]]) -> None:
        """Add what `to_rows` of other statistics returned."""
        self._merge(np.array(rows, dtype=self._rows.dtype))

    def to_rows(self) -> list[list[Any]]:
        """Return plain values, which JSON keeps to the last digit."""
        return [list(row) for row in self._rows.tolist()]

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return both per channel. A flat channel has std 1, so that normalizing gives 0."""
        means = []
        stds = []
        for count, first, second in self._rows.T:
            if self.is_exact:
                mean = first / count
                variance = (count * second - first * first) / count**2
            else:
                mean = float(first)
                variance = float(second / count)
            means.append(mean)
            stds.append(math.sqrt(variance) or 1.0)
        return tuple(means), tuple(stds)

    def _merge(self, other: np.ndarray) -> None:
        if self.is_exact:
            self._rows = self._rows + other
            return
        count, mean, deviations = self._rows
        other_count, other_mean, other_deviations = other
        difference = other_mean - mean
        total = count + other_count
        mean = mean + difference * (other_count / total)
        between = difference**2 * (count * other_count / total)
        self._rows = np.stack([total, mean, deviations + other_deviations + between])
