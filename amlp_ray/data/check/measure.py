"""What a check knows of every image: the light columns of a dataset, and numbers measured from pixels in one pass."""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pandas as pd

from amlp_ray.data.check.burned_in_text import LEAST_SIDE, text_scores
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.manifest import SPLITS
from amlp_ray.data.parquet import Shape, images_of, masks_of, read_part
from amlp_ray.data.path import DataPath

PIECE = (
    1 << 22
)  # values looked at together: float32 copies of them stay small and near the processor
THREADS = min(
    3, os.cpu_count() or 1
)  # each holds a row group of at most 16 MiB, and some 150 MiB of intermediates

Say = Callable[[str], None]


class RowGroup(NamedTuple):
    """A run of images that lie together in a part."""

    split: str
    file: DataPath
    number: int


def measured(dataset: PatchDataset, progress: Say | None = None) -> pd.DataFrame:
    """A row per image, in the order of `dataset.table()`, with its columns, `row` in its split, and of its pixels:

    - `mean`, `sd`: over all channels, in stored units; values that are not finite are left out;
    - `low`, `high`: smallest and largest value;
    - `top`: share of values that equal the largest;
    - `bad`: values that are not finite;
    - `digest`: 64 bits of a cryptographic hash of the stored pixels;
    - `border`: whether the lesion touches the image's border;
    - `text`: letters seen, see `text.text_scores`; NaN where the images are too small to tell.

    Raises:
        DataError: a part is damaged.
    """
    table = dataset.table()
    table["row"] = table.groupby("split", sort=False).cumcount()
    if not len(table):
        empty = _of_images(np.zeros((0, *dataset.shape), dataset.manifest.dtype))
        return table.assign(**empty, border=np.zeros(0, bool))
    groups = list(_row_groups(dataset))
    results: list[dict[str, np.ndarray]] = []
    waiting: deque[Future[dict[str, np.ndarray]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for number, group in enumerate(groups):
                waiting.append(pool.submit(_of_group, group, dataset.shape, dataset.manifest.dtype))
                if len(waiting) > THREADS:
                    results.append(waiting.popleft().result())
                if progress and number and number % 64 == 0:
                    progress(
                        f"Looked at {sum(len(r['mean']) for r in results)} of {len(table)} images."
                    )
            results += [future.result() for future in waiting]
        finally:
            pool.shutdown(cancel_futures=True)
    return table.assign(
        **{name: np.concatenate([result[name] for result in results]) for name in results[0]}
    )


def gray8(images: np.ndarray) -> np.ndarray:
    """Average or, of three, weigh the channels of images (N, C, H, W): (N, H, W) uint8.

    Other types than uint8 are stretched from each image's smallest value to its largest, so that an overlay keeps its
    distance from what is below it.
    """
    channels = images.shape[1]
    if images.dtype == np.uint8 and channels == 1:
        return images[:, 0]
    weights = np.array(
        [0.299, 0.587, 0.114] if channels == 3 else [1 / channels] * channels, np.float32
    )
    gray = np.einsum("nchw,c->nhw", images.astype(np.float32), weights)
    if images.dtype == np.uint8:
        return gray.round().astype(np.uint8)
    finite = np.isfinite(gray)
    low = np.where(finite, gray, np.inf).min(axis=(1, 2), keepdims=True)
    high = np.where(finite, gray, -np.inf).max(axis=(1, 2), keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        stretched = (gray - low) * (255 / (high - low))
    return np.nan_to_num(stretched, nan=0.0, posinf=0.0, neginf=0.0).clip(0, 255).astype(np.uint8)


def _row_groups(dataset: PatchDataset) -> Iterator[RowGroup]:
    size = dataset.manifest.group_rows
    for split in SPLITS:
        for file, part in zip(dataset.files(split), dataset.manifest.parts[split], strict=True):
            yield from (RowGroup(split, file, number) for number in range(-(-part.rows // size)))


def _of_group(group: RowGroup, shape: Shape, dtype: str) -> dict[str, np.ndarray]:
    table = read_part(group.file, ["image", "mask"], group.number)
    images = images_of(table["image"], shape, dtype)
    masks, _ = masks_of(table["mask"], shape)
    border = np.asarray(masks[:, [0, -1]].any(axis=(1, 2)) | masks[:, :, [0, -1]].any(axis=(1, 2)))
    rows = max(1, PIECE // int(np.prod(shape)))
    pieces = [_of_images(images[start : start + rows]) for start in range(0, len(images), rows)]
    return {
        **{name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]},
        "border": border,
    }


def _of_images(images: np.ndarray) -> dict[str, np.ndarray]:
    """Measure images (N, C, H, W) that fit in memory several times."""
    count, _, height, width = images.shape
    flat = images.reshape(count, math.prod(images.shape[1:]))
    bad = np.zeros(count, np.int64)
    values = flat.astype(np.float32)
    if images.dtype == np.float32:
        finite = np.isfinite(values)
        bad = np.count_nonzero(~finite, axis=1)
        if bad.any():
            center = np.where(finite, values, 0).sum(axis=1) / np.maximum(values.shape[1] - bad, 1)
            values = np.where(finite, values, center[:, None])
    mean = values.mean(axis=1)
    sd = np.sqrt(np.square(values - mean[:, None]).mean(axis=1))
    low, high = (values.min(axis=1), values.max(axis=1)) if count else (mean, mean)
    enough = min(height, width) >= LEAST_SIDE
    return {
        "mean": mean,
        "sd": sd,
        "low": low,
        "high": high,
        "top": np.count_nonzero(values == high[:, None], axis=1) / max(1, flat.shape[1]),
        "bad": bad,
        "digest": np.array([_digest(row) for row in flat], np.uint64),
        "text": text_scores(gray8(images))
        if enough and count
        else np.full(count, np.nan, np.float32),
    }


def _digest(pixels: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(pixels.data, digest_size=8).digest(), "little")
