"""The order in which an epoch gives a split's images: one definition, whether they are resident, mapped or streamed.

A split of up to `WINDOW` bytes is permuted as a whole.

Of a larger one, row groups are permuted, since a group is what can be read at once, and their rows written one after
another. The rows are cut into L equal lanes, each lane is shuffled among windows of its share of `WINDOW`, and global
batch b is the b-th piece of every lane, so it holds images from L distant places. L is the largest divisor of the batch
size up to `LANES`.

Nothing of this depends on the number of workers: worker r of w takes the r-th of w pieces of each global batch, as
equal as can be. Where w divides L, it reads the row groups of its own lanes only; else neighbours read some twice.

The last incomplete batch is dropped, so an image comes once in an epoch or not at all; only a split smaller than a
batch repeats, so that there is always a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from amlp_ray.data.parquet import image_bytes

if TYPE_CHECKING:
    from amlp_ray.data.dataset import PatchDataset

WINDOW = 256 << 20  # bytes of images that one worker shuffles among, and so has to hold
LANES = 8


class Unit(NamedTuple):
    """A row group: which of which part, and its rows in the split."""

    part: int
    group: int
    start: int
    rows: int


def units_of(dataset: PatchDataset, split: str) -> list[Unit]:
    """The row groups of a split, in order, from the manifest alone."""
    each = dataset.manifest.group_rows
    units, start = [], 0
    for number, part in enumerate(dataset.manifest.parts[split]):
        for group, first in enumerate(range(0, part.rows, each)):
            rows = min(each, part.rows - first)
            units.append(Unit(number, group, start, rows))
            start += rows
    return units


def lanes_for(batch_size: int) -> int:
    """How many lanes a large split is cut into.

    >>> lanes_for(256), lanes_for(12), lanes_for(7), lanes_for(11)
    (8, 6, 7, 1)
    """
    return max(lanes for lanes in range(1, min(LANES, batch_size) + 1) if batch_size % lanes == 0)


def share_of(batch_size: int, rank: int, world: int) -> slice:
    """Which images of a global batch are worker `rank`'s, of `world`.

    >>> [share_of(16, rank, 3) for rank in range(3)]
    [slice(0, 5, None), slice(5, 10, None), slice(10, 16, None)]
    """
    return slice(rank * batch_size // world, (rank + 1) * batch_size // world)


def epoch_order(
    unit_rows: np.ndarray, *, batch_size: int, lanes: int, window: int, seed: int, epoch: int
) -> np.ndarray:
    """The rows of an epoch's global batches, (steps, batch_size) int64.

    Args:
        unit_rows: rows of each unit of the split, in stored order.
        batch_size: images of a global batch.
        lanes: a divisor of `batch_size`; 0 permutes the split as a whole.
        window: rows of a lane that are shuffled among each other.
        seed: of the run.
        epoch: from 1.
    """
    draw = np.random.default_rng([seed, epoch])
    count = int(unit_rows.sum())
    steps = max(1, count // batch_size)
    if not lanes:
        order = draw.permutation(count)
        order = np.resize(
            order, max(count, batch_size)
        )  # repeats only where the split is below a batch
        return order[: steps * batch_size].reshape(steps, batch_size)
    starts = np.cumsum(unit_rows) - unit_rows
    chosen = draw.permutation(len(unit_rows))
    sizes = unit_rows[chosen]
    # Row numbers of the chosen units one after another: each unit's start, and how far into the unit.
    order = np.arange(count) + np.repeat(starts[chosen] - (np.cumsum(sizes) - sizes), sizes)
    each = batch_size // lanes
    laid = order[: steps * batch_size].reshape(lanes, steps * each)
    for lane, rows in enumerate(laid):
        # Lanes turn to their next window one after another: a reader reads all the time instead of all at once.
        edges = range(window * (lane + 1) // lanes, len(rows), window)
        for begin, end in pairwise([0, *edges, len(rows)]):
            draw.shuffle(rows[begin:end])
    return laid.reshape(lanes, steps, each).transpose(1, 0, 2).reshape(steps, batch_size)


@dataclass(frozen=True)
class Order:
    """The order of one split for one batch size and seed, and how many workers share it; small, so that it travels."""

    units: tuple[Unit, ...]
    batch_size: int
    world: int
    lanes: int  # 0: permuted as a whole
    window: int  # rows, of a lane
    seed: int

    @classmethod
    def of(
        cls, dataset: PatchDataset, split: str, *, batch_size: int, seed: int, world: int = 1
    ) -> Order:
        """The order of a dataset's split; `world` is at most `batch_size`."""
        image = image_bytes(dataset.shape, dataset.manifest.dtype)
        whole = dataset.bytes(split) <= WINDOW or dataset.count(split) <= batch_size
        lanes = 0 if whole else lanes_for(batch_size)
        window = max(1, WINDOW // lanes_for(batch_size) // image)
        return cls(tuple(units_of(dataset, split)), batch_size, world, lanes, window, seed)

    @cached_property
    def unit_rows(self) -> np.ndarray:
        """(units,) rows of each unit."""
        return np.array([unit.rows for unit in self.units], np.int64)

    @property
    def steps(self) -> int:
        """Global batches of an epoch."""
        return max(1, int(self.unit_rows.sum()) // self.batch_size)

    def epoch(self, epoch: int) -> np.ndarray:
        """Rows of the global batches, (steps, batch_size) int64; `epoch` is 1-based."""
        return epoch_order(
            self.unit_rows,
            batch_size=self.batch_size,
            lanes=self.lanes,
            window=self.window,
            seed=self.seed,
            epoch=epoch,
        )

    def share(self, epoch: int, rank: int) -> np.ndarray:
        """What one worker takes of them, (steps, its share of a batch)."""
        return self.epoch(epoch)[:, share_of(self.batch_size, rank, self.world)]

    def uses(self, unit: np.ndarray, piece: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """When each unit is needed, by rows whose units are `unit` (N,) and which are taken `piece` at a time.

        Returns:
            units (U,) by first use, the piece that needs each first (U,), and last (U,).
        """
        pieces = np.arange(len(unit)) // piece
        first = np.full(len(self.units), len(unit))
        last = np.full(len(self.units), -1)
        np.minimum.at(first, unit, pieces)
        np.maximum.at(last, unit, pieces)
        used = np.argsort(first, kind="stable")[: int((last >= 0).sum())]
        return used, first[used], last[used]

    def unit_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of the unit that each row lies in."""
        return np.searchsorted(np.cumsum(self.unit_rows), rows, side="right")


def ahead(needed: np.ndarray, steps: int, distance: int) -> Iterator[slice]:
    """For each step, which units (positions in `needed`, ascending) to begin reading, `distance` units ahead of use."""
    seen = 0
    for step in range(steps):
        until = min(len(needed), int(np.searchsorted(needed, step, side="right")) + distance)
        yield slice(seen, max(seen, until))
        seen = max(seen, until)
