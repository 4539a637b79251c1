"""A patch dataset: a folder of Parquet parts with a manifest, read as arrays.

manifest.json
train/part-00000.parquet ...   val/part-00000.parquet ...   test/part-00000.parquet ...
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from amlp_ray.config import ImageSpec, PrepareSettings
from amlp_ray.data.parts import Shape, image_bytes, images_of, masks_of, read_part
from amlp_ray.errors import DataError, SettingsError
from amlp_ray.settings import Settings, build

if TYPE_CHECKING:
    import ray.data

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val", "test")
AREA_PERCENTILES = (0, 10, 25, 50, 75, 90, 100)


class Part(Settings):
    """One Parquet file."""

    file: str  # relative to the dataset
    rows: int
    bytes: int


class Counts(Settings):
    """Images of one split; `lesions` are labelled ones whose mask is not empty."""

    images: int
    labelled: int
    lesions: int


class Manifest(Settings):
    """What is in a patch dataset and how it was made. Mean and std are per channel, in stored units."""

    format_version: Literal[1] = 1
    created_by: str  # amlp_ray and its version
    name: str
    channels: int
    height: int
    width: int
    dtype: Literal["uint8", "uint16"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    counts: dict[str, Counts]
    parts: dict[str, list[Part]]
    split_rule: str
    group_rule: str
    left_out: int  # images found, but not listed in the split file
    settings: PrepareSettings
    fingerprint: str  # SHA-256 of the settings and of the contents of all sources


@dataclass(frozen=True)
class Split:
    """Images of one split in memory, or any selection of them; row i of every field is image i."""

    images: np.ndarray  # (N, C, H, W) uint8 or uint16, as stored
    masks: np.ndarray  # (N, H, W) uint8 of 0 and 1; zeros where unlabelled
    labelled: np.ndarray  # (N,) bool
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
        arrays = {f.name: np.concatenate([getattr(s, f.name) for s in every]) for f in fields(self) if f.name != "ids"}
        return Split(ids=[name for split in every for name in split.ids], **arrays)


def key_of(name: str) -> int:
    """Hash an id to a stable non-negative 63-bit number: the identity of an image, for seeds on a device.

    >>> key_of("benign (1)") == key_of("benign (1)") != key_of("benign (2)")
    True
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


