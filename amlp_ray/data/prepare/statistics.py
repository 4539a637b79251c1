"""Mean and SD per channel, summed up in parts: the same whatever runs where, and right for values far from zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class Statistics:
    """Of integers the exact sums of values and squares; of floats pixel count, mean and squared deviations from it.

    Squares of floats far from zero would lose a small spread (Chan, Golub and LeVeque 1983).
    """

    def __init__(self, channels: int, dtype: str) -> None:
        self.exact = dtype != "float32"
        self._rows: np.ndarray = np.zeros((3, channels), dtype=object if self.exact else np.float64)

    def add(self, image: np.ndarray) -> None:
        """Take an image (C, H, W) in."""
        flat = image.reshape(len(image), -1)
        pixels = flat.shape[1]
        if not self.exact:
            mean = flat.mean(axis=1, dtype=np.float64)
            deviations = ((flat - mean[:, None]) ** 2).sum(axis=1)
            self._merge(np.stack([np.full(len(flat), float(pixels)), mean, deviations]))
            return
        integers = flat.astype(np.int64)  # below 2^63 for images of up to 2^31 pixels of 16 bits
        squares = (integers * integers).sum(axis=1)
        self._merge(
            np.array(
                [[pixels] * len(flat), integers.sum(axis=1).tolist(), squares.tolist()],
                dtype=object,
            )
        )

    def add_plain(self, rows: Sequence[Sequence[Any]]) -> None:
        """Take in what `plain` gave elsewhere."""
        self._merge(np.array(rows, dtype=self._rows.dtype))

    def plain(self) -> list[list[Any]]:
        """As plain values, which JSON keeps to the last digit."""
        return [list(row) for row in self._rows.tolist()]

    def mean_and_sd(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per channel; a flat channel gets SD 1, to become 0 and not NaN when it is normalised."""
        columns: Iterable[Any] = self._rows.T
        if self.exact:
            pairs = [
                (total / n, (n * square - total * total) / n**2) for n, total, square in columns
            ]
        else:
            pairs = [(float(mean), float(deviations / n)) for n, mean, deviations in columns]
        return tuple(mean for mean, _ in pairs), tuple(
            math.sqrt(variance) or 1.0 for _, variance in pairs
        )

    def _merge(self, other: np.ndarray) -> None:
        if self.exact:
            self._rows = self._rows + other
            return
        (n, mean, deviations), (m, other_mean, other_deviations) = self._rows, other
        apart = other_mean - mean
        together = n + m
        self._rows = np.stack(
            [
                together,
                mean + apart * (m / together),
                deviations + other_deviations + apart**2 * (n * m / together),
            ]
        )
