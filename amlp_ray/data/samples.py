"""Read the samples of a patch dataset one by one, as a sequence."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, overload

import numpy as np

from amlp_ray.data.manifest import Manifest
from amlp_ray.data.parquet import StoredPart, images_of, masks_of, read_part
from amlp_ray.data.path import DataPath

# Row groups in memory, at most 16 MiB each: neighbors come from memory, and a shuffle still moves.
CACHED_GROUPS = 4


class Sample(NamedTuple):
    """One image of a patch dataset."""

    id: str
    group: str
    split: str
    image: np.ndarray
    """Pixels (C, H, W), as stored, read-only."""
    mask: np.ndarray | None
    """Lesion (H, W), uint8 of 0 and 1; None: unlabeled."""


class Samples(Sequence[Sample]):
    """The samples of some splits, in order. Reads a row group at a time and caches the last few."""

    def __init__(self, manifest: Manifest, root: DataPath, splits: Sequence[str]) -> None:
        """Prepare to read the dataset in the folder `root`; no part is opened yet."""
        self.manifest = manifest
        self._parts: list[tuple[str, StoredPart]] = []
        for split in splits:
            self._parts += [(split, part) for part in manifest.stored_parts(root, split)]
        self._ends = list(accumulate(part.rows for _, part in self._parts))
        self._cache: OrderedDict[tuple[int, int], list[Sample]] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no sample {index} of {len(self)}")
        index %= len(self)
        part_number = bisect_right(self._ends, index)
        _, part = self._parts[part_number]
        row_of_part = index - (self._ends[part_number] - part.rows)
        group_number, row = divmod(row_of_part, self.manifest.group_rows)
        return self._row_group(part_number, group_number)[row]

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def _row_group(self, part_number: int, group_number: int) -> list[Sample]:
        key = part_number, group_number
        if key not in self._cache:
            self._cache[key] = self._read_row_group(part_number, group_number)
            while len(self._cache) > CACHED_GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _read_row_group(self, part_number: int, group_number: int) -> list[Sample]:
        split, part = self._parts[part_number]
        columns = ["id", "group", "image", "mask"]
        table = read_part(part, columns, group_number)
        ids = table["id"].to_pylist()
        groups = table["group"].to_pylist()
        images = images_of(table["image"], self.manifest.shape, self.manifest.dtype)
        masks, labeled = masks_of(table["mask"], self.manifest.shape)
        samples = []
        for row in range(len(table)):
            mask = masks[row] if labeled[row] else None
            samples.append(Sample(ids[row], groups[row], split, images[row], mask))
        return samples
