"""Small patch datasets of discs, of any dtype and number of channels, in several parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from amlp_ray.data.dataset import PatchDataset, Split
from helpers.datasets import write_dataset

Shape = tuple[int, int, int]
RANGES = {
    "uint8": (0, 255),
    "uint16": (0, 65535),
    "int16": (-1000, 100),
    "float32": (-3, 9),
}  # int16: CT in HU


class Rows(NamedTuple):
    """Images (N, C, H, W) and masks (N, H, W) of one split.

    All are labeled unless `labeled` (N,) says otherwise.
    """

    images: np.ndarray
    masks: np.ndarray
    labeled: np.ndarray | None = None


def discs(
    count: int, shape: Shape = (1, 32, 32), dtype: str = "uint8", seed: int = 0, normal: int = 5
) -> Rows:
    """Noise with one dark disc per image.

    None in every `normal`-th, over the usual range of a dtype.
    """
    _, height, width = shape
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    images, masks = np.empty((count, *shape)), np.zeros((count, height, width), np.uint8)
    for i in range(count):
        if normal == 0 or i % normal:
            at_y, at_x = rng.uniform(0.3, 0.7) * height, rng.uniform(0.3, 0.7) * width
            masks[i] = np.hypot(y - at_y, x - at_x) < rng.uniform(0.15, 0.25) * min(height, width)
        images[i] = np.where(masks[i], 0.2, 0.7) + rng.normal(0, 0.06, shape)
    low, high = RANGES[dtype]
    values = low + (high - low) * images.clip(0, 1)
    return Rows((values if dtype == "float32" else values.round()).astype(dtype), masks)


def write(folder: Path, splits: Mapping[str, Rows], *, rows_per_part: int = 5) -> PatchDataset:
    """Write a dataset; a split that is not given is empty. Ids are `<folder> <split> <row>`."""
    masks: list[np.ndarray | None] = []
    names: list[str] = []
    ids: list[str] = []
    for split, rows in splits.items():
        for i, mask in enumerate(rows.masks):
            masks.append(mask if rows.labeled is None or rows.labeled[i] else None)
            names.append(split)
            ids.append(f"{folder.name} {split} {i}")
    images = np.concatenate([rows.images for rows in splits.values()])
    return write_dataset(folder, images, masks, split=names, rows_per_part=rows_per_part, id=ids)


class Guarded(PatchDataset):
    """A dataset whose test split must not be read.

    `change` may replace what is known of train and val.
    """

    change: Callable[[str, Split], Split] = staticmethod(lambda name, split: split)

    @classmethod
    def from_dataset(
        cls, dataset: PatchDataset, change: Callable[[str, Split], Split] | None = None
    ) -> Guarded:
        out = cls(dataset.root, dataset.manifest)
        if change:
            out.change = change  # type: ignore[method-assign]
        return out

    def load(self, split: str, rows: np.ndarray | None = None) -> Split:
        assert split != "test", "test images were read"
        whole = self.change(split, super().load(split))
        return whole if rows is None else whole.take(np.sort(rows))

    def table(self, *splits: str, columns: object = None) -> pd.DataFrame:
        frames = []
        for name in splits:
            split = self.load(name)
            lesion = np.where(split.labeled, split.masks.sum((1, 2)), np.nan)
            frames.append(
                pd.DataFrame(
                    {"id": split.ids, "group": split.groups, "lesion": lesion, "split": name}
                )
            )
        return pd.concat(frames, ignore_index=True)
