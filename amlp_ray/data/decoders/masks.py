"""Select which values of a mask are lesion, whatever the mask's file format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_LISTED = 8  # values that a note names


def select_lesion(
    labels: np.ndarray, lesion_labels: tuple[int, ...]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Turn the labels of a mask into uint8 of 0 and 1.

    A note says if a mask has labels of which none is lesion: most often `lesion_labels` was
    written for another numbering.

    >>> select_lesion(np.array([[0, 3, 7]]), (1, 2))[1]
    ('has the values 3, 7 but lesion_labels are 1, 2: counted as no lesion',)

    Args:
        labels: of any shape and number type.
        lesion_labels: values that are lesion; none takes all above zero.

    Returns:
        The mask, of the shape of `labels`, and notes.
    """
    if not lesion_labels:
        return (labels > 0).astype(np.uint8), ()
    mask = np.isin(labels, lesion_labels).astype(np.uint8)
    if mask.any() or not labels.any():
        return mask, ()
    listed = list_values(np.unique(labels[labels != 0]).tolist())
    lesion_values = ", ".join(map(str, lesion_labels))
    note = f"has the values {listed} but lesion_labels are {lesion_values}: counted as no lesion"
    return mask, (note,)


def list_values(values: Sequence[float]) -> str:
    """Name values of a mask in a message, the first of them if there are many.

    >>> list_values([0, 0.5, 255])
    '0, 0.5, 255'
    """
    listed = ", ".join(f"{value:g}" for value in values[:MAX_LISTED])
    if len(values) > MAX_LISTED:
        listed += f" and {len(values) - MAX_LISTED} more"
    return listed
