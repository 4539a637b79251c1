"""Write patch datasets from arrays, without Ray and without image files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amlp_ray.config import PrepareConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.manifest import MANIFEST, SPLITS, Counts, Manifest, Part, write_manifest
from amlp_ray.data.parquet import (
    Shape,
    footer_digest,
    group_rows,
    image_bytes,
    part_rows,
    write_part,
)
from amlp_ray.data.path import DataPath
from amlp_ray.data.prepare.crop import background_of
from amlp_ray.data.prepare.near_duplicates import perceptual_hash
from amlp_ray.utils.json_files import seal_json, unseal

Masks = np.ndarray | Sequence[np.ndarray | None]


def write_dataset(
    folder: Path,
    images: np.ndarray,
    masks: Masks | None = None,
    *,
    split: str | Sequence[str] = "train",
    groups: Sequence[str] | None = None,
    group_rule: str = "as made",
    rows_per_part: int | None = None,
    **columns: Any,
) -> PatchDataset:
    """Write images as a patch dataset and open it.

    Args:
        folder: is made; its name is the dataset's.
        images: (N, C, H, W) of uint8, uint16, int16 or float32.
        masks: (N, H, W) of 0 and 1, or a list with None for each unlabeled image; None: all are
            unlabeled.
        split: of all images, or of each.
        groups: of each image; None: each by itself.
        rows_per_part: to get several parts of few images; None: as `prepare` does.
        columns: any other of `parquet.COLUMNS`, as one value for all or a sequence with one for
            each image. What is missing follows from the images: ids "image 0", "image 1", ...,
            hash and background as measured, height and width as stored, no spacing.
    """
    count = len(images)
    shape: Shape = (images.shape[1], images.shape[2], images.shape[3])
    dtype = images.dtype.newbyteorder("=").name
    splits = [split] * count if isinstance(split, str) else list(split)
    columns.setdefault("id", [f"image {i}" for i in range(count)])
    columns.setdefault("group", columns["id"] if groups is None else groups)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for i, image in enumerate(images):
        mask = None if masks is None or masks[i] is None else np.asarray(masks[i]).astype(np.uint8)
        rows[splits[i]].append(_row(image, mask, i, columns))
    train = images[np.array(splits) == "train"]
    if not len(train):
        train = images if count else np.zeros((1, *shape))
    pixels = np.nan_to_num(train)
    manifest = Manifest(
        created_by="tests",
        name=folder.name,
        layout="flat",
        channels=shape[0],
        height=shape[1],
        width=shape[2],
        dtype=dtype,  # type: ignore[arg-type]
        mean=tuple(pixels.mean(axis=(0, 2, 3), dtype=np.float64).tolist()),
        std=tuple(pixels.std(axis=(0, 2, 3), dtype=np.float64).clip(1e-9).tolist()),
        counts={name: _count(of_split) for name, of_split in rows.items()},
        parts=_write_parts(folder, rows, shape, dtype, rows_per_part),
        split_rule="as made",
        group_rule=group_rule,
        group_rows=group_rows(shape, dtype),
        left_out=0,
        rejected=0,
        dropped=0,
        salt=None,
        config=PrepareConfig(),
        fingerprint="made",
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(DataPath(folder), manifest)
    return PatchDataset.open(folder)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the values of a dataset's manifest, and give it the digest of the new ones."""
    file = folder / MANIFEST
    values = unseal(json.loads(file.read_text()))
    file.write_text(seal_json(change(values)))


def noise_dataset(
    folder: Path,
    count: int,
    *,
    shape: Shape = (1, 8, 8),
    dtype: str = "uint8",
    part: int = 40,
    seed: int = 0,
) -> PatchDataset:
    """Write training images of noise in parts of `part` rows, for tests of how images are read."""
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(dtype)
    return write_dataset(folder, images, rows_per_part=part, hash=0, background=0.0)


def _row(
    image: np.ndarray, mask: np.ndarray | None, index: int, columns: dict[str, Any]
) -> dict[str, Any]:
    """Return the columns of one image; `columns` takes precedence."""
    row: dict[str, Any] = {
        "image": image.astype(image.dtype.newbyteorder("<")).tobytes(),
        "mask": None if mask is None else mask.tobytes(),
        "lesion": None if mask is None else int(mask.sum()),
        "height": image.shape[1],
        "width": image.shape[2],
        "y": 0,
        "x": 0,
        "frame": 0,
        "spacing_y": None,
        "spacing_x": None,
    }
    for name, value in columns.items():
        row[name] = value if np.isscalar(value) else value[index]
    row.setdefault("source", f"{row['id']}.png")
    picture = image.transpose(1, 2, 0)
    if "hash" not in row:
        row["hash"] = perceptual_hash(picture)
    if "background" not in row:
        row["background"] = float(background_of(picture).mean())
    return {name: v.item() if isinstance(v, np.generic) else v for name, v in row.items()}


def _write_parts(
    folder: Path,
    rows: dict[str, list[dict[str, Any]]],
    shape: Shape,
    dtype: str,
    rows_per_part: int | None,
) -> dict[str, list[Part]]:
    size = rows_per_part or part_rows(shape, dtype)
    parts: dict[str, list[Part]] = {name: [] for name in SPLITS}
    for name, of_split in rows.items():
        assert all(len(row["image"]) == image_bytes(shape, dtype) for row in of_split)
        for number, start in enumerate(range(0, len(of_split), size)):
            file = f"{name}/part-{number:05d}.parquet"
            some = of_split[start : start + size]
            path = DataPath(folder) / file
            written = write_part(path, some, shape, dtype)
            part = Part(file=file, rows=written, bytes=path.info().size, footer=footer_digest(path))
            parts[name].append(part)
    return parts


def _count(rows: list[dict[str, Any]]) -> Counts:
    labeled = [row for row in rows if row["mask"] is not None]
    lesions = sum(row["lesion"] > 0 for row in labeled)
    groups = len({row["group"] for row in rows})
    return Counts(groups=groups, images=len(rows), labeled=len(labeled), lesions=lesions)
