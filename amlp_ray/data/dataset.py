"""A patch dataset: a folder, or a prefix in an object store, of Parquet parts with a manifest; read as arrays.

manifest.json
train/part-00000.parquet ...   val/part-00000.parquet ...   test/part-00000.parquet ...

The manifest is written last: without it, nothing reads the rest as a dataset.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from amlp_ray.config import ImageSpec, PrepareConfig
from amlp_ray.config.base import Config, build
from amlp_ray.data.parquet import (
    COLUMNS,
    LIGHT,
    Shape,
    image_bytes,
    images_of,
    keys_of,
    masks_of,
    read_part,
)
from amlp_ray.data.path import DataPath
from amlp_ray.data.samples import Sample, Samples
from amlp_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pandas as pd
    import ray.data
    import torch.utils.data

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
UNFINISHED = ".preparing"  # folder of what a preparation has done so far
SPLITS = ("train", "val", "test")
AREA_PERCENTILES = (0, 10, 25, 50, 75, 90, 100)


class Part(Config):
    """One Parquet file."""

    file: str  # relative to the dataset
    rows: int
    bytes: int


class Counts(Config):
    """Images of one split; `lesions` are labelled ones whose mask is not empty."""

    images: int
    labeled: int
    lesions: int


class Manifest(Config):
    """What is in a patch dataset and how it was made. Mean and std are per channel, in stored units."""

    format_version: Literal[2] = 2
    created_by: str  # amlp_ray and its version
    name: str
    layout: str  # as given or recognised
    channels: int
    height: int
    width: int
    dtype: Literal["uint8", "uint16", "int16", "float32"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    counts: dict[str, Counts]
    parts: dict[str, list[Part]]
    group_rows: int  # of every row group but the last of a part
    split_rule: str
    group_rule: str
    left_out: int  # images found, but not listed in the split file
    rejected: int  # files that could not be used, listed beside the dataset in <name>.rejects.csv
    dropped: int  # tiles and slices with too little tissue
    salt: str | None  # of hashed names: tells two salts apart, tells nothing of either
    config: PrepareConfig
    fingerprint: str  # SHA-256 of the settings and of the contents of all sources


@dataclass(frozen=True)
class Split:
    """Images of one split in memory, or any selection of them; row i of every field is image i."""

    images: np.ndarray  # (N, C, H, W), as stored
    masks: np.ndarray  # (N, H, W) uint8 of 0 and 1; zeros where unlabelled
    labeled: np.ndarray  # (N,) bool
    ids: list[str]
    groups: np.ndarray  # (N,) of str
    keys: np.ndarray  # (N,) int64, see `key_of`

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: np.ndarray | Sequence[int]) -> Split:
        """Select rows by position, in that order."""
        rows = np.asarray(index, dtype=np.int64)
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "ids"}
        return Split(ids=[self.ids[i] for i in rows], **arrays)

    def concat(self, *others: Split) -> Split:
        """Append the rows of others, as in `train.concat(val)`."""
        every = (self, *others)
        arrays = {
            f.name: np.concatenate([getattr(s, f.name) for s in every])
            for f in fields(self)
            if f.name != "ids"
        }
        return Split(ids=[name for split in every for name in split.ids], **arrays)


class PatchDataset:
    """A prepared dataset: a sequence of samples, train first, then val, then test.

    Opening reads the manifest only; `load` and `table` read columns, indexing reads a row group at a time.

        dataset = PatchDataset.open("runs/mine")
        len(dataset), dataset[0].image.shape, dataset.split("val")[3].id
        dataset.table()                    # pandas: everything but pixels
        dataset.to_ray_dataset("train")    # Ray Data
        dataset.to_torch("train")          # torch.utils.data.Dataset
    """

    def __init__(self, place: DataPath, manifest: Manifest) -> None:
        self.place = place
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path | DataPath) -> PatchDataset:
        """Open the dataset at a path or URI.

        Raises:
            DataError: nothing there, something else there, unfinished, written by a newer version, or parts missing or
                cut short.
        """
        place = DataPath(path)
        if not place.is_folder():
            raise DataError(
                f"There is no patch dataset {place}; make one with `amlp-ray data prepare`."
            )
        if not (place / MANIFEST).is_file():
            if (place / UNFINISHED).is_folder():
                raise DataError(
                    f"{place} was not finished; run the same `amlp-ray data prepare` again to go on."
                )
            raise DataError(
                f"{place} has no {MANIFEST}, so it is not a patch dataset; make one with `amlp-ray data prepare`."
            )
        manifest = _read_manifest(place / MANIFEST)
        sizes = {entry.name: entry.size for entry in place.entries()}
        for part in (part for parts in manifest.parts.values() for part in parts):
            if (found := sizes.get(part.file)) != part.bytes:
                state = (
                    "is missing"
                    if found is None
                    else f"is damaged: it has {found} bytes instead of {part.bytes}"
                )
                raise DataError(
                    f"{place / part.file} {state}; prepare the dataset again or copy it again."
                )
        return cls(place, manifest)

    @property
    def path(self) -> str:
        """Where the dataset is: a path or a URI."""
        return str(self.place)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def shape(self) -> Shape:
        """Channels, height and width of every image."""
        return self.manifest.channels, self.manifest.height, self.manifest.width

    @cached_property
    def spec(self) -> ImageSpec:
        """What a model must know of the images."""
        m = self.manifest
        return ImageSpec(
            channels=m.channels, height=m.height, width=m.width, mean=m.mean, std=m.std
        )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    @cached_property
    def _samples(self) -> Samples:
        return Samples(self, SPLITS)

    def split(self, name: str) -> Samples:
        """The samples of one split: `len`, indexing, iteration. Raises DataError for a name that is no split."""
        self.files(name)
        return Samples(self, (name,))

    def files(self, split: str) -> list[DataPath]:
        """The Parquet files of a split, in order. Raises DataError for a name that is no split."""
        if split not in SPLITS:
            raise DataError(
                f"There is no split {split!r} in {self.path}; splits are {', '.join(SPLITS)}."
            )
        return [self.place / part.file for part in self.manifest.parts[split]]

    def count(self, split: str) -> int:
        """The number of images in a split."""
        self.files(split)
        return self.manifest.counts[split].images

    def bytes(self, split: str) -> int:
        """Bytes that the images of a split take in memory, masks not counted."""
        return self.count(split) * image_bytes(self.shape, self.manifest.dtype)

    def table(self, *splits: str, columns: Sequence[str] = LIGHT) -> pd.DataFrame:
        """A row per image: its split and all columns but pixels, see `parts.COLUMNS`; of all splits if none is named.

        Raises:
            DataError: a name that is no split or column, or a damaged part.
        """
        import pandas as pd

        if unknown := [name for name in columns if name not in LIGHT]:
            raise DataError(
                f"{self.path} has no column {unknown[0]!r} in its table; there are {', '.join(LIGHT)}."
            )
        frames = [
            table.to_pandas().assign(split=split)
            for split in splits or SPLITS
            for _, table in self._tables(split, columns)
        ]
        return (
            pd.concat(frames, ignore_index=True)
            if frames
            else pd.DataFrame(columns=[*columns, "split"])
        )

    def load(self, split: str, rows: np.ndarray | None = None) -> Split:
        """Read a split, or the given rows of it, into memory, in order. Raises DataError where a part is damaged."""
        count, (_, height, width) = self.count(split) if rows is None else len(rows), self.shape
        wanted = None if rows is None else np.sort(np.asarray(rows, np.int64))
        images = np.empty((count, *self.shape), self.manifest.dtype)
        masks = np.empty((count, height, width), np.uint8)
        labeled = np.empty(count, bool)
        ids: list[str] = []
        groups: list[str] = []
        done = 0
        for start, table in self._tables(split, ["id", "group", "image", "mask"], wanted):
            if wanted is not None:
                table = table.take(
                    wanted[(wanted >= start) & (wanted < start + len(table))] - start
                )
            at = slice(done, done + len(table))
            images[at] = images_of(table["image"], self.shape, self.manifest.dtype)
            masks[at], labeled[at] = masks_of(table["mask"], self.shape)
            ids += table["id"].to_pylist()
            groups += table["group"].to_pylist()
            done += len(table)
        return Split(images, masks, labeled, ids, np.array(groups, dtype=str), keys_of(ids))

    def to_ray_dataset(
        self, split: str, *, columns: Sequence[str] | None = None
    ) -> ray.data.Dataset:
        """The rows of a split as a Ray dataset, read when it is used; `image` (C, H, W) and `mask` (H, W) as arrays.

        An unlabelled image has a mask of zeros, and `labelled` False beside it.

        Ray must be initialised, and every node must see the dataset. For training, `stream.open_batches` is faster.
        """
        from amlp_ray.data.loading.ray_stream import read_rows

        return read_rows(self, split, columns)

    def to_torch(self, split: str) -> torch.utils.data.Dataset[dict[str, Any]]:
        """A split as a torch dataset of dicts: `image` (C, H, W), `mask` (H, W), `labelled`, `id`; pixels as stored."""
        from amlp_ray.data.torch_samples import TorchSamples

        return TorchSamples(self.split(split))

    def summary(self) -> dict[str, Any]:
        """Describe the dataset in plain values. Lesion areas are percentiles, in % of the image, over lesion images."""
        m = self.manifest
        pixels = m.height * m.width
        table = self.table(columns=["lesion", "background"])
        splits = {}
        for name in SPLITS:
            rows = table[table["split"] == name]
            lesions = rows["lesion"][rows["lesion"] > 0].to_numpy(float) * (100 / pixels)
            values = np.percentile(lesions, AREA_PERCENTILES) if len(lesions) else np.zeros(0)
            splits[name] = {
                **m.counts[name].model_dump(),
                "lesion_area_percent": {
                    f"p{p}": round(float(value), 3)
                    for p, value in zip(AREA_PERCENTILES, values, strict=False)
                }
                or None,
                "background": round(float(rows["background"].mean()), 4) if len(rows) else None,
            }
        facts = (
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
        return {
            "name": m.name,
            "path": self.path,
            **{fact: getattr(m, fact) for fact in facts},
            "splits": splits,
            "left_out": m.left_out,
            "rejected": m.rejected,
            "dropped": m.dropped,
            "columns": list(COLUMNS),
            "fingerprint": m.fingerprint,
        }

    def _tables(
        self, split: str, columns: Sequence[str], rows: np.ndarray | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield each part of a split as (its first row, its table), so that one part at a time is held twice.

        Parts without any of the sorted `rows` are passed over.
        """
        start = 0
        for file, part in zip(self.files(split), self.manifest.parts[split], strict=True):
            if rows is None or np.searchsorted(rows, start) < np.searchsorted(
                rows, start + part.rows
            ):
                table = read_part(file, columns)
                if len(table) != part.rows:
                    raise DataError(
                        f"{file} is damaged: it has {len(table)} rows instead of {part.rows}; "
                        f"prepare the dataset again."
                    )
                yield start, table
            start += part.rows


def _read_manifest(file: DataPath) -> Manifest:
    try:
        values = json.loads(file.read_bytes())
        version = values["format_version"]
    except (ValueError, KeyError, TypeError, OSError):
        raise DataError(
            f"{file} is not the manifest of a patch dataset; prepare the dataset again."
        ) from None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{file} has format version {version}, but this amlp_ray reads {FORMAT_VERSION}; "
            f"update amlp_ray or prepare the dataset again."
        )
    try:
        return build(Manifest, values, str(file))
    except ConfigError as error:
        raise DataError(f"{error} Prepare the dataset again.") from None
