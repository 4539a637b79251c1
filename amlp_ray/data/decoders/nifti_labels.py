"""Turn the values of NIfTI label volumes into lesion or not.

Whole numbers are labels, unless there are too many of them. Soft labels, such as probabilities or
labels that were resampled, are read by the rule of the set's masks: see `mask_rule`.
"""

from __future__ import annotations

import numpy as np

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.mask_rule import MAX_LABEL, MaskRule, read_mask_as
from amlp_ray.data.decoders.mask_values import MaskValues, plane_values
from amlp_ray.data.decoders.masks import select_lesion
from amlp_ray.errors import DataError
from amlp_ray.utils.text import counted

LABEL_TOLERANCE = 1e-3  # by which a scaled label may differ from a whole number


def clean_labels(path: str, labels: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Round labels that are whole but for the rounding of a scaled file, and set NaN to zero.

    Returns:
        The labels (X, Y, Z), of their own type, and notes.

    Raises:
        DataError: a label is infinite.
    """
    if labels.dtype.kind != "f":
        return labels, ()
    is_nan = np.isnan(labels)
    if np.isinf(labels).any():
        raise DataError(f"{path} is a label volume with infinite values; export it again.")
    notes: tuple[str, ...] = ()
    if is_nan.any():
        labels = np.where(is_nan, 0, labels)
        count = counted(int(is_nan.sum()), "voxel")
        notes = (f"its label volume {path} is NaN in {count}: counted as no lesion",)
    rounded = np.rint(labels)
    is_whole = np.abs(labels - rounded).max() < LABEL_TOLERANCE
    return (rounded if is_whole else labels), notes


def label_values(path: str, labels: np.ndarray, config: PrepareConfig) -> MaskValues:
    """Sum up the values of a label volume (X, Y, Z) for the rule of the set."""
    lesions = labels[labels != 0]
    # One zero stands for all of the background, which need not be sorted.
    zeros = np.zeros(int(lesions.size < labels.size), labels.dtype)
    values = plane_values(np.concatenate([zeros, lesions]))
    is_label_map = values.is_whole and bool(values.values) and values.lowest >= 0
    is_ruled = bool(config.lesion_labels) or config.lesion_threshold is not None
    if is_label_map and values.highest > MAX_LABEL and not is_ruled:
        # Atlases number their labels in thousands, which pictures would mean as grays.
        values = plane_values(np.concatenate([zeros, lesions]) > 0)
    return MaskValues(
        path=path, colors=values, num_colors=0, is_colored=False, lossy_kind="", is_one_bit=False
    )


def find_lesion_voxels(
    labels: np.ndarray, values: MaskValues, rule: MaskRule, config: PrepareConfig
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the lesion of a label volume (X, Y, Z), uint8 of 0 and 1, and notes."""
    if config.lesion_labels:
        return select_lesion(labels, config.lesion_labels)
    threshold = read_mask_as(values, rule, config).threshold
    return (labels > threshold).astype(np.uint8), ()
