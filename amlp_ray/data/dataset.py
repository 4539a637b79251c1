"""Open a patch dataset and read it as arrays, tables, samples, a Ray dataset or a torch dataset.

A patch dataset is a folder, or a prefix in an object store:

    manifest.json
    train/part-00000.parquet ...   val/part-00000.parquet ...   test/part-00000.parquet ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amlp_ray.config import ImageSpec
from amlp_ray.data.manifest import MANIFEST, SPLITS, UNFINISHED, Manifest, Part, read_manifest
from amlp_ray.data.parquet import (
    COLUMNS,
    LIGHT,
    Shape,
    StoredPart,
    images_of,
    keys_of,
    masks_of,
    read_part,
)
from amlp_ray.data.path import DataPath
from amlp_ray.data.samples import Sample, Samples
from amlp_ray.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import ray.data
    import torch.utils.data

AREA_PERCENTILES = (0, 10, 25, 50, 75, 90, 100)
# Fields of a manifest that `summary` repeats.
SUMMARY_FIELDS = (
    "layout",
    "channels",
    "height",
    "width",
    "dtype",
    "mean",
    "std",
    "split_rule",
    "group_rule",
)


@dataclass(frozen=True)
class Split:
    """Images of one split in memory, or a selection of them. Row i of every field is image i."""

    images: np.ndarray
    """Pixels (N, C, H, W), as stored."""
    masks: np.ndarray
    """Lesions (N, H, W), uint8 of 0 and 1; zeros where unlabeled."""
    labeled: np.ndarray
    """Whether an image has a mask, (N,) bool."""
    ids: list[str]
    groups: np.ndarray
    """Name of the group of each image, (N,)."""
    keys: np.ndarray
    """Number of each image, (N,) int64, from its id."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: np.ndarray | Sequence[int]) -> Split:
        """Select rows by position, in that order."""
        rows = np.asarray(index, dtype=np.int64)
        return Split(
            images=self.images[rows],
            masks=self.masks[rows],
            labeled=self.labeled[rows],
            ids=[self.ids[row] for row in rows],
            groups=self.groups[rows],
            keys=self.keys[rows],
        )

    def concat(self, *others: Split) -> Split:
        """Append the rows of others, as in `train.concat(val)`."""
        splits = [self, *others]
        return Split(
            images=np.concatenate([split.images for split in splits]),
            masks=np.concatenate([split.masks for split in splits]),
            labeled=np.concatenate([split.labeled for split in splits]),
            ids=list(chain.from_iterable(split.ids for split in splits)),
            groups=np.concatenate([split.groups for split in splits]),
            keys=np.concatenate([split.keys for split in splits]),
        )