class PatchDataset:
    """A prepared dataset. Opening reads the manifest only; `load` reads images."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> PatchDataset:
        """Open the dataset at `path`.

        Raises:
            DataError: nothing there, something else there, written by a newer version, or parts missing or cut short.
        """
        path = Path(path).absolute()
        if not path.exists():
            raise DataError(f"There is no patch dataset {path}; make one with `amlp-ray data prepare`.")
        if not (path / MANIFEST).is_file():
            raise DataError(
                f"{path} has no {MANIFEST}, so it is not a patch dataset; make one with `amlp-ray data prepare`."
            )
        manifest = _read_manifest(path / MANIFEST)
        for part in (part for parts in manifest.parts.values() for part in parts):
            file = path / part.file
            found = file.stat().st_size if file.is_file() else None
            if found != part.bytes:
                state = "is missing" if found is None else f"is damaged: it has {found} bytes instead of {part.bytes}"
                raise DataError(f"{file} {state}; prepare the dataset again or copy it again.")
        return cls(path, manifest)

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
        return ImageSpec(channels=m.channels, height=m.height, width=m.width, mean=m.mean, std=m.std)

    def files(self, split: str) -> list[Path]:
        """The Parquet files of a split, in order. Raises DataError for a name that is no split."""
        if split not in SPLITS:
            raise DataError(f"There is no split {split!r} in {self.path}; splits are {', '.join(SPLITS)}.")
        return [self.path / part.file for part in self.manifest.parts[split]]

    def count(self, split: str) -> int:
        """The number of images in a split."""
        self.files(split)
        return self.manifest.counts[split].images

    def bytes(self, split: str) -> int:
        """Bytes that the images of a split take in memory, masks not counted."""
        return self.count(split) * image_bytes(self.shape, self.manifest.dtype)

    def load(self, split: str) -> Split:
        """Read a whole split into memory, ordered by id. Raises DataError where a part is damaged."""
        count, (_, height, width) = self.count(split), self.shape
        images, ids = self.load_images(split)
        masks = np.empty((count, height, width), np.uint8)
        labelled = np.empty(count, bool)
        groups: list[str] = []
        for start, table in self._tables(split, ["group", "mask"]):
            rows = slice(start, start + len(table))
            masks[rows], labelled[rows] = masks_of(table["mask"], self.shape)
            groups += table["group"].to_pylist()
        return Split(images, masks, labelled, ids, np.array(groups, dtype=str), keys_of(ids))

    def load_images(self, split: str) -> tuple[np.ndarray, list[str]]:
        """Read the images (N, C, H, W) and ids of a split, without masks. The array is writable and aligned."""
        images = np.empty((self.count(split), *self.shape), self.manifest.dtype)
        ids: list[str] = []
        for start, table in self._tables(split, ["id", "image"]):
            images[start : start + len(table)] = images_of(table["image"], self.shape, self.manifest.dtype)
            ids += table["id"].to_pylist()
        return images, ids

    def to_ray_dataset(
        self, split: str, *, columns: Sequence[str] | None = None, seed: int | None = None
    ) -> ray.data.Dataset:
        """Return the rows of a split as a Ray dataset, read when it is used.

        With `seed`, files come in another order in every execution, as training wants; without, in order.
        Ray must be initialised, and every node must see the dataset's folder.
        """
        from amlp_ray.data.ray_data import read_files

        return read_files(self.files(split), columns=columns, seed=seed)

    def summary(self) -> dict[str, Any]:
        """Describe the dataset in plain values. Lesion areas are percentiles, in % of the image, over lesion images."""
        m = self.manifest
        splits = {
            name: {**m.counts[name].model_dump(), "lesion_area_percent": self._lesion_areas(name)} for name in SPLITS
        }
        return {
            "name": m.name,
            "path": str(self.path),
            "channels": m.channels,
            "height": m.height,
            "width": m.width,
            "dtype": m.dtype,
            "mean": list(m.mean),
            "std": list(m.std),
            "splits": splits,
            "split_rule": m.split_rule,
            "group_rule": m.group_rule,
            "left_out": m.left_out,
            "fingerprint": m.fingerprint,
        }

    def _lesion_areas(self, split: str) -> dict[str, float] | None:
        tables = self._tables(split, ["mask"])
        shares = [masks_of(table["mask"], self.shape)[0].mean(axis=(1, 2)) for _, table in tables]
        lesions = np.concatenate([*shares, np.zeros(0)])
        lesions = 100 * lesions[lesions > 0]
        if not len(lesions):
            return None
        values = np.percentile(lesions, AREA_PERCENTILES)
        return {f"p{p}": round(float(value), 3) for p, value in zip(AREA_PERCENTILES, values, strict=True)}

    def _tables(self, split: str, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
        """Yield each part of a split as (its first row, its table), so that one part at a time is held twice."""
        start = 0
        for file, part in zip(self.files(split), self.manifest.parts[split], strict=True):
            table = read_part(file, columns)
            if len(table) != part.rows:
                raise DataError(
                    f"{file} is damaged: it has {len(table)} rows instead of {part.rows}; prepare the dataset again."
                )
            yield start, table
            start += len(table)


def keys_of(ids: Sequence[str]) -> np.ndarray:
    """Hash ids to (N,) int64, see `key_of`."""
    return np.fromiter((key_of(name) for name in ids), np.int64, len(ids))


def _read_manifest(file: Path) -> Manifest:
    try:
        values = json.loads(file.read_text())
        version = values["format_version"]
    except (ValueError, KeyError, TypeError, OSError):
        raise DataError(f"{file} is not the manifest of a patch dataset; prepare the dataset again.") from None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{file} has format version {version}, but this amlp_ray reads {FORMAT_VERSION}; "
            f"update amlp_ray or prepare the dataset again."
        )
    try:
        return build(Manifest, values, str(file))
    except SettingsError as error:
        raise DataError(f"{error} Prepare the dataset again.") from None
