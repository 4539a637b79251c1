"""Select labeled images without reading pixels, and check that they fit an encoder.

A dataset of 200,000 images is tens of GB with its masks, of which a score or a picture needs some
hundred images. So rows are chosen from the light columns of a dataset, and only those are read.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from amlp_ray.config import ImageSpec, SegmentConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import ConfigError, DataError

Rows = NDArray[np.int64]

# How far mean (in SDs) and SD (as a ratio) of two datasets may differ. Means of two scanners of one
# kind differ by a fraction of an SD. 0-255 against 0-65535 or Hounsfield units, or windowed values
# against raw ones, are far outside both.
MAX_MEAN_DISTANCE = 3.0
MAX_SD_RATIO = 5.0

# Images without a lesion that are read for fine-tuning, over those that an epoch takes: epochs
# differ, and memory has a bound where nearly all slices are empty.
EMPTY_POOL = 4


def lesion_pixels(dataset: PatchDataset, split: str) -> NDArray[np.float64]:
    """Return the lesion pixels of every image of a split, (N,).

    NaN stands for an unlabeled image, 0 for one without a lesion.
    """
    return dataset.table(split, columns=["lesion"])["lesion"].to_numpy(np.float64)


def spread(rows: Rows, count: int) -> Rows:
    """Choose at most `count` rows, evenly spaced, the first and the last among them."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def by_part(dataset: PatchDataset, split: str, rows: Rows | None = None) -> Iterator[Rows]:
    """Yield the rows of a split file by file, so that each file is read once.

    Args:
        rows: sorted; None: all.
    """
    if rows is None:
        rows = np.arange(dataset.count(split))
    start = 0
    for part in dataset.manifest.parts[split]:
        end = start + part.rows
        inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)]
        if len(inside):
            yield inside
        start = end


def train_rows(dataset: PatchDataset, config: SegmentConfig) -> Rows:
    """Select training images with a lesion.

    All of them, `config.num_labeled`, or the groups that make up `config.label_share`.

    Raises:
        DataError: there are too few.
    """
    rows = np.flatnonzero(lesion_pixels(dataset, "train") > 0)
    _require(dataset, "train", len(rows), config.num_labeled or 1)
    rng = np.random.default_rng(config.seed)
    if config.num_labeled:
        return np.sort(rng.permutation(rows)[: config.num_labeled])
    if config.label_share is None:
        return rows
    return rows[_in_share(_train_groups(dataset)[rows], config.label_share, rng)]


def empty_rows(dataset: PatchDataset, config: SegmentConfig) -> Rows:
    """Select training images without a lesion, from which every epoch draws; see `empty_share`.

    With `config.num_labeled` they are as many as an epoch takes. With `config.label_share` they are
    those of the patients drawn by `train_rows`, and the same share of patients without any lesion.
    """
    pixels = lesion_pixels(dataset, "train")
    rows = np.flatnonzero(pixels == 0)
    lesion_rows = train_rows(dataset, config)
    # Other numbers than those which `train_rows` draws.
    rng = np.random.default_rng([config.seed, 1])
    if config.label_share is not None:
        groups = _train_groups(dataset)
        is_drawn = np.isin(groups[rows], groups[lesion_rows])
        is_healthy = ~np.isin(groups[rows], groups[pixels > 0])
        healthy = rows[is_healthy]
        drawn_healthy = healthy[_in_share(groups[healthy], config.label_share, rng)]
        rows = np.sort(np.concatenate([rows[is_drawn], drawn_healthy]))
    count = empty_count(len(lesion_rows), len(rows), config.empty_share)
    pool = count if config.num_labeled else EMPTY_POOL * count
    return np.sort(rng.permutation(rows)[:pool])


def empty_count(n_lesion: int, n_empty: int, share: float) -> int:
    """Count the images without a lesion of an epoch that has `n_lesion` with one.

    Args:
        n_empty: how many there are; none is taken twice.
        share: `empty_share`.

    >>> empty_count(90, 1000, 0.1), empty_count(90, 5, 0.5), empty_count(90, 1000, 1.0)
    (10, 5, 1000)
    """
    if share == 1:
        return n_empty
    return min(n_empty, round(n_lesion * share / (1 - share)))


def _train_groups(dataset: PatchDataset) -> NDArray[np.object_]:
    return dataset.table("train", columns=["group"])["group"].to_numpy()


def _in_share(
    groups: NDArray[np.object_], share: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Draw whole groups until they have a share of the images; return which images (n,) are theirs.

    Args:
        groups: of the images, (n,).
    """
    names, group, images = np.unique(groups, return_inverse=True, return_counts=True)
    # A larger share takes more groups of the same order.
    order = rng.permutation(len(names))
    last = np.searchsorted(np.cumsum(images[order]), share * len(groups) - 1e-9)
    return np.isin(group, order[: last + 1])


def labeled_rows(dataset: PatchDataset, split: str) -> Rows:
    """Select the labeled images of a split.

    Raises:
        DataError: none has a lesion.
    """
    pixels = lesion_pixels(dataset, split)
    _require(dataset, split, int((pixels > 0).sum()), 1)
    return np.flatnonzero(np.isfinite(pixels))


def _require(dataset: PatchDataset, split: str, count: int, needed: int) -> None:
    if count < needed:
        raise DataError(
            f"{dataset.path} has {count} labeled {split} images with a lesion, but {needed} are "
            f"needed; add masks or lower num_labeled."
        )


def check_fits(dataset: PatchDataset, trained: ImageSpec, subject: str) -> None:
    """Raise ConfigError if images differ in shape or clearly in scale from an encoder's.

    Images are normalized by the encoder's mean and SD, those of its pretraining dataset: its
    weights learned what a value means in that scale. Their own mean and SD would give a Hounsfield
    unit another meaning in each dataset, and shift a dataset that happens to show more of an organ
    or more air. Where a scanner's values mean nothing (MRI) or two scanners differ in gain, prepare
    both datasets with `values=percentile`.

    Args:
        dataset: with the images.
        trained: the images of the encoder.
        subject: what `trained` belongs to, such as "e.safetensors was trained on"; begins the
            message.
    """
    spec = dataset.spec
    if _shape_text(spec) != _shape_text(trained):
        raise ConfigError(
            f"{subject} {_shape_text(trained)} images (channels, height, width), but "
            f"{dataset.path} holds {_shape_text(spec)}; prepare the data alike."
        )
    mean = np.asarray(trained.mean)
    sd = np.asarray(trained.std)
    own_mean = np.asarray(spec.mean)
    own_sd = np.asarray(spec.std)
    ratio = np.maximum(own_sd, 1e-12) / np.maximum(sd, 1e-12)
    is_far = np.abs(own_mean - mean) > MAX_MEAN_DISTANCE * sd
    is_far |= (ratio > MAX_SD_RATIO) | (ratio < 1 / MAX_SD_RATIO)
    if is_far.any():
        channel = int(is_far.argmax())
        raise ConfigError(
            f"{subject} values around {mean[channel]:.4g} (SD {sd[channel]:.4g}), but those of "
            f"{dataset.path} lie around {own_mean[channel]:.4g} (SD {own_sd[channel]:.4g}); "
            f"prepare both with the same `values` and window."
        )


def _shape_text(spec: ImageSpec) -> str:
    return f"{spec.channels}x{spec.height}x{spec.width}"
