"""Samples of a patch dataset one by one, as a sequence."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from amlp_ray.data.parquet import images_of, masks_of, read_part

if TYPE_CHECKING:
    from amlp_ray.data.dataset import PatchDataset

GROUPS_KEPT = (
    4  # row groups held, at most 16 MiB each: neighbours come from memory, and a shuffle reads on
)


class Sample(NamedTuple):
    """One image of a patch dataset."""

    id: str
    group: str
    split: str
    image: np.ndarray  # (C, H, W), as stored, read-only
    mask: np.ndarray | None  # (H, W) uint8 of 0 and 1; None: unlabelled


class Samples(Sequence[Sample]):
    """The samples of some splits, in order. Reads a row group at a time and keeps the last few."""

    def __init__(self, dataset: PatchDataset, splits: Sequence[str]) -> None:
        self.dataset = dataset
        self._per_group = dataset.manifest.group_rows
        self._parts = [
            (split, file, part)
            for split in splits
            for file, part in zip(dataset.files(split), dataset.manifest.parts[split], strict=True)
        ]
        self._ends = list(accumulate(part.rows for _, _, part in self._parts))
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()

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
            raise IndexError(f"there are {len(self)} samples, so no sample {index}")
        index %= len(self)
        number = bisect_right(self._ends, index)
        split, _, part = self._parts[number]
        group, row = divmod(index - (self._ends[number] - part.rows), self._per_group)
        ids, groups, images, masks, labeled = self._group(number, group)
        return Sample(
            ids[row], groups[row], split, images[row], masks[row] if labeled[row] else None
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def _group(self, number: int, group: int) -> Any:
        key = number, group
        if key not in self._kept:
            table = read_part(self._parts[number][1], ["id", "group", "image", "mask"], group)
            shape, dtype = self.dataset.shape, self.dataset.manifest.dtype
            self._kept[key] = (
                table["id"].to_pylist(),
                table["group"].to_pylist(),
                images_of(table["image"], shape, dtype),
                *masks_of(table["mask"], shape),
            )
            while len(self._kept) > GROUPS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]
