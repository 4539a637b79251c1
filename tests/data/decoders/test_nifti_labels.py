"""Label volumes that are soft, atlases, or damaged: what of them is lesion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.volumes import write_nifti
from scipy import ndimage

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders import Frame, read_frames
from amlp_ray.data.decoders.mask_questions import describe_masks
from amlp_ray.data.decoders.mask_rule import choose_rule
from amlp_ray.data.layouts.item import SourceImage
from amlp_ray.errors import DataError

BOX = np.zeros((20, 20, 20), np.float32)
BOX[4:16, 4:16, 4:16] = 1
SOFT = ndimage.gaussian_filter(BOX, 0.7).astype(np.float32)
PROBABILITIES = np.random.default_rng(0).random((20, 20, 20)).astype(np.float32)
ATLAS = (BOX * 1001).astype(np.int16) + (SOFT > 0.999).astype(np.int16) * 1034
TWO_LABELS = BOX.astype(np.uint8) + (SOFT > 0.999)


def frames_of(folder: Path, *labels: np.ndarray, **config: Any) -> list[Frame]:
    image = write_nifti(folder / "i.nii.gz", np.ones(labels[0].shape, np.uint8))
    masks = []
    for number, values in enumerate(labels):
        masks.append(str(write_nifti(folder / f"i_seg_{number}.nii.gz", values)))
    item = SourceImage("i", "nifti", (str(image),), tuple(masks), "i")
    return list(read_frames(item, PrepareConfig(**config)))


def lesion_voxels(frames: list[Frame]) -> int:
    return sum(int(np.count_nonzero(frame.mask)) for frame in frames)


def told(frames: list[Frame], **config: Any) -> list[str]:
    """Return what users are told of the labels of a set of one item."""
    settings = PrepareConfig(**config)
    values = [one for frame in frames for one in frame.mask_values]
    return describe_masks(values, choose_rule(values, settings), settings)


def test_soft_labels_are_cut_at_half_and_it_is_told(tmp_path: Path) -> None:
    frames = frames_of(tmp_path, SOFT)
    assert lesion_voxels(frames) == np.count_nonzero(SOFT > 0.5)
    assert np.count_nonzero(SOFT > 0) > 1.5 * np.count_nonzero(SOFT > 0.5)  # what swelled before
    (sentence,) = told(frames)
    assert "above 0.5, half of the highest, is lesion; --lesion-threshold" in sentence


@pytest.mark.parametrize("threshold", [0, 0.1, 0.9])
def test_a_threshold_is_kept(threshold: float, tmp_path: Path) -> None:
    frames = frames_of(tmp_path, SOFT, BOX, lesion_threshold=threshold)
    expected = np.count_nonzero((threshold < SOFT) | (threshold < BOX))
    assert lesion_voxels(frames) == expected
    assert told(frames, lesion_threshold=threshold) == []


@pytest.mark.parametrize(
    "labels", [PROBABILITIES, (PROBABILITIES * 100).astype(np.int16), TWO_LABELS - BOX / 2]
)
def test_labels_that_may_be_anything_are_asked_about(labels: np.ndarray, tmp_path: Path) -> None:
    frames = frames_of(tmp_path, labels.astype(labels.dtype))
    with pytest.raises(
        DataError, match=r"i_seg_0\.nii\.gz .*Say what is lesion: .*--lesion-thresh"
    ):
        told(frames)


@pytest.mark.parametrize("labels", [BOX, TWO_LABELS, ATLAS, BOX.astype(np.uint8) * 255])
def test_whole_labels_are_lesion_above_zero(labels: np.ndarray, tmp_path: Path) -> None:
    frames = frames_of(tmp_path, labels)
    assert lesion_voxels(frames) == np.count_nonzero(labels)
    assert all("many values" not in sentence for sentence in told(frames))


@pytest.mark.parametrize(("labels", "wanted"), [(ATLAS, 2035), (TWO_LABELS, 2)])
def test_wanted_labels_are_taken_and_unknown_ones_are_errors(
    labels: np.ndarray, wanted: int, tmp_path: Path
) -> None:
    frames = frames_of(tmp_path, labels, lesion_labels=(wanted,))
    assert lesion_voxels(frames) == np.count_nonzero(labels == wanted)
    assert told(frames, lesion_labels=(wanted,)) == []
    with pytest.raises(DataError, match=r"None of 1 masks? holds? lesion_labels 7"):
        told(frames, lesion_labels=(7,))


def test_nan_is_no_lesion_and_told_and_infinity_an_error(tmp_path: Path) -> None:
    frames = frames_of(tmp_path, np.where(BOX > 0, 1, np.nan).astype(np.float32))
    assert lesion_voxels(frames) == np.count_nonzero(BOX)
    assert "is NaN in 6272 voxels: counted as no lesion" in frames[0].notes[0]
    with pytest.raises(DataError, match=r"i_seg_0\.nii\.gz is a label volume with infinite"):
        frames_of(tmp_path, np.where(BOX > 0, np.inf, 0).astype(np.float32))
