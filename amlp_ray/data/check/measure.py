"""Measure every image of a dataset in one pass over its pixels."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd

from amlp_ray.data.check.burned_in_text import MIN_SIDE, text_scores
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.shuffle import row_groups_of
from amlp_ray.data.manifest import SPLITS
from amlp_ray.data.parquet import StoredPart, images_of, masks_of, read_part
from amlp_ray.data.prepare.near_duplicates import GRAY_WEIGHTS

logger = logging.getLogger(__name__)

# Values measured together: their float32 copies stay small and near the processor.
CHUNK_VALUES = 1 << 22
# Each thread holds a row group of at most 16 MiB, and some 150 MiB of intermediates.
THREADS = min(3, os.cpu_count() or 1)
LOG_GROUPS = 64  # row groups between two messages

Columns = dict[str, np.ndarray]


def measure_dataset(dataset: PatchDataset) -> pd.DataFrame:
    """Return a row per image, in the order of `dataset.table()`.

    It has the columns of that table, `row` in the split, and of the pixels:

    - `mean`, `sd`: over all channels, in stored units; values that are not finite are left out;
    - `low`, `high`: smallest and largest value;
    - `top`: share of values that equal the largest;
    - `bad`: values that are not finite;
    - `digest`: 64 bits of a cryptographic hash of the stored pixels;
    - `border`: whether the lesion touches the image's border;
    - `text`: letters, see `burned_in_text.text_scores`; NaN if the images are too small to tell.

    Raises:
        DataError: a part is damaged.
    """
    table = dataset.table()
    table["row"] = table.groupby("split", sort=False).cumcount()
    if not len(table):
        columns = _measure_images(np.zeros((0, *dataset.shape), dataset.manifest.dtype))
        return table.assign(**columns, border=np.zeros(0, bool))
    parts = []
    numbers = []
    for split in SPLITS:
        parts_of_split = dataset.parts(split)
        for group in row_groups_of(dataset.manifest, split):
            parts.append(parts_of_split[group.part])
            numbers.append(group.number)
    results: list[Columns] = []
    measured = 0
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for number, columns in enumerate(pool.map(_measure_group, parts, numbers), 1):
                results.append(columns)
                measured += len(columns["mean"])
                if number % LOG_GROUPS == 0:
                    logger.info("Measured %d of %d images.", measured, len(table))
        finally:
            pool.shutdown(cancel_futures=True)
    return table.assign(**_concatenate(results))


def to_gray8(images: np.ndarray) -> np.ndarray:
    """Turn images (N, C, H, W) into gray ones (N, H, W) uint8; three channels are weighed.

    Other types than uint8 are stretched from each image's smallest value to its largest, so that an
    overlay keeps its distance from what is below it.
    """
    channels = images.shape[1]
    if images.dtype == np.uint8 and channels == 1:
        return images[:, 0]
    weights = GRAY_WEIGHTS if channels == 3 else [1 / channels] * channels
    gray = np.einsum("nchw,c->nhw", images.astype(np.float32), np.array(weights, np.float32))
    if images.dtype == np.uint8:
        return gray.round().astype(np.uint8)
    finite = np.isfinite(gray)
    low = np.where(finite, gray, np.inf).min(axis=(1, 2), keepdims=True)
    high = np.where(finite, gray, -np.inf).max(axis=(1, 2), keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        stretched = (gray - low) * (255 / (high - low))
    return np.nan_to_num(stretched, nan=0.0, posinf=0.0, neginf=0.0).clip(0, 255).astype(np.uint8)


def _measure_group(part: StoredPart, number: int) -> Columns:
    table = read_part(part, ["image", "mask"], number)
    images = images_of(table["image"], part.shape, part.dtype)
    masks, _ = masks_of(table["mask"], part.shape)
    touches_top_or_bottom = masks[:, [0, -1]].any(axis=(1, 2))
    touches_side = masks[:, :, [0, -1]].any(axis=(1, 2))
    rows = max(1, CHUNK_VALUES // int(np.prod(part.shape)))
    chunks = []
    for start in range(0, len(images), rows):
        chunks.append(_measure_images(images[start : start + rows]))
    border = np.asarray(touches_top_or_bottom | touches_side)
    return {**_concatenate(chunks), "border": border}


def _measure_images(images: np.ndarray) -> Columns:
    """Measure images (N, C, H, W) that fit in memory several times."""
    count, _, height, width = images.shape
    flat = images.reshape(count, math.prod(images.shape[1:]))
    values = flat.astype(np.float32)
    bad = np.zeros(count, np.int64)
    if images.dtype == np.float32:
        finite = np.isfinite(values)
        bad = np.count_nonzero(~finite, axis=1)
        if bad.any():
            sums = np.where(finite, values, 0).sum(axis=1)
            center = sums / np.maximum(values.shape[1] - bad, 1)
            values = np.where(finite, values, center[:, None])
    mean = values.mean(axis=1)
    low = values.min(axis=1) if count else mean
    high = values.max(axis=1) if count else mean
    text = np.full(count, np.nan, np.float32)
    if count and min(height, width) >= MIN_SIDE:
        text = text_scores(to_gray8(images))
    return {
        "mean": mean,
        "sd": np.sqrt(np.square(values - mean[:, None]).mean(axis=1)),
        "low": low,
        "high": high,
        "top": np.count_nonzero(values == high[:, None], axis=1) / max(1, flat.shape[1]),
        "bad": bad,
        "digest": np.array([_digest(row) for row in flat], np.uint64),
        "text": text,
    }


def _concatenate(chunks: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _digest(pixels: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(pixels.data, digest_size=8).digest(), "little")