class PatchDataset:
    """A prepared dataset: a sequence of samples, train first, then val, then test.

    Opening reads the manifest only. `load` and `table` read columns, indexing reads a row group.

        dataset = PatchDataset.open("runs/mine")
        len(dataset), dataset[0].image.shape, dataset.split("val")[3].id
        dataset.table()                    # pandas: everything but pixels
        dataset.to_ray_dataset("train")    # Ray Data
        dataset.to_torch("train")          # torch.utils.data.Dataset
    """

    def __init__(self, root: DataPath, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path | DataPath) -> PatchDataset:
        """Open the dataset at a path or URI.

        Raises:
            DataError: nothing or something else is there, it is unfinished or of another format
                version, or parts are missing or cut short.
        """
        root = DataPath(path)
        if not root.is_folder():
            raise DataError(
                f"There is no patch dataset {root}; make one with `amlp-ray data prepare`."
            )
        if not (root / MANIFEST).is_file():
            if (root / UNFINISHED).is_folder():
                raise DataError(
                    f"{root} was not finished; "
                    f"run the same `amlp-ray data prepare` again to resume."
                )
            raise DataError(
                f"{root} has no {MANIFEST}, so it is not a patch dataset; "
                "make one with `amlp-ray data prepare`."
            )
        manifest = read_manifest(root / MANIFEST)
        sizes = {entry.name: entry.size for entry in root.entries()}
        for part in chain.from_iterable(manifest.parts.values()):
            _check_size(root, part, sizes.get(part.file))
        return cls(root, manifest)

    @property
    def path(self) -> str:
        """Path or URI of the dataset."""
        return str(self.root)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def shape(self) -> Shape:
        """Channels, height and width of every image."""
        return self.manifest.shape

    @cached_property
    def spec(self) -> ImageSpec:
        """Shape and scale of the images, as a model needs them."""
        return ImageSpec(
            channels=self.manifest.channels,
            height=self.manifest.height,
            width=self.manifest.width,
            mean=self.manifest.mean,
            std=self.manifest.std,
        )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    @cached_property
    def _samples(self) -> Samples:
        return Samples(self.manifest, self.root, SPLITS)

    def split(self, name: str) -> Samples:
        """Return the samples of one split. Raises DataError for an unknown split."""
        self._check_split(name)
        return Samples(self.manifest, self.root, [name])

    def files(self, split: str) -> list[DataPath]:
        """Return the Parquet files of a split, in order. Raises DataError for an unknown split."""
        self._check_split(split)
        return [self.root / part.file for part in self.manifest.parts[split]]

    def parts(self, split: str) -> list[StoredPart]:
        """Return the parts of a split, in order. Raises DataError for an unknown split."""
        self._check_split(split)
        return self.manifest.stored_parts(self.root, split)

    def count(self, split: str) -> int:
        """Return the number of images in a split."""
        self._check_split(split)
        return self.manifest.counts[split].images

    def bytes(self, split: str) -> int:
        """Return the bytes that the images of a split take in memory, without masks."""
        return self.count(split) * self.manifest.image_bytes

    def table(self, *splits: str, columns: Sequence[str] = LIGHT) -> pd.DataFrame:
        """Read a table with a row per image.

        Args:
            splits: names of splits; none reads all.
            columns: names from `parquet.LIGHT`, which is all columns but pixels.

        Returns:
            The columns, and `split`.

        Raises:
            DataError: a split or column is unknown, or a part is damaged.
        """
        import pandas as pd

        unknown = [name for name in columns if name not in LIGHT]
        if unknown:
            raise DataError(
                f"{self.path} has no column {unknown[0]!r} in its table; "
                f"there are {', '.join(LIGHT)}."
            )
        frames = []
        for split in splits or SPLITS:
            for _, table in self._read_parts(split, columns):
                frames.append(table.to_pandas().assign(split=split))
        empty = pd.DataFrame(columns=[*columns, "split"])
        return pd.concat(frames, ignore_index=True) if frames else empty

    def load(self, split: str, rows: np.ndarray | None = None) -> Split:
        """Read a split into memory, in stored order.

        Args:
            split: train, val or test.
            rows: positions of images within the split; None reads all. Order does not matter.

        Raises:
            DataError: the split is unknown, or a part is damaged.
            IndexError: the split has no such row.
        """
        positions = None if rows is None else np.sort(np.asarray(rows, np.int64))
        count = self.count(split) if positions is None else len(positions)
        if positions is not None and count:
            self._check_rows(split, positions[0], positions[-1])
        images = np.empty((count, *self.shape), self.manifest.dtype)
        masks = np.empty((count, *self.shape[1:]), np.uint8)
        labeled = np.empty(count, bool)
        ids: list[str] = []
        groups: list[str] = []
        for start, table in self._read_parts(split, ["id", "group", "image", "mask"], positions):
            if positions is not None:
                is_here = (positions >= start) & (positions < start + len(table))
                table = table.take(positions[is_here] - start)
            target = slice(len(ids), len(ids) + len(table))
            images[target] = images_of(table["image"], self.shape, self.manifest.dtype)
            masks[target], labeled[target] = masks_of(table["mask"], self.shape)
            ids += table["id"].to_pylist()
            groups += table["group"].to_pylist()
        return Split(images, masks, labeled, ids, np.array(groups, dtype=str), keys_of(ids))

    def to_ray_dataset(
        self, split: str, *, columns: Sequence[str] | None = None
    ) -> ray.data.Dataset:
        """Return the rows of a split as a Ray dataset, which is read when it is used.

        `image` (C, H, W) and `mask` (H, W) are arrays. An unlabeled image has a mask of zeros and
        False in `labeled`. Ray must be initialized, and every node must see the dataset. For
        training, `open_batches` is faster.

        Args:
            split: train, val or test.
            columns: names from `parquet.COLUMNS`; None reads all.
        """
        from amlp_ray.data.ray_rows import read_rows

        return read_rows(self.parts(split), self.shape, self.manifest.dtype, columns)

    def to_torch(self, split: str) -> torch.utils.data.Dataset[dict[str, Any]]:
        """Return a split as a torch dataset of dicts, with pixels as stored.

        The keys are `image` (C, H, W), `mask` (H, W), `labeled` and `id`.
        """
        from amlp_ray.data.torch_samples import TorchSamples

        return TorchSamples(self.split(split))

    def summary(self) -> dict[str, Any]:
        """Describe the dataset in plain values.

        Lesion areas are percentiles over the images with a lesion, in percent of the image.
        """
        manifest = self.manifest
        table = self.table(columns=["lesion", "background"])
        splits = {}
        for name in SPLITS:
            rows = table[table["split"] == name]
            splits[name] = manifest.counts[name].model_dump()
            splits[name]["lesion_area_percent"] = self._lesion_areas(rows)
            background = round(float(rows["background"].mean()), 4) if len(rows) else None
            splits[name]["background"] = background
        return {
            "name": manifest.name,
            "path": self.path,
            **{field: getattr(manifest, field) for field in SUMMARY_FIELDS},
            "splits": splits,
            "left_out": manifest.left_out,
            "rejected": manifest.rejected,
            "dropped": manifest.dropped,
            "columns": list(COLUMNS),
            "fingerprint": manifest.fingerprint,
        }

    def _lesion_areas(self, rows: pd.DataFrame) -> dict[str, float] | None:
        """Return percentiles of the lesion area, in percent of the image; None without lesions."""
        pixels = self.manifest.height * self.manifest.width
        areas = rows["lesion"][rows["lesion"] > 0].to_numpy(float) * (100 / pixels)
        if not len(areas):
            return None
        values = np.percentile(areas, AREA_PERCENTILES).tolist()
        names = [f"p{percentile}" for percentile in AREA_PERCENTILES]
        return {name: round(value, 3) for name, value in zip(names, values, strict=True)}

    def _check_split(self, name: str) -> None:
        if name not in SPLITS:
            raise DataError(
                f"There is no split {name!r} in {self.path}; splits are {', '.join(SPLITS)}."
            )

    def _check_rows(self, split: str, first: int, last: int) -> None:
        if not 0 <= first <= last < self.count(split):
            raise IndexError(f"the split {split!r} has rows 0 to {self.count(split) - 1} only")

    def _read_parts(
        self, split: str, columns: Sequence[str], rows: np.ndarray | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        """Yield each part of a split as (its first row, its table); one part is in memory.

        Parts without any of the sorted positions `rows` are skipped.
        """
        start = 0
        for part in self.parts(split):
            end = start + part.rows
            if rows is None or np.searchsorted(rows, start) < np.searchsorted(rows, end):
                yield start, read_part(part, columns)
            start = end


def _check_size(root: DataPath, part: Part, size: int | None) -> None:
    """Raise DataError if a part is missing or has other than its size in bytes."""
    if size == part.bytes:
        return
    damage = f"is damaged: it has {size} bytes instead of {part.bytes}"
    problem = "is missing" if size is None else damage
    raise DataError(f"{root / part.file} {problem}; prepare the dataset again or copy it again.")
