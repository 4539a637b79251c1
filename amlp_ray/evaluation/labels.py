"""Labelled images: which there are, told without reading a pixel, and whether they suit an encoder trained on others.

A data set of 200,000 images is tens of GB with its masks, of which a score or a picture needs some hundred. So rows
are chosen in the light columns of a data set, and only those are read.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from amlp_ray.config import ImageSpec, SegmentConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import ConfigError, DataError

Rows = NDArray[np.int64]

# Of two scanners of one kind, means differ by a fraction of an SD. 0-255 against 0-65535 or Hounsfield units, or values
# windowed against values kept, lie far outside both.
FAR_SDS, FAR_RATIO = 3.0, 5.0


def lesion_pixels(dataset: PatchDataset, split: str) -> NDArray[np.float64]:
    """Lesion pixels of every image of a split, (N,); NaN where unlabelled, 0 where there is no lesion."""
    return dataset.table(split, columns=["lesion"])["lesion"].to_numpy(np.float64)


def spread(rows: Rows, count: int) -> Rows:
    """At most `count` of the rows, evenly apart, the first and the last among them."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def by_part(dataset: PatchDataset, split: str, rows: Rows | None = None) -> Iterator[Rows]:
    """Cut the (sorted) rows of a split where its files end: read so, each file is read once, one at a time."""
    start = 0
    for part in dataset.manifest.parts[split]:
        inside = np.arange(start, start + part.rows)
        if rows is not None:
            inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + part.rows)]
        if len(inside):
            yield inside
        start += part.rows


def train_rows(dataset: PatchDataset, config: SegmentConfig) -> Rows:
    """Training images with a lesion: all, as many as `labels` says, or the groups that make up `label_share`."""
    rows = np.flatnonzero(lesion_pixels(dataset, "train") > 0)
    _require(dataset, "train", len(rows), config.num_labeled or 1)
    draw = np.random.default_rng(config.seed)
    if config.num_labeled:
        return np.sort(draw.permutation(rows)[: config.num_labeled])
    if config.label_share is None:
        return rows
    groups = dataset.table("train", columns=["group"])["group"].to_numpy()[rows]
    names, group, images = np.unique(groups, return_inverse=True, return_counts=True)
    order = draw.permutation(len(names))  # a larger share takes more of the same, from the start
    reached = np.searchsorted(np.cumsum(images[order]), config.label_share * len(rows) - 1e-9)
    return rows[np.isin(group, order[: reached + 1])]


def labeled_rows(dataset: PatchDataset, split: str) -> Rows:
    """Labelled images of a split; read when they are scored, a file at a time."""
    pixels = lesion_pixels(dataset, split)
    _require(dataset, split, int((pixels > 0).sum()), 1)
    return np.flatnonzero(np.isfinite(pixels))


def _require(dataset: PatchDataset, split: str, found: int, wanted: int) -> None:
    if found < wanted:
        raise DataError(
            f"{dataset.path} has {found} labelled {split} images with a lesion, but {wanted} are needed; "
            f"add masks or lower labels."
        )


def check_fits(dataset: PatchDataset, trained: ImageSpec, whose: str) -> None:
    """Raise ConfigError where images differ in shape, or clearly in scale, from those that an encoder is trained on.

    They are normalised by the encoder's mean and SD, those of its pretraining set, and not by their own: its weights
    have learnt what a value means in that scale. Their own would give a Hounsfield unit another meaning in each set,
    and shift a set whose images happen to show more of an organ, or more air, against one that shows less. So where a
    scanner's values mean nothing (MRI) or two scanners differ in gain, that is to be settled before, for both sets
    alike: by `values=percentile` when they are prepared.

    Args:
        whose: what `trained` belongs to, such as "e.safetensors was trained on", to begin the message with.
    """
    ours, theirs = (
        "x".join(map(str, (s.channels, s.height, s.width))) for s in (dataset.spec, trained)
    )
    if ours != theirs:
        raise ConfigError(
            f"{whose} {theirs} images (channels, height, width), but {dataset.path} holds {ours}; prepare the data "
            f"alike."
        )
    mean, std, own_mean, own_std = (
        np.asarray(x) for x in (trained.mean, trained.std, dataset.spec.mean, dataset.spec.std)
    )
    ratio = np.maximum(own_std, 1e-12) / np.maximum(std, 1e-12)
    far = (np.abs(own_mean - mean) > FAR_SDS * std) | (ratio > FAR_RATIO) | (ratio < 1 / FAR_RATIO)
    if far.any():
        c = int(far.argmax())
        raise ConfigError(
            f"{whose} values around {mean[c]:.4g} (SD {std[c]:.4g}), but those of {dataset.path} lie around "
            f"{own_mean[c]:.4g} (SD {own_std[c]:.4g}); prepare both with the same `values` and window."
        )
