"""Define the order in which an epoch gives the images of a split.

The order is the same for mapped and streamed images, and for any number of workers.

A split of up to `WINDOW` bytes is permuted as a whole.

In a larger split, row groups are permuted, because a row group is what can be read at once. Their
rows are laid end to end and cut into L equal lanes. Each lane is shuffled within windows of its
share of `WINDOW`. Global batch b is the b-th piece of every lane, so it holds images from L distant
places. L is the largest divisor of the batch size up to `LANES`.

Worker r of w takes the r-th of w pieces of each global batch; pieces differ by one image at most.
If w divides L, a worker reads the row groups of its own lanes only. Otherwise neighbors both read
some row groups.

The last incomplete batch is dropped, so an image comes once in an epoch or not at all. Only a split
smaller than a batch repeats images, so that there is always a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from amlp_ray.data.manifest import Manifest

WINDOW = 256 << 20  # bytes of images that one worker shuffles among, and so holds in memory
LANES = 8


class RowGroup(NamedTuple):
    """A row group of a split."""

    part: int  # which Parquet file of the split
    number: int  # which row group of the file
    start: int  # its first row, counted over the split
    rows: int


def row_groups_of(manifest: Manifest, split: str) -> list[RowGroup]:
    """List the row groups of a split in stored order."""
    groups = []
    start = 0
    for part_number, part in enumerate(manifest.parts[split]):
        for number, first_row in enumerate(range(0, part.rows, manifest.group_rows)):
            rows = min(manifest.group_rows, part.rows - first_row)
            groups.append(RowGroup(part_number, number, start, rows))
            start += rows
    return groups


def num_lanes(batch_size: int) -> int:
    """Return how many lanes a large split is cut into.

    >>> num_lanes(256), num_lanes(12), num_lanes(7), num_lanes(11)
    (8, 6, 7, 1)
    """
    most = min(LANES, batch_size)
    return max(lanes for lanes in range(1, most + 1) if batch_size % lanes == 0)


def worker_share(batch_size: int, rank: int, world: int) -> slice:
    """Return which images of a global batch worker `rank` of `world` takes.

    >>> [worker_share(16, rank, 3) for rank in range(3)]
    [slice(0, 5, None), slice(5, 10, None), slice(10, 16, None)]
    """
    return slice(rank * batch_size // world, (rank + 1) * batch_size // world)


class ReadPlan(NamedTuple):
    """When each row group is needed by images that are taken in blocks."""

    groups: np.ndarray  # (U,) row groups in the order of their first use
    first_block: np.ndarray  # (U,) block that needs each group first, ascending
    last_block: np.ndarray  # (U,) block that needs each group last


@dataclass(frozen=True)
class Order:
    """Order of the images of one split for one batch size and seed.

    It is small, so it can be sent to other processes.
    """

    row_groups: tuple[RowGroup, ...]
    batch_size: int
    world: int  # number of workers that share each batch
    lanes: int  # 0: the split is permuted as a whole
    window: int  # rows of a lane that are shuffled among each other
    seed: int

    @classmethod
    def from_manifest(
        cls, manifest: Manifest, split: str, *, batch_size: int, seed: int, world: int = 1
    ) -> Order:
        """Create the order of a split; `world` is at most `batch_size`."""
        count = manifest.counts[split].images
        is_small = count * manifest.image_bytes <= WINDOW or count <= batch_size
        lanes = num_lanes(batch_size)
        window = max(1, WINDOW // lanes // manifest.image_bytes)
        groups = tuple(row_groups_of(manifest, split))
        return cls(groups, batch_size, world, 0 if is_small else lanes, window, seed)

    @cached_property
    def group_rows(self) -> np.ndarray:
        """(G,) rows of each row group."""
        return np.array([group.rows for group in self.row_groups], np.int64)

    @property
    def steps(self) -> int:
        """Global batches of an epoch."""
        return max(1, int(self.group_rows.sum()) // self.batch_size)

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Draw the rows of the global batches of an epoch, from 1: (steps, batch_size) int64."""
        rng = np.random.default_rng([self.seed, epoch])
        count = int(self.group_rows.sum())
        num_rows = self.steps * self.batch_size
        if not self.lanes:
            # Repeats rows only if the split is smaller than a batch.
            order = np.resize(rng.permutation(count), num_rows)
            return order.reshape(self.steps, self.batch_size)
        starts = np.cumsum(self.group_rows) - self.group_rows
        permuted = rng.permutation(len(self.group_rows))
        sizes = self.group_rows[permuted]
        # Rows of the permuted groups, end to end: the start of each row's group plus its offset.
        group_offsets = np.cumsum(sizes) - sizes
        order = np.arange(count) + np.repeat(starts[permuted] - group_offsets, sizes)
        lane_rows = order[:num_rows].reshape(self.lanes, -1)
        for lane, rows in enumerate(lane_rows):
            # Lanes reach their next window one after another, so a reader reads at an even pace.
            edges = range(self.window * (lane + 1) // self.lanes, len(rows), self.window)
            for begin, end in pairwise([0, *edges, len(rows)]):
                rng.shuffle(rows[begin:end])
        pieces = lane_rows.reshape(self.lanes, self.steps, -1)
        return pieces.transpose(1, 0, 2).reshape(self.steps, self.batch_size)

    def worker_rows(self, epoch: int, rank: int) -> np.ndarray:
        """Return the rows that one worker takes of each batch: (steps, its share of a batch)."""
        return self.epoch_rows(epoch)[:, worker_share(self.batch_size, rank, self.world)]

    def group_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of the row group that holds each row."""
        return np.searchsorted(np.cumsum(self.group_rows), rows, side="right")

    def plan_reads(self, row_group: np.ndarray, block_rows: int) -> ReadPlan:
        """Find when each row group is needed.

        Args:
            row_group: (N,) row group of each image, in the order of use.
            block_rows: images that are taken at a time.
        """
        block = np.arange(len(row_group)) // block_rows
        first = np.full(len(self.row_groups), len(row_group))
        last = np.full(len(self.row_groups), -1)
        np.minimum.at(first, row_group, block)
        np.maximum.at(last, row_group, block)
        num_used = int((last >= 0).sum())
        used = np.argsort(first, kind="stable")[:num_used]
        return ReadPlan(used, first[used], last[used])


def reads_to_start(first_block: np.ndarray, blocks: int, distance: int) -> Iterator[slice]:
    """Yield for each block which positions of a `ReadPlan` to start reading before it.

    Args:
        first_block: (U,) block that needs each row group first, ascending.
        blocks: number of blocks.
        distance: row groups that are read ahead of use.
    """
    started = 0
    for block in range(blocks):
        needed = int(np.searchsorted(first_block, block, side="right"))
        until = max(started, min(len(first_block), needed + distance))
        yield slice(started, until)
        started = until
