"""Patch datasets written from arrays, without Ray and without image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amlp_ray.config import PrepareConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.manifest import FORMAT_VERSION, MANIFEST, SPLITS, Counts, Manifest, Part
from amlp_ray.data.parquet import group_rows, image_bytes, part_rows, write_part
from amlp_ray.data.path import DataPath
from amlp_ray.data.prepare.crop import background_of
from amlp_ray.data.prepare.near_duplicates import perceptual_hash

__all__ = ["made_dataset"]


def made_dataset(
    folder: Path,
    images: np.ndarray,
    masks: np.ndarray | Sequence[np.ndarray | None] | None = None,
    *,
    split: str | Sequence[str] = "train",
    groups: Sequence[str] | None = None,
    rows_per_part: int | None = None,
    **columns: Any,
) -> PatchDataset:
    """Write `images` (N, C, H, W) as a patch dataset in `folder` and open it.

    Args:
        folder: is made; its name is the dataset's.
        images: uint8, uint16, int16 or float32.
        masks: (N, H, W) of 0 and 1, or a list with None for each unlabelled image; None: all are unlabelled.
        split: of all images, or of each.
        groups: of each image; None: each by itself.
        rows_per_part: to get several parts of few images; None: as `prepare` does.
        columns: any other of `parts.COLUMNS`, as one value for all or a sequence with one for each image. What is not
            given follows from the images: ids "image 0", "image 1", ..., hash and background as measured, height and
            width as stored, no spacing.
    """
    count, *shape = images.shape
    channels, height, width = shape
    dtype = images.dtype.newbyteorder("=").name
    splits = [split] * count if isinstance(split, str) else list(split)
    ids = list(columns.pop("id", [f"image {i}" for i in range(count)]))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for i, image in enumerate(images):
        mask = None if masks is None or masks[i] is None else np.asarray(masks[i]).astype(np.uint8)
        picture = image.transpose(1, 2, 0)
        row = {
            "id": ids[i],
            "group": ids[i] if groups is None else groups[i],
            "image": image.astype(image.dtype.newbyteorder("<")).tobytes(),
            "mask": None if mask is None else mask.tobytes(),
            "lesion": None if mask is None else int(mask.sum()),
            "height": height,
            "width": width,
            "y": 0,
            "x": 0,
            "frame": 0,
            "spacing_y": None,
            "spacing_x": None,
            "source": f"{ids[i]}.png",
            **{name: value if np.isscalar(value) else value[i] for name, value in columns.items()},
        }
        if "hash" not in row:
            row["hash"] = perceptual_hash(picture)
        if "background" not in row:
            row["background"] = float(background_of(picture).mean())
        rows[splits[i]].append(
            {name: v.item() if isinstance(v, np.generic) else v for name, v in row.items()}
        )
    size = rows_per_part or part_rows((channels, height, width), dtype)
    parts: dict[str, list[Part]] = {name: [] for name in SPLITS}
    for name, members in rows.items():
        for number, start in enumerate(range(0, len(members), size)):
            file = f"{name}/part-{number:05d}.parquet"
            written = write_part(
                DataPath(folder) / file,
                members[start : start + size],
                (channels, height, width),
                dtype,
            )
            parts[name].append(Part(file=file, rows=written, bytes=(folder / file).stat().st_size))
    assert all(
        len(m["image"]) == image_bytes((channels, height, width), dtype)
        for ms in rows.values()
        for m in ms
    )
    train = images[np.array(splits) == "train"]
    statistics = np.nan_to_num(train if len(train) else images if count else np.zeros((1, *shape)))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created_by="tests",
        name=folder.name,
        layout="flat",
        channels=channels,
        height=height,
        width=width,
        dtype=dtype,  # type: ignore[arg-type]
        mean=tuple(statistics.mean(axis=(0, 2, 3), dtype=np.float64).tolist()),
        std=tuple((statistics.std(axis=(0, 2, 3), dtype=np.float64)).clip(1e-9).tolist()),
        counts={name: _counts(members) for name, members in rows.items()},
        parts=parts,
        split_rule="as made",
        group_rule="as made",
        group_rows=group_rows((channels, height, width), dtype),
        left_out=0,
        rejected=0,
        dropped=0,
        salt=None,
        config=PrepareConfig(),
        fingerprint="made",
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1))
    return PatchDataset.open(folder)


def _counts(members: list[dict[str, Any]]) -> Counts:
    labeled = [row for row in members if row["mask"] is not None]
    return Counts(
        images=len(members),
        labeled=len(labeled),
        lesions=sum(row["lesion"] > 0 for row in labeled),
    )
